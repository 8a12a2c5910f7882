"""The phone recogniser: against plain code, on speech made of tones, and bad input."""

import dataclasses
from functools import cache
from itertools import groupby

import numpy as np
import pytest
import torch
from torch import nn

from cpc_nb.config import ConfigError, make_config
from cpc_nb.corpus import Corpus, CorpusError
from cpc_nb.labels import FrameLabels, kaldi_frame_count
from cpc_nb.model import CPC
from cpc_nb.recogniser import (
    PhoneHead,
    Recogniser,
    collapse,
    fine_tune,
    phone_error_rate,
    phones_said,
    train_recogniser,
)

NAMES = ("SIL", "low", "middle", "high")
HZ = (0, 300, 900, 2700)


def tones(rng) -> tuple[np.ndarray, np.ndarray]:
    """1.5 s of tones of 60 to 150 ms: samples (N,) int16, and classes (T,)."""
    n, edge, last = 24_000, 0, 0
    wave, classes = 30 * rng.standard_normal(n), np.zeros(n, int)
    while edge < n:
        length, tone = rng.integers(960, 2400), rng.choice(np.delete(range(4), last))
        part = slice(edge, edge + length)
        seconds = np.arange(n)[part] / 16_000
        wave[part] += 3000 * np.sin(2 * np.pi * HZ[tone] * seconds)
        classes[part], edge, last = tone, edge + length, tone
    centres = 160 * np.arange(kaldi_frame_count(n)) + 200
    return wave.astype(np.int16), classes[centres]


@pytest.fixture(scope="module")
def toy() -> tuple[Corpus, FrameLabels]:
    """Four speakers, who say three phones and silence; 30 utterances, the last without
    labels."""
    rng = np.random.default_rng(0)
    waves, classes = zip(*(tones(rng) for _ in range(30)))
    lengths = np.array([len(wave) for wave in waves])
    corpus = Corpus(
        "tones",
        np.concatenate(waves),
        [f"u{index}" for index in range(30)],
        list("abcd"),
        np.cumsum(lengths) - lengths,
        lengths,
        np.arange(30) % 4,
    )
    counts = np.array([len(some) for some in classes])
    counts[-1] = 0
    values = np.concatenate(classes).astype(np.int16)
    return corpus, FrameLabels(values, np.cumsum(counts) - counts, counts, {}, NAMES)


TRAIN, TEST = np.arange(20), np.arange(20, 29)


@pytest.fixture
def network() -> CPC:
    torch.manual_seed(0)
    config = make_config("demo", {"encoder.channels": [8], "context.size": 8})
    return CPC(config.encoder, config.context)


def test_a_path_is_collapsed_as_by_hand():
    rng = np.random.default_rng(0)
    for _ in range(200):
        path = rng.integers(0, 4, rng.integers(0, 12))
        merged = [one for one, _ in groupby(path.tolist())]
        assert collapse(path, 3).tolist() == [one for one in merged if one != 3]


def distance(one: tuple, other: tuple) -> int:
    """The definition of the edit distance."""

    @cache
    def of(i: int, j: int) -> int:
        if not i or not j:
            return i + j
        replaced = of(i - 1, j - 1) + (one[i - 1] != other[j - 1])
        return min(of(i - 1, j) + 1, of(i, j - 1) + 1, replaced)

    return of(len(one), len(other))


def random_recogniser() -> Recogniser:
    """Whose every phone is a guess."""
    torch.manual_seed(1)
    head = PhoneHead(39, n_phones=3)
    nn.init.normal_(head.conv.weight)
    return Recogniser(None, head, list(NAMES[1:]), "SIL")


def test_errors_are_the_edits_of_each_utterance(toy):
    corpus, labels = toy
    recogniser = random_recogniser()
    errors = phone_error_rate(recogniser, corpus, labels, TEST)
    said = phones_said(corpus, labels, TEST)
    for utterance, edits, phones, spoken in zip(TEST, *errors[2:], said):
        [found] = recogniser.recognise([corpus.utterance(utterance)])
        assert edits == distance(tuple(found), tuple(spoken)) > 0
        assert phones == len(spoken)
    assert errors.rate == errors.edits.sum() / errors.phones.sum()


