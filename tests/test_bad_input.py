"""Invalid input: one clear sentence that names the culprit and the remedy, and an exit
code that is not zero."""

import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import soundfile
from conftest import (
    RATE,
    ROOT,
    SMALL,
    Done,
    options,
    papermill,
    run,
    script,
    voice,
    write_corpus,
)


def assert_one_sentence(done: Done, program: str, *fragments: str):
    assert done.code not in (0, None), done.output
    assert "Traceback" not in done.output, done.output
    assert done.last.startswith(f"{program}: "), done.output
    for fragment in fragments:
        assert re.search(fragment, done.last), (fragment, done.last)


def assert_papermill_says(done: Done, *fragments: str):
    assert done.code not in (0, None), done.output
    assert re.match(r"(Config|Corpus|Training|Demo)Error: ", done.last), done.output[
        -3000:
    ]
    for fragment in fragments:
        assert re.search(fragment, done.last), (fragment, done.last)


def small(**more) -> dict:
    return {**SMALL, **{name.replace("__", "."): value for name, value in more.items()}}


def parameters(tmp_path, **more) -> dict:
    return {
        "data": "demo",
        "run_dir": str(tmp_path / "run"),
        "max_steps": 2,
        "batch_size": 8,
        "lr": 1e-3,
        "n_gpus": 0,
        "precision": "fp32",
        "overrides": SMALL,
        **more,
    }


