"""Render the notebooks, and the API of what they export, as a website.

Usage: `python nbs/_sphinx/build.py FOLDER`.

nbdev's processors apply the directives (`#| hide`, `#| export` …) as they do for
`nbdev_docs`. What a notebook exports is then described from the package: signature as
written, docstring, parameters or fields, a link to the source; names in `backticks`
lead to their description. Nothing is executed, nothing comes from a network, and a
warning fails the build.
"""

import ast
import importlib
import inspect
import re
import shutil
import sys
import tempfile
from pathlib import Path

from execnb.nbio import mk_cell, read_nb, write_nb
from fastcore.docments import docments
from nbdev.config import get_config
from nbdev.doclinks import nbglob
from nbdev.processors import FilterDefaults, _default_exp
from sphinx.cmd.build import build_main

HERE = Path(__file__).resolve().parent
# Captions of the sidebar, by the first digit of a notebook's number.
PARTS = {
    "0": "The story",
    "12": "The machinery",
    "3": "Fast and far",
    "4": "Use it",
}
FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)
LIMITS = {
    "gt": ">",
    "ge": "≥",
    "lt": "<",
    "le": "≤",
    "min_length": "length ≥",
    "max_length": "length ≤",
}


class Directives(FilterDefaults):
    """nbdev's processors, less those for which this file has its own: running
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


class Module:
    """An exported module: its definitions as they are written and as imported."""

    def __init__(self, name: str):
        self.name = name
        self.namespace = importlib.import_module(name)
        self.nodes = {}
        for node in ast.parse(
            Path(self.namespace.__file__).read_text(encoding="utf-8")
        ).body:
            if isinstance(node, (*FUNCTION, ast.ClassDef)):
                self.nodes[patched_name(node)] = node
            if isinstance(node, ast.ClassDef):
                self.nodes.update(
                    {
                        f"{node.name}.{part.name}": part
                        for part in node.body
                        if isinstance(part, FUNCTION)
                    }
                )

    def public_methods(self, name: str) -> list:
        """Names of the documented methods of class `name`, in the source's order."""
        return [
            method
            for method, node in self.nodes.items()
            if method.startswith(name + ".")
            and not node.name.startswith("_")
            and ast.get_docstring(node)
        ]

    def object(self, name: str):
        """The function or class called `name`, without its decorators' wrappers."""
        found = self.namespace
        for part in name.split("."):
            found = inspect.getattr_static(found, part)
        return (
            getattr(found, "__func__", None)
            or getattr(found, "fget", None)
            or getattr(found, "func", None)
            or found
        )


def patched_name(node) -> str:
    """The name of a definition; of a method that `@patch` adds, its class's as well."""
    decorators = {ast.unparse(one).split("(")[0] for one in node.decorator_list}
    if "patch" not in decorators:
        return node.name
    return f"{ast.unparse(node.args.args[0].annotation)}.{node.name}"