@pytest.mark.parametrize("hidden", [0, 32])
def test_tones_are_learned_and_known_in_other_utterances(toy, hidden):
    corpus, labels = toy
    untrained = phone_error_rate(random_recogniser(), corpus, labels, TEST)
    how = {"updates": 150, "hidden": hidden}
    one, again = (train_recogniser(None, corpus, labels, TRAIN, **how) for _ in (1, 2))
    assert phone_error_rate(one, corpus, labels, TEST).rate < 0.05 < untrained.rate
    assert torch.equal(one.head.conv.weight, again.head.conv.weight)
    waves = [corpus.utterance(index)[: 16_000 + 800 * index] for index in range(9)]
    alone = [one.recognise([wave])[0] for wave in waves]
    assert one.recognise(waves) == alone


def test_silence_is_left_out_or_recognised(toy):
    corpus, labels = toy
    [without], [with_it] = (
        phones_said(corpus, labels, TEST[:1], silence) for silence in ("SIL", None)
    )
    classes = labels.values[labels.starts[TEST[0]] :][: labels.counts[TEST[0]]]
    assert with_it == [NAMES[one] for one, _ in groupby(classes)]
    assert without == [name for name in with_it if name != "SIL"] != with_it
    kept = train_recogniser(None, corpus, labels, TRAIN[:2], 1, silence=None)
    assert kept.phones == list(NAMES) and kept.silence is None


def test_a_frozen_network_stays_and_a_copy_is_fine_tuned(toy, network):
    corpus, labels = toy
    before = [weights.clone() for weights in network.parameters()]
    frozen = train_recogniser(network, corpus, labels, TRAIN[:8], 5)
    head = frozen.head.conv.weight.clone()
    assert frozen.network is network and head.any()
    tuned, again = (fine_tune(frozen, corpus, labels, TRAIN[:8], 2) for _ in range(2))
    assert all(map(torch.equal, before, network.parameters()))
    assert torch.equal(head, frozen.head.conv.weight)
    for old, new, same in zip(
        before, tuned.network.parameters(), again.network.parameters()
    ):
        assert not torch.equal(old, new) and torch.equal(new, same)
    assert not torch.equal(head, tuned.head.conv.weight)


def test_fine_tuning_recognises_more_than_the_same_updates_of_the_head(toy, network):
    corpus, labels = toy
    some = corpus, labels, TRAIN
    frozen = train_recogniser(network, *some, 30)
    longer = train_recogniser(network, *some, 60)
    tuned = fine_tune(frozen, *some, 30)
    assert phone_error_rate(tuned, *some).rate < phone_error_rate(longer, *some).rate


def crowded(labels: FrameLabels) -> FrameLabels:
    """The first utterance has another phone in each frame."""
    values = labels.values.copy()
    values[: labels.counts[0]] = 1 + np.arange(labels.counts[0]) % 3
    return dataclasses.replace(labels, values=values)


REFUSED = {
    "tones: 1 of 2 utterances have no labels, the first is 'u29'": (
        lambda labels: labels,
        [28, 29],
    ),
    "tones: 0 of 0 utterances have no labels; give those": (lambda labels: labels, []),
    "'u0' has classes 0 to 3, and those with a name are 0 to 2; name them": (
        lambda labels: dataclasses.replace(labels, names=NAMES[:3]),
        [0],
    ),
    r"silence = 'SIL' is no class of these labels \(0, 1, 2, 3\); give the name": (
        lambda labels: dataclasses.replace(labels, names=()),
        [0],
    ),
    "'u0': 148 phones take 148 frames of the head, which has 37; give a smaller": (
        crowded,
        [1, 0],
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_speech_that_cannot_be_learned_from_is_named(toy, message):
    corpus, labels = toy
    change, utterances = REFUSED[message]
    with pytest.raises(CorpusError, match=message):
        train_recogniser(None, corpus, change(labels), utterances, 1)


def test_other_bad_input_is_named(toy, network):
    corpus, labels = toy
    recogniser = random_recogniser()
    with pytest.raises(CorpusError, match="no labels, the first is 'u29'"):
        phone_error_rate(recogniser, corpus, labels, [29])
    with pytest.raises(ConfigError, match="MFCC have no weights to fine-tune"):
        fine_tune(recogniser, corpus, labels, TRAIN)
    recogniser.network = network
    renamed = dataclasses.replace(labels, names=("SIL", "a", "middle", "high"))
    with pytest.raises(CorpusError, match="'u.*': the recogniser knows no phone 'a'"):
        fine_tune(recogniser, corpus, renamed, TRAIN)
    with pytest.raises(ConfigError, match="not finite; train at lower rates"):
        train_recogniser(None, corpus, labels, TRAIN, 3, lr=1e37)
    with pytest.raises(ConfigError, match="stride = 9: give 1 to 8 frames"):
        PhoneHead(1, 3, stride=9)
