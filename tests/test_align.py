"""Forced alignment of synthesised speech: labels, errors, and interrupted work."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT, SPEECH, options, run

from cpc_nb.align import (
    AlignError,
    align_corpus,
    describe_alignment,
    main,
    pronounce,
    read_transcripts,
    report_path,
    words_of,
)
from cpc_nb.corpus import CorpusError, pack
from cpc_nb.demo import PHONE_CLASSES, make_demo_corpus
from cpc_nb.labels import load_labels

pytest.importorskip(
    "pocketsphinx", reason="alignment needs pocketsphinx: pip install -e .[align]"
)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """Four voices with six utterances each, transcripts and exact labels."""
    return make_demo_corpus(
        tmp_path_factory.mktemp("demo") / "four",
        n_voices=4,
        n_sentences=6,
        progress=False,
    )


@pytest.fixture(scope="module")
def aligned(demo, tmp_path_factory):
    """The label file of `demo`, made by one process."""
    out = tmp_path_factory.mktemp("labels") / "phones.txt"
    align_corpus(demo, out, workers=1)
    return out


@pytest.fixture
def own(demo, tmp_path):
    """A copy of two chapters of `demo`, to spoil."""
    for speaker in ("1001", "1002"):
        shutil.copytree(demo / speaker, tmp_path / "own" / speaker)
    return tmp_path / "own"


def chapter(root, speaker="1001"):
    return root / speaker / "1" / f"{speaker}-1.trans.txt"


def rewrite(path, *lines):
    path.write_text("".join(f"{line}\n" for line in lines))


def command(*arguments, **environment):
    return run(sys.executable, "-m", "cpc_nb.align", *arguments, **environment)


def frames(path):
    return {
        line.split()[0]: np.array(line.split()[1:], int)
        for line in path.read_text().splitlines()
    }


# --------------------------------------------------------------------------------------
# Labels


def test_labels_agree_with_the_truth(demo, aligned):
    """Every utterance has labels, with Kaldi's frame count and the demo's classes.

    Most frames are right, and no shift makes it better."""
    corpus = pack(demo)
    ours, truth = load_labels(aligned, corpus), load_labels(demo / "phones.txt", corpus)
    assert (
        ours.report
        == truth.report
        == dict(matched=24, cut=0, wrong_length=0, unknown=0, missing=0)
    )
    assert ours.names == truth.names == PHONE_CLASSES and np.array_equal(
        ours.counts, truth.counts
    )
    agreement = {
        shift: np.mean(np.roll(ours.values, shift) == truth.values)
        for shift in range(-3, 4)
    }
    assert max(agreement, key=agreement.get) == 0 and agreement[0] > 0.7
    assert (
        agreement[0]
        > 1.5
        * np.mean(np.random.default_rng(0).permutation(ours.values) == truth.values)
        + 0.5
    )


def test_labels_do_not_depend_on_order_or_processes(demo, aligned, own, tmp_path):
    """Two processes write the same bytes as one; so does a part of a corpus."""
    report = align_corpus(demo, tmp_path / "two" / "phones.txt", workers=2)
    assert (tmp_path / "two" / "phones.txt").read_bytes() == aligned.read_bytes()
    assert (
        report == json.loads(report_path(aligned).read_text())
        and sum(report["aligned"].values()) == 24
    )
    shutil.rmtree(own / "1001")
    align_corpus(own, tmp_path / "part.txt", workers=1)
    assert (tmp_path / "part.txt").read_text() in aligned.read_text()


def test_the_command(demo, aligned, tmp_path):
    done = command(
        "--data", demo, "--out", tmp_path / "new" / "labels.txt", "--workers", 1
    )
    assert (
        done.code == 0
        and "four: 24 of 24 utterances aligned" in done.output
        and done.last == str(tmp_path / "new" / "labels.txt")
    )
    assert (tmp_path / "new" / "labels.txt").read_bytes() == aligned.read_bytes()
    assert sorted(os.listdir(tmp_path / "new")) == [
        ".labels.txt.lock",
        "labels.report.json",
        "labels.txt",
        "phone_classes.txt",
    ]


def test_a_text_beside_each_file(own, aligned, tmp_path):
    """A folder of a speaker with NAME.flac and NAME.txt, mixed case, punctuation."""
    texts, _ = read_transcripts(own)
    root = tmp_path / "folders" / "Anna"
    root.mkdir(parents=True)
    for utterance in list(texts)[:3]:
        shutil.copy(
            own / "1001" / "1" / f"{utterance}.flac",
            root / f"take {utterance[-1]}.flac".replace(" ", "-"),
        )
        (root / f"take-{utterance[-1]}.txt").write_text(
            "\ufeff“" + texts[utterance].capitalize().replace("'", "’") + "!”\n",
            encoding="utf-8",
        )
    align_corpus(tmp_path / "folders", tmp_path / "labels.txt", workers=1)
    ours, before = frames(tmp_path / "labels.txt"), frames(aligned)
    assert list(ours) == ["Anna/take-0", "Anna/take-1", "Anna/take-2"]
    for name, labels in ours.items():
        assert np.array_equal(labels, before[f"1001-1-000{name[-1]}"])


@pytest.mark.parametrize(
    "text, words",
    [
        ("DON'T", ["don't"]),
        ("it’s 5 o’clock", ["it's", "5", "o'clock"]),
        ("Rock & roll", ["rock", "and", "roll"]),
        ("a—b...c", ["a", "b", "c"]),
        ("«Déjà vu»", ["deja", "vu"]),
        (
            "No. 3, at 10:30; €1,000.50 (or 7%)",
            ["no", "3", "at", "10:30", "€1,000.50", "or", "7%"],
        ),
        ("under_score", ["under", "score"]),
        ("", []),
        ("?! …", []),
        ("语音 ok", ["语音", "ok"]),
    ],
)
def test_words(text, words):
    assert words_of(text) == words


@pytest.mark.parametrize(
    "word, phones",
    [
        ("quirt", "K W ER T"),
        ("7", "S EH V AH N"),
        ("21st", "T W EH N T IY F ER S T"),
        ("语音", ""),
        ("'", ""),
        ("7语", ""),
    ],
)
def test_pronunciations(word, phones):
    assert " ".join(pronounce(word)) == phones


# --------------------------------------------------------------------------------------
# Errors


def test_utterances_that_cannot_be_aligned_are_listed_with_the_reason(own, tmp_path):
    lines = chapter(own).read_text().splitlines()
    rewrite(
        chapter(own),
        lines[0] + " QUIRT",
        lines[1] + 60 * " AND SO ON",
        "1001-1-0002",
        lines[3] + " 语音",
        "1001-1-0077 WHO IS THIS",
    )  # 1001-1-0004 and -0005 are left out
    (own / "1002" / "1" / "1002-1-0000.flac").rename(
        own / "1002" / "1" / "two words.flac"
    )
    rewrite(
        chapter(own, "1002"),
        *chapter(own, "1002")
        .read_text()
        .replace("1002-1-0000 ", "two words ")
        .splitlines(),
    )
    (own / "1002" / "1" / "two words.txt").write_text("two words")
    report = align_corpus(own, tmp_path / "labels.txt", workers=1)
    reasons = {
        "1001-1-0001": r"no path through its words \(\d+ in \d.\d s\), with any beam",
        "1001-1-0002": "no words in its transcript",
        "1001-1-0003": "no English pronunciation of '语音'",
        "1001-1-0004": "no transcript",
        "1001-1-0005": "no transcript",
        "1002/1/two words": "a space in its name.*rename",
    }
    assert report["unaligned"].keys() == reasons.keys()
    for utterance, reason in reasons.items():
        assert re.match(reason, report["unaligned"][utterance])
    assert report["pronounced"]["quirt"] == "K W ER T" and report[
        "transcripts_without_audio"
    ] == ["1001-1-0077", "two"]
    assert load_labels(tmp_path / "labels.txt", pack(own)).report == dict(
        matched=6, cut=0, wrong_length=0, unknown=0, missing=6
    )
    for fragment in (
        "6 of 12 utterances aligned",
        "quirt: K W ER T",
        "6 utterances have no labels",
        "1001-1-0004: no transcript",
        "2 transcripts have no audio, the first is that of 1001-1-0077",
    ):
        assert fragment in describe_alignment(report)


def no_transcript(root):
    chapter(root).unlink()
    chapter(root, "1002").unlink()


def twice(root):
    rewrite(chapter(root), "1001-1-0000 ONE", "1001-1-0000 TWO")


def two_files(root):
    shutil.copy(chapter(root), chapter(root).with_name("more.trans.txt"))


def latin1(root):
    chapter(root).write_bytes("1001-1-0000 déjà".encode("latin-1"))


def no_words(root):
    rewrite(chapter(root), "1001-1-0000 ...", *(f"1001-1-000{i}" for i in range(1, 6)))
    shutil.rmtree(root / "1002")


@pytest.mark.parametrize(
    "spoil, message",
    [
        (
            no_transcript,
            "data = .*own': no transcripts in .*own; "
            "put a .*trans.txt into each folder",
        ),
        (
            twice,
            "1001-1.trans.txt, line 2: utterance '1001-1-0000' has a transcript "
            "already",
        ),
        (
            two_files,
            "more.trans.txt: utterance '1001-1-0000' has a transcript in another file",
        ),
        (latin1, "1001-1.trans.txt cannot be read as UTF-8"),
        (
            no_words,
            "none of the 6 utterances of own can be aligned, the first is 1001-1-0000: "
            "no words in its transcript; check",
        ),
    ],
)
def test_corpora_that_cannot_be_aligned(spoil, message, own, tmp_path):
    spoil(own)
    with pytest.raises(SystemExit) as exit:
        main(
            options(
                {"data": str(own), "out": str(tmp_path / "labels.txt"), "workers": 1}
            )
        )
    assert re.match(f"cpc_align: .*{message}", str(exit.value)) and "\n" not in str(
        exit.value
    )
    assert (
        not (tmp_path / "labels.txt").exists()
        and not report_path(tmp_path / "labels.txt").exists()
    )


def test_corpora_without_transcripts(speech, tmp_path):
    with pytest.raises(CorpusError, match="no transcripts in .*voices; put"):
        align_corpus(speech, tmp_path / "labels.txt")
    packed = pack(speech)
    with pytest.raises(
        CorpusError,
        match="it is a packed corpus, give the folder that it was packed from",
    ):
        align_corpus(packed.root, tmp_path / "labels.txt")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "--data is missing"),
        (["--data", "DEMO"], "--out is missing"),
        (
            ["--data", "/no/corpus", "--out", "OUT"],
            "data = '/no/corpus': no such folder",
        ),
        (["--data", "DEMO", "--out", "FOLDER"], "is a folder; give the file to write"),
        (
            ["--data", "DEMO", "--out", "FOLDER/phone_classes.txt"],
            "is where the names of the classes go",
        ),
        (
            ["--data", "DEMO", "--out", "OTHER/labels.txt"],
            "phone_classes.txt names other classes",
        ),
        (
            ["--data", "DEMO", "--out", "OTHER/phone_classes.txt/labels.txt"],
            "cannot be written",
        ),
        (
            ["--data", "DEMO", "--out", "OUT", "--workers", "0"],
            "workers = 0: give a number above 0",
        ),
        (["--data", "DEMO", "--out", "OUT", "--workers", "many"], "workers = 'many'"),
    ],
)
def test_arguments(arguments, message, demo, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "phone_classes.txt").write_text("a\nb\n")
    places = {
        "DEMO": str(demo),
        "OUT": str(tmp_path / "out.txt"),
        "FOLDER": str(tmp_path),
        "OTHER": str(other),
    }
    with pytest.raises(SystemExit) as exit:
        main(
            [
                re.sub("^[A-Z]+", lambda match: places[match.group()], argument)
                for argument in arguments
            ]
        )
    assert (
        re.match(f"cpc_align: .*{message}", str(exit.value))
        and "\n" not in str(exit.value)
        and not (tmp_path / "out.txt").exists()
    )


OCCUPIED = {
    "recording": ("take.flac", "AUDIO", "exists and is no label file"),
    "transcript of a chapter": ("1-1.trans.txt", "1-1-0000 ONE", "is a transcript"),
    "transcript of digits": ("take.txt", "7 3 5 9 1\n", "is a transcript"),
    "notes": ("notes.md", "# A thesis\nof many words\n", "exists and is no label"),
    "word list": ("words", "aardvark\nabacus\n", "exists and is no label file"),
    "counts": ("counts", "a 12\nb 9\n", "exists and is no label file"),
    "zeros": ("zeros", "\0" * 2**21, "exists and is no label file"),
}


@pytest.mark.parametrize("name", OCCUPIED)
def test_nothing_but_labels_is_overwritten(name, demo, tmp_path):
    name, content, message = OCCUPIED[name]
    out = tmp_path / name
    if content == "AUDIO":
        shutil.copy(next(demo.rglob("*.flac")), out)
    else:
        out.write_text(content)
        (tmp_path / "take.flac").write_bytes(b"")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(AlignError, match=message):
        align_corpus(demo, out, workers=1)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_places_that_are_no_files(demo, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "null").symlink_to("/dev/null")
    for name in ("pipe", "null"):
        with pytest.raises(AlignError, match="is a device or a pipe"):
            align_corpus(demo, tmp_path / name, workers=1)
    (tmp_path / "a" / "phone_classes.txt").mkdir(parents=True)
    with pytest.raises(AlignError, match="names other classes"):
        align_corpus(demo, tmp_path / "a" / "labels.txt", workers=1)
    (tmp_path / "labels.report.json").write_text('{"my": "report"}')
    with pytest.raises(AlignError, match="where the report goes, and holds something"):
        align_corpus(demo, tmp_path / "labels.txt", workers=1)
    assert (tmp_path / "labels.report.json").read_text() == '{"my": "report"}'
    with pytest.raises(AlignError, match="cannot be written .*too long"):
        align_corpus(demo, tmp_path / (300 * "a"), workers=1)


@pytest.mark.parametrize("content", ["", "x 0 1 2 3\n", "x 0 1 2 3"])
def test_labels_and_empty_files_are_replaced(content, own, aligned, tmp_path):
    (tmp_path / "labels.txt").write_text(content)
    align_corpus(own, tmp_path / "labels.txt", workers=1)
    assert (tmp_path / "labels.txt").read_text() in aligned.read_text()


TRANSCRIPTS = """
import json, sys
from cpc_nb.align import transcripts
assert "pocketsphinx" not in sys.modules
print(json.dumps([transcripts(data) for data in sys.argv[1:]]))
"""


def test_transcripts_take_no_aligner(own, speech, tmp_path):
    """As where pocketsphinx is not installed; none of a corpus that has none."""
    (tmp_path / "pocketsphinx.py").write_text("raise ModuleNotFoundError")
    elsewhere = own.with_name("elsewhere")
    (own / "1001").rename(elsewhere)
    (own / "1001").symlink_to(elsewhere)
    done = run(
        sys.executable,
        "-c",
        TRANSCRIPTS,
        own,
        speech,
        pack(own).root,
        PYTHONPATH=os.pathsep.join([str(tmp_path), str(ROOT)]),
    )
    assert done.code == 0, done.output
    found, *none = json.loads(done.last)
    assert none == [{}, {}] and len(found) == 12
    lines = chapter(own).read_text().splitlines()
    assert lines[0] == f"1001-1-0000 {found['1001-1-0000']}"


def test_without_pocketsphinx(demo, tmp_path):
    """As where it is not installed: an import of it fails."""
    (tmp_path / "pocketsphinx.py").write_text(
        "raise ModuleNotFoundError(\"No module named 'pocketsphinx'\")"
    )
    done = command(
        "--data",
        demo,
        "--out",
        tmp_path / "labels.txt",
        PYTHONPATH=os.pathsep.join([str(tmp_path), str(ROOT)]),
    )
    assert done.code == 1 and done.output.strip() == (
        "cpc_align: alignment needs pocketsphinx (No module named 'pocketsphinx'); "
        'run: pip install "cpc_nb[align]"'
    )


# --------------------------------------------------------------------------------------
# Interrupted work


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_interrupted_work_is_taken_up_again(how, demo, aligned, tmp_path):
    out, journal = tmp_path / "labels.txt", tmp_path / ".labels.txt.part"
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "cpc_nb.align",
            "--data",
            demo,
            "--out",
            out,
            "--workers",
            "1",
        ],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    until = time.monotonic() + 60
    while (
        process.poll() is None
        and time.monotonic() < until
        and not (journal.exists() and journal.read_bytes().count(b"\n") >= 4)
    ):
        time.sleep(0.02)
    process.send_signal(how)
    output, _ = process.communicate(timeout=30)
    if how == signal.SIGINT:
        assert process.returncode == 130 and output.strip().splitlines()[-1].endswith(
            "cpc_align: interrupted; the same command goes on where this one stopped"
        )
    assert not out.exists() and not (tmp_path / "phone_classes.txt").exists()
    done = [
        json.loads(line)[0]
        for line in journal.read_text().splitlines()[1:]
        if line.endswith("]")
    ]
    assert 3 <= len(done) < 24
    with open(journal, "a") as file:
        file.write('["1004-1-0005", [0, 0')  # and a line that was not finished
    align_corpus(demo, out, workers=1)
    assert out.read_bytes() == aligned.read_bytes() and not journal.exists()


@pytest.mark.parametrize(
    "line", ["3", "[]", '{"a": 1}', '["1001-1-0000", [1]]', "\\xff"]
)
def test_a_journal_of_other_lines_is_not_believed(line, demo, aligned, tmp_path):
    out, journal = tmp_path / "labels.txt", tmp_path / ".labels.txt.part"
    key = json.loads(report_path(aligned).read_text())["key"]
    for text in (f"{line}\n", f"{json.dumps(key)}\n{line}\n"):
        journal.write_text(text)
        align_corpus(demo, out, workers=1)
        assert out.read_bytes() == aligned.read_bytes()
        out.unlink()


def test_what_was_done_is_not_done_again(demo, aligned, tmp_path):
    """A journal's lines are used as they are, if it is of this corpus and its texts."""
    out, journal = tmp_path / "labels.txt", tmp_path / ".labels.txt.part"
    report = json.loads(report_path(aligned).read_text())
    length = len(frames(aligned)["1001-1-0000"])
    for key, kept in ((report["key"], True), ("another", False)):
        journal.write_text(
            json.dumps(key)
            + "\n"
            + json.dumps(["1001-1-0000", [3] * length, "the usual beam", "", []])
            + "\n"
        )
        align_corpus(demo, out, workers=1)
        assert (set(frames(out)["1001-1-0000"]) == {3}) == kept
        out.unlink()


