"""What an evaluation holds out, what it refuses, and its numbers by other code."""

import errno
import fcntl
import json
import os
import shutil

import nbformat
import numpy as np
import pytest
import soundfile
import torch
from conftest import SMALL, options, voice, write_corpus
from nbclient import NotebookClient
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from cpc_nb.checkpoint import RunFolder
from cpc_nb.config import ConfigError, make_config
from cpc_nb.corpus import CorpusError, pack
from cpc_nb.demo import make_demo_corpus
from cpc_nb.evaluate import evaluate
from cpc_nb.evaluation import (
    features_of_windows,
    hold_folder,
    plan_evaluation,
    speaker_results,
    texts_apart,
)
from cpc_nb.splits import split
from cpc_nb.train import main as train


def train_on(data, run, **overrides):
    """A run of two updates."""
    given = {
        "data": str(data),
        "run_dir": str(run),
        "max_steps": 2,
        "batch_size": 8,
        "n_gpus": 0,
        "precision": "fp32",
        "overrides": {**SMALL, **overrides},
    }
    train(options(given))
    return run


@pytest.fixture(scope="module")
def trained(speech, tmp_path_factory):
    return train_on(speech, tmp_path_factory.mktemp("evaluate") / "run")


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """Eight voices with eight utterances each, and their exact phones."""
    folder = tmp_path_factory.mktemp("demo") / "eight"
    return make_demo_corpus(folder, n_voices=8, n_sentences=8, progress=False)


@pytest.fixture(scope="module")
def trained_on_demo(demo, tmp_path_factory):
    return train_on(demo, tmp_path_factory.mktemp("evaluate") / "run")


# ---------------------------------------------------------------------------------
# What is held out


def sides_of_training(run, speech):
    """Speakers that `run` was trained on, and those it held out."""
    corpus = pack(speech)
    parts = split(corpus, RunFolder(run).config().data)
    names = np.array(corpus.speakers)
    heard = np.concatenate([parts.train, parts.valid])
    return set(names[corpus.speaker[heard]]), set(names[corpus.speaker[parts.test]])


def test_a_part_of_the_training_corpus_is_not_held_out(
    trained, speech, tmp_path, capsys
):
    heard, held_out = (sorted(side) for side in sides_of_training(trained, speech))
    part = tmp_path / "part"
    for speaker in [*heard[:2], *held_out[:2]]:
        shutil.copytree(speech / speaker, part / speaker)
    run = shutil.copytree(trained, tmp_path / "run")
    metrics = evaluate(run, data=str(part), protocols=["speaker_window"])
    assert metrics["data"]["speakers"] == 2 and metrics["data"]["utterances"] == 16
    said = capsys.readouterr().out
    assert "16 of 32 utterances were heard in training and are left out" in said


def test_a_copy_under_other_names_and_in_another_format_is_recognised(
    trained, speech, tmp_path
):
    heard, _ = sides_of_training(trained, speech)
    for number, path in enumerate(sorted(speech.rglob(f"{min(heard)}-*.flac"))):
        wave, rate = soundfile.read(path, dtype="int16")
        folder = tmp_path / "copy" / f"somebody-{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        soundfile.write(folder / f"{number}.wav", wave, rate)
    with pytest.raises(CorpusError, match="nothing is held out that the run has not"):
        evaluate(trained, data=str(tmp_path / "copy"))


def test_a_held_out_utterance_that_is_also_trained_on_is_left_out(tmp_path, capsys):
    root = write_corpus(tmp_path / "voices", 10, 8)
    parts = split(pack(root), make_config("demo", SMALL).data)
    corpus = pack(root)
    twin, told = corpus.ids[parts.test[0]], corpus.ids[parts.train[0]]
    [source], [beside] = root.rglob(f"{twin}.flac"), root.rglob(f"{told}.flac")
    speaker, chapter, _ = told.split("-")
    shutil.copy(source, beside.with_name(f"{speaker}-{chapter}-0099.flac"))
    run = train_on(root, tmp_path / "run")
    capsys.readouterr()
    metrics = evaluate(run, protocols=["speaker_window"])
    assert "1 of 32 utterances were heard" in capsys.readouterr().out
    assert metrics["data"]["utterances"] == 31


@pytest.mark.parametrize("seed", range(20))
def test_no_sentence_is_on_both_sides(seed):
    rng = np.random.default_rng(seed)
    texts = [f"Sentence {n}!" for n in rng.integers(0, rng.integers(5, 60), 60)]
    texts[::7] = [""] * len(texts[::7])
    order = rng.permutation(60)
    before = order[:40], order[40:]
    train, test, about = texts_apart(*before, [text.upper() for text in texts])
    assert set(train) <= set(before[0]) and set(test) <= set(before[1])
    of = lambda side: {texts[u] for u in side} - {""}
    assert not of(train) & of(test) and len(train) and len(test)
    shared = of(before[0]) & of(before[1])
    expected = np.mean([texts[u] in shared for u in before[1]])
    assert about["test_utterances_shared"] == pytest.approx(expected)


