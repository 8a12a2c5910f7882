"""Runs of many processes, and runs that are killed, damaged, stopped or cut off."""

import hashlib
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
import torch
from conftest import (
    BIN,
    ROOT,
    SMALL,
    is_root,
    options,
    papermill,
    papermill_options,
    run,
    script,
    start,
)
from safetensors.torch import load_file

import cpc_nb.launch
from cpc_nb.checkpoint import CPCWithLoss, RunFolder
from cpc_nb.config import ConfigError, LaunchConfig, TrainingError, make_config
from cpc_nb.corpus import pack
from cpc_nb.launch import (
    LAUNCHED,
    fits_beside_a_model,
    init_distributed,
    launch_processes,
    pick_device,
    pick_precision,
    prefetch_audio,
)
from cpc_nb.trainer import TrainingData, train, train_worker

PRESETS = "demo", "minimal", "paper"
DISTORTED = {
    "augment.microphone_db": 6,
    "augment.band_gaps": 1,
    "augment.reverberation": 0.5,
    "augment.noise": 0.5,
    "augment.time_gaps": 1,
}
SHORT = 5_120  # samples per window: the many steps here need not be long
STEPS = 50
LAST = 80  # the step at which a run by command ends


def config_of(preset, speech, **changes):
    """A small run of a preset: four groups of two windows per batch."""
    return make_config(
        preset,
        {
            **SMALL,
            "encoder.channels": [16] if preset == "demo" else [8, 8, 8, 8, 16],
            "context.size": 8,
            "data.source": str(speech),
            "data.window": SHORT,
            "data.group_size": 2,
            "train.batch_size": 8,
            "train.max_steps": STEPS,
            "train.epochs": None,
            "train.lr": 1e-3,
            "train.log_every": 1,
            "train.valid_every": 20,
            "train.checkpoint_every": 25,
            "launch.n_gpus": 0,
            "launch.precision": "fp32",
            **({"loss.same_window_negatives": 4} if preset == "demo" else {}),
            **changes,
        },
    )


def variants(speech) -> dict:
    """Every preset, and options whose result could depend on how a batch is divided.

    These are batch normalisation, distortions, clipping, sampled candidates and early
    stopping."""
    return {
        **{preset: config_of(preset, speech) for preset in PRESETS},
        "batch-norm": config_of(
            "demo", speech, **{"encoder.norm": "batch", "train.max_steps": 10}
        ),
        "distorted": config_of("demo", speech, **DISTORTED, **{"train.max_steps": 10}),
        "sampled": config_of(
            "paper",
            speech,
            **{
                "loss.candidates": "sampled",
                "loss.n_candidates": 16,
                "train.grad_clip": 0.1,
                "train.max_steps": 10,
            },
        ),
        "patience": config_of(
            "demo",
            speech,
            **{
                "train.lr": 1e-30,
                "train.valid_every": 2,
                "train.patience": 2,
                "train.max_steps": 20,
            },
        ),
    }


def several(configs: dict, folder: Path):
    """Train one run after another in the started processes."""
    with init_distributed(configs["demo"].launch):
        for name, config in configs.items():
            train_worker(config, folder / name, quiet=True)


def losses(run_dir: Path) -> list[float]:
    return [
        line[name]
        for line in RunFolder(run_dir).metrics()
        for name in ("loss", "valid_loss")
        if name in line
    ]


@pytest.fixture(scope="module")
def alone(speech, tmp_path_factory):
    """Every variant, trained by one process."""
    folder = tmp_path_factory.mktemp("alone")
    several(variants(speech), folder)
    return folder


@pytest.mark.parametrize("n_processes", [2, 4])
def test_many_processes_train_the_run_of_one(alone, speech, tmp_path, n_processes):
    configs = variants(speech)
    launch_processes(
        several,
        (configs, tmp_path),
        config_of(
            "demo", speech, **{"launch.n_procs": n_processes, "launch.timeout_s": 60}
        ),
        lambda ended: None,
    )
    for name in configs:
        one, many = losses(alone / name), losses(tmp_path / name)
        assert (
            len(one) == len(many) > 0
            and max(abs(a - b) / abs(a) for a, b in zip(one, many)) < 1e-4
        ), name
        first, second = (
            load_file(folder / name / "model" / "model.safetensors")
            for folder in (alone, tmp_path)
        )
        for key in first:
            assert torch.allclose(
                first[key].float(), second[key].float(), atol=1e-3, rtol=1e-3
            ), (name, key)
    assert (
        RunFolder(tmp_path / "patience").metrics()[-1]["step"]
        == RunFolder(alone / "patience").metrics()[-1]["step"]
        < 20
    )


