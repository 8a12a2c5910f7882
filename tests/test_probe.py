"""Features of utterances, probes and their guards against leaks, and evaluations."""

import json
import re
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import SMALL, options, papermill, script
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from cpc_nb import probe, supervised
from cpc_nb.config import ConfigError, make_config
from cpc_nb.corpus import CorpusError, pack
from cpc_nb.demo import PHONE_CLASSES, make_demo_corpus
from cpc_nb.evaluate import evaluate, main
from cpc_nb.features import Frames, batches, encode_batch, extract, extract_mfcc, mfcc
from cpc_nb.labels import kaldi_frame_count
from cpc_nb.model import CPC
from cpc_nb.probe import (
    HalfDropout,
    bootstrap_accuracy,
    bootstrap_ratio,
    fit_probe,
    fit_probes,
    halve_each_speaker,
    moments,
    phone_task,
    plot_confusion,
    plot_recall,
    predict,
    probe_split,
    seeded,
    speaker_accuracy,
    speaker_task,
    speaker_window,
)
from cpc_nb.splits import split
from cpc_nb.supervised import supervise
from cpc_nb.train import main as train


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """Six voices with six utterances each, and their exact phone labels."""
    return make_demo_corpus(
        tmp_path_factory.mktemp("demo") / "six",
        n_voices=6,
        n_sentences=6,
        progress=False,
    )


@pytest.fixture(scope="module")
def corpus(demo):
    return pack(demo)


@pytest.fixture(scope="module")
def trained(demo, tmp_path_factory):
    """The folder of a run of two steps on `demo`."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    train(
        options(
            {
                "data": str(demo),
                "run_dir": str(folder),
                "max_steps": 2,
                "batch_size": 8,
                "n_gpus": 0,
                "precision": "fp32",
                "overrides": SMALL,
            }
        )
    )
    return folder


# Features


@pytest.mark.parametrize(
    "preset, changes",
    [
        ("demo", {}),
        ("minimal", {}),
        ("paper", {}),
        ("samples", {"encoder.norm": "batch"}),
        ("samples", {"encoder.padding": False, "encoder.norm": "none"}),
        ("demo", {"context.kind": "lstm", "context.layers": 2}),
    ],
)
def test_heard_together_is_heard_alone(corpus, preset, changes):
    """Padding in a batch changes no frame of an utterance, not even its last."""
    config = make_config(
        preset, {"encoder.channels": [24], "context.size": 16, **changes}
    )
    torch.manual_seed(0)
    model = CPC(config.encoder, config.context).eval()
    for buffer in (
        value for name, value in model.named_buffers() if name.endswith("running_mean")
    ):
        buffer.uniform_(-0.1, 0.1)
    waves = [
        torch.from_numpy(corpus.utterance(index)[:n] / np.float32(32768))
        for index, n in ((0, None), (3, 20_480), (9, 12_345), (20, None), (21, 700))
    ]
    for together, wave in zip(encode_batch(model, waves, "fp32"), waves):
        alone = model.encode(wave)
        for one, other in zip(together, alone):
            assert one.shape == other.shape and torch.isfinite(one).all()
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_batches_cover_everything_once():
    lengths = np.random.default_rng(0).integers(1, 5_000, 300)
    found = batches(lengths, most=20_000)
    assert (
        np.array_equal(np.sort(np.concatenate(found)), np.arange(300))
        and len(found) < 60
    )
    for batch in found:
        assert len(batch) == 1 or lengths[batch].max() * len(batch) <= 20_000
    assert batches(np.zeros(0, int)) == []


def test_every_kind_of_features_is_of_the_same_instants(corpus, tmp_path):
    """Each label gets the network's nearest frame: all features share a time axis."""
    config = make_config("demo", {"encoder.channels": [24], "context.size": 16})
    model = CPC(config.encoder, config.context).eval()
    frames = Frames(np.array([5, 2]), kaldi_frame_count(corpus.lengths[[5, 2]]))
    found, cepstra = (
        extract(model, corpus, frames, tmp_path),
        extract_mfcc(corpus, frames, tmp_path),
    )
    assert (
        found["encoder"].shape == (len(frames), 24)
        and found["context"].shape == (len(frames), model.context.size)
        and cepstra.shape == (len(frames), 39)
        and frames.starts.tolist() == [0, frames.counts[0]]
    )
    for start, count, utterance in zip(frames.starts, frames.counts, frames.utterances):
        wave = torch.from_numpy(corpus.utterance(utterance) / np.float32(32768))
        torch.testing.assert_close(
            torch.from_numpy(cepstra[start : start + count].copy()), mfcc(wave)
        )
        # Label f is centred on sample 160 f + 200, the network's frame t on about
        # 160 t + 80.
        centre = (160 * np.arange(count) + 200 - 80) / 160
        context = model.encode(wave).context
        assert (
            np.abs(
                found["context"][start : start + count].astype(np.float32)
                - context[
                    np.clip(np.rint(centre), 0, len(context) - 1).astype(int)
                ].numpy()
            ).max()
            < 0.05
        )


