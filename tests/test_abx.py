"""ABX against plain loops, against cases whose error is known, and against fastabx."""

import itertools
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from cpc_nb.abx import Items, abx_errors, label_items, read_items, write_items
from cpc_nb.config import ConfigError
from cpc_nb.corpus import CorpusError, pack
from cpc_nb.demo import make_demo_corpus
from cpc_nb.features import Frames, extract_mfcc
from cpc_nb.labels import load_labels

DEVICES = ["cpu", *["cuda"] * torch.cuda.is_available()]
MODES = ("within", "across")


def make_items(rows, lengths):
    """Items from (phone, previous, next, speaker), of one utterance, and its frames."""
    end = np.cumsum(lengths)
    columns = (np.array(column) for column in zip(*rows))
    items = Items(np.zeros(len(rows), int), (end - lengths) / 100, end / 100, *columns)
    return items, Frames(np.array([0]), np.array([end[-1]]))


def plain_distance(x, y):
    """Angular distance with textbook DTW; of equal ways the diagonal, then along y."""
    unit = lambda v: (
        v / np.linalg.norm(v) if v.any() else np.full(len(v), len(v) ** -0.5)
    )
    total, length = {}, {}
    for i, j in itertools.product(range(len(x)), range(len(y))):
        cosine = np.clip(unit(x[i]) @ unit(y[j]), -1, 1)
        ways = [w for w in ((i - 1, j - 1), (i, j - 1), (i - 1, j)) if min(w) >= 0]
        best = min(ways, key=total.get, default=None)
        total[i, j] = np.arccos(1.0 if cosine > 1 - 1e-6 else cosine) / np.pi
        total[i, j] += total.get(best, 0)
        length[i, j] = length.get(best, 0) + 1
    return total[len(x) - 1, len(y) - 1] / length[len(x) - 1, len(y) - 1]


def plain_abx(features, items, mode, any_context):
    """Loops over triples, then means over cells, contexts, speakers, phone pairs."""
    first, length = items.span()
    part = [features[f : f + n] for f, n in zip(first, length)]
    here = lambda i: (
        (items.speaker[i],)
        if any_context
        else (items.speaker[i], items.previous[i], items.next[i])
    )
    cells, seen = {}, {}
    for x, a, b in itertools.product(range(len(part)), repeat=3):
        same = items.speaker[x] == items.speaker[a]
        if (
            x == a
            or items.phone[x] != items.phone[a]
            or items.phone[b] == items.phone[a]
            or here(a) != here(b)
            or here(x)[1:] != here(a)[1:]
            or same != (mode == "within")
        ):
            continue
        xa, xb = (
            seen.setdefault((x, other), plain_distance(part[x], part[other]))
            if (x, other) not in seen
            else seen[x, other]
            for other in (a, b)
        )
        wrong = 0.5 if abs(xa - xb) < 1e-7 else float(xa > xb)
        phones = items.phone[a], items.phone[b]
        key = phones, here(a)[0], here(a)[1:], items.speaker[x]
        cells.setdefault(key, []).append(wrong)
    mean = lambda lists: {key: np.mean(values) for key, values in lists.items()}
    rows, pairs = {}, {}
    for key, error in mean(cells).items():
        rows.setdefault(key if any_context else key[:2], []).append(error)
    for (phones, *_), error in mean(rows).items():
        pairs.setdefault(phones, []).append(error)
    return np.mean(list(mean(pairs).values()))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("context", ("within", "any"))
@pytest.mark.parametrize("kind", ("continuous", "ties"))
def test_equals_plain_loops(kind, context, device):
    rng = np.random.default_rng(1)
    rows = [[rng.choice(list(c)) for c in ("abc", "pq", "r", "stu")] for _ in range(45)]
    items, frames = make_items(rows, rng.integers(1, 6, len(rows)))
    features = rng.standard_normal((len(frames), 5)).astype(np.float32)
    features[::7] = 0
    if kind == "ties":  # one of three units a frame: all sums are exact
        features = np.eye(3, dtype=np.float32)[rng.integers(0, 3, len(frames))]
    found = abx_errors(
        {"x": torch.from_numpy(features).to(device)},
        frames,
        items,
        context,
        max_size_group=None,
        max_x_across=None,
    )
    for mode in MODES:
        plain = plain_abx(features, items, mode, context == "any")
        assert found[mode]["x"] == pytest.approx(plain, abs=1e-6)