def test_parts_one_after_another_are_the_whole(alone, speech, tmp_path):
    train_worker(
        config_of("paper", speech, **{"launch.accumulate": 4, "train.max_steps": 10}),
        tmp_path / "run",
        quiet=True,
    )
    for a, b in zip(losses(tmp_path / "run"), losses(alone / "paper")[:10]):
        assert abs(a - b) / a < 1e-4


def given(speech, run_dir, **more) -> dict:
    """Parameters of a small run of four groups per batch, as a user gives them."""
    sizes = {
        **SMALL,
        "data.window": SHORT,
        "data.group_size": 2,
        "loss.same_window_negatives": 2,
        "train.checkpoint_every": 4,
        "train.log_every": 4,
        "train.valid_every": 20,
    }
    return {
        "data": str(speech),
        "run_dir": str(run_dir),
        "max_steps": LAST,
        "batch_size": 8,
        "n_gpus": 0,
        "precision": "fp32",
        "overrides": {**sizes, **more.pop("overrides", {})},
        **more,
    }


def wait_for(path: Path, process, seconds=200):
    """Wait until `path` exists; fail if the process ends first."""
    until = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, process.stdout.read()[-3000:]
        assert time.monotonic() < until, f"{path} did not appear"
        time.sleep(0.02)


def offspring(number: int) -> list[int]:
    """The ids of all descendants of a process."""
    children = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            children.setdefault(
                int((entry / "stat").read_text().rpartition(")")[2].split()[1]), []
            ).append(int(entry.name))
        except OSError:
            continue
    found, queue = [], [number]
    while queue:
        queue += (new := children.get(queue.pop(), []))
        found += new
    return found


def workers(process) -> list[int]:
    """The ids of a run's worker processes."""
    return [
        number
        for number in offspring(process.pid)
        if b"spawn_main" in Path(f"/proc/{number}/cmdline").read_bytes()
    ]


def final_weights(run_dir: Path) -> dict:
    return load_file(
        run_dir
        / "checkpoints"
        / RunFolder(run_dir).index["last"]
        / "weights.safetensors"
    )


def same_weights(one: Path, other: Path) -> bool:
    first, second = final_weights(one), final_weights(other)
    return first.keys() == second.keys() and all(
        torch.equal(first[name], second[name]) for name in first
    )


@pytest.fixture(scope="module")
def whole(speech, tmp_path_factory):
    """Undisturbed runs: `1` of one process, `2` of two."""
    folder = tmp_path_factory.mktemp("whole")
    for n in (1, 2):
        done = script("cpc_train", *options(given(speech, folder / str(n), n_procs=n)))
        assert done.code == 0, done.output[-3000:]
    return folder


KILLS = int(os.environ.get("CPC_NB_KILLS", 4))  # 30 for the figure in the docs