# Probes


@pytest.mark.parametrize("features", ["mfcc", "context"])
def test_a_linear_probe_finds_what_scikit_learn_finds(corpus, demo, features, tmp_path):
    """On test utterances, within two points of exact logistic regression.

    The features are MFCC, or those of an untrained network."""
    train, test = halve_each_speaker(corpus, np.arange(len(corpus)))
    frames, phone, (n_train, n_valid, n_test) = phone_task(
        corpus, demo / "phones.txt", train, test
    ).frames()
    torch.manual_seed(0)
    config = make_config("demo", {"encoder.channels": [24], "context.size": 32})
    values = (
        extract_mfcc(corpus, frames, tmp_path)
        if features == "mfcc"
        else extract(CPC(config.encoder, config.context), corpus, frames, tmp_path)[
            "context"
        ]
    )
    probe = fit_probe(values, phone, n_train, n_valid, len(PHONE_CLASSES))
    scaler = StandardScaler().fit(values[:n_train].astype(np.float32))
    exact = LogisticRegression(C=0.01, max_iter=200).fit(
        scaler.transform(values[:n_train].astype(np.float32)), phone[:n_train]
    )
    ours, theirs = (
        (predict(probe, values[-n_test:]) == phone[-n_test:]).mean(),
        exact.score(
            scaler.transform(values[-n_test:].astype(np.float32)), phone[-n_test:]
        ),
    )
    most = np.bincount(phone[:n_train]).argmax()
    assert ours > theirs - 0.02 and ours > (phone[-n_test:] == most).mean() + 0.02


def test_a_probe_is_fixed_by_its_seed_and_reads_from_disk(tmp_path):
    """A float16 memory map gives what an array gives, and moments use all frames."""
    random = np.random.default_rng(0)
    classes = random.integers(0, 5, 9_000)
    values = np.lib.format.open_memmap(tmp_path / "x.npy", "w+", np.float16, (9_000, 7))
    values[:] = (
        random.normal(size=(5, 7))[classes] * 3 + random.normal(size=(9_000, 7)) + 100
    )
    mean, deviation = moments(values, chunk=1_000)
    np.testing.assert_allclose(mean, values.astype(np.float64).mean(0), rtol=1e-5)
    np.testing.assert_allclose(deviation, values.astype(np.float64).std(0), rtol=1e-3)
    one, same, other = (
        fit_probe(x, classes, 6_000, 1_000, 5, seed=seed)
        for x, seed in ((values, 0), (np.array(values), 0), (values, 1))
    )
    assert torch.equal(one.layers.weight, same.layers.weight) and not torch.equal(
        one.layers.weight, other.layers.weight
    )
    assert (predict(one, values[-2_000:], chunk=300) == classes[-2_000:]).mean() > 0.95


def voices_and_moods(speakers=6, utterances=4, windows=5, size=12, mood=3.0):
    """Features (W, D) of windows whose speakers sound different in each utterance.

    Returned with the speaker (W,) and the utterance (W,) of each window."""
    random = np.random.default_rng(0)
    utterance = np.repeat(np.arange(speakers * utterances), windows)
    speaker = utterance // utterances
    values = random.normal(size=(speakers, size))[speaker]
    values = values + mood * random.normal(size=(utterance.max() + 1, size))[utterance]
    return values + random.normal(size=values.shape), speaker, utterance


