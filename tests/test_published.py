"""Checkpoints that others published: what they compute, and what is refused.

The networks here restate the published ones from their descriptions, layer by layer,
in plain `torch.nn`; only the names of their tensors have to be the original ones."""

import argparse
import json
import os
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run, voice
from safetensors.torch import save_file
from torch import nn

from cpc_nb.config import Config, ConfigError, EncoderConfig, make_config
from cpc_nb.features import encode_batch
from cpc_nb.model import CPC
from cpc_nb.pretrained import least_samples
from cpc_nb.published import import_published

C, H = 6, 5
LAYERS = ((10, 5), (8, 4), (4, 2), (4, 2), (4, 2))  # kernel, stride
SPEECH = torch.from_numpy(voice(1, 2, 3.1)).float()
LENGTHS = 465, 20_480, 20_481, len(SPEECH)


class FrameNorm(nn.Module):
    """Each frame over its channels, by the variance of n - 1."""

    def __init__(self, n):
        super().__init__()
        self.weight = nn.Parameter(0.5 + torch.rand(1, n, 1))
        self.bias = nn.Parameter(0.2 * torch.randn(1, n, 1))

    def forward(self, x):
        mean, variance = x.mean(1, keepdim=True), x.var(1, keepdim=True)
        return (x - mean) / (variance + 1e-5).sqrt() * self.weight + self.bias


class Padded(nn.Module):
    """The networks of CPC_audio and of CPC-big, with the names of either."""

    def __init__(self, encoder, norm, context, rnn, kind=nn.LSTM, n=1, make=FrameNorm):
        super().__init__()
        layers, ar = nn.Module(), nn.Module()
        for i, ((kernel, stride), zeros) in enumerate(zip(LAYERS, (3, 2, 1, 1, 1))):
            conv = nn.Conv1d(C if i else 1, C, kernel, stride, zeros)
            layers.add_module(f"conv{i}", conv)
            layers.add_module(f"{norm}{i}", make(C))
        ar.add_module(rnn, kind(C, H, n, batch_first=True))
        self.add_module(encoder, layers)
        self.add_module(context, ar)

    def forward(self, x):
        (encoder, context) = self.children()
        steps = list(encoder.children())
        for conv, norm in zip(steps[::2], steps[1::2]):
            x = norm(conv(x)).relu()
        (rnn,) = context.children()
        return x.mT, rnn(x.mT)[0]


class Minimal(nn.Module):
    """The network of CPCLibriSpeech: no padding, no norm, and its step predictors."""

    def __init__(self):
        super().__init__()
        steps = [nn.Conv1d(C if i else 1, C, *layer) for i, layer in enumerate(LAYERS)]
        self.encoder = nn.Sequential(*(x for s in steps for x in (s, nn.ReLU())))
        self.recurrent = nn.LSTM(C, H, batch_first=True)
        self.InfoNCE = nn.Module()
        step = nn.ModuleDict({"transform": nn.Linear(C, H)})
        self.InfoNCE.InfoNCE = nn.ModuleList([step])

    def forward(self, x):
        z = self.encoder(x).mT
        return z, self.recurrent(z)[0]


def audio(**options) -> Padded:
    """A network as CPC_audio's."""
    torch.manual_seed(0)
    return Padded("gEncoder", "batchNorm", "gAR", "baseNet", **options)


def big(n=2) -> Padded:
    """A network as bshall's."""
    torch.manual_seed(0)
    return Padded("encoder", "norm", "context", "lstm", n=n)


def minimal() -> Minimal:
    torch.manual_seed(0)
    return Minimal()


def save_audio(network, path: Path, **arguments):
    """As CPC_audio's training does: more than the network, arguments beside it."""
    optimizer = torch.optim.Adam(network.parameters())
    content = {"gEncoder": network.state_dict(), "optimizer": optimizer.state_dict()}
    content |= {"cpcCriterion": {"w": torch.ones(3)}, "best": network.state_dict()}
    torch.save(content, path)
    told = {"hiddenEncoder": C, "hiddenGar": H, "arMode": "LSTM", **arguments}
    path.with_name("checkpoint_args.json").write_text(json.dumps(told))


def save_hub(network, path: Path, kind=dict, **arguments):
    """As the file of CPC_audio's hub: weights and configuration in one, in the format
    of 2019."""
    content = {"config": kind(**arguments), "weights": network.state_dict()}
    torch.save(content, path, _use_new_zipfile_serialization=False)
    path.with_name("checkpoint_args.json").write_text("{")  # of another file


