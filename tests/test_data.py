"""A corpus from files to batches: packed completely or not at all, split, and cut into
windows by (seed, step)."""

import hashlib
import http.server
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import torchaudio
from conftest import (
    BIN,
    RATE,
    ROOT,
    SPEECH,
    is_root,
    script,
    voice,
    write_corpus,
)

from cpc_nb.config import DataConfig, make_config
from cpc_nb.corpus import (
    CorpusError,
    download_librispeech,
    map_ahead,
    open_packed,
    pack,
)
from cpc_nb.data import Windows
from cpc_nb.labels import kaldi_frame_count, load_labels
from cpc_nb.splits import read_split_file, split
from cpc_nb.trainer import TrainingData, validation_windows
from cpc_nb.waveform import resample
from cpc_nb.windows import permute

# --------------------------------------------------------------------------------
# Packing


def test_every_format_becomes_16_khz_mono(mixed, tmp_path):
    corpus = pack(mixed, tmp_path / "packed")
    assert (
        corpus.speakers == [f"speaker-{number}" for number in range(6)]
        and not corpus.rejected
    )
    assert corpus.changed == {"mixed down": 3, "resampled": 5}
    assert (
        "3 files were mixed down" in corpus.describe()
        and "5 files were resampled" in corpus.describe()
    )
    for index, speaker in enumerate(corpus.speaker):
        wave, wanted = (
            corpus.utterance(index).astype(np.float64),
            voice(speaker, 0, 3.0) * 32768,
        )
        assert abs(len(wave) - len(wanted)) < 2500  # a lossy coder may pad
        low = [
            np.convolve(x, np.ones(8) / 8, "same") for x in (wave, wanted)
        ]  # what 8 kHz and every coder keep
        similarity = np.abs(
            np.fft.irfft(
                np.fft.rfft(low[0], 2**17) * np.conj(np.fft.rfft(low[1], 2**17))
            )
        ).max() / np.prod([np.linalg.norm(x) for x in low])
        assert similarity > 0.9, corpus.ids[index]


def test_samples_are_those_of_the_files(speech):
    corpus = pack(speech)
    assert (len(corpus), len(corpus.speakers)) == (80, 10) and corpus.ids[
        0
    ] == "100-7-0000"
    for index in (0, 41, 79):
        speaker = corpus.ids[index].split("-")[0]
        assert np.array_equal(
            corpus.utterance(index),
            soundfile.read(
                speech / speaker / "7" / f"{corpus.ids[index]}.flac", dtype="int16"
            )[0],
        )
        assert corpus.speakers[corpus.speaker[index]] == speaker


def test_packing_does_not_depend_on_the_workers_and_is_found_again(
    speech, mixed, tmp_path
):
    for source in (speech, mixed):
        one, many = (
            pack(source, tmp_path / f"{source.name}-{workers}", workers)
            for workers in (1, 5)
        )
        assert (
            np.array_equal(one.samples, many.samples)
            and (one.root / "index.json").read_text()
            == (many.root / "index.json").read_text()
        )
    before = (one.root / "samples.int16").stat()
    again = pack(mixed, one.root)
    assert (again.root / "samples.int16").stat() == before
    assert pack(one.root).ids == one.ids  # a packed folder stands for its corpus
    assert pack(mixed).root == pack(mixed).root != one.root


def test_a_changed_corpus_is_packed_anew(tmp_path):
    root = write_corpus(tmp_path / "changing", 2, 2)
    before = pack(root)
    file = root / "100" / "7" / "100-7-0000.flac"
    soundfile.write(file, voice(1, 2, 2.0), RATE)
    changed = pack(root)
    assert (
        changed.root != before.root
        and changed.fingerprint != before.fingerprint
        and changed.lengths[0] == 32_000
    )
    file.unlink()
    assert len(pack(root)) == 3
    with pytest.raises(
        CorpusError, match="exists and is not this corpus packed.*delete it"
    ):
        pack(root, before.root)


def test_other_audio_of_equal_length_is_another_corpus(tmp_path):
    root = write_corpus(tmp_path / "c", 2, 2, suffix="wav")
    before = pack(root)
    file = root / "100" / "7" / "100-7-0001.wav"
    times, size = file.stat(), file.stat().st_size
    soundfile.write(file, voice(7, 7, 3.0), RATE)
    assert file.stat().st_size == size
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns + 1_000_000))
    after = pack(root)
    assert after.ids == before.ids and np.array_equal(after.lengths, before.lengths)
    assert after.fingerprint != before.fingerprint
    assert (after.hashes != before.hashes).tolist() == [False, True, False, False]
    assert after.hashes.dtype == np.uint64
    for number, found in enumerate(after.hashes):
        audio = after.utterance(number).tobytes()
        assert f"{found:016x}" == hashlib.blake2b(audio, digest_size=8).hexdigest()


def test_the_name_of_a_file_is_not_in_its_hash(tmp_path):
    root = write_corpus(tmp_path / "c", 2, 2)
    part = tmp_path / "part" / "somebody"
    part.mkdir(parents=True)
    (part / "else.flac").write_bytes((root / "101/7/101-7-0001.flac").read_bytes())
    assert pack(part.parent).hashes.tolist() == pack(root).hashes.tolist()[3:]


def test_an_older_packed_corpus_gets_its_hashes(tmp_path):
    made = pack(write_corpus(tmp_path / "c", 2, 2), tmp_path / "packed")
    path = tmp_path / "packed" / "index.json"
    index = json.loads(path.read_text())
    del index["hashes"], index["retry"]
    path.write_text(json.dumps(index))
    opened = pack(tmp_path / "packed")
    assert np.array_equal(opened.hashes, made.hashes)
    assert opened.fingerprint == made.fingerprint
    assert len(json.loads(path.read_text())["hashes"]) == 4  # once for all


def test_a_slow_disk_does_not_fill_the_memory():
    """However slowly results are taken, no more than `ahead` wait."""
    started = []
    with ThreadPoolExecutor(4) as pool:
        for taken, result in enumerate(
            map_ahead(
                pool, lambda item: started.append(item) or item * 2, range(200), 6
            )
        ):
            assert result == 2 * taken
            while len(started) < min(200, taken + 7):
                time.sleep(0.001)  # the workers have done all that they may
            assert len(started) <= taken + 7
    assert sorted(started) == list(range(200))


@pytest.fixture
def slow(tmp_path):
    """A corpus whose packing lasts a few seconds: it needs resampling."""
    root = tmp_path / "slow"
    for number in range(40):
        (root / f"{number % 4}").mkdir(parents=True, exist_ok=True)
        soundfile.write(
            root / f"{number % 4}" / f"{number}.wav",
            np.tile(voice(number % 4, number, 2.0), 10),
            11_025,
        )
    return root