def test_utterances_of_training_are_not_tested():
    """With windows of one utterance on both sides, its mood would tell who speaks."""
    values, speaker, utterance = voices_and_moods()
    apart = speaker_accuracy(values, speaker, utterance)
    leaking = speaker_accuracy(values, speaker, np.arange(len(speaker)))
    assert apart["train"] == 1 and apart["test"] < leaking["test"] - 0.3
    assert apart == speaker_accuracy(values, speaker, utterance)
    assert apart["test"] != speaker_accuracy(values, speaker, utterance, seed=1)["test"]


def test_speaker_accuracy_is_that_of_an_obvious_loop():
    """Compared with a plain loop over splits, standardised by hand."""
    values, speaker, utterance = voices_and_moods(mood=0.5)
    random, scores = np.random.default_rng(3), []
    for _ in range(4):
        trains = np.zeros(len(speaker), bool)
        for one in range(6):
            own = random.permutation(np.unique(utterance[speaker == one]))
            for each in own[:1]:  # a tenth of four utterances, at least one
                trains |= utterance == each
        x = (values - values[trains].mean(0)) / values[trains].std(0)
        model = LogisticRegression(max_iter=1000).fit(x[trains], speaker[trains])
        scores.append((model.predict(x[~trains]) == speaker[~trains]).mean())
    found = speaker_accuracy(values, speaker, utterance, 0.1, n_splits=4, seed=3)
    assert found["test"] == pytest.approx(np.mean(scores))
    assert found["deviation"] == pytest.approx(np.std(scores, ddof=1))


def test_the_scale_of_features_does_not_matter():
    values, speaker, utterance = voices_and_moods(mood=0.5)
    scale = np.logspace(-4, 4, values.shape[1])
    one, other = (
        speaker_accuracy(x, speaker, utterance) for x in (values, values * scale)
    )
    assert one["test"] == pytest.approx(other["test"], abs=0.01)


def test_speakers_with_one_utterance_are_left_out_and_counted(capsys):
    values, speaker, utterance = voices_and_moods(mood=0.5)
    alone = np.isin(speaker, [0, 3])
    once = np.where(alone, 100 + speaker, utterance)
    found = speaker_accuracy(values, speaker, once)
    assert "2 of 6 speakers have one utterance: left out" in capsys.readouterr().out
    assert found == speaker_accuracy(values[~alone], speaker[~alone], utterance[~alone])
    with pytest.raises(CorpusError, match="0 of 6 speakers have two utterances"):
        speaker_accuracy(values, speaker, speaker)


def test_a_regression_that_does_not_converge_is_said(capsys, recwarn):
    """The published protocol does not scale features; here their sizes differ much."""
    values, speaker, utterance = voices_and_moods(mood=0.5)
    wide = values * np.logspace(0, 4, values.shape[1])
    speaker_window(wide, speaker, fraction=0.5)
    assert "did not converge in 1,000 iterations" in capsys.readouterr().out
    speaker_accuracy(wide, speaker, utterance)
    assert "converge" not in capsys.readouterr().out and not recwarn.list


def test_a_probe_learns_on_each_device(device):
    """Here from half-precision features, with a hidden layer."""
    random = np.random.default_rng(0)
    classes = random.integers(0, 5, 4_000)
    values = random.normal(size=(5, 7))[classes] * 3 + random.normal(size=(4_000, 7))
    probe = fit_probe(
        values.astype(np.float16), classes, 2_500, 500, 5, hidden=16, device=device
    )
    assert next(probe.parameters()).device.type == device.type
    assert (predict(probe, values[-1_000:]) == classes[-1_000:]).mean() > 0.95


def test_fitting_leaves_random_numbers_as_they_were(device):
    values, classes = np.eye(4, dtype=np.float32).repeat(9, 0), np.arange(4).repeat(9)
    torch.manual_seed(3)
    before = torch.rand(2), torch.rand(2, device=device)
    torch.manual_seed(3)
    fit_probe(values, classes, 30, 6, 4, hidden=8, device=device)
    after = torch.rand(2), torch.rand(2, device=device)
    assert all(map(torch.equal, before, after))


def jobs_of_many_kinds(n: int) -> list[dict]:
    """Jobs for `fit_probes` on noisy classes: linear and hidden probes in turn."""
    random = np.random.default_rng(0)
    classes = random.integers(0, 5, 4_000)
    means = random.normal(size=(5, 7))[classes]
    return [
        {
            "features": (means + random.normal(size=means.shape)).astype(np.float32),
            "classes": classes,
            "n_train": 2_500,
            "n_valid": 500,
            "n_classes": 5,
            "hidden": 16 * (number % 2),
            "seed": number // 2,
            "name": f"number {number}",
        }
        for number in range(n)
    ]


