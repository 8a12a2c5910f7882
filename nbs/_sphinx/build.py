"""Render notebooks and API as a website: `python nbs/_sphinx/build.py FOLDER`.

nbdev's processors apply the directives (`#| hide`, `#| export` …) as they do for
`nbdev_docs`; `api.py` describes what a notebook exports. Nothing is executed, nothing
comes from a network, and a warning fails the build.
"""

import ast
import re
import shutil
import sys
import tempfile
from pathlib import Path

from api import Links, Module, Reference
from execnb.nbio import mk_cell, read_nb, write_nb
from nbdev.config import get_config
from nbdev.doclinks import nbglob
from nbdev.processors import FilterDefaults, _default_exp
from sphinx.cmd.build import build_main

HERE = Path(__file__).resolve().parent
# Captions of the sidebar, by the first digit of a notebook's number.
PARTS = {
    "0": "The story",
    "7": "How to",
    "12": "The machinery",
    "3": "Fast and far",
    "456": "Use it",
}


class Directives(FilterDefaults):
    """nbdev's processors, less those for which these files have their own: running
    `show_doc`, links, hiding exported code."""

    own = {
        "exec_show_docs",
        "add_links",
        "rm_export",
        "mv_exports",
        "add_fold",
        "insert_warning",
    }

    def base_procs(self):
        return [proc for proc in super().base_procs() if proc.__name__ not in self.own]


class Writer:
    """Turns notebooks into pages of MyST markdown that know each other's names."""

    def __init__(self, paths: list):
        self.pages = {path.name: page_name(path) for path in paths}
        if len(set(self.pages.values())) < len(paths):
            raise ValueError(f"two notebooks would be one page: {self.pages}")
        modules, shown = {}, {}
        for path in paths:
            notebook = read_nb(path)
            if module := _default_exp(notebook):
                modules[path.name] = Module(f"{get_config().lib_name}.{module}")
            Directives()(notebook)
            names = map(shown_name, notebook.cells)
            shown[path.name] = [name for name in names if name]
        self.links = Links(self.pages, modules, shown)
        self.reference = Reference(self.links, modules, shown)

    def text(self, source: str):
        """A cell of markdown, with its links."""
        return mk_cell(self.links.linked(source), "markdown")

    def relinked(self, cell):
        """A code cell whose outputs in markdown have their links."""
        for output in cell.outputs:
            data = output.get("data", {})
            if markdown := data.get("text/markdown"):
                data["text/markdown"] = self.links.linked("".join(markdown))
        return cell

    def page(self, path: Path):
        """The notebook as Sphinx's parser wants it: a title, the cells that are shown,
        descriptions of what is exported."""
        notebook = read_nb(path)
        Directives()(notebook)
        # nbdev makes front matter of the first cell, and drops most of its text
        cells = [self.text(without_quotation(read_nb(path).cells[0].source))]
        cells += self.story(path.name, notebook)
        if path.name == "index.ipynb":
            cells.append(mk_cell(self.contents(), "markdown"))
        notebook.cells = cells
        notebook.metadata.pop("widgets", None)
        return notebook

    def story(self, name: str, notebook) -> list:
        """The cells below the title. The notebooks of the story show their code, and
        describe it in a section at the end."""
        story, cells, reference = name.startswith("0"), [], []
        for cell in in_order(notebook.cells):
            if exported := shown_name(cell):
                described = self.reference.describe(name, exported)
                (reference if story else cells).append(mk_cell(described, "markdown"))
            elif cell.cell_type == "markdown":
                cells.append(self.text(cell.get("source") or ""))
            elif cell.cell_type == "code" and is_shown(cell, unfolded=story):
                if cells and is_folded(cell) and is_folded(cells[-1]):
                    cells[-1].source += f"\n\n\n{cell.source}"
                else:
                    cells.append(self.relinked(cell))
        if reference:
            reference.insert(0, mk_cell("## Reference", "markdown"))
        return cells + reference

    def contents(self) -> str:
        """The sidebar: the notebooks by part, each with its number."""
        numbered = {
            name: page for name, page in self.pages.items() if name != "index.ipynb"
        }
        trees = []
        for digits, caption in PARTS.items():
            pages = [page for name, page in numbered.items() if name[0] in digits]
            options = f":hidden:\n:caption: {caption}\n\n"
            if pages:
                listed = "\n".join(pages)
                trees.append(f"```{{toctree}}\n{options}{listed}\n```")
        return "\n\n".join(trees)


def page_name(path: Path) -> str:
    """A page is called after its notebook, without the number."""
    return re.sub(r"^\d+[a-zA-Z0-9]*_", "", path.stem)


