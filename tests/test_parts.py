"""Parts of one's own that are wrong are named, and what they need is said, before any
work."""

import importlib.util
import json
import sys

import pytest
import torch
from conftest import ROOT, options, script

from cpc_nb.checkpoint import CPCWithLoss
from cpc_nb.config import ConfigError, make_config, own_parts
from cpc_nb.dry_run import dry_run, require_parts
from cpc_nb.evaluation import find_protocol, read_protocols
from cpc_nb.loggers import Loggers
from cpc_nb.loss import InfoNCE
from cpc_nb.model import CPC, Context
from cpc_nb.trainer import train

WRONG = """
import torch
from torch import nn

from cpc_nb.model import Context, Encoder
from cpc_nb.negatives import PoolNegatives


class RaisingEncoder(Encoder):
    def forward(self, wave):
        raise KeyError("no such key")


class HalfEncoder(Encoder):
    def forward(self, wave):
        return super().forward(wave)[:, ::2]


class NaNEncoder(Encoder):
    def forward(self, wave):
        return super().forward(wave) * float("nan")


class WholeNumbers(Encoder):
    def forward(self, wave):
        return super().forward(wave).round().long()


class NoSize(nn.Module):
    def __init__(self, size_in, config):
        super().__init__()


class NoModule:
    def __init__(self, size_in, config):
        self.size = 16


class NoState(Context):
    def forward(self, z, state=None):
        return super().forward(z)[0]


class Wide(Context):
    def forward(self, z, state=None):
        c, state = super().forward(z, state)
        return torch.cat([c, c], -1), state


class OnceOnly(Context):
    def forward(self, z, state=None):
        if state is not None:
            raise NotImplementedError("reading on")
        return super().forward(z)


class BothWays(nn.Module):
    def __init__(self, size_in, config):
        super().__init__()
        self.size = config.size
        half = config.size // 2
        self.rnn = nn.GRU(size_in, half, bidirectional=True, batch_first=True)

    def forward(self, z, state=None):
        return self.rnn(z, state)


class WidePredictor(nn.Linear):
    def __init__(self, size_in, size_out, more=1):
        super().__init__(size_in, size_out + more)


class RaisingNegatives(PoolNegatives):
    def mask_positives(self, scores, groups, positions, k):
        raise IndexError("out of range")


class OneNumber(PoolNegatives):
    def contrast(self, query, project, k):
        return query.sum()


class PerPosition(PoolNegatives):
    def contrast(self, query, project, k):
        return query.sum(-1), query.new_zeros(())


class Shorter:
    def __call__(self, audio, draws):
        return audio[..., 1:]


class Division:
    def __call__(self, audio, draws):
        return audio / 0


class NotCallable:
    pass


class BrokenLogger:
    def __init__(self, run_dir, config, step):
        pass

    def log(self, values, step):
        raise PermissionError("not logged in")

    def close(self):
        pass


def a_function(config):
    return config


def not_a_share(features, plan):
    return 53.2


def one_argument(features):
    return 0.5
"""
SMALL = {"encoder.channels": [16], "context.size": 16}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """`wrong.py` where Python finds it."""
    (tmp_path / "wrong.py").write_text(WRONG)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("wrong", None)


@pytest.mark.parametrize(
    "field, part, complaint",
    [
        (
            "encoder.kind",
            "RaisingEncoder",
            "raised KeyError: 'no such key' .line 11 of",
        ),
        (
            "encoder.kind",
            "HalfEncoder",
            r"gives z of shape \(2, 64, 16\); \(2, 128, 16\) is expected, .windows",
        ),
        ("encoder.kind", "NaNEncoder", "gives z of which 100% is NaN or infinite"),
        ("encoder.kind", "WholeNumbers", "gives z of torch.int64; floating-point"),
        ("encoder.kind", "a_function", "is a function; a class is expected"),
        ("encoder.kind", "Missing", "cannot be imported: .* no attribute 'Missing'"),
        ("context.kind", "NoSize", "has size = None; the dimension of its output"),
        ("context.kind", "NoModule", "is no torch.nn.Module"),
        (
            "context.kind",
            "NoState",
            "gives Tensor; a pair is expected, c and the state",
        ),
        (
            "context.kind",
            "Wide",
            r"gives c of shape \(2, 128, 32\); \(2, 128, 16\) is expected",
        ),
        ("context.kind", "OnceOnly", "raised NotImplementedError: reading on"),
        (
            "loss.predictor",
            "WidePredictor",
            r"of shape \(1, 128, 2, 17\); \(1, 128, 2, 16\) is expected",
        ),
        ("loss.candidates", "RaisingNegatives", "raised IndexError: out of range"),
        (
            "loss.candidates",
            "OneNumber",
            "gives Tensor; loss and accuracy are expected",
        ),
        (
            "loss.candidates",
            "PerPosition",
            r"gives a loss of shape .*; \(\) is expected",
        ),
        (
            "augment.kind",
            "Shorter",
            r"of shape \(2, 1, 20479\); \(2, 1, 20480\) is exp",
        ),
        ("augment.kind", "Division", "gives audio of which 100% is NaN or infinite"),
        ("augment.kind", "NotCallable", "raised TypeError: .* is not callable"),
    ],
)
def test_a_part_that_is_wrong_is_named_with_what_is_expected(field, part, complaint):
    config = make_config("samples", SMALL | {field: f"wrong:{part}"})
    with pytest.raises(ConfigError, match=f"wrong:{part}.* {complaint}"):
        dry_run(config)


