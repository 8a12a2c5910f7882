"""Streams of speech: pieces of any size give what the whole utterance gives."""

import numpy as np
import pytest
import torch
from conftest import RATE, voice
from torch import nn

from cpc_nb.config import ConfigError, make_config
from cpc_nb.model import CPC
from cpc_nb.stream import Streamer, certain_frames, lookahead_samples

SMALL = {"encoder.channels": [24], "context.size": 16}
MODELS = {
    "spectrogram": ("demo", {}),
    "spectrogram, 20 ms": (
        "demo",
        {"encoder.kernels": [400, 3, 4, 3], "encoder.strides": [160, 1, 2, 1]},
    ),
    "padded": ("samples", {}),
    "padded, batch norm, gelu": (
        "samples",
        {"encoder.norm": "batch", "encoder.activation": "gelu", "context.layers": 2},
    ),
    "padded, skip": ("paper", {"context.skip": True}),
    "not padded, LSTM": ("minimal", {}),
    "not padded, LSTM, skip": ("minimal", {"context.skip": True, "context.layers": 2}),
    "kernels as wide as strides": (
        "samples",
        {"encoder.kernels": [5, 4, 2, 2, 2]},
    ),
}
every_model = pytest.mark.parametrize("name", MODELS)


def make(name, device="cpu"):
    torch.manual_seed(0)
    preset, changes = MODELS[name]
    config = make_config(preset, SMALL | changes)
    model = CPC(config.encoder, config.context)
    for buffer_name, buffer in model.named_buffers():
        if buffer_name.endswith("running_mean"):
            buffer.uniform_(-0.1, 0.1)
    return model.to(device)


def cut(wave, sizes):
    """`wave` (…, N) in pieces of random sizes, each one of `sizes`."""
    random, bounds = np.random.default_rng(0), [0]
    while bounds[-1] < wave.shape[-1]:
        bounds.append(bounds[-1] + int(random.choice(sizes)))
    return [wave[..., a:b] for a, b in zip(bounds, bounds[1:])]


def stream(streamer, pieces):
    found = [*map(streamer.push, pieces), streamer.finish()]
    return [torch.cat(some, -2) for some in zip(*found)]