CONFIGURATIONS = {
    "unknown preset": (
        {"preset": "papre"},
        "'papre' is unknown",
        "did you mean 'paper'",
    ),
    "no such preset at all": (
        {"preset": "42"},
        "'42' is unknown",
        "there are: demo, minimal, modern, paper, samples",
    ),
    "misspelt override": (
        {"overrides": {"train.batchsize": 8}},
        "'train.batchsize' is not a field",
        "did you mean 'train.batch_size'",
    ),
    "override of a section": ({"overrides": {"train": 8}}, "'train' is not a field"),
    "override of a wrong type": (
        {"overrides": {"train.lr": "fast"}},
        "train.lr = 'fast'",
        "valid number",
    ),
    "override that needs a list": (
        {"overrides": {"encoder.channels": 16}},
        "encoder.channels = 16",
        "tuple",
    ),
    "a spectrogram of ten samples": (
        {"preset": "samples", "overrides": {"encoder.kind": "mel"}},
        "10 samples, is the frame of a spectrogram with 6 frequencies",
        "or kind='conv'",
    ),
    "a residual layer that does not fit": (
        {"overrides": {"encoder.channels": [64, 128, 128, 128]}},
        "as many channels as the one before",
    ),
    "noise without another window": (
        {"overrides": {"augment.noise": 0.5, "data.group_size": 1}},
        "augment.noise: the noise is another window",
        "raise data.group_size",
    ),
    "overrides that are no mapping": (
        {"overrides": "[1, 2]"},
        "overrides",
        "give a mapping from dotted names",
    ),
    "overrides that are not JSON": (
        {"overrides": "{train.lr: 1}"},
        "is not a JSON mapping",
    ),
    "impossible value": ({"batch_size": 0}, "train.batch_size = 0", "greater than 0"),
    "impossible rate": ({"lr": -1}, "train.lr = -1", "greater than 0"),
    "infinite rate": ({"lr": float("inf")}, "train.lr = inf", "finite"),
    "text for a number": (
        {"max_steps": "many"},
        "train.max_steps = 'many'",
        "valid integer",
    ),
    "impossible choice": (
        {"overrides": {"encoder.norm": "layer"}},
        "encoder.norm = 'layer'",
        "'none', 'batch', 'channel' or 'channel_unbiased'",
    ),
    "batch that is no multiple of groups": (
        {"batch_size": 12},
        "train.batch_size: 12 does not divide into groups of 8",
        "8 and 16",
    ),
    "more steps than frames": (
        {"overrides": {"data.window": 1600}},
        "loss.steps: 12 steps ahead reach beyond a window of 10 frames",
        "fewer steps or a larger data.window",
    ),
    "window that is shorter than a frame": (
        {"preset": "minimal", "overrides": {"data.window": 400, "loss.steps": [1]}},
        "beyond a window of 0 frames",
    ),
    "a kernel for each layer": (
        {"overrides": {"encoder.kernels": [10, 8]}},
        "2 kernels and 4 strides",
    ),
    "nothing to train on": (
        {"overrides": {"data.valid_fraction": 0.5, "data.test_fraction": 0.5}},
        "leave nothing to train on",
    ),
    "no negatives": (
        {
            "overrides": {
                "data.group_size": 1,
                "loss.candidates": "same_time",
                "loss.same_window_negatives": 0,
            }
        },
        "group of one window has no other",
        "raise it",
    ),
    "a batch without negatives": (
        {"batch_size": 1, "overrides": {"loss.same_window_negatives": 0}},
        "train.batch_size: a group of one window has no other",
        "raise it",
    ),
    "unknown precision": (
        {"precision": "fp8"},
        "launch.precision = 'fp8'",
        "'fp32' or 'bf16'",
    ),
    "more GPUs than there are": (
        {"n_gpus": 99},
        "n_gpus = 99, but this machine has",
        "lower n_gpus",
    ),
    "resume that is neither": (
        {"resume": "perhaps"},
        "resume = 'perhaps'",
        "true or false",
    ),
    "layers beyond sense": (
        {"overrides": {"context.layers": 100_000}},
        "context.layers = 100000",
        "less than or equal to 64",
    ),
    "a validation without end": (
        {"overrides": {"train.valid_windows": 10**12}},
        "train.valid_windows = 10{12}: .* less than or equal to",
    ),
    "a seed beyond 63 bits": ({"seed": 2**63}, "train.seed = .*less than 9223"),
    "steps beyond floats": ({"max_steps": 10**400}, "train.max_steps"),
    "true for a number": ({"max_steps": True}, "train.max_steps: True is neither"),
    "true among numbers": (
        {"overrides": {"encoder.channels": [True]}},
        "encoder.channels: .*True.* is neither a number nor text",
    ),
    "more weights than memory": (
        {"data": "VOICES", "overrides": {"context.size": 2**16, "context.layers": 64}},
        "million weights takes .* GB to train, and .* GB are free; lower context.size",
    ),
    "a path of 5,000 characters": ({"data": "/a" + "b" * 5000}, "File name too long"),
    "a run folder of 5,000 characters": (
        {"data": "VOICES", "run_dir": "/tmp/" + "b" * 5000},
        "cannot be written: .*File name too long",
    ),
    "a zero byte": ({"run_dir": "a\0b"}, "holds a zero byte"),
    "a home of nobody": ({"run_dir": "~nobody-here/run"}, "~nobody-here/run: "),
    "missing folder": (
        {"data": "/nowhere/speech"},
        "'/nowhere/speech': no such folder",
        "give a folder of audio",
    ),
    "file for a folder": (
        {"data": str(ROOT / "settings.ini")},
        "is a file",
        "give the folder",
    ),
    "no such subset": (
        {"data": "librispeech:train-100"},
        "no subset 'train-100'",
        "did you mean 'train-clean-100'",
    ),
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_what_cannot_be_ends_before_any_work(name, speech, tmp_path):
    """In this process, for speed; below, real processes show the exit codes of each
    kind."""
    from cpc_nb.train import main

    changes, *fragments = CONFIGURATIONS[name]
    if changes.get("data") == "VOICES":
        changes = {**changes, "data": str(speech)}
    with pytest.raises(SystemExit) as exit:
        main(options({**parameters(tmp_path), **changes}))
    assert_one_sentence(Done(1, str(exit.value)), "cpc_train", *fragments)
    assert "\n" not in str(exit.value) and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "name",
    ["unknown preset", "misspelt override", "impossible value", "missing folder"],
)
def test_exit_codes_of_the_console_script(name, tmp_path):
    changes, *fragments = CONFIGURATIONS[name]
    done = script("cpc_train", *options({**parameters(tmp_path), **changes}))
    assert done.code == 1
    assert_one_sentence(done, "cpc_train", *fragments)


