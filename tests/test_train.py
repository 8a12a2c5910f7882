"""Whole runs as users start them.

The run folder's contract, kills and resumption, the exported model, and that
training learns."""

import filecmp
import hashlib
import io
import json
import math
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import nbclient
import nbformat
import numpy as np
import pytest
import torch
import torchaudio
from conftest import (
    BIN,
    RATE,
    ROOT,
    SMALL,
    SPEECH,
    options,
    papermill,
    run,
    script,
    write_corpus,
)
from matplotlib.image import imread
from safetensors.torch import load_file, save

from cpc_nb.checkpoint import RunFolder
from cpc_nb.config import Config, ConfigError, make_config, write_atomically
from cpc_nb.corpus import pack
from cpc_nb.data import Windows
from cpc_nb.evaluate import evaluate
from cpc_nb.model import CPC
from cpc_nb.splits import split
from cpc_nb.trainer import learning_rate, train

LINE = {
    "step": int,
    "epoch": float,
    "audio_seconds": float,
    "wall_seconds": float,
    "audio_seconds_per_second": float,
    "waited_for_data_seconds": float,
    "lr": float,
    "loss": float,
    "loss_per_step": list,
    "accuracy_per_step": list,
}


def parameters(speech, run_dir, **more) -> dict:
    return {
        "data": str(speech),
        "run_dir": str(run_dir),
        "max_steps": 6,
        "batch_size": 8,
        "n_gpus": 0,
        "precision": "fp32",
        "overrides": SMALL,
        **more,
    }


def sizes(preset) -> dict:
    """Overrides for a small run; `minimal` keeps its group size of 88."""
    return {
        name: value
        for name, value in SMALL.items()
        if preset != "minimal" or name != "data.group_size"
    }


@pytest.fixture(scope="module")
def runs(speech, tmp_path_factory):
    """`runs(preset)`: a trained and evaluated run, and what the evaluation printed."""
    made = {}

    def get(preset: str):
        if preset not in made:
            run = tmp_path_factory.mktemp("runs") / preset
            done = papermill(
                "04_train.ipynb",
                run / "04_train.ipynb",
                parameters(speech, run, preset=preset, overrides=sizes(preset)),
            )
            assert done.code == 0, done.output[-4000:]
            if preset == "demo":
                done = papermill(
                    "05_evaluate.ipynb",
                    run / "evaluation" / "05_evaluate.ipynb",
                    {"run_dir": run, "tsne_speakers": 0.5},
                )
            else:
                done = script(
                    "cpc_evaluate",
                    "--run_dir",
                    run,
                    "--protocols",
                    "[]" if preset == "paper" else '["speaker_window"]',
                )
            assert done.code == 0, done.output[-4000:]
            made[preset] = run, done.output
        return made[preset]

    return get


PRESETS = pytest.mark.parametrize("preset", ["demo", "minimal", "paper"])


@PRESETS
def test_training_keeps_the_contract_of_a_run_folder(runs, speech, preset):
    run, _ = runs(preset)
    config, K = (
        Config.load(run / "config.json"),
        {"demo": 12, "minimal": 4, "paper": 12}[preset],
    )
    assert config == make_config(
        preset,
        {
            **sizes(preset),
            "data.source": str(speech),
            "train.max_steps": 6,
            "train.epochs": None,
            "train.batch_size": 8,
            "launch.n_gpus": 0,
            "launch.precision": "fp32",
        },
    )
    lines = [
        json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()
    ]
    assert [line["step"] for line in lines] == [2, 4, 6] and [
        ("valid_loss" in line) for line in lines
    ] == [False, True, True]
    steps_an_epoch = len(windows_of(run, speech))
    for line in lines:
        assert {name: type(line[name]) for name in LINE} == LINE
        assert len(line["loss_per_step"]) == len(
            line["accuracy_per_step"]
        ) == K and line["loss"] == pytest.approx(np.mean(line["loss_per_step"]))
        assert all(
            math.isfinite(loss) and loss > 0 for loss in line["loss_per_step"]
        ) and all(0 <= value <= 1 for value in line["accuracy_per_step"])
        assert line["audio_seconds"] == pytest.approx(line["step"] * 8 * 1.28) and line[
            "epoch"
        ] == pytest.approx(line["step"] / steps_an_epoch)
        assert line["lr"] == learning_rate(
            line["step"] - 1, config.train, 6, steps_an_epoch
        )
    assert (
        lines[0]["wall_seconds"] < lines[1]["wall_seconds"] < lines[2]["wall_seconds"]
    )

    index = json.loads((run / "checkpoints" / "index.json").read_text())
    best = min(
        (line for line in lines if "valid_loss" in line),
        key=lambda line: line["valid_loss"],
    )
    assert (
        index["last"] == "step-00000006"
        and index["best"] == f"step-{best['step']:08d}"
        and index["best_valid_loss"] == best["valid_loss"]
    )
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        "index.json",
        "step-00000004",
        "step-00000006",
    ]
    weights = load_file(run / "checkpoints" / index["best"] / "weights.safetensors")
    model = load_file(run / "model" / "model.safetensors")
    assert model and all(
        torch.equal(value, weights[f"model.{name}"]) for name, value in model.items()
    )
    assert sum(name.startswith("criterion.") for name in weights) == K
    assert json.loads((run / "model" / "config.json").read_text())["encoder"][
        "channels"
    ] == [16]

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    for name in ("loss", "lr", "audio_seconds_per_second"):
        assert [(e.step, pytest.approx(e.value)) for e in events.Scalars(name)] == [
            (line["step"], line[name]) for line in lines
        ]
    assert {f"accuracy/{k}_ahead" for k in config.loss.steps} <= set(
        events.Tags()["scalars"]
    )

    cells = nbformat.read(run / "04_train.ipynb", 4).cells
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    assert not any(output.output_type == "error" for output in outputs)
    text = "".join(output.get("text", "") for output in outputs)
    assert (
        "step       6 of 6" in text and "held-out speech" in text and str(run) in text
    )
    # the run's curves among them
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 2
    if preset == "minimal":
        assert "a batch of 8 is smaller than a group of 88: it is one group" in text
    leftovers = [path.name for path in run.rglob(".*")]
    assert not leftovers