def assert_same(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        assert (one - other).abs().max() <= 1e-5 * other.abs().max()


WAVE = torch.from_numpy(voice(3, 1, 2.03)).float()


@every_model
def test_pieces_of_any_size_give_the_whole(name, device):
    model = make(name, device)
    whole, streamer = model.encode(WAVE), Streamer(model)
    for sizes in ([320], [1, 7, 0, 160, 1_000, 5_000], [len(WAVE)]):
        assert_same(stream(streamer, cut(WAVE, sizes)), whole)


@every_model
def test_a_frame_comes_as_soon_as_nothing_can_change_it(name):
    """After a sample less, another continuation does change it."""
    model = make(name)
    streamer, t = Streamer(model), 20
    hop = model.encoder.geometry.hop
    n = hop * (t + 1) + streamer.lookahead_samples
    assert certain_frames(model, n) == t + 1 and certain_frames(model, n - 1) == t
    assert streamer.lookahead_ms == 1000 * lookahead_samples(model) / RATE
    assert len(streamer.push(WAVE[: n - 1]).encoder) == t
    assert len(streamer.push(WAVE[n - 1 : n]).encoder) == 1
    z = model.encode(WAVE).encoder
    # a Hann window fades to zero at its end
    seen = n - (80 if model.encoder.config.kind == "mel" else 1)
    for last, same in ((n, True), (seen, False)):
        other = WAVE.clone()
        other[last:] = torch.randn(len(WAVE) - last)
        change = (model.encode(other).encoder[t] - z[t]).abs().max()
        assert (change <= 1e-5 * z.abs().max()) == same


@pytest.mark.parametrize("name", ["spectrogram", "not padded, LSTM, skip"])
def test_streams_side_by_side_are_those_of_each_alone(name, device):
    model = make(name, device)
    waves = torch.stack([WAVE, -WAVE.flip(0), 0 * WAVE])
    streamer = Streamer(model, streams=3)
    z, c = stream(streamer, cut(waves, [320, 500]))
    for one, wave in zip(zip(z, c), waves):
        assert_same(one, model.encode(wave))


def test_an_utterance_after_another_begins_anew():
    model = make("spectrogram")
    streamer = Streamer(model)
    for wave in (WAVE, WAVE[5_000:], WAVE[:100], WAVE):
        found = stream(streamer, cut(wave, [700]))
        n = model.n_frames(len(wave))
        assert [len(one) for one in found] == [n, n]
        if n:
            assert_same(found, model.encode(wave))
    z, c = streamer.finish()
    assert z.shape == (0, 24) and c.shape == (0, 16 + 24)


@pytest.mark.parametrize("name", ["spectrogram", "padded"])
def test_memory_does_not_grow(name):
    streamer = Streamer(make(name))
    width = streamer.model.encoder.geometry.width
    for piece in [torch.randn(n) for n in (50 * RATE, 1, 320, 159, 30 * RATE)]:
        streamer.push(piece)
        held = streamer._memory.samples.untyped_storage().nbytes() // 4
        assert streamer.n_remembered <= held <= width + 320


def test_integers_lists_and_doubles_are_heard_as_in_encode():
    model = make("padded")
    integers = np.rint(WAVE.numpy() * 32767).astype(np.int16)
    whole, streamer = model.encode(integers), Streamer(model)
    for wave in (integers, integers / 32768, torch.from_numpy(integers)):
        assert_same(stream(streamer, cut(wave, [4_000])), whole)
    lists = [piece.tolist() for piece in cut(integers / 32768, [4_000])]
    assert_same(stream(streamer, lists), whole)


@pytest.mark.parametrize(
    "streams, piece, message",
    [
        (None, torch.zeros(2, 320), r"a piece is \(n,\)"),
        (None, 0.0, r"a piece is \(n,\)"),
        (2, torch.zeros(320), r"a piece is \(2, n\)"),
        (2, torch.zeros(3, 320), r"a piece is \(2, n\)"),
        (None, torch.zeros(320, dtype=torch.int32), "float in .* or int16"),
        (None, torch.tensor([0, torch.nan]), "NaN or infinite"),
        (None, torch.tensor([0, torch.inf]), "NaN or infinite"),
    ],
)
def test_a_bad_piece_is_refused_and_the_stream_goes_on(streams, piece, message):
    model = make("padded")
    streamer = Streamer(model, streams)
    wave = WAVE if streams is None else torch.stack([WAVE, WAVE])
    before = streamer.push(wave[..., :5_000])
    with pytest.raises(ValueError, match=message):
        streamer.push(piece)
    after = [streamer.push(wave[..., 5_000:]), streamer.finish()]
    found = [torch.cat(some, -2) for some in zip(before, *after)]
    found = found if streams is None else [one[1] for one in found]
    assert_same(found, model.encode(WAVE))


def test_modes_and_gradients_are_left_alone():
    model = make("padded, batch norm, gelu").train()
    model.context.eval()
    z, c = Streamer(model).push(WAVE)
    assert not z.requires_grad and not c.requires_grad
    assert model.training and model.encoder.training and not model.context.training


class TimeNorm(nn.Module):
    def forward(self, x):
        return x / x.std(1, keepdim=True)


class LooksFurther(nn.Module):
    def forward(self, x):
        return x + x.roll(-3, 1)


class Backwards(nn.Module):
    """Reads the frames of a piece from the last to the first."""

    def __init__(self, context):
        super().__init__()
        self.context, self.size = context, context.size

    def forward(self, z, state=None):
        c, state = self.context(z.flip(1), state)
        return c.flip(1), state


class Forgetful(Backwards):
    """Does not read on from the state that it is given."""

    def forward(self, z, state=None):
        return self.context(z)


@pytest.mark.parametrize("layer", [TimeNorm(), LooksFurther()])
def test_an_encoder_that_sees_more_than_it_says_is_refused(layer):
    model = make("padded")
    model.encoder.layers.append(layer)
    with pytest.raises(ConfigError, match="Encoder cannot stream"):
        Streamer(model)


@pytest.mark.parametrize("kind", [Backwards, Forgetful])
def test_a_context_that_does_not_read_on_is_refused(kind):
    model = make("padded")
    model.context = kind(model.context)
    with pytest.raises(ConfigError, match=f"{kind.__name__} cannot stream"):
        Streamer(model)


def test_an_encoder_without_geometry_is_refused():
    model = make("padded")
    del model.encoder.geometry
    with pytest.raises(ConfigError, match="no `geometry`; inherit from"):
        Streamer(model)


def test_what_needs_the_whole_waveform_is_refused():
    config = make_config("samples", SMALL | {"encoder.standardise": "waveform"})
    with pytest.raises(ConfigError, match="mean and deviation of the whole"):
        Streamer(CPC(config.encoder, config.context))


@pytest.mark.parametrize("streams", [0, -1])
def test_no_streams_are_refused(streams):
    with pytest.raises(ValueError, match="streams = .*: give 1 or more"):
        Streamer(make("padded"), streams)
