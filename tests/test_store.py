"""Features on disk: what a kill leaves, what is refused, and who can read them."""

import csv
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, write_corpus
from safetensors.numpy import load_file

import cpc_nb.features
from cpc_nb.config import ConfigError, make_config
from cpc_nb.corpus import pack
from cpc_nb.model import CPC
from cpc_nb.speakers import standardise_utterance
from cpc_nb.store import (
    FeatureFolder,
    FileKind,
    RefinementPlan,
    main,
    write_features,
)

TINY = {"encoder.channels": [8], "context.size": 8}


def make_model(seed: int = 0) -> CPC:
    torch.manual_seed(seed)
    config = make_config("demo", TINY)
    return CPC(config.encoder, config.context)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    make_model().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def voices(tmp_path_factory):
    """Five speakers, four utterances each; ids have no folder."""
    return write_corpus(tmp_path_factory.mktemp("corpora") / "five", 5, 4)


@pytest.fixture
def small_batches(monkeypatch):
    monkeypatch.setitem(cpc_nb.features.AT_ONCE_S, "cpu", 10)


def given(model, data, out, **more) -> list[str]:
    options = {"model": model, "data": data, "out": out, "n_gpus": 0} | more
    return [str(part) for name in options for part in (f"--{name}", options[name])]


def contents(folder) -> dict[str, bytes]:
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def rows(folder) -> list[dict]:
    with open(folder / "manifest.csv", newline="") as file:
        return list(csv.DictReader(file))


# Kills itself, without a chance to clean up, when the files are partly written
KILLED = """
import os, signal, sys
import cpc_nb.features, cpc_nb.store

cpc_nb.features.AT_ONCE_S["cpu"] = 10
moves, replace = [], os.replace


def move(one, other):
    moves.append(other)
    if sum(str(path).endswith(".npz") for path in moves) == 8:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(one, other)


os.replace = move
cpc_nb.store.main(sys.argv[1:])
"""