def relative(one, other) -> float:
    assert one.shape == other.shape, (one.shape, other.shape)
    return float((one - other).abs().max() / other.abs().max())


def assert_same(model: CPC, network: nn.Module):
    """`encode`, whole and in chunks, and a batch, against the published network."""
    network.eval()
    waves = [SPEECH[:n] for n in LENGTHS]
    with torch.no_grad():
        expected = [network(wave[None, None]) for wave in waves]
    together = encode_batch(model, waves, "fp32")
    for wave, (z, c), of_batch in zip(waves, expected, together):
        in_chunks = model.encode(wave, chunk_s=0.31)
        for found in (model.encode(wave), in_chunks, of_batch):
            assert z.std() > 1e-3 and c.std() > 1e-3
            assert relative(found.encoder, z[0]) < 1e-5
            assert relative(found.context, c[0]) < 1e-5


def cpc_import(*arguments):
    return run(sys.executable, "-m", "cpc_nb.published", *arguments)


@pytest.mark.parametrize(
    "network, save, says",
    [
        (audio(), save_audio, ("CPC_audio", "LSTM, layers 1", "the step predictors")),
        (big(), lambda net, path: torch.save(net.state_dict(), path), ("2, size 5",)),
        (
            minimal(),
            lambda net, path: torch.save(net.state_dict(), path),
            ("CPCLibriSpeech", "norm none", "InfoNCE.* (the step predictors)"),
        ),
    ],
    ids=["CPC_audio", "CPC-big", "CPCLibriSpeech"],
)
def test_the_command_imports_each_family(network, save, says, tmp_path):
    save(network, tmp_path / "weights.pt")
    done = cpc_import(tmp_path / "weights.pt", "--out", tmp_path / "new" / "model")
    assert done.code == 0 and str(tmp_path / "new" / "model") in done.last
    left = [p for name, p in network.named_parameters() if "InfoNCE" not in name]
    n_parameters = sum(p.numel() for p in left)
    for text in (*says, f"parameters: {n_parameters:,}"):
        assert text in done.output, done.output
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["model"]
    assert_same(CPC.from_pretrained(tmp_path / "new" / "model"), network)
    card = (tmp_path / "new" / "model" / "README.md").read_text()
    assert "license: other" in card and "weights.pt" in card


def batch_normalised() -> Padded:
    """A network whose running statistics are those of some speech."""
    network = audio(make=nn.BatchNorm1d)
    for begin in range(0, 40_000, 10_000):
        network(SPEECH[None, None, begin : begin + 10_000])
    return network


