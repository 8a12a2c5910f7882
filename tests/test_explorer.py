"""The explorer in a real JupyterLab and browser, and what it says of speech and runs
that are not as they should be."""

import json
import shutil
from datetime import datetime, timezone

import numpy as np
import pytest
import soundfile
import torch
from conftest import SMALL, jupyter_lab, keep_screenshot, violations, write_corpus

from cpc_nb.config import ConfigError, make_config
from cpc_nb.explorer import explore
from cpc_nb.scores import Moments, draw_pool, excerpt, open_run
from cpc_nb.soundmap import read_recording
from cpc_nb.trainer import train_worker

NARROW = {"encoder.channels": [16], "context.size": 16, "train.max_steps": 2}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with one tiny run, on speech without labels."""
    folder = tmp_path_factory.mktemp("explored")
    speech = write_corpus(folder / "speech", 5, 4)
    changes = SMALL | NARROW | {"data.source": str(speech), "train.batch_size": 8}
    train_worker(make_config("demo", changes), folder / "runs" / "tiny", quiet=True)
    return folder / "runs"


@pytest.fixture
def run(runs, tmp_path):
    """The path of a copy of the run, to be damaged."""
    return shutil.copytree(runs / "tiny", tmp_path / "tiny")


# --- against a slow and obvious reference ---


@torch.no_grad()
def scores_of(run, shown, frames, t, row) -> list[float]:
    """Scores of `frames`, one after the other, for step `row` after frame `t`."""
    criterion, c = run.objective.criterion, shown.c[None, :128, None]  # a window
    W_k = criterion.predictors[row]
    if run.objective.config.loss.project == "encoder":
        return [criterion.scale * float(W_k(frame) @ shown.c[t]) for frame in frames]
    prediction = W_k(criterion.shared(c))[0, t, 0]
    return [criterion.scale * float(frame @ prediction) for frame in frames]


@pytest.mark.parametrize(
    "changes",
    [
        {"loss.project": "encoder"},
        {"loss.predictor": "transformer", "loss.shared_transformer": True},
        {"loss.steps": [1, 2, 4, 8], "context.kind": "lstm"},
    ],
    ids=["encoder", "transformer", "lstm"],
)
def test_guesses_are_those_of_a_loop_over_all_candidates(runs, tmp_path, changes):
    speech = str(runs.parent / "speech")
    config = SMALL | NARROW | {"data.source": speech, "train.batch_size": 8}
    train_worker(make_config("demo", config | changes), tmp_path / "run", quiet=True)
    run = open_run(tmp_path / "run")
    shown, pool = excerpt(run, 3), draw_pool(run, n=2)
    moments = Moments(run, shown, pool)
    found, t = moments.over_time(), 60
    for row, k in enumerate(moments.steps):
        frames = [*shown.z, *pool.z[pool.others(3)]]
        scores = scores_of(run, shown, frames, t, row)
        odds = np.exp(scores) / np.exp(scores).sum()
        assert np.isclose(found.loss[row, t], -np.log(odds[t + k]), rtol=1e-3)
        assert found.rank[row, t] == 1 + sum(s > scores[t + k] for s in scores)
        best = moments.ranking(t, k, n=1)
        assert np.isclose(best["true"][0].probability, odds[t + k], rtol=1e-3)
        first = min(best["here"] + best["elsewhere"], key=lambda guess: guess.place)
        assert first.place == 1 and np.isclose(first.probability, odds.max(), rtol=1e-3)


# --- what is missing, and what to do ---


def test_a_run_is_opened_with_what_there_is_and_notes_on_the_rest(run):
    def notes():
        return " ".join(open_run(run).notes)

    assert "cpc_evaluate --run_dir" in notes() and "cpc_align" in notes()
    shutil.rmtree(run / "model")
    assert "has not ended" in notes() and "step-00000002" in notes()
    shutil.copytree(
        run / "checkpoints/step-00000002", run / "checkpoints/step-00000001"
    )
    weights = run / "checkpoints" / "step-00000002" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ConfigError, match="no checkpoint can be read|state"):
        shutil.rmtree(run / "checkpoints" / "step-00000001")
        open_run(run)


def test_a_run_that_cannot_be_explored_says_why(run, tmp_path):
    def complaint(path=run, **options):
        with pytest.raises(ConfigError) as caught:
            explore(path, **options)
        return str(caught.value)

    assert "is no run folder" in complaint(tmp_path / "nothing")
    assert "no such folder" in complaint(data=str(tmp_path / "gone"))
    state = run / "checkpoints" / "step-00000002" / "state.json"
    kept = state.read_bytes()
    state.write_bytes(kept[:-3])  # half-written
    assert "no checkpoint can be read" in complaint()
    state.write_bytes(kept)
    (run / "checkpoints" / "index.json").unlink()
    shutil.rmtree(run / "checkpoints" / "step-00000002")
    assert "has no checkpoint yet" in complaint()
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"of_tomorrow": 1}))
    assert "of_tomorrow" in complaint()
    (run / "config.json").write_text("{")
    assert "config.json" in complaint()


def test_other_speech_and_labels_that_do_not_fit_are_noted(run, tmp_path):
    other = write_corpus(tmp_path / "other", 2, 2, first_speaker=7)
    (tmp_path / "phones.txt").write_text("nobody 1 2 3\n")
    opened = open_run(run, str(other), str(tmp_path / "phones.txt"))
    notes = " ".join(opened.notes)
    assert "matches no utterance" in notes and "not the speech" in notes
    assert set(opened.part) == {""} and opened.labels is None


def test_an_explorer_tells_instead_of_raising(run, tmp_path):
    speech = write_corpus(tmp_path / "speech", 2, 2, first_speaker=100)
    short = speech / "100" / "7" / "100-7-0009.flac"
    soundfile.write(short, 0.1 * np.random.default_rng(0).standard_normal(500), 16_000)
    explorer = explore(run, data=str(speech))
    explorer.utterance.value = explorer.run.corpus.ids.index("100-7-0009")
    assert len(explorer.moments) == 3 and not explorer.message.value  # 31 ms
    explorer.show_moment(frame=2)
    assert "beyond the end" in explorer.guesses.value
    explorer.kind.value = "phones"
    explorer.show_map()
    assert "cpc_align" in explorer.message.value
    file = {"name": "me.webm", "type": "audio/webm", "size": 4}
    file |= {
        "content": memoryview(b"RIFF"),
        "last_modified": datetime.now(timezone.utc),
    }
    explorer.voice.value = [file]
    assert "me.webm cannot be used" in explorer.message.value
    explorer.show_moment(frame=1)
    assert not explorer.message.value and explorer.frame.value == 1


@pytest.mark.parametrize("level", [0, 1e-4])
def test_a_silent_recording_is_refused(level, tmp_path):
    silence = level * np.random.default_rng(0).standard_normal(16_000)
    soundfile.write(tmp_path / "me.wav", silence, 16_000)
    with pytest.raises(ConfigError, match="me.wav .*silent.*record"):
        read_recording((tmp_path / "me.wav").read_bytes(), "me.wav")


def test_speech_of_a_manifest_and_phones_of_a_ctm_file(runs, tmp_path):
    files = sorted((runs.parent / "speech").glob("*/*/*.flac"))
    rows = [f"{path},{path.stem},{path.parts[-3]}" for path in files]
    (tmp_path / "speech.csv").write_text("path,utterance,speaker\n" + "\n".join(rows))
    (tmp_path / "speech.ctm").write_text(f"{files[3].stem} 1 0.5 1.0 AH1\n")
    (tmp_path / "SPEAKERS.TXT").write_text(f"{files[3].parts[-3]} | F | demo\n")
    run = open_run(runs / "tiny", str(tmp_path / "speech.csv"), tmp_path / "speech.ctm")
    index = run.corpus.ids.index(files[3].stem)
    phones = excerpt(run, index).phones
    assert phones[80] == "AH" and phones[10] == "SIL"
    assert run.sexes == {files[3].parts[-3]: "F"}


# --- in a browser ---


def test_a_saved_page_can_be_read_with_little_sight(runs, tab, tmp_path):
    explorer = explore(runs / "tiny")
    explorer.show_map()
    tab.goto(explorer.save(tmp_path / "page.html").as_uri())
    keep_screenshot(tab, "explorer")
    assert violations(tab) == []


DURATIONS = "audio => audio.map(one => [one.title, one.duration])"


# How many lines in the playhead's colour the last panel of the timeline has.
LINES = """() => {
    const canvas = document.querySelector('.jupyter-matplotlib canvas');
    const { width, height } = canvas;
    const rows = [Math.round(0.75 * height), Math.round(0.1 * height)];
    const { data } = canvas.getContext('2d').getImageData(0, rows[0], width, rows[1]);
    const blue = (x) => [...Array(rows[1]).keys()].some((y) => {
        const [r, g, b] = data.subarray(4 * (y * width + x));
        return r < 130 && g > 140 && b > 200;
    });
    const columns = [...Array(width).keys()].map(blue);
    return columns.filter((is, x) => is && !columns[x - 1]).length;
}"""


def follow_the_playhead(tab):
    """Play the utterance, and pause: the frame that is shown is the one heard."""
    read_frame = "document.querySelector('.widget-readout').innerText"
    tab.locator(".widget-readout").first.fill("0")
    tab.keyboard.press("Enter")
    tab.wait_for_function("document.querySelector('audio').currentTime < 0.05")
    tab.evaluate("document.querySelector('audio').play()")
    tab.wait_for_function(f"{read_frame} > 40")  # the playhead goes along
    tab.evaluate("document.querySelector('audio').pause()")
    heard_s = tab.evaluate("document.querySelector('audio').currentTime")
    tab.wait_for_function(
        f"heard_s => Math.abs({read_frame} - 100 * heard_s) < 3", arg=heard_s
    )
    frame = tab.locator(".widget-readout").first.inner_text()
    tab.get_by_text(f"At {int(frame) / 100:.2f} s, ").wait_for()
    tab.wait_for_function(f"({LINES})() == 2")  # no ghost of where it was


def record_a_voice(tab):
    """Record, first without leave, then with it: the recording is what is shown."""
    button = tab.get_by_role("button", name="record your voice")
    button.click()
    tab.get_by_text("No recording: NotAllowedError").wait_for()
    tab.context.grant_permissions(["microphone"])
    button.click()
    tab.get_by_role("button", name="stop (2 s)").click()
    tab.locator("audio[title='your recording']").wait_for()
    tab.wait_for_function("document.querySelector('audio').duration > 1.5")
    assert tab.evaluate("document.querySelector('audio').duration") < 4
    tab.get_by_text("No recording").wait_for(state="detached")


def test_an_utterance_is_chosen_a_moment_clicked_and_heard(runs, tab, tmp_path):
    source = f"from cpc_nb.explorer import explore\nexplore({str(runs)!r})"
    kernel = {"display_name": "python3", "language": "python", "name": "python3"}
    cell = {"cell_type": "code", "id": "explorer", "metadata": {}, "source": source}
    cell |= {"execution_count": None, "outputs": []}
    notebook = {"cells": [cell], "metadata": {"kernelspec": kernel}}
    notebook |= {"nbformat": 4, "nbformat_minor": 5}
    (tmp_path / "explore.ipynb").write_text(json.dumps(notebook))
    run = open_run(runs / "tiny")
    second = np.flatnonzero(run.part == "test")[1]
    name = f"{run.corpus.ids[second]} ({run.corpus.lengths[second] / 16_000:.1f} s)"
    errors = []
    tab.on("pageerror", lambda error: errors.append(str(error)))
    with jupyter_lab(tmp_path) as address:
        tab.goto(f"{address}/lab/tree/explore.ipynb?token=test&reset")
        tab.get_by_text("Python 3 (ipykernel) | Idle").wait_for()
        tab.locator(".jp-Cell .cm-content").click()
        tab.keyboard.press("Control+Enter")
        figure = tab.locator(".jupyter-matplotlib canvas").nth(1)  # the upper one
        figure.wait_for()

        tab.get_by_label("utterance", exact=True).select_option(name)
        tab.locator("audio[title='the utterance']").wait_for()
        expected = run.corpus.lengths[second] / 16_000
        tab.wait_for_function(
            "expected => Math.abs(document.querySelector('audio').duration - expected)"
            " < 0.01",
            arg=expected,
        )

        tab.get_by_role("cell", name=f"of {run.corpus.ids[second]} (").first.wait_for()
        before = tab.get_by_text("is guess number").inner_text()
        size = figure.bounding_box()
        at = {"x": 0.3 * size["width"], "y": 0.55 * size["height"]}  # on the loss
        figure.hover(position=at, force=True)
        figure.click(position=at, force=True)
        tab.wait_for_function(
            "before => ![...document.querySelectorAll('p')]"
            ".some(one => one.innerText == before)",
            arg=before,
        )
        now, k = tab.locator(".widget-readout").all_inner_texts()
        told = tab.get_by_text("is guess number").inner_text()
        assert told.startswith(f"At {int(now) / 100:.2f} s, {int(k) * 10} ms ahead")
        assert 70 < int(now) < 100 and int(k) > 1
        tab.wait_for_function(
            "[...document.querySelectorAll('audio')].every(one => one.duration > 0)"
        )
        heard = dict(tab.eval_on_selector_all("audio", DURATIONS))
        pieces = [length for what, length in heard.items() if "guess" in what]
        assert len(pieces) > 5 and max(pieces) == pytest.approx(0.3, abs=0.01)

        follow_the_playhead(tab)
        record_a_voice(tab)

        tab.get_by_role("button", name="draw the map").click()
        tab.get_by_role("button", name="drawing").wait_for(state="detached")
        keep_screenshot(tab, "jupyterlab-explorer")
    assert not errors
