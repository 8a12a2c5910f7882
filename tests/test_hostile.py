"""Hostile inputs: a table of what a command is given, and what it must answer.

Each case runs a command in a process of its own, forked from one in which PyTorch is
loaded, with so much memory and so many seconds. Whatever is said, these hold for all:
no traceback, the last line begins with the command's name and holds what the case says
is told, the exit code is the case's, and no file was made, changed or removed."""

import hashlib
import json
import os
import re
import resource
import shutil
import signal
import struct
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from time import sleep
from typing import NamedTuple

import pytest
import torch
from conftest import SMALL, fork, options, write_corpus
from safetensors.torch import load_file, save_file

COMMANDS = {
    "cpc_train": ("cpc_nb.config", "cpc_train"),
    "cpc_evaluate": ("cpc_nb.evaluate", "main"),
    "cpc_align": ("cpc_nb.align", "main"),
    "cpc_features": ("cpc_nb.store", "main"),
    "cpc_units": ("cpc_nb.units", "main"),
    "cpc_pack": ("cpc_nb.corpus", "main"),
    "cpc_export": ("cpc_nb.export", "main"),
    "cpc_import": ("cpc_nb.published", "main"),
    "cpc_nb.paper": ("cpc_nb.paper", "main"),
    "cpc_nb.benchmark": ("cpc_nb.benchmark", "main"),
}
MEMORY = 6 * 2**30  # bytes that a command may allocate
SECONDS = 60  # after which it hangs
CLOSED = "|"  # an output that is a pipe without a reader


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
    out: str = ""  # where its output goes, if not into a file
    told: tuple[str, str, int] | None = None  # module and function that get a signal
    leaves: tuple[str, ...] = ()  # names of new files and folders that are in order


class Answer(NamedTuple):
    """How a command ended, and the lines that it wrote."""

    code: int
    out: str
    lines: list[str]


# ---------------------------------------------------------------------------------
# Running a command


def act(program, arguments, out, err, environment, told):
    """A command as its console script runs it, in this process."""
    for number, path in ((1, out), (2, err)):
        if path == CLOSED:
            read, write = os.pipe()
            os.close(read)
        else:
            write = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(write, number)
    encoding = environment.get("PYTHONIOENCODING", "utf-8")
    sys.stdout = open(1, "w", encoding=encoding, closefd=False)
    sys.stderr = open(2, "w", encoding=encoding, errors="backslashreplace", buffering=1)
    os.environ.update(environment)
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    torch.set_num_threads(1)
    sys.argv = [program, *arguments]
    if told:
        module, function, number = told

        def signalling(*given, **named):
            os.kill(os.getpid(), number)
            sleep(1)  # time for it to come

        setattr(import_module(module), function, signalling)
    module, function = COMMANDS[program]
    try:
        getattr(import_module(module), function)()
    finally:
        sys.stdout.flush()  # as the interpreter does in the end


def run(program, arguments, here: Path, environment=None, out="", told=None) -> Answer:
    """How `program` ends, whose streams go to files beside `here`; one that hangs is
    killed, and fails the test."""
    files = here.with_suffix(".out"), here.with_suffix(".err")
    environment = {"CPC_NB_CACHE": os.environ["CPC_NB_CACHE"], **(environment or {})}
    given = program, arguments, out or str(files[0]), str(files[1]), environment, told
    process = fork.Process(target=act, args=given)
    process.start()
    process.join(SECONDS)
    if hangs := process.is_alive():
        process.kill()
        process.join()
    wrote, text = (
        path.read_text(errors="replace") if path.exists() else "" for path in files
    )
    assert not hangs, f"not at its end after {SECONDS} s: {text[-1000:]}"
    lines = [line for line in re.split(r"[\r\n]+", text) if line.strip()]
    return Answer(process.exitcode, wrote, lines)


