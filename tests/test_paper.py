"""The sweep behind the paper's tables: real papermill runs, killed and resumed."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SMALL, options, run, write_corpus

from cpc_nb import sweep, tables
from cpc_nb.checkpoint import RunFolder
from cpc_nb.config import make_config, parse_options
from cpc_nb.demo import make_demo_corpus
from cpc_nb.paper import main
from cpc_nb.sweep import CELLS, PRESET_CELL, TABLE_1, TABLE_2, gather
from cpc_nb.tables import plot_steps_ahead, plot_table_2, table_1, table_2

SIZE = {name: value for name, value in SMALL.items() if name != "data.group_size"} | {
    "launch.n_gpus": 0,
    "launch.precision": "fp32",
    "train.batch_size": 8,
}


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """Six voices with six utterances each, and their exact phones."""
    return make_demo_corpus(
        tmp_path_factory.mktemp("demo") / "six",
        n_voices=6,
        n_sentences=6,
        progress=False,
    )


def given(demo, folder, **more):
    return options(
        {
            "data": str(demo),
            "folder": str(folder),
            "max_steps": 4,
            "seeds": [0],
            "cells": ["2-steps", "current-only"],
            "overrides": SIZE,
            **more,
        }
    )


def status(number) -> list[str]:
    """State and parent of a process; nothing of one that is gone."""
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[:2]
    except OSError:
        return ["X", "0"]


def test_every_row_has_a_run():
    assert {row.cell for rows in TABLE_2.values() for row in rows} | {
        PRESET_CELL
    } == set(CELLS)
    changes = [json.dumps(changes, sort_keys=True) for changes in CELLS.values()]
    assert len(set(changes)) == len(changes)  # each run differs from each other


def test_a_sweep_that_is_killed_goes_on(demo, tmp_path):
    """Killed in its second run, the same command leaves the first alone, resumes the
    second, and ends with tables of all."""
    command = [sys.executable, "-m", "cpc_nb.paper", *given(demo, tmp_path / "sweep")]
    first, second = (
        tmp_path / "sweep" / f"{name}-seed0" for name in ("2-steps", "current-only")
    )
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    until = time.monotonic() + 300
    while (
        process.poll() is None
        and time.monotonic() < until
        and not (second / "checkpoints" / "index.json").exists()
    ):
        time.sleep(0.05)
    kernels = [
        int(folder.name)
        for folder in Path("/proc").glob("[0-9]*")
        if status(folder.name)[1] == str(process.pid)
    ]  # a kernel leads a session of its own
    for number in (process.pid, *kernels):
        os.kill(number, signal.SIGKILL)
    process.wait()
    while any(status(kernel)[0] not in "XZ" for kernel in kernels):
        time.sleep(0.05)
    assert (
        (first / "evaluation" / "metrics.json").exists()
        and not (second / "evaluation" / "metrics.json").exists()
        and not (tmp_path / "sweep" / "results.json").exists()
    )
    made = (first / "evaluation" / "metrics.json").stat().st_mtime_ns
    done = run(*command)
    assert done.code == 0, done.output[-3000:]
    assert (first / "evaluation" / "metrics.json").stat().st_mtime_ns == made
    results = json.loads((tmp_path / "sweep" / "results.json").read_text())
    assert results["runs"] == gather(tmp_path / "sweep")["runs"] and set(
        results["runs"]
    ) == {"2-steps", "current-only"}
    assert results["runs"]["current-only"]["0"]["model"]["training_steps"] == 4
    accuracy = 100 * results["runs"]["2-steps"]["0"]["phone_frame"]["cpc"]
    assert (
        f"| 2 steps | {accuracy:.1f} | *28.5* |" in done.output
        and "| 4 steps | – | *57.6* |" in done.output
        and "supervised" in table_1(results)
    )
    notebook = (tmp_path / "sweep" / "06_paper.ipynb").read_text()
    assert (
        f"| 2 steps | {accuracy:.1f} |" in notebook
        and notebook.count("image/png") == 2
        and "seed 0, on" in notebook
    )
    made = (second / "evaluation" / "metrics.json").stat().st_mtime_ns
    again = run(*command)
    assert again.code == 0 and "06_paper.ipynb" in again.output
    assert (second / "evaluation" / "metrics.json").stat().st_mtime_ns == made


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_a_sweep_that_is_told_to_end_saves(demo, tmp_path, number, code):
    """Only the sweep's process is told, as by `kill` or a scheduler."""
    command = given(demo, tmp_path / "sweep", max_steps=50_000)
    command = [sys.executable, "-m", "cpc_nb.paper", *command]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    folder = RunFolder(tmp_path / "sweep" / "2-steps-seed0")
    until = time.monotonic() + 300
    while process.poll() is None and not folder.metrics():
        assert time.monotonic() < until, "no training has begun"
        time.sleep(0.05)
    process.send_signal(number)
    said = process.communicate(timeout=100)[1]
    assert process.returncode == code and "the same command goes on" in said, said
    assert folder.index["last"] in (folder.path / "04_train.ipynb").read_text()
    assert not (tmp_path / "sweep" / "current-only-seed0").exists()


