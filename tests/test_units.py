"""Units: the forms that other tools read, what is refused, and what a kill leaves."""

import json
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, write_corpus

from cpc_nb.config import ConfigError, make_config
from cpc_nb.corpus import pack
from cpc_nb.model import CPC
from cpc_nb.store import FileKind, RefinementPlan, write_features
from cpc_nb.units import (
    FrameSource,
    UnitsPlan,
    fit_centroids,
    main,
    unit_quality,
    write_units,
)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(0)
    config = make_config("demo", {"encoder.channels": [8], "context.size": 8})
    CPC(config.encoder, config.context).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def voices(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpora") / "five", 5, 2)


@pytest.fixture(scope="module")
def features(model_folder, voices, tmp_path_factory):
    """Features on disk of both kinds."""
    out = tmp_path_factory.mktemp("features")
    return write_features(CPC.from_pretrained(model_folder), pack(voices), out)


def given(out, **more) -> list[str]:
    options = {"out": out, "k": 6, "fit_frames": 2000} | more
    options = {name: value for name, value in options.items() if value is not None}
    return [str(part) for name in options for part in (f"--{name}", options[name])]


def read_lines(path) -> dict[str, list[int]]:
    """As the language models of the ZeroSpeech 2021 baseline read units."""
    pairs = (line.strip().split() for line in path.read_text().splitlines())
    return {name: [int(unit) for unit in units.split(",")] for name, units in pairs}


def nearest(frames: np.ndarray, centroids: np.ndarray) -> list[int]:
    """The plain definition, a frame at a time."""
    return [int(((centroids - frame) ** 2).sum(1).argmin()) for frame in frames]


def test_units_in_each_form_are_the_nearest_centroids(features, tmp_path):
    for format in ("lines", "jsonl", "onehot"):
        main(given(tmp_path / format, features=features.path, format=format))
    centroids = np.load(tmp_path / "lines" / "centroids.npy")
    lines = read_lines(tmp_path / "lines" / "quantized_outputs.txt")
    text = (tmp_path / "jsonl" / "units.jsonl").read_text().splitlines()
    objects = {one["audio"]: one["units"] for one in map(json.loads, text)}
    assert list(lines) == list(features.frames) and centroids.shape == (6, 16)
    for name, n in features.frames.items():
        expected = nearest(features.read(name)["context"], centroids)
        onehot = np.loadtxt(tmp_path / "onehot" / "onehot" / f"{name}.txt")
        assert onehot.shape == (n, 6) and (onehot.sum(1) == 1).all()
        assert lines[name] == objects[name] == onehot.argmax(1).tolist() == expected


def test_units_of_a_model_are_those_of_its_features(
    features, model_folder, voices, tmp_path
):
    main(given(tmp_path / "one", features=features.path, kind="encoder"))
    again = {"model": model_folder, "data": voices, "n_gpus": 0, "kind": "encoder"}
    main(given(tmp_path / "other", k=None, centroids=tmp_path / "one", **again))
    one, other = (
        read_lines(tmp_path / name / "quantized_outputs.txt")
        for name in ("one", "other")
    )
    assert list(one) == list(other)
    for name in one:  # rounding may decide between two centroids
        assert np.mean(np.array(one[name]) != other[name]) < 0.01


def test_deduplicated_units_have_no_unit_twice_in_a_row(features, tmp_path):
    main(given(tmp_path / "all", features=features.path))
    main(given(tmp_path / "few", features=features.path, deduplicate="true"))
    whole = read_lines(tmp_path / "all" / "quantized_outputs.txt")
    short = read_lines(tmp_path / "few" / "quantized_outputs.txt")
    for name, units in whole.items():
        kept = [u for u, before in zip(units, [None, *units]) if u != before]
        assert short[name] == kept and len(kept) < len(units)


KILLED = """
import os, signal, sys
import cpc_nb.units

cpc_nb.units.deduplicate = lambda _: os.kill(os.getpid(), signal.SIGKILL)
cpc_nb.units.main(sys.argv[1:])
"""


def test_killed_while_units_are_assigned_and_started_again(features, tmp_path):
    options = {"features": features.path, "deduplicate": "true"}
    arguments = given(tmp_path / "killed", **options)
    command = [sys.executable, "-c", KILLED, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    left = tmp_path / "killed"
    assert (left / "centroids.npy").exists()
    assert not (left / "quantized_outputs.txt").exists()
    fitted = (left / "centroids.npy").stat().st_mtime_ns
    main(arguments)
    assert (left / "centroids.npy").stat().st_mtime_ns == fitted
    main(given(tmp_path / "whole", **options))
    for name in ("quantized_outputs.txt", "centroids.npy", "units.json"):
        assert (left / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_other_units_and_centroids_of_other_features_are_refused(
    features, model_folder, voices, tmp_path
):
    first = tmp_path / "first"
    main(given(first, features=features.path))
    with pytest.raises(SystemExit, match="k is 6 there and 7 now"):
        main(given(first, features=features.path, k=7))
    model, corpus = CPC.from_pretrained(model_folder), pack(voices)
    plan = RefinementPlan("utterance")
    refined = write_features(model, corpus, tmp_path / "refined", plan=plan)
    with torch.no_grad():
        model.context.rnn.bias_hh_l0 += 1
    changed = write_features(model, corpus, tmp_path / "changed")
    for other, kind, differs in (
        (features, "encoder", "kind is 'context' there and 'encoder' now"),
        (refined, "context", "standardise is 'none' there and 'utterance' now"),
        (changed, "context", "model.checksum is "),
    ):
        use = {"features": other.path, "kind": kind, "centroids": first}
        with pytest.raises(SystemExit, match=f"of other features: .*{differs}"):
            main(given(tmp_path / "no", k=None, **use))
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"k": 1}, "k = 1: give a whole number of units, 2 or more"),
        ({"k": 5000}, "k = 5000: there are 2,000 different frames .* smaller k"),
        ({"kind": "both"}, "kind = 'both': give encoder or context"),
        ({"format": "line"}, "format = 'line' is unknown; did you mean 'lines'"),
        ({"format": "onehot", "deduplicate": "true"}, "cannot be deduplicated"),
        ({"model": "x"}, "give --features, or --model and --data, and not both"),
        ({"features": None}, "give --features, or --model and --data"),
        ({"features": "/nowhere"}, "/nowhere holds no features"),
        ({"centroids": "/nowhere"}, "leave out --k"),
        ({"centroids": "/nowhere", "k": None}, "/nowhere holds no units"),
        ({"seed": "x"}, "seed = 'x': give a whole number"),
    ],
)
def test_impossible_options(wrong, message, features, tmp_path):
    with pytest.raises(SystemExit, match=message):
        main(given(tmp_path / "out", **({"features": features.path} | wrong)))


