"""Intervals in TextGrids and CTM files: to classes and back, and what is wrong."""

import json
import os
import re
import sys

import numpy as np
import pytest

from cpc_nb.align import AlignError, align_corpus, report_path, transcripts, words_of
from cpc_nb.config import ConfigError, MissingPackage
from cpc_nb.corpus import Corpus, CorpusError, pack
from cpc_nb.demo import PHONE_CLASSES, make_demo_corpus
from cpc_nb.evaluation import choose_protocols, find_labels
from cpc_nb.intervals import (
    Interval,
    ctm_text,
    digest_labels,
    intervals_at_frames,
    intervals_of_runs,
    open_labels,
    read_ctm,
    read_textgrid,
    write_textgrid,
)
from cpc_nb.labels import kaldi_frame_count, load_labels
from cpc_nb.probe import phone_task

praatio = pytest.importorskip("praatio.textgrid", reason="needs `pip install praatio`")


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """Two voices with three sentences each, transcripts and exact labels."""
    root = tmp_path_factory.mktemp("demo") / "two"
    return make_demo_corpus(root, n_voices=2, n_sentences=3, progress=False)


@pytest.fixture(scope="module")
def aligned(demo, tmp_path_factory):
    """The label file of `demo`, with TextGrids and CTM beside it."""
    pytest.importorskip("pocketsphinx", reason="needs `pip install cpc_nb[align]`")
    out = tmp_path_factory.mktemp("labels") / "phones.txt"
    align_corpus(demo, out, workers=1, formats="textgrid,ctm")
    return out


def corpus_of(**seconds):
    """A corpus of one speaker with utterances of so many seconds."""
    lengths = np.array([round(16_000 * length) for length in seconds.values()])
    samples = np.random.default_rng(0).integers(-99, 99, lengths.sum(), np.int16)
    starts = np.cumsum(lengths) - lengths
    speaker = np.zeros(len(lengths), int)
    return Corpus("few", samples, list(seconds), ["a"], starts, lengths, speaker)


def equal_labels(ours, expected):
    """Whether labels are the same phones at the same frames."""
    names = [np.array(labels.names)[labels.values] for labels in (ours, expected)]
    return np.array_equal(*names) and np.array_equal(ours.counts, expected.counts)


# --------------------------------------------------------------------------------------
# Frames


def test_frames_are_those_of_a_slow_reference():
    """Frame t has the phone that holds sample 160 t + 200."""
    random = np.random.default_rng(0)
    for _ in range(50):
        edges = np.sort(random.uniform(0, 2, 20)).round(random.integers(2, 6))
        pairs = list(zip(edges[::2], edges[1::2], strict=True))
        intervals = [Interval(a, b, f"{i}") for i, (a, b) in enumerate(pairs)]
        n_samples = int(random.integers(300, 40_000))
        found = intervals_at_frames(intervals, n_samples).tolist()
        assert len(found) == kaldi_frame_count(n_samples)
        for t, index in enumerate(found):
            seconds = (160 * t + 200) / 16_000
            holds = [i for i, (a, b) in enumerate(pairs) if a <= seconds < b]
            assert [index] == (holds or [-1])


def test_runs_of_frames_become_intervals_and_frames_again():
    random = np.random.default_rng(0)
    for n_samples in random.integers(700, 30_000, 50):
        left, runs = int(kaldi_frame_count(n_samples)), []
        while left > 0:
            runs.append((f"p{len(runs)}", min(left, int(random.integers(1, 9)))))
            left -= runs[-1][1]
        intervals = intervals_of_runs(runs, n_samples)
        assert intervals[0].start == 0 and intervals[-1].end == n_samples / 16_000
        assert all(a.end == b.start for a, b in zip(intervals, intervals[1:]))
        index = intervals_at_frames(intervals, n_samples)
        assert (
            index.tolist() == np.repeat(range(len(runs)), [n for _, n in runs]).tolist()
        )
    assert intervals_of_runs([("a", 10), ("b", 5)], 1600)[-1].label == "a"  # no room


