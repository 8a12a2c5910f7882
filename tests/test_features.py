"""Features computed in batches equal those of each window or utterance alone."""

import weakref

import numpy as np
import pytest
import torch

import cpc_nb.features
from cpc_nb.config import ConfigError, make_config
from cpc_nb.corpus import pack
from cpc_nb.features import (
    Frames,
    encode_batch,
    extract,
    extract_mfcc,
    main,
    mfcc,
    non_overlapping_windows,
    window_features,
    window_mfcc,
)
from cpc_nb.labels import kaldi_frame_count
from cpc_nb.model import CPC

WINDOW = 4_000
SMALL_MODEL = {"encoder.channels": [24], "context.size": 16}


@pytest.fixture(scope="module")
def corpus(speech):
    return pack(str(speech))


@pytest.fixture
def model(device):
    torch.manual_seed(0)
    config = make_config("demo", SMALL_MODEL)
    return CPC(config.encoder, config.context).to(device)


def wave_of(corpus, utterance, start=0, n=None):
    samples = corpus.utterance(utterance)[start : n and start + n]
    return torch.from_numpy(samples / np.float32(32768))


def test_windows_have_the_last_frame_and_the_summary_of_each_alone(corpus, model):
    utterance, start = non_overlapping_windows(corpus, np.arange(5, 25), WINDOW)
    found = window_features(model, corpus, utterance, start, WINDOW)
    assert set(found) == {
        name + end for name in ("context", "encoder") for end in ("", "_summary")
    }
    for row in range(0, len(utterance), 17):
        alone = model.encode(wave_of(corpus, utterance[row], start[row], WINDOW))
        for name in ("context", "encoder"):
            values = getattr(alone, name).cpu().numpy()
            summary = np.concatenate([values.mean(0), values.std(0)])
            close = dict(rtol=1e-3, atol=1e-4)
            np.testing.assert_allclose(found[name][row], values[-1], **close)
            np.testing.assert_allclose(found[f"{name}_summary"][row], summary, **close)


def test_mfcc_of_windows_are_those_of_each_alone(corpus):
    utterance, start = non_overlapping_windows(corpus, np.arange(5, 25), WINDOW)
    found = window_mfcc(corpus, utterance, start, WINDOW)
    for row in range(0, len(utterance), 17):
        alone = mfcc(wave_of(corpus, utterance[row], start[row], WINDOW)).numpy()
        summary = np.concatenate([alone.mean(0), alone.std(0)])
        np.testing.assert_allclose(found["mfcc"][row], alone[-1], atol=1e-3)
        np.testing.assert_allclose(found["mfcc_summary"][row], summary, atol=1e-3)


def test_mfcc_of_a_quiet_waveform_do_not_depend_on_a_loud_one_beside_it():
    torch.manual_seed(0)
    waves = torch.randn(3, 2, WINDOW) * torch.tensor([1.0, 1e-4, 1e-7])[:, None, None]
    together = mfcc(waves)
    assert together.shape == (3, 2, kaldi_frame_count(WINDOW), 39)
    for one, wave in zip(together.flatten(0, 1), waves.flatten(0, 1)):
        torch.testing.assert_close(one, mfcc(wave))


def test_frames_of_earlier_windows_are_not_kept(corpus, monkeypatch):
    utterance, start = non_overlapping_windows(corpus, np.arange(len(corpus)), WINDOW)
    heard, alive = [], []

    def hear_and_watch(*arguments):
        alive.append(sum(reference() is not None for reference in heard))
        features = encode_batch(*arguments)
        heard.extend(weakref.ref(z.untyped_storage()) for z, _ in features)
        return features

    monkeypatch.setattr("cpc_nb.features.encode_batch", hear_and_watch)
    monkeypatch.setitem(cpc_nb.features.AT_ONCE_S, "cpu", 5)
    config = make_config("demo", SMALL_MODEL)
    window_features(
        CPC(config.encoder, config.context), corpus, utterance, start, WINDOW
    )
    assert len(alive) > 5 and max(alive) <= 20, alive


def test_only_what_is_asked_for_is_written(corpus, model, tmp_path):
    frames = Frames(np.array([5, 2]), kaldi_frame_count(corpus.lengths[[5, 2]]))
    both = extract(model, corpus, frames, tmp_path, "both")
    found = extract(model, corpus, frames, tmp_path, "one", kinds=("context",))
    assert list(found) == ["context"]
    assert not (tmp_path / "one_encoder.npy").exists()
    assert np.array_equal(found["context"], both["context"])


@pytest.mark.parametrize("what", ["features", "MFCC"])
def test_a_disk_too_small_for_features_is_said_before_work(
    corpus, what, disk, monkeypatch
):
    """By an error, not by a SIGBUS, which would end this process."""
    folder = disk(200)
    frames = Frames(np.arange(20), kaldi_frame_count(corpus.lengths[:20]))
    monkeypatch.setattr("cpc_nb.features.heard", lambda *_: pytest.fail("work began"))
    config = make_config("demo", SMALL_MODEL | {"context.size": 256})
    with pytest.raises(ConfigError, match=rf"{folder}.* [\d,]+ bytes"):
        if what == "MFCC":
            extract_mfcc(corpus, frames, folder)
        else:
            extract(CPC(config.encoder, config.context), corpus, frames, folder)


def test_one_waveform_is_heard_in_the_precision_asked_for(model):
    wave = 0.05 * torch.randn(WINDOW)
    exact, rounded = (encode_batch(model, [wave], how)[0] for how in ("fp32", "bf16"))
    together = encode_batch(model, [wave, wave], "bf16")[0]
    assert not torch.equal(exact.encoder, rounded.encoder)
    torch.testing.assert_close(rounded.encoder, together.encoder, rtol=0.02, atol=0.02)
    assert rounded.context.dtype == torch.float32


@pytest.mark.parametrize("n", [1, 3])
def test_hearing_leaves_modes_and_gives_features_to_train_upon(model, n):
    model.train()
    model.encoder.eval()
    features = encode_batch(model, [0.05 * torch.randn(WINDOW)] * n)[0]
    assert model.training and model.context.training and not model.encoder.training
    head = torch.nn.Linear(features.context.shape[-1], 2).to(features.context.device)
    head(features.context).sum().backward()
    assert head.weight.grad is not None


@pytest.mark.parametrize(
    "given, message",
    [
        ({"model": "x" * 5_000}, "neither a folder nor a name"),
        ({"model": "/no/such/folder"}, "neither a folder nor a name"),
        ({"precision": "fp64"}, "precision"),
        ({"n_gpus": 99}, "n_gpus = 99"),
    ],
)
def test_cpc_features_says_what_is_wrong(given, message, tmp_path, capsys):
    options = {"model": str(tmp_path), "data": "demo", "out": str(tmp_path)} | given
    arguments = [part for name in options for part in (f"--{name}", str(options[name]))]
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert message in str(caught.value) and len(str(caught.value)) < 500
