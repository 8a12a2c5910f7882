"""Render README.md from nbs/index.ipynb, as `nbdev_readme` would, without Quarto.

Usage: `python nbs/_sphinx/readme.py`. nbdev's directives are applied, saved outputs are
kept (tables as markdown, figures as files in nbs/images/readme/), and links to
notebooks and images lead into nbs/. With `--check` nothing is written; a README that
differs is an error.
"""

import base64
import re
import sys
from pathlib import Path

from execnb.nbio import read_nb
from nbdev.config import get_config
from nbdev.processors import FilterDefaults

PREFERRED = ("text/markdown", "image/png", "image/svg+xml", "text/html", "text/plain")


class Directives(FilterDefaults):
    """nbdev's processors that hide cells and lines."""

    def base_procs(self):
        kept = (
            "populate_language",
            "strip_ansi",
            "hide_line",
            "filter_stream_",
            "rm_header_dash",
            "rm_export",
            "clean_magics",
            "hide_",
        )
        return [proc for proc in super().base_procs() if proc.__name__ in kept]


def text_of(lines) -> str:
    return lines if isinstance(lines, str) else "".join(lines)


def render(notebook, images: Path, nbs: str) -> tuple:
    """The markdown of `notebook`, and the figures it shows by path; `images` and `nbs`
    are relative to the README."""
    parts, figures = [], {}
    for cell in notebook.cells:
        source = cell.get("source") or ""
        if cell.cell_type == "markdown" and source:
            parts.append(into_folder(source, nbs))
        if cell.cell_type != "code":
            continue
        options = dict(re.findall(r"^#\| *([\w-]+): *(.*?) *$", source, re.M))
        source = re.sub(r"^#\|.*\n?", "", source, flags=re.M).strip()
        if options.get("include") == "false":
            continue
        if source and options.get("echo") != "false":
            parts.append(f"```python\n{source}\n```")
        outputs = [] if options.get("output") == "false" else cell.outputs
        for number, output in enumerate(outputs):
            if output.output_type == "stream":
                parts.append(as_text(text_of(output.text)))
            shown, figure = render_data(
                output.get("data") or {}, images / f"{cell.id}-{number}", nbs
            )
            parts += shown
            figures |= figure
    return "\n\n".join(part.strip("\n") for part in parts) + "\n", figures


def render_data(data: dict, path: Path, nbs: str) -> tuple:
    """What the `data` of an output show, as a list of at most one text, and its figure,
    which is to be stored at `path`."""
    kind = next((kind for kind in PREFERRED if kind in data), None)
    content = text_of(data[kind]) if kind else ""
    if kind == "image/png":
        path = path.with_suffix(".png")
        return [f"![]({path.as_posix()})"], {path: base64.b64decode(content)}
    if kind == "image/svg+xml":
        path = path.with_suffix(".svg")
        return [f"![]({path.as_posix()})"], {path: content.encode()}
    if kind == "text/markdown":
        return [into_folder(content, nbs)], {}
    if kind == "text/html" and "<table" in content:
        return [re.sub(r"<style.*?</style>\s*", "", content, flags=re.S)], {}
    if "text/plain" in data and kind != "text/html":
        return [as_text(text_of(data["text/plain"]))], {}
    return [], {}


def as_text(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.rstrip().splitlines())


def into_folder(markdown: str, nbs: str) -> str:
    """Links to files beside the notebook, seen from the folder above."""
    return (
        re.sub(r"(\]\(|src=\")(?![a-z]+:|[/#]|\.\./)", rf"\g<1>{nbs}/", markdown)
        .replace("](../", "](")
        .replace('src="../', 'src="')
    )


def main(check: bool) -> int:
    config = get_config()
    root, nbs = config.config_path, config.nbs_path.relative_to(config.config_path)
    notebook = read_nb(config.nbs_path / config.readme_nb)
    Directives()(notebook)
    folder = nbs / "images" / "readme"
    text, figures = render(notebook, folder, nbs.as_posix())
    readme = root / "README.md"
    if check:
        stale = (
            not readme.exists()
            or readme.read_text(encoding="utf-8") != text
            or {
                path: (root / path).read_bytes()
                for path in figures
                if (root / path).exists()
            }
            != figures
        )
        if stale:
            print(
                "README.md is not what nbs/index.ipynb renders to: run `make readme`",
                file=sys.stderr,
            )
        return int(stale)
    readme.write_text(text, encoding="utf-8")
    for old in (root / folder).glob("*"):
        old.unlink()
    for path, content in figures.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content)
    return 0


if __name__ == "__main__":
    sys.exit(main(check="--check" in sys.argv[1:]))