def start_packing(source, folder):
    return subprocess.Popen(
        [BIN / "cpc_pack", source, folder],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def test_a_killed_packing_leaves_nothing_that_is_taken_for_whole(slow, tmp_path):
    folder, aside = tmp_path / "packed", tmp_path / ".packed.part"
    process = start_packing(slow, folder)
    while not (aside / "samples.int16").exists():
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert aside.exists() and not folder.exists()
    with pytest.raises(CorpusError, match="no packed corpus"):
        open_packed(aside)
    corpus = pack(slow, folder)
    assert len(corpus) == 40 and not corpus.rejected and not aside.exists()


def test_an_interrupted_packing_stops_and_leaves_nothing(slow, tmp_path):
    """Ctrl-C waits for the files that are being decoded, not for those in the queue."""
    folder, aside = tmp_path / "packed", tmp_path / ".packed.part"
    process = start_packing(slow, folder)
    while not (aside / "samples.int16").exists():
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=30)[0]
    assert process.returncode == 130 and "Traceback" not in output
    assert "40/40" not in output
    assert re.split("[\r\n]", output.strip())[-1].startswith("cpc_pack: interrupted")
    assert not folder.exists() and not aside.exists()
    assert len(pack(slow, folder)) == 40


def test_two_processes_that_pack_at_once(slow, tmp_path):
    folder = tmp_path / "packed"
    processes = [start_packing(slow, folder) for _ in range(2)]
    outputs = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert len(open_packed(folder)) == 40 and not (tmp_path / ".packed.part").exists()


def reindex(**changes):
    """A function that changes the index of a packed corpus of two speakers and four
    utterances."""

    def damage(folder):
        path = folder / "index.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return damage


@pytest.mark.parametrize(
    "damage, message",
    [
        (
            lambda folder: os.truncate(folder / "samples.int16", 1000),
            "not as long as its index says.*delete.*pack again",
        ),
        (
            lambda folder: (folder / "index.json").write_text('{"lengths": ['),
            "no packed corpus.*pack again",
        ),
        (
            lambda folder: (folder / "index.json").write_text("{}"),
            "no packed corpus.*pack again",
        ),
        (lambda folder: (folder / "samples.int16").unlink(), "delete.*pack again"),
        (reindex(ids=["a", "b", "c"]), "3 ids, but lists of .4. beside them"),
        (reindex(ids=[1, 2, 3, 4]), "ids: 0: .*valid string"),
        (reindex(ids="abcd"), "ids: Input should be a valid array"),
        (reindex(ids=["a", "a", "b", "c"]), "stands there twice"),
        (reindex(ids=[], lengths=[], speaker=[], hashes=[]), "ids: .*at least 1 item"),
        (reindex(speaker=[0, 0, 1]), "4 ids, but lists of .3, 4."),
        (reindex(speaker=[0, 0, 1, 7]), "speaker 7 has no name"),
        (reindex(speaker=[0, 0, 1, -1]), "speaker: 3: .*greater than or equal to 0"),
        (reindex(lengths=[1e3, 2, 3, 4]), "lengths: 0: .*valid integer"),
        (reindex(lengths=[-5, 10, 1, 1]), "lengths: 0: .*greater than 0"),
        (reindex(lengths=[2**70, 1, 1, 1]), "lengths: 0: .*less than or equal"),
        (reindex(rejected=[["a"]]), "rejected: 0: .*at least 2 items"),
        (reindex(changed=[]), "changed: Input should be an object"),
        (reindex(name=None), "name: .*valid string"),
        (reindex(hashes=["x"] * 4), "hashes: 0: .*match pattern"),
        (reindex(hashes=["0" * 16]), "4 ids, but lists of .1, 4."),
        (lambda folder: (folder / "index.json").write_text("[]"), "no packed corpus"),
        (
            lambda folder: (folder / "index.json").write_bytes(b"\xff\xfe{"),
            "no packed corpus",
        ),
    ],
)
def test_a_damaged_packed_corpus_is_refused(damage, message, tmp_path):
    folder = pack(write_corpus(tmp_path / "c", 2, 2), tmp_path / "packed").root
    damage(folder)
    with pytest.raises(CorpusError, match=message):
        open_packed(folder)
    with pytest.raises(CorpusError, match="delete"):
        pack(tmp_path / "c", folder)