@pytest.fixture
def three_threads():
    """Three threads, as on a machine with three processors; other tests use one."""
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(1)


def test_a_probe_is_the_same_beside_others(device, three_threads):
    """Fitted together or alone, probes are equal to the bit; random state is kept."""
    jobs, before = jobs_of_many_kinds(6), torch.get_rng_state()
    beside = fit_probes(jobs, device)
    assert torch.get_num_threads() == 3
    assert torch.equal(torch.get_rng_state(), before)
    torch.set_num_threads(3 if device.type == "cuda" else 1)
    for job, one in zip(jobs, beside):
        alone = fit_probe(**job, device=device).state_dict()
        assert all(torch.equal(alone[k], v) for k, v in one.state_dict().items())


def test_a_probe_that_fails_ends_the_others(three_threads, monkeypatch):
    """Its error is raised long before the others would have ended."""
    bad, other, another = jobs_of_many_kinds(3)
    bad["features"][3, 1], other["hidden"], another["hidden"] = np.nan, 4, 4
    drawn, passes = [], 3_000
    forward = HalfDropout.forward
    monkeypatch.setattr(probe, "PASSES", passes)
    monkeypatch.setattr(
        HalfDropout, "forward", lambda own, x: (drawn.append(1), forward(own, x))[1]
    )
    with pytest.raises(
        ConfigError, match=r"number 0: 1 of 7 features \(1\) .* diverged"
    ):
        fit_probes([bad, other, another])
    assert len(drawn) < passes and torch.get_num_threads() == 3


def test_no_probe_is_no_error():
    assert fit_probes([]) == []


def test_half_dropout_is_dropout_of_a_half():
    """Each unit is dropped half of the time, independently of its neighbours."""
    torch.manual_seed(0)
    ones, dropout = torch.ones(20_000, 19, requires_grad=True), HalfDropout()
    out = dropout(ones)
    assert set(out.unique().tolist()) == {0, 2}
    assert (out.mean(0) - 1).abs().max() < 0.05
    assert (torch.corrcoef(out.detach().T) - torch.eye(19)).abs().max() < 0.05
    out.sum().backward()
    assert torch.equal(ones.grad, out) and torch.equal(dropout.eval()(ones), ones)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("row", [10, 1_250])
def test_a_probe_says_which_features_are_not_finite(bad, row):
    """In the training frames, and in the validation frames."""
    values = np.random.default_rng(0).normal(size=(1_400, 3)).astype(np.float32)
    values[row, 1] = bad
    classes = np.arange(1_400) % 2
    with pytest.raises(ConfigError, match=r"phones: 1 of 3 features \(1\) .* diverged"):
        fit_probe(values, classes, 1_000, 300, 2, name="phones")


@pytest.mark.parametrize("hidden", [0, 8])
def test_constant_features_give_the_most_common_class(hidden, capsys):
    classes = np.repeat([2, 0, 2], 300)
    values = np.full((900, 4), 1.2345, np.float16)
    probe = fit_probe(values, classes, 700, 100, 3, hidden)
    assert (predict(probe, values) == 2).all()
    assert "all features are constant" in capsys.readouterr().out


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_feature_that_is_not_finite_is_named(bad):
    values, speaker, utterance = voices_and_moods()
    values[7, 5] = bad
    for ask in (
        lambda: speaker_accuracy(values, speaker, utterance),
        lambda: speaker_window(values, speaker),
    ):
        with pytest.raises(ConfigError, match=r"1 of 12 features \(5\) are infinite"):
            ask()


def test_a_bootstrap_draws_speakers_not_frames():
    """Compared with a loop that resamples speakers; one speaker gives no deviation."""
    random = np.random.default_rng(0)
    counts = random.integers(50, 500, 12)
    speaker = np.repeat(random.permutation(12) + 40, counts)
    right = random.random(len(speaker)) < np.repeat(
        random.uniform(0.2, 0.9, 12), counts
    )
    ones = np.ones(len(right))
    accuracy, deviation = bootstrap_ratio(right, ones, speaker, seed=0, n=4000)
    own = [right[speaker == one] for one in np.unique(speaker)]
    draws = [
        np.concatenate([own[index] for index in random.integers(0, 12, 12)]).mean()
        for _ in range(4000)
    ]
    assert accuracy == right.mean()
    assert deviation == pytest.approx(np.std(draws), rel=0.06)
    assert np.isnan(bootstrap_accuracy(right, np.zeros(len(right)))[1])