@pytest.mark.parametrize(
    "a_says, b_says, error", [((0, 0), (1, 1), 0), ((0, 0), (0, 0), 0.5)]
)
def test_known_errors(a_says, b_says, error):
    """Two speakers, each saying a twice and b twice in one context."""
    rows = [(p, "SIL", "SIL", s) for s in "st" for p in "ab" for _ in range(2)]
    items, frames = make_items(rows, np.full(len(rows), 2))
    features = np.eye(2, dtype=np.float32)[np.repeat([*a_says, *b_says] * 2, 2)]
    found = abx_errors({"x": features, "y": features[:, ::-1].copy()}, frames, items)
    for mode in MODES:
        assert found[mode]["x"] == found[mode]["y"] == error
        assert found[mode]["deviation"]["x"] == 0
    assert found["cells"] == {"within": 4, "across": 4}
    assert found["triples"] == {"within": 4 * 2 * 1 * 2, "across": 4 * 2 * 2 * 2}


def test_swapped_voices_are_always_wrong():
    """What one speaker's a looks like is the other's b: within 0, across 1."""
    rows = [(p, "SIL", "SIL", s) for s in "st" for p in "ab" for _ in range(2)]
    items, frames = make_items(rows, np.full(len(rows), 3))
    looks = np.repeat([0, 0, 1, 1, 1, 1, 0, 0], 3)
    found = abx_errors({"x": np.eye(2, dtype=np.float32)[looks]}, frames, items)
    assert found["within"]["x"] == 0 and found["across"]["x"] == 1


@pytest.mark.parametrize("value", (0, 1))
def test_features_that_never_change_are_at_chance(value):
    rng = np.random.default_rng(0)
    rows = [[rng.choice(list(c)) for c in ("ab", "p", "r", "st")] for _ in range(20)]
    items, frames = make_items(rows, rng.integers(1, 9, len(rows)))
    features = np.full((len(frames), 33), value, np.float32)
    features *= rng.uniform(0.1, 9, (len(frames), 1)).astype(np.float32)
    found = abx_errors({"x": features}, frames, items)
    assert found["within"]["x"] == found["across"]["x"] == 0.5


def test_modes_without_a_cell_are_absent_and_say_why():
    rows = [(p, "p", "q", "one") for p in "aabb"]
    items, frames = make_items(rows, np.full(4, 2))
    features = {"x": np.random.default_rng(0).random((8, 3), np.float32)}
    found = abx_errors(features, frames, items)
    assert "across" not in found and "more speakers" in found["missing"]["across"]
    assert found["within"]["deviation"]["x"] is None
    apart, _ = make_items([("a", "p", "q", "one"), ("b", "q", "p", "two")], [4, 4])
    found = abx_errors(features, frames, apart)
    assert set(found["missing"]) == set(MODES) and not set(MODES) & set(found)
    elsewhere = apart._replace(utterance=np.array([7, 7]))
    assert set(abx_errors(features, frames, elsewhere)["missing"]) == set(MODES)


def test_refuses_what_does_not_fit():
    items, frames = make_items([(p, "p", "q", "one") for p in "aabb"], np.full(4, 2))
    features = np.ones((8, 3), np.float32)
    with pytest.raises(ConfigError, match="'x' have 7 rows for 8 frames"):
        abx_errors({"x": features[:7]}, frames, items)
    with pytest.raises(ConfigError, match="'x' are not all finite"):
        abx_errors({"x": features * np.inf}, frames, items)
    with pytest.raises(ConfigError, match="context 'all' has to be"):
        abx_errors({"x": features}, frames, items, "all")
    with pytest.raises(CorpusError, match="lies outside its 8 frames"):
        abx_errors({"x": features}, frames, items._replace(offset=items.offset + 1))