@pytest.mark.parametrize(
    "name", ["unknown preset", "override of a wrong type", "missing folder"]
)
def test_papermill_fails_with_the_sentence(name, tmp_path):
    changes, *fragments = CONFIGURATIONS[name]
    done = papermill(
        "04_train.ipynb", tmp_path / "out.ipynb", {**parameters(tmp_path), **changes}
    )
    assert_papermill_says(done, *fragments)
    assert not (tmp_path / "run").exists()


def test_a_misspelt_parameter_is_an_error_and_not_ignored(tmp_path):
    done = script("cpc_train", "--max_step", "3")
    assert done.code == 2
    assert_one_sentence(
        done, "cpc_train", "'--max_step' is not an option", "did you mean '--max_steps'"
    )
    assert_papermill_says(
        papermill(
            "04_train.ipynb",
            tmp_path / "out.ipynb",
            {**parameters(tmp_path), "max_step": 3},
        ),
        "'max_step' is not a parameter",
        "did you mean 'max_steps'",
    )
    assert_papermill_says(
        papermill(
            "05_evaluate.ipynb",
            tmp_path / "out.ipynb",
            {"run_dir": tmp_path, "tsne_speaker": 1},
        ),
        "'tsne_speaker' is not a parameter",
        "'tsne_speakers'",
    )
    assert not (tmp_path / "run").exists()


def test_a_folder_named_by_a_number(tmp_path, speech, monkeypatch):
    """`--run_dir 2024` is text; papermill's -p makes it a number, and is told so."""
    from cpc_nb.config import ConfigError
    from cpc_nb.train import main, train_from_parameters

    monkeypatch.chdir(tmp_path)
    os.symlink(speech, "7")
    main(options(parameters(tmp_path, data="7", run_dir="2024", max_steps=1)))
    assert (tmp_path / "2024" / "model" / "config.json").exists()
    with pytest.raises(ConfigError, match="run_dir = 2024: give text"):
        train_from_parameters(run_dir=2024)
    with pytest.raises(ConfigError, match="data.source = 7"):
        train_from_parameters(data=7)


# --------------------------------------------------------------------------------------
# Corpora


def a_folder(root):
    root.mkdir()
    return root


def notes(root):
    (root := a_folder(root)).joinpath("notes.txt").write_text("no audio")
    return root


def text_named_flac(root):
    (a_folder(root) / "a.flac").write_text("text")
    return root


def one_speaker(root):
    return write_corpus(root, 1, 8, first_speaker=700)


def two_speakers(root):
    return write_corpus(root, 2, 8)


def short(root):
    return write_corpus(root, 5, 2, duration_s=0.2)


def tiny(root):
    return write_corpus(root, 4, 1)


def silent(root):
    soundfile.write(a_folder(root) / "a.wav", np.zeros(RATE * 3), RATE)
    soundfile.write(root / "b.wav", np.full(RATE * 3, np.nan), RATE, subtype="FLOAT")
    return root


def truncated(root):
    write_corpus(root, 1, 1)
    [file] = root.rglob("*.flac")
    file.write_bytes(file.read_bytes()[:3000])
    return root


def two_windows(root):
    return write_corpus(root, 6, 8)


def int16_scale(root):
    wave = 32768 * voice(1, 1, 3.0)
    soundfile.write(a_folder(root) / "a.wav", wave, RATE, subtype="FLOAT")
    return root


def one_hz(root):
    soundfile.write(a_folder(root) / "a.wav", voice(1, 1, 3.0), 1)
    return root


