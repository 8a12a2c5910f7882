"""Exported models compute what the model does, for all lengths and in parts."""

import sys

import onnx
import pytest
import torch
from torch import nn

from cpc_nb.config import ConfigError, make_config
from cpc_nb.export import (
    Exportable,
    check_onnx,
    export_onnx,
    export_program,
    main,
    run_onnx,
)
from cpc_nb.model import CPC

SMALL = {"encoder.channels": [16], "context.size": 12}


def small(preset, **changes):
    torch.manual_seed(0)
    config = make_config(preset, SMALL | changes)
    return CPC(config.encoder, config.context)


@pytest.fixture
def folder(tmp_path):
    small("minimal", **{"context.layers": 2}).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_model_becomes_onnx_on_the_command_line(folder, tmp_path, capsys):
    """An LSTM of two layers after convolutions without padding."""
    path = tmp_path / "model.onnx"
    main(["--model", str(folder), "--out", str(path)])
    assert "differs from the model by" in capsys.readouterr().out
    model = CPC.from_pretrained(folder)
    assert check_onnx(model, path) < 1e-4
    graph = onnx.load(path)
    onnx.checker.check_model(graph)
    assert [one.name for one in graph.graph.input] == ["wave", "state", "cell"]
    names = ["encoder", "context", "next_state", "next_cell"]
    assert [one.name for one in graph.graph.output] == names
    facts = {one.key: one.value for one in graph.metadata_props}
    assert facts["cpc_nb.sample_rate_hz"] == "16000"
    assert facts["cpc_nb.hop_samples"] == "160"

    with torch.no_grad():
        model.context.rnn.weight_hh_l1 += 0.1
    assert check_onnx(model, path) > 1e-3


def test_a_context_reads_on_from_the_state_it_returned(tmp_path):
    model = small("demo")
    path = tmp_path / "context.onnx"
    export_onnx(model, path, "context")
    z = torch.randn(2, 50, 16)
    with torch.no_grad():
        expected, last = model.context(z)
    state, found = torch.zeros(1, 2, 12), []
    for piece in (z[:, :1], z[:, 1:30], z[:, 30:]):
        c, state = run_onnx(path, piece, state)
        found.append(c)
    torch.testing.assert_close(torch.cat(found, 1), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state, last, rtol=1e-4, atol=1e-5)


def test_an_encoder_becomes_a_program_for_pytorch(folder, tmp_path):
    """Also where each waveform is scaled by its own deviation."""
    model = small("samples", **{"encoder.standardise": "waveform"})
    model.save_pretrained(folder)
    path = tmp_path / "encoder.pt2"
    main(["--model", str(folder), "--out", str(path), "--part", "encoder"])
    program = torch.export.load(path).module()
    model.eval()
    for B, N in ((1, 500), (3, 20_480)):
        wave = 0.3 * torch.randn(B, N)
        with torch.no_grad():
            expected = model.encoder(wave[:, None])
        torch.testing.assert_close(program(wave), expected, rtol=1e-4, atol=1e-4)


def test_the_model_itself_is_left_as_it_was():
    model = small("samples").train()
    wave = torch.randn(1, 1, 8_000)
    before = model(wave)[1]
    module = Exportable(model)
    assert model.training and all(p.requires_grad for p in model.parameters())
    assert type(model.context.rnn) is nn.GRU and not module.training
    assert torch.equal(model(wave)[1], before)


@pytest.mark.parametrize(
    "given, message",
    [
        ({"part": "decoder"}, "part = 'decoder': give one of model, encoder, context"),
        ({"out": "model.tflite"}, "NAME.onnx or NAME.pt2"),
        ({"out": "/no/such/folder/model.onnx"}, "folder that exists"),
        ({"model": "/no/such/folder"}, "neither a folder nor a name"),
    ],
)
def test_cpc_export_says_what_is_wrong(given, message, folder, tmp_path):
    options = {"model": folder, "out": tmp_path / "model.onnx"} | given
    arguments = [part for name in options for part in (f"--{name}", str(options[name]))]
    with pytest.raises(SystemExit, match=message):
        main(arguments)
    assert not list(tmp_path.glob("*.onnx"))


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_named_before_work(package, folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(
        "cpc_nb.export.export_program", lambda *_: pytest.fail("worked")
    )
    with pytest.raises(SystemExit, match=rf"{package} is not .*cpc_nb\[export\]"):
        main(["--model", str(folder), "--out", str(tmp_path / "model.onnx")])


def test_a_context_of_ones_own_is_refused_and_its_encoder_is_not():
    model = small("samples")
    model.context = nn.Identity()
    with pytest.raises(ConfigError, match="Identity cannot be exported.*'encoder'"):
        export_program(model)
    assert Exportable(model, "encoder")(torch.zeros(1, 8_000)).shape == (1, 50, 16)