# --------------------------------------------------------------------------------------
# From the aligner to Praat and Kaldi, and back


def test_words_and_phones_of_an_alignment_are_kept(demo, aligned):
    corpus, texts = pack(demo), transcripts(demo)
    names = ["phones.phones.ctm", "phones.textgrids", "phones.words.ctm"]
    assert set(names) < set(os.listdir(aligned.parent))
    labels = load_labels(aligned, corpus)
    assert equal_labels(open_labels(aligned.parent / names[0], corpus), labels)
    assert equal_labels(open_labels(aligned.parent / names[1], corpus), labels)
    words = read_ctm(aligned.parent / names[2])
    for index, name in enumerate(corpus.ids):
        path = aligned.parent / names[1] / f"{name}.TextGrid"
        tiers, duration = read_textgrid(path)
        spoken = words_of(texts[name])
        assert list(tiers) == ["words", "phones"]
        assert duration == corpus.lengths[index] / 16_000
        assert [one.label for one in tiers["words"]] == spoken
        assert [one.label for one in words[name]] == spoken
        times = [one[:2] for one in words[name]]
        assert np.allclose(times, [one[:2] for one in tiers["words"]], atol=1.1e-4)
        assert {one.label for one in tiers["phones"]} <= set(PHONE_CLASSES)


def test_a_finished_alignment_is_found_with_its_formats(demo, aligned, tmp_path):
    out = tmp_path / "phones.txt"
    plain = align_corpus(demo, out, workers=1)
    assert plain["formats"] == [] and len(os.listdir(tmp_path)) == 4
    with_ctm = align_corpus(demo, out, workers=1, formats="ctm")
    assert with_ctm == plain | {"formats": ["ctm"]}
    made = (tmp_path / "phones.words.ctm").stat().st_mtime_ns
    assert align_corpus(demo, out, formats="ctm") == align_corpus(demo, out) == with_ctm
    assert (tmp_path / "phones.words.ctm").stat().st_mtime_ns == made
    ours = (tmp_path / "phones.words.ctm").read_text()
    assert ours == (aligned.parent / "phones.words.ctm").read_text()
    (tmp_path / "phones.words.ctm").unlink()
    align_corpus(demo, out, workers=1, formats="ctm")
    assert (tmp_path / "phones.words.ctm").read_text() == ours


@pytest.mark.parametrize(
    "formats, message",
    [
        ("praat", "formats: 'praat' is unknown"),
        ("ctm", "labels.words.ctm exists, and no alignment of labels.txt has written"),
        ("textgrid", "labels.textgrids exists, and no alignment"),
    ],
)
def test_nothing_is_overwritten_that_is_not_ours(formats, message, demo, tmp_path):
    (tmp_path / "labels.words.ctm").write_text("mine")
    (tmp_path / "labels.textgrids").mkdir()
    with pytest.raises(AlignError, match=message):
        align_corpus(demo, tmp_path / "labels.txt", workers=1, formats=formats)
    assert (tmp_path / "labels.words.ctm").read_text() == "mine"
    assert not report_path(tmp_path / "labels.txt").exists()


def test_without_praatio(demo, aligned, tmp_path, monkeypatch):
    """As where it is not installed: an import of it fails."""
    monkeypatch.setitem(sys.modules, "praatio", None)
    message = r'^praatio is not installed; run: pip install "cpc_nb\[align\]"'
    with pytest.raises(MissingPackage, match=message):
        align_corpus(demo, tmp_path / "a.txt", workers=1, formats="textgrid")
    with pytest.raises(MissingPackage, match=message):
        open_labels(aligned.parent / "phones.textgrids", pack(demo))
    assert open_labels(aligned.parent / "phones.phones.ctm", pack(demo)).report[
        "matched"
    ]