@pytest.fixture
def executed(monkeypatch):
    """The notebooks that a sweep executes; here they only write an empty evaluation."""
    notebooks = []

    def execute(notebook, output, parameters):
        notebooks.append(notebook)
        if notebook == "05_evaluate.ipynb":
            output.parent.mkdir(parents=True, exist_ok=True)
            (output.parent / "metrics.json").write_text("{}")

    monkeypatch.setattr(sweep, "execute", execute)
    return notebooks


def test_what_is_asked_anew_is_done_anew(demo, tmp_path, executed, monkeypatch):
    """Other labels, also under the old name, and other protocols; not the same again,
    even where `patience` ended a training before its last step."""
    labels = tmp_path / "labels.txt"
    labels.write_text((demo / "phones.txt").read_text())
    asked = {
        "data": str(demo),
        "folder": tmp_path / "sweep",
        "max_steps": 4,
        "seeds": [0],
        "cells": ["2-steps"],
        "labels": str(labels),
        "overrides": {**SIZE, "train.patience": 1},
    }

    def done(**more) -> bool:
        executed.clear()
        assert not sweep.sweep(**{**asked, **more})
        return bool(executed)

    assert done() and not done()
    labels.write_text("".join(reversed(labels.read_text().splitlines(keepends=True))))
    assert done() and not done()
    assert done(labels=None) and not done(labels=None)
    assert done(max_steps=5) and not done(max_steps=5)
    monkeypatch.setitem(sweep.BRIEF, "protocols", ["phone_frame", "phone_mlp"])
    assert done(max_steps=5) and not done(max_steps=5)
    (tmp_path / "sweep" / "2-steps-seed0" / "evaluation" / "metrics.json").unlink()
    assert done(max_steps=5)


def test_a_folder_may_be_named_by_a_number():
    parsed = parse_options("", "", tables.SWEEP_PARAMETERS, ["--folder", "2024"])
    assert parsed == {"folder": "2024"}
    for name in ("quality", "old", "new"):  # of the benchmark: folder and files
        assert parse_options("", "", {name: ""}, [f"--{name}", "1"]) == {name: "1"}