def test_the_embedded_corpus_shares_no_sentence(trained_on_demo, tmp_path):
    run = shutil.copytree(trained_on_demo, tmp_path / "run")
    metrics = evaluate(run, protocols=["phone_frame"], supervised=0)
    assert metrics["data"]["texts"] == {
        "test_utterances_shared": 0.0,
        "transcribed": 1.0,
        "train_utterances_left_out": 0,
    }


def test_phones_of_another_corpus_with_short_utterances(trained, demo, tmp_path):
    """Shorter than a window, and the supervised network is on."""
    root = shutil.copytree(demo, tmp_path / "short")
    lines = []
    for line in (root / "phones.txt").read_text().splitlines():
        name, *phones = line.split()
        if name.endswith(("1", "3", "5", "7")):
            [path] = root.rglob(f"{name}.flac")
            wave, rate = soundfile.read(path, dtype="int16")
            soundfile.write(path, wave[: 160 * 60 + 240], rate)
            phones = phones[:60]
        lines.append(" ".join([name, *phones]) + "\n")
    (root / "phones.txt").write_text("".join(lines))
    run = shutil.copytree(trained, tmp_path / "run")
    metrics = evaluate(
        run, data=str(root), protocols=["phone_frame"], supervised=2, tsne_speakers=1.0
    )
    assert set(metrics["phone_frame"]) == {
        *("cpc", "encoder", "mfcc", "random", "supervised", "deviation")
    }
    assert metrics["probes"]["phone_frame"]["test_utterances"] > 8


# ---------------------------------------------------------------------------------
# The numbers


def test_everything_on(trained_on_demo, demo, tmp_path):
    run = shutil.copytree(trained_on_demo, tmp_path / "run")
    metrics = evaluate(run, supervised=2)
    assert {"speaker", "speaker_window", "phone_frame", "phone_mlp", "abx"} <= set(
        metrics
    )
    within, across = (metrics["abx"][side] for side in ("within", "across"))
    for errors, names in (
        (across, ["mfcc", "cpc", "encoder", "random"]),
        (within, ["cpc", "encoder", "random"]),
    ):
        for name in names:
            assert 0 < errors[name] < 0.4 and 0 < errors["deviation"][name] < 0.3
    # standardised MFCC take none of the few triples of one voice for another
    assert within["mfcc"] < min(within["cpc"], within["encoder"], within["random"])
    for protocol in ("phone_frame", "phone_mlp"):
        for name, deviation in metrics[protocol]["deviation"].items():
            assert 0 <= metrics[protocol][name] <= 1 and 0 < deviation < 0.5
    assert metrics["phone_frame"]["mfcc"] > 0.3
    assert all(0 < error < 0.5 for error in metrics["prediction_deviation"] if error)
    page = (run / "evaluation" / "report.html").read_text()
    assert page.count('<audio controls src="data:audio/mpeg;base64,') == 3
    for heading in ("Who is speaking?", "Do equal sounds lie together?", "Results"):
        assert f"<h2>{heading}</h2>" in page
    assert (run / "evaluation" / "abx.png").exists()


