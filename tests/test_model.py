"""The model as others use it: exported, loaded, given odd waveforms, trained upon."""

import json

import numpy as np
import pytest
import soundfile
import torch
from pydantic import BaseModel
from safetensors.torch import load_file, save_file

from cpc_nb.config import ConfigError, ContextConfig, EncoderConfig, make_config
from cpc_nb.model import CPC
from cpc_nb.pretrained import least_samples
from cpc_nb.waveform import as_waveform

SMALL_MODEL = {"encoder.channels": [24], "context.size": 16}


def small(preset="demo", kind=CPC, **changes):
    torch.manual_seed(0)
    config = make_config(preset, SMALL_MODEL | changes)
    return kind(config.encoder, config.context)


@pytest.fixture
def folder(tmp_path):
    small().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


# --------------------------------------------------------------------------------------
# Features to train upon


def test_a_head_learns_on_frozen_features(device):
    model = small().to(device)
    z, c = model.encode(0.05 * torch.randn(8_000))
    assert not z.requires_grad and z.device.type == device.type
    head = torch.nn.Linear(model.context.size, 3).to(device)
    head(c).square().mean().backward()
    assert head.weight.grad.abs().sum() > 0


def test_encoding_leaves_each_module_in_its_mode():
    model = small(**{"encoder.norm": "batch"}).train()
    model.encoder.eval()
    model.encode(torch.randn(8_000))
    assert model.training and model.context.training and not model.encoder.training
    with pytest.raises(ValueError, match="NaN"):
        model.encode(torch.full((8_000,), torch.nan))
    assert model.training and model.context.training and not model.encoder.training


def test_a_context_is_in_single_precision_under_autocast(device):
    model = small().to(device)
    wave = torch.randn(8_000)
    with torch.autocast(device.type, torch.bfloat16):
        z, c = model.encode(wave)
    assert z.dtype == c.dtype == torch.float32
    torch.testing.assert_close(c, model.context(z[None])[0][0])


# --------------------------------------------------------------------------------------
# Other programs


@pytest.mark.parametrize("preset", ["demo", "samples", "minimal", "paper"])
def test_a_traced_model_computes_what_the_model_does(preset, device):
    model = small(preset).to(device).eval()
    wave, other = 0.05 * torch.randn(2, 2, 1, 20_480, device=device)
    with torch.no_grad():
        traced = torch.jit.trace(model, wave)
        for found, expected in zip(traced(other), model(other)):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        operations = [str(node.kind()) for node in traced.inlined_graph.nodes()]
    convolutions = sum(isinstance(part, torch.nn.Conv1d) for part in model.modules())
    found = sum("convolution" in kind or "conv2d" in kind for kind in operations)
    assert found == convolutions > 0
    assert not any("PythonOp" in kind for kind in operations)


@pytest.mark.parametrize("preset", ["demo", "minimal"])
def test_an_exported_model_computes_what_the_model_does(preset, device):
    model = small(preset).to(device).eval()
    wave, other = 0.05 * torch.randn(2, 2, 1, 20_480, device=device)
    with torch.no_grad():
        exported = torch.export.export(model, (wave,)).module()
        for found, expected in zip(exported(other), model(other)):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_compiled_model_computes_what_the_model_does(device):
    """Convolutions in pairs included, where the device has them."""
    model = small("paper").to(device)
    wave = 0.05 * torch.randn(2, 1, 20_480, device=device)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")

    def answer(network):
        model.zero_grad()
        z, c = network(wave)
        (z.square().sum() + c.sum()).backward()
        return z, c, *(p.grad.clone() for p in model.parameters())

    for found, expected in zip(answer(compiled), answer(model)):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


# --------------------------------------------------------------------------------------
# Loading


def change(folder, edit):
    path = folder / "model.safetensors"
    weights = load_file(path)
    edit(weights)
    save_file(weights, path)


def rename_all(weights):
    for name in list(weights):
        weights[f"module.{name}"] = weights.pop(name)


def add_a_layer(weights):
    weights["context.attention.weight"] = torch.zeros(3)


