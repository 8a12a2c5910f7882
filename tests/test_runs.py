"""The table of runs: folders in every state, none of which may stop it."""

import fcntl
import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT, run

from cpc_nb.config import ConfigError, make_config
from cpc_nb.runs import differing_fields, list_runs, sparkline


@pytest.fixture
def folder(tmp_path):
    """A folder `a/run` with a configuration and three lines of metrics."""
    run = tmp_path / "a" / "run"
    (run / "checkpoints" / "step-00000003").mkdir(parents=True)
    make_config("demo").save(run / "config.json")
    lines = [{"step": n, "loss": 4.0 - n, "valid_loss": 5.0 - n} for n in (1, 2, 3)]
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(x)}\n" for x in lines))
    return run


def only(folder):
    [run] = list_runs(folder.parent.parent).runs
    return run


BROKEN = {
    "no configuration": (lambda run: (run / "config.json").unlink(), "half-written"),
    "a directory": (
        lambda run: ((run / "config.json").unlink(), (run / "config.json").mkdir()),
        "half-written",
    ),
    "bytes": (lambda run: (run / "config.json").write_bytes(b"\xff\0"), "half-written"),
    "a list": (lambda run: (run / "config.json").write_text("[]"), "half-written"),
    "of other fields": (
        lambda run: (run / "config.json").write_text('{"model": {"size": 3}}'),
        "another version",
    ),
    "a newer checkpoint": (
        lambda run: (run / "checkpoints/step-00000003/state.json").write_text(
            '{"format": 9}'
        ),
        "another version",
    ),
    "metrics of nothing": (
        lambda run: (run / "metrics.jsonl").write_bytes(b"\xff\n{}\n[1]\nnull\n7\n"),
        "interrupted",
    ),
    "failed": (lambda run: (run / "failed.txt").write_text(""), "failed"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_run_has_a_row_and_a_reason(folder, how):
    spoil, status = BROKEN[how]
    spoil(folder)
    run = only(folder)
    assert run.status == status and run.note, run
    assert f"a/run: {run.note}" in str(list_runs(folder.parent.parent))


def test_a_run_is_finished_once_its_last_update_is_made(folder):
    assert only(folder).status == "interrupted"
    (folder / "model").mkdir()
    (folder / "model" / "model.safetensors").touch()
    assert only(folder).status == "interrupted"  # extended: 3 of 1,500 updates
    make_config("demo", {"train.max_steps": 3}).save(folder / "config.json")
    assert only(folder).status == "finished"
    (folder / "evaluation").mkdir()
    (folder / "evaluation" / "metrics.json").write_text("{")
    assert only(folder).status == "finished" and "cannot be read" in only(folder).note
    (folder / "evaluation" / "metrics.json").write_text('{"phone_frame": {}}')
    assert only(folder).status == "evaluated"


@pytest.mark.parametrize(
    "part, status", [("", "training now"), ("evaluation", "being")]
)
def test_who_holds_the_folder_is_at_work(folder, part, status):
    (folder / "model").mkdir()
    (folder / "model" / "model.safetensors").touch()
    make_config("demo", {"train.max_steps": 3}).save(folder / "config.json")
    (folder / part).mkdir(exist_ok=True)
    code = "import fcntl, os, sys, time; "
    code += "fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_EX); "
    code += "print(flush=True); time.sleep(100)"
    holder = subprocess.Popen(
        [sys.executable, "-c", code, folder / part], stdout=subprocess.PIPE
    )
    holder.stdout.readline()
    try:
        assert only(folder).status.startswith(status)
    finally:
        holder.kill()
        holder.wait()
    assert not only(folder).status.startswith(status)
    handle = os.open(folder, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # looking leaves no lock behind
    os.close(handle)


def test_markup_in_a_name_is_text_on_the_page(folder, tmp_path):
    folder.rename(folder.with_name("<b>&'run"))
    assert "<b>" not in list_runs(tmp_path).to_html()


def test_a_loss_that_is_not_finite_does_not_stop_the_curve():
    assert sparkline([(1, 2.0), (2, float("nan")), (3, float("inf")), (4, 1.0)]) == "█▁"
    assert sparkline([]) == "" and differing_fields([{}, {}]) == [{}, {}]


def test_the_command_lists_and_writes_the_page(folder, tmp_path):
    done = run(
        sys.executable, "-m", "cpc_nb.runs", tmp_path, "--out", tmp_path / "runs.html"
    )
    assert done.code == 0 and "a/run" in done.output, done.output
    assert "interrupted" in (tmp_path / "runs.html").read_text()
    done = run(sys.executable, "-m", "cpc_nb.runs", tmp_path / "nowhere")
    assert done.code != 0 and done.last.startswith("cpc_runs: there is no folder")


def test_the_table_is_there_without_loading_a_network():
    code = "import sys, cpc_nb.runs; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout == "False\n", done.stderr


def test_an_empty_folder_and_a_missing_one(tmp_path):
    assert "no runs in" in str(list_runs(tmp_path))
    with pytest.raises(ConfigError, match="there is no folder"):
        list_runs(tmp_path / "nowhere")
