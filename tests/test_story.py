"""The story in JupyterLab: `make lab` opens the index, and each notebook of Part I runs
from a fresh kernel, in a real browser."""

import json
import re
import shutil
from pathlib import Path

import pytest
from conftest import BIN, ROOT, SMALL, jupyter_lab, keep_screenshot, save_notebook

from cpc_nb.config import make_config
from cpc_nb.trainer import train

CHAPTERS = sorted(path.name for path in (ROOT / "nbs").glob("*.ipynb"))
STORY = [name for name in CHAPTERS if re.match("0[0-6]_", name)]
LISTED = ".jp-DirListing-itemText"
# JupyterLab says so beside a notebook's kernel once nothing waits to be executed.
EXECUTED = re.compile(r"Executed (\d+) cells?")
INDICATOR = ".jp-Notebook-ExecutionIndicator-tooltip span"


@pytest.mark.skipif(BIN != ROOT / ".venv" / "bin", reason="`make` has another Python")
def test_make_lab_opens_the_index_and_lists_the_chapters(tab):
    with jupyter_lab(ROOT, by_make=True) as address:
        tab.goto(f"{address}/?token=test")
        tab.wait_for_url("**/lab/tree/nbs/index.ipynb*")
        tab.get_by_text("Python 3 (ipykernel) | Idle").wait_for()
        tab.locator(LISTED, has_text="index.ipynb").wait_for()
        listed = tab.locator(LISTED).all_inner_texts()
        assert [name for name in listed if name != "runs"] == CHAPTERS
        columns = tab.locator(".jp-DirListing-headerItem:visible").all_inner_texts()
        assert [column.strip() for column in columns] == ["Name"]  # room for them
        keep_screenshot(tab, "jupyterlab-index")


# --- each notebook of Part I ---


def code_cells(path) -> list[dict]:
    cells = json.loads(path.read_text())["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def prepare(path, parameters: dict):
    """Empty a notebook of its outputs, and add `parameters` to their cell."""
    notebook = json.loads(path.read_text())
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            cell["outputs"] = []
        if "parameters" in cell["metadata"].get("tags", []):
            given = [f"\n{name} = {value!r}" for name, value in parameters.items()]
            cell["source"] += given
    path.write_text(json.dumps(notebook))


@pytest.fixture(scope="module")
def lab(tmp_path_factory, speech):
    """JupyterLab in a copy of the notebooks, whose 04 makes a short run, and whose 05
    judges one that is there."""
    folder = tmp_path_factory.mktemp("reader")
    nbs = Path(shutil.copytree(ROOT / "nbs", folder / "nbs"))
    small = {**SMALL, "launch.n_gpus": 0, "train.max_steps": 4, "train.batch_size": 8}
    judged, own = str(folder / "judged"), str(folder / "own")
    train(make_config("samples", {**small, "data.source": str(speech)}), judged)
    training = {"data": str(speech), "run_dir": own, "overrides": small}
    parameters = {"04_train.ipynb": training, "05_evaluate.ipynb": {"run_dir": judged}}
    for name in STORY:
        prepare(nbs / name, parameters.get(name, {}))
    with jupyter_lab(folder) as address:
        yield nbs, address


def shut_down(tab, address: str):
    """End all kernels, whose memory and threads the next notebook needs."""
    kernels, token = f"{address}/api/kernels", {"Authorization": "token test"}
    for kernel in tab.request.get(kernels, headers=token).json():
        tab.request.delete(f"{kernels}/{kernel['id']}", headers=token)


@pytest.mark.parametrize("name", STORY)
def test_a_notebook_of_the_story_runs_from_a_fresh_kernel(name, lab, tab):
    nbs, address = lab
    tab.goto(f"{address}/lab/tree/nbs/{name}?token=test&reset")
    tab.get_by_text("Python 3 (ipykernel) | Idle").wait_for()
    tab.get_by_role("menuitem", name="Run", exact=True).click()
    tab.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    said = tab.locator(INDICATOR, has_text=EXECUTED)
    said.wait_for(state="attached", timeout=300_000)
    n_executed = int(EXECUTED.search(said.text_content())[1])
    save_notebook(tab)
    keep_screenshot(tab, f"jupyterlab-{name.removesuffix('.ipynb')}")
    shut_down(tab, address)

    code = code_cells(nbs / name)
    failed = [one for cell in code for one in cell["outputs"] if "ename" in one]
    assert not failed, failed[0]["evalue"]
    assert n_executed == len(code)
    for cell, published in zip(code, code_cells(ROOT / "nbs" / name)):
        assert cell["outputs"] or not published["outputs"], cell["source"]
