"""The exercises of the first notebook: their expected answers, on a small model."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from cpc_nb.demo import record
from cpc_nb.textbook import (
    LAYERS,
    PlainCPC,
    PlainEncoder,
    cpc_losses,
    random_frames,
    train,
)

CHANCE = math.log(32)
SMALL_LAYERS = [(32, *layer[1:]) for layer in LAYERS]


class ShuffledEncoder(PlainEncoder):
    """Frames in random order."""

    def forward(self, wave):
        z = super().forward(wave)
        return z[:, torch.randperm(z.shape[1])]


def own_frames(z, k, n=31):
    """Negatives of each position from its own window alone."""
    B, T, _ = z.shape
    frame = torch.randint(0, T, (B, T - k, n))
    return z[torch.arange(B)[:, None, None], frame]


@pytest.fixture(scope="module")
def windows():
    """(training, test) windows, of other voices."""
    waves = []
    for voice in range(24):
        for sentence in (3, 5):
            samples = record(voice, 8 * voice + sentence).samples
            waves.append(torch.from_numpy(samples / np.float32(samples.std())))
    cut = [wave.unfold(0, 20_480, 4_000)[:, None] for wave in waves]
    return torch.cat(cut[16:]), torch.cat(cut[:16])


@pytest.fixture(scope="module")
def losses_after_training(windows):
    """A function that trains a small model; it returns losses (K,) on test windows."""
    training, test = windows

    def run(encoder=PlainEncoder, steps=(1,), negatives=random_frames):
        torch.manual_seed(0)
        context = nn.GRU(32, 32, batch_first=True)
        model = PlainCPC(encoder(SMALL_LAYERS), context, steps)
        train(model, training, updates=60, draw_negatives=negatives)
        with torch.no_grad():
            return cpc_losses(model, test, negatives)

    return run


@pytest.fixture(scope="module")
def one_step(losses_after_training):
    return losses_after_training()[0]


def test_one_step_alone_is_learned_faster(one_step, losses_after_training):
    beside_others = losses_after_training(steps=range(1, 7))[0]
    assert one_step + 0.2 < beside_others < 0.9 * CHANCE


def test_negatives_of_the_own_window_are_harder(one_step, losses_after_training):
    own = losses_after_training(negatives=own_frames)[0]
    assert one_step + 0.1 < own < 0.9 * CHANCE


def test_time_shuffled_leaves_little_to_learn(losses_after_training):
    shuffled = losses_after_training(encoder=ShuffledEncoder)[0]
    assert 0.9 * CHANCE < shuffled < 1.1 * CHANCE


def test_frames_of_the_own_window_are_of_no_other():
    z = torch.arange(3.0)[:, None, None].expand(3, 20, 2)
    assert (own_frames(z, k=4) == z[:, 4:, None]).all()