def cut_a_bias(weights):
    weights["encoder.layers.1.conv.bias"] = torch.zeros(7)


def spoil(weights):
    weights["context.rnn.weight_hh_l0"][3, 4] = torch.nan


@pytest.mark.parametrize(
    "edit, culprit",
    [
        (lambda weights: weights.pop("context.rnn.bias_hh_l0"), "context.rnn.bias_hh"),
        (rename_all, "encoder.layers.1.conv.weight"),
        (add_a_layer, "context.attention.weight"),
        (cut_a_bias, "encoder.layers.1.conv.bias"),
        (spoil, "context.rnn.weight_hh_l0 holds NaN"),
    ],
    ids=["missing", "renamed", "another network", "misshapen", "NaN"],
)
def test_weights_that_are_not_the_models_are_refused(folder, edit, culprit):
    CPC.from_pretrained(folder)
    change(folder, edit)
    with pytest.raises(ConfigError, match=culprit):
        CPC.from_pretrained(folder)


@pytest.mark.parametrize(
    "text",
    ["{", "[1]", "null", "{}", '{"encoder": 3, "context": {}}', "\udcff"],
)
def test_a_configuration_that_is_none_is_refused(folder, text):
    (folder / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ConfigError, match="config.json|cannot be loaded"):
        CPC.from_pretrained(folder)


@pytest.mark.parametrize("part", ["config.json", "model.safetensors"])
def test_a_folder_without_a_model_is_refused(folder, part):
    (folder / part).unlink()
    with pytest.raises(ConfigError, match=f"holds no model, as {part} is missing"):
        CPC.from_pretrained(folder)


@pytest.mark.parametrize("name", ["x" * 5_000, "/no/such/folder", "a/b/c", "\0", ""])
def test_what_cannot_be_a_model_is_refused_without_the_hub(name, monkeypatch):
    monkeypatch.setattr("huggingface_hub.model_info", lambda *_, **__: pytest.fail())
    with pytest.raises(ConfigError) as caught:
        CPC.from_pretrained(name)
    assert len(str(caught.value)) < 400


def test_a_hub_out_of_reach_is_asked_once(monkeypatch):
    asked = []

    def model_info(name, timeout, token):
        asked.append(timeout)
        raise ConnectionError("no route")

    monkeypatch.setattr("huggingface_hub.model_info", model_info)
    with pytest.raises(ConfigError, match="hub has none or is out of reach"):
        CPC.from_pretrained("somebody/no-such-model")
    assert asked == [5]


class Named(CPC):
    pass


class Width(BaseModel):
    units: int = 3


WIDTH = Width()


class WithHead(
    CPC, coders={Width: (lambda width: width.model_dump(), lambda d: Width(**d))}
):
    """Its own coder, and no annotations of what it hands on."""

    def __init__(self, encoder=EncoderConfig(), context=ContextConfig(), **own):
        super().__init__(encoder, context)


class WithWidth(WithHead):
    def __init__(
        self,
        encoder=EncoderConfig(),
        context=ContextConfig(),
        width: Width = WIDTH,
    ):
        super().__init__(encoder, context)
        self.head = torch.nn.Linear(self.context.size, width.units)


def test_a_subclass_is_saved_with_its_configuration(tmp_path):
    model = small(kind=Named)
    model.save_pretrained(tmp_path)
    parts = json.loads((tmp_path / "config.json").read_text())
    assert parts["encoder"]["channels"] == [24] and parts["context"]["size"] == 16
    again = Named.from_pretrained(tmp_path)
    wave = torch.randn(8_000)
    assert torch.equal(again.encode(wave).context, model.encode(wave).context)


def test_a_subclass_with_settings_of_its_own_is_loaded(tmp_path):
    """Annotated or not, and with a coder beside those of CPC."""
    own = EncoderConfig(channels=(24,)), ContextConfig(size=16)
    model = WithWidth(*own, width=Width(units=7))
    model.save_pretrained(tmp_path)
    again = WithWidth.from_pretrained(tmp_path)
    assert again.encoder.config == own[0] and again.head.out_features == 7
    assert all(map(torch.equal, again.parameters(), model.parameters()))