CORPORA = [
    (a_folder, {}, "no audio in", "looked for .flac"),
    (notes, {}, "no audio in"),
    (text_named_flac, {}, "none of the 1 audio files.*a.flac: not readable"),
    (
        one_speaker,
        {},
        "has 1 speaker ",
        "takes at least 3",
        "add speech, or set data.split_by=utterance",
    ),
    (two_speakers, {}, "has 2 speakers", "at least 3"),
    (short, {}, "has 0 speakers with a window of 1.28 s", "add speech"),
    (silent, {}, "none of the 2 audio files.*silent"),
    (truncated, {}, "none of the 1 audio files.*100-7-0000.flac"),
    (
        tiny,
        {"batch_size": 64},
        r"windows of 1.28 s in groups of 8 are fewer than a batch of 64;"
        r" lower train.batch_size \(to \d+ at most\) or add speech",
    ),
    (
        two_windows,
        {"overrides": small(data__group_by="utterance")},
        "0 windows of 1.28 s in groups of 8 are fewer than a batch of 8; lower "
        "data.group_size, or set data.group_by to corpus",
        r"left out: \d+ utterances with fewer windows than the 8 of a group",
    ),
    (
        int16_scale,
        {},
        "none of the 1 audio files in .*a.wav: .* lie beyond full scale",
        "scale it down",
    ),
    (one_hz, {}, "none of the 1 audio files in .*a.wav: .*its rate is 1 Hz, not 4,000"),
    (
        tiny,
        {
            "overrides": small(
                data__split_by="files",
                data__train_list="/no/list",
                data__test_list="/no/list",
            )
        },
        "split file /no/list cannot be read",
    ),
]


@pytest.mark.parametrize(
    "make, changes, fragments",
    [(make, changes, fragments) for make, changes, *fragments in CORPORA],
    ids=[f"{number}-{make.__name__}" for number, (make, *_) in enumerate(CORPORA)],
)
def test_corpora_that_cannot_be_used(make, changes, fragments, tmp_path):
    from cpc_nb.train import main

    data = make(tmp_path / "corpus")
    with pytest.raises(SystemExit) as exit:
        main(options(parameters(tmp_path, data=str(data), **changes)))
    assert_one_sentence(Done(1, str(exit.value)), "cpc_train", *fragments)
    assert "\n" not in str(exit.value) and not (tmp_path / "run").exists()


def test_corpora_that_cannot_be_used_in_real_processes(tmp_path):
    done = script("cpc_pack", notes(tmp_path / "notes"))
    assert done.code == 1
    assert_one_sentence(done, "cpc_pack", "no audio in .*notes")
    done = script(
        "cpc_train",
        *options(parameters(tmp_path, data=str(one_speaker(tmp_path / "one")))),
    )
    assert done.code == 1
    assert_one_sentence(done, "cpc_train", "one has 1 speaker ")
    assert_papermill_says(
        papermill(
            "04_train.ipynb",
            tmp_path / "out.ipynb",
            parameters(tmp_path, data=str(tmp_path / "one")),
        ),
        "one has 1 speaker ",
    )


def test_bad_files_among_good_ones_are_set_aside_and_reported(tmp_path):
    root = write_corpus(tmp_path / "corpus", 6, 4)
    (root / "100" / "text.flac").write_text("text")
    soundfile.write(root / "101" / "silent.wav", np.zeros(RATE), RATE)
    soundfile.write(root / "102" / "blip.wav", voice(1, 1, 0.4), RATE)
    done = script("cpc_train", *options(parameters(tmp_path, data=str(root))))
    assert done.code == 0, done.output
    for fragment in (
        "2 files were set aside",
        "text.flac: not readable as audio",
        "silent.wav: silent",
        "1 utterances are shorter than a window of 1.28 s and left out,"
        " the first is 102/blip",
    ):
        assert fragment in done.output
    done = script(
        "cpc_features",
        "--model",
        tmp_path / "run" / "model",
        "--data",
        root,
        "--out",
        tmp_path / "features",
    )
    assert (
        done.code == 0
        and "2 files were set aside" in done.output
        and len(list((tmp_path / "features").rglob("*.npz"))) == 25
    )