def test_threads_draw_from_their_seeds_one_after_the_other():
    def draw(seed):
        with seeded(seed, torch.device("cpu")):
            time.sleep(0.05)
            return torch.randn(3)

    alone = [draw(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(draw, range(4)))
    assert all(map(torch.equal, alone, together))


def test_a_bootstrap_of_a_ratio_draws_speakers():
    rng = np.random.default_rng(0)
    speaker = np.repeat(range(12), 5)
    phones = rng.integers(10, 60, 60)
    edits = rng.binomial(phones, 0.1 + 0.05 * speaker)
    rates = []
    for _ in range(2000):
        rows = [np.flatnonzero(speaker == one) for one in rng.integers(0, 12, 12)]
        rows = np.concatenate(rows)
        rates.append(edits[rows].sum() / phones[rows].sum())
    rate, deviation = bootstrap_ratio(edits, phones, speaker, n=2000)
    assert rate == edits.sum() / phones.sum()
    assert deviation == pytest.approx(np.std(rates), rel=0.1)
    assert np.isnan(bootstrap_ratio(edits, phones, np.zeros(60))[1])


def test_a_hidden_layer_reads_what_is_not_linear():
    """Exclusive or: a linear probe fails, a hidden layer succeeds."""
    random = np.random.default_rng(0)
    values = random.normal(size=(8_000, 2)).astype(np.float32)
    classes = ((values[:, 0] > 0) ^ (values[:, 1] > 0)).astype(np.int64)
    accuracy = {
        hidden: (
            predict(
                fit_probe(values, classes, 6_000, 1_000, 2, hidden), values[-1_000:]
            )
            == classes[-1_000:]
        ).mean()
        for hidden in (0, 64)
    }
    assert accuracy[0] < 0.65 and accuracy[64] > 0.95


def test_what_is_tested_is_not_trained_on(corpus):
    train, test = np.arange(0, 30), np.arange(30, 36)
    found = probe_split(corpus, train, test)
    assert (
        np.array_equal(np.sort(np.concatenate([found.train, found.valid])), train)
        and len(np.unique(corpus.speaker[found.valid])) == 1
    )
    # Test speakers are new, so the validation speaker must be new as well.
    assert not set(corpus.speaker[found.train]) & set(corpus.speaker[found.valid])
    known = probe_split(corpus, *halve_each_speaker(corpus, np.arange(len(corpus))))
    assert (
        set(corpus.speaker[known.train]) == set(corpus.speaker[known.test])
        and len(known.valid) == 1
    )
    with pytest.raises(
        CorpusError,
        match="test utterance '1001-1-0000' and training utterance '1001-1-0000' "
        "are the same audio",
    ):
        probe_split(corpus, train, np.array([0, 31]))
    with pytest.raises(
        CorpusError, match="1 training utterance.* for a probe, which needs two"
    ):
        probe_split(corpus, train[:1], test)
    task = speaker_task(corpus, *halve_each_speaker(corpus, np.arange(len(corpus))))
    assert task.names == corpus.speakers and np.array_equal(
        np.unique(task.frames()[1]), np.arange(6)
    )
    with pytest.raises(CorpusError, match="1 speaker to train on"):
        speaker_task(corpus, np.arange(3), np.arange(3, 6))
    with pytest.raises(CorpusError, match="none of the test speakers"):
        speaker_task(corpus, np.arange(12), np.arange(30, 36))


def test_supervision_learns(corpus, demo, tmp_path):
    """On test utterances, a supervised network beats guessing the commonest phone."""
    task = phone_task(
        corpus, demo / "phones.txt", *halve_each_speaker(corpus, np.arange(len(corpus)))
    )
    config = make_config(
        "demo",
        {
            "encoder.channels": [24],
            "context.size": 32,
            "train.lr": 3e-3,
            "launch.n_gpus": 0,
        },
    )
    frames, phone, (n_train, _, n_test) = task.frames()
    network, again = (
        supervise(config, corpus, task, 200),
        supervise(config, corpus, task, 200),
    )
    assert all(
        torch.equal(one, other)
        for one, other in zip(network.parameters(), again.parameters())
    )
    told = predict(
        network.head,
        extract(network.model, corpus, frames, tmp_path)["context"][-n_test:],
    )
    assert (told == phone[-n_test:]).mean() > (
        phone[-n_test:] == np.bincount(phone[:n_train]).argmax()
    ).mean() + 0.05


# Evaluations


def test_every_protocol(trained, demo, tmp_path):
    """Papermill writes metrics.json, figures and a report with the measured values.

    The labels are found in the corpus."""
    run, protocols = (
        shutil.copytree(trained, tmp_path / "run"),
        ["speaker", "speaker_frame", "phone_frame", "phone_mlp"],
    )
    done = papermill(
        "05_evaluate.ipynb",
        run / "evaluation" / "05_evaluate.ipynb",
        {"run_dir": run, "protocols": protocols, "supervised": 2},
    )
    assert done.code == 0, done.output[-4000:]
    metrics = json.loads((run / "evaluation" / "metrics.json").read_text())
    assert set(metrics) == {
        *protocols,
        "probes",
        "prediction_accuracy",
        "prediction_deviation",
        "data",
        "model",
    }
    for protocol in protocols[1:]:
        assert set(metrics[protocol]) == {
            "cpc",
            "encoder",
            "mfcc",
            "random",
            "supervised",
            "deviation",
        }
        scores = {**metrics[protocol]}
        deviations = scores.pop("deviation")
        assert all(
            0 <= value <= 1 for value in [*scores.values(), *deviations.values()]
        )
    for protocol in ("phone_frame", "phone_mlp"):
        assert metrics[protocol]["mfcc"] > 0.2
    corpus, config = pack(demo), make_config("demo", SMALL)
    test = split(corpus, config.data).test
    assert (
        metrics["probes"]["phone_frame"]["test_frames"]
        == kaldi_frame_count(corpus.lengths[test]).sum()
        and metrics["probes"]["phone_frame"]["classes"] == 40
    )
    assert metrics["probes"]["speaker_frame"]["train_utterances"] + metrics["probes"][
        "speaker_frame"
    ]["test_utterances"] < len(test)  # some are for validation
    assert {path.stem for path in (run / "evaluation").glob("*.png")} == {
        "training",
        "prediction_accuracy",
        "tsne",
        "speaker",
        "frames",
        "confusion",
        "recall",
        "utterance",
    }
    page = (run / "evaluation" / "report.html").read_text()
    for protocol in protocols[1:]:
        deviation = metrics[protocol]["deviation"]["cpc"]
        cell = f"{100 * metrics[protocol]['cpc']:.1f} ± {100 * deviation:.1f}"
        assert f"<td>{cell}</td>" in page
    about = metrics["probes"]["phone_frame"]
    assert (
        about["commonest"] in PHONE_CLASSES
        and 1 / len(PHONE_CLASSES) < about["commonest_share"] < 1
        and f"{about['commonest_share']:.1%} of them {about['commonest']}" in page
    )
    assert not list((run / "evaluation").glob(".features*"))


def test_every_test_speaker_trains(corpus, capsys):
    """With one training utterance each, a speaker set aside leaves the task."""
    first = np.array([np.flatnonzero(corpus.speaker == who)[0] for who in range(6)])
    more = np.setdiff1d(np.arange(len(corpus)), first)
    task = speaker_task(corpus, first, more)
    tested, trained = (
        set(corpus.speaker[side].tolist())
        for side in (task.split.test, task.split.train)
    )
    assert tested == trained and len(tested) == 5 == len(task.names)
    assert min(map(len, task.split)) > 0  # without validation, no finite loss
    assert "1 of 6 speakers have no frame to train on" in capsys.readouterr().out
    second = np.sort(np.append(first, first[:3] + 1))
    rest = np.setdiff1d(np.arange(len(corpus)), second)
    for seed in range(5):  # with one to spare, all speakers stay
        task = speaker_task(corpus, second, rest, seed)
        assert len(task.names) == 6
        assert set(corpus.speaker[task.split.train]) == set(range(6))


def test_a_speaker_of_silence_shorter_than_a_frame_is_left_out(corpus, capsys):
    """An utterance of 100 samples has no frame of 25 ms."""
    lengths = corpus.lengths.copy()
    lengths[corpus.speaker == 2] = 100
    short = replace(corpus, lengths=lengths)
    task = speaker_task(short, *halve_each_speaker(short, np.arange(len(short))))
    assert 2 not in corpus.speaker[task.split.test]
    assert "1 of 6 speakers have no frame" in capsys.readouterr().out


def test_utterances_shorter_than_a_window_do_not_supervise(corpus, demo):
    """A negative start would read a neighbour's audio under wrong labels."""
    train, test = halve_each_speaker(corpus, np.arange(len(corpus)))
    task = phone_task(corpus, demo / "phones.txt", train, test)
    window = int(np.sort(corpus.lengths[task.split.train])[5]) // 160 * 160 + 160
    config = make_config("demo", {**SMALL, "data.window": window})
    read = []

    place = supervised.Windows.locate

    def watch(self, *step):
        utterance, start = place(self, *step)
        read.append((start.min(), (self.corpus.lengths[utterance] - start).min()))
        return utterance, start

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(supervised.Windows, "locate", watch)
        supervise(config, corpus, task, 12)
    assert read and all(start >= 0 and left >= window for start, left in read)
    longest = make_config("demo", {**SMALL, "data.window": 160_000 * 3})
    with pytest.raises(CorpusError, match="none of [0-9]+ utterances is as long as"):
        supervise(longest, corpus, task, 2)


def test_supervision_is_the_same_for_a_seed(corpus, demo, device):
    train, test = halve_each_speaker(corpus, np.arange(len(corpus)))
    task = phone_task(corpus, demo / "phones.txt", train, test)
    config = make_config("demo", {**SMALL, "launch.precision": "fp32"})
    one, same = (
        supervise(config, corpus, task, 3, device).head.weight for _ in range(2)
    )
    torch.testing.assert_close(
        one, same, rtol=0, atol=0 if device.type == "cpu" else 1e-3
    )


@pytest.mark.parametrize("n", [4, 300])
def test_names_of_classes_are_drawn_as_they_are(n, tmp_path):
    """`$` starts no formula, long names are cut, and of hundreds some are shown."""
    names = ["$", "$x_^$", "\\frac{", "a" * 200]
    names = names + [f"class {index}" for index in range(n - 4)]
    truth = np.arange(n).repeat(2)
    for figure in (
        plot_confusion(truth, truth, names),
        plot_recall(truth, {"one": truth, "other": truth[::-1]}, names),
    ):
        figure.savefig(tmp_path / "figure.png")
        written = [label.get_text() for label in figure.axes[0].get_xticklabels()]
        assert len(written) <= 60 and max(map(len, written)) <= 16
        assert "$" in written and (n > 4 or "$x_^$" in written)


def test_labels_in_the_papers_form(trained, demo, tmp_path):
    """41 unnamed classes for half of the utterances; no row for absent supervision."""
    lines = (demo / "phones.txt").read_text().splitlines()
    (tmp_path / "converted_aligned_phones.txt").write_text(
        "".join(f"{line} 40\n" for line in lines[::2])
    )
    metrics = evaluate(
        shutil.copytree(trained, tmp_path / "run"),
        labels=str(tmp_path / "converted_aligned_phones.txt"),
        protocols=["phone_frame"],
        supervised=0,
    )
    assert set(metrics["phone_frame"]) == {
        *("cpc", "encoder", "mfcc", "random", "deviation")
    }
    assert metrics["probes"]["phone_frame"]["labels"] == dict(
        matched=18, cut=18, wrong_length=0, unknown=0, missing=18
    )


def test_an_evaluation_is_fixed_by_its_seed(trained, tmp_path):
    one, same = (
        evaluate(
            shutil.copytree(trained, tmp_path / name),
            protocols=["phone_frame"],
            supervised=2,
        )["phone_frame"]
        for name in "ab"
    )
    assert one == same


def test_a_planted_leak_is_caught(demo, tmp_path):
    """A test speaker's utterance is also there under a training speaker's name."""
    root = shutil.copytree(demo, tmp_path / "leaky")
    config = make_config("demo", SMALL)
    corpus = pack(root)
    test = split(corpus, config.data).test
    told = next(index for index in range(len(corpus)) if index not in test)
    secret, copy = (
        corpus.ids[test[0]],
        f"{corpus.speakers[corpus.speaker[told]]}-1-0099",
    )
    [source] = root.rglob(f"{secret}.flac")
    shutil.copy(
        source, next(root.rglob(f"{corpus.ids[told]}.flac")).with_name(f"{copy}.flac")
    )
    [line] = [
        line
        for line in (root / "phones.txt").read_text().splitlines()
        if line.startswith(secret)
    ]
    with open(root / "phones.txt", "a") as file:
        file.write(line.replace(secret, copy) + "\n")
    train(
        options(
            {
                "data": str(root),
                "run_dir": str(tmp_path / "run"),
                "max_steps": 2,
                "batch_size": 8,
                "n_gpus": 0,
                "precision": "fp32",
                "overrides": SMALL,
            }
        )
    )
    done = script(
        "cpc_evaluate", "--run_dir", tmp_path / "run", "--protocols", "phone_frame"
    )
    assert done.code == 0, done.output
    assert f"1 of {len(test)} utterances were heard in training" in done.output


def test_a_phone_that_is_never_trained_on_is_named(trained, demo, tmp_path, capsys):
    corpus = pack(demo)
    test = {
        corpus.ids[index]
        for index in split(corpus, make_config("demo", SMALL).data).test
    }
    ZH = str(PHONE_CLASSES.index("ZH"))
    lines = [line.split() for line in (demo / "phones.txt").read_text().splitlines()]
    (tmp_path / "phone_classes.txt").write_text("\n".join(PHONE_CLASSES))
    (tmp_path / "labels.txt").write_text(
        "".join(
            " ".join(
                [
                    name,
                    *(
                        ZH if name in test and number < 5 else "0" if one == ZH else one
                        for number, one in enumerate(row)
                    ),
                ]
            )
            + "\n"
            for name, *row in lines
        )
    )
    evaluate(
        shutil.copytree(trained, tmp_path / "run"),
        labels=str(tmp_path / "labels.txt"),
        protocols=["phone_frame"],
        supervised=0,
    )
    assert re.search(
        r"^(?:[A-Z]+, )*ZH(?:, [A-Z]+)*: tested and never trained on, "
        r"\d\.\d\d% of the test frames",
        capsys.readouterr().out,
        re.MULTILINE,
    )


def broken(lines):
    return {
        "empty": "",
        "binary": bytes(range(256)),
        "half-written": "\n".join(lines)[:-200],
        "twice": "\n".join([*lines, lines[0]]) + "\n",
        "another corpus": "19-1-0000 1 2 3\n",
        "another length": "".join(line[:-60] + "\n" for line in lines),
        "words": lines[0] + " SIL\n",
        "out of range": lines[0] + " 41\n",
        "one side": "".join(line + "\n" for line in lines[:1]),
    }


@pytest.mark.parametrize(
    "name, message",
    [
        ("empty", "is empty; make it again"),
        ("binary", "is not text"),
        ("half-written", "the file ends .*; it was cut short"),
        ("twice", "is labelled twice"),
        ("another corpus", "matches no utterance of six"),
        (
            "another length",
            r"matches no utterance of six \(0 unknown ids, 36 of another length\)",
        ),
        ("words", "are not all integers"),
        ("out of range", "41 is above 39, the last that phone_classes.txt"),
        (
            "one side",
            "has none of the [0-9]+ (training|test) utterances; "
            "give one that covers the corpus",
        ),
    ],
)
def test_labels_that_cannot_be(name, message, trained, demo, tmp_path, monkeypatch):
    content = broken((demo / "phones.txt").read_text().splitlines())[name]
    shutil.copy(demo / "phone_classes.txt", tmp_path)
    (tmp_path / "labels.txt").write_bytes(
        content if isinstance(content, bytes) else content.encode()
    )

    def work(*_, **__):
        raise AssertionError("work before the labels were looked at")

    monkeypatch.setattr("cpc_nb.evaluation.window_features", work)
    with pytest.raises(SystemExit) as exit:
        main(options({"run_dir": str(trained), "labels": str(tmp_path / "labels.txt")}))
    assert re.match(f"cpc_evaluate: .*{message}", str(exit.value)) and "\n" not in str(
        exit.value
    )
