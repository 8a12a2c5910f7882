"""Speech in every form is the corpus that its folder is; mistakes are named."""

import csv
import gzip
import json
import os
import re
import shutil
import sys
import weakref

import numpy as np
import pytest
import soundfile
from conftest import RATE, SMALL, voice, write_corpus

from cpc_nb import corpus as corpus_module
from cpc_nb.align import gather_transcripts, transcripts
from cpc_nb.config import ConfigError, MissingPackage, make_config
from cpc_nb.corpus import CorpusError, main, pack, scan
from cpc_nb.evaluation import find_labels
from cpc_nb.intervals import open_labels
from cpc_nb.labels import kaldi_frame_count
from cpc_nb.trainer import TrainingData

TEXTS = {
    "100-7-0000": "A FINE DAY",
    "100-7-0001": 'SHE SAID, "NO"',
    "101-7-0000": "ÇA VA",
    "101-7-0001": "",
}


@pytest.fixture(scope="module")
def speech(tmp_path_factory):
    """Two speakers with two utterances each, and a transcript of three."""
    root = write_corpus(tmp_path_factory.mktemp("corpora") / "four", 2, 2)
    for speaker in ("100", "101"):
        lines = [f"{u} {t}\n" for u, t in TEXTS.items() if t and u.startswith(speaker)]
        file = root / speaker / "7" / f"{speaker}-7.trans.txt"
        file.write_text("".join(lines), encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def files(speech):
    return scan(speech)


def rows(files, root, **names):
    """Rows of a manifest in `root` of all four utterances."""
    columns = dict(path="path", utterance="utterance", speaker="speaker", text="text")
    columns |= names
    return [
        {
            columns["path"]: os.path.relpath(file.path, root),
            columns["utterance"]: file.utterance,
            columns["speaker"]: file.speaker,
            columns["text"]: TEXTS[file.utterance],
        }
        for file in files
    ]


def write_table(path, rows, delimiter=",", encoding="utf-8"):
    with open(path, "w", newline="", encoding=encoding) as out:
        writer = csv.DictWriter(out, rows[0].keys(), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_lines(path, rows):
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(
        gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode()
    )
    return path


def assert_same(corpus, speech):
    """`corpus` is that of the folder: names, speakers, samples."""
    expected = pack(speech)
    assert corpus.fingerprint == expected.fingerprint
    assert np.array_equal(corpus.samples, expected.samples)
    assert not corpus.rejected


# --------------------------------------------------------------------------------------
# Every form is the same corpus

NEMO = dict(path="audio_filepath", speaker="speaker_id", utterance="id")
FORMS = {
    "csv": lambda path, rows: write_table(path / "m.csv", rows),
    "excel": lambda path, rows: write_table(path / "m.csv", rows, ";", "utf-8-sig"),
    "tsv": lambda path, rows: write_table(path / "m.tsv", rows, "\t"),
    "jsonl": lambda path, rows: write_lines(path / "m.jsonl", rows),
    "json": lambda path, rows: write_lines(path / "m.json", rows),
    "jsonl.gz": lambda path, rows: write_lines(path / "m.jsonl.gz", rows),
}


@pytest.mark.parametrize("names", [{}, NEMO], ids=["our names", "NeMo's"])
@pytest.mark.parametrize("form", FORMS)
def test_a_manifest_is_the_corpus_of_its_files(form, names, speech, files, tmp_path):
    manifest = FORMS[form](tmp_path, rows(files, tmp_path, **names))
    assert_same(pack(manifest), speech)
    assert pack(str(manifest)).root == pack(manifest).root
    said = {name: text for name, text in TEXTS.items() if text}
    assert transcripts(manifest) == transcripts(speech) == said


def test_only_the_path_is_needed(speech, files):
    manifest = speech / "list.csv"
    paths = [os.path.relpath(file.path, speech) for file in files]
    manifest.write_text("path\n" + "\n".join(paths))
    assert_same(pack(manifest), speech)
    assert transcripts(manifest) == {}
    with pytest.raises(CorpusError, match="no transcripts; give a column 'text'"):
        gather_transcripts(manifest)
    manifest.unlink()


def test_a_duration_alone_is_that_of_the_file(speech, files, tmp_path):
    """NeMo writes it, rounded; with an offset it is a part of the file."""
    table = rows(files, tmp_path, **NEMO)
    for row, file in zip(table, files, strict=True):
        row["duration"] = round(soundfile.info(file.path).duration, 2)
        del row["id"]
    corpus = pack(write_lines(tmp_path / "m.json", table))
    assert np.array_equal(corpus.samples, pack(speech).samples)
    assert corpus.ids[0].endswith("100-7-0000")
    table[0] |= {"offset": 1.0, "duration": 0.5}
    part = pack(write_lines(tmp_path / "m.json", table))
    assert np.array_equal(part.utterance(0), corpus.utterance(0)[16_000:24_000])
    assert part.ids[0].endswith("100-7-0000_00001000-00001500")


def test_parts_of_a_long_file_are_decoded_once(speech, files, tmp_path, monkeypatch):
    """Stereo at 44.1 kHz: each part is that part of the whole file, resampled."""
    wave = np.repeat(voice(1, 1, 3.0), 3)[: 3 * 44_100]
    soundfile.write(tmp_path / "long.flac", np.stack([wave, wave / 2], 1), 44_100)
    times = [(0, 0.8), (2.25, None), (0.8, 2.25)]
    table = ["path,utterance,speaker,start,end"]
    table += [f"long.flac,u{i},a,{a},{b or ''}" for i, (a, b) in enumerate(times)]
    table.insert(2, f"{files[0].path},other,b,,")
    (tmp_path / "m.csv").write_text("\n".join(table))
    read, opened = corpus_module.read_audio, []
    monkeypatch.setattr(
        corpus_module, "read_audio", lambda path: opened.append(path) or read(path)
    )
    corpus = pack(tmp_path / "m.csv", tmp_path / "packed")
    assert len(opened) == 2
    assert corpus.ids == ["u0", "u1", "u2", "other"]
    shutil.copytree(tmp_path, tmp_path / "w" / "x", ignore=lambda *_: ["w", "packed"])
    [whole] = [pack(tmp_path / "w").utterance(0)]
    for index, (start, end) in enumerate(times):
        part = whole[round(16_000 * start) : round(16_000 * (end or 99))]
        assert np.array_equal(corpus.utterance(index), part)
    assert corpus.changed == {"mixed down": 3, "resampled": 3}


@pytest.mark.parametrize("kind", ["int16", "float32", "stereo", "44.1 kHz"])
def test_an_iterable_is_the_corpus_of_its_samples(kind, speech, files, tmp_path):
    def spoken():
        for file in files:
            dtype = "int16" if kind == "int16" else "float32"
            samples, rate = soundfile.read(file.path, dtype=dtype)
            if kind == "stereo":
                samples = np.stack([samples, samples])
            if kind == "44.1 kHz":
                samples, rate = np.repeat(samples, 3), 3 * rate
            yield file.utterance, file.speaker, samples, rate

    corpus = pack(spoken())
    if kind != "44.1 kHz":
        assert_same(corpus, speech)
    else:
        assert np.array_equal(corpus.lengths, pack(speech).lengths)
    assert pack(list(spoken())).root == corpus.root
    assert pack(corpus.root).fingerprint == corpus.fingerprint
    packed = pack(spoken(), tmp_path / "packed")
    assert packed.fingerprint == corpus.fingerprint
    assert pack(spoken(), tmp_path / "packed").root == packed.root
    with pytest.raises(CorpusError, match="is not this corpus packed"):
        pack(list(spoken())[:2], tmp_path / "packed")
    assert transcripts(spoken()) == {}
    assert not list(corpus.root.parent.glob(".*.part"))


def test_an_iterable_is_read_as_it_is_packed(monkeypatch):
    """A few items wait for the disk, and none is kept afterwards."""
    monkeypatch.setattr(corpus_module, "default_workers", lambda: 1)
    given, alive = [], []

    def items():
        for number in range(40):
            wave = voice(1, number, 0.1)
            given.append(weakref.ref(wave))
            yield f"u{number}", "a", wave, RATE
            del wave
            alive.append(sum(one() is not None for one in given))

    assert len(pack(items())) == len(given) == 40
    assert max(alive) <= 8


# --------------------------------------------------------------------------------------
# Datasets and cuts, by their own libraries


@pytest.fixture(scope="module")
def hf():
    datasets = pytest.importorskip("datasets", reason="needs `pip install datasets`")
    datasets.disable_progress_bars()
    return datasets


def dataset_of(hf, files, **more):
    columns = {
        "audio": [str(file.path) for file in files],
        "id": [file.utterance for file in files],
        "speaker_id": [int(file.speaker) for file in files],
        "transcription": [TEXTS[file.utterance] for file in files],
    }
    return hf.Dataset.from_dict(columns | more).cast_column("audio", hf.Audio())


def test_a_dataset_is_the_corpus_of_its_audio(hf, speech, files, tmp_path):
    dataset = dataset_of(hf, files)
    dataset.save_to_disk(tmp_path / "saved")
    said = {name: text for name, text in TEXTS.items() if text}
    for source in (dataset, tmp_path / "saved", str(tmp_path / "saved")):
        assert_same(pack(source), speech)
        assert transcripts(source) == said
    assert pack(dataset.select([2, 3])).speakers == ["101"]


def test_a_dataset_of_arrays(hf, speech, files):
    waves = [soundfile.read(file.path, dtype="float32")[0] for file in files]
    cells = [{"array": wave, "sampling_rate": RATE} for wave in waves]
    dataset = hf.Dataset.from_dict(
        {
            "audio": cells,
            "id": [file.utterance for file in files],
            "speaker": [file.speaker for file in files],
        }
    )
    assert_same(pack(dataset), speech)


def test_a_dataset_that_was_saved_anew_is_packed_anew(hf, files, tmp_path):
    dataset_of(hf, files).save_to_disk(tmp_path / "saved")
    before = pack(tmp_path / "saved")
    shutil.rmtree(tmp_path / "saved")
    dataset_of(hf, files[1:]).save_to_disk(tmp_path / "saved")
    assert pack(tmp_path / "saved").ids == before.ids[1:]


def test_datasets_that_cannot_be_used(hf, files, tmp_path):
    dataset = dataset_of(hf, files)
    splits = hf.DatasetDict(train=dataset, test=dataset)
    splits.save_to_disk(tmp_path / "splits")
    with pytest.raises(CorpusError, match="splits 'train', 'test'; give one of them"):
        pack(splits)
    with pytest.raises(
        CorpusError, match="several splits.*splits/test, .*splits/train"
    ):
        pack(tmp_path / "splits")
    assert len(pack(tmp_path / "splits" / "train")) == 4
    with pytest.raises(CorpusError, match="no column 'audio', but 'id', 'speaker_id'"):
        pack(dataset.remove_columns("audio"))
    with pytest.raises(CorpusError, match="row 1: utterance 'a' is that of row 0"):
        pack(dataset_of(hf, files, id=["a", "a", "b", "c"]))
    with pytest.raises(CorpusError, match="a dataset that streams"):
        pack(dataset.to_iterable_dataset())
    next((tmp_path / "splits" / "train").glob("*.arrow")).write_bytes(b"not arrow")
    with pytest.raises(CorpusError, match="train cannot be read"):
        pack(tmp_path / "splits" / "train")


@pytest.fixture(scope="module")
def lhotse():
    return pytest.importorskip("lhotse", reason="needs `pip install lhotse`")


def cuts_of(lhotse, files):
    cuts = []
    for file in files:
        recording = lhotse.Recording.from_file(file.path)
        cut = recording.to_cut().with_id(file.utterance)
        said = lhotse.SupervisionSegment(
            id=file.utterance,
            recording_id=recording.id,
            start=0,
            duration=recording.duration,
            speaker=file.speaker,
            text=TEXTS[file.utterance] or None,
        )
        cut.supervisions = [said]
        cuts.append(cut)
    return lhotse.CutSet.from_cuts(cuts)


def test_cuts_are_the_corpus_of_their_recordings(lhotse, speech, files, tmp_path):
    cuts = cuts_of(lhotse, files)
    said = {name: text for name, text in TEXTS.items() if text}
    for name in ("cuts.jsonl", "cuts.jsonl.gz"):
        cuts.to_file(tmp_path / name)
        assert_same(pack(tmp_path / name), speech)
        assert transcripts(tmp_path / name) == said
    assert_same(pack(cuts), speech)


def test_cuts_that_only_lhotse_can_read(lhotse, speech, files):
    """Parts of files, padded ones, ones at another speed, and ones in memory."""
    [cut, *_] = cuts_of(lhotse, files)
    whole = pack(speech).utterance(0)
    part = cut.truncate(offset=0.5, duration=1.0).with_id("part")
    padded = cut.pad(duration=5.0).with_id("padded")
    faster = cut.perturb_speed(1.1).with_id("faster")
    memory = cut.move_to_memory().with_id("memory")
    corpus = pack(lhotse.CutSet.from_cuts([part, padded, faster, memory]))
    assert corpus.ids == ["part", "padded", "faster", "memory"]
    assert np.array_equal(corpus.utterance(0), whole[8_000:24_000])
    assert np.array_equal(corpus.utterance(1)[: len(whole)], whole)
    assert corpus.lengths[1] == 80_000
    assert corpus.lengths[2] == pytest.approx(len(whole) / 1.1, abs=2)
    assert np.array_equal(corpus.utterance(3), whole)


def test_cuts_that_cannot_be_used(lhotse, files, tmp_path):
    cuts = list(cuts_of(lhotse, files))
    cuts[0].supervisions = [*cuts[0].supervisions, *cuts[2].supervisions]
    corpus = pack(lhotse.CutSet.from_cuts(cuts))
    [[place, reason]] = corpus.rejected
    assert place == "cuts cuts, cut 100-7-0000"
    assert reason.startswith("speakers 100, 101 in one cut")
    (tmp_path / "c.jsonl").write_text('{"type": "MonoCut", "id": "a"}\n')
    with pytest.raises(CorpusError, match="c.jsonl is no CutSet for lhotse"):
        pack(tmp_path / "c.jsonl")


@pytest.mark.parametrize("package", ["datasets", "lhotse"])
def test_without_the_library(package, hf, lhotse, files, tmp_path, monkeypatch):
    """As where it is not installed: an import of it fails."""
    dataset_of(hf, files).save_to_disk(tmp_path / "saved")
    cuts_of(lhotse, files).to_file(tmp_path / "cuts.jsonl")
    source = tmp_path / {"datasets": "saved", "lhotse": "cuts.jsonl"}[package]
    monkeypatch.setitem(sys.modules, package, None)
    message = rf'^{package} is not installed; run: pip install "cpc_nb\[data\]"'
    with pytest.raises(MissingPackage, match=message):
        pack(source)


# --------------------------------------------------------------------------------------
# What changes is noticed


def test_a_changed_manifest_or_file_is_packed_anew(speech, files, tmp_path):
    copies = [tmp_path / file.path.name for file in files]
    for file, copy in zip(files, copies, strict=True):
        shutil.copy2(file.path, copy)
    table = [{"path": copy.name, "speaker": "a", "text": "ONE"} for copy in copies]
    first = pack(write_table(tmp_path / "m.csv", table))
    table[0]["text"] = "TWO"  # no other audio
    assert pack(write_table(tmp_path / "m.csv", table)).root == first.root
    assert transcripts(tmp_path / "m.csv")[first.ids[0]] == "TWO"
    table[0]["speaker"] = "b"
    second = pack(write_table(tmp_path / "m.csv", table))
    assert second.speakers == ["a", "b"]
    table[0] |= {"start": 0.5, "end": 2.0}
    for row in table[1:]:
        row |= {"start": "", "end": ""}
    third = pack(write_table(tmp_path / "m.csv", table))
    assert third.lengths.tolist() == [24_000, *second.lengths[1:]]
    soundfile.write(copies[1], voice(5, 5, 2.0), RATE)
    assert pack(tmp_path / "m.csv").lengths[1] == 32_000


def test_files_of_one_size_and_time_are_told_apart(tmp_path):
    """As those that an archive leaves behind."""
    for number in range(2):
        soundfile.write(tmp_path / f"{number}.wav", voice(number, 0, 1.0), RATE)
        os.utime(tmp_path / f"{number}.wav", (1e9, 1e9))
    corpora = []
    for number in range(2):
        (tmp_path / "m.csv").write_text(f"path,utterance,speaker\n{number}.wav,u,a\n")
        corpora.append(pack(tmp_path / "m.csv"))
    assert corpora[0].fingerprint != corpora[1].fingerprint


# --------------------------------------------------------------------------------------
# Mistakes

IMPOSSIBLE = {
    "no column": ("sound,speaker\na.wav,b", "line 2: no column 'path', but 'sound"),
    "a misspelt column": (
        "path,spekaer\na.wav,b",
        "column 'spekaer': did you mean 'sp",
    ),
    "start after end": (
        "path,start,end\nGOOD,2,1",
        "line 2: start = 2 s is not before",
    ),
    "start at end": ("path,start,end\n\nGOOD,1,1", "line 3: start = 1 s is not before"),
    "no number": ("path,start\nGOOD,soon", "line 2: start = 'soon': give seconds"),
    "a negative time": ("path,end\nGOOD,-1", "line 2: end = '-1': give seconds"),
    "not a number": ("path,end\nGOOD,nan", "line 2: end = 'nan': give seconds"),
    "no path": ("path,utterance\n,u", "line 2: no path"),
    "a column twice": ("path,path\na.wav,b.wav", "line 1: a column stands there twi"),
    "a row too wide": ("path\nGOOD,b", "line 2: 2 values in 1 columns"),
    "a row too narrow": ("path,speaker\nGOOD", "line 2: 1 values in 2 columns"),
    "twice": ("path\nGOOD\nGOOD", "line 3: utterance '.*' is that of line 2 as well"),
    "out of the folder": (
        "path,utterance\nGOOD,../u",
        "line 2: utterance = '../u' can",
    ),
    "an odd speaker": ("path,speaker\nGOOD,/etc", "line 2: speaker = '/etc' cannot"),
    "nothing": ("", "m.csv lists no utterance"),
    "only names": ("path,speaker\n", "m.csv lists no utterance"),
    "all missing": (
        "path\ngone.wav",
        "none of the 1 files can be used; the first: line",
    ),
    "a zero byte": ("path\nGO\0OD", "m.csv"),
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_a_manifest_that_is_impossible(name, files, tmp_path):
    content, message = IMPOSSIBLE[name]
    content = content.replace("GOOD", str(files[0].path))
    (tmp_path / "m.csv").write_text(content)
    done = pytest.raises(CorpusError, pack, tmp_path / "m.csv")
    assert re.search(message, str(done.value)), done.value
    assert str(done.value).count("m.csv") == 1 and "\n" not in str(done.value)


@pytest.mark.parametrize(
    "line, message",
    [
        ("[1, 2]", "line 2 is no JSON object"),
        ('{"path": ', "line 2 is no JSON object"),
        ('{"text": "a"}', "line 2: no column 'path', but 'text'"),
        ('{"path": 3}', "none|line 2"),
        ('{"path": "a.wav", "start": [1]}', r"line 2: start = \[1\]: give seconds"),
    ],
)
def test_json_lines_that_are_impossible(line, message, files, tmp_path):
    good = json.dumps({"path": str(files[0].path)})
    (tmp_path / "m.jsonl").write_text(f"{good}\n{line}\n")
    try:
        corpus = pack(tmp_path / "m.jsonl")
    except CorpusError as error:
        assert re.search(message, str(error))
    else:  # a number may be the name of a file, which is missing
        assert corpus.rejected[0][0].endswith("line 2")


@pytest.mark.parametrize("content", ["utf-16", "gzip"])
def test_manifests_that_are_no_text(content, tmp_path):
    path = tmp_path / {"utf-16": "m.csv", "gzip": "m.jsonl.gz"}[content]
    path.write_bytes("path\na".encode("utf-16"))
    with pytest.raises(
        CorpusError, match="manifest .* (is not text in|cannot be read)"
    ):
        pack(path)


def test_what_cannot_be_used_is_set_aside_with_the_reason(files, tmp_path):
    (tmp_path / "text.wav").write_text("no audio")
    (tmp_path / "folder.wav").mkdir()
    good = files[0].path  # 2.7 s
    table = [
        "path,utterance,start,end",
        f"{good},good,,2.74",  # 40 ms too many: rounded
        "gone.wav,gone,,",
        "text.wav,text,,",
        "folder.wav,folder,,",
        f"{good},late,1.0,3.2",
        f"{good},beyond,3.0,",
        f"{good},short,1.0,1.01",
    ]
    (tmp_path / "m.csv").write_text("\n".join(table))
    corpus = pack(tmp_path / "m.csv")
    assert corpus.ids == ["good"] and corpus.lengths[0] == 43_200
    told = dict(map(tuple, corpus.rejected))
    where = f"manifest {tmp_path / 'm.csv'}, line"
    assert told.pop(f"{where} 3").endswith("gone.wav: No such file or directory")
    assert told.pop(f"{where} 5").endswith("folder.wav is no file")
    assert told.pop(str(tmp_path / "text.wav")).startswith("not readable as audio")
    late = "ends at 3.2 s, and its recording ends at 2.70 s"
    assert told.pop(f"{good}, 1 s to 3.2 s") == late
    beyond = "starts at 3 s, and its recording ends at 2.70 s"
    assert told.pop(f"{good}, 3 s to its end") == beyond
    assert told.pop(f"{good}, 1 s to 1.01 s") == "too short: 160 samples"
    assert not told and "6 files were set aside" in corpus.describe()


BAD_ITEMS = {
    "not four": [("u", "a", np.ones(RATE))],
    "no tuple": [3],
    "a name that leads out": [("../u", "a", np.ones(RATE), RATE)],
    "a string": "abc",
    "a dictionary": {"u": 1},
}


@pytest.mark.parametrize("name", BAD_ITEMS)
def test_items_that_are_impossible(name):
    with pytest.raises(CorpusError, match=r"item 0 .*has to be \(id, speaker, sam"):
        pack(iter(BAD_ITEMS[name]))


def test_items_that_cannot_be_used_are_set_aside(cache):
    wave = voice(1, 1, 1.0)
    items = [
        ("good", "a", wave, RATE),
        ("good", "a", wave, RATE),
        ("nan", "a", wave * np.nan, RATE),
        ("silent", "a", 0 * wave, RATE),
        ("rate", "a", wave, 100),
        ("shape", "a", np.ones((RATE, 9)), RATE),
        ("kind", "a", np.ones(RATE, int), RATE),
        ("text", "a", "wave", RATE),
        ("short", "a", wave[:300], RATE),
    ]
    corpus = pack(items)
    assert corpus.ids == ["good"]
    told = [reason for _, reason in corpus.rejected]
    for reason, start in zip(
        told,
        [
            "a second file of utterance good",
            "the waveform holds NaN",
            "silent",
            "sample_rate = 100",
            "9 channels|16000 channels",
            "samples are float",
            "wave cannot be read: No such file",
            "too short",
        ],
        strict=True,
    ):
        assert re.match(start, reason), reason
    with pytest.raises(CorpusError, match="none of the 1 audio files in iterable"):
        pack(items[2:3])
    with pytest.raises(CorpusError, match="iterable is empty"):
        pack([])

    def breaks():
        yield items[0]
        raise OverflowError("a reader's own mistake")

    with pytest.raises(OverflowError):
        pack(breaks())
    assert not list((cache / "packed").glob(".*.part"))


@pytest.mark.parametrize("source", [None, 3, 2.5])
def test_objects_that_are_no_speech(source):
    with pytest.raises(CorpusError, match=f"data is {source}; give a folder"):
        pack(source)


# --------------------------------------------------------------------------------------
# Labels in a manifest


def test_classes_in_a_manifest_are_labels(speech, files, tmp_path):
    corpus = pack(speech)
    counts = kaldi_frame_count(corpus.lengths)
    table = rows(files, tmp_path)
    for index, row in enumerate(table):
        row["labels"] = [index] * int(counts[index])
    manifest = write_lines(tmp_path / "m.jsonl", table)
    for row in table:
        row["labels"] = " ".join(map(str, row["labels"]))
    assert find_labels(None, str(manifest)) == manifest
    for path in (manifest, write_table(tmp_path / "m.csv", table)):
        labels = open_labels(path, pack(path))
        assert labels.values.tolist() == np.repeat(np.arange(4), counts).tolist()
        assert labels.report["matched"] == 4
    table[0]["labels"] = "1 2 x"
    write_table(tmp_path / "m.csv", table)
    with pytest.raises(
        CorpusError, match="utterance '100-7-0000': .* not all integers"
    ):
        open_labels(tmp_path / "m.csv", corpus)


def test_a_manifest_without_labels(files, tmp_path):
    manifest = write_lines(tmp_path / "m.jsonl", rows(files, tmp_path))
    assert find_labels(None, str(manifest)) is None
    with pytest.raises(CorpusError, match="has no labels; give a column 'labels'"):
        open_labels(manifest, pack(manifest))
    with pytest.raises(ConfigError, match="no such file, and no folder"):
        find_labels("/nowhere/labels", str(manifest))


# --------------------------------------------------------------------------------------
# Commands


def test_commands_take_a_manifest(speech, files, tmp_path, capsys):
    manifest = write_table(tmp_path / "m.csv", rows(files, tmp_path))
    main([str(manifest), str(tmp_path / "packed")])
    assert "m: 4 utterances, 2 speakers" in capsys.readouterr().out
    assert_same(pack(tmp_path / "packed"), speech)
    (tmp_path / "wrong.csv").write_text("path,start,end\na.wav,2,1\n")
    for name, message in {
        "wrong.csv": "wrong.csv, line 2: start = 2 s is not before end = 1 s",
        "none.csv": "none.csv': no such folder; give a folder of audio, a manifest",
    }.items():
        with pytest.raises(SystemExit) as exit:
            main([str(tmp_path / name)])
        assert message in str(exit.value) and "\n" not in str(exit.value)


def test_training_takes_a_manifest(tmp_path):
    """The same windows as from the folder, in the same order."""
    speech = write_corpus(tmp_path / "voices", 4, 4)
    table = [
        {"path": file.path, "speaker": file.speaker, "utterance": file.utterance}
        for file in scan(speech)
    ]
    manifest = write_table(tmp_path / "m.csv", table)
    small = SMALL | {"train.batch_size": 8, "train.max_steps": 2}
    ours, expected = (
        TrainingData(make_config("demo", small | {"data.source": str(source)}))
        for source in (manifest, speech)
    )
    for step in range(2):
        audio = ours.windows.batch(step).audio
        assert np.array_equal(audio, expected.windows.batch(step).audio)
