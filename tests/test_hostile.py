"""Hostile inputs: a table of what a command is given, and what it must answer.

Each case runs a command in a process of its own, forked from one in which PyTorch is
loaded, with so much memory and so many seconds. Whatever is said, these hold for all:
no traceback, the last line begins with the command's name and holds what the case says
is told, the exit code is the case's, and no file was made, changed or removed."""

import hashlib
import json
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from conftest import SMALL, options, write_corpus
from safetensors.torch import load_file, save_file

COMMANDS = {
    "cpc_train": ("cpc_nb.config", "cpc_train"),
    "cpc_evaluate": ("cpc_nb.evaluate", "main"),
    "cpc_align": ("cpc_nb.align", "main"),
    "cpc_features": ("cpc_nb.features", "main"),
    "cpc_pack": ("cpc_nb.data", "main"),
    "cpc_nb.paper": ("cpc_nb.paper", "main"),
    "cpc_nb.benchmark": ("cpc_nb.benchmark", "main"),
}
MEMORY = 6 * 2**30  # bytes that a command may allocate
SECONDS = 60  # after which it hangs

# Torch's file of modules is loaded once; the processes of the cases are forked from it.
fork = multiprocessing.get_context("forkserver")
fork.set_forkserver_preload(
    [module for module, _ in COMMANDS.values()] + ["cpc_nb.train", "sklearn.manifold"]
)


class Case(NamedTuple):
    """What a command is given, and what it must answer.

    In arguments and environment {here} is a folder of the case's own, {run} a copy of a
    trained run in it, {model} that run's model, and {speech} a corpus."""

    name: str
    program: str
    arguments: list[str]
    says: tuple[str, ...]
    code: int = 1
    spoil: Callable[[Path], object] = lambda here: None
    environment: dict[str, str] = {}


class Answer(NamedTuple):
    """How a command ended, and the lines that it wrote."""

    code: int
    out: str
    lines: list[str]


# ---------------------------------------------------------------------------------
# Running a command


def act(program, arguments, out, err, environment):
    """A command as its console script runs it, in this process."""
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    encoding = environment.get("PYTHONIOENCODING", "utf-8")
    sys.stdout = open(1, "w", encoding=encoding, closefd=False)
    sys.stderr = open(2, "w", encoding=encoding, errors="backslashreplace", buffering=1)
    os.environ.update(environment)
    for variable in [name for name, value in environment.items() if not value]:
        del os.environ[variable]
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    torch.set_num_threads(1)
    sys.argv = [program, *arguments]
    module, function = COMMANDS[program]
    try:
        getattr(import_module(module), function)()
    finally:
        sys.stdout.flush()  # as the interpreter does in the end


def start(program, arguments, here: Path, out="", **environment):
    """A process of `program`, whose streams go to files beside `here`."""
    out = str(out or here.with_suffix(".out"))
    environment = {"CPC_NB_CACHE": os.environ["CPC_NB_CACHE"], **environment}
    given = program, arguments, out, str(here.with_suffix(".err")), environment
    process = fork.Process(target=act, args=given)
    process.start()
    return process


def end(process, here: Path) -> Answer:
    """How `process` ended; one that hangs is killed, and fails the test."""
    process.join(SECONDS)
    if hangs := process.is_alive():
        process.kill()
        process.join()
    err = here.with_suffix(".err")
    text = err.read_text(errors="replace") if err.exists() else ""
    assert not hangs, f"not at its end after {SECONDS} s: {text[-1000:]}"
    lines = [line for line in text.replace("\r", "\n").split("\n") if line.strip()]
    out = here.with_suffix(".out")
    return Answer(process.exitcode, out.read_text() if out.exists() else "", lines)


def run(program, arguments, here: Path, **environment) -> Answer:
    return end(start(program, arguments, here, **environment), here)


def assert_answer(answer: Answer, program: str, code: int, *fragments: str):
    """One sentence, the last, of what is wrong; nothing but success where `code` is 0."""
    text = "\n".join(answer.lines)
    assert "Traceback" not in text and "Exception ignored" not in text, text
    assert answer.code == code, (answer.code, text or answer.out)
    told = answer.lines[-1] if code else answer.out
    if code:
        said = [line for line in answer.lines if line.startswith(f"{program}: ")]
        assert said == [told], text
        assert len(told) < 1500, told
    for fragment in fragments:
        assert fragment in told, (fragment, told)