def test_what_cannot_be_used_is_set_aside_with_the_reason(tmp_path):
    root = write_corpus(tmp_path / "c", 2, 3)
    good = voice(1, 1, 2.0)
    whole = (root / "100" / "7" / "100-7-0000.flac").read_bytes()
    for name, content in {
        "truncated.flac": whole[: len(whole) // 2],
        "text.flac": b"this is text",
        "nothing.flac": b"",
        "zero.wav": (0 * good),
        "nan.wav": np.where(np.arange(len(good)) == 99, np.nan, good),
        "infinite.wav": np.where(np.arange(len(good)) == 9, np.inf, good),
        "offset.wav": 0 * good + 0.1,
        "click.wav": good[:300],
        "empty.wav": good[:0],
    }.items():
        if isinstance(content, bytes):
            (root / "101" / name).write_bytes(content)
        else:
            soundfile.write(root / "101" / name, content, RATE, subtype="FLOAT")
    (root / "101" / "100-7-0000.flac").write_bytes(whole)
    (root / "101" / "7" / "101-7-0000.wav").write_bytes(b"")
    (root / "notes.txt").write_text("not audio by its name")
    corpus = pack(root)
    reasons = {path.rsplit("/", 1)[1]: reason for path, reason in corpus.rejected}
    assert {name: reason.split(":")[0] for name, reason in reasons.items()} == {
        "truncated.flac": reasons["truncated.flac"].split(":")[0],
        "text.flac": "not readable as audio",
        "nothing.flac": "not readable as audio",
        "zero.wav": "silent",
        "nan.wav": "holds NaN or infinite samples",
        "infinite.wav": "holds NaN or infinite samples",
        "offset.wav": "silent",
        "click.wav": "too short",
        "empty.wav": "empty",
        "101-7-0000.wav": "not readable as audio",
    }
    assert reasons["truncated.flac"].startswith(("truncated", "not readable as audio"))
    assert len(corpus) == 7
    told = corpus.describe()
    assert "10 files were set aside" in told and all(
        f"{name}: {reason}" in told for name, reason in reasons.items()
    )


def rejected(corpus) -> dict[str, str]:
    """Why each file or folder was set aside, by its name."""
    return {path.rsplit("/", 1)[1]: reason for path, reason in corpus.rejected}


@pytest.mark.parametrize("rate", [1, 100, 3_999, 500_000])
def test_rates_that_no_speech_has(rate, tmp_path):
    root = write_corpus(tmp_path / "c", 1, 1)
    soundfile.write(root / "odd.wav", voice(1, 1, 2.0), rate)
    corpus = pack(root)
    assert len(corpus) == 1
    assert rejected(corpus)["odd.wav"] == (
        f"its rate is {rate:,} Hz, not 4,000 to 384,000"
    )
    with pytest.raises(ValueError, match=f"its rate is {rate:,} Hz"):
        resample(torch.zeros(1000), rate)


@pytest.mark.parametrize("rate", [4_000, 11_025, 15_999, 44_099, 44_101, 383_999])
def test_every_other_rate_is_resampled_truly(rate, tmp_path, monkeypatch):
    """By a filter of at most 40 MB, and to the right pitch and length."""
    filters, plain = [], torchaudio.functional.resample
    monkeypatch.setattr(
        torchaudio.functional,
        "resample",
        lambda wave, *ratio: filters.append(math.prod(ratio)) or plain(wave, *ratio),
    )
    time = np.arange(2 * rate) / rate
    (tmp_path / "c").mkdir()
    tone = 0.5 * np.sin(2 * np.pi * 440 * time)
    soundfile.write(tmp_path / "c" / "tone.wav", tone, rate)
    corpus = pack(tmp_path / "c")
    wave = corpus.utterance(0) / 32768
    assert abs(len(wave) / 32_000 - 1) < 1 / 2000
    assert len(filters) == 1 and 4 * filters[0] < 4e7
    spectrum = np.abs(np.fft.rfft(wave[:32_000] * np.hanning(len(wave[:32_000]))))
    assert abs(spectrum.argmax() / 2 - 440) <= 0.5
    assert abs(np.abs(wave[8_000:24_000]).max() - 0.5) < 0.01


def test_float_audio_beyond_full_scale(tmp_path):
    root = write_corpus(tmp_path / "c", 1, 1)
    wave = voice(1, 1, 2.0)
    as_int16 = 32768 * wave
    soundfile.write(root / "int16.wav", as_int16, RATE, subtype="FLOAT")
    hot = wave.copy()
    hot[::500] = 1.5
    soundfile.write(root / "hot.wav", hot, RATE, subtype="FLOAT")
    rare = wave.copy()
    rare[7] = 1.5
    soundfile.write(root / "rare.wav", rare, RATE, subtype="FLOAT")
    corpus = pack(root)
    assert list(rejected(corpus)) == ["int16.wav"]
    assert re.match(
        r"\d+% of its samples lie beyond full scale, up to [\d,.]+ times; float audio "
        r"is in \[-1, 1\]: scale it down",
        rejected(corpus)["int16.wav"],
    )
    assert corpus.changed == {"clipped, more than 0.01% of their samples": 1}
    assert "1 files were clipped" in corpus.describe()


def test_a_file_that_is_larger_than_memory_is_not_read(tmp_path, monkeypatch):
    root = write_corpus(tmp_path / "c", 1, 2)
    monkeypatch.setattr("cpc_nb.waveform.LARGEST", int(4 * 2.9 * RATE))
    corpus = pack(root)
    assert corpus.ids == ["100-7-0000"]
    assert re.match(
        "too large: its header says 0.0 hours of 1 channels.*cut it into parts",
        rejected(corpus)["100-7-0001.flac"],
    )


def test_room_for_what_is_packed_is_enough(disk, tmp_path):
    """Four files of 48 kHz stereo float take 3 MB; packed, 0.26 MB."""
    for number in range(4):
        (tmp_path / "c" / f"{number}").mkdir(parents=True)
        wave = np.repeat(voice(number, 0, 2.0), 3)
        path = tmp_path / "c" / f"{number}" / "a.wav"
        soundfile.write(path, np.stack([wave] * 2, 1), 48_000, subtype="FLOAT")
    place = disk(1000)
    assert len(pack(tmp_path / "c", place / "packed")) == 4
    with pytest.raises(CorpusError, match="about 0.3 MB needed"):
        pack(tmp_path / "c", disk(100) / "packed")


def test_links_to_folders_are_followed_and_cycles_are_not(tmp_path):
    elsewhere = write_corpus(tmp_path / "elsewhere", 2, 2)
    root = write_corpus(tmp_path / "c", 1, 2, first_speaker=200)
    (root / "100").symlink_to(elsewhere / "100")
    (root / "101").symlink_to(elsewhere / "101")
    (root / "200" / "loop").symlink_to(root)
    (root / "200" / "gone.flac").symlink_to(root / "nothing.flac")
    os.mkfifo(root / "200" / "pipe.wav")
    (root / ".hidden").mkdir()
    (root / ".hidden" / "a.flac").write_bytes(b"")
    with open(os.path.join(os.fsencode(root), b"200", b"caf\xe9.flac"), "wb"):
        pass
    (root / "200" / "two\nlines.flac").write_bytes(b"")
    corpus = pack(root)
    assert corpus.speakers == ["100", "101", "200"] and len(corpus) == 6
    assert {
        name: reason.split(":")[0] for name, reason in rejected(corpus).items()
    } == {
        "loop": "a link to a folder that is read",
        "gone.flac": "not readable",
        "pipe.wav": "no file, but a device or a pipe",
        "caf\\xe9.flac": (
            "its name is not UTF-8, or holds control characters; rename it"
        ),
        "two\\nlines.flac": (
            "its name is not UTF-8, or holds control characters; rename it"
        ),
    }
    assert "5 files were set aside" in corpus.describe()


@pytest.fixture
def somebody():
    """A folder for a user who is not root, and whom permissions bind."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        if is_root():
            os.chown(folder, 65_534, 65_534)
            os.seteuid(65_534)
        try:
            yield Path(folder)
        finally:
            os.seteuid(os.getuid())


def test_what_may_not_be_read_is_told_and_tried_again(somebody, monkeypatch):
    """A folder and a file without permission; both are there as soon as they can be."""
    monkeypatch.setenv("CPC_NB_CACHE", str(somebody / "cache"))
    root = write_corpus(somebody / "c", 3, 2)
    file = root / "100" / "7" / "100-7-0001.flac"
    folder = root / "101" / "7"
    file.chmod(0)
    folder.chmod(0)
    before = pack(root)
    assert before.ids == ["100-7-0000", "102-7-0000", "102-7-0001"]
    assert rejected(before) == {
        "100-7-0001.flac": f"not readable: [Errno 13] Permission denied: '{file}'",
        "7": "not readable: Permission denied",
    }
    packed = pack(root, somebody / "packed")
    assert pack(root).root == before.root  # nothing has changed yet
    file.chmod(0o644)
    assert len(pack(root)) == len(pack(root, packed.root)) == 4
    assert "100-7-0001" in pack(root).ids
    folder.chmod(0o755)
    assert len(pack(root)) == 6 and not pack(root).rejected


def test_a_corpus_that_may_not_be_read(somebody):
    root = write_corpus(somebody / "c", 1, 1)
    root.chmod(0)
    with pytest.raises(CorpusError, match="no audio in .*not readable: Permission"):
        pack(root)
    root.chmod(0o755)


@pytest.mark.parametrize(
    "source, message",
    [
        ("", "data = '': no such folder"),
        (5_000 * "a", "data = 'a{200} …' cannot be read: File name too long"),
        (1_000 * "abcd/", "data = '(abcd/){40} …'"),
        ("~nobody-of-this-name/speech", "data = '~nobody-of-this-name/speech'"),
        ("a\0b", "data = 'a.x00b' cannot be read: .* holds a zero byte"),
        ("/dev/null", "data = '/dev/null' is a file"),
        ("librispeech:", "no subset ''"),
        ("librispeech:dev-clean,", "no subset"),
        ("Demo", "data = 'Demo': no such folder"),
    ],
)
def test_sources_that_are_none(source, message, monkeypatch, tmp_path):
    monkeypatch.setattr("cpc_nb.corpus.download_librispeech", only_known_subsets)
    with pytest.raises(CorpusError, match=message) as error:
        pack(source)
    assert len(str(error.value)) < 400


def only_known_subsets(subset):
    """As `download_librispeech`, without a download."""
    return download_librispeech(subset) if subset != "dev-clean" else None


def test_a_folder_that_takes_no_lock(speech):
    """/proc has no files but its own: one that is made there never appears."""
    if not Path("/proc/self").exists():
        pytest.skip("needs /proc, a folder that takes no lock")
    done = script("cpc_pack", speech, "/proc/packed")
    assert done.code == 1 and "Traceback" not in done.output
    assert re.match("cpc_pack: /proc/packed could not be written", done.last)


def test_short_utterances_are_left_out_and_named(tmp_path):
    root = write_corpus(tmp_path / "c", 6, 2)
    write_corpus(root, 2, 2, first_speaker=200, duration_s=0.5)
    for seed in range(8):
        corpus = pack(root)
        parts = split(
            corpus, DataConfig(test_fraction=0.3, valid_fraction=0.1, split_seed=seed)
        )
        assert [len(part) for part in parts] == [
            6,
            2,
            4,
        ]  # held-out speakers are taken from those who can be heard
    told = corpus.describe(20_480)
    assert (
        "4 utterances are shorter than a window of 1.28 s and left out, the first is "
        "200-7-0000; with them go all of the speakers 200, 201" in told
    )
    assert "shorter" not in pack(write_corpus(tmp_path / "d", 1, 1)).describe(20_480)


MEMORY = """
import pathlib, re, sys, threading, time
import numpy as np
def anonymous():
    status = pathlib.Path("/proc/self/status").read_text()
    return int(re.search(r"RssAnon:\\s+(\\d+)", status)[1])
from cpc_nb.data import Windows; from cpc_nb.corpus import pack
peak, working = anonymous(), True
start = peak
def watch():
    global peak
    while working: peak = max(peak, anonymous()); time.sleep(0.002)
thread = threading.Thread(target=watch); thread.start()
corpus = pack(sys.argv[1], sys.argv[2], 2)
windows = Windows(corpus, np.arange(len(corpus)), 16, 8, 0)
for step in range(3 * len(windows)): windows.batch(step)
working = False; thread.join()
print(corpus.lengths.sum() * 2 // 1024, peak - start)
"""


def test_memory_does_not_grow_with_the_corpus(tmp_path):
    """Anonymous memory (pages of no mapped file) of packing a corpus and of sampling
    windows all over it."""
    minute = (np.random.default_rng(0).standard_normal(60 * RATE) * 3000).astype(
        np.int16
    )
    sizes, peaks = [], {}
    for name, files in (("small", 12), ("large", 120)):
        (tmp_path / name / "s").mkdir(parents=True)
        for number in range(files):
            soundfile.write(tmp_path / name / "s" / f"{number}.wav", minute, RATE)
        for attempt in ("packing", "opening"):
            done = subprocess.run(
                [
                    sys.executable,
                    "-c",
                    MEMORY,
                    tmp_path / name,
                    tmp_path / f"{name}-packed",
                ],
                cwd=ROOT,
                capture_output=True,
                text=True,
            )
            assert done.returncode == 0, done.stderr
            size, peaks[name, attempt] = map(int, done.stdout.split())
        sizes.append(size)
    assert sizes[1] == 10 * sizes[0] and sizes[1] - sizes[0] > 200_000  # KiB
    for attempt in ("packing", "opening"):
        assert peaks["large", attempt] - peaks["small", attempt] < 30_000, peaks
    assert peaks["large", "opening"] < 50_000, peaks


# --------------------------------------------------------------------------------
# Splits


def test_split_by_speaker_and_by_utterance(speech):
    corpus = pack(speech)
    parts = split(corpus, DataConfig(test_fraction=0.3, valid_fraction=0.1))
    assert [len(np.unique(corpus.speaker[part])) for part in parts] == [6, 1, 3]
    assert sorted(np.concatenate(parts)) == list(range(80)) and not set(
        corpus.speaker[parts.train]
    ) & set(corpus.speaker[parts.test])
    assert all(
        np.array_equal(*pair)
        for pair in zip(
            parts, split(corpus, DataConfig(test_fraction=0.3, valid_fraction=0.1))
        )
    )
    assert not np.array_equal(
        parts.test,
        split(
            corpus, DataConfig(test_fraction=0.3, valid_fraction=0.1, split_seed=1)
        ).test,
    )
    parts = split(
        corpus, DataConfig(split_by="utterance", test_fraction=0.25, valid_fraction=0.1)
    )
    assert [len(part) for part in parts] == [52, 8, 20] and sorted(
        np.concatenate(parts)
    ) == list(range(80))


def test_split_files_lie_where_the_user_means(speech, tmp_path, monkeypatch):
    corpus = pack(speech)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "ids.txt").write_text(f"{corpus.ids[3]}\n")
    assert read_split_file("~/ids.txt", corpus).tolist() == [3]


def test_split_files(speech, tmp_path):
    corpus = pack(speech)

    def config(valid_list=None, **lists):
        for name, ids in lists.items():
            (tmp_path / name).write_text("\n".join(ids) + "\n")
        return DataConfig(
            split_by="files",
            train_list=str(tmp_path / "train"),
            test_list=str(tmp_path / "test"),
            valid_list=str(tmp_path / "valid") if valid_list else "",
        )

    parts = split(corpus, config(train=corpus.ids[:40], test=corpus.ids[60:]))
    assert (
        np.array_equal(parts.test, np.arange(60, 80))
        and sorted([*parts.train, *parts.valid]) == list(range(40))
        and len(parts.valid) == 2
    )
    parts = split(
        corpus,
        config(
            valid_list=True,
            train=corpus.ids[:40],
            valid=corpus.ids[40:45],
            test=corpus.ids[60:],
        ),
    )
    assert [len(part) for part in parts] == [40, 5, 20]
    with pytest.raises(
        CorpusError,
        match="train_list and test_list share 1 utterances, the first is '100-7-0003'",
    ):
        split(
            corpus,
            config(train=corpus.ids[:40], test=[*corpus.ids[60:], corpus.ids[3]]),
        )
    with pytest.raises(
        CorpusError,
        match="split file .*train: 2 of 42 ids are not in voices, "
        "the first is '999-1-0001'",
    ):
        split(
            corpus,
            config(train=[*corpus.ids[:40], "999-1-0001", "x"], test=corpus.ids[60:]),
        )
    with pytest.raises(CorpusError, match="split file .*test is empty"):
        split(corpus, config(train=corpus.ids[:40], test=[]))
    (tmp_path / "test").unlink()
    with pytest.raises(CorpusError, match="split file .*test cannot be read"):
        split(corpus, config(train=corpus.ids[:40]))


# --------------------------------------------------------------------------------
# Windows


@pytest.mark.parametrize("seed", range(4))
def test_permute_is_a_bijection(seed):
    random = np.random.default_rng(seed)
    for n in [1, 2, 3, 4, 5, 16, 17, 63, 64, 65, *random.integers(1, 5000, 40)]:
        key = random.integers(0, 2**64, dtype=np.uint64)
        order = permute(np.arange(n), n, key)
        assert np.array_equal(np.sort(order), np.arange(n))
        if n > 64:
            assert not np.array_equal(
                order, permute(np.arange(n), n, key + np.uint64(1))
            )
            assert abs(np.corrcoef(order, np.arange(n))[0, 1]) < 5 / np.sqrt(n)
    several = permute(
        np.arange(50)[None], np.array([[50], [77]]), np.array([[1], [2]], np.uint64)
    )
    assert np.array_equal(
        several, [permute(np.arange(50), 50, 1), permute(np.arange(50), 77, 2)]
    )


@pytest.mark.parametrize("n", [7, 37])
def test_every_place_of_a_permutation_is_reached_about_equally_often(n):
    order = permute(np.arange(n), n, np.arange(1000 * n)[:, None])
    counts = np.array([np.bincount(order[:, place], minlength=n) for place in range(n)])
    assert abs(counts - 1000).max() < 250


@pytest.mark.parametrize(
    "group_by, size", [("corpus", 4), ("speaker", 4), ("utterance", 2)]
)
def test_a_batch_is_a_function_of_seed_and_step(speech, group_by, size):
    corpus = pack(speech)

    def fresh(seed=5):
        return Windows(corpus, np.arange(80), 16, size, seed, group_by=group_by)

    windows, batches = fresh(), {}
    for step in range(2 * len(windows)):
        batches[step] = windows.batch(step)
    for step in (3, len(windows), 0):  # out of order, from an object without a past
        again = fresh().batch(step)
        assert all(
            np.array_equal(one, other)
            for one, other in zip(again[:4], batches[step][:4])
        )
    assert not np.array_equal(fresh(6).batch(0).start, batches[0].start)
    assert not np.array_equal(
        batches[0].start, batches[len(windows)].start
    )  # another epoch, another order
    for world in (1, 2, 4):
        pieces = [windows.batch(7, rank, world) for rank in range(world)]
        assert np.array_equal(
            np.concatenate([piece.audio for piece in pieces]), batches[7].audio
        )
        assert np.array_equal(
            np.concatenate([piece.utterance for piece in pieces]), batches[7].utterance
        )
    for batch in batches.values():
        assert (
            batch.audio.shape == (16, 1, 20_480)
            and batch.audio.dtype == np.int16
            and batch.phone is None
        )
        assert (batch.start >= 0).all() and (
            batch.start + 20_480 <= corpus.lengths[batch.utterance]
        ).all()  # never beyond its utterance
        assert all(
            np.array_equal(audio[0], corpus.utterance(u)[start : start + 20_480])
            for audio, u, start in zip(batch.audio, batch.utterance, batch.start)
        )
        assert np.array_equal(batch.speaker, corpus.speaker[batch.utterance])
        what = {
            "corpus": np.zeros(16),
            "speaker": batch.speaker,
            "utterance": batch.utterance,
        }[group_by]
        assert all(len(set(group)) == 1 for group in what.reshape(-1, size))


def test_an_epoch_visits_every_slot_once(speech):
    corpus = pack(speech)
    windows = Windows(corpus, np.arange(80), 8, 4, 0)
    n = int((corpus.lengths // 20_480).sum())
    assert len(windows) == n // 8
    for epoch in range(3):
        visits = set()
        for step in range(epoch * len(windows), (epoch + 1) * len(windows)):
            utterance, start = windows.locate(step)
            slots = corpus.lengths[utterance] // 20_480
            visits.update(
                zip(
                    utterance,
                    (start * slots // (corpus.lengths[utterance] - 20_480 + 1)),
                )
            )
        assert (
            len(visits) == len(windows) * 8 > n - 8
        )  # no slot twice, all but the rest of a batch
    starts = np.concatenate(
        [windows.locate(step)[1] for step in range(40 * len(windows))]
    )
    assert (
        len(np.unique(starts)) > 3_000
    )  # windows are cut anywhere, not at fixed places


def test_too_little_for_a_batch(speech):
    corpus = pack(speech)
    n = int((corpus.lengths[:20] // 20_480).sum())
    with pytest.raises(
        CorpusError,
        match=rf"{n} windows of 1.28 s in groups of 8 are fewer than a batch of 64; "
        rf"lower train.batch_size \(to {n // 8 * 8} at most\)",
    ):
        Windows(corpus, np.arange(20), 64, 8, 0)
    for batch, group, by in (
        (64, 8, "corpus"),
        (176, 88, "corpus"),
        (64, 8, "speaker"),
        (64, 2, "utterance"),
    ):  # what the message says works
        with pytest.raises(CorpusError) as error:
            Windows(corpus, np.arange(20), batch, group, 0, group_by=by)
        most = int(str(error.value).split("(to ")[1].split()[0])
        assert (
            len(Windows(corpus, np.arange(20), most, min(group, most), 0, group_by=by))
            > 0
        )


def overlaps(windows: Windows, steps: int) -> int:
    """How many windows of the first `steps` batches share audio with another of their
    group."""
    found = 0
    for step in range(steps):
        placed = np.stack(windows.locate(step), 1).reshape(-1, windows.group_size, 2)
        for group in placed:
            found += sum(
                any(
                    utterance == other and abs(start - there) < windows.window
                    for other, there in np.delete(group, number, 0)
                )
                for number, (utterance, start) in enumerate(group)
            )
    return found


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    """Four speakers with 2 × 12 s, 2 × 3 s; one with 1 × 2 s; utterances in order."""
    root = tmp_path_factory.mktemp("corpora") / "uneven"
    for speaker, durations in enumerate([(12, 12, 3, 3)] * 4 + [(2,)]):
        (root / f"s{speaker}").mkdir(parents=True)
        for number, duration in enumerate(durations):
            wave = voice(speaker, number, duration)
            soundfile.write(root / f"s{speaker}" / f"{number}.wav", wave, RATE)
    return pack(root)


@pytest.mark.parametrize("repeat", [False, True])
@pytest.mark.parametrize(
    "group_by, size, batches, left_out",
    [
        ("speaker", 8, 4, "1 speakers with fewer windows than the 8 of a group"),
        ("speaker", 1, 5, ""),
        ("utterance", 8, 4, "9 utterances with fewer windows than the 8 of a group"),
        ("utterance", 2, 5, "1 utterances with fewer windows than the 2 of a group"),
    ],
)
def test_no_window_is_its_own_negative(
    uneven, group_by, size, batches, left_out, repeat
):
    windows = Windows(
        uneven, np.arange(len(uneven)), 16, size, 0, group_by=group_by, repeat=repeat
    )
    assert windows.left_out == (f"left out: {left_out}" if left_out else "")
    assert len(windows) == batches
    steps = 3 * len(windows)
    assert overlaps(windows, steps) == 0
    placed = [windows.locate(step) for step in range(steps)]
    assert len({tuple(start) for _, start in placed}) == steps  # other places, always
    for utterance, start in placed:
        assert (start >= 0).all()
        assert (start + 20_480 <= uneven.lengths[utterance]).all()


def test_what_cannot_fill_a_group_is_refused_with_the_remedy(uneven):
    """As much speech as there is, and no speaker or utterance that has enough of it."""
    for group_by, size, remedy in (
        ("utterance", 16, "lower data.group_size, or set data.group_by to corpus"),
        ("speaker", 64, "lower data.group_size, or set data.group_by to corpus"),
        ("corpus", 128, r"lower data.group_size \(to \d+ at most\)"),
    ):
        for repeat in (False, True) if group_by != "corpus" else (True,):
            with pytest.raises(CorpusError, match=remedy):
                Windows(
                    uneven,
                    np.arange(len(uneven)),
                    size,
                    size,
                    0,
                    group_by=group_by,
                    repeat=repeat,
                )


@pytest.mark.parametrize("group_by", ["corpus", "speaker", "utterance"])
def test_an_utterance_that_is_shorter_than_a_window(group_by, tmp_path):
    """It gives no window, neither of its neighbour's audio nor of what lies before."""
    root = write_corpus(tmp_path / "c", 2, 4, duration_s=2.7)
    write_corpus(root, 1, 3, first_speaker=300, duration_s=0.2)
    corpus = pack(root)
    windows = Windows(corpus, np.arange(11), 4, 2, 0, group_by=group_by)
    assert windows.left_out == "left out: 3 utterances shorter than a window"
    for step in range(2 * len(windows)):
        utterance, start = windows.locate(step)
        assert (start >= 0).all() and utterance.max() < 8
    for repeat in (False, True):
        with pytest.raises(CorpusError, match="0 windows.*3 utterances shorter"):
            Windows(corpus, np.arange(8, 11), 4, 2, 0, group_by=group_by, repeat=repeat)


@pytest.mark.parametrize("group_by", ["corpus", "speaker", "utterance"])
@pytest.mark.parametrize("utterances", [1, 3, 12])
def test_validation_takes_what_there_is(speech, group_by, utterances):
    """Fewer groups than a batch has, but whole ones; and none if there is not one."""
    corpus = pack(speech)
    config = make_config(
        "demo",
        {"data.group_by": group_by, "data.group_size": 4, "train.batch_size": 64},
    )
    arguments = corpus, np.arange(utterances), config
    if utterances == 1 or group_by == "utterance":
        with pytest.raises(CorpusError, match="lower data.group_size"):
            validation_windows(*arguments)
        return
    windows = validation_windows(*arguments)
    batch = windows.batch(0)
    assert (
        len(windows) > 0
        and len(batch.audio) % 4 == 0
        and set(batch.utterance) <= set(range(utterances))
    )
    assert len(set(zip(batch.utterance, batch.start))) == len(batch.start)
    assert validation_windows(corpus, np.arange(0), config) is None


def test_validation_speech_that_cannot_fill_a_group_is_told(speech):
    """Training goes on without a validation, and says why."""
    config = make_config(
        "demo",
        {
            "data.source": str(speech),
            "data.group_size": 32,
            "train.batch_size": 32,
            "data.valid_fraction": 0.1,
        },
    )
    task = TrainingData(config)
    assert task.held_out is None and len(task.windows)
    assert re.search(
        r"no validation: voices: \d+ windows .* lower data.group_size", task.describe()
    )
    more = config.model_copy(
        update={"data": config.data.model_copy(update={"group_by": "utterance"})}
    )
    with pytest.raises(CorpusError, match="left out: .* utterances with fewer windows"):
        TrainingData(more)


def test_labels_come_along(speech, tmp_path):
    corpus = pack(speech)
    frames = kaldi_frame_count(corpus.lengths)
    assert [kaldi_frame_count(n) for n in (399, 400, 559, 560)] == [0, 1, 1, 2]
    lines = [
        f"{name} {' '.join(map(str, np.arange(count)))}"
        for name, count in zip(corpus.ids, frames)
    ]  # the class is the frame's number
    lines[1] += " 999 999"  # cut
    lines[2] = lines[2].rsplit(" ", 3)[0]  # a few frames short
    lines[3] = lines[3].rsplit(" ", 30)[0]  # too short
    del lines[4]  # missing
    (tmp_path / "labels").write_text("\n".join(["nobody-1-1 1 2 3", *lines]))
    labels = load_labels(tmp_path / "labels", corpus)
    assert labels.report == dict(
        matched=78, cut=2, wrong_length=1, unknown=1, missing=2
    )
    for step in range(3):
        batch = Windows(corpus, np.arange(80), 16, 8, 0, labels=labels).batch(step)
        for utterance, start, phones in zip(batch.utterance, batch.start, batch.phone):
            if utterance in (3, 4):
                assert (phones == -1).all()
            else:
                assert np.abs(
                    phones - (start + 160 * np.arange(128) + 80 - 200) / 160
                ).max() <= (
                    3.5 if utterance == 2 else 1.3
                )  # of the frame that is centred there
    for text, message in (
        ("100-7-0000 1 x", "line 1.*not all integers"),
        ("\n".join([lines[0], lines[0]]), "line 2.*labelled twice"),
        ("100-7-0000 1 -4", "line 1.*negative"),
        ("a 1\nb 2", "matches no utterance of voices"),
        ("", "is empty"),
        (" \n\n", "is empty"),
        ("nobody 1\nnobody 2", "line 2.*labelled twice"),
        ("100-7-0000 1.5", "line 1.*not all integers"),
        ("100-7-0000 1 40000", "line 1.*40000 is above 9999, .*phone_classes.txt"),
        ("100-7-0000 1 30000", "line 1.*30000 is above 9999, .*phone_classes.txt"),
        ("100-7-0000 1 99999999999999999999", "not all integers"),
        ("\0" * 500, "is not text"),
        (
            "100-7-0000 1",
            r"matches no utterance of voices \(0 unknown ids, 1 of another length\)",
        ),
    ):
        (tmp_path / "labels").write_text(text)
        with pytest.raises(CorpusError, match=message):
            load_labels(tmp_path / "labels", corpus)
    with pytest.raises(CorpusError, match="nowhere cannot be read"):
        load_labels(tmp_path / "nowhere", corpus)
    (tmp_path / "labels").write_bytes(bytes(range(256)))
    with pytest.raises(CorpusError, match="is not text"):
        load_labels(tmp_path / "labels", corpus)


def test_labels_in_the_papers_form(speech, tmp_path):
    """41 classes, Kaldi's frame count, no names: loaded as they are, with a line end at
    the end or without, whatever else the file labels."""
    corpus, random = pack(speech), np.random.default_rng(0)
    classes = [
        random.integers(0, 41, count) for count in kaldi_frame_count(corpus.lengths)
    ]
    lines = [
        f"{name} {' '.join(map(str, row))}" for name, row in zip(corpus.ids, classes)
    ]
    for text in (
        "\n".join(lines),
        "\n".join([*lines[::-1], "9-9-0001 40 40 0"]) + "\n",
        "\r\n".join(lines),
    ):
        (tmp_path / "converted_aligned_phones.txt").write_text(text)
        labels = load_labels(tmp_path / "converted_aligned_phones.txt", corpus)
        assert (
            labels.report["matched"] == 80
            and labels.report["cut"] == labels.report["missing"] == 0
            and not labels.names
        )
        assert all(
            np.array_equal(labels.values[start : start + count], row)
            for start, count, row in zip(labels.starts, labels.counts, classes)
        )
    assert labels.describe().startswith("80 utterances have labels (0 of them")
    (tmp_path / "phone_classes.txt").write_text(
        "\n".join(f"phone-{number}" for number in range(41))
    )
    assert (
        load_labels(tmp_path / "converted_aligned_phones.txt", corpus).names[40]
        == "phone-40"
    )
    (tmp_path / "phone_classes.txt").write_text(
        "\n".join(f"phone-{number}" for number in range(40))
    )
    with pytest.raises(
        CorpusError,
        match="line .*40 is above 39, the last that phone_classes.txt beside it names",
    ):
        load_labels(tmp_path / "converted_aligned_phones.txt", corpus)


def test_names_of_classes(speech, tmp_path):
    """One per line, any text; a line without a name would shift the rest."""
    corpus = pack(speech)
    frames = kaldi_frame_count(corpus.lengths)
    labels, names = tmp_path / "labels.txt", tmp_path / "phone_classes.txt"
    labels.write_text(f"{corpus.ids[0]} {' '.join(['2'] * frames[0])}\n")
    names.write_text("$\nsil nonspeech\n$\\alpha$\n\n")
    assert load_labels(labels, corpus).names == ("$", "sil nonspeech", "$\\alpha$")
    for content, message in (
        (b"a\n\nb\nc\n", "phone_classes.txt, line 2: '' is no name"),
        (b"a\nb\x07\nc\n", r"phone_classes.txt, line 2: 'b\\x07' is no name"),
        (b"\xff\xfe", "phone_classes.txt is not text"),
        (b"x\n" * 40_000, "names 40,000 classes; at most 32,768"),
    ):
        names.write_bytes(content)
        with pytest.raises(CorpusError, match=message):
            load_labels(labels, corpus)
    names.write_text("\n".join(f"state-{number}" for number in range(30_001)))
    labels.write_text(f"{corpus.ids[0]} {' '.join(['30000'] * frames[0])}\n")
    assert load_labels(labels, corpus).values.max() == 30_000
    with pytest.raises(CorpusError, match="label file /dev/null .*it is no file"):
        load_labels("/dev/null", corpus)


def test_a_label_file_that_was_cut_short(speech, tmp_path):
    corpus = pack(speech)
    text = "".join(
        f"{name} {' '.join(['7'] * count)}\n"
        for name, count in zip(corpus.ids, kaldi_frame_count(corpus.lengths))
    )
    for end, message in (
        (
            len(text) // 2 - 99,
            "line 40.*the file ends after .* labels of '104-7-0007'; it was cut short",
        ),
        (text.index("101-7-0001") + 7, "line 10.*ends in the middle of an id"),
    ):
        (tmp_path / "labels").write_text(text[:end])
        with pytest.raises(CorpusError, match=message):
            load_labels(tmp_path / "labels", corpus)


def test_real_speech():
    """The packed corpus of real recordings has LibriSpeech's ids, all speakers, and a
    window of each of them."""
    if not SPEECH.is_dir():
        pytest.skip(f"needs the corpus in {SPEECH}")
    corpus = pack(SPEECH)
    assert len(corpus) + len(corpus.rejected) == 2400 and len(corpus.speakers) == 200
    parts = split(corpus, DataConfig())
    assert (
        len(np.unique(corpus.speaker[parts.test])) == 40
        and (corpus.lengths[parts.test] >= 20_480).all()
    )


# --------------------------------------------------------------------------------
# LibriSpeech, through torchaudio's own code and a server on this machine that stands
# for openslr.org


class Openslr(http.server.BaseHTTPRequestHandler):
    """A proxy that has one archive; `cut` makes it hang up half-way."""

    archive, cut, requests = b"", False, []

    def do_GET(self):
        self.requests.append(self.path)
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.archive)))
        self.end_headers()
        self.wfile.write(
            self.archive[: len(self.archive) // 2] if self.cut else self.archive
        )

    def log_message(self, *_):
        pass


@pytest.fixture
def openslr(monkeypatch, tmp_path):
    """The server, holding `dev-clean`: two speakers and many small files; its checksum
    is in torchaudio's table."""
    write_corpus(tmp_path / "made" / "LibriSpeech" / "dev-clean", 2, 2)
    with tarfile.open(fileobj=(content := io.BytesIO()), mode="w:gz") as tar:
        tar.add(tmp_path / "made" / "LibriSpeech", "LibriSpeech")
        for number in range(6000):
            info = tarfile.TarInfo(f"LibriSpeech/dev-clean/notes/{number}.txt")
            tar.addfile(info)
    handler = type(
        "Handler", (Openslr,), {"archive": content.getvalue(), "requests": []}
    )
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("no_proxy", "")
    monkeypatch.setattr(
        urllib.request, "_opener", None
    )  # the proxies are read when the first page is opened
    monkeypatch.setenv("CPC_NB_CACHE", str(tmp_path / "cache"))
    handler.checksum = hashlib.sha256(handler.archive).hexdigest()
    monkeypatch.setitem(
        torchaudio.datasets.librispeech._CHECKSUMS,
        "http://www.openslr.org/resources/12/dev-clean.tar.gz",
        handler.checksum,
    )
    yield handler
    server.shutdown()
    server.server_close()


def test_librispeech_is_downloaded_once(openslr, tmp_path):
    corpus = pack("librispeech:dev-clean")
    assert openslr.requests == ["http://www.openslr.org/resources/12/dev-clean.tar.gz"]
    assert (corpus.name, len(corpus), corpus.speakers) == (
        "dev-clean",
        4,
        ["100", "101"],
    )
    assert not (tmp_path / "cache" / ".dev-clean.part").exists()
    assert len(pack("librispeech:dev-clean")) == 4 and len(openslr.requests) == 1
    with pytest.raises(
        CorpusError, match="no subset 'dev-claen'; did you mean 'dev-clean'"
    ):
        pack("librispeech:dev-claen")


def test_an_archive_that_leads_out_of_its_folder_is_refused(
    openslr, tmp_path, monkeypatch
):
    with tarfile.open(fileobj=(content := io.BytesIO()), mode="w:gz") as tar:
        tar.addfile(tarfile.TarInfo("LibriSpeech/dev-clean/100/a.txt"))
        tar.addfile(tarfile.TarInfo("../../escaped.txt"))
    openslr.archive = content.getvalue()
    monkeypatch.setitem(
        torchaudio.datasets.librispeech._CHECKSUMS,
        "http://www.openslr.org/resources/12/dev-clean.tar.gz",
        hashlib.sha256(openslr.archive).hexdigest(),
    )
    with pytest.raises(
        CorpusError, match="could not be downloaded.*escaped.txt.*outside"
    ):
        download_librispeech("dev-clean")
    assert not list(tmp_path.rglob("escaped.txt"))


@pytest.mark.parametrize("name", ["../../escaped", "/tmp/escaped"])
def test_a_packed_corpus_whose_names_lead_elsewhere_is_refused(speech, tmp_path, name):
    folder = pack(speech, tmp_path / "packed").root
    index = json.loads((folder / "index.json").read_text())
    index["ids"][3] = name
    (folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(CorpusError, match=f"the id '{name}' leads out of the folders"):
        open_packed(folder)


@pytest.mark.parametrize("fault", ["other content", "connection lost"])
def test_a_download_that_is_not_whole_is_refused(openslr, tmp_path, monkeypatch, fault):
    whole = openslr.archive
    if fault == "other content":
        openslr.archive = whole[:-9] + b"!" + whole[-8:]
    else:
        openslr.cut = True
    with pytest.raises(
        CorpusError,
        match="LibriSpeech dev-clean could not be downloaded.*check the network",
    ):
        download_librispeech("dev-clean")
    assert not (tmp_path / "cache" / "LibriSpeech").exists() and not list(
        (tmp_path / "cache" / ".dev-clean.part").iterdir()
    )
    openslr.archive, openslr.cut = whole, False
    assert (
        download_librispeech("dev-clean") / "100" / "7" / "100-7-0000.flac"
    ).exists()


def test_no_network_is_one_sentence(tmp_path):
    done = script(
        "cpc_pack",
        "librispeech:test-other",
        http_proxy="http://127.0.0.1:9",
        no_proxy="",
        CPC_NB_CACHE=str(tmp_path),
    )
    assert (
        done.code == 1
        and done.last.startswith(
            "cpc_pack: LibriSpeech test-other could not be downloaded"
        )
        and "check the network" in done.last
    )
    assert "Traceback" not in done.output


DOWNLOAD = """
import sys, torchaudio
url = "http://www.openslr.org/resources/12/dev-clean.tar.gz"
torchaudio.datasets.librispeech._CHECKSUMS[url] = sys.argv[1]
from cpc_nb.corpus import download_librispeech
print(download_librispeech("dev-clean"))
"""


def test_an_unpacking_that_is_killed_is_taken_up_again(openslr, tmp_path):
    notes = (
        tmp_path / "cache" / ".dev-clean.part" / "LibriSpeech" / "dev-clean" / "notes"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", DOWNLOAD, openslr.checksum],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    while not notes.exists():
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.001)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert (
        len(list(notes.iterdir())) < 6000
        and not (tmp_path / "cache" / "LibriSpeech").exists()
    )
    folder = download_librispeech("dev-clean")
    assert (
        len(list((folder / "notes").iterdir())) == 6000 and len(openslr.requests) == 1
    )  # the archive was whole


def test_no_room_for_the_download(openslr, disk, monkeypatch):
    monkeypatch.setenv("CPC_NB_CACHE", str(folder := disk(200)))
    with pytest.raises(CorpusError, match="No space left on device.*free space"):
        download_librispeech("dev-clean")
    assert not (folder / "LibriSpeech").exists()