def assert_answer(answer: Answer, program: str, code: int, *fragments: str):
    """One sentence, the last, says what is wrong; none where `code` is 0."""
    text = "\n".join(answer.lines)
    assert "Traceback" not in text and "Exception ignored" not in text, text
    assert answer.code == code, (answer.code, text or answer.out)
    told = "".join(answer.lines[-1:]) if code else answer.out
    if code == 141:
        assert not told
    elif code:
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
    configured("encoder.kernels", [10] * 2_000, "at most 1024"),
    configured("encoder.strides", [0, 0, 0, 0, 0], "greater than 0"),
    configured("data.window", 2**60, "less than or equal to"),
    configured("data.window", 1.5, "valid integer"),
    configured("data.group_size", 2**40, "less than or equal to"),
    configured("data.split_seed", 2**64, "less than"),
    configured("data.valid_fraction", float("nan"), "nan", "finite"),
    configured("loss.n_candidates", 10**12, "less than or equal to"),
    configured("loss.steps", [10**10], "less than or equal to"),
    configured("loss.same_window_negatives", -1, "greater than or equal to 0"),
    configured("loss.scale", 7, "boolean"),
    configured("train.valid_windows", 10**12, "less than or equal to"),
    configured("train.keep_checkpoints", 0, "greater than 0"),
    configured("train.log_every", 10**30, "less than or equal to"),
    configured("train.betas", [0.9], "betas.1", "required"),
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
    trained_with("seed", "9" * 5_000, "train.seed = '999", "exceeded maximum size"),
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
    trained_with(
        "preset", LONG, "is unknown", "there are: demo, minimal, modern, paper, samples"
    ),
    trained_with("resume", "perhaps", "resume = 'perhaps'", "true or false"),
    trained_with("resume", 1, "resume = 1", "true or false"),
    trained_with("overrides", DEEP, "overrides", "not a JSON mapping"),
    trained_with("overrides", "[1]", "overrides", "a mapping from dotted names"),
    *(
        trained_with("overrides", empty, f"overrides = {empty}: give a mapping")
        for empty in ("[]", "0", "False")
    ),
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
    trained_with("data", "{here}/a\0b", "holds a zero byte"),
    trained_with("data", "", "data.source", "at least 1 character"),
    trained_with("data", "/proc/self/mem", "is a file"),
    trained_with("data", "/sys/kernel", "no audio in /sys/kernel"),
    trained_with("data", "{here}/caf\udce9", "data.source", "unicode"),
]


# ---------------------------------------------------------------------------------
# Run folders that were changed by hand, or by a disk


def holding(name: str, content: bytes | str | None) -> Callable[[Path], object]:
    """A function that gives file `name` of the run this content, makes it a folder
    where that is "folder", and removes it where that is None."""

    def spoil(here: Path):
        path = here / name
        if content != "folder":
            path.unlink(missing_ok=True)
        elif not path.is_dir():
            path.unlink(missing_ok=True)
            path.mkdir(parents=True)
        if isinstance(content, bytes):
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)

    return spoil


def in_checkpoint(**files: Callable) -> Callable[[Path], object]:
    """A function that changes files of all checkpoints, and their checksums."""

    def spoil(here: Path):
        for folder in (here / "run" / "checkpoints").glob("step-*"):
            sums = json.loads((folder / "checksums.json").read_text())
            for name in sums:
                if change := files.get(Path(name).stem):
                    change(folder / name)
                    content = (folder / name).read_bytes()
                    sums[name] = hashlib.sha256(content).hexdigest()
            (folder / "checksums.json").write_text(json.dumps(sums))

    return spoil


def state(**changes) -> Callable[[Path], object]:
    """A function that changes values in state.json of all checkpoints."""

    def change(path: Path):
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return in_checkpoint(state=change)


def weights(change: Callable[[dict], dict]) -> Callable[[Path], object]:
    """A function that changes the mapping of weights of the checkpoints."""

    def rewrite(path: Path):
        save_file(change(load_file(path)), path)

    return in_checkpoint(weights=rewrite)


def described(**changes) -> Callable[[Path], object]:
    """A function that changes values in corpus.json of the run."""

    def spoil(here: Path):
        path = here / "run" / "corpus.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return spoil


class Unpickled:
    """What a pickle may name: a function of the standard library."""

    def __reduce__(self):
        return os.getcwd, ()