def test_the_same_in_bfloat16():
    config = make_config("samples", SMALL | {"encoder.kind": "wrong:HalfEncoder"})
    with pytest.raises(ConfigError, match="gives z of shape"):
        dry_run(config, precision=torch.bfloat16)


def test_a_context_that_sees_the_future_is_told():
    config = make_config("samples", SMALL | {"context.kind": "wrong:BothWays"})
    with pytest.warns(UserWarning) as told:
        dry_run(config)
    told = " ".join(str(one.message) for one in told)
    assert "sees what it is to predict" in told
    assert "c of a recording read in pieces differs" in told


def test_a_command_refuses_a_wrong_part_before_any_work(folder):
    """Neither the corpus is read, which is empty, nor the run folder made."""
    (folder / "empty").mkdir()
    overrides = SMALL | {"context.kind": "wrong:NoState"}
    asked = {"preset": "samples", "run_dir": folder / "run", "overrides": overrides}
    asked |= {"data": str(folder / "empty"), "n_gpus": 0}
    done = script("cpc_train", *options(asked), PYTHONPATH=f"{folder}:{ROOT}")
    assert done.code == 1 and "Traceback" not in done.output
    assert done.last.startswith(
        "cpc_train: context.kind = 'wrong:NoState' gives Tensor"
    )
    assert not (folder / "run").exists()


def test_many_processes_refuse_it_before_they_are_started(folder):
    two = {"launch.n_gpus": 0, "launch.n_procs": 2, "train.batch_size": 32}
    part = {"context.kind": "wrong:NoState", "data.source": str(folder / "nowhere")}
    with pytest.raises(ConfigError, match="'wrong:NoState' gives Tensor"):
        train(make_config("samples", SMALL | two | part), folder / "run")
    assert not (folder / "run").exists()


def test_options_are_those_of_the_class():
    part = {"loss.predictor": "wrong:WidePredictor"}
    dry_run(
        make_config("samples", SMALL | part | {"loss.predictor_options": {"more": 0}})
    )
    wrong = make_config(
        "samples", SMALL | part | {"loss.predictor_options": {"mor": 0}}
    )
    with pytest.raises(ConfigError, match="WidePredictor.*unexpected keyword.*'mor'"):
        dry_run(wrong)


@pytest.mark.parametrize(
    "overrides, complaint",
    [
        (
            {"encoder.options": {"width": 3}},
            "encoder.options: .* encoder.kind is 'conv'",
        ),
        ({"loss.predictor_options": {"n": 3}}, "loss.predictor is 'linear'"),
        ({"augment.options": {"n": 3}}, "augment.kind is 'none'"),
        ({"encoder.options": [3]}, "encoder.options = .*valid dictionary"),
        ({"train.loggers": ["wanbd"]}, "train.loggers.0 = 'wanbd': .*'wandb'"),
        ({"train.loggers": "wandb"}, "train.loggers = 'wandb'"),
        ({"train.logger_options": {"wandb": {}}}, "loggers has 'tensorboard'"),
    ],
)
def test_settings_that_lead_nowhere_are_refused(overrides, complaint):
    with pytest.raises(ConfigError, match=complaint):
        make_config("samples", SMALL | overrides)


class Local(Context):
    """Given as a class."""


def test_a_class_stands_for_its_name():
    config = make_config("samples", SMALL | {"context.kind": Local})
    assert own_parts(config) == {"context.kind": f"{__name__}:Local"}
    model = CPC(config.encoder, config.context)
    assert type(model.context) is Local
    assert config.model_validate_json(config.model_dump_json()) == config


def test_a_class_of_a_notebook_is_refused_where_there_are_more_processes(
    folder, monkeypatch
):
    monkeypatch.setattr(sys.modules["__main__"], "Local", Local, raising=False)
    named = {
        "train.batch_size": 32,
        "launch.n_gpus": 0,
        "context.kind": "__main__:Local",
        "launch.n_procs": 2,
    }
    config = make_config("samples", SMALL | named)
    require_parts(config)
    with pytest.raises(
        ConfigError, match="known to this process alone.* my_parts:Class"
    ):
        train(config, folder / "run")
    assert not (folder / "run").exists()