class Writer:
    """Turns notebooks into pages of MyST markdown that know each other's names."""

    def __init__(self, pages: dict, modules: dict, shown: dict):
        self.pages, self.modules, self.shown = pages, modules, shown
        names = {}
        for notebook, module in modules.items():
            for name in [
                name
                for top in shown[notebook]
                for name in (top, *module.public_methods(top))
            ]:
                for alias in {name, f"{module.name}.{name}"}:
                    names.setdefault(alias, set()).add(f"{module.name}.{name}")
        self.names = {
            alias: full.pop() for alias, full in names.items() if len(full) == 1
        }

    def linked(self, text: str) -> str:
        """`text` with exported names in backticks linked to their description, and
        notebooks to their pages."""

        def name(match):
            full = self.names.get(match[1])
            return f"{{py:obj}}`{match[1]}{match[2]} <{full}>`" if full else match[0]

        def page(match):
            return (
                f"]({self.pages[match[1]]}.ipynb"
                if match[1] in self.pages
                else match[0]
            )

        lines, fenced = [], False
        for line in text.splitlines():
            if re.match(r"\s*(```|~~~)", line):
                fenced = not fenced
            elif not fenced and not line.startswith("    "):
                line = re.sub(r"\]\((?:nbs/)?([\w-]+\.ipynb)", page, line)
                line = re.sub(
                    r"(?<![`}\[])`([A-Za-z_][\w.]*)((?:\(\))?)`(?![`\]])", name, line
                )
            lines.append(line)
        return "\n".join(lines)

    def describe(self, notebook: str, name: str) -> str:
        """A Sphinx description of `name`, a class with those of its methods that have
        no description of their own."""
        module = self.modules[notebook]
        node, found = module.nodes[name], module.object(name)
        body = [self.linked(inspect.cleandoc(ast.get_docstring(node) or ""))]
        decorators = {
            ast.unparse(decorator).split("(")[0].split(".")[-1]
            for decorator in node.decorator_list
        }
        options = [f":module: {module.name}"]
        if isinstance(node, ast.ClassDef):
            kind, signature = "class", class_signature(module.nodes, name, decorators)
            body.append(self.fields(node, found) or self.parameters(found))
            body += [
                self.describe(notebook, method)
                for method in module.public_methods(name)
                if method not in self.shown[notebook]
            ]
        elif decorators & {"property", "cached_property"}:
            kind, signature = "property", ""
            if node.returns is not None:
                options.append(f":type: {ast.unparse(node.returns)}")
        else:
            kind = "method" if "." in name else "function"
            signature = written_signature(
                node, bound=kind == "method" and "staticmethod" not in decorators
            )
            options += [
                f":{decorator}:"
                for decorator in ("classmethod", "staticmethod")
                if decorator in decorators
            ]
            body.append(self.parameters(found))
        content = "\n\n".join(part for part in body if part)
        fence = ":" * max(
            [3, *(len(run) + 1 for run in re.findall(r"^:{3,}", content, re.M))]
        )
        return "\n".join(
            [f"{fence}{{py:{kind}}} {name}{signature}", *options, "", content, fence]
        )

    def parameters(self, function) -> str:
        """Table of the parameters and the comments beside them; empty where there are
        no such comments."""
        try:
            comments = docments(function, full=True)
        except (TypeError, ValueError, OSError, NameError):
            return ""
        rows = []
        for name, about in comments.items():
            default = about.get("default", inspect.Parameter.empty)
            if about.get("docment"):
                rows.append(
                    [
                        f"**{'returns' if name == 'return' else name}**",
                        ""
                        if default is inspect.Parameter.empty
                        else code(repr(default)),
                        self.linked(" ".join(about["docment"].split())),
                    ]
                )
        return table(["Parameter", "Default", "Meaning"], rows)

    def fields(self, node: ast.ClassDef, model) -> str:
        """Table of the fields of a pydantic model."""
        written = {
            part.target.id: ast.unparse(part.annotation)
            for part in node.body
            if isinstance(part, ast.AnnAssign)
        }
        rows = []
        for name, field in getattr(model, "model_fields", {}).items():
            default = (
                ""
                if field.is_required()
                else repr(field.get_default(call_default_factory=True))
            )
            limits = [
                f"{sign} {getattr(limit, key)}"
                for limit in field.metadata
                for key, sign in LIMITS.items()
                if hasattr(limit, key)
            ]
            kind = code(written.get(name) or inspect.formatannotation(field.annotation))
            rows.append(
                [
                    f"**{name}**",
                    ", ".join([kind, *limits]),
                    code(default),
                    self.linked(field.description or ""),
                ]
            )
        return table(["Field", "Type", "Default", "Meaning"], rows)

    def page(self, path: Path):
        """The processed notebook: a title, cells as Sphinx's notebook parser wants
        them, descriptions of what is exported."""
        notebook = read_nb(path)
        Directives()(notebook)
        title = notebook.frontmatter_
        cells = [
            mk_cell(
                f"# {title['title']}\n\n{self.linked(title.get('description', ''))}",
                "markdown",
            )
        ]
        if introduction := below_the_title(path):
            cells.append(mk_cell(self.linked(introduction), "markdown"))
        story, reference = path.name.startswith("0"), []
        for cell in in_order(notebook.cells):
            name = shown_name(cell)
            if name:
                described = mk_cell(self.describe(path.name, name), "markdown")
                (reference if story else cells).append(described)
            elif cell.cell_type == "markdown":
                cells.append(mk_cell(self.linked(cell.get("source") or ""), "markdown"))
            elif cell.cell_type == "code" and is_shown(cell, unfolded=story):
                cells.append(cell)
        if reference:
            cells += [mk_cell("## Reference", "markdown"), *reference]
        if path.name == "index.ipynb":
            cells.append(mk_cell(self.contents(), "markdown"))
        notebook.cells = cells
        notebook.metadata.pop("widgets", None)
        return notebook

    def contents(self) -> str:
        """The sidebar: the notebooks by part, each with its number."""
        trees = []
        for digits, caption in PARTS.items():
            pages = [
                page
                for name, page in self.pages.items()
                if name != "index.ipynb" and name[0] in digits
            ]
            if pages:
                listed = "\n".join(pages)
                trees.append(
                    f"```{{toctree}}\n:hidden:\n:caption: {caption}\n\n{listed}\n```"
                )
        return "\n\n".join(trees)