def without_quotation(source: str) -> str:
    """The first cell with the quotation below its title as a plain paragraph."""
    title, _, rest = source.partition("\n\n")
    quotation, *rest = rest.split("\n\n")
    quotation = re.sub("^> ?", "", quotation, flags=re.M)
    return "\n\n".join([title, quotation, *rest])


def in_order(cells: list) -> list:
    """nbdev describes an exported cell below its code, the last definition first; here
    it stands above, in order."""
    result, group = [], []
    for cell in [*cells, mk_cell("", "markdown")]:
        if not getattr(cell, "has_sd", False):
            result += [*group[:0:-1], *group[:1]]
            group = []
        group.append(cell)
    return result


def shown_name(cell) -> str:
    """What a `show_doc` cell describes; empty for any other cell."""
    if cell.cell_type != "code":
        return ""
    match = re.search(r"^show_doc\(([\w.]+)", cell.get("source") or "", re.M)
    return match[1] if match else ""


def is_shown(cell, unfolded: bool = False) -> bool:
    """Whether a code cell is part of its page.

    Options of nbdev and Quarto become tags of myst-nb; exported code is folded, unless
    the page shows it `unfolded`."""
    source = cell.get("source") or ""
    options = dict(re.findall(r"^#\| *([\w-]+): *(.*?) *$", source, re.M))
    directives = cell.directives_.keys()
    cell.source = re.sub(r"^#\|.*\n?", "", source, flags=re.M).strip()
    if {"hide", "default_exp"} & directives or options.get("include") == "false":
        return False
    asked = options.get("code-fold") == "true"
    folded = asked or bool({"export", "exporti"} & directives)
    if folded and not cell.outputs and only_imports(cell):
        return False
    tags = {
        "remove-input": options.get("echo") == "false",
        "remove-output": options.get("output") == "false",
        "hide-input": folded and (asked or not unfolded),
    }
    cell.metadata = {"tags": [tag for tag, wanted in tags.items() if wanted]}
    if "fig-alt" in options:
        cell.metadata["mystnb"] = {"image": {"alt": options["fig-alt"]}}
    for output in cell.outputs:
        output.get("data", {}).pop("application/vnd.jupyter.widget-view+json", None)
    return bool(cell.source or cell.outputs)


def is_folded(cell) -> bool:
    """Whether nothing but a fold shows of a cell; those in a row share one."""
    tags = (cell.get("metadata") or {}).get("tags", [])
    return "hide-input" in tags and not cell.outputs


def only_imports(cell) -> bool:
    return all(
        isinstance(part, (ast.Import, ast.ImportFrom)) for part in cell.parsed_()
    )


def render(source: Path, site: Path, trees: Path) -> int:
    """Run Sphinx; the status is 0 unless it has something to complain of."""
    options = ["-q", "-W", "--keep-going", "-b", "html", "-c", HERE, "-d", trees]
    status = build_main([str(option) for option in (*options, source, site)])
    for page in site.rglob("*.html"):
        page.write_text(accessible(page.read_text("utf-8")), "utf-8")
    return status


def accessible(html: str) -> str:
    """A page of Sphinx and Furo with what a screen reader needs: levels of headings,
    names of side bars, and parameters as what they are, no list of definitions."""
    for where, more in {
        'class="caption" role="heading"': 'aria-level="2"',
        'class="sidebar-drawer"': 'aria-label="All pages"',
        'class="toc-drawer"': 'aria-label="This page"',
    }.items():
        html = html.replace(where, f"{where} {more}")
    return re.sub("<dl>(.*?)</dl>", parameters_of, html, flags=re.S)


def parameters_of(match) -> str:
    """The parameters of a signature, which Sphinx writes as a list without terms."""
    inner = match[1].replace("<dd>", "<div>").replace("</dd>", "</div>")
    return f'<div class="parameters">{inner}</div>'


def main(folder: str) -> int:
    images = get_config().nbs_path / "images"
    paths = sorted(nbglob(as_path=True), key=lambda path: path.name)
    paths.sort(key=lambda path: path.name != "index.ipynb")
    writer = Writer(paths)
    with tempfile.TemporaryDirectory() as scratch:
        source, site = Path(scratch, "source"), Path(scratch, "site")
        source.mkdir()
        for path in paths:
            write_nb(writer.page(path), source / f"{writer.pages[path.name]}.ipynb")
        if images.exists():
            shutil.copytree(images, source / "images")
        if status := render(source, site, Path(scratch, "trees")):
            return status
        shutil.rmtree(folder, ignore_errors=True)
        shutil.move(site, folder)
    print(f"The docs are in {folder}: open {folder}/index.html")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