def test_tables_and_figures_of_many_seeds(tmp_path):
    """Mean and deviation over seeds stand in the tables; what is missing is a dash."""
    metrics = lambda phones: {
        "phone_frame": {"cpc": phones, "mfcc": 0.5, "random": 0.3, "supervised": 0.7},
        "phone_mlp": {"cpc": 0.6},
        "speaker_frame": {"cpc": 0.4},
        "prediction_accuracy": [0.9, 0.8],
        "model": {"steps_ahead": [1, 2], "training_steps": 7},
    }
    for cell, seed, phones in (
        (PRESET_CELL, 0, 0.5),
        (PRESET_CELL, 1, 0.6),
        ("2-steps", 0, 0.4),
    ):
        (tmp_path / f"{cell}-seed{seed}" / "evaluation").mkdir(parents=True)
        (tmp_path / f"{cell}-seed{seed}" / "evaluation" / "metrics.json").write_text(
            json.dumps(metrics(phones))
        )
    assert "tsne" not in gather(tmp_path)
    (tmp_path / f"{PRESET_CELL}-seed1" / "evaluation" / "tsne.png").touch()
    results = gather(tmp_path)
    assert results["tsne"] == f"{PRESET_CELL}-seed1/evaluation/tsne.png"
    assert (
        "| CPC | 55.0 ± 7.1 | *64.6* | 60.0 ± 0.0 | *72.5* | 40.0 ± 0.0 | *97.4* |"
        in table_1(results)
        and all(row.label in table_1(results) for row in TABLE_1)
    )
    assert "| 2 steps | 40.0 | *28.5* |" in table_2(
        results
    ) and "| same speaker | – | *65.5* |" in table_2(results)
    assert (
        len(plot_table_2(results).axes) == 2
        and len(plot_steps_ahead(results).axes[0].lines) == 1
    )


@pytest.mark.parametrize("n_gpus, named", [(0, "CPU thread"), (None, "a GPU")])
def test_the_hardware_is_what_the_runs_used(tmp_path, monkeypatch, n_gpus, named):
    run = tmp_path / f"{PRESET_CELL}-seed0"
    (run / "evaluation").mkdir(parents=True)
    (run / "evaluation" / "metrics.json").write_text("{}")
    config = make_config("demo", {"launch.n_gpus": n_gpus})
    (run / "config.json").write_text(config.model_dump_json())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    assert named in gather(tmp_path)["hardware"]


@pytest.mark.parametrize(
    "more, message",
    [
        ({"cells": ["3-steps"]}, "'3-steps' is unknown; did you mean"),
        ({"cells": "2-steps"}, "cells = '2-steps': give a JSON list"),
        ({"seeds": 3}, "seeds = 3: give a JSON list"),
        ({"data": "VOICES"}, "no phones.txt in its folder; give labels=FILE"),
        (
            {"labels": "/nowhere/labels.txt"},
            "labels = '/nowhere/labels.txt': no such file",
        ),
        ({"data": "/nowhere"}, "'/nowhere': no such folder"),
        ({"max_steps": 0}, "max_steps"),
        ({"overrides": {"context.sise": 3}}, "did you mean 'context.size'"),
        ({"overrides": []}, r"overrides = \[\]: give a mapping"),
        ({"preset": "large"}, "preset"),
    ],
)
def test_sweeps_that_cannot_be(more, message, demo, tmp_path):
    if more.get("data") == "VOICES":
        more = {"data": str(write_corpus(tmp_path / "voices", 2, 2))}
    with pytest.raises(SystemExit) as exit:
        main(given(demo, tmp_path / "sweep", **more))
    assert (
        re.match(f"cpc_nb.paper: .*{message}", str(exit.value))
        and "\n" not in str(exit.value)
        and not (tmp_path / "sweep").exists()
    )


def test_a_folder_of_another_sweep_is_refused(demo, tmp_path):
    from cpc_nb.sweep import COMMON
    from cpc_nb.train import main as train

    train(
        options(
            {
                "data": str(demo),
                "run_dir": str(tmp_path / "sweep" / "2-steps-seed0"),
                "max_steps": 4,
                "overrides": {
                    **COMMON,
                    **SIZE,
                    "loss.steps": [1, 2],
                    "context.size": 24,
                },
            }
        )
    )
    with pytest.raises(
        SystemExit,
        match="2-steps-seed0 belongs to another configuration"
        " .context.size is 16 now and was 24",
    ):
        main(given(demo, tmp_path / "sweep"))