def test_a_manifest_is_aligned(demo, aligned, tmp_path):
    """Its texts and its audio are those of the folder, so the labels are as well."""
    corpus, texts = pack(demo), transcripts(demo)
    rows = [
        {"path": str(next(demo.rglob(f"{name}.flac"))), "text": texts[name]}
        for name in corpus.ids
    ]
    for row, name in zip(rows, corpus.ids, strict=True):
        row |= {"utterance": name, "speaker": name.split("-")[0]}
    manifest = tmp_path / "m.jsonl"
    manifest.write_text("\n".join(map(json.dumps, rows)))
    align_corpus(manifest, tmp_path / "labels.txt", workers=1)
    assert (tmp_path / "labels.txt").read_bytes() == aligned.read_bytes()


# --------------------------------------------------------------------------------------
# Labels for the evaluation


def test_the_evaluation_takes_textgrids_and_ctm(demo, aligned, capsys):
    corpus = pack(demo)
    train, test = np.arange(0, 6, 2), np.arange(1, 6, 2)
    expected = phone_task(corpus, aligned, train, test)
    for name in ("phones.textgrids", "phones.phones.ctm"):
        path = find_labels(str(aligned.parent / name), str(demo))
        assert "phone_frame" in choose_protocols(None, path)
        task = phone_task(corpus, path, train, test)
        assert equal_labels(task.labels, expected.labels)
        assert f"{name}: 6 utterances have labels" in capsys.readouterr().out


def test_classes_are_named_in_order_or_as_a_file_says(tmp_path):
    corpus = corpus_of(u=0.5)
    text = ctm_text({"u": [Interval(0.1, 0.2, "ZH_B"), Interval(0.2, 0.4, "AH0")]})
    (tmp_path / "a.ctm").write_text(text)
    labels = open_labels(tmp_path / "a.ctm", corpus)
    assert labels.names == ("SIL", "AH", "ZH")
    expected = 9 * [0] + 10 * [2] + 20 * [1] + 9 * [0]
    assert labels.values.tolist() == expected
    (tmp_path / "phone_classes.txt").write_text("ZH\nAH\nSIL\n")
    named = open_labels(tmp_path / "a.ctm", corpus)
    assert named.names == ("ZH", "AH", "SIL") and equal_labels(named, labels)
    (tmp_path / "phone_classes.txt").write_text("ZH\nSIL\n")
    with pytest.raises(CorpusError, match="u: 'AH' is not named in phone_classes.txt"):
        open_labels(tmp_path / "a.ctm", corpus)


def test_textgrids_are_found_by_path_or_name_and_counted(tmp_path):
    """Three of six fit: one is longer, one is of nobody, one has none."""
    corpus = corpus_of(**{"a/x": 1.0, "y": 1.0, "z": 1.0, "long": 1.0, "none": 1.0})
    phones = {"phones": [Interval(0.2, 0.8, "AH")]}
    grids = {"a/x": 1.0, "b/y": 1.02, "z": 0.97, "long": 1.3, "nobody": 1.0}
    for name, duration in grids.items():
        write_textgrid(tmp_path / f"{name}.TextGrid", phones, duration)
    labels = open_labels(tmp_path, corpus)
    expected = dict(matched=3, cut=2, wrong_length=1, unknown=1, missing=2)
    assert labels.report == expected
    frame = np.array([[200 + 160 * 30]])
    assert [labels.at([i], frame).item() for i in range(5)] == [1, 1, 1, -1, -1]
    before = digest_labels(tmp_path)
    write_textgrid(tmp_path / "z.TextGrid", phones, 1.0)
    assert digest_labels(tmp_path) != before
    write_textgrid(tmp_path / "c" / "y.TextGrid", phones, 1.0)
    with pytest.raises(CorpusError, match="y.TextGrid are both of utterance 'y'"):
        open_labels(tmp_path, corpus)