@pytest.mark.parametrize(
    "arguments, fragments",
    [
        (["--workers", "0"], ["--workers 0", "above 0"]),
        (
            ["FILE"],
            [
                "exists and is not this corpus packed",
                "choose another folder or delete it",
            ],
        ),
        (["FULL"], ["exists and is not this corpus packed"]),
        ([5_000 * "a"], ["could not be written", "File name too long"]),
    ],
)
def test_cpc_pack_arguments(arguments, fragments, speech, tmp_path):
    (tmp_path / "FILE").write_text("in the way")
    (tmp_path / "FULL").mkdir()
    (tmp_path / "FULL" / "thesis.tex").write_text("do not delete")
    done = script(
        "cpc_pack",
        speech,
        *(
            tmp_path / argument if argument.isupper() else argument
            for argument in arguments
        ),
    )
    assert done.code in (1, 2) and "Traceback" not in done.output
    for fragment in fragments:
        assert fragment in done.last
    assert (tmp_path / "FULL" / "thesis.tex").exists() and (
        tmp_path / "FILE"
    ).read_text() == "in the way"


# --------------------------------------------------------------------------------------
# Run folders


@pytest.fixture(scope="module")
def trained(speech, tmp_path_factory):
    """A finished run of two updates."""
    from cpc_nb.train import main

    folder = tmp_path_factory.mktemp("trained")
    main(options(parameters(folder, data=str(speech))))
    return folder / "run"


def test_a_run_of_another_configuration_is_not_touched(trained, speech, tmp_path):
    from cpc_nb.train import main

    given = parameters(tmp_path, data=str(speech), run_dir=str(trained))
    before = {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()}
    done = script("cpc_train", *options({**given, "lr": 5e-3, "seed": 3}))
    assert done.code == 1
    assert_one_sentence(
        done,
        "cpc_train",
        "belongs to another configuration",
        "train.lr is 0.005 now and was 0.001",
        "train.seed is 3 now and was 0",
        "give another run_dir",
    )
    for changes, message in (
        (
            {
                "data": str(two_speakers(tmp_path / "two")),
                "overrides": small(data__valid_fraction=0, data__test_fraction=0.5),
            },
            "corpus is '.*' now and was",
        ),
        ({"preset": "paper"}, "belongs to another configuration.*encoder.norm"),
        (
            {"resume": False},
            "already holds a run; set resume to true, or give another run_dir",
        ),
    ):
        with pytest.raises(SystemExit, match=message):
            main(options({**given, **changes}))
    assert {
        path: path.read_bytes() for path in trained.rglob("*") if path.is_file()
    } == before


def test_a_run_dir_that_is_a_file(speech, tmp_path):
    from cpc_nb.evaluate import main as evaluate
    from cpc_nb.train import main as train

    (tmp_path / "run").write_text("a file")
    for main, given in (
        (train, parameters(tmp_path, data=str(speech))),
        (evaluate, {"run_dir": str(tmp_path / "run")}),
    ):
        with pytest.raises(
            SystemExit, match="(cannot be written: .*Not a directory|is no run folder)"
        ):
            main(options(given))
    assert (tmp_path / "run").read_text() == "a file"