def below_the_title(path: Path) -> str:
    """What the first cell says below its title and quotation, which nbdev drops."""
    first = read_nb(path).cells[0].source
    return re.sub(r"\A\s*#[^\n]*\n+(?:>[^\n]*(?:\n|\Z))*", "", first).strip()


def written_signature(node, bound: bool) -> str:
    """The signature as it stands in the source, without `self`."""
    node = ast.parse(ast.unparse(node)).body[0]
    if bound:
        del (node.args.posonlyargs or node.args.args)[:1]
    returns = (
        f" -> {ast.unparse(node.returns)}"
        if node.returns is not None and node.name != "__init__"
        else ""
    )
    return f"({ast.unparse(node.args)}){returns}"


def class_signature(nodes: dict, name: str, decorators: set) -> str:
    """Signature of a class: its `__init__`, or the fields of a dataclass or named
    tuple."""
    if f"{name}.__init__" in nodes:
        return written_signature(nodes[f"{name}.__init__"], bound=True)
    if "dataclass" in decorators or "NamedTuple" in {
        ast.unparse(base).split(".")[-1] for base in nodes[name].bases
    }:
        return (
            "("
            + ", ".join(
                ast.unparse(part)
                for part in nodes[name].body
                if isinstance(part, ast.AnnAssign)
            )
            + ")"
        )
    return ""


def code(text: str) -> str:
    return f"`` {text} ``" if text else ""


def table(header: list, rows: list) -> str:
    escaped = [[cell.replace("|", r"\|") for cell in row] for row in rows]
    return (
        "\n".join(
            f"| {' | '.join(row)} |"
            for row in [header, ["---"] * len(header), *escaped]
        )
        if rows
        else ""
    )


def in_order(cells: list) -> list:
    """nbdev describes an exported cell below its code, the last definition first; here
    the description stands above, in order."""
    result, group = [], []
    for cell in [*cells, mk_cell("", "markdown")]:
        if not getattr(cell, "has_sd", False):
            result += [*group[:0:-1], *group[:1]]
            group = []
        group.append(cell)
    return result


def shown_name(cell) -> str:
    """What a `show_doc` cell describes; empty for any other cell."""
    match = (
        re.search(r"^show_doc\(([\w.]+)", cell.get("source") or "", re.M)
        if cell.cell_type == "code"
        else None
    )
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
    folded = (
        bool({"export", "exporti"} & directives) or options.get("code-fold") == "true"
    )
    if (
        folded
        and not cell.outputs
        and all(
            isinstance(part, (ast.Import, ast.ImportFrom)) for part in cell.parsed_()
        )
    ):
        return False
    tags = {
        "remove-input": options.get("echo") == "false",
        "remove-output": options.get("output") == "false",
        "hide-input": folded and not (unfolded and options.get("code-fold") != "true"),
    }
    cell.metadata = {"tags": [tag for tag, wanted in tags.items() if wanted]}
    if "fig-alt" in options:
        cell.metadata["mystnb"] = {"image": {"alt": options["fig-alt"]}}
    for output in cell.outputs:
        if "data" in output:
            output["data"].pop("application/vnd.jupyter.widget-view+json", None)
    return bool(cell.source or cell.outputs)


def main(folder: str) -> int:
    config = get_config()
    paths = sorted(
        nbglob(as_path=True), key=lambda path: (path.name != "index.ipynb", path.name)
    )
    pages = {path.name: re.sub(r"^\d+[a-zA-Z0-9]*_", "", path.stem) for path in paths}
    modules, shown = {}, {}
    for path in paths:
        notebook = read_nb(path)
        module = _default_exp(notebook)
        Directives()(notebook)
        if module:
            modules[path.name] = Module(f"{config.lib_name}.{module}")
        shown[path.name] = [name for name in map(shown_name, notebook.cells) if name]
    writer = Writer(pages, modules, shown)
    with tempfile.TemporaryDirectory() as scratch:
        source, site = Path(scratch, "source"), Path(scratch, "site")
        source.mkdir()
        for path in paths:
            write_nb(writer.page(path), source / f"{pages[path.name]}.ipynb")
        if (config.nbs_path / "images").exists():
            shutil.copytree(config.nbs_path / "images", source / "images")
        status = build_main(
            [
                "-q",
                "-W",
                "--keep-going",
                "-b",
                "html",
                "-c",
                str(HERE),
                "-d",
                str(Path(scratch, "trees")),
                str(source),
                str(site),
            ]
        )
        if status:
            return status
        shutil.rmtree(folder, ignore_errors=True)
        shutil.move(site, folder)
    print(f"The docs are in {folder}: open {folder}/index.html")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