def test_killed_and_started_again_gives_the_files_of_an_undisturbed_run(
    model_folder, voices, tmp_path, small_batches
):
    arguments = given(model_folder, voices, tmp_path / "killed")
    command = [sys.executable, "-c", KILLED, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    folder = tmp_path / "killed"
    left = [path for path in contents(folder) if path.endswith(".npz")]
    assert len(left) == 7 and (folder / ".part").exists()
    assert 0 < len(rows(folder)) < 7  # the batch in which it died is not finished
    with pytest.raises(ConfigError, match=r"of 20 utterances .* cpc_features again"):
        FeatureFolder(folder)

    # the last line of the journal was cut short as well
    with open(folder / "manifest.csv", "r+b") as file:
        file.truncate(os.path.getsize(file.name) - 3)
    main(arguments)
    main(given(model_folder, voices, tmp_path / "whole"))
    assert contents(folder) == contents(tmp_path / "whole")
    names = [row["utterance"] for row in rows(folder)]
    assert names == pack(voices).ids


def test_a_second_call_writes_nothing_and_a_lost_file_is_written_again(
    model_folder, voices, tmp_path, monkeypatch
):
    arguments = given(model_folder, voices, tmp_path / "features")
    main(arguments)
    before = contents(tmp_path / "features")
    times = [path.stat().st_mtime_ns for path in (tmp_path / "features").iterdir()]
    with monkeypatch.context() as patch:
        patch.setattr("cpc_nb.store.encode_batch", lambda *_: pytest.fail("work began"))
        main(arguments)
    assert times == [p.stat().st_mtime_ns for p in (tmp_path / "features").iterdir()]
    lost = next(name for name in before if name.endswith(".npz"))
    (tmp_path / "features" / lost).unlink()
    main(arguments)
    assert contents(tmp_path / "features") == before


@pytest.mark.parametrize("format", ["npz", "npy", "safetensors", "parquet"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_each_format_is_read_by_its_own_library(format, dtype, voices, tmp_path):
    corpus, model = pack(voices), make_model()
    folder = write_features(model, corpus, tmp_path, FileKind(format, "both", dtype))
    name, wave = corpus.ids[3], np.array(corpus.utterance(3))
    path = tmp_path / f"{name}.{format}"
    if format == "npy":
        read = {
            k: np.load(tmp_path / k / f"{name}.npy") for k in ("encoder", "context")
        }
    elif format == "npz":
        read = dict(np.load(path))
    elif format == "safetensors":
        read = load_file(path)
    else:
        parquet = pytest.importorskip("pyarrow.parquet")
        table = parquet.read_table(path)
        assert set(table["utterance"].to_pylist()) == {name}
        assert table["frame"].to_pylist() == list(range(len(table)))
        read = {k: np.stack(table[k].to_numpy()) for k in ("encoder", "context")}
    features = model.encode(wave)
    tolerance = 1e-5 if dtype == "float32" else 2e-3
    for kind, values in read.items():
        expected = getattr(features, kind).numpy()
        assert values.dtype == dtype and values.shape == expected.shape
        np.testing.assert_allclose(values, expected, rtol=tolerance, atol=tolerance)
        assert np.array_equal(folder.read(name)[kind], values)
    assert folder.about["sizes"] == {"encoder": 8, "context": 16}


def test_the_description_says_where_frames_stand(voices, tmp_path):
    """A click moves the frames whose stretch of audio holds it, and no others."""
    model, corpus = make_model(), pack(voices)
    about = write_features(model, corpus, tmp_path, FileKind(kind="encoder")).about
    wave = torch.zeros(16_000)
    quiet = model.encode(wave).encoder
    wave[8_000] = 0.5
    moved = (model.encode(wave).encoder - quiet).abs().amax(1) > 1e-6
    centre = about["first_frame_s"] + np.arange(len(moved)) / about["frame_rate_hz"]
    near = np.abs(centre - 0.5) <= about["frame_width_s"] / 2
    first, last = np.flatnonzero(moved)[[0, -1]]
    assert near[first] and near[last] and near.sum() - (last - first + 1) <= 2
    assert about["data"]["utterances"] == 20 and len(about["model"]["checksum"]) == 64


def test_a_folder_with_other_features_is_refused_by_what_differs(
    model_folder, voices, tmp_path
):
    corpus, out = pack(voices), tmp_path / "features"
    model = CPC.from_pretrained(model_folder)
    write_features(model, corpus, out, name="a name")
    write_features(model, corpus, out, name="another")  # names do not count
    before = contents(out)
    one_more = write_corpus(tmp_path / "more", 5, 4, 200)
    for arguments, differs in (
        ((make_model(1), corpus, out), "model.checksum is"),
        ((model, pack(one_more), out), "data.fingerprint is"),
        ((model, corpus, out, FileKind("npy")), "format is 'npz' there and 'npy' now"),
        ((model, corpus, out, FileKind(kind="encoder")), "kind is 'both' there"),
        ((model, corpus, out, FileKind(dtype="float16")), "dtype is 'float32' there"),
        ((model, corpus, out, FileKind(), "bf16"), "precision is 'fp32' there"),
        (
            (model, corpus, out, FileKind(), "fp32", RefinementPlan("utterance")),
            "standardise is 'none' there and 'utterance' now",
        ),
        (
            (model, corpus, out, FileKind(), "fp32", RefinementPlan("none", 2)),
            "speakers.directions is None there and 2 now",
        ),
    ):
        with pytest.raises(ConfigError, match="give another folder as out") as caught:
            write_features(*arguments)
        assert differs in str(caught.value)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("mine")
    with pytest.raises(ConfigError, match="for example 'thesis.tex'"):
        write_features(model, corpus, foreign)
    assert contents(out) == before and len(list(foreign.iterdir())) == 1


def test_refined_features_and_directions_for_other_speech(
    model_folder, voices, tmp_path
):
    refined = {"project_out_speakers": 2, "standardise": "utterance"}
    first, second = tmp_path / "first", tmp_path / "second"
    main(given(model_folder, voices, first, kind="context", **refined))
    other = write_corpus(tmp_path / "other", 2, 2, 300)
    directions = first / "speakers.safetensors"
    use = refined | {"project_out_speakers": directions}
    main(given(model_folder, other, second, kind="context", **use))
    assert directions.read_bytes() == (second / directions.name).read_bytes()
    V = torch.from_numpy(load_file(directions)["context"])
    assert torch.allclose(V @ V.T, torch.eye(2), atol=1e-5)
    corpus, model = pack(other), CPC.from_pretrained(model_folder)
    c = model.encode(np.array(corpus.utterance(1))).context
    expected = standardise_utterance(c - c @ V.T @ V)
    found = FeatureFolder(second).read(corpus.ids[1])
    assert list(found) == ["context"]
    np.testing.assert_allclose(found["context"], expected, atol=1e-4)
    with pytest.raises(SystemExit, match="directions of encoder features are missing"):
        main(given(model_folder, other, tmp_path / "third", **use))
    with pytest.raises(SystemExit, match="5 directions of 5 speakers"):
        wanted = {"project_out_speakers": 5}
        main(given(model_folder, voices, tmp_path / "fourth", **wanted))
    # nothing was written, so the folder is free for a better choice
    wanted = {"project_out_speakers": 4}
    main(given(model_folder, voices, tmp_path / "fourth", **wanted))


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"format": "npx"}, "format = 'npx' is unknown; did you mean 'np[yz]'"),
        ({"kind": "all"}, "kind = 'all' is unknown; there are: both, context"),
        ({"dtype": "int8"}, "dtype = 'int8' is unknown"),
        ({"standardise": "speaker"}, "standardise = 'speaker' is unknown"),
        ({"project_out_speakers": -1}, "project_out_speakers = -1: give the number"),
        ({"project_out_speakers": "gone.st"}, "gone.st cannot be read as speakers'"),
    ],
)
def test_impossible_options(wrong, message, model_folder, voices, tmp_path):
    with pytest.raises(SystemExit, match=message):
        main(given(model_folder, voices, tmp_path / "out", **wrong))
    assert not (tmp_path / "out").exists()


def test_features_that_half_precision_cannot_hold_are_not_written(voices, tmp_path):
    model = make_model()
    with torch.no_grad():
        model.encoder.layers[-1].norm.weight *= 1e6
    with pytest.raises(
        ConfigError, match="not finite in float16; write them as float32"
    ):
        write_features(model, pack(voices), tmp_path, FileKind(dtype="float16"))


def test_without_pyarrow_the_format_parquet_names_it(
    model_folder, voices, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(
        SystemExit, match=r'pyarrow is not .* pip install "cpc_nb\[parquet\]"'
    ):
        main(given(model_folder, voices, tmp_path / "out", format="parquet"))