def test_a_damaged_config_is_named(trained, tmp_path):
    from cpc_nb.config import Config, ConfigError

    copy = shutil.copytree(trained, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    for content, message in (
        (json.dumps({**config, "colour": 1}), "colour is not a field"),
        (json.dumps(config)[:200], "Invalid JSON|EOF"),
        ("", "Invalid JSON|EOF"),
    ):
        (copy / "config.json").write_text(content)
        with pytest.raises(ConfigError, match=f"(?i)config.json: .*({message})"):
            Config.load(copy / "config.json")


EVALUATIONS = {
    "no run": ({"run_dir": "/nowhere"}, "/nowhere is no run folder", "train one"),
    "unknown protocol": (
        {"protocols": ["speaker_windows"]},
        "'speaker_windows' is unknown",
        "did you mean 'speaker_window'",
    ),
    "protocol that is no text": ({"protocols": 3}, "protocols = 3", "give a list"),
    "labels that are not there": (
        {"labels": "phones.txt"},
        "labels = .phones.txt.: no such file",
        "cpc_align makes one",
    ),
    "phones without labels": (
        {"protocols": ["phone_mlp"]},
        "phone_mlp needs phone labels",
        "give labels=FILE",
    ),
    "supervised": ({"supervised": -1}, "supervised = -1", "0 or more"),
    "too many speakers": (
        {"tsne_speakers": 2},
        "tsne_speakers = 2",
        "above 0 and at most 1",
    ),
    "seed": ({"seed": -1}, "seed = -1", "0 or more"),
    "missing corpus": ({"data": "/nowhere"}, "'/nowhere': no such folder"),
    "one speaker": (
        {"data": "ONE"},
        "speaker_window",
        "1 speaker",
        "evaluate on more speech",
    ),
    "too short": ({"data": "SHORT"}, "no held-out utterance is as long as a window"),
}


@pytest.mark.parametrize("name", EVALUATIONS)
def test_evaluations_that_cannot_be(name, trained, tmp_path):
    from cpc_nb.evaluate import main

    changes, *fragments = EVALUATIONS[name]
    given = {"run_dir": str(trained), **changes}
    if given.get("data") in ("ONE", "SHORT"):
        given["data"] = str(
            (one_speaker if given["data"] == "ONE" else short)(tmp_path / "corpus")
        )
    with pytest.raises(SystemExit) as exit:
        main(options(given))
    assert_one_sentence(Done(1, str(exit.value)), "cpc_evaluate", *fragments)
    assert not (trained / "evaluation" / "metrics.json").exists()


def test_evaluations_that_cannot_be_in_real_processes(trained, tmp_path):
    done = script(
        "cpc_evaluate", "--run_dir", trained, "--protocols", "speaker_windows"
    )
    assert done.code == 1
    assert_one_sentence(done, "cpc_evaluate", "'speaker_windows' is unknown")
    done = script("cpc_evaluate", "--rundir", trained)
    assert done.code == 2
    assert_one_sentence(
        done, "cpc_evaluate", "'--rundir' is not an option; did you mean '--run_dir'"
    )
    for arguments, message in (
        (["--data", "x"], "--model is missing"),
        (["--model", trained, "--data", "x", "--out", "x"], "holds no model"),
        (
            ["--model", "/nowhere/model", "--data", "x", "--out", "x"],
            "'/nowhere/model' is neither a folder nor a name on the hub",
        ),
        (
            [
                "--model",
                trained / "model",
                "--data",
                "x",
                "--out",
                "x",
                "--precision",
                "bf61",
            ],
            "launch.precision = 'bf61'",
        ),
    ):
        done = script("cpc_features", *arguments)
        assert done.code == 1
        assert_one_sentence(done, "cpc_features", message)


def test_a_corpus_that_changed_since_training_is_not_evaluated(tmp_path):
    """Who was held out is only known for the corpus as it was."""
    from cpc_nb.evaluate import main as evaluate
    from cpc_nb.train import main as train

    root = write_corpus(tmp_path / "corpus", 6, 4)
    train(options(parameters(tmp_path, data=str(root))))
    write_corpus(root, 1, 1, first_speaker=300)
    for data in ({}, {"data": str(root)}):
        with pytest.raises(
            SystemExit, match="is not the corpus this run was trained on"
        ):
            evaluate(options({"run_dir": str(tmp_path / "run"), **data}))


# --------------------------------------------------------------------------------------
# Disks


def test_no_room_for_packing(speech, disk, tmp_path):
    for kib in (100, 6000):  # less than the files have; less than they become
        done = script(
            "cpc_train",
            *options(parameters(tmp_path, data=str(speech))),
            CPC_NB_CACHE=str(folder := disk(kib)),
        )
        assert done.code == 1
        assert_one_sentence(
            done,
            "cpc_train",
            "could not be written: .*(No space left|needed)",
            "free some space, or set CPC_NB_CACHE",
        )
        assert not list((folder / "packed").glob("voices*")) and not list(
            (folder / "packed").glob(".*.part")
        )
    assert not (tmp_path / "run").exists()


def fill(folder, spare: int):
    """Leave `spare` bytes on the disk of `folder`."""
    with open(folder / "filler", "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            os.truncate(file.name, os.path.getsize(file.name) - spare)


def test_no_room_for_the_run(speech, disk, tmp_path):
    done = script(
        "cpc_train",
        *options(
            parameters(
                tmp_path, data=str(speech), run_dir=str(run_dir := disk(60) / "run")
            )
        ),
    )
    assert done.code == 1
    assert_one_sentence(
        done,
        "cpc_train",
        f"{run_dir} has room for 0.1 MB, and a checkpoint and the model take 0.2 MB;"
        " free some space",
    )
    for kib in (200, 300):  # full at the first checkpoint, or the second
        done = script(
            "cpc_train",
            *options(
                parameters(
                    tmp_path,
                    data=str(speech),
                    run_dir=str(run_dir := disk(kib) / "run"),
                    max_steps=40,
                )
            ),
        )
        assert done.code == 1 and "Traceback" not in done.output, done.output
        assert done.last.startswith(f"cpc_train: {run_dir} could not be written: ")
        assert re.search(
            rf"^cpc_train: {run_dir} could not be written: .*No space left on device.*;"
            " free some space and start again: it goes on from checkpoint"
            r" (none|step-)",
            done.output,
            re.M,
        ), done.output
        index = run_dir / "checkpoints" / "index.json"
        assert not (run_dir / "model").exists() and (
            not index.exists()
            or (
                run_dir
                / "checkpoints"
                / json.loads(index.read_text())["last"]
                / "weights.safetensors"
            ).exists()
        )


def test_no_room_for_an_evaluation(trained, disk, tmp_path):
    run_dir = shutil.copytree(trained, (folder := disk(4000)) / "run")
    fill(folder, 16_384)
    done = script("cpc_evaluate", "--run_dir", run_dir)
    assert done.code == 1
    assert_one_sentence(
        done,
        "cpc_evaluate",
        "evaluation cannot be written: .*No space left",
        "free some space",
    )
    assert not (run_dir / "evaluation" / "metrics.json").exists()
    done = script(
        "cpc_features",
        "--model",
        trained / "model",
        "--data",
        write_corpus(tmp_path / "few", 2, 6),
        "--out",
        folder / "features",
    )
    assert done.code == 1
    assert_one_sentence(
        done, "cpc_features", "cannot be written: .*No space left", "free some space"
    )


def test_a_read_only_run_folder(trained, speech, disk):
    run_dir = shutil.copytree(trained, (folder := disk(4000)) / "run")
    disk.protect(folder)
    done = script(
        "cpc_train",
        *options(
            parameters(folder, data=str(speech), run_dir=str(run_dir), max_steps=4)
        ),
    )
    assert done.code == 1
    assert_one_sentence(
        done, "cpc_train", f"run folder {run_dir} cannot be written: .*Read-only"
    )
    done = script("cpc_evaluate", "--run_dir", run_dir)
    assert done.code == 1
    assert_one_sentence(
        done,
        "cpc_evaluate",
        "evaluation cannot be (made|written): .*Read-only",
        "copy the run",
    )


# --------------------------------------------------------------------------------------
# A package that is older than its notebooks


def test_a_stale_export_is_refused(speech, tmp_path):
    checkout = tmp_path / "checkout"
    for name in ("nbs", "cpc_nb"):
        shutil.copytree(
            ROOT / name,
            checkout / name,
            ignore=shutil.ignore_patterns("__pycache__", "_sphinx"),
        )
    text = (checkout / "nbs" / "03_loss.ipynb").read_text()
    assert '"class InfoNCE(nn.Module):\\n"' in text
    (checkout / "nbs" / "03_loss.ipynb").write_text(
        text.replace(
            '"class InfoNCE(nn.Module):\\n"', '"class InfoNCE(nn.Module):  # edited\\n"'
        )
    )
    given = parameters(tmp_path, data=str(speech))
    done = papermill(
        "04_train.ipynb",
        tmp_path / "out.ipynb",
        given,
        root=checkout,
        PYTHONPATH=str(checkout),
    )
    assert_papermill_says(
        done, "cpc_nb/loss.py is older than nbs/03_loss.ipynb; run make export"
    )
    assert not (tmp_path / "run").exists()

    from cpc_nb.config import ConfigError, require_fresh_export

    notebook = json.loads(text)
    removed = next(
        index
        for index, cell in enumerate(notebook["cells"])
        if "self: InfoNCE" in "".join(cell["source"])
    )
    del notebook["cells"][removed]
    (checkout / "nbs" / "03_loss.ipynb").write_text(json.dumps(notebook))
    with pytest.raises(
        ConfigError,
        match="cpc_nb/loss.py holds a cell that nbs/03_loss.ipynb no longer has;"
        " run make export",
    ):
        require_fresh_export(checkout / "cpc_nb")
    (checkout / "nbs" / "03_loss.ipynb").write_text(text)
    require_fresh_export(checkout / "cpc_nb")


# --------------------------------------------------------------------------------------
# How a command ends

BODY = """
import os, signal, sys
import numpy as np
from cpc_nb.config import *

with command("prog"):
    {}
"""

ENDS = {
    "a mistake": ("raise ConfigError('lr = -1')", 1, r"prog: lr = -1"),
    "told to end, and saved": ("raise Preempted('saved')", 75, "prog: saved"),
    "Ctrl-C": ("os.kill(os.getpid(), signal.SIGINT)", 130, "prog: interrupted"),
    "SIGTERM": (
        "os.kill(os.getpid(), signal.SIGTERM)",
        143,
        "prog: told to end by SIGTERM",
    ),
    "SIGHUP": (
        "os.kill(os.getpid(), signal.SIGHUP)",
        129,
        "prog: told to end by SIGHUP",
    ),
    "memory": ("np.zeros(2**58)", 1, r"prog: out of memory \(Unable to allocate"),
    "memory of a GPU's library": (
        "raise RuntimeError('CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling')",
        1,
        r"prog: out of memory \(CUDA error: CUBLAS",
    ),
    "a file": ("open('/no/such')", 1, r"prog: \[Errno 2\] No such file.*'/no/such'"),
    "a long name": ("open('a' * 5000)", 1, r"prog: \[Errno 36\] File name too long"),
}


@pytest.mark.parametrize("name", ENDS)
def test_how_a_command_ends(name):
    body, code, message = ENDS[name]
    done = run(sys.executable, "-c", BODY.format(body))
    assert done.code == code and "Traceback" not in done.output, done.output
    assert re.match(message, done.last), done.output


def test_an_error_of_the_program_itself_keeps_its_traceback():
    done = run(sys.executable, "-c", BODY.format("1 / 0"))
    assert done.code == 1 and "Traceback" in done.output


@pytest.mark.parametrize(
    "redirection, code, message",
    [
        ("| head -1", 141, ""),
        (">/dev/full", 1, r"prog: \[Errno 28\] No space left on device\n"),
        ("| cat >/dev/null", 0, ""),
    ],
)
def test_an_output_that_takes_no_more(redirection, code, message):
    """Closed, full, or ASCII only, which shows × as an escape."""
    program = BODY.format(
        "[print('×', number, flush=True) for number in range(50_000)]"
    )
    shell = f'"$0" -c "$1" {redirection}; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(
        ["bash", "-c", shell, sys.executable, program],
        cwd=ROOT,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == code, done.stderr
    assert re.fullmatch(message, done.stderr)
