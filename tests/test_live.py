"""A run watched in a real browser: curves, buttons, and what the notebook keeps."""

import json
import re
import shutil

import nbformat
import pytest
from conftest import ROOT, SMALL, jupyter_lab, keep_screenshot, save_notebook

from cpc_nb.checkpoint import RunFolder
from cpc_nb.config import make_config
from cpc_nb.trainer import train

MANY = 100_000  # updates: the run ends only if it is told to
TRAIN = """
from cpc_nb.config import make_config
from cpc_nb.trainer import train

train(make_config("samples", {overrides}), "runs/live");
"""


@pytest.fixture
def overrides(speech):
    """A run that logs every 10,000 updates, so that what moves before is live."""
    rarely = {f"train.{name}_every": 10_000 for name in ("log", "valid", "checkpoint")}
    run = {"data.source": str(speech), "train.max_steps": MANY, "launch.n_gpus": 0}
    return {**SMALL, **rarely, **run, "train.schedule": "constant"}


@pytest.fixture
def lab(tmp_path, overrides):
    """JupyterLab beside a notebook `nbs/live.ipynb` of one cell, which trains."""
    (tmp_path / "nbs").mkdir()
    shutil.copy(ROOT / "settings.ini", tmp_path)
    cell = nbformat.v4.new_code_cell(TRAIN.format(overrides=overrides).strip())
    kernel = {"name": "python3", "display_name": "python3", "language": "python"}
    notebook = nbformat.v4.new_notebook(cells=[cell], metadata={"kernelspec": kernel})
    nbformat.write(notebook, tmp_path / "nbs" / "live.ipynb")
    with jupyter_lab(tmp_path) as address:
        yield address


def test_a_run_is_watched_saved_and_stopped_in_jupyterlab(
    lab,
    browser,
    tmp_path,
    overrides,
):
    run, tab = RunFolder(tmp_path / "nbs" / "runs" / "live"), browser.new_page()
    tab.set_default_timeout(300_000)
    tab.goto(f"{lab}/lab/tree/nbs/live.ipynb?token=test")
    tab.get_by_text("Python 3 (ipykernel) | Idle").wait_for()
    tab.locator(".jp-CodeCell .cm-content").first.click()
    tab.keyboard.press("Shift+Enter")

    curves = tab.locator(".jp-OutputArea-output img")
    first = curves.get_attribute("src")  # waits for it
    tab.wait_for_function(
        "before => document.querySelector('.jp-OutputArea-output img').src !== before",
        arg=first,
    )
    assert run.metrics() == []  # so the curves are of the updates themselves
    tab.get_by_text(re.compile(r"step [\d,]+ of 100,000")).wait_for()

    keep_screenshot(tab, "jupyterlab-training")
    tab.get_by_role("button", name="Save now").click()
    tab.get_by_text(re.compile(r"step [\d,]+ is saved")).wait_for()
    [saved] = run.names()

    tab.get_by_role("button", name="Stop after this step").click()
    told = tab.locator(".jp-OutputArea-output", has_text="run this cell again")
    said = told.inner_text()
    last = run.index["last"]
    assert saved < last and said.count("\n") == 0 and last in said, said
    save_notebook(tab)
    check_stored(tmp_path / "nbs" / "live.ipynb")
    tab.close()

    step = int(last.removeprefix("step-"))
    config = make_config("samples", {**overrides, "train.max_steps": step + 1})
    train(config, run.path)
    assert [line["step"] for line in run.metrics()] == [step + 1]


def check_stored(path):
    """The notebook keeps its curves, and no widget that nobody could show again."""
    outputs = json.loads(path.read_text())["cells"][0]["outputs"]
    kinds = {kind for output in outputs for kind in output.get("data", {})}
    assert "image/png" in kinds
    assert "application/vnd.jupyter.widget-view+json" not in kinds
