"""The answers to the exercises of 05_evaluate, on a small spoken corpus."""

import tempfile
from pathlib import Path

import numpy as np
import pytest

from cpc_nb.corpus import pack
from cpc_nb.demo import make_demo_corpus
from cpc_nb.features import (
    Frames,
    extract_mfcc,
    non_overlapping_windows,
    window_mfcc,
)
from cpc_nb.labels import load_labels
from cpc_nb.probe import fit_probe, predict, speaker_accuracy, speaker_window


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("spoken") / "corpus"
    return make_demo_corpus(place, n_voices=20, n_sentences=8, progress=False)


@pytest.fixture(scope="module")
def windows(folder):
    """Summaries (W, 78) of the MFCC of all windows, their speakers and utterances."""
    corpus = pack(folder)
    everything = np.arange(len(corpus))
    utterance, start = non_overlapping_windows(corpus, everything, 20_480)
    summary = window_mfcc(corpus, utterance, start, 20_480)["mfcc_summary"]
    return summary, corpus.speaker[utterance], utterance


def test_windows_of_one_utterance_on_both_sides_flatter(windows):
    summary, speaker, utterance = windows
    apart = speaker_accuracy(summary, speaker, utterance, fraction=0.25)["test"]
    leaky = np.arange(len(speaker))
    leak = speaker_accuracy(summary, speaker, leaky, fraction=0.25)["test"]
    assert leak > apart + 0.03


def test_only_the_published_protocol_depends_on_the_scale_of_a_feature(windows):
    summary, speaker, utterance = windows
    scaled = summary.copy()
    scaled[:, 5] *= 1000
    standardised = [
        speaker_accuracy(x, speaker, utterance)["test"] for x in (summary, scaled)
    ]
    published = [
        speaker_window(x, speaker, fraction=0.5)["test"] for x in (summary, scaled)
    ]
    assert standardised[0] == pytest.approx(standardised[1], abs=0.01)
    assert abs(published[0] - published[1]) > 0.02


def test_shuffled_labels_are_guessed_by_the_most_frequent_phone(folder):
    corpus = pack(folder)
    labels = load_labels(folder / "phones.txt", corpus)
    frames = Frames(np.arange(len(corpus)), labels.counts)
    with tempfile.TemporaryDirectory() as place:
        cepstra = np.array(extract_mfcc(corpus, frames, Path(place)), np.float32)
    shuffled = np.random.default_rng(0).permutation(labels.values.astype(np.int64))
    n_test = len(shuffled) // 4
    n_train = len(shuffled) - 2 * n_test
    n_classes = len(labels.names)
    probe = fit_probe(cepstra, shuffled, n_train, n_test, n_classes)
    guesses, truth = predict(probe, cepstra[-n_test:]), shuffled[-n_test:]
    most = np.bincount(shuffled).max() / len(shuffled)
    assert np.bincount(shuffled).argmax() == labels.names.index("SIL")
    assert (guesses == truth).mean() == pytest.approx(most, abs=0.01)