def test_a_ctm_that_goes_on_after_the_end_is_of_another_length(tmp_path):
    corpus = corpus_of(u=1.0, v=1.0)
    found = {"u": [Interval(0, 1.5, "A")], "v": [Interval(0, 1.03, "A")]}
    (tmp_path / "a.ctm").write_text(ctm_text(found))
    report = open_labels(tmp_path / "a.ctm", corpus).report
    assert (report["matched"], report["wrong_length"]) == (1, 1)
    (tmp_path / "a.ctm").write_text(ctm_text({"w": [Interval(0, 1, "A")]}))
    with pytest.raises(CorpusError, match="a.ctm matches no utterance of few .1 unkn"):
        open_labels(tmp_path / "a.ctm", corpus)


def test_textgrids_named_in_a_manifest(demo, aligned, tmp_path):
    corpus, rows = pack(demo), ["path,utterance,labels"]
    for name in corpus.ids:
        grid = aligned.parent / "phones.textgrids" / f"{name}.TextGrid"
        audio = next(demo.rglob(f"{name}.flac"))
        rows.append(f"{audio},{name},{os.path.relpath(grid, tmp_path)}")
    (tmp_path / "m.csv").write_text("\n".join(rows))
    path = find_labels(None, str(tmp_path / "m.csv"))
    labels = open_labels(path, pack(path))
    assert equal_labels(labels, load_labels(aligned, corpus))
    rows[1] = rows[1].replace(".TextGrid", "-gone.TextGrid")
    (tmp_path / "m.csv").write_text("\n".join(rows))
    with pytest.raises(
        CorpusError, match="gone.TextGrid cannot be used: .*No such file"
    ):
        open_labels(tmp_path / "m.csv", corpus)


def test_alignments_of_lhotse_are_labels(demo, aligned):
    lhotse = pytest.importorskip("lhotse", reason="needs `pip install lhotse`")
    from lhotse.supervision import AlignmentItem

    corpus, cuts = pack(demo), []
    for name, phones in read_ctm(aligned.parent / "phones.phones.ctm").items():
        recording = lhotse.Recording.from_file(next(demo.rglob(f"{name}.flac")))
        cut = recording.to_cut().with_id(name)
        items = [AlignmentItem(p, a, round(b - a, 6)) for a, b, p in phones]
        whole = dict(id=name, recording_id=name, start=0, duration=recording.duration)
        said = lhotse.SupervisionSegment(**whole, alignment={"phone": items})
        cut.supervisions = [said]
        cuts.append(cut)
    path = aligned.parent / "cuts.jsonl"
    lhotse.CutSet.from_cuts(cuts).to_file(path)
    names = aligned.parent / "phone_classes.txt"
    assert names.exists()
    labels = open_labels(find_labels(None, str(path)), pack(path))
    assert equal_labels(labels, load_labels(aligned, corpus))


# --------------------------------------------------------------------------------------
# What is wrong with a file


@pytest.fixture
def grid(tmp_path):
    """A TextGrid of one second, in Praat's long form."""
    tiers = {
        "words": [Interval(0.1, 0.9, "née")],
        "phones": [Interval(0.1, 0.5, "N"), Interval(0.5, 0.9, "EY1")],
    }
    write_textgrid(tmp_path / "grids" / "u.TextGrid", tiers, 1.0)
    return tmp_path / "grids" / "u.TextGrid"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("form", ["long_textgrid", "short_textgrid"])
def test_every_form_of_textgrid_is_read(form, encoding, grid):
    before = read_textgrid(grid)
    opened = praatio.openTextgrid(str(grid), True)
    opened.save(str(grid), form, True)
    grid.write_bytes(grid.read_text(encoding="utf-8").encode(encoding))
    assert read_textgrid(grid) == before
    assert before[0]["words"][0].label == "née"
    assert open_labels(grid.parent, corpus_of(u=1.0)).names == ("SIL", "EY", "N")