def test_a_kind_that_was_not_stored_is_named(model_folder, voices, tmp_path):
    model = CPC.from_pretrained(model_folder)
    write_features(model, pack(voices), tmp_path / "f", FileKind(kind="encoder"))
    with pytest.raises(SystemExit, match="holds no context features"):
        main(given(tmp_path / "out", features=tmp_path / "f"))


def test_a_name_with_a_space_is_refused_where_lines_are_split(features, tmp_path):
    spaced = FrameSource(["a b"], {}, lambda indices: iter(()))
    with pytest.raises(ConfigError, match="spaces, as in 'a b'.*--format jsonl"):
        write_units(spaced, "context", tmp_path / "out", UnitsPlan())


def test_without_scikit_learn_it_is_named(features, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(
        SystemExit, match=r"scikit-learn is not .* pip install .cpc_nb\[train\]"
    ):
        main(given(tmp_path / "out", features=features.path))


def test_frames_that_are_all_the_same_are_too_few():
    with pytest.raises(ConfigError, match="there are 1 different frames"):
        fit_centroids(np.ones((40, 3), np.float32), 5)


def test_quality_against_its_definition_on_random_units():
    from sklearn.metrics import mutual_info_score

    rng = np.random.default_rng(0)
    phones = rng.integers(0, 5, 400)
    units = (phones + rng.integers(0, 3, 400)) % 9
    found = unit_quality(units, phones)
    right = sum(np.bincount(phones[units == u]).max() for u in np.unique(units))
    whole = sum(np.bincount(units[phones == p]).max() for p in np.unique(phones))
    shares = np.bincount(phones) / 400
    entropy = -(shares * np.log(shares)).sum()
    assert found["phone_purity"] == pytest.approx(right / 400)
    assert found["cluster_purity"] == pytest.approx(whole / 400)
    assert found["pnmi"] == pytest.approx(mutual_info_score(phones, units) / entropy)