def windows_of(run, speech):
    """The windows that a run trained on."""
    config, corpus = Config.load(run / "config.json"), pack(speech)
    return Windows(
        corpus,
        split(corpus, config.data).train,
        8,
        config.group_size,
        config.train.seed,
        group_by=config.data.group_by,
    )


@PRESETS
def test_evaluation_keeps_its_contract(runs, speech, preset):
    run, output = runs(preset)
    metrics = json.loads((run / "evaluation" / "metrics.json").read_text())
    asked = {
        "demo": {"speaker", "speaker_window"},
        "minimal": {"speaker_window"},
        "paper": set(),
    }[preset]
    always = {"prediction_accuracy", "prediction_deviation", "data", "model"}
    assert set(metrics) == always | asked  # absent, not zero
    for protocol in asked & {"speaker_window"}:
        assert {
            "context",
            "encoder",
            "mfcc",
            "random_context",
            "random_encoder",
        } == set(metrics[protocol])
        for scores in metrics[protocol].values():
            assert set(scores) == {"train", "test"} and all(
                0 <= value <= 1 for value in scores.values()
            )
        assert metrics[protocol]["mfcc"]["test"] > 0.3  # four voices
    for views in metrics.get("speaker", {}).values():
        assert set(views) == {"last", "summary"}
        for scores in [*views["last"].values(), *views["summary"].values()]:
            assert set(scores) == {"train", "test", "deviation"}
            assert all(0 <= value <= 1 for value in scores.values())
    config, corpus = Config.load(run / "config.json"), pack(speech)
    test = split(corpus, config.data).test
    assert len(metrics["prediction_accuracy"]) == len(config.loss.steps) and all(
        0 <= value <= 1 for value in metrics["prediction_accuracy"]
    )
    data, model = metrics["data"], metrics["model"]
    assert (data["corpus"], data["speakers"], data["utterances"]) == (
        "voices",
        4,
        32,
    ) and data["windows"] == (corpus.lengths[test] // 20_480).sum()
    assert data["duration_s"] == pytest.approx(corpus.lengths[test].sum() / RATE)
    assert (model["preset"], model["training_steps"], model["steps_ahead"]) == (
        preset,
        6,
        list(config.loss.steps),
    )
    assert model["parameters"] == sum(
        value.numel()
        for value in load_file(run / "model" / "model.safetensors").values()
    )

    pictures = {path.stem: imread(path) for path in (run / "evaluation").glob("*.png")}
    assert set(pictures) == {"training", "prediction_accuracy", "tsne", "utterance"} | (
        {"speaker"} & asked
    )
    for picture in pictures.values():
        assert (
            min(picture.shape[:2]) > 250
            and len(np.unique(picture.reshape(-1, picture.shape[2]), axis=0)) > 50
            and picture.std() > 0.02
        )

    page = (run / "evaluation" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == len(pictures)
    assert (
        not re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?(?!data:)[^\s"'>)]+""", page)
        and "http" not in re.sub(r"base64,[^\"]+", "", page)
        and "<script" not in page
    )
    for value in metrics.get("speaker_window", {}).values():
        assert f"<td>{value['test']:.1%}</td>" in page
    for views in metrics.get("speaker", {}).values():
        found = views["summary"]["50"]
        cell = f"{100 * found['test']:.1f} ± {100 * found['deviation']:.1f}"
        assert f"<td>{cell}</td>" in page
    if preset == "demo":
        cells = nbformat.read(run / "evaluation" / "05_evaluate.ipynb", 4).cells
        shown = [output for cell in cells for output in cell.get("outputs", [])]
        assert (
            not any(output.output_type == "error" for output in shown)
            and sum("image/png" in output.get("data", {}) for output in shown) >= 4
        )
        output = "".join(part.get("text", "") for part in shown)
    assert (
        f"report: {run / 'evaluation' / 'report.html'}" in output
        and f"{metrics['prediction_accuracy'][0]:.1%} 1 step ahead" in output
    )


def test_an_evaluation_is_the_same_wherever_run_and_corpus_lie(runs, speech, tmp_path):
    run, _ = runs("minimal")
    copy, moved = (
        shutil.copytree(run, tmp_path / "copy"),
        pack(speech, tmp_path / "packed").root,
    )
    done = script(
        "cpc_evaluate",
        "--run_dir",
        copy,
        "--data",
        moved,
        "--protocols",
        "speaker_window",
    )
    assert done.code == 0, done.output
    before, after = (
        json.loads((folder / "evaluation" / "metrics.json").read_text())
        for folder in (run, copy)
    )
    # The corpus is recognised by its content, so its training part stays training data.
    assert after == before


def test_an_evaluation_on_a_single_window(runs, tmp_path):
    """One point has no t-SNE, and one window has no group to predict within."""
    copy = shutil.copytree(
        runs("minimal")[0],
        tmp_path / "copy",
        ignore=shutil.ignore_patterns("evaluation"),
    )
    metrics = evaluate(
        copy,
        data=str(write_corpus(tmp_path / "one", 1, 1, duration_s=1.5)),
        protocols=[],
    )
    assert set(metrics) == {"data", "model"}
    assert (metrics["data"]["windows"], metrics["data"]["held_out"]) == (
        1,
        "another corpus",
    )
    folder = copy / "evaluation-one"
    assert not (folder / "tsne.png").exists()
    assert "t-SNE" not in (folder / "report.html").read_text()


def test_console_scripts(runs, speech, tmp_path):
    """cpc_train makes papermill's run, cpc_features writes what `encode` gives."""
    run, _ = runs("demo")
    done = script("cpc_train", *options(parameters(speech, tmp_path / "run")))
    assert done.code == 0, done.output
    assert f"cpc_evaluate --run_dir {tmp_path / 'run'}" in done.last
    assert_same_weights(run, tmp_path / "run")
    done = script("cpc_pack", speech, tmp_path / "packed")
    assert (
        done.code == 0
        and "80 utterances, 10 speakers" in done.output
        and done.last == str(tmp_path / "packed")
    )
    done = script(
        "cpc_features",
        "--model",
        run / "model",
        "--data",
        tmp_path / "packed",
        "--out",
        tmp_path / "features",
    )
    assert done.code == 0, done.output
    model, corpus = CPC.from_pretrained(run / "model"), pack(speech)
    assert len(list((tmp_path / "features").glob("*.npz"))) == 80
    for index in (0, 79):
        with np.load(tmp_path / "features" / f"{corpus.ids[index]}.npz") as saved:
            features = model.encode(np.array(corpus.utterance(index)))
            np.testing.assert_allclose(saved["encoder"], features.encoder, atol=1e-6)
            np.testing.assert_allclose(saved["context"], features.context, atol=1e-6)


def test_help_does_not_load_pytorch():
    done = run(sys.executable, "-X", "importtime", BIN / "cpc_train", "--help")
    assert (
        done.code == 0
        and "--max_steps" in done.output
        and "cpc_nb.config" in done.output
        and not re.search(r"\| +torch", done.output)
    )


def assert_same_weights(one, other):
    names = [RunFolder(run).index["last"] for run in (one, other)]
    assert names[0] == names[1]
    first, second = (
        load_file(run / "checkpoints" / names[0] / "weights.safetensors")
        for run in (one, other)
    )
    assert first.keys() == second.keys() and all(
        torch.equal(first[name], second[name]) for name in first
    )


def lines_of(run) -> list[dict]:
    """Lines of metrics.jsonl without the fields that depend on the clock."""
    return [
        {
            name: value
            for name, value in line.items()
            if name
            not in (
                "wall_seconds",
                "audio_seconds_per_second",
                "waited_for_data_seconds",
            )
        }
        for line in RunFolder(run).metrics()
    ]


def test_a_run_that_is_killed_and_resumed_is_the_run_that_was_not(speech, tmp_path):
    given = {
        "max_steps": 60,
        "overrides": {
            **SMALL,
            "train.checkpoint_every": 4,
            "train.log_every": 4,
            "train.valid_every": 20,
        },
    }
    done = script(
        "cpc_train", *options(parameters(speech, tmp_path / "whole", **given))
    )
    assert done.code == 0, done.output
    kills = 0
    while not (tmp_path / "killed" / "model").exists():
        process = subprocess.Popen(
            [
                BIN / "cpc_train",
                *options(parameters(speech, tmp_path / "killed", **given)),
            ],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        if kills < 3:
            metrics = tmp_path / "killed" / "metrics.jsonl"
            before = metrics.stat().st_size if metrics.exists() else 0
            while process.poll() is None and not (
                metrics.exists() and metrics.stat().st_size > before
            ):
                time.sleep(0.005)
            # The kill may come during a step, a validation or a checkpoint.
            time.sleep(random.uniform(0, 0.3))
            process.kill()
            kills += process.wait() == -signal.SIGKILL
        else:
            assert process.wait() == 0
    assert kills > 0
    assert_same_weights(tmp_path / "whole", tmp_path / "killed")
    assert lines_of(tmp_path / "whole") == lines_of(tmp_path / "killed")
    assert filecmp.cmp(
        tmp_path / "whole" / "model" / "model.safetensors",
        tmp_path / "killed" / "model" / "model.safetensors",
        shallow=False,
    )
    assert not list((tmp_path / "killed").rglob(".*"))


def config_of(speech, **overrides) -> Config:
    return make_config(
        "demo",
        {
            **SMALL,
            "data.source": str(speech),
            "train.batch_size": 8,
            "launch.n_gpus": 0,
            "launch.precision": "fp32",
            "train.warmup_steps": 0,
            **{name.replace("__", "."): value for name, value in overrides.items()},
        },
    )


def test_a_run_goes_on_with_a_larger_budget(speech, tmp_path):
    whole = train(
        config_of(speech, train__schedule="constant", train__max_steps=12),
        tmp_path / "whole",
    )
    parts = train(
        config_of(speech, train__schedule="constant", train__max_steps=5),
        tmp_path / "parts",
    )
    train(config_of(speech, train__schedule="constant", train__max_steps=12), parts)
    assert_same_weights(whole, parts)
    assert [line["step"] for line in RunFolder(parts).metrics()] == [
        2,
        4,
        5,
        6,
        8,
        10,
        12,
    ]  # the first run ended at 5
    assert RunFolder(parts).config().train.max_steps == 12
    # nothing is left to do
    train(config_of(speech, train__schedule="constant", train__max_steps=12), parts)
    assert_same_weights(whole, parts)
    cosine = [
        learning_rate(4, config_of(speech, train__schedule="cosine").train, total, 10)
        for total in (5, 12)
    ]
    # A cosine schedule depends on its last step, so a larger budget is another run.
    assert cosine[0] < cosine[1]


@pytest.mark.parametrize(
    ("preset", "changes"),
    [
        ("modern", {}),
        ("demo", {"loss.shared_transformer": True, "loss.dropout": 0.5}),
        ("demo", {"loss.steps": [2, 4, 6], "loss.align_frames": 12}),
        ("paper", {"loss.steps": [2, 4, 6], "loss.align_frames": 12}),
        ("demo", {"train.optimizer": "muon"}),
    ],
    ids=["modern", "shared", "aligned", "aligned to a pool", "muon"],
)
def test_other_parts_train_and_resume(speech, tmp_path, preset, changes):
    """A run that stops and goes on is the run that did not, dropout included."""
    fields = {**SMALL, **changes, "data.source": str(speech), "train.epochs": None}
    fields |= {"launch.n_gpus": 0, "launch.precision": "fp32", "train.batch_size": 8}
    weights = {}
    for name, budgets in {"whole": [6], "resumed": [3, 6]}.items():
        for budget in budgets:
            config = make_config(preset, {**fields, "train.max_steps": budget})
            run = train(config, tmp_path / name)
        weights[name] = load_file(run / "model" / "model.safetensors")
    for name, value in weights["whole"].items():
        assert torch.equal(value, weights["resumed"][name]), name


def test_epochs_end_a_run(speech, tmp_path):
    run = train(
        config_of(speech, train__epochs=1, train__max_steps=None), tmp_path / "run"
    )
    last = RunFolder(run).metrics()[-1]
    assert (last["step"], last["epoch"]) == (len(windows_of(run, speech)), 1.0)


@pytest.mark.parametrize(
    "state",
    [
        "corpus without config",
        "torn line",
        "leftovers",
        "no index",
    ],
)
def test_what_a_kill_may_leave_is_resumed_from(speech, tmp_path, state):
    """States between two writes, made by hand because a kill rarely hits them."""
    config = config_of(speech, train__max_steps=6)
    whole = train(config, tmp_path / "whole")
    run = shutil.copytree(whole, tmp_path / "run")
    if state == "corpus without config":  # before the first checkpoint
        (run / "config.json").unlink()
        shutil.rmtree(run / "checkpoints")
    if state == "torn line":
        with open(run / "metrics.jsonl", "a") as file:
            file.write('{"step": 8, "lo')
    if state == "leftovers":
        (run / "checkpoints" / ".step-00000008").mkdir()
        (run / "checkpoints" / ".step-00000008" / "weights.safetensors").write_bytes(
            b"half"
        )
        (run / ".model").mkdir()
        shutil.rmtree(run / "model")
    if state == "no index":
        (run / "checkpoints" / "index.json").unlink()
    train(config, run)
    assert_same_weights(whole, run)
    assert lines_of(whole) == lines_of(run)
    assert filecmp.cmp(
        whole / "model" / "model.safetensors",
        run / "model" / "model.safetensors",
        shallow=False,
    ) and not list(run.rglob(".*"))


def test_the_corpus_is_noted_before_the_configuration(speech, tmp_path, monkeypatch):
    """A run cut short between the two starts anew; it never lacks its corpus.json."""
    import cpc_nb.checkpoint as checkpoint

    def cut_short(path, content):
        write_atomically(path, content)
        raise KeyboardInterrupt

    config = config_of(speech, train__max_steps=2)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_atomically", cut_short)
        with pytest.raises(KeyboardInterrupt):
            train(config, tmp_path / "run")
    assert (tmp_path / "run" / "corpus.json").exists()
    assert not (tmp_path / "run" / "config.json").exists()
    train(config, tmp_path / "run")
    (tmp_path / "run" / "corpus.json").unlink()
    with pytest.raises(ConfigError, match="corpus.json cannot be read.*restore it"):
        train(config, tmp_path / "run")


def test_checkpoints_without_a_configuration_are_not_resumed(speech, tmp_path):
    """Their configuration is unknown, even where a new network has the same shapes."""
    run = train(config_of(speech, train__max_steps=2), tmp_path / "run")
    (run / "config.json").unlink()
    with pytest.raises(ConfigError, match="has checkpoints and no config.json"):
        train(config_of(speech, train__max_steps=4, train__lr=5e-3), run)
    assert RunFolder(run).index["last"] == "step-00000002"


def test_a_run_that_cannot_go_on_keeps_its_configuration(speech, tmp_path):
    """Where no checkpoint can be read, the larger budget is not saved."""
    run = train(config_of(speech, train__max_steps=2), tmp_path / "run")
    (run / "checkpoints" / "step-00000002" / "optimizer.pt").write_bytes(b"")
    before = (run / "config.json").read_bytes()
    with pytest.warns(UserWarning, match="is damaged and left aside"):
        with pytest.raises(ConfigError, match="no checkpoint can be read"):
            train(config_of(speech, train__max_steps=4), run)
    assert (run / "config.json").read_bytes() == before


def split_files(corpus, folder, **parts) -> dict:
    """Write lists of utterance ids to `folder`; return the overrides that name them."""
    for name, utterances in parts.items():
        lines = [f"{corpus.ids[index]}\n" for index in utterances]
        (folder / f"{name}.txt").write_text("".join(lines))
    lists = {f"data__{name}_list": str(folder / f"{name}.txt") for name in parts}
    return {"data__split_by": "files", **lists}


def test_the_lists_that_divide_the_corpus_belong_to_the_run(speech, tmp_path):
    corpus = pack(speech)
    one, two, three = np.arange(40), np.arange(40, 72), np.arange(72, 80)
    lists = split_files(corpus, tmp_path, train=one, valid=three, test=two)
    run = train(config_of(speech, train__max_steps=2, **lists), tmp_path / "run")
    heard = RunFolder(run).heard()
    assert heard.dtype == np.uint64 and len(heard) == 48
    assert np.array_equal(heard, np.unique(heard))
    for parts in (
        {"train": two, "valid": three, "test": one},  # it would train on the test list
        {"train": one[:-1], "valid": three, "test": two},
        {"train": three, "valid": one, "test": two},  # train and valid swapped
    ):
        split_files(corpus, tmp_path, **parts)
        with pytest.raises(ConfigError, match="split is '.*' now and was"):
            train(config_of(speech, train__max_steps=4, **lists), run)
    (elsewhere := tmp_path / "elsewhere").mkdir()
    lists = split_files(corpus, elsewhere, train=one, valid=three, test=two)
    train(config_of(speech, train__max_steps=4, **lists), run)  # the same lists, moved
    assert RunFolder(run).index["last"] == "step-00000004"


def test_a_run_without_validation(speech, tmp_path):
    """The last checkpoint is the model; the notebook measures on training speech."""
    done = papermill(
        "04_train.ipynb",
        tmp_path / "run" / "04_train.ipynb",
        parameters(
            speech, tmp_path / "run", overrides={**SMALL, "data.valid_fraction": 0}
        ),
    )
    assert done.code == 0, done.output[-3000:]
    assert "on training speech" in "".join(
        output.get("text", "")
        for cell in nbformat.read(tmp_path / "run" / "04_train.ipynb", 4).cells
        for output in cell.get("outputs", [])
    )
    index = json.loads(
        (tmp_path / "run" / "checkpoints" / "index.json").read_text(),
        parse_constant=lambda name: pytest.fail(f"{name} is not JSON"),
    )
    assert index["best"] == index["last"] and not any(
        "valid_loss" in line for line in RunFolder(tmp_path / "run").metrics()
    )


def test_a_loss_that_is_not_finite_ends_the_run(speech, tmp_path):
    done = script(
        "cpc_train",
        *options(
            parameters(
                speech,
                tmp_path / "run",
                max_steps=40,
                lr=1e6,
                overrides={
                    **SMALL,
                    "train.grad_clip": 0,
                    "encoder.norm": "none",
                    "train.warmup_steps": 0,
                    "loss.scale": False,
                },
            )
        ),
    )
    assert done.code == 1 and "Traceback" not in done.output, done.output
    assert re.search(
        r"^cpc_train: the loss is not finite at step \d+; the last good checkpoint is "
        r".*; lower train.lr or set train.grad_clip; the windows of the step: .*$",
        done.last,
    )
    assert not (tmp_path / "run" / "model").exists()


def test_training_that_collapsed_says_so(speech, tmp_path):
    """Dead ReLUs give a finite loss, that of guessing: an error, also when resumed."""
    rate = {"max_steps": 60, "lr": 0.1, "preset": "minimal"}
    given = parameters(speech, tmp_path / "run", **rate, overrides=sizes("minimal"))
    for _ in range(2):
        done = script("cpc_train", *options(given))
        assert done.code == 1 and "Traceback" not in done.output, done.output
        assert done.last.startswith(
            "cpc_train: training has collapsed: the features of"
        )
        assert not (tmp_path / "run" / "model").exists()
    last = RunFolder(tmp_path / "run").metrics()[-1]
    assert last["collapsed"] is True and last["encoder_deviation"] < 1e-3


def test_a_run_that_learned_nothing_yet_says_so(speech, tmp_path, capsys):
    run = train(config_of(speech, train__max_steps=2, train__lr=1e-9), tmp_path / "run")
    assert "nothing has been learned yet" in capsys.readouterr().out
    assert RunFolder(run).metrics()[-1]["collapsed"] is False


def test_a_validation_loss_that_is_no_number_is_never_the_best(
    speech, tmp_path, monkeypatch
):
    import cpc_nb.trainer as module

    losses = iter([math.nan, 2.0, math.nan, 1.0, math.inf])

    def validate(objective, *_):
        steps = len(objective.config.loss.steps)
        return torch.full((steps,), next(losses)), torch.zeros(steps)

    monkeypatch.setattr(module, "validate", validate)
    run = train(config_of(speech, train__max_steps=20), tmp_path / "run")
    index = RunFolder(run).index
    assert (index["best"], index["best_valid_loss"]) == ("step-00000016", 1.0)
    assert RunFolder(run).load("best").checkpoint == "step-00000016"
    assert RunFolder(run).load("last").checkpoint == "step-00000020"


def rewrite(checkpoint, **files):
    """Change files of a checkpoint, and renew its checksums."""
    sums = json.loads((checkpoint / "checksums.json").read_text())
    for stem, content in files.items():
        name = next(name for name in sums if name.startswith(stem))
        (checkpoint / name).write_bytes(content)
        sums[name] = hashlib.sha256(content).hexdigest()
    (checkpoint / "checksums.json").write_text(json.dumps(sums))


def test_weights_that_are_not_finite_are_neither_loaded_nor_exported(speech, tmp_path):
    run = RunFolder(train(config_of(speech, train__max_steps=6), tmp_path / "run"))
    for name in run.names():
        weights = load_file(run.checkpoints / name / "weights.safetensors")
        next(iter(weights.values())).view(-1)[0] = math.nan
        rewrite(run.checkpoints / name, weights=save(weights))
    shutil.rmtree(run.path / "model")
    with pytest.warns(UserWarning, match="holds NaN or infinite values"):
        with pytest.raises(ConfigError, match="no checkpoint can be read"):
            run.load("best")
        with pytest.raises(ConfigError, match="no checkpoint can be read"):
            train(config_of(speech, train__max_steps=6), run.path)
    assert not (run.path / "model").exists()


def short_moment(memory):
    memory["optimizer"]["state"][0]["exp_avg"] = torch.zeros(1)


def other_type(memory):
    moments = memory["optimizer"]["state"][0]
    moments["exp_avg"] = moments["exp_avg"].double()


def another_optimizer(memory):
    memory["optimizer"]["state"][0] = {"momentum_buffer": torch.zeros(3)}


def one_number_for_all(memory):
    """A view of one number in the right shape is harmless and accepted."""
    moments = memory["optimizer"]["state"][0]
    moments["exp_avg"] = torch.zeros(1).expand(moments["exp_avg"].shape)


def short_generator(memory):
    memory["generator"] = memory["generator"][:8]


def a_list(memory):
    memory["optimizer"] = [1, 2]


def huge_rate(memory):
    """The learning rate is read from the configuration, not from a checkpoint."""
    memory["optimizer"]["param_groups"] = [{"lr": 1e9}]


@pytest.mark.parametrize(
    "change, is_taken",
    [
        (short_moment, False),
        (other_type, False),
        (another_optimizer, False),
        (short_generator, False),
        (a_list, False),
        (one_number_for_all, True),
        (huge_rate, True),
    ],
)
def test_an_optimizer_that_was_changed_by_hand(speech, tmp_path, change, is_taken):
    """Otherwise PyTorch's fused Adam would read and write out of bounds."""
    run = RunFolder(train(config_of(speech, train__max_steps=4), tmp_path / "run"))
    last = run.checkpoints / run.index["last"]
    memory = torch.load(last / "optimizer.pt", weights_only=True)
    change(memory)
    torch.save(memory, buffer := io.BytesIO())
    rewrite(last, optimizer=buffer.getvalue())
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        train(config_of(speech, train__max_steps=6), run.path)
    left = [str(w.message) for w in warned if "is damaged" in str(w.message)]
    assert bool(left) is not is_taken, left


def test_metrics_with_lines_of_garbage(speech, tmp_path):
    """Such a run can still be read and resumed."""
    whole = train(
        config_of(speech, train__schedule="constant", train__max_steps=6),
        tmp_path / "whole",
    )
    run = train(
        config_of(speech, train__schedule="constant", train__max_steps=4),
        tmp_path / "run",
    )
    path = run / "metrics.jsonl"
    garbage = [b"garbage", b"[1]", b"\xff\xfe", b"{}", b'{"step": "2"}', b"null", b""]
    path.write_bytes(b"\n".join([*garbage, path.read_bytes()]))
    with pytest.warns(UserWarning, match="7 of 9 lines are not metrics"):
        assert [line["step"] for line in RunFolder(run).metrics()] == [2, 4]
        train(config_of(speech, train__schedule="constant", train__max_steps=6), run)
    assert lines_of(run) == lines_of(whole)


@pytest.mark.parametrize("file", ["corpus.json", "config.json"])
@pytest.mark.parametrize("content", [b"", b'{"a', b"[]", b"null", b"\xff\xfe{}", b"{}"])
def test_run_folders_whose_files_are_damaged(speech, tmp_path, file, content):
    run = train(config_of(speech, train__max_steps=2), tmp_path / "run")
    (run / file).write_bytes(content)
    if (file, content) == ("config.json", b"{}"):
        pytest.skip("an empty configuration is that of the defaults")
    with pytest.raises(ConfigError, match=file):
        train(config_of(speech, train__max_steps=4), run)
    if file == "corpus.json":
        with pytest.raises(ConfigError, match=file):
            RunFolder(run).heard()


def test_running_all_twice_trains_what_is_on_the_screen(speech, tmp_path):
    """All cells run twice in one kernel, with other parameters the second time."""
    notebook = nbformat.read(ROOT / "nbs" / "04_train.ipynb", 4)
    [at] = [
        number
        for number, cell in enumerate(notebook.cells)
        if "parameters" in cell.metadata.get("tags", [])
    ]
    defaults, cells = notebook.cells[at], notebook.cells[at + 1 :]

    def screen(**values) -> list:
        text = defaults.source
        for name, value in values.items():
            text = re.sub(rf"(?m)^({name}: \w+ =) [^#]*", rf"\1 {value!r}  ", text)
        return [nbformat.v4.new_code_cell(text), *cells]

    given = parameters(speech, tmp_path / "one", max_steps=2)
    setup = next(cell for cell in notebook.cells if "parameter_names," in cell.source)
    notebook.cells = [
        setup,
        *screen(**given),
        *screen(**{**given, "run_dir": str(tmp_path / "two"), "max_steps": 3}),
    ]
    nbclient.NotebookClient(notebook, kernel_name="python3").execute(cwd=str(ROOT))
    steps = [
        RunFolder(tmp_path / name).metrics()[-1]["step"] for name in ("one", "two")
    ]
    assert steps == [2, 3]


def test_a_kernel_in_nbs_means_the_same_folder(monkeypatch):
    monkeypatch.chdir(ROOT / "nbs")
    assert RunFolder("runs/demo").path == ROOT / "runs" / "demo"
    monkeypatch.chdir(ROOT / "tests")
    assert RunFolder("runs/demo").path == Path("runs/demo")
    monkeypatch.setenv("HOME", "/home/me")
    assert RunFolder("~/r").path == Path("/home/me/r")


def test_training_on_each_device(speech, tmp_path, device):
    """Trained, resumed, in bf16 and compiled: the losses are those of the CPU."""
    n_gpus = 0 if device.type == "cpu" else 1
    losses = {}
    for name, more in {
        "reference": {"launch__n_gpus": 0},
        "whole": {},
        "bf16": {"launch__precision": "bf16"},
        "compiled": {"launch__compile": True},
    }.items():
        more = {"launch__n_gpus": n_gpus, "train__schedule": "constant", **more}
        config = config_of(speech, train__max_steps=8, **more)
        run = train(config, tmp_path / name)
        losses[name] = [line["loss"] for line in RunFolder(run).metrics()]
    for name, tolerance in (("whole", 1e-4), ("compiled", 1e-3), ("bf16", 0.05)):
        assert losses[name] == pytest.approx(losses["reference"], rel=tolerance), name
    more = {"launch__n_gpus": n_gpus, "train__schedule": "constant"}
    for steps in (4, 8):
        train(config_of(speech, train__max_steps=steps, **more), tmp_path / "parts")
    parts, whole = lines_of(tmp_path / "parts"), lines_of(tmp_path / "whole")
    if device.type == "cpu":
        assert parts == whole
    # A GPU's kernels are chosen by trial, and may sum in another order.
    assert [line["loss"] for line in parts] == pytest.approx(losses["whole"], rel=1e-4)


def test_learning_happens(speech, tmp_path):
    """The next 10 ms are soon found among 129 candidates, for new speakers too."""
    run = train(
        make_config(
            "demo",
            {
                "data.source": str(speech),
                "data.test_fraction": 0.3,
                "data.valid_fraction": 0.1,
                "encoder.channels": [48],
                "encoder.standardise": "waveform",
                "context.kind": "gru",
                "context.size": 48,
                "context.init_memory_frames": 0,
                "data.group_size": 8,
                "train.max_steps": 150,
                "train.batch_size": 16,
                "train.lr": 2e-3,
                "train.warmup_steps": 20,
                "train.valid_windows": 32,
                "loss.steps": [1, 4],
                "loss.candidates": "sampled",
                "launch.n_gpus": 0,
                "launch.precision": "fp32",
            },
        ),
        tmp_path / "run",
    )
    first, last = RunFolder(run).metrics()[0], RunFolder(run).metrics()[-1]
    assert (
        last["valid_accuracy_per_step"][0] > 10 / 129
        and last["accuracy_per_step"][0] > 15 / 129
    )  # chance: 1 / 129
    assert last["valid_loss"] < math.log(129) - 1
    assert last["loss"] + 1 < first["loss"] < math.log(129) + 0.3


# The exported model


@pytest.mark.parametrize("preset", ["demo", "minimal"])
def test_encode(runs, preset):
    model = CPC.from_pretrained(runs(preset)[0] / "model")
    random, n = np.random.default_rng(0), 3 * RATE
    wave = np.sin(
        np.arange(n) / RATE * 2 * np.pi * 300
    ) * 0.3 + 0.01 * random.standard_normal(n)
    integers = np.rint(wave * 32768).astype(np.int16)
    features = model.encode(integers)
    T, H = model.n_frames(n), model.context.size
    assert (
        abs(T - 300) <= 3
        and features.encoder.shape == (T, 16)
        and features.context.shape == (T, H)
        and not features.context.requires_grad
    )

    def same(other, tolerance=1e-3):
        assert all(
            torch.allclose(one, two, atol=tolerance)
            for one, two in zip(features, other)
        )

    same(model.encode(integers / np.float32(32768)))  # float
    same(model.encode((integers / 32768).tolist()))  # a list, float64
    same(model.encode(torch.from_numpy(integers)))
    same(model.encode(np.stack([integers, integers]) / 32768))  # two equal channels
    same(model.encode(np.stack([integers, 0 * integers]) / 16384))  # averaged
    same(model.encode(integers, chunk_s=0.3), 1e-4)
    assert model.train().encode(integers).context.shape == (T, H) and model.training
    with torch.inference_mode():
        z, c = model.eval()(torch.from_numpy(integers)[None, None])
    same((z[0], c[0]))
    fine = torchaudio.functional.resample(torch.from_numpy(wave).float(), RATE, 44_100)
    again = model.encode(fine, 44_100)
    assert abs(len(again.context) - T) <= 1
    # away from the edges
    one, other = features.context[20 : T - 20], again.context[20 : T - 20]
    assert (
        torch.nn.functional.cosine_similarity(
            one - one.mean(), other - other.mean()
        ).mean()
        > 0.95
    )

    for bad, message in (
        (np.zeros(0), "not of shape"),
        (np.zeros((2, 2, 8)), "not of shape"),
        (np.full(n, np.nan), "NaN or infinite"),
        (np.full(n, np.inf), "NaN or infinite"),
        (np.zeros(50), "shorter than a frame; give at least"),
        (np.zeros((n, 2)), r"transpose \(N, channels\)"),
        (np.zeros(n, np.int32), "float in .* or int16"),
    ):
        with pytest.raises(ValueError, match=message):
            model.encode(bad)
    with pytest.raises(ValueError):
        model.encode(wave, 0)
    shortest = next(length for length in range(100, 1000) if model.n_frames(length))
    assert model.encode(wave[:shortest]).context.shape == (1, H)
    if preset == "minimal":
        assert shortest == 465
    silence = model.encode(np.zeros(n))
    assert silence.context.isfinite().all()


def test_a_model_survives_saving_and_loading(runs, tmp_path):
    model = CPC.from_pretrained(runs("minimal")[0] / "model")
    model.save_pretrained(tmp_path / "again")
    again, wave = (
        CPC.from_pretrained(tmp_path / "again"),
        np.random.default_rng(0).standard_normal(9000),
    )
    assert again.encoder.config == model.encoder.config and torch.equal(
        again.encode(wave).context, model.encode(wave).context
    )


@pytest.mark.parametrize("preset", ["minimal", "paper"])
def test_real_speech(preset, tmp_path):
    """Two steps of the published networks on real recordings."""
    if not SPEECH.is_dir():
        pytest.skip(f"needs the corpus in {SPEECH}")
    done = script(
        "cpc_train",
        *options(
            {
                "data": str(SPEECH),
                "run_dir": str(tmp_path / "run"),
                "preset": preset,
                "max_steps": 2,
                "batch_size": 8,
                "n_gpus": 0,
                "overrides": {"train.valid_windows": 8},
            }
        ),
    )
    assert done.code == 0, done.output
    assert "200 speakers" in done.output
    [line] = RunFolder(tmp_path / "run").metrics()
    chance = {"minimal": math.log(8), "paper": math.log(8 * 128)}[preset]
    assert line["loss"] == pytest.approx(chance, rel=0.1)