def spoilt(name, spoil, *says) -> list[Case]:
    """A run that is neither evaluated nor resumed."""
    resumed = training(run_dir="{run}")
    return [
        Case(f"evaluate: {name}", "cpc_evaluate", evaluating(), says, spoil=spoil),
        Case(f"resume: {name}", "cpc_train", resumed, says, spoil=spoil),
    ]


NONE_READ = ("no checkpoint can be read", "give another run_dir")
RUNS = [
    *spoilt("config a folder", holding("run/config.json", "folder"), "config.json"),
    *spoilt("config a list", holding("run/config.json", b"[]"), "config.json"),
    *spoilt("config UTF-16", holding("run/config.json", b"\xff\xfe{\0}\0"), "config"),
    *spoilt("config deep", holding("run/config.json", DEEP.encode()), "config.json"),
    *spoilt("config huge", holding("run/config.json", b'{"train": 1e999}'), "config"),
    *spoilt("corpus gone", holding("run/corpus.json", None), "corpus.json"),
    *spoilt("corpus a folder", holding("run/corpus.json", "folder"), "corpus.json"),
    *spoilt("corpus torn", holding("run/corpus.json", b'{"name": "v'), "corpus.json"),
    *spoilt("corpus deep", holding("run/corpus.json", DEEP.encode()), "corpus.json"),
    *spoilt("corpus a number", described(fingerprint=3), "corpus.json", "fingerprint"),
    *spoilt(
        "checkpoint a list",
        in_checkpoint(state=lambda p: p.write_text("[]")),
        *NONE_READ,
    ),
    *spoilt("step a text", state(step="2"), *NONE_READ),
    *spoilt("step below 0", state(step=-2), *NONE_READ),
    *spoilt("loss a text", state(best_valid_loss="low"), *NONE_READ),
    *spoilt(
        "weights torn", in_checkpoint(weights=lambda p: os.truncate(p, 999)), *NONE_READ
    ),
    *spoilt(
        "weights empty", in_checkpoint(weights=lambda p: os.truncate(p, 0)), *NONE_READ
    ),
    *spoilt(
        "weights of a huge header",
        in_checkpoint(weights=lambda p: p.write_bytes(b"\xff" * 8 + b"{}")),
        *NONE_READ,
    ),
    *spoilt(
        "weights of another shape",
        weights(
            lambda found: {
                name: value[..., :1].clone() for name, value in found.items()
            }
        ),
        "not a checkpoint of this run's configuration",
    ),
    *spoilt("no weights", weights(lambda found: {}), "not a checkpoint of this run's"),
    *spoilt(
        "weights of infinity",
        weights(lambda found: {name: value / 0 for name, value in found.items()}),
        *NONE_READ,
    ),
    *spoilt(
        "optimizer a program",
        in_checkpoint(optimizer=lambda p: torch.save(Unpickled(), p)),
        *NONE_READ,
    ),
    Case(
        "evaluate: heard is a number",
        "cpc_evaluate",
        evaluating(data="{speech}/100"),
        ("corpus.json", "`heard`", "cannot be read"),
        spoil=described(heard=3, fingerprint="0"),
    ),
    Case(
        "evaluate: heard is gone",
        "cpc_evaluate",
        evaluating(data="{speech}/100"),
        ("corpus.json", "`heard`", "cannot be read"),
        spoil=described(heard=None, fingerprint="0"),
    ),
    Case(
        "evaluate: no checkpoints",
        "cpc_evaluate",
        evaluating(),
        ("has no checkpoint yet",),
        spoil=lambda here: shutil.rmtree(here / "run" / "checkpoints"),
    ),
    Case(
        "resume: checkpoints is a file",
        "cpc_train",
        training(run_dir="{run}"),
        ("cannot be written", "checkpoints"),
        spoil=lambda here: (
            shutil.rmtree(here / "run" / "checkpoints"),
            (here / "run" / "checkpoints").write_text(""),
        ),
    ),
    Case(
        "resume: metrics is a folder",
        "cpc_train",
        training(run_dir="{run}"),
        ("metrics.jsonl",),
        spoil=holding("run/metrics.jsonl", "folder"),
        leaves=("failed.txt",),
    ),
    Case(
        "evaluate: metrics is a folder",
        "cpc_evaluate",
        evaluating(),
        ("metrics.jsonl",),
        spoil=holding("run/metrics.jsonl", "folder"),
    ),
]