def test_a_finished_alignment_is_found_and_a_changed_one_made_again(own, tmp_path):
    out = tmp_path / "labels.txt"
    report = align_corpus(own, out, workers=1)
    before, made = out.read_bytes(), out.stat().st_mtime_ns
    assert align_corpus(own, out) == report and out.stat().st_mtime_ns == made
    out.write_bytes(before[:1000])
    assert align_corpus(own, out, workers=1) == report and out.read_bytes() == before
    rewrite(chapter(own), *chapter(own).read_text().splitlines()[1:])
    assert align_corpus(own, out, workers=1)["unaligned"] == {
        "1001-1-0000": "no transcript"
    }
    assert "1001-1-0000" not in out.read_text()


def test_a_full_disk(demo, disk, tmp_path):
    place = disk(12)
    with pytest.raises(
        AlignError, match="could not be written.*No space left.*free some space"
    ):
        align_corpus(demo, place / "labels.txt", workers=1)
    assert not (place / "labels.txt").exists()


# --------------------------------------------------------------------------------------


def test_real_speech(tmp_path):
    """Of learners of English, children too, at least 95 % of utterances get labels."""
    if not SPEECH.is_dir():
        pytest.skip(f"needs the corpus in {SPEECH}")
    for folder in sorted(SPEECH.iterdir())[:40:10]:
        if folder.is_dir():
            shutil.copytree(folder, tmp_path / "few" / folder.name)
    report = align_corpus(tmp_path / "few", tmp_path / "labels.txt", workers=1)
    assert report["utterances"] == 48 and sum(report["aligned"].values()) >= 0.95 * 48