@pytest.fixture(scope="module")
def spoken(tmp_path_factory):
    """Corpus, items, frames and MFCC of a few voices of the embedded corpus."""
    folder = make_demo_corpus(tmp_path_factory.mktemp("abx") / "demo", 3, 8)
    corpus = pack(folder)
    labels = load_labels(folder / "phones.txt", corpus)
    utterances = np.arange(len(corpus))
    frames = Frames(utterances, labels.counts[utterances])
    return (
        corpus,
        label_items(labels, corpus, utterances),
        frames,
        np.array(extract_mfcc(corpus, frames, folder)),
    )


def test_fewer_triples_of_the_same_seed_are_the_same(spoken):
    _, items, frames, mfcc = spoken
    few = lambda seed: abx_errors({"mfcc": mfcc}, frames, items, "within", 2, 1, seed)
    assert few(0) == few(0) != few(1)
    everything = abx_errors({"mfcc": mfcc}, frames, items, "within", None, None)
    assert few(0)["triples"]["across"] < everything["triples"]["across"]


def test_items_survive_a_file_and_bad_lines_are_named(spoken, tmp_path):
    corpus, items, _, _ = spoken
    path = tmp_path / "phones.item"
    write_items(path, items, corpus)
    for one, again in zip(items, read_items(path, corpus), strict=True):
        assert np.array_equal(one, again)
    text = path.read_text()
    for bad, message in (
        ("", "its first line has to be"),
        (text + "1001-1-0000 0.5 0.4 a b c 1\n", f"line {len(items.phone) + 2}"),
        (text + "1001-1-0000 0.4\n", "is no item"),
        (text.splitlines()[0] + "\nother 0 1 a b c d\n", "has no item of"),
    ):
        path.write_text(bad)
        with pytest.raises(CorpusError, match=message):
            read_items(path, corpus)
    spaced = items._replace(speaker=np.char.add(items.speaker, " II"))
    with pytest.raises(CorpusError, match="names with spaces"):
        write_items(path, spaced, corpus)


FASTABX = """
import sys
from fastabx import zerospeech_abx

item, root, context, speaker = sys.argv[1:]
print(zerospeech_abx(item, root, max_size_group=None, max_x_across=None, device="cpu",
      speaker=speaker, context=context, frequency=100, progress=False))
"""


@pytest.fixture(scope="module")
def fastabx_python():
    """A Python that has fastabx: this one, or $CPC_NB_FASTABX_PYTHON."""
    python = os.environ.get("CPC_NB_FASTABX_PYTHON", sys.executable)
    asked = subprocess.run([python, "-c", "import fastabx"], capture_output=True)
    if asked.returncode:
        pytest.skip(
            f"fastabx (Python 3.12 or later) is not in {python}; name a Python that has"
            " it as CPC_NB_FASTABX_PYTHON"
        )
    return python


@pytest.mark.parametrize("context", ("within", "any"))
def test_equals_fastabx(spoken, tmp_path, fastabx_python, context):
    corpus, items, frames, mfcc = spoken
    if context == "any":  # all phones against all: a part will do
        items = Items(*(column[:400:2] for column in items))
    write_items(tmp_path / "phones.item", items, corpus)
    for utterance, start, n in zip(frames.utterances, frames.starts, frames.counts):
        features = torch.from_numpy(mfcc[start : start + n].copy())
        torch.save(features, tmp_path / f"{corpus.ids[utterance]}.pt")
    ours = abx_errors({"mfcc": mfcc}, frames, items, context, None, None)
    for mode in [mode for mode in MODES if mode in ours]:
        said = subprocess.run(
            [fastabx_python, "-c", FASTABX, "phones.item", ".", context, mode],
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert said.returncode == 0, said.stderr
        theirs = float(said.stdout.split()[-1])
        assert ours[mode]["mfcc"] == pytest.approx(theirs, abs=1e-4)
        assert 0 < theirs < 0.5