# ---------------------------------------------------------------------------------
# Evaluation


def evaluated(name, value, *says, code=1, **more) -> Case:
    """cpc_evaluate with one option of which nothing good comes."""
    title = f"evaluate {name} {value!r:.30}"
    arguments = evaluating(**{name: value})
    return Case(title, "cpc_evaluate", arguments, says, code, **more)


def labelled(title, content: bytes | str | None, *says) -> Case:
    """cpc_evaluate with a label file of this content."""
    arguments = evaluating(labels="{here}/labels.txt", protocols='["phone_frame"]')
    spoil = holding("labels.txt", content)
    return Case(f"labels: {title}", "cpc_evaluate", arguments, says, spoil=spoil)


EVALUATIONS = [
    evaluated("seed", 2**64, "seed = 18446744073709551616", "below 2**32"),
    evaluated("seed", True, "seed = True", "whole number"),
    evaluated("seed", "one", "seed = 'one'", "whole number"),
    evaluated("seed", 0.5, "seed = 0.5", "whole number"),
    evaluated("supervised", True, "supervised = True", "whole number"),
    evaluated("supervised", "1e30", "supervised = 1e+30", "whole number"),
    evaluated("n_gpus", "all", "n_gpus = 'all'", "whole number"),
    evaluated("tsne_speakers", 0, "tsne_speakers = 0", "above 0"),
    evaluated("tsne_speakers", "NaN", "tsne_speakers = nan", "above 0"),
    evaluated("tsne_speakers", True, "tsne_speakers = True"),
    evaluated("tsne_speakers", "half", "tsne_speakers = 'half'"),
    evaluated("protocols", '{"speaker": 1}', "protocols = ", "give a list"),
    evaluated("protocols", '[["speaker"]]', "protocols"),
    evaluated("protocols", "[1]", "protocols", "1"),
    evaluated("protocols", "speaker,abx", "'speaker,abx' is unknown"),
    evaluated("protocols", DEEP, "protocols", "unknown"),
    evaluated("run_dir", LONG, "run_dir = 'aaa", "File name too long"),
    evaluated("run_dir", "", "no run folder"),
    evaluated("run_dir", "{run}/a\0b", "holds a zero byte"),
    evaluated("run_dir", "/dev/null", "/dev/null"),
    evaluated("run_dir", "{here}/caf\udce9", "no run folder"),
    evaluated("run_dir", "/proc", "/proc is no run folder"),
    evaluated("run_dir", "~nobody-of-this-name/r", "~nobody-of-this-name"),
    evaluated("data", LONG, "cannot be read", "too long"),
    evaluated("data", "{run}", "no audio in"),
    evaluated("data", "librispeech:none", "no subset 'none'"),
    evaluated("labels", LONG, "labels = 'aaa", "File name too long"),
    evaluated("labels", "{run}", "labels", "no such file"),
    evaluated("labels", "/dev/zero", "labels = '/dev/zero': no such file"),
    evaluated("labels", "{run}/a\0b", "zero byte"),
    labelled("empty", b"", "labels.txt"),
    labelled("not UTF-8", b"\xff\xfe\x00", "labels.txt is not text in UTF-8"),
    labelled("of others", b"1-2-3 0 0 0\n", "labels.txt"),
    labelled("no number", b"100-7-0000 0 a 0\n", "labels.txt", "not all integers"),
    labelled("negative", b"100-7-0000 0 -1 0\n", "labels.txt", "-1 is negative"),
    labelled("huge", b"100-7-0000 0 %d 0\n" % 2**70, "labels.txt"),
    labelled("5,000 digits", b"100-7-0000 " + b"9" * 5_000, "labels.txt"),
    labelled("too few", b"100-7-0000 0\n", "labels.txt", "1 of another length"),
    labelled("twice", b"100-7-0000 0\n100-7-0000 0\n", "labels.txt"),
    evaluated(
        "data", "{speech}", "evaluation", spoil=holding("run/evaluation", b"in the way")
    ),
]