def test_a_model_is_found_where_the_user_means(tmp_path, monkeypatch):
    small().save_pretrained(tmp_path / "model")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert CPC.from_pretrained("~/model").encoder.size == small().encoder.size


# --------------------------------------------------------------------------------------
# Waveforms


@pytest.mark.parametrize(
    "wave",
    [
        torch.randn(16, 20_480),
        np.zeros((9, 20_480), np.float32),
        [np.zeros(20_480), np.zeros(20_480)],
        [torch.zeros(20_480)] * 2,
        [[0.0] * 20_480] * 2,
        torch.zeros(20_480, 2),
        torch.zeros(1, 1, 20_480),
        [],
        ["a"],
        "speech.wav",
        None,
        np.zeros(20_480, np.int32),
    ],
    ids=lambda wave: type(wave).__name__,
)
def test_what_is_not_one_waveform_is_refused(wave):
    with pytest.raises(ValueError):
        small().encode(wave)


@pytest.mark.parametrize(
    "waves, lengths, message",
    [
        ([np.zeros(8_000), np.full(8_000, np.nan)], None, "waveform 1: .* NaN"),
        ([np.zeros(8_000), "no.wav"], None, "waveform 1: no.wav cannot be read"),
        ([np.zeros(8_000), np.zeros(10)], None, "waveform 1: .* give at least"),
        (np.array([np.zeros(9), None], object), None, "waveform 0: .* at least"),
        ([0.0, 0.1], None, "waveform 0: .*not of shape"),
        (np.zeros(8_000), None, "one waveform .N,. goes to `encode`"),
        (np.zeros((2, 2, 2, 8_000)), None, "a batch is"),
        ("speech.wav", None, "a single one goes to `encode`"),
        ([np.zeros(8_000)], [8_000], "lengths belong to a padded batch"),
        (np.zeros((2, 8_000)), [8_000], "lengths: give 2 whole numbers"),
        (np.zeros((2, 8_000)), [8_000, 8_001], "lengths: .* 1 to 8,000"),
        (np.zeros((2, 8_000)), [8_000, 0], "lengths"),
        (np.zeros((2, 8_000)), [8_000, 7.5], "lengths"),
    ],
)
def test_a_batch_says_which_waveform_is_none(waves, lengths, message):
    with pytest.raises(ValueError, match=message):
        small().encode_batch(waves, lengths)


def test_the_models_forward_says_who_takes_arrays():
    with pytest.raises(ValueError, match="`encode` takes arrays"):
        small()(np.zeros((1, 1, 8_000), np.float32))


@pytest.mark.parametrize(
    "changes",
    [{}, {"encoder.standardise": "waveform"}, {"encoder.norm": "batch"}],
    ids=str,
)
@pytest.mark.parametrize("preset", ["demo", "minimal", "samples"])
def test_a_batch_of_any_form_gives_what_each_waveform_gives(preset, changes, device):
    model = small(preset, **changes).to(device)
    random = np.random.default_rng(0)
    lengths = [8_000, 1_000, 12_345]
    waves = [random.normal(0, 0.1, n).astype(np.float32) for n in lengths]
    integers = [np.rint(wave * 32768).astype(np.int16) for wave in waves]
    padded = np.full((3, max(lengths)), 0.3, np.float32)
    for row, wave in zip(padded, waves):
        row[: len(wave)] = wave
    for batch, of, more in (
        (waves, waves, {}),
        (tuple(map(torch.from_numpy, integers)), integers, {}),
        (padded, waves, {"lengths": lengths}),
        (torch.tensor(padded)[:, None], waves, {"lengths": torch.tensor(lengths)}),
        (
            np.stack([padded, -padded / 2], 1),
            [w / 4 for w in waves],
            {"lengths": lengths},
        ),
        ([waves[1]], waves[1:2], {}),
    ):
        found = model.encode_batch(batch, **more)
        alone = [model.encode(wave) for wave in of]
        torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-5)
    assert model.encode_batch([]) == []