def look(folder: Path) -> dict:
    """Everything in `folder`: for each path the content, the target, or the kind."""

    def about(path: Path):
        if path.is_symlink():
            return os.readlink(path)
        if path.is_file():
            return hashlib.sha256(path.read_bytes()).hexdigest()
        return path.stat().st_mode

    return {str(path): about(path) for path in sorted(folder.rglob("*"))}


@pytest.fixture(scope="module")
def voices(tmp_path_factory):
    """A corpus for all cases: none may change it."""
    root = write_corpus(tmp_path_factory.mktemp("hostile") / "voices", 6, 4)
    before = look(root)
    yield root
    assert look(root) == before


@pytest.fixture(scope="module")
def trained(voices, tmp_path_factory):
    """A run of two updates, of which each case has a copy."""
    here = tmp_path_factory.mktemp("trained") / "here"
    here.mkdir()
    arguments = [fill(part, here, voices) for part in training()]
    assert_answer(run("cpc_train", arguments, here), "cpc_train", 0, "the run is in")
    return here / "new"


def fill(part: str, here: Path, speech: Path) -> str:
    """`part` with its folders in place of their names in braces."""
    names = {"{here}": here, "{run}": here / "run", "{model}": here / "run" / "model"}
    for name, path in {**names, "{speech}": speech}.items():
        part = part.replace(name, str(path))
    return part


# ---------------------------------------------------------------------------------
# What the commands are given, where nothing is wrong


def training(**changes) -> list[str]:
    """Options of cpc_train for two updates into {here}/new."""
    given = {
        "data": "{speech}",
        "run_dir": "{here}/new",
        "max_steps": 2,
        "batch_size": 8,
        "n_gpus": 0,
        "precision": "fp32",
        "overrides": SMALL,
    }
    return options(given | changes)


def evaluating(**changes) -> list[str]:
    """Options of cpc_evaluate that do next to nothing."""
    return options({"run_dir": "{run}", "protocols": "[]", "n_gpus": "0"} | changes)


def writing(**changes) -> list[str]:
    """Options of cpc_features."""
    given = {"model": "{model}", "data": "{speech}", "out": "{here}/features"}
    return options(given | {"n_gpus": "0"} | changes)


LONG = 5_000 * "a"
DEEP = 100_000 * "["


# ---------------------------------------------------------------------------------
# Training: values, paths, and what stands in the way


def configured(name, value, *says) -> Case:
    """cpc_train with one value of the configuration that is absurd."""
    arguments = training(overrides={**SMALL, name: value})
    return Case(f"{name} {value!r:.30}", "cpc_train", arguments, (name, *says))


def trained_with(name, value, *says, code=1) -> Case:
    """cpc_train with one parameter of which nothing good comes."""
    title = f"train {name} {value!r:.30}"
    return Case(title, "cpc_train", training(**{name: value}), says, code)