SERVICES = ["wandb", "mlflow", "trackio"]


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_that_is_not_installed_is_named(name):
    if importlib.util.find_spec(name):
        pytest.skip(f"{name} is installed")
    config = make_config("samples", SMALL | {"train.loggers": [name]})
    with pytest.raises(
        ConfigError, match=f"{name} is not installed; pip install {name}"
    ):
        dry_run(config)


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_gets_numbers_and_knows_a_resumed_run_again(
    name, folder, monkeypatch
):
    pytest.importorskip(name)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(folder / "trackio"))
    config, known = make_config("samples", {"train.loggers": [name]}), []
    for step in (0, 10):
        loggers = Loggers(folder, config, step, {"chance": 3.0})
        loggers.log({"loss": 2.5, "accuracy/1_ahead": 0.1}, step + 10)
        assert list(loggers.loggers) == [name]
        loggers.close()
        known.append((folder / "loggers.json").read_text())
    assert known[0] == known[1]


def test_a_logger_that_cannot_begin_is_named(folder):
    config = make_config("samples", {"train.loggers": ["wrong:BrokenLogger"]})
    complaint = "wrong:BrokenLogger cannot begin: PermissionError: not logged in"
    with pytest.raises(ConfigError, match=complaint):
        Loggers(folder, config, 0, {"chance": 3.0})
    config = make_config("samples", {"train.loggers": ["wrong:NotCallable"]})
    with pytest.raises(ConfigError, match="wrong:NotCallable has no method 'log'"):
        dry_run(config)


def test_a_protocol_is_a_function_of_features_and_plan():
    assert read_protocols('["speaker", "wrong:not_a_share"]')[1] == "wrong:not_a_share"
    for name in ("wrong:one_argument", "wrong:NotCallable"):
        with pytest.raises(ConfigError, match=f"{name} is no protocol"):
            find_protocol(name)
    with pytest.raises(ConfigError, match="wrong:missing cannot be imported"):
        read_protocols(["wrong:missing"])


def test_the_distortion_is_no_weight():
    """A checkpoint of a run with one loads without it."""
    config = make_config("samples", SMALL | {"augment.kind": "wrong:Division"})
    objective = CPCWithLoss(config)
    assert objective.own_distortion is objective.own_distortion
    plain = CPCWithLoss(make_config("samples", SMALL))
    assert set(objective.state_dict()) == set(plain.state_dict())


def test_a_loop_of_ones_own_with_a_data_loader_trains_as_ours_does():
    """Model and loss by themselves, and both in `CPCWithLoss`: the same weights."""
    config = make_config("samples", SMALL | {"loss.candidates": "all"})
    objective, group = CPCWithLoss(config), config.group_size
    model = CPC(config.encoder, config.context)
    loss = InfoNCE(model.encoder.size, model.context.size, group, config.loss)
    model.load_state_dict(objective.model.state_dict())
    loss.load_state_dict(objective.criterion.state_dict())

    waves = 0.05 * torch.randn(2 * group, 1, 8000)
    optimizer = torch.optim.SGD([*model.parameters(), *loss.parameters()], lr=0.1)
    for audio in torch.utils.data.DataLoader(waves, batch_size=group):
        losses, accuracy = loss(*model(audio))
        optimizer.zero_grad()
        losses.mean().backward()
        optimizer.step()

    optimizer = torch.optim.SGD(objective.parameters(), lr=0.1)
    for audio in waves.split(group):
        optimizer.zero_grad()
        objective(audio)[0].mean().backward()
        optimizer.step()
    ours = [*objective.model.parameters(), *objective.criterion.parameters()]
    for one, other in zip([*model.parameters(), *loss.parameters()], ours, strict=True):
        assert torch.allclose(one, other, atol=1e-6)


def test_the_loop_that_is_shown_has_fewer_than_fifteen_lines():
    cells = json.loads((ROOT / "nbs" / "57_parts.ipynb").read_text())["cells"]
    sources = ["".join(cell["source"]) for cell in cells]
    (loop,) = [source for source in sources if "optimizer.step()" in source]
    lines = [one for one in loop.splitlines() if one and "import" not in one]
    assert "DataLoader" in loop and "InfoNCE" in loop and len(lines) < 15
    written = [source for source in sources if source.startswith("%%writefile")]
    assert len(written) >= 5
    assert all(len(one.splitlines()) - one.count("\n\n") <= 21 for one in written)