# ---------------------------------------------------------------------------------
# Models and features


def written(name, value, *says, **more) -> Case:
    """cpc_features with one option of which nothing good comes."""
    title = f"features {name} {value!r:.30}"
    return Case(title, "cpc_features", writing(**{name: value}), says, **more)


def modelled(title, content: dict | bytes | None, *says) -> Case:
    """cpc_features with a model whose config.json is, or has in it, this `content`."""

    def spoil(here: Path):
        path = here / "run" / "model" / "config.json"
        if not isinstance(content, dict):
            return holding("run/model/config.json", content)(here)
        parts = json.loads(path.read_text())
        for part, changes in content.items():
            if isinstance(changes, dict) and isinstance(parts.get(part), dict):
                parts[part] |= changes
            else:
                parts[part] = changes
        path.write_text(json.dumps(parts))

    return Case(f"model: {title}", "cpc_features", writing(), says, spoil=spoil)


def weighted(title, content: bytes | None, *says) -> Case:
    """cpc_features with a model whose file of weights holds this `content`."""
    spoil = holding("run/model/model.safetensors", content)
    return Case(f"model: {title}", "cpc_features", writing(), says, spoil=spoil)


FEATURES = [
    written("precision", "fp64", "launch.precision = 'fp64'"),
    written("n_gpus", -1, "launch.n_gpus = -1"),
    written("n_gpus", True, "launch.n_gpus", "True is neither"),
    written("model", LONG, "neither a folder nor a name on the hub"),
    written("model", "", "holds no model"),
    written("model", "a b c", "neither a folder nor a name on the hub"),
    written("model", "{here}/a\0b", "holds a zero byte"),
    written("model", "nobody/nothing-of-this-name", "cannot be loaded", "out of reach"),
    written(
        "model", "/dev/null", "/dev/null", "neither a folder nor a name on the hub"
    ),
    written("model", "{run}", "holds no model", "model folder of a finished run"),
    written("out", "{here}/a\0b", "holds a zero byte"),
    written("out", LONG, "too long"),
    written("out", "/dev/null", "/dev/null"),
    written("out", "/proc/features", "/proc/features"),
    written("out", "~nobody-of-this-name/x", "~nobody-of-this-name/x"),
    written("out", "{run}/config.json", "config.json", "give another folder as out"),
    written("data", "", "data = ''", "no such folder"),
    written("data", "{run}", "no audio in"),
    modelled("config empty", b"", "config.json cannot be read"),
    modelled("config null", b"null", "config.json does not describe"),
    modelled("config not UTF-8", b"\xff\xff", "config.json cannot be read"),
    modelled("config deep", DEEP.encode(), "config.json"),
    modelled("encoder a list", {"encoder": []}, "cannot be loaded"),
    modelled("encoder null", {"encoder": None}, "cannot be loaded"),
    modelled("no such field", {"encoder": {"colour": 1}}, "cannot be loaded", "colour"),
    modelled("text for kernels", {"encoder": {"kernels": "10"}}, "cannot be loaded"),
    modelled(
        "other channels", {"encoder": {"channels": [8]}}, "cannot be loaded", "size"
    ),
    modelled("vast", {"encoder": {"channels": [65_536]}}, "allocate memory"),
    modelled("vast context", {"context": {"size": 65_536}}, "allocate memory"),
    modelled("another context", {"context": {"kind": "lstm"}}, "cannot be loaded"),
    modelled(
        "unknown context", {"context": {"kind": "rnn"}}, "cannot be loaded", "rnn"
    ),
    modelled(
        "more layers", {"context": {"layers": 2}}, "cannot be loaded", "bias_hh_l1"
    ),
    weighted("weights gone", None, "holds no model, as model.safetensors is missing"),
    weighted("weights empty", b"", "cannot be loaded"),
    weighted("weights of no header", b"\xff" * 100, "cannot be loaded"),
    weighted("no tensors", b"\x02\0\0\0\0\0\0\0{}", "cannot be loaded", "issing"),
]