def test_speakers_by_other_code(trained, speech):
    """Standardised by hand, every other utterance of each speaker, many splits."""
    plan = plan_evaluation(trained, None, None, ["speaker"], 0, 0)
    features = features_of_windows(plan)
    ours = speaker_results(plan, features)
    speaker = plan.corpus.speaker[plan.utterance]
    for name in ("mfcc", "context"):
        values, scores = features[f"{name}_summary"], []
        for seed in range(10):
            rng, chosen = np.random.default_rng(100 + seed), []
            for one in np.unique(speaker):
                said = rng.permutation(np.unique(plan.utterance[speaker == one]))
                chosen += [*said[: len(said) // 2]]
            side = np.isin(plan.utterance, chosen)
            scaler = StandardScaler().fit(values[side])
            x = scaler.transform(values)
            classifier = LogisticRegression(max_iter=5000).fit(x[side], speaker[side])
            scores.append(classifier.score(x[~side], speaker[~side]))
        found = ours[name]["summary"]["50"]
        error = np.hypot(found["deviation"] / 5**0.5, np.std(scores) / 10**0.5)
        assert abs(found["test"] - np.mean(scores)) <= 3 * error < 0.2


# ---------------------------------------------------------------------------------
# What is refused, and what is not lost


def test_constant_features_are_refused(trained, tmp_path):
    """The network gives the same for everything, as after a rate far too high."""
    run = RunFolder(shutil.copytree(trained, tmp_path / "run"))
    objective = run.load("best")
    with torch.no_grad():
        for parameter in objective.model.encoder.parameters():
            parameter.zero_()
    optimizer = torch.optim.AdamW(objective.parameters())
    state = {"step": 3, "wall_seconds": 1.0, "best_valid_loss": 0.0, "waited": 0}
    run.save(objective, optimizer, state, best=True, keep=5)
    run.close()
    with pytest.raises(ConfigError, match="are the same for all windows: training co"):
        evaluate(run.path)
    assert not (run.path / "evaluation").exists()
    (run.path / "evaluation").mkdir()  # of a notebook that is being executed, say
    with pytest.raises(ConfigError, match="are the same for all windows: training co"):
        evaluate(run.path)
    assert (run.path / "evaluation").exists()


def test_another_corpus_does_not_replace_the_report(trained, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    evaluate(run, protocols=[])
    before = (run / "evaluation" / "metrics.json").read_bytes()
    other = write_corpus(tmp_path / "other voices", 3, 2, first_speaker=300)
    metrics = evaluate(run, data=str(other), protocols=[])
    assert metrics["data"]["folder"] == "evaluation-other_voices"
    assert (run / "evaluation-other_voices" / "report.html").exists()
    assert (run / "evaluation" / "metrics.json").read_bytes() == before


def test_corpora_of_one_name_do_not_share_a_folder(trained, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    one, other = (
        write_corpus(tmp_path / place / "voices", 3, 2, first_speaker=number)
        for place, number in (("here", 300), ("there", 500))
    )
    fingerprint = pack(other).fingerprint
    names = ["evaluation-voices", f"evaluation-voices-{fingerprint[:8]}"]
    for _ in range(2):  # the second time each finds its own
        for data, name in zip((one, other), names):
            metrics = evaluate(run, data=str(data), protocols=[])
            assert metrics["data"]["folder"] == name
            found = json.loads((run / name / "metrics.json").read_text())
            assert found["data"]["fingerprint"] == pack(data).fingerprint
    (run / names[0] / "metrics.json").write_text("[]")  # nobody's results
    metrics = evaluate(run, data=str(one), protocols=[])
    assert metrics["data"]["folder"] == names[0]


def test_a_file_system_without_locks_is_warned_of(trained, tmp_path, monkeypatch):
    """By an evaluation as by a training; any other error is an error."""
    run = RunFolder(shutil.copytree(trained, tmp_path / "run"))

    def refuse(number):
        def flock(handle, operation):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(fcntl, "flock", flock)

    refuse(errno.ENOLCK)
    with pytest.warns(
        UserWarning, match="has no locks: make sure that only one process"
    ):
        run.hold()
    run.close()
    with pytest.warns(
        UserWarning, match="has no locks: make sure that only one process"
    ):
        with hold_folder(run.path / "evaluation"):
            pass
    refuse(errno.EIO)
    with pytest.raises(OSError, match="Input/output error"):
        run.hold()
    with pytest.raises(ConfigError, match="evaluation cannot be made: .*Input/output"):
        with hold_folder(run.path / "evaluation"):
            pass


def test_two_evaluations_at_once(trained, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    folder = run / "evaluation"
    (folder / ".features-of-the-other").mkdir(parents=True)
    handle = os.open(folder, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(ConfigError, match="another evaluation is writing to"):
        evaluate(run, protocols=[])
    assert (folder / ".features-of-the-other").exists()
    os.close(handle)
    evaluate(run, protocols=[])
    assert not (folder / ".features-of-the-other").exists()


def test_a_run_that_ended_before_its_first_metrics(trained, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    (run / "metrics.jsonl").unlink()
    metrics = evaluate(run, protocols=["speaker_window"])
    assert metrics["model"]["training_steps"] == 2
    assert not (run / "evaluation" / "training.png").exists()


def test_the_cpu_is_used_if_that_is_wanted(trained):
    assert plan_evaluation(trained, None, None, [], 0, n_gpus=0).device.type == "cpu"


@pytest.mark.parametrize("name, value", [("seed", 2**70), ("n_gpus", -1)])
def test_numbers_out_of_range(trained, name, value):
    with pytest.raises(ConfigError, match=f"{name} = "):
        evaluate(trained, **{name: value})


def test_run_all_twice_uses_the_parameters_on_the_screen(trained, tmp_path):
    """Changed in the cell and run again in the same kernel, as one does in Lab."""
    notebook = nbformat.read("nbs/05_evaluate.ipynb", 4)
    [cell] = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", [])]
    template = cell.source
    client = NotebookClient(notebook, timeout=120, kernel_name="python3")
    with client.setup_kernel(cwd="nbs"):
        for name in ("first", "second"):
            run = shutil.copytree(trained, tmp_path / name)
            cell.source = (
                template.replace('"runs/demo"', repr(str(run)))
                .replace("protocols: list = None", "protocols: list = []")
                .replace("seed: int = 0", f"seed: int = {len(name)}")
            )
            for index, one in enumerate(notebook.cells):
                client.execute_cell(one, index)
            found = json.loads((run / "evaluation" / "metrics.json").read_text())
            assert found["data"]["seed"] == len(name)


def test_a_voice_of_one_utterance_does_not_stop_an_evaluation(trained, tmp_path):
    other = write_corpus(tmp_path / "other", 3, 6, first_speaker=400, duration_s=4.0)
    (other / "500" / "1").mkdir(parents=True)
    wave = voice(500, 0, 4.0)
    soundfile.write(other / "500" / "1" / "500-1-0000.flac", wave, 16_000)
    run = shutil.copytree(trained, tmp_path / "run")
    metrics = evaluate(run, data=str(other), protocols=["speaker"])
    assert metrics["data"]["speakers"] == 4 and "mfcc" in metrics["speaker"]
