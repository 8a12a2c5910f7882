"""The parts that CONTRIBUTING.md shows, written as it says and trained from outside."""

import importlib
import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import BIN, ROOT, write_corpus

from cpc_nb.config import ConfigError, make_config
from cpc_nb.features import encode_batch
from cpc_nb.model import CPC
from cpc_nb.negatives import n_candidates

PARTS = {
    "encoder.kind": "my_parts:GatedEncoder",
    "context.kind": "my_parts:CausalConvolution",
    "context.init_memory_frames": 0,
    "loss.candidates": "my_parts:NotAdjacent",
    "loss.same_window_negatives": 0,
}
SMALL = {
    "encoder.channels": [16],
    "context.size": 16,
    "data.group_size": 4,
    "train.batch_size": 4,
    "train.max_steps": 6,
    "train.valid_windows": 4,
    "launch.n_gpus": 0,
}


@pytest.fixture(scope="module")
def my_parts(tmp_path_factory):
    """`my_parts.py` with all the code of CONTRIBUTING.md, where Python finds it."""
    folder = tmp_path_factory.mktemp("own")
    shown = (ROOT / "CONTRIBUTING.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", shown, re.M | re.S)
    for block in blocks:
        assert len([line for line in block.splitlines() if line]) <= 20, block
    (folder / "my_parts.py").write_text("\n".join(blocks))
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(str(folder))
        yield folder


@pytest.fixture(scope="module")
def trained(my_parts, tmp_path_factory):
    """A run that a process of its own trained with all three parts."""
    folder = tmp_path_factory.mktemp("run")
    speech = write_corpus(folder / "speech", speakers=8, utterances=6)
    config = make_config("samples", PARTS | SMALL | {"data.source": str(speech)})
    config.save(folder / "asked.json")
    command = (
        "from cpc_nb.config import Config; from cpc_nb.trainer import train\n"
        f"train(Config.load({str(folder / 'asked.json')!r}), {str(folder / 'run')!r})"
    )
    done = subprocess.run(
        [BIN / "python", "-c", command],
        env=os.environ | {"PYTHONPATH": f"{my_parts}:{ROOT}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "run"


def test_own_parts_are_trained_saved_and_loaded(trained):
    model = CPC.from_pretrained(trained / "model")
    assert type(model.encoder).__name__ == "GatedEncoder"
    assert type(model.context).__name__ == "CausalConvolution"


def test_own_parts_encode_in_chunks_and_batches(trained):
    model = CPC.from_pretrained(trained / "model")
    wave = 0.05 * torch.randn(50_000)
    whole, chunks = model.encode(wave), model.encode(wave, chunk_s=0.5)
    assert whole.context.shape == (312, 16)
    assert torch.allclose(whole.context, chunks.context, atol=1e-5)
    together, _ = encode_batch(model, [wave, wave[:30_000]], precision="fp32")
    assert torch.allclose(together.context, whole.context, atol=1e-5)


def test_own_negatives_leave_out_the_neighbours_of_the_positive(my_parts):
    parts = importlib.import_module("my_parts")
    config = make_config("samples", PARTS | SMALL)
    z = torch.zeros(1, 10, 4, 16)
    scores = torch.zeros(1, 40 - 8, 40)
    negatives = parts.NotAdjacent(z, None, config.loss)
    negatives.mask_positives(scores, slice(0, 1), slice(0, 32), 2)
    for position in range(32):
        masked = scores[0, position].isinf().nonzero().flatten().tolist()
        positive = position + 8
        neighbours = {positive - 4, positive, positive + 4}
        assert masked == sorted(one for one in neighbours if one < 40)
    assert n_candidates(config) == 4 * 128


def test_an_own_probe(trained, my_parts):
    probe = importlib.import_module("my_parts").nearest_speaker
    assert 0 <= probe(trained) <= 1


def test_a_part_that_is_missing_is_named(trained, my_parts, monkeypatch):
    monkeypatch.setattr(sys, "path", [one for one in sys.path if one != str(my_parts)])
    monkeypatch.delitem(sys.modules, "my_parts", raising=False)
    with pytest.raises(ConfigError, match="my_parts:GatedEncoder cannot be imported"):
        CPC.from_pretrained(trained / "model")


@pytest.mark.parametrize("field", ["encoder.kind", "context.kind", "loss.candidates"])
@pytest.mark.parametrize("name", ["grru", "a b:C", "module:", ":Class", 3, True])
def test_a_name_that_is_no_part_is_refused(field, name):
    with pytest.raises(ConfigError, match=field):
        make_config("samples", {field: name})