SPOILT = {
    "overlap": (("xmin = 0.5", "xmin = 0.45"), "overlap in time"),
    "backwards": (("xmax = 0.9", "xmax = 0.05"), "u.TextGrid cannot be used"),
    "no number": (("xmax = 0.9", "xmax = soon"), "u.TextGrid cannot be used"),
    "no tier": (('"phones"', '"sounds"'), "no tier 'phones', but 'words', 'sounds'"),
    "two tiers": (('"words"', '"a - phones"'), "several tiers of phones, 'a - phones'"),
    "twice": (('"words"', '"phones"'), "u.TextGrid cannot be used.*same name"),
}


@pytest.mark.parametrize("name", SPOILT)
def test_textgrids_that_are_wrong_are_named(name, grid):
    change, message = SPOILT[name]
    text = grid.read_text(encoding="utf-8")
    assert change[0] in text
    grid.write_text(text.replace(*change), encoding="utf-8")
    with pytest.raises(CorpusError, match=message) as error:
        open_labels(grid.parent, corpus_of(u=1.0))
    assert str(grid) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "no TextGrid, or was cut short"),
        (b"hello", "no TextGrid, or was cut short"),
        ("née".encode("latin-1"), "neither UTF-8 nor UTF-16; save it as UTF-8"),
        (bytes(range(256)), "neither UTF-8 nor UTF-16"),
        (None, "u.TextGrid cannot be used"),
    ],
)
def test_files_that_are_no_textgrids(content, message, grid):
    half = grid.read_bytes()[: len(grid.read_bytes()) // 2]
    grid.write_bytes(half if content is None else content)
    with pytest.raises(CorpusError, match=message) as error:
        open_labels(grid.parent, corpus_of(u=1.0))
    assert str(grid) in str(error.value) and "\n" not in str(error.value)


def test_folders_without_textgrids(grid):
    corpus = corpus_of(u=1.0)
    (grid.parent / "empty").mkdir()
    with pytest.raises(CorpusError, match="there is no .*TextGrid in this folder"):
        open_labels(grid.parent / "empty", corpus)
    grid.rename(grid.with_name("other.TextGrid"))
    with pytest.raises(CorpusError, match="matches no utterance of few"):
        open_labels(grid.parent, corpus)
    with pytest.raises(ConfigError, match="no such file, and no folder"):
        find_labels(str(grid.parent / "gone"), "demo")


@pytest.mark.parametrize(
    "line, message",
    [
        ("u 1 0.5 0.2", "line 3: 4 columns; give utterance, channel, start, duration"),
        ("u 1 0.5 0.2 A 0.9 x", "line 3: 7 columns"),
        ("u 1 now 0.2 A", "line 3: start and duration are 'now' and '0.2'"),
        ("u 1 0.5 -0.2 A", r"line 3: 'A' \(0.5 s to 0.3 s\) is no interval"),
        ("u 1 -0.5 0.2 A", "line 3: 'A' .*is no interval"),
        ("u 1 nan 0.2 A", "line 3: 'A' .*is no interval"),
        ("u 1 0.3 0.2 A", r"utterance 'u': 'B' \(0.2 s to 0.4 s\) and 'A' .* overlap"),
    ],
)
def test_ctm_files_that_are_wrong(line, message, tmp_path):
    text = f";; a comment\nu A 0.2 0.2 B 0.93\n{line}\n"
    (tmp_path / "a.ctm").write_text(text)
    with pytest.raises(CorpusError) as error:
        open_labels(tmp_path / "a.ctm", corpus_of(u=1.0))
    assert re.match(f"CTM file [^,]*a.ctm, {message}", str(error.value))


def test_ctm_files_that_are_no_text(tmp_path):
    (tmp_path / "a.ctm").write_bytes("u 1 0 1 née".encode("latin-1"))
    with pytest.raises(CorpusError, match="^CTM file .*a.ctm is not text in UTF-8"):
        open_labels(tmp_path / "a.ctm", corpus_of(u=1.0))
    (tmp_path / "a.ctm").write_text("")
    with pytest.raises(CorpusError, match="matches no utterance"):
        open_labels(tmp_path / "a.ctm", corpus_of(u=1.0))