CONFIGURATIONS = [
    configured("context.layers", 100_000, "100000", "less than or equal to 64"),
    configured("context.layers", 2**63, "less than or equal to 64"),
    configured("context.size", 10**9, "less than or equal to"),
    configured("context.size", True, "True is neither a number nor text"),
    configured("context.size", "1e400", "'1e400'", "valid integer"),
    configured("encoder.channels", [2**20], "less than or equal to"),
    configured("encoder.channels", [], "at least 1 item"),
    configured("encoder.channels", [[16]], "valid integer"),
    configured("encoder.kernels", [10] * 2_000, "at most 1024 items"),
    configured("encoder.strides", [0, 0, 0, 0, 0], "greater than 0"),
    configured("data.window", 2**60, "less than or equal to"),
    configured("data.window", 1.5, "valid integer"),
    configured("data.group_size", 2**40, "less than or equal to"),
    configured("data.split_seed", 2**64, "less than"),
    configured("data.valid_fraction", float("nan"), "nan", "finite"),
    configured("loss.n_candidates", 10**12, "less than or equal to"),
    configured("loss.steps", [10**10], "less than or equal to"),
    configured("loss.own_frames", -1, "greater than or equal to 0"),
    configured("loss.scale", 7, "boolean"),
    configured("train.valid_windows", 10**12, "less than or equal to"),
    configured("train.keep_checkpoints", 0, "greater than 0"),
    configured("train.log_every", 10**30, "less than or equal to"),
    configured("train.betas", [0.9], "0.9", "at least 2"),
    configured("train.grad_clip", float("inf"), "inf", "finite"),
    configured("train.weight_decay", "none", "'none'", "valid number"),
    configured("launch.n_procs", 10**6, "less than or equal to"),
    configured("launch.accumulate", 10**12, "less than or equal to"),
    configured("launch.timeout_s", 10**12, "less than or equal to"),
    configured("launch.rdzv_endpoint", 3, "valid string"),
    trained_with("seed", 2**64, "train.seed = 18446744073709551616", "less than"),
    trained_with("seed", -1, "train.seed = -1", "greater than or equal to 0"),
    trained_with("seed", True, "train.seed", "True is neither a number nor text"),
    trained_with("seed", "0x10", "train.seed = '0x10'", "valid integer"),
    trained_with("seed", "9" * 5_000, "--seed"),
    trained_with("max_steps", True, "train.max_steps", "True is neither"),
    trained_with("max_steps", 10**30, "train.max_steps", "less than or equal"),
    trained_with("max_steps", "[2]", "train.max_steps", "valid integer"),
    trained_with("epochs", 0.5, "train.epochs = 0.5", "valid integer"),
    trained_with("batch_size", 2**40, "train.batch_size", "less than or equal"),
    trained_with("batch_size", 2**20, "fewer than a batch of 1048576", "lower"),
    trained_with("lr", float("nan"), "train.lr = nan", "finite"),
    trained_with("lr", "null null", "train.lr = 'null null'", "valid number"),
    trained_with("n_gpus", 10**6, "n_gpus"),
    trained_with("n_gpus", True, "launch.n_gpus", "True is neither"),
    trained_with("precision", "fp8", "launch.precision = 'fp8'", "'bf16'"),
    trained_with("compile", "perhaps", "launch.compile = 'perhaps'", "boolean"),
    trained_with("preset", LONG, "is unknown", "there are: demo, minimal, paper"),
    trained_with("resume", "perhaps", "resume = 'perhaps'", "true or false"),
    trained_with("resume", 1, "resume = 1", "true or false"),
    trained_with("overrides", DEEP, "overrides", "not a JSON mapping"),
    trained_with("overrides", "[]", "overrides", "a mapping from dotted names"),
    trained_with("overrides", '{"": 1}', "'' is not a field"),
    trained_with("overrides", '{"train": {"lr": 1}}', "'train' is not a field"),
]

PATHS = [
    trained_with("run_dir", LONG, "the run folder", "cannot be written", "too long"),
    trained_with("run_dir", "{here}/a\0b", "holds a zero byte"),
    trained_with("run_dir", "~nobody-of-this-name/run", "~nobody-of-this-name/run"),
    trained_with("run_dir", "/proc/run", "the run folder /proc/run cannot be written"),
    trained_with("run_dir", "/dev/null", "the run folder /dev/null", "Not a directory"),
    trained_with("data", LONG, "cannot be read", "too long"),
    trained_with("data", "{here}/a\0b", "null byte"),
    trained_with("data", "", "data.source", "at least 1 character"),
    trained_with("data", "/proc/self/mem", "is a file"),
    trained_with("data", "/sys/kernel", "no audio in /sys/kernel"),
    trained_with("data", "{here}/caf\udce9", "no such folder"),
]


# ---------------------------------------------------------------------------------
# The table


TABLE = CONFIGURATIONS + PATHS


@pytest.mark.parametrize("case", TABLE, ids=[case.name for case in TABLE])
def test_what_is_answered(case, voices, trained, tmp_path):
    here = tmp_path / "here"
    here.mkdir()
    given = [*case.arguments, *case.environment.values()]
    if any("{run}" in part or "{model}" in part for part in given):
        shutil.copytree(trained, here / "run")
    case.spoil(here)
    before = look(here)
    answer = run(
        case.program,
        [fill(part, here, voices) for part in case.arguments],
        here,
        **{k: fill(part, here, voices) for k, part in case.environment.items()},
    )
    says = [fill(part, here, voices) for part in case.says]
    assert_answer(answer, case.program, case.code, *says)
    assert look(here) == before