def test_files_are_encoded_at_their_own_rate(mixed):
    model = small()
    paths = sorted(path for path in mixed.rglob("*.*"))
    together = model.encode_batch([str(path) for path in paths])
    assert len(paths) == 6
    for path, found in zip(paths, together):
        wave, rate = soundfile.read(path, dtype="float32")
        alone = model.encode(wave.T, rate)
        torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model.encode(path), alone)


@pytest.mark.parametrize("preset", ["demo", "minimal"])
def test_gradients_in_chunks_and_in_a_batch_are_those_of_the_model(preset, device):
    model = small(preset).to(device)
    wave = 0.1 * torch.randn(8_000)

    def gradients(context):
        model.zero_grad()
        context.square().mean().backward()
        return [p.grad.clone() for p in model.parameters()]

    _, c = model.train()(wave[None, None].to(device))
    expected = gradients(c[0])
    model.eval()
    batch = model.encode_batch([wave, wave[:3_000]], grad=True)
    for features in (model.encode(wave, chunk_s=0.11, grad=True), batch[0]):
        for one, other in zip(gradients(features.context), expected):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)
    assert not any(part.training for part in model.modules())
    with torch.no_grad():
        assert model.encode(wave, grad=True).encoder.requires_grad
    asked = wave.clone().requires_grad_()
    model.encode(asked, 8_000, grad=True).context.sum().backward()
    assert asked.grad.any()


def test_a_list_of_numbers_is_a_waveform():
    wave = (0.1 * torch.randn(4_000)).tolist()
    model = small()
    assert torch.equal(
        model.encode(wave).context, model.encode(torch.tensor(wave)).context
    )


@pytest.mark.parametrize(
    "rate", [0, -16_000, 1, 3_999, 384_001, 1e12, float("nan"), 16_000.5, "16000", None]
)
def test_rates_that_cannot_be_are_refused(rate):
    with pytest.raises(ValueError, match="4,000 to 384,000"):
        as_waveform(torch.zeros(16_000), rate)


@pytest.mark.parametrize("rate", [44_099, 8_001, 383_999, 15_999, 44_100, 22_050.0])
def test_odd_rates_are_resampled_within_little_memory(rate):
    n = int(rate)
    wave = torch.sin(2 * torch.pi * 440 * torch.arange(n) / n)
    found = as_waveform(wave, rate)
    expected = torch.sin(2 * torch.pi * 440 * torch.arange(16_000) / 16_000)
    assert abs(len(found) - 16_000) <= 4
    inner = slice(200, 4_000)  # an inexact ratio drifts, by one part in 4,000 at most
    assert (found[inner] - expected[inner]).abs().max() < 0.5


@pytest.mark.parametrize("preset", ["demo", "minimal"])
def test_a_waveform_shorter_than_a_frame_is_said_so(preset, device):
    model = small(preset).to(device)
    least = least_samples(model.encoder.config)
    assert least == (160 if preset == "demo" else 465)
    for short in (torch.zeros(1, 1, least - 1), torch.zeros(1, 1, 0)):
        with pytest.raises(ValueError, match=f"at least {least}"):
            model(short.to(device))
    with pytest.raises(ValueError, match=f"at least {least}"):
        model.encode(torch.zeros(least - 1))
    assert len(model.encode(torch.zeros(least)).context) == 1
    assert model(torch.zeros(1, 1, least, device=device))[0].shape == (1, 1, 24)


@pytest.mark.parametrize("shape", [(20_480,), (2, 20_480), (2, 2, 20_480)])
def test_audio_of_another_shape_is_said_so(shape):
    with pytest.raises(ValueError, match=r"audio is \(B, 1, N\)"):
        small()(torch.zeros(shape))


@pytest.mark.parametrize("chunk_s", [0, -1, float("nan")])
def test_chunks_that_cannot_be_are_refused(chunk_s):
    with pytest.raises(ValueError, match="chunk_s"):
        small().encode(torch.zeros(8_000), chunk_s=chunk_s)
