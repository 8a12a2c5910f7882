"""The demo corpus as a whole: files, determinism, cache, and interrupted work."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
import soundfile

from cpc_nb import demo
from cpc_nb.config import ConfigError, MissingPackage
from cpc_nb.demo import DemoError, make_demo_corpus

SMALL = {"n_voices": 3, "n_sentences": 22, "seed": 5}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_demo_corpus(
        tmp_path_factory.mktemp("demo") / "corpus", **SMALL, n_jobs=2, progress=False
    )


def content(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def labels_of(folder):
    rows = (line.split() for line in (folder / "phones.txt").read_text().splitlines())
    return {row[0]: np.array(row[1:], dtype=int) for row in rows}


def making(place, *arguments, n_jobs=2):
    """Code that makes a corpus of `arguments` in `place`."""
    arguments = f"{str(place)!r}, *{arguments}, n_jobs={n_jobs}, progress=False"
    return (
        "from cpc_nb.demo import make_demo_corpus\n"
        f"print(make_demo_corpus({arguments}))\n"
    )


def python(code, **options):
    return subprocess.Popen(
        [sys.executable, "-c", code],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **options,
    )


def wait_for(condition, seconds=90):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def test_layout_is_that_of_librispeech(corpus):
    files = sorted(corpus.rglob("*.flac"))
    assert len(files) == 66
    for path in files:
        speaker, chapter, utterance = path.stem.split("-")
        assert (
            path == corpus / speaker / chapter / f"{speaker}-{chapter}-{utterance}.flac"
        )
        info = soundfile.info(path)
        assert (info.samplerate, info.channels, info.format, info.subtype) == (
            16_000,
            1,
            "FLAC",
            "PCM_16",
        )
        assert 1.2 < info.duration < 8
    for chapter in {path.parent for path in files}:
        lines = (
            (chapter / f"{chapter.parent.name}-{chapter.name}.trans.txt")
            .read_text()
            .splitlines()
        )
        assert [line.split(" ", 1)[0] for line in lines] == sorted(
            path.stem for path in chapter.glob("*.flac")
        )
        assert all(
            text == text.upper() and text.replace("'", "").replace(" ", "").isalpha()
            for text in (line.split(" ", 1)[1] for line in lines)
        )
    speakers = [
        line.split(" | ")
        for line in (corpus / "SPEAKERS.TXT").read_text().splitlines()
        if line[0] != ";"
    ]
    assert [row[0] for row in speakers] == ["1001", "1002", "1003"] and {
        row[1] for row in speakers
    } == {"F", "M"}
    assert set(os.listdir(corpus)) == {
        "1001",
        "1002",
        "1003",
        "SPEAKERS.TXT",
        "phones.txt",
        "phone_classes.txt",
        "demo.json",
    }


def test_labels_fit_the_audio(corpus):
    labels = labels_of(corpus)
    assert list(labels) == sorted(path.stem for path in corpus.rglob("*.flac"))
    for utterance, classes in labels.items():
        samples, _ = soundfile.read(corpus / demo.utterance_path(utterance))
        assert len(classes) == (len(samples) - 400) // 160 + 1
        assert (
            classes.min() == 0 and classes.max() < 40 and classes[0] == classes[-1] == 0
        )
    names = (corpus / "phone_classes.txt").read_text().split()
    assert len(names) == 40 and names[0] == "SIL"


def test_no_two_utterances_share_a_sentence(corpus):
    texts = [
        line.split(" ", 1)[1]
        for path in corpus.rglob("*.trans.txt")
        for line in path.read_text().splitlines()
    ]
    assert len(set(texts)) == len(texts) == 66


@pytest.mark.parametrize("n_voices, n_sentences", [(48, 40), (40, 40), (7, 3)])
def test_no_sentence_is_planned_for_two_voices(n_voices, n_sentences):
    orders = set()
    for seed in range(5):
        plan = demo.plan_corpus(n_voices, n_sentences, seed)
        sentences = [sentence for _, _, sentence in plan]
        assert len(set(sentences)) == len(sentences) == n_voices * n_sentences
        assert set(Counter(voice for _, voice, _ in plan).values()) == {n_sentences}
        orders.add(tuple(sentences))
    assert len(orders) == 5


def words(sentence):
    return re.sub("[^a-z' ]", "", sentence.lower()).split()


def test_sentences_are_plain_and_differ():
    runs = defaultdict(set)
    for sentence in demo.SENTENCES:
        assert re.fullmatch("[A-Z][A-Za-z ,.;:?!']+[.?!]", sentence), sentence
        for i in range(len(words(sentence)) - 3):
            runs[tuple(words(sentence)[i : i + 4])].add(sentence)
    assert len({tuple(words(sentence)) for sentence in demo.SENTENCES}) == 1920
    for run, sharing in runs.items():
        assert len(sharing) <= 4, run
    for sharing in runs.values():
        for one, other in zip(sorted(sharing), sorted(sharing)[1:]):
            common = sum({one, other} <= sentences for sentences in runs.values())
            n_runs = len(words(one)) + len(words(other)) - 6
            assert common / (n_runs - common) < 0.2, (one, other)


def test_sentences_of_a_voice_hold_every_phone():
    for voice in range(0, len(demo.VOICES), 6):
        spoken = demo.make_voice(voice)
        said = {
            phone
            for sentence in demo.sentence_shares(0)[:, voice]
            for name, _ in demo.speak(demo.SENTENCES[sentence], spoken)[1]
            for phone in demo.phones_of(name, spoken.accent)
        }
        assert said >= set(demo.PHONE_CLASSES) - {"SIL"}, voice


@pytest.mark.parametrize("n_jobs", [1, 3])
def test_bytes_do_not_depend_on_the_number_of_processes(corpus, tmp_path, n_jobs):
    again = make_demo_corpus(tmp_path / "again", **SMALL, n_jobs=n_jobs, progress=False)
    assert content(again) == content(corpus)


def test_a_smaller_corpus_is_part_of_a_larger_one(corpus, tmp_path):
    part = make_demo_corpus(
        tmp_path / "part", n_voices=2, n_sentences=4, seed=5, progress=False
    )
    for path in part.rglob("*.flac"):
        assert path.read_bytes() == (corpus / path.relative_to(part)).read_bytes()
    larger = labels_of(corpus)
    for utterance, classes in labels_of(part).items():
        assert np.array_equal(classes, larger[utterance])


def test_another_seed_is_another_corpus(corpus, tmp_path):
    other = make_demo_corpus(
        tmp_path / "other", n_voices=1, n_sentences=4, seed=6, progress=False
    )
    for path in other.rglob("*.flac"):
        assert path.read_bytes() != (corpus / path.relative_to(other)).read_bytes()


def test_speaking_does_not_depend_on_what_was_spoken_before():
    jobs = [
        (voice, sentence)
        for voice in range(len(demo.VOICES))
        for sentence in (voice, 1919 - voice)
    ]
    first = {job: demo.record(*job, seed=1) for job in jobs}
    for job in np.random.default_rng(0).permutation(jobs).tolist():
        again = demo.record(*job, seed=1)
        assert (
            np.array_equal(again.samples, first[tuple(job)].samples)
            and again.phones == first[tuple(job)].phones
        )


def test_phone_times_never_run_backward():
    for voice in range(len(demo.VOICES)):
        recording = demo.record(voice, 3 * voice)
        starts = [start for _, start in recording.phones]
        assert (
            starts == sorted(starts)
            and starts[0] == 0
            and starts[-1] <= len(recording.samples)
        )


def test_closures_are_silent_and_belong_to_their_stop():
    voice, gaps = demo.make_voice(1), []
    for sentence in demo.SENTENCES[:20]:
        samples, phonemes = demo.speak(sentence, voice)
        bursts = {start for name, start in phonemes if name in ("p", "t", "k", "tS")}
        timeline = demo.phone_starts(samples, phonemes, voice.accent)
        for (phone, start), (_, end) in zip(timeline, timeline[1:]):
            burst = next((b for b in bursts if start < b < end), None)
            if phone in ("P", "T", "K", "CH") and burst:
                assert not samples[start:burst].any()
                gaps.append((burst - start) / demo.SYNTHESIS_RATE_HZ)
    assert len(gaps) > 50 and 0.03 < np.median(gaps) < 0.06


def test_a_complete_corpus_is_reused(corpus, monkeypatch):
    monkeypatch.setattr(demo, "record_all", lambda *_: pytest.fail("it was made again"))
    assert make_demo_corpus(corpus, **SMALL) == corpus


def test_the_cache_is_named_by_content(tmp_path, monkeypatch):
    monkeypatch.setenv("CPC_NB_CACHE", str(tmp_path / "cache"))
    first = make_demo_corpus(n_voices=1, n_sentences=1, progress=False)
    second = make_demo_corpus(n_voices=1, n_sentences=1, seed=1, progress=False)
    assert first.parent == second.parent == tmp_path / "cache" and first != second
    before = content(first)
    monkeypatch.setattr(demo, "SENTENCES", demo.SENTENCES[::-1])
    assert make_demo_corpus(n_voices=1, n_sentences=1, progress=False) != first
    assert content(first) == before


def test_a_killed_run_leaves_nothing_that_counts(tmp_path):
    place = tmp_path / "corpus"
    running = python(making(place, 20, 40))
    wait_for(lambda: len(list(tmp_path.rglob("*.flac"))) > 10)
    running.send_signal(signal.SIGKILL)
    running.communicate()
    assert not place.exists()
    [left] = tmp_path.iterdir()
    n_files = -1
    while n_files != (n_files := len(list(left.rglob("*.flac")))):
        time.sleep(2)  # the workers notice and end
    assert n_files < 700
    made = make_demo_corpus(place, n_voices=2, n_sentences=2, progress=False)
    assert len(list(made.rglob("*.flac"))) == 4
    assert left.exists()  # it could be another machine's: it stays for a day
    os.utime(left, (time.time() - 2 * demo.STALE_S,) * 2)
    made.rename(tmp_path / "elsewhere")
    make_demo_corpus(place, n_voices=2, n_sentences=2, progress=False)
    assert not left.exists()


# a shell may have started the tests with SIGINT ignored
HEAR_CTRL_C = (
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
)


def test_an_interrupted_run_cleans_up(tmp_path):
    running = python(HEAR_CTRL_C + making(tmp_path / "c", 20, 40))
    wait_for(lambda: len(list(tmp_path.rglob("*.flac"))) > 3)
    running.send_signal(signal.SIGINT)
    running.communicate(timeout=30)
    assert running.returncode != 0 and list(tmp_path.iterdir()) == []


def alive(pid):
    try:
        os.kill(pid, 0)
        return True
    except ProcessLookupError:
        return False


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    "call",
    [
        "from cpc_nb.demo import make_demo_corpus; make_demo_corpus(progress=False)",
        "from cpc_nb.train import main; main(['--data', 'demo', '--run_dir', 'run'])",
    ],
    ids=["function", "cpc_train"],
)
def test_a_signal_ends_the_speaking_at_once(tmp_path, call, number):
    running = python(
        HEAR_CTRL_C + call,
        cwd=tmp_path,
        env=os.environ
        | {
            "CPC_NB_CACHE": str(tmp_path / "cache"),
            "PYTHONPATH": str(Path(demo.__file__).parents[1]),
        },
    )
    wait_for(lambda: len(list(tmp_path.rglob("*.flac"))) > 3)
    listed = subprocess.run(
        ["pgrep", "-P", str(running.pid)], capture_output=True, text=True
    )
    workers = [int(pid) for pid in listed.stdout.split()]
    assert workers
    running.send_signal(number)
    try:
        running.communicate(timeout=20)  # to the end it would be minutes
    finally:
        running.kill()
    assert running.returncode != 0 and not any(map(alive, workers))
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(DemoError, match="cannot be written to .*another folder"):
        make_demo_corpus(tmp_path / "file" / "corpus", progress=False)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(demo, "write_texts", full)
    with pytest.raises(DemoError, match="No space left.*free some space"):
        make_demo_corpus(tmp_path / "c", n_voices=1, n_sentences=1, progress=False)
    assert os.listdir(tmp_path) == ["file"]


def test_two_processes_at_once_both_succeed(tmp_path):
    place = tmp_path / "corpus"
    code = making(place, 2, 6, n_jobs=1)
    for running in [python(code), python(code)]:
        out, err = running.communicate(timeout=180)
        assert running.returncode == 0, err
        assert out.strip() == str(place)
    assert len(list(place.rglob("*.flac"))) == 12 and os.listdir(tmp_path) == ["corpus"]


def test_a_script_needs_no_main_guard(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(making(tmp_path / "c", 1, 2))
    done = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        timeout=180,
        env=os.environ | {"PYTHONPATH": str(Path(demo.__file__).parents[1])},
    )
    assert done.returncode == 0 and done.stdout.strip() == str(tmp_path / "c"), (
        done.stderr
    )


@pytest.mark.parametrize(
    "bad",
    [
        {"n_voices": 49},
        {"n_voices": 0},
        {"n_sentences": 41},
        {"n_sentences": 2.0},
        {"seed": -1},
        {"seed": True},
        {"n_jobs": 0},
    ],
)
def test_impossible_parameters_are_named(tmp_path, bad):
    [(name, value)] = bad.items()
    with pytest.raises(ConfigError, match=f"{name}={value}.* from \\d+ to \\d+"):
        make_demo_corpus(tmp_path / "corpus", **bad)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_something_else_is_left_alone(corpus, tmp_path):
    (tmp_path / "thesis.tex").write_text("irreplaceable")
    with pytest.raises(
        ConfigError,
        match=f"{tmp_path} holds something else; remove it or choose another folder",
    ):
        make_demo_corpus(tmp_path)
    assert os.listdir(tmp_path) == ["thesis.tex"]
    with pytest.raises(ConfigError, match="other parameters"):
        make_demo_corpus(corpus, **SMALL | {"seed": 6})
    with pytest.raises(ConfigError, match="is a file"):
        make_demo_corpus(tmp_path / "thesis.tex")


def test_an_empty_folder_is_filled(tmp_path):
    made = make_demo_corpus(tmp_path / ".", n_voices=1, n_sentences=1, progress=False)
    assert len(list(made.rglob("*.flac"))) == 1


def test_a_missing_library_is_one_sentence(monkeypatch, tmp_path):
    import espeakng_loader

    monkeypatch.setattr(
        espeakng_loader, "get_library_path", lambda: str(tmp_path / "none.so")
    )
    with pytest.raises(DemoError, match="cannot be loaded.*pip install"):
        demo.record(0, 0)
    monkeypatch.undo()
    monkeypatch.setattr(espeakng_loader, "get_data_path", lambda: str(tmp_path))
    with pytest.raises(DemoError, match="does not start with its data.*pip install"):
        demo.record(0, 0)
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with pytest.raises(MissingPackage, match="espeakng-loader is not installed"):
        demo.record(0, 0)


def test_a_failing_process_says_why_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(
        demo, "plan_corpus", lambda *_: [("1001-1-0000", 0, 0), ("1001-1-0001", 999, 0)]
    )
    with pytest.raises(DemoError, match="failed: IndexError"):
        make_demo_corpus(tmp_path / "corpus", progress=False)
    assert list(tmp_path.iterdir()) == []


def test_importing_is_light():
    heavy = {"torch", "torchaudio", "scipy", "espeakng_loader"}
    code = f"import sys, cpc_nb.demo; print({heavy} & sys.modules.keys())"
    out, err = python(code).communicate(timeout=60)
    assert out.strip() == "set()", err


def test_identity_file_names_the_parameters(corpus):
    assert json.loads((corpus / "demo.json").read_text()).items() >= SMALL.items()
