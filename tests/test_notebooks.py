"""The form of the notebooks: what a reader meets, and that stored outputs are true."""

import ast
import json
import platform
import re
import shutil
import sys
import urllib.request

import pytest
from conftest import ROOT, jupyter_lab

sys.path.insert(0, str(ROOT / "nbs" / "_sphinx"))
from execute import OUTPUT_OF, digest  # noqa: E402

NOTEBOOKS = {path.stem: path for path in sorted((ROOT / "nbs").glob("*.ipynb"))}
STORY = [name for name in NOTEBOOKS if re.match(r"0[0-6]_", name)]
FIGURES = {"image/png", "image/svg+xml"}

every_notebook = pytest.mark.parametrize("name", NOTEBOOKS)


def cells(name: str, kind: str = "code") -> list[tuple[dict, str]]:
    """The cells of a kind, each with its source."""
    notebook = json.loads(NOTEBOOKS[name].read_text())
    found = [cell for cell in notebook["cells"] if cell["cell_type"] == kind]
    return [(cell, "".join(cell["source"])) for cell in found]


def code_lines(source: str) -> list[str]:
    """The lines of a cell without directives."""
    return [line for line in source.splitlines() if not line.startswith("#|")]


def is_prose(line: str) -> bool:
    """Whether a line of markdown could be broken: no table, image, link or code."""
    return " " in line.strip() and not re.match(r"\||!\[|\s{4}|\[[^]]*\]:|<", line)


@every_notebook
def test_no_line_is_longer_than_a_page_is_wide(name):
    for kind in ("code", "markdown"):
        for _, source in cells(name, kind):
            for line in source.splitlines():
                can_break = kind == "code" or is_prose(line)
                assert len(line) <= 88 or not can_break, line


@every_notebook
def test_a_cell_is_short(name):
    for _, source in cells(name):
        assert len(code_lines(source)) <= 30, source


@every_notebook
def test_outputs_are_those_of_the_source_beside_them(name):
    for cell, source in cells(name):
        if cell["outputs"]:
            assert "#| export" not in source, f"an exported cell shows {source}"
            now, then = digest(source), cell["metadata"].get(OUTPUT_OF)
            assert now == then, f"stale; run `make notebooks`:\n{source}"


@every_notebook
def test_a_figure_is_there_and_has_words_for_those_who_do_not_see_it(name):
    for cell, source in cells(name):
        shown = {kind for output in cell["outputs"] for kind in output.get("data", {})}
        has_figure = bool(shown & FIGURES)
        assert has_figure == ("#| fig-alt:" in source), source


@every_notebook
def test_stored_outputs_name_no_folder_of_a_machine_and_are_small(name):
    assert NOTEBOOKS[name].stat().st_size < 1_000_000
    for cell, _ in cells(name):
        for output in cell["outputs"]:
            shown = {
                k: v for k, v in output.get("data", {}).items() if "image" not in k
            }
            text = json.dumps([output.get("text"), shown])
            assert not re.search(r"/(home|root|tmp|Users|work)/", text), text[:500]


@pytest.mark.parametrize("name", STORY)
def test_a_chapter_of_the_story_is_read_in_twenty_minutes(name):
    words = sum(len(source.split()) for _, source in cells(name, "markdown"))
    assert words <= 900
    shown = [s for _, s in cells(name) if not re.search(r"#\| (echo: false|hide)", s)]
    assert sum(bool(line.strip()) for s in shown for line in code_lines(s)) <= 180


def functions_of(source: str) -> list[str]:
    """The public functions that an exported cell defines, methods aside."""
    return [
        node.name
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef)
        and not node.name.startswith("_")
        and not any("patch" in ast.unparse(one) for one in node.decorator_list)
    ]


@every_notebook
def test_every_public_function_is_shown_told_or_used_elsewhere(name):
    """One that only its own module calls is private, or gone."""
    text = [path.read_text() for path in (ROOT / "tests").glob("*.py")]
    text += [(ROOT / file).read_text() for file in ("settings.ini", "CONTRIBUTING.md")]
    exported = []
    for other in NOTEBOOKS:
        text += [source for _, source in cells(other, "markdown")]
        for _, source in cells(other):
            own = other == name and "#| export" in source
            (exported if own else text).append(source)
    text = "\n".join(text)
    for function in (one for source in exported for one in functions_of(source)):
        assert re.search(rf"\b{function}\b", text), function


@every_notebook
def test_code_that_its_page_hides_is_folded_in_jupyterlab(name):
    for cell, source in cells(name):
        hidden = cell["metadata"].get("jupyter", {}).get("source_hidden", False)
        assert hidden == ("#| echo: false" in source), source


@every_notebook
def test_metadata_are_those_that_nbdev_clean_leaves(name):
    """One kernel for all; its display name is what nbdev makes of its name."""
    kernel = {"display_name": "python3", "language": "python", "name": "python3"}
    metadata = json.loads(NOTEBOOKS[name].read_text())["metadata"]
    assert metadata == {"kernelspec": kernel}


@pytest.fixture
def lab(tmp_path):
    """The address of a JupyterLab with the configuration of `make lab`, in a copy."""
    (tmp_path / "nbs").mkdir()
    shutil.copy(NOTEBOOKS["00_cpc"], tmp_path / "nbs")
    shutil.copy(ROOT / "settings.ini", tmp_path)
    with jupyter_lab(tmp_path) as address:
        yield f"{address}/api"


def test_a_notebook_that_is_opened_and_saved_in_jupyterlab_is_unchanged(lab, tmp_path):
    """JupyterLab finds what it would add, and what it saves is as it was: without
    widgets and bars, which nothing could show again. It lists chapters alone."""

    def ask(method: str, body: dict | None = None, name="/00_cpc.ipynb") -> dict:
        request = urllib.request.Request(
            f"{lab}/contents/nbs{name}",
            body and json.dumps(body).encode(),
            {"Authorization": "token test"},
            method=method,
        )
        return json.load(urllib.request.urlopen(request))

    content = ask("GET")["content"]
    metadata = content["metadata"]
    assert metadata["kernelspec"]["display_name"] == "Python 3 (ipykernel)"
    assert metadata["language_info"]["version"] == platform.python_version()
    view = {"application/vnd.jupyter.widget-view+json": {"model_id": "gone"}}
    view = {"output_type": "display_data", "metadata": {}, "data": view}
    bar = {"output_type": "stream", "name": "stderr", "text": "50%|##\r100%|####"}
    cell = next(cell for cell in content["cells"] if cell["cell_type"] == "code")
    cell["outputs"] += [view, bar]
    ask("PUT", {"type": "notebook", "content": content})
    saved = (tmp_path / "nbs" / "00_cpc.ipynb").read_text()
    assert saved == NOTEBOOKS["00_cpc"].read_text()
    (tmp_path / "nbs" / "_quarto.yml").touch()
    (tmp_path / "nbs" / "images").mkdir()
    assert [one["name"] for one in ask("GET", name="")["content"]] == ["00_cpc.ipynb"]