GRU = {"arMode": "GRU", "nLevelsGRU": 2}
VARIANTS = {
    "hub, GRU": (audio(kind=nn.GRU, n=2), save_hub, GRU),
    "hub, namespace": (audio(), save_hub, {"kind": argparse.Namespace}),
    "hub, NumPy": (audio(), save_hub, {"hiddenGar": np.int64(H), "lr": np.float64(1)}),
    "sequential": (audio(), save_audio, {"samplingType": "sequential"}),
    "batch norm": (batch_normalised(), save_audio, {"normMode": "batchNorm"}),
    "batch norm, untold": (batch_normalised(), save_audio, {}),
    "no norm": (audio(make=lambda n: nn.Identity()), save_audio, {"normMode": "ID"}),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_of_cpc_audio(name, tmp_path):
    network, save, options = VARIANTS[name]
    save(network, tmp_path / "checkpoint_7.pt", **options)
    found = import_published(tmp_path / "checkpoint_7.pt", tmp_path / "model")
    assert_same(found.model, network)
    assert any("begins anew" in note for note in found.notes) == (name == "sequential")


def test_weights_come_in_other_wrappings(tmp_path):
    network, names = big(), ("parallel", "half", "safe.safetensors")
    state = network.state_dict()
    torch.save({f"module.{n}": values for n, values in state.items()}, tmp_path / "a")
    torch.save({n: values.double() for n, values in state.items()}, tmp_path / "b")
    save_file(state, tmp_path / "c.safetensors")
    for name in ("a", "b", "c.safetensors"):
        assert_same(
            import_published(tmp_path / name, tmp_path / f"{name}m").model, network
        )
    alone = audio()
    torch.save({"weights": alone.state_dict()}, tmp_path / names[0])
    found = import_published(tmp_path / names[0], tmp_path / "alone")
    assert_same(found.model, alone)
    assert any("no checkpoint_args.json" in note for note in found.notes)


def damaged(change, network=None):
    """How to save a network after `change` of its tensors."""

    def save(path: Path):
        state = (network or big()).state_dict()
        change(state)
        torch.save(state, path)

    return save


def told(network=None, **arguments):
    """How to save a network as CPC_audio does, with these arguments."""
    return lambda path: save_audio(network or audio(), path, **arguments)


def drop(*names):
    return lambda state: [state.pop(name) for name in names]


def put(**tensors):
    """Replace tensors; a name has `__` for each dot."""
    return lambda state: state.update(
        {name.replace("__", "."): values for name, values in tensors.items()}
    )


def all_at_once(state):
    drop("encoder.conv1.bias", "context.lstm.weight_hh_l1")(state)
    put(encoder__conv2__bias=torch.ones(7), encoder__conv9__bias=torch.ones(C))(state)


def with_context(path: Path, context: nn.Module):
    """CPC_audio's file without arguments, and another context network in it."""
    network = audio()
    network.gAR = context
    torch.save({"gEncoder": network.state_dict()}, path)


class MovingFile:
    """Pickled, it is code: whoever loads it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def cut(path: Path):
    torch.save(big().state_dict(), path)
    path.write_bytes(path.read_bytes()[:-2_000])


ALL = (
    "missing: encoder.conv1.bias, context.lstm.weight_hh_l1",
    "extra: encoder.conv9.bias",
    "wrong: encoder.conv2.bias is 7, not 6",
)
BROKEN = {
    "all at once": (damaged(all_at_once), ALL),
    "a kernel": (
        damaged(put(encoder__conv0__weight=torch.ones(C, 1, 9))),
        ("wrong: encoder.conv0.weight is 6×1×9, not 6×1×10",),
    ),
    "rows": (
        damaged(put(context__lstm__weight_hh_l0=torch.ones(4 * H, H + 1)), big(1)),
        ("wrong: context.lstm.weight_hh_l0 is 20×6, not 20×5",),
    ),
    "odd rows": (
        damaged(put(recurrent__bias_hh_l0=torch.ones(21)), minimal()),
        ("wrong: recurrent.bias_hh_l0 is 21, not 20",),
    ),
    "a scalar": (
        damaged(put(encoder__norm3__bias=torch.tensor(1.0))),
        ("encoder.norm3.bias is one number, not 1×6×1",),
    ),
    "no channels": (
        lambda path: torch.save(
            {n: v[..., :0] for n, v in big().state_dict().items()}, path
        ),
        ("context.lstm.weight_hh_l0 is empty",),
    ),
    "a list of norms": (told(normMode=["ID"], arMode="GRU"), ("arMode = GRU",)),
    "no tensor": (damaged(put(encoder__norm3__bias="b")), ("norm3.bias is no tensor",)),
    "NaN": (
        damaged(put(encoder__conv0__bias=torch.full((C,), torch.nan))),
        ("encoder.conv0.bias has NaN",),
    ),
    "integers": (
        damaged(put(encoder__conv0__bias=torch.ones(C, dtype=torch.int32))),
        ("encoder.conv0.bias is of torch.int32",),
    ),
    "no norm": (
        damaged(drop(*(f"encoder.norm{i}.weight" for i in range(5)))),
        ("missing: encoder.norm0.weight, encoder.norm1.weight",),
    ),
    "no context": (
        damaged(lambda state: [state.pop(n) for n in list(state) if "lstm" in n]),
        ("missing: context.lstm.weight_ih_l0",),
    ),
    "no layers": (damaged(drop("encoder.0.weight"), minimal()), ("encoder.0.weight",)),
    "nothing": (lambda path: torch.save({}, path), ("nothing", "no model of")),
    "ours": (
        lambda path: torch.save(CPC().state_dict(), path),
        ("encoder.layers.0.conv.weight", "no model of"),
    ),
    "a list": (lambda path: torch.save([torch.ones(3)], path), ("holds list",)),
    "nested": (lambda path: torch.save({"weights": 3}, path), ("weights holds no",)),
    "arguments": (
        lambda path: torch.save({"weights": {}, "config": [1]}, path),
        ("its arguments are no mapping",),
    ),
    "text": (lambda path: path.write_text("weights"), ("no file of torch.save",)),
    "empty": (lambda path: path.write_bytes(b""), ("no file of torch.save",)),
    "cut off": (cut, ("is cut off",)),
    "a folder": (lambda path: path.mkdir(), ("cannot be read",)),
    "not there": (lambda path: None, ("cannot be read: No such file",)),
    "safetensors": (
        lambda path: path.with_suffix(".safetensors").write_bytes(b"\xff" * 40),
        ("is cut off",),
    ),
    "other arguments": (told(hiddenGar=256), ("hiddenGar = 256, its tensors 5",)),
    "another kind": (told(arMode="GRU"), ("arMode = GRU, its tensors LSTM",)),
    "no JSON": (
        lambda path: [
            told()(path),
            path.with_name("checkpoint_args.json").write_text("{"),
        ],
        ("checkpoint_args.json cannot be read",),
    ),
    "transformer": (told(arMode="transformer"), ("a transformer (arMode =",)),
    "untold transformer": (
        lambda path: with_context(path, nn.Sequential(nn.Linear(C, C))),
        ("a transformer (gAR.0.weight)",),
    ),
    "both ways": (
        lambda path: with_context(
            path, nn.ModuleDict({"baseNet": nn.LSTM(C, H, bidirectional=True)})
        ),
        ("reads both ways (gAR.baseNet.weight_ih_l0_reverse)",),
    ),
    "RNN": (
        lambda path: with_context(path, nn.ModuleDict({"baseNet": nn.RNN(C, H)})),
        ("plain RNN",),
    ),
    "no_ar": (told(arMode="no_ar"), ("no context network (arMode = no_ar)",)),
    "reverse": (told(cpc_mode="reverse"), ("backwards in time (cpc_mode",)),
    "instance norm": (
        told(audio(make=lambda n: nn.InstanceNorm1d(n, affine=True))),
        ("over a whole recording (gEncoder.batchNorm0.weight)",),
    ),
    "MFCC": (told(encoder_type="mfcc"), ("MFCC (encoder_type = mfcc)",)),
    "several": (
        lambda path: torch.save(
            {"gEncoder": {"models.0.gEncoder": torch.ones(3)}}, path
        ),
        ("several models in one (models.0.gEncoder)",),
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_told_and_nothing_is_written(name, tmp_path):
    save, says = BROKEN[name]
    path = tmp_path / "weights.pt"
    save(path)
    path = next(tmp_path.glob("*.safetensors"), path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConfigError) as caught:
        import_published(path, tmp_path / "model")
    for text in says:
        assert text in str(caught.value), caught.value
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("as_zip", [True, False, None])
def test_code_in_a_file_does_not_run(as_zip, tmp_path):
    content, trap = {"encoder.0.weight": MovingFile(tmp_path / "trap")}, tmp_path / "x"
    if as_zip is None:
        trap.write_bytes(pickle.dumps(content, 2))
    else:
        torch.save(content, trap, _use_new_zipfile_serialization=as_zip)
    done = cpc_import(trap, "--out", tmp_path / "model")
    assert done.code == 1 and "Traceback" not in done.output
    assert done.last.startswith("cpc_import: ") and "posix.mkdir" in done.last
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    torch.load(trap, weights_only=False) if as_zip else pickle.loads(
        pickle.dumps(content)
    )
    assert (tmp_path / "trap").is_dir()  # it would have run


def test_what_is_there_is_not_overwritten(tmp_path):
    torch.save(big().state_dict(), tmp_path / "weights.pt")
    (tmp_path / "model").mkdir()
    import_published(tmp_path / "weights.pt", tmp_path / "model")  # it was empty
    for out in ("model", "weights.pt"):
        with pytest.raises(ConfigError, match="exists and is not empty"):
            import_published(tmp_path / "weights.pt", tmp_path / out)
    with pytest.raises(ConfigError, match="/proc/model cannot be written"):
        import_published(tmp_path / "weights.pt", "/proc/model")
    assert {path.name for path in tmp_path.iterdir()} == {"model", "weights.pt"}


@pytest.mark.parametrize(
    "padding",
    [
        [[9, 0], [0, 7], [1, 2], [0, 0], [3, 0]],
        [[0, 9], [7, 0], [0, 3], [3, 0], [0, 3]],
        [[3, 3], [2, 2], [1, 1], [1, 1], [1, 1]],
    ],
)
@pytest.mark.parametrize("norm", ["channel_unbiased", "none"])
def test_any_padding_gives_the_same_frames_whole_in_chunks_and_in_a_batch(
    padding, norm
):
    config = EncoderConfig(channels=(C,), padding=padding, norm=norm)
    torch.manual_seed(0)
    model = CPC(config).eval()
    least = least_samples(config)
    assert config.n_frames(least) == 1 and config.n_frames(least - 1) == 0
    waves = [SPEECH[:n] for n in (least, least + 1, 799, 800, 801, 5_000, 16_001)]
    for wave, of_batch in zip(waves, encode_batch(model, waves, "fp32")):
        x = 20 * wave[None, None]
        for layer, zeros in zip(model.encoder.layers, padding):
            x = layer.conv(nn.functional.pad(x, zeros))
            if norm != "none":
                mean, variance = x.mean(1, keepdim=True), x.var(1, keepdim=True)
                x = (x - mean) / (variance + 1e-5).sqrt()
            x = x.relu()
        assert config.n_frames(len(wave)) == x.shape[2]
        for found in (model.encode(wave), model.encode(wave, chunk_s=0.01), of_batch):
            torch.testing.assert_close(found.encoder, x[0].T, atol=1e-5, rtol=1e-4)


def test_geometry_knows_of_the_padding():
    torch.manual_seed(0)
    padding = [[9, 0], [0, 7], [1, 2], [0, 0], [3, 0]]
    config = EncoderConfig(channels=(16,), padding=padding, activation="gelu")
    model = CPC(config)
    wave = SPEECH[None, None, :20_480].clone().requires_grad_()
    model.frames(wave)[0, 64].sum().backward()
    seen = wave.grad[0, 0].nonzero().ravel().double()
    hop, width, centre = model.encoder.geometry
    assert (hop, width) == (160, 465) and len(seen) == width
    assert seen.mean() == 64 * hop + centre


@pytest.mark.parametrize(
    "padding, says",
    [
        ([[3, 3]], "1 pairs of padding for 5 layers"),
        ([3, 3, 3, 3, 3], "true, false, or samples [left, right] for each layer"),
        ([[3, 3], [2, 2], [1, 1], [1, 1], [1, -1]], "true, false, or samples"),
        ([[3, 3], [2, 2], [1, 1], [1, 1], [1, True]], "true, false, or samples"),
        ([[3, 3], [2, 2], [1, 1], [1, 1], [1, 1.5]], "true, false, or samples"),
        ([True] * 5, "true, false, or samples"),
        ([], "true, false, or samples"),
        ("same", "true, false, or samples"),
        (1, "true, false, or samples"),
        ([[3, 3], [4, 4], [1, 1], [1, 1], [1, 1]], "4 + 4 is not smaller than its ker"),
    ],
)
def test_an_impossible_padding_is_told(padding, says):
    with pytest.raises(ConfigError, match="encoder") as caught:
        make_config("paper", {"encoder.padding": padding})
    assert says in str(caught.value)


def test_configurations_with_and_without_paddings_are_read_back(tmp_path):
    old = json.loads(make_config("paper").model_dump_json())
    assert old["encoder"]["padding"] is True  # as it was written before
    pairs = [[3, 3], [2, 2], [1, 1], [1, 1], [1, 1]]
    for padding in (True, False, pairs):
        config = make_config("paper", {"encoder.padding": padding})
        config.save(tmp_path / "config.json")
        assert Config.load(tmp_path / "config.json") == config
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["encoder"]["padding"] == pairs


def test_a_variance_of_one_channel_and_a_padded_spectrogram_are_refused():
    for fields, says in (
        ({"encoder.norm": "channel_unbiased", "encoder.channels": [1]}, "2 channels"),
        ({"encoder.kind": "mel", "encoder.kernels": [400, 3]}, "padding=True"),
    ):
        fields["encoder.padding"] = [[3, 3]] + [[1, 1]] * 4
        if "encoder.kernels" in fields:
            fields |= {
                "encoder.strides": [160, 1],
                "encoder.padding": [[120, 120], [1, 1]],
            }
        with pytest.raises(ConfigError, match=says):
            make_config("paper", fields)