def test_runs_killed_at_random_moments_end_as_if_they_had_not_been(
    whole, speech, tmp_path
):
    """Each is killed once, after its first checkpoint or inside one, then resumed."""
    chance, same, inside = random.Random(KILLS), 0, 0
    for number in range(KILLS):
        run_dir = tmp_path / str(number)
        process = start(BIN / "cpc_train", *options(given(speech, run_dir)))
        if number % 2:  # while a checkpoint is being written
            wanted = 4 * chance.randint(2, LAST // 4 - 2)
            while (
                process.poll() is None
                and not (run_dir / "checkpoints" / f".step-{wanted:08d}").exists()
            ):
                pass
        else:
            wait_for(run_dir / "checkpoints" / "index.json", process)
            time.sleep(chance.uniform(0, 0.8))
        process.kill()
        process.communicate()
        inside += any((run_dir / "checkpoints").glob(".step-*"))
        done = script("cpc_train", *options(given(speech, run_dir)))
        assert done.code == 0, done.output[-3000:]
        same += same_weights(run_dir, whole / "1")
    print(
        f"{same} of {KILLS} runs killed at random moments, {inside} of them inside a "
        "checkpoint, ended with the weights of the run that was not"
    )
    assert same == KILLS


def test_a_worker_that_dies_is_started_again(whole, speech, tmp_path):
    """Without help from the user; the run ends with the same weights."""
    process = start(
        BIN / "cpc_train", *options(given(speech, tmp_path / "run", n_procs=2))
    )
    wait_for(tmp_path / "run" / "checkpoints" / "step-00000008", process)
    os.kill(workers(process)[1], signal.SIGKILL)
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output[-3000:]
    assert same_weights(tmp_path / "run", whole / "2") and [
        line["step"] for line in RunFolder(tmp_path / "run").metrics()
    ] == list(range(4, LAST + 4, 4))


@pytest.mark.parametrize(
    "n_procs, told",
    [(1, signal.SIGTERM), (2, signal.SIGTERM), (1, signal.SIGHUP), (2, signal.SIGHUP)],
)
def test_a_run_that_is_told_to_end_saves_and_goes_on(
    whole, speech, tmp_path, n_procs, told
):
    """SIGTERM and SIGHUP: exit code 75, a checkpoint of that step, no process left.

    The resumed run ends with the same weights."""
    process = start(
        BIN / "cpc_train", *options(given(speech, tmp_path / "run", n_procs=n_procs))
    )
    wait_for(tmp_path / "run" / "checkpoints" / "step-00000004", process)
    children = offspring(process.pid)
    process.send_signal(told)
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 75 and f"told to end by {told.name}" in output, (
        process.returncode,
        output[-3000:],
    )
    assert (
        4 < int(RunFolder(tmp_path / "run").index["last"].removeprefix("step-")) < LAST
    )
    assert not any(
        Path(f"/proc/{child}/cmdline").exists()
        and b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()
        for child in children
    )
    done = script(
        "cpc_train", *options(given(speech, tmp_path / "run", n_procs=n_procs))
    )
    assert done.code == 0 and same_weights(tmp_path / "run", whole / str(n_procs)), (
        done.output[-3000:]
    )
    assert [line["step"] for line in RunFolder(tmp_path / "run").metrics()] == list(
        range(4, LAST + 4, 4)
    )


def test_interrupting_a_run_saves(whole, speech, tmp_path):
    process = start(BIN / "cpc_train", *options(given(speech, tmp_path / "run")))
    wait_for(tmp_path / "run" / "checkpoints" / "step-00000004", process)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=100)
    last = RunFolder(tmp_path / "run").index["last"]
    assert (
        process.returncode == 130
        and f"stopped; checkpoint {last} of {tmp_path / 'run'} is saved" in output
        and "give the same command again" in output
        and "\r" not in output  # bars are for terminals
    ), output[-3000:]


def test_interrupting_make_run_saves_and_keeps_the_notebook(whole, speech, tmp_path):
    """What `make run` calls passes an interrupt on to the kernel, and ends with it."""
    run, to = RunFolder(tmp_path / "run"), tmp_path / "04_train.ipynb"
    command = [sys.executable, "-m", "cpc_nb.headless", "--no-progress-bar"]
    command += [ROOT / "nbs" / "04_train.ipynb", to, "--stdout-file", "-"]
    command += papermill_options(given(speech, run.path))
    process = start(*command)
    wait_for(run.checkpoints / "step-00000004", process)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=100)
    saved = f"stopped; checkpoint {run.index['last']} of {run.path} is saved"
    assert process.returncode == 130 and saved in output, output[-3000:]
    assert saved in to.read_text()
    done = script("cpc_train", *options(given(speech, run.path)))
    assert done.code == 0 and same_weights(run.path, whole / "1"), done.output[-3000:]


@pytest.mark.parametrize("n_procs", [1, 2])
def test_a_file_in_the_run_folder_saves_and_stops(speech, tmp_path, n_procs):
    """`save` is answered while training goes on, `stop` ends all processes.

    The run that goes on ends with the weights of one that was never stopped."""
    run = RunFolder(tmp_path / "run")
    rarely = {"train.checkpoint_every": 100_000, "train.schedule": "constant"}
    how = {"n_procs": n_procs, "overrides": rarely}
    command = given(speech, run.path, max_steps=50_000, **how)  # it cannot end first
    process = start(BIN / "cpc_train", *options(command))
    wait_for(run.path / "metrics.jsonl", process)
    run.ask("save")
    wait_for(run.checkpoints / "index.json", process)
    [saved] = run.names()
    run.ask("stop")
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 130 and "stopped; " in output, output[-3000:]
    last = run.index["last"]
    assert saved <= last and not run.was_asked("stop")
    end = int(last.removeprefix("step-")) + 4
    for folder in (run.path, tmp_path / "whole"):
        done = script(
            "cpc_train", *options(given(speech, folder, max_steps=end, **how))
        )
        assert done.code == 0, done.output
    assert same_weights(run.path, tmp_path / "whole")