# ---------------------------------------------------------------------------------
# Packing, alignment, the cache, and other commands


def packed(title, *arguments, says, **more) -> Case:
    return Case(f"pack: {title}", "cpc_pack", list(arguments), says, **more)


def wav(rate=16_000, channels=1, bits=16, size=None, content=b"") -> bytes:
    """A WAV file whose header says this, of `content`."""
    size = len(content) if size is None else size
    block = max(1, channels * bits // 8)
    head = struct.pack(
        "<HHIIHH", 1, channels, rate, rate * block % 2**32, block % 2**16, bits
    )
    data = struct.pack("<I", size) + content
    return b"RIFF\xff\xff\xff\x7fWAVEfmt \x10\0\0\0" + head + b"data" + data


def recorded(title, content: bytes, *says) -> Case:
    """cpc_pack of a folder with one file, of this content."""
    spoil = holding("c/a.wav", content)
    says = "none of the 1 audio files", "a.wav", *says
    return packed(title, "{here}/c", says=says, spoil=spoil)


NOISE = bytes(range(256)) * 400
PACKING = [
    packed("zero bytes", "{here}/a\0b", says=("zero byte",)),
    packed("into zero bytes", "{speech}", "{here}/a\0b", says=("zero byte",)),
    packed("into /dev/null", "{speech}", "/dev/null", says=("/dev/null",)),
    packed("into /sys", "{speech}", "/sys/packed", says=("could not be written",)),
    packed("into ~nobody", "{speech}", "~nobody-of-this/x", says=("~nobody-of-this",)),
    packed("the root of processes", "/proc/self/fdinfo", says=("no audio",)),
    packed("a missing subset", "librispeech:../..", says=("no subset '../..'",)),
    packed(
        "workers beyond reason", "{speech}", "--workers", "many", says=("many",), code=2
    ),
    recorded("no bytes", b""),
    recorded("a header alone", wav(), "empty"),
    recorded("0 Hz", wav(rate=0, content=NOISE)),
    recorded("1 Hz", wav(rate=1, content=NOISE), "its rate is 1 Hz"),
    recorded("4 GHz", wav(rate=2**32 - 1, content=NOISE), "not readable"),
    recorded("no channels", wav(channels=0, content=NOISE)),
    recorded("65,535 channels", wav(channels=65_535, content=NOISE)),
    recorded("no bits", wav(bits=0, content=NOISE)),
    recorded("a page of HTML", b"<html>not found</html>", "not readable as audio"),
    packed(
        "a cache that is a file",
        "{speech}",
        says=("could not be written", "CPC_NB_CACHE"),
        spoil=holding("cache", b""),
        environment={"CPC_NB_CACHE": "{here}/cache"},
    ),
    packed(
        "a cache in /proc",
        "{speech}",
        says=("could not be written", "CPC_NB_CACHE"),
        environment={"CPC_NB_CACHE": "/proc/cache"},
    ),
    packed(
        "a cache of nobody",
        "{speech}",
        says=("~nobody-of-this-name",),
        environment={"CPC_NB_CACHE": "~nobody-of-this-name/cache"},
    ),
]


def aligned(title, out="{here}/phones.txt", *, says, **more) -> Case:
    arguments = options({"data": "{speech}", "out": out} | more)
    return Case(f"align: {title}", "cpc_align", arguments, says)


OTHERS = [
    aligned("no transcripts", says=("no transcript",)),
    aligned("into zero bytes", "{here}/a\0b", says=("zero byte",)),
    aligned("into a long name", LONG, says=("long",)),
    aligned("into /proc", "/proc/phones.txt", says=("no transcripts",)),
    aligned("into a device", "/dev/null", says=("/dev/null",)),
    aligned("workers true", workers=True, says=("workers = True",)),
    aligned("workers a half", workers=0.5, says=("workers = 0.5",)),
    aligned("data of zero bytes", data="a\0b", says=("zero byte",)),
    Case(
        "paper: no corpus", "cpc_nb.paper", ["--folder", "2024"], ("--data is missing",)
    ),
    Case(
        "paper: a seed that is true",
        "cpc_nb.paper",
        options({"data": "{speech}", "folder": "{here}/f", "seeds": "[true]"}),
        ("no phones.txt",),
    ),
    Case(
        "paper: a folder of zero bytes",
        "cpc_nb.paper",
        options({"data": "{speech}", "folder": "{here}/a\0b"}),
        ("zero byte",),
    ),
    Case(
        "benchmark: an unknown size",
        "cpc_nb.benchmark",
        ["--sizes", '["huge"]'],
        ("'huge' is unknown",),
    ),
    Case(
        "benchmark: no figures",
        "cpc_nb.benchmark",
        ["--old", "/dev/null", "--new", "/dev/null"],
        ("/dev/null holds no benchmark",),
    ),
    Case("benchmark: sizes a number", "cpc_nb.benchmark", ["--sizes", "3"], ("3",)),
    *(
        Case(f"{name} and an unknown option", name, ["--colour", "red"], (), 2)
        for name in COMMANDS
        if name != "cpc_nb.paper"
    ),
    *(
        Case(f"{name} and an option without a value", name, ["--out"], (), 2)
        for name in ("cpc_align", "cpc_features", "cpc_nb.benchmark")
    ),
    *(
        Case(
            f"train with {variable} {value}",
            "cpc_train",
            training(),
            (variable, "torchrun"),
            environment={variable: value},
        )
        for variable, value in (("RANK", "0"), ("RANK", "x"))
    ),
]


# ---------------------------------------------------------------------------------
# Signals, and outputs that take nothing

WORK = {
    "cpc_pack": (["{speech}", "{here}/packed"], "cpc_nb.corpus", "_decode_recording"),
    "cpc_features": (writing(), "cpc_nb.store", "encode_batch"),
    "cpc_evaluate": (
        evaluating(protocols='["speaker_window"]'),
        "cpc_nb.evaluate",
        "features_of_windows",
    ),
}
SIGNALS = {
    signal.SIGINT: "interrupted",
    signal.SIGTERM: "told to end by SIGTERM",
    signal.SIGHUP: "told to end by SIGHUP",
}
ENDS = [
    Case(
        f"{program} at {number.name}",
        program,
        arguments,
        (says,),
        128 + number,
        told=(module, function, number),
        leaves=(
            "/.packed.lock",
            "/evaluation",
            "/features",
            "/features.json",
            "/manifest.csv",
        ),
    )
    for program, (arguments, module, function) in WORK.items()
    for number, says in SIGNALS.items()
]
FULL = "No space left on device"
OUTPUTS = [
    *(
        Case(f"{name} --help, full", name, ["--help"], (FULL,), out="/dev/full")
        for name in COMMANDS
        if name != "cpc_nb.paper"
    ),
    *(
        Case(f"{name} --help, closed", name, ["--help"], (), 141, out=CLOSED)
        for name in COMMANDS
    ),
    *(
        Case(
            f"{name} --help, ASCII",
            name,
            ["--help"],
            ("usage",),
            0,
            environment={"PYTHONIOENCODING": "ascii"},
        )
        for name in COMMANDS
    ),
    packed("output full", "{speech}", says=(FULL,), out="/dev/full"),
    packed("output closed", "{speech}", says=(), code=141, out=CLOSED),
    packed(
        "ASCII",
        "{speech}",
        says=("voices: 24 utterances",),
        code=0,
        environment={"PYTHONIOENCODING": "ascii"},
    ),
]


# ---------------------------------------------------------------------------------
# The table


TABLE = (
    CONFIGURATIONS
    + PATHS
    + RUNS
    + EVALUATIONS
    + FEATURES
    + PACKING
    + OTHERS
    + ENDS
    + OUTPUTS
)


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
        {k: fill(part, here, voices) for k, part in case.environment.items()},
        case.out,
        case.told,
    )
    says = [fill(part, here, voices) for part in case.says]
    assert_answer(answer, case.program, case.code, *says)
    after = look(here)
    new = {path for path in after if path.endswith(case.leaves)} - set(before)
    assert {path: after[path] for path in set(after) - new} == before
