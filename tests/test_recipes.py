"""The search for recipes: real papermill runs, killed and resumed, and bad input."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, SMALL, options, run, write_corpus

from cpc_nb.config import ConfigError, make_config
from cpc_nb.corpus import pack
from cpc_nb.demo import make_demo_corpus
from cpc_nb.recipes import Recipe, Search, SearchPlan, main, read_recipes
from cpc_nb.splits import split

SIZE = {**SMALL, "launch.n_gpus": 0, "launch.precision": "fp32", "train.batch_size": 8}
RECIPES = {
    "plain": {"changes": SIZE},
    "two-steps": {"changes": {**SIZE, "loss.steps": [1, 2]}},
}


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """Eight voices with six utterances each, and their exact phones."""
    folder = tmp_path_factory.mktemp("demo") / "eight"
    return make_demo_corpus(folder, n_voices=8, n_sentences=6, progress=False)


def given(demo, folder, **more) -> list[str]:
    asked = {"data": str(demo), "folder": str(folder), "recipes": RECIPES}
    return options({**asked, "minutes": 0.02, "rungs": 2, **more})


def children(process) -> list[int]:
    """Processes that `process` has started; a kernel leads a session of its own."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            stat = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if stat[1] == str(process.pid):
            found.append(int(folder.name))
    return found


def kill_when(process, path: Path):
    """Kill a process and its kernels as soon as `path` is there."""
    until = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < until and not path.exists():
        time.sleep(0.05)
    assert process.poll() is None, "the search ended before it could be killed"
    for number in (process.pid, *children(process)):
        os.kill(number, signal.SIGKILL)
    process.wait()


def test_a_search_that_is_killed_goes_on(demo, tmp_path):
    """Finished trials are kept, the others made, and the better recipe gets twice the
    time and a supervised network beside it."""
    folder = tmp_path / "search"
    command = [sys.executable, "-m", "cpc_nb.recipes", *given(demo, folder)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, **quiet)
    second = folder / "two-steps-0.02min-seed0"
    kill_when(process, second / "config.json")
    first = folder / "plain-0.02min-seed0" / "evaluation" / "metrics.json"
    assert first.exists() and not (folder / "recipes.json").exists()
    made = first.stat().st_mtime_ns

    done = run(*command)
    assert done.code == 0, done.output[-3000:]
    assert first.stat().st_mtime_ns == made
    assert (folder / "recipes.png").exists()
    trials = json.loads((folder / "recipes.json").read_text())["trials"]
    assert [trial["minutes"] for trial in trials] == [0.02, 0.02, 0.04]
    best = min(trials[:2], key=lambda trial: trial["relative_error"])
    assert trials[2]["recipe"] == best["recipe"]
    assert [("supervised" in trial["phones"]) for trial in trials] == [
        False,
        False,
        True,
    ]
    assert trials[2]["updates"] in (2 * best["updates"], 2 * best["updates"] + 1)
    row = f"| {best['recipe']} | 0.04 | {trials[2]['updates']:,} |"
    assert row in done.output and "| MFCC | – | – | 100.0 |" in done.output

    reported = split(pack(str(demo)), make_config("demo").data).test
    names = {pack(str(demo)).ids[index] for index in reported}
    for name in ("train.txt", "tuning.txt"):
        assert not names & {*(folder / name).read_text().split()}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recipes": ["dem"]}, "'dem' is unknown; did you mean 'demo'"),
        ({"recipes": {"a/b": {}}}, "give a name of letters"),
        ({"recipes": {"a": {"change": {}}}}, "did you mean 'changes'"),
        ({"recipes": {"a": {"changes": {"train.lt": 1}}}}, "did you mean 'train.lr'"),
        ({"minutes": 0}, "minutes = 0: give a number above 0"),
        ({"rungs": 1.5}, "rungs = 1.5: give a whole number"),
        ({"seeds": [-1]}, "give a JSON list of whole numbers"),
        ({"minutes": 1e-6}, "give at least"),
    ],
)
def test_bad_options_are_refused(demo, tmp_path, capsys, changes, message, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(Search, "pace_s", lambda self, name: 0.25)  # of an update
    with pytest.raises(SystemExit) as ended:
        main(given(demo, tmp_path / "search", **changes))
    assert message in str(ended.value)
    assert not list(tmp_path.glob("search/*/checkpoints"))


def test_what_lies_under_results_does_not_change(demo, tmp_path):
    """A recipe that was changed, and other speech, are refused; a new recipe is not."""
    folder = tmp_path / "search"
    Search(SearchPlan(str(demo), {"one": Recipe()}), folder)
    Search(SearchPlan(str(demo), {"two": Recipe("samples")}), folder)
    changed = {"one": Recipe(changes={"train.lr": 1e-3})}
    with pytest.raises(ConfigError, match="'one' was .* give it another name"):
        Search(SearchPlan(str(demo), changed), folder)
    other = make_demo_corpus(tmp_path / "other", 8, 5, progress=False)
    with pytest.raises(ConfigError, match="on other speech; give another folder"):
        Search(SearchPlan(str(other), {"one": Recipe()}), folder)


def test_speech_without_labels_is_refused(tmp_path):
    speech = write_corpus(tmp_path / "speech", speakers=8, utterances=2)
    with pytest.raises(ConfigError, match="no phones.txt in its folder"):
        Search(SearchPlan(str(speech), read_recipes(["demo"])), tmp_path / "search")