def test_workers_end_with_the_process_that_began_them(speech, tmp_path):
    """Workers of a killed run stop writing, and the run can be started again."""
    process = start(
        BIN / "cpc_train",
        *options(given(speech, tmp_path / "run", n_procs=2, max_steps=4000)),
    )
    wait_for(tmp_path / "run" / "checkpoints" / "index.json", process)
    orphans = workers(process)
    assert len(orphans) == 2
    process.kill()
    process.wait()
    until = time.monotonic() + 30
    while any(
        Path(f"/proc/{number}").exists()
        and Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0]
        not in "XZ"
        for number in orphans
    ):
        assert time.monotonic() < until, "workers are still there"
        time.sleep(0.1)
    RunFolder(tmp_path / "run").hold()


def test_a_second_run_on_the_same_folder_refuses(speech, tmp_path):
    process = start(
        BIN / "cpc_train", *options(given(speech, tmp_path / "run", max_steps=4000))
    )
    wait_for(tmp_path / "run" / "checkpoints" / "index.json", process)
    done = script(
        "cpc_train", *options(given(speech, tmp_path / "run", max_steps=4000))
    )
    assert (
        done.code == 1
        and done.last
        == f"cpc_train: another process is training into {tmp_path / 'run'}; "
        "wait until it ends, or give another run_dir"
    )
    assert process.poll() is None
    process.kill()
    process.communicate()


def test_papermill_starts_workers_and_shows_the_first(whole, speech, tmp_path):
    """The notebook shows curves and validation lines; weights are the command's."""
    done = papermill(
        "04_train.ipynb",
        tmp_path / "run" / "04_train.ipynb",
        given(speech, tmp_path / "run", n_procs=2),
    )
    assert done.code == 0, done.output[-3000:]
    assert same_weights(tmp_path / "run", whole / "2")
    outputs = [
        output
        for cell in nbformat.read(tmp_path / "run" / "04_train.ipynb", 4).cells
        for output in cell.get("outputs", [])
    ]
    text = "".join(output.get("text", "") for output in outputs)
    assert (
        "starting 2 processes" in text
        and f"step      20 of {LAST}" in text
        and f"step      {LAST} of {LAST}" in text
    )
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 2


def test_papermill_says_what_went_wrong_in_a_worker(speech, tmp_path):
    """A loss that is not finite; and a killed worker, with no restart left."""
    done = papermill(
        "04_train.ipynb",
        tmp_path / "nan" / "04_train.ipynb",
        given(speech, tmp_path / "nan", n_procs=2, lr=1e30),
    )
    assert done.code == 1 and re.search(
        "TrainingError: the loss is .* at step .*; the last good checkpoint is none; "
        "lower train.lr",
        done.last,
    ), done.output[-2000:]

    process = start(
        sys.executable,
        "-m",
        "papermill",
        ROOT / "nbs" / "04_train.ipynb",
        tmp_path / "killed.ipynb",
        "--no-progress-bar",
        *papermill_options(
            given(
                speech,
                tmp_path / "run",
                n_procs=2,
                max_steps=4000,
                overrides={"launch.max_restarts": 0},
            )
        ),
    )
    wait_for(tmp_path / "run" / "checkpoints" / "step-00000008", process)
    os.kill(workers(process)[1], signal.SIGKILL)
    output, _ = process.communicate(timeout=100)
    assert (
        process.returncode == 1
        and "ProcessFailed: process 1 was killed by SIGKILL (was there memory enough?"
        in output.strip().splitlines()[-1]
    ), output[-2000:]


def test_torchrun_starts_the_same_run(whole, speech, tmp_path):
    done = run(
        BIN / "torchrun",
        "--standalone",
        "--local-addr",
        "127.0.0.1",
        "--nproc-per-node",
        2,
        "-m",
        "cpc_nb.train",
        *options(given(speech, tmp_path / "run")),
    )
    assert done.code == 0, done.output[-3000:]
    assert same_weights(tmp_path / "run", whole / "2")


# Damaged checkpoints, and runs that cannot start or go on


@pytest.fixture
def stopped(whole, tmp_path) -> Path:
    """A copy of the undisturbed run, to be damaged."""
    run_dir = tmp_path / "run"
    shutil.copytree(whole / "1", run_dir)
    return run_dir


