"""The parts that CONTRIBUTING.md shows, written as it says and trained from outside."""

import importlib
import json
import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import BIN, ROOT, write_corpus

from cpc_nb.checkpoint import CPCWithLoss, RunFolder
from cpc_nb.config import ConfigError, make_config
from cpc_nb.evaluate import evaluate
from cpc_nb.features import encode_batch
from cpc_nb.model import CPC
from cpc_nb.negatives import n_candidates
from cpc_nb.report import ROWS, percent, terminal_table
from cpc_nb.trainer import train

PARTS = {
    "encoder.kind": "my_parts:GatedEncoder",
    "context.kind": "my_parts:CausalConvolution",
    "context.options": {"width": 16},
    "context.init_memory_frames": 0,
    "loss.predictor": "my_parts:Perceptron",
    "loss.candidates": "my_parts:NotAdjacent",
    "loss.same_window_negatives": 0,
    "augment.kind": "my_parts:Overdriven",
    "train.loggers": ["tensorboard", "my_parts:TextLogger"],
}
SMALL = {
    "encoder.channels": [16],
    "context.size": 16,
    "data.group_size": 4,
    "train.batch_size": 8,
    "train.max_steps": 6,
    "train.valid_windows": 4,
    "train.log_every": 2,
    "launch.n_gpus": 0,
}
TWO = {"launch.n_procs": 2}


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
    """A run that two processes, started from outside, trained with all parts."""
    folder = tmp_path_factory.mktemp("run")
    speech = write_corpus(folder / "speech", speakers=8, utterances=6)
    config = make_config("samples", PARTS | SMALL | TWO | {"data.source": str(speech)})
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
    assert model.context.past == 15
    weights = RunFolder(trained).load().criterion.state_dict()
    assert {"predictors.0.0.weight", "predictors.0.2.bias"} <= set(weights)


def test_an_own_logger_got_the_numbers_of_metrics_jsonl(trained):
    told = [line.split() for line in (trained / "numbers.txt").open()]
    losses = [(int(step), float(x)) for step, name, x in told if name == "loss"]
    lines = RunFolder(trained).metrics()
    assert losses == [(line["step"], line["loss"]) for line in lines]
    assert told[0][:2] == ["0", "chance"] and [*trained.glob("tensorboard/*")]


def test_the_run_keeps_the_source_of_its_parts(trained, my_parts):
    kept = (trained / "parts" / "my_parts.py").read_text()
    assert kept == (my_parts / "my_parts.py").read_text()
    assert [*(trained / "parts").iterdir()] == [trained / "parts" / "my_parts.py"]


def test_an_own_distortion_is_the_same_whatever_the_share_of_a_process(my_parts):
    objective = CPCWithLoss(make_config("samples", PARTS | SMALL))
    audio = 0.05 * torch.randn(8, 1, 4000)
    whole = objective.distorted(0, 3, audio)
    second = objective.distorted(0, 3, audio[4:], first_group=1)
    assert torch.equal(whole[4:], second)
    loudest = whole.abs().amax(-1) / audio.abs().amax(-1)
    assert 0.09 < loudest.min() and loudest.max() < 1 and loudest.std() > 0.01


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


def test_an_own_protocol_stands_in_results_table_and_report(trained, my_parts):
    protocols = ["my_parts:nearest_speaker"]
    metrics = evaluate(trained, protocols=protocols, supervised=0, n_gpus=0)
    found = metrics["my_parts:nearest_speaker"]
    assert set(found) == {*ROWS, "deviation"}
    assert all(0 <= found[kind] <= 1 for kind in ROWS)
    saved = json.loads((trained / "evaluation" / "metrics.json").read_text())
    assert saved == metrics
    cell = percent((found["context"], found["deviation"]["context"]))
    assert any(
        "nearest speaker" in line and cell in line for line in terminal_table(metrics)
    )
    page = (trained / "evaluation" / "report.html").read_text()
    assert "<th>nearest speaker</th>" in page and f"<td>{cell}</td>" in page


def test_a_part_that_is_missing_is_named(trained, my_parts, monkeypatch):
    monkeypatch.setattr(sys, "path", [one for one in sys.path if one != str(my_parts)])
    monkeypatch.delitem(sys.modules, "my_parts", raising=False)
    missing = "my_parts:GatedEncoder cannot be imported.*No module named 'my_parts'.*"
    with pytest.raises(ConfigError, match=missing + "start with PYTHONPATH=FOLDER"):
        CPC.from_pretrained(trained / "model")
    kept = f"PYTHONPATH={trained / 'parts'}"
    with pytest.raises(ConfigError, match=missing + re.escape(kept)):
        evaluate(trained, n_gpus=0)
    with pytest.raises(ConfigError, match=missing):
        train(RunFolder(trained).config(), trained)


def test_a_resumed_run_has_the_parts_and_options_it_began_with(trained, my_parts):
    config = RunFolder(trained).config()
    fields = {"data.source": config.data.source, "context.options": {"width": 8}}
    other = make_config("samples", PARTS | SMALL | fields)
    with pytest.raises(ConfigError, match="context.options.width is 8 now and was 16"):
        train(other, trained)


KINDS = ["encoder.kind", "context.kind", "loss.candidates", "loss.predictor"]


@pytest.mark.parametrize("field", [*KINDS, "augment.kind"])
@pytest.mark.parametrize("name", ["grru", "a b:C", "module:", ":Class", 3, True])
def test_a_name_that_is_no_part_is_refused(field, name):
    with pytest.raises(ConfigError, match=field):
        make_config("samples", {field: name})