class Malice:
    """An object that makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def flip(path: Path, _):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def truncate(path: Path, _):
    path.write_bytes(path.read_bytes()[:-7])


def delete(path: Path, _):
    path.unlink()


def poison(path: Path, tmp_path: Path):
    torch.save(Malice(tmp_path / "executed"), path)


def poison_and_sign(path: Path, tmp_path: Path):
    """Poison a file, and write the checksum that fits it."""
    poison(path, tmp_path)
    sums = json.loads((path.parent / "checksums.json").read_text())
    (path.parent / "checksums.json").write_text(
        json.dumps({**sums, path.name: hashlib.sha256(path.read_bytes()).hexdigest()})
    )


DAMAGES = [
    (file, damage)
    for file in ("weights.safetensors", "optimizer.pt", "state.json", "checksums.json")
    for damage in (flip, truncate, delete)
]
DAMAGES += [("optimizer.pt", poison), ("optimizer.pt", poison_and_sign)]


@pytest.mark.parametrize(
    "file,damage", DAMAGES, ids=lambda value: getattr(value, "__name__", value)
)
def test_a_damaged_checkpoint_is_left_aside(stopped, tmp_path, file, damage):
    run = RunFolder(stopped)
    objective = CPCWithLoss(run.config())
    optimizer = lambda: torch.optim.AdamW(
        [
            {"params": [p for p in objective.parameters() if p.ndim > 1]},
            {"params": [p for p in objective.parameters() if p.ndim <= 1]},
        ]
    )
    last, before = run.names()[:2]
    damage(run.checkpoints / last / file, tmp_path)
    with pytest.warns(
        UserWarning, match=f"checkpoint .*{last} is damaged and left aside"
    ):
        state = run.restore(objective, optimizer())
    assert (
        f"step-{state['step']:08d}" == before and not (tmp_path / "executed").exists()
    )
    with pytest.warns(UserWarning, match="damaged"):
        run.load("last")
    for name in run.names()[1:]:
        damage(run.checkpoints / name / file, tmp_path)
    with (
        pytest.warns(UserWarning),
        pytest.raises(
            ConfigError,
            match=f"no checkpoint can be read .tried {last}, {before}.*"
            "give another run_dir, or delete",
        ),
    ):
        run.restore(objective, optimizer())
    assert not (tmp_path / "executed").exists()


def test_a_damaged_run_ends_as_if_it_had_not_been(whole, stopped, speech):
    flip(
        stopped / "checkpoints" / RunFolder(stopped).index["last"] / "optimizer.pt",
        None,
    )
    (stopped / "checkpoints" / "index.json").write_text('{"last": "step-0000')
    done = script("cpc_train", *options(given(speech, stopped)))
    assert (
        done.code == 0
        and f"step-{LAST:08d} is damaged and left aside" in done.output
        and f"resuming at step {LAST - 4}" in done.output
    ), done.output[-3000:]
    assert same_weights(stopped, whole / "1")


def test_checkpoints_that_are_not_this_runs(stopped, whole, speech, tmp_path):
    run = RunFolder(stopped)
    last = run.checkpoints / run.index["last"]
    other = script(
        "cpc_train",
        *options(
            given(
                speech, tmp_path / "other", max_steps=4, overrides={"context.size": 24}
            )
        ),
    )
    assert other.code == 0, other.output
    shutil.rmtree(last)
    shutil.copytree(tmp_path / "other" / "checkpoints" / "step-00000004", last)
    with pytest.raises(
        ConfigError,
        match="not a checkpoint of this run's configuration.*size mismatch.*"
        "was it copied from another run",
    ):
        run.load("last")
    content = json.dumps(
        {**json.loads((last / "state.json").read_text()), "format": 2}
    ).encode()
    (last / "state.json").write_bytes(content)
    (last / "checksums.json").write_text(
        json.dumps(
            {
                **json.loads((last / "checksums.json").read_text()),
                "state.json": hashlib.sha256(content).hexdigest(),
            }
        )
    )
    with pytest.raises(
        ConfigError,
        match="is of format 2, and this version reads formats up to 1; update cpc_nb",
    ):
        run.load("last")
    (run.checkpoints / "index.json").write_text(json.dumps({"last": "../../elsewhere"}))
    assert run.index["last"] == last.name


@pytest.mark.parametrize("n_procs", [1, 2])
def test_a_loss_that_is_not_finite_names_the_step_and_its_windows(
    speech, tmp_path, n_procs
):
    done = script(
        "cpc_train",
        *options(
            given(
                speech,
                tmp_path / "run",
                n_procs=n_procs,
                lr=1e30,
                overrides={"train.warmup_steps": 0},
            )
        ),
    )
    assert done.code == 1, done.output[-3000:]
    message = next(
        line for line in done.output.splitlines() if line.startswith("cpc_train: ")
    )
    step = int(
        re.search(
            r"the loss is .* at step (\d+); the last good checkpoint is none; "
            "lower train.lr or set train.grad_clip",
            message,
        )[1]
    )
    config = RunFolder(tmp_path / "run").config()
    corpus = pack(speech)
    utterance, start = TrainingData(config).windows.locate(step - 1)
    assert 1 < step <= 4 and all(
        f"{corpus.ids[u]} at {s / 16000:.2f} s" in message
        for u, s in zip(utterance, start)
    )
    assert message == done.last and not list(
        (tmp_path / "run" / "checkpoints").iterdir()
    )


@pytest.mark.parametrize(
    "given_more,message",
    [
        (
            {"n_procs": 3},
            "train.batch_size: 8 windows are 4 groups of 2, which 3 parts (processes × "
            "machines × accumulate) cannot share evenly; the nearest batches that they "
            "can are 6 and 12, or lower data.group_size",
        ),
        (
            {"nnodes": 2},
            "rdzv_endpoint = '': 2 machines need HOST:PORT to meet at, for instance "
            "10.0.0.1:29400",
        ),
        (
            {"nnodes": 2, "rdzv_endpoint": "nowhere.invalid:29400"},
            "rdzv_endpoint: there is no host 'nowhere.invalid'",
        ),
        (
            {"overrides": {"launch.min_nodes": 2}},
            "launch.min_nodes: 2 is more than launch.nnodes = 1",
        ),
        (
            {"overrides": {"launch.accumulate": 2, "encoder.norm": "batch"}},
            "launch.accumulate: 2 parts are normalised apart, and encoder.norm=batch "
            "takes the mean of a whole batch",
        ),
        ({"n_gpus": 64}, "n_gpus = 64, but this machine has"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_cannot_be_launched(speech, tmp_path, given_more, message):
    done = script("cpc_train", *options(given(speech, tmp_path / "run", **given_more)))
    assert (
        done.code == 1 and done.last.startswith("cpc_train: ") and message in done.last
    ), done.output[-2000:]
    assert not (tmp_path / "run").exists()


def free_port() -> int:
    with socket.socket() as door:
        door.bind(("127.0.0.1", 0))
        return door.getsockname()[1]


def test_a_rendezvous_that_nobody_answers(speech, tmp_path):
    two = {"nnodes": 2, "overrides": {"launch.rdzv_timeout_s": 3}}
    done = script(
        "cpc_train",
        *options(
            given(
                speech,
                tmp_path / "run",
                rdzv_endpoint=f"127.0.0.1:{free_port()}",
                **two,
            )
        ),
    )
    assert (
        done.code == 1
        and "fewer than 2 machines met there within 3 s (launch.rdzv_timeout_s); "
        "is the same command running on the others?"
        in done.last
    ), done.output[-2000:]
    with socket.socket() as door:
        door.bind(("127.0.0.1", 0))
        door.listen()
        done = script(
            "cpc_train",
            *options(
                given(
                    speech,
                    tmp_path / "run",
                    rdzv_endpoint=f"127.0.0.1:{door.getsockname()[1]}",
                    **two,
                )
            ),
        )
    assert (
        done.code == 1 and "another program has that port; give another" in done.last
    ), done.output[-2000:]


def unlike(config, run_dir):
    """A process of a run whose processes have different learning rates."""
    train_worker(
        config.model_copy(
            update={
                "train": config.train.model_copy(
                    update={"lr": config.train.lr * (1 + int(os.environ["RANK"]))}
                )
            }
        ),
        run_dir,
        quiet=True,
    )


def test_processes_that_are_not_alike_refuse(speech, tmp_path):
    config = config_of("demo", speech, **{"launch.n_procs": 2, "launch.timeout_s": 30})
    with pytest.raises(
        ConfigError,
        match=r"the processes of this run are not alike: train.lr is 0.002 on .* "
        r"\(process 1\) and 0.001 on .* \(process 0\); "
        "start all machines with the same code",
    ):
        launch_processes(unlike, (config, tmp_path / "run"), config, lambda ended: None)


@pytest.mark.parametrize(
    "environment, message",
    [
        ({"RANK": "0"}, "RANK is set, and WORLD_SIZE is None: start with torchrun"),
        (
            {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"},
            "RANK is set, and LOCAL_WORLD_SIZE is None",
        ),
        ({"RANK": "first"}, "RANK is set, and RANK is 'first'"),
        ({name: "2" for name in LAUNCHED}, "RANK is 2 and WORLD_SIZE 2, which it"),
        (
            {name: "1" for name in LAUNCHED} | {"RANK": "0"},
            "LOCAL_RANK is 1 and LOCAL_WORLD_SIZE 1",
        ),
        (
            {name: "1" for name in LAUNCHED} | {"RANK": "0", "LOCAL_RANK": "0"},
            "MASTER_ADDR expected, but not set; start with torchrun",
        ),
    ],
)
def test_a_part_of_what_torchrun_sets(
    speech, tmp_path, monkeypatch, environment, message
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        train(config_of("demo", speech), tmp_path / "run")


def of_two_minds(config, run_dir):
    """A process of a run whose processes choose different back ends."""
    if os.environ["RANK"] == "1":
        cpc_nb.launch.pick_backend = lambda launch, device: "nccl"
    train_worker(config, run_dir, quiet=True)


def test_machines_that_choose_different_back_ends_refuse(speech, tmp_path):
    """Otherwise they would wait for each other until the timeout."""
    config = config_of("demo", speech, **{"launch.n_procs": 2, "launch.timeout_s": 300})
    message = r"back ends, gloo on .* \(process 0\) and nccl on .* \(process 1\)"
    given = config, tmp_path / "run"
    with pytest.raises(ConfigError, match=message):
        launch_processes(of_two_minds, given, config, lambda ended: None)


def test_two_processes_on_each_device(speech, tmp_path, device):
    """Two processes may share a GPU, through gloo; losses are those of one process."""
    n_gpus = 0 if device.type == "cpu" else 1
    more = {"launch.n_gpus": n_gpus, "train.max_steps": 10}
    train_worker(config_of("demo", speech, **more), tmp_path / "one", quiet=True)
    two = config_of("demo", speech, **more, **{"launch.n_procs": 2})
    launch_processes(
        train_worker, (two, tmp_path / "two", True, True), two, lambda ended: None
    )
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)


def test_the_corpus_on_the_device(speech, device):
    """Windows of a corpus on the device equal those that are read ahead."""
    windows = TrainingData(config_of("demo", speech)).windows
    shares = [(step, 0, 1) for step in range(3)]
    resident = list(prefetch_audio(windows, shares, device, resident=True))
    for one, other in zip(
        resident, prefetch_audio(windows, shares, device, resident=False)
    ):
        assert one.device.type == device.type and torch.equal(one, other)


def test_processes_that_share_a_gpu_share_its_memory(monkeypatch):
    """Four processes on the first of eight GPUs, and one on each of four."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (80, 80))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    gpu = torch.device("cuda", 0)
    assert fits_beside_a_model(5, gpu, 1) and not fits_beside_a_model(6, gpu, 1)
    assert fits_beside_a_model(20, gpu, 4) and fits_beside_a_model(20, gpu)
    assert not fits_beside_a_model(21, gpu)


def test_where_a_single_process_works(monkeypatch):
    """`n_gpus` 0 means the CPU even beside a GPU; more GPUs than exist are an error."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert pick_device(LaunchConfig(n_gpus=0)).type == "cpu"
    assert pick_device(LaunchConfig()).type == "cuda"
    with pytest.raises(ConfigError, match="n_gpus = 8, but this machine has 1"):
        pick_device(LaunchConfig(n_gpus=8))


def test_bf16_that_is_only_emulated_is_not_picked(monkeypatch):
    monkeypatch.setattr(
        torch.cuda,
        "is_bf16_supported",
        lambda including_emulation=True: including_emulation,
    )
    gpu = torch.device("cuda", 0)
    assert pick_precision(LaunchConfig(), gpu) is torch.float32
    assert pick_precision(LaunchConfig(precision="bf16"), gpu) is torch.bfloat16


@pytest.mark.parametrize("told", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_before_training_begins_ends_the_command(speech, tmp_path, told):
    """A signal during packing is not lost, and no half-packed corpus is kept."""
    cache = tmp_path / "cache"
    for copy in range(10):  # long enough to be interrupted
        shutil.copytree(speech, tmp_path / "long" / str(copy))
    process = start(
        BIN / "cpc_train",
        *options(given(tmp_path / "long", tmp_path / "run")),
        env={**os.environ, "CPC_NB_CACHE": str(cache)},
    )
    until = time.monotonic() + 100
    while not list(cache.glob("packed/.*.part")) and time.monotonic() < until:
        time.sleep(0.002)
    process.send_signal(told)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + told, output[-2000:]
    left = [path for path in cache.glob("packed/*") if path.suffix != ".lock"]
    assert "Traceback" not in output and not left
    assert not (tmp_path / "run").exists()


def test_out_of_memory_in_one_process_names_the_remedy(speech, tmp_path, monkeypatch):
    def update(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 64 GiB.")

    monkeypatch.setattr(cpc_nb.trainer.Trainer, "update", update)
    with pytest.raises(
        TrainingError, match="out of memory .CUDA out.*lower train.batch_size, or raise"
    ):
        train(config_of("demo", speech), tmp_path / "run")


# Two hosts


@pytest.fixture
def hosts():
    """Two hosts: network namespaces with one address each, joined by a cable.

    Yields a function that runs a command on a host, and one that sets the cable
    "up" or "down"."""
    if not is_root() or not shutil.which("ip"):
        pytest.skip("making network namespaces needs root and the command ip")
    names = [f"cpc{os.getpid()}{letter}" for letter in "ab"]
    ip = lambda *arguments, check=True: subprocess.run(
        ["ip", *arguments], check=check, capture_output=True, text=True
    )
    try:
        try:
            for name in names:
                ip("netns", "add", name)
            ip("link", "add", names[0], "type", "veth", "peer", "name", names[1])
        except subprocess.CalledProcessError as error:
            pytest.skip(f"cannot make network namespaces: {error.stderr.strip()}")
        for number, name in enumerate(names, 1):
            ip("link", "set", name, "netns", name)
            ip("-n", name, "address", "add", f"10.99.0.{number}/24", "dev", name)
            for device in ("lo", name):
                ip("-n", name, "link", "set", device, "up")
        started = []

        def on(number, *command):
            started.append(start("ip", "netns", "exec", names[number], *command))
            return started[-1]

        yield on, lambda way: ip("-n", names[1], "link", "set", names[1], way)
        for process in started:
            process.kill()
    finally:
        for name in names:
            ip("netns", "delete", name, check=False)


def test_two_hosts_train_the_run_of_one(hosts, whole, speech, tmp_path):
    on, _ = hosts
    two = {"nnodes": 2, "rdzv_endpoint": "10.99.0.1:29400"}
    processes = [
        on(number, BIN / "cpc_train", *options(given(speech, tmp_path / "run", **two)))
        for number in (1, 0)
    ]
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    for process, output in zip(processes, outputs):
        print(process.returncode, output[-3000:])
    assert all(process.returncode == 0 for process in processes)
    assert same_weights(tmp_path / "run", whole / "2")


def wait_for_step(step: int, run: RunFolder, process, seconds=200):
    """Wait until `run` has come to `step`; fail if the process ends first."""
    until = time.monotonic() + seconds
    while run.metrics()[-1]["step"] < step:
        assert process.poll() is None, process.stdout.read()[-3000:]
        assert time.monotonic() < until, f"step {step} did not come"
        time.sleep(0.1)


def said(process, text: str) -> str:
    """What a process prints, up to a line with `text`; fails where it ends before."""
    output = ""
    while text not in output:
        line = process.stdout.readline()
        assert line, output
        output += line
    return output


def test_a_host_that_is_cut_off_is_done_without_and_may_return(hosts, speech, tmp_path):
    on, cable = hosts
    # TCP gives a silent connection up after some 15 seconds, not 15 minutes.
    retries = "echo 5 > /proc/sys/net/ipv4/tcp_retries2"
    assert on(1, "sh", "-c", retries).wait() == 0
    two = {
        "nnodes": 2,
        "rdzv_endpoint": "10.99.0.1:29400",
        "overrides": {
            "launch.min_nodes": 1,
            "launch.last_call_s": 2,
            "launch.timeout_s": 5,
            "launch.rdzv_timeout_s": 60,
        },
    }
    run = RunFolder(tmp_path / "run")
    lost, kept = (
        on(
            number,
            BIN / "cpc_train",
            *options(given(speech, run.path, max_steps=2400, **two)),
        )
        for number in (1, 0)
    )
    both = "training on 2 of 2 machines"
    for process in (lost, kept):
        said(process, both)
    wait_for(run.path / "checkpoints" / "step-00000020", kept)
    begin, step = time.monotonic(), run.metrics()[-1]["step"]
    cable("down")
    said(kept, "training on 1 of 2 machines")
    said(lost, "the connection to 10.99.0.1:29400 was lost; joining again")
    wait_for_step(step + 200, run, kept)
    print(f"{time.monotonic() - begin:.0f} s from the cut to 200 steps beyond it")
    cable("up")
    for process in (lost, kept):
        said(process, both)
    print(f"{time.monotonic() - begin:.0f} s from the cut until both train again")
    outputs = [process.communicate(timeout=600)[0] for process in (lost, kept)]
    assert lost.returncode == kept.returncode == 0, outputs
    assert [line["step"] for line in run.metrics()] == list(range(4, 2404, 4))
