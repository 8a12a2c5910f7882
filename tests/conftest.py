"""Fixtures: synthetic corpora, a private cache, and commands run as users run them."""

import contextlib
import json
import multiprocessing
import os
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from scipy.signal import lfilter, resample_poly

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
SPEECH = ROOT.parent / "shared" / "speech" / "speechocean762"
RATE = 16_000


SLOW_FILES = ["test_speed.py", "test_launch.py", "test_train.py", "test_probe.py"]


def pytest_collection_modifyitems(items: list):
    """The slowest files first, so that two processes end at about the same time."""
    order = {name: number for number, name in enumerate(SLOW_FILES)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


def voice(speaker: int, utterance: int, duration_s: float) -> np.ndarray:
    """A buzz at the speaker's pitch, filtered into vowels: float (N,) at 16 kHz."""
    random, n = np.random.default_rng([speaker, utterance]), round(duration_s * RATE)
    character = np.random.default_rng(speaker)
    pitch, stretch = character.uniform(90, 240), character.uniform(0.8, 1.25)
    phase = (
        np.cumsum(
            pitch * (1 + 0.08 * np.sin(np.arange(n) / RATE * random.uniform(8, 14)))
        )
        / RATE
    )
    source = np.diff(np.floor(phase), prepend=0) + 0.02 * random.standard_normal(n)
    vowels, parts = (
        np.array([(300, 2300), (600, 1700), (750, 1200), (450, 800), (300, 900)]),
        [],
    )
    for begin in range(0, n, 2400):
        part = source[begin : begin + 2400]
        for centre in stretch * vowels[random.integers(5)]:
            radius, angle = np.exp(-np.pi * 90 / RATE), 2 * np.pi * centre / RATE
            part = lfilter(
                [1 - radius], [1, -2 * radius * np.cos(angle), radius**2], part
            )
        parts.append(part / (np.abs(part).max() + 1e-3))
    return 0.3 * np.concatenate(parts) + 0.002 * random.standard_normal(n)


def write_corpus(
    root: Path,
    speakers: int,
    utterances: int,
    first_speaker: int = 100,
    duration_s: float = 2.7,
    suffix: str = "flac",
) -> Path:
    """Write `speakers` × `utterances` files in LibriSpeech's layout; return `root`."""
    for speaker in range(first_speaker, first_speaker + speakers):
        folder = root / str(speaker) / "7"
        folder.mkdir(parents=True)
        for utterance in range(utterances):
            soundfile.write(
                folder / f"{speaker}-7-{utterance:04d}.{suffix}",
                voice(speaker, utterance, duration_s + 0.3 * (utterance % 4)),
                RATE,
            )
    return root


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """A fresh `$CPC_NB_CACHE` for the tests and the processes that they start.

    pytest's own processes share it, so that the demo corpus is spoken once."""
    base = own = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    folder = base / "cache"
    folder.mkdir(exist_ok=True)
    # Whatever pytest's parent ignores, programs get the signals that they are sent.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # One thread, as in the processes that are started: networks this small gain nothing
    # from more, and lose much on a busy machine.
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)  # compile modules once
        for name, value in {
            "CPC_NB_CACHE": folder,
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "JUPYTERLAB_WORKSPACES_DIR": own / "workspaces",  # whose tabs are no user's
        }.items():
            patch.setenv(name, str(value))
        yield folder


@pytest.fixture(scope="session")
def speech(tmp_path_factory) -> Path:
    """Ten speakers, eight FLAC files of 2.7 to 3.6 s each, in LibriSpeech's layout."""
    return write_corpus(tmp_path_factory.mktemp("corpora") / "voices", 10, 8)


@pytest.fixture(scope="session")
def mixed(tmp_path_factory) -> Path:
    """One folder per speaker: WAV, Ogg Vorbis, Opus, MP3 and FLAC files.

    Sample rates range from 8 to 48 kHz, and some files are stereo."""
    root = tmp_path_factory.mktemp("corpora") / "mixed"
    for speaker, (name, rate, channels, options) in enumerate(
        [
            ("a.wav", 44_100, 2, {"subtype": "PCM_24"}),
            ("b.ogg", 22_050, 1, {}),
            ("c.opus", 48_000, 2, {"format": "OGG", "subtype": "OPUS"}),
            ("d.mp3", 44_100, 2, {}),
            ("e.flac", 8_000, 1, {}),
            ("f.WAV", 16_000, 1, {"subtype": "FLOAT"}),
        ]
    ):
        wave = resample_poly(voice(speaker, 0, 3.0), rate, RATE)
        (root / f"speaker-{speaker}").mkdir(parents=True)
        soundfile.write(
            root / f"speaker-{speaker}" / name,
            np.stack([wave] * channels, 1),
            rate,
            **options,
        )
    return root


# Overrides for a run that does everything within seconds.
SMALL = {
    "encoder.channels": [16],
    "context.size": 16,
    "data.group_size": 8,
    "data.test_fraction": 0.4,
    "data.valid_fraction": 0.1,
    "train.valid_windows": 8,
    "train.log_every": 2,
    "train.valid_every": 4,
    "train.checkpoint_every": 2,
}


class Done:
    """A finished process: its exit `code`, and the `output` of both of its streams."""

    def __init__(self, code: int, output: str):
        self.code, self.output = code, output

    @property
    def last(self) -> str:
        """The last line of the output that is not blank."""
        return [line for line in re.split(r"[\r\n]+", self.output) if line.strip()][-1]


def run(*command, **environment) -> Done:
    """Run `command` as a real process in the repository root."""
    done = subprocess.run(
        [*map(str, command)],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=400,
    )
    return Done(done.returncode, done.stdout)


# Processes of this context are forked from one that has imported what takes seconds to
# import; the tests start many.
fork = multiprocessing.get_context("forkserver")
fork.set_forkserver_preload(
    """cpc_nb.align cpc_nb.benchmark cpc_nb.evaluate cpc_nb.export cpc_nb.paper
    cpc_nb.published cpc_nb.store cpc_nb.train cpc_nb.units sklearn.manifold
    torch._dynamo""".split()
)


def become(command: list[str], environment: dict[str, str], output: str):
    """Be a console script: its streams go to the file `output`."""
    os.setsid()
    file = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout = open(1, "w", closefd=False)
    sys.stderr = open(2, "w", errors="backslashreplace", buffering=1, closefd=False)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    sys.argv = command
    try:
        runpy.run_path(command[0], run_name="__main__")
    finally:
        sys.stdout.flush()  # as the interpreter does in the end


class Script:
    """A console script in a process of `fork`, with what the tests use of `Popen`."""

    def __init__(self, command: list[str]):
        self.stdout = tempfile.NamedTemporaryFile("r", errors="replace")
        given = command, {**os.environ}, self.stdout.name
        self.process = fork.Process(target=become, args=given)
        self.process.start()
        self.pid, self.kill = self.process.pid, self.process.kill

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.process.exitcode

    def send_signal(self, number: int):
        os.kill(self.pid, number)

    def wait(self, timeout: float | None = None) -> int:
        self.process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        self.wait(timeout)
        return self.stdout.read(), None


def start(*command, **more) -> subprocess.Popen | Script:
    """Start a process in a session of its own; a script of the package by `fork`."""
    command = [*map(str, command)]
    if command[0].startswith(str(BIN / "cpc_")) and not more:
        return Script(command)
    return subprocess.Popen(
        command,
        cwd=ROOT,
        text=True,
        errors="replace",
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        **more,
    )


def script(name: str, *arguments, **environment) -> Done:
    """Run a console script of the package as a real process."""
    if environment:
        return run(BIN / name, *arguments, **environment)
    process = start(BIN / name, *arguments)
    output, _ = process.communicate(timeout=400)
    return Done(process.returncode, output)


def options(parameters: dict) -> list[str]:
    """`--name VALUE` for each parameter."""
    return [
        part
        for name, value in parameters.items()
        for part in (
            f"--{name}",
            value if isinstance(value, str) else json.dumps(value, default=str),
        )
    ]


def papermill_options(parameters: dict) -> list[str]:
    """`-r name text` and `-p name value` for each parameter."""
    return [
        part
        for name, value in parameters.items()
        for part in (
            ("-r", name, str(value))
            if isinstance(value, (str, Path))
            else ("-p", name, json.dumps(value))
        )
    ]


def papermill(
    notebook: str, output: Path, parameters: dict, root: Path = ROOT, **environment
) -> Done:
    """Execute `nbs/notebook` with papermill, as a user does."""
    output.parent.mkdir(parents=True, exist_ok=True)
    return run(
        sys.executable,
        "-m",
        "papermill",
        "--no-progress-bar",
        root / "nbs" / notebook,
        output,
        *papermill_options(parameters),
        **environment,
    )


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


@contextlib.contextmanager
def jupyter_lab(folder: Path, by_make: bool = False):
    """A JupyterLab in `folder` with the configuration of `make lab`, or by `make lab`
    itself; its address. The token is `test`."""
    port, config = free_port(), ROOT / "nbs" / "_sphinx" / "lab_config.py"
    options = f"--no-browser --ServerApp.port={port} --IdentityProvider.token=test"
    if by_make:
        command = ["make", "lab", f"LAB={options}"]
    else:
        command = [sys.executable, "-m", "jupyter", "lab", "--allow-root"]
        command += [*options.split(), "--config", config]
    process = subprocess.Popen(command, cwd=folder, start_new_session=True)
    address = f"http://localhost:{port}"
    try:
        for _ in range(240):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{address}/api")
                break
            time.sleep(0.5)
        yield address
    finally:
        os.killpg(process.pid, signal.SIGTERM)  # make, and JupyterLab below it
        process.wait(30)


def save_notebook(tab):
    """Save the notebook that `tab` shows in JupyterLab. Its file is whole afterwards:
    the server answers when it has written it."""

    def saves(response):
        sent = response.request
        return sent.method == "PUT" and "/api/contents/" in sent.url

    with tab.expect_response(saves) as saved:
        tab.keyboard.press("Control+s")
    assert saved.value.ok, saved.value.status


@pytest.fixture(scope="module")
def browser():
    """A real browser; skipped where there is none."""
    sync_api = pytest.importorskip("playwright.sync_api")
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    if not path:
        pytest.skip("no Chromium on the PATH (on Debian: apt-get install chromium)")
    options = """--no-sandbox --disable-gpu --disable-quic --no-first-run
        --disable-background-networking --disable-component-update --disable-sync
        --use-fake-device-for-media-stream"""
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=options.split())
        yield browser
        browser.close()


@pytest.fixture
def tab(browser):
    """A tab of the browser, high enough for an explorer."""
    tab = browser.new_page(viewport={"width": 1300, "height": 1700})
    tab.set_default_timeout(300_000)
    yield tab
    tab.close()


# Opens what is folded, stops what moves, and marks elements whose colours axe-core is
# to be asked about: a few of each kind that was not asked about before. Tokens of code
# and equations become plain. All questions about all tokens would take a minute a page.
PREPARE = """(asked) => {
    document.querySelectorAll('details').forEach(fold => fold.open = true);
    document.querySelectorAll('mjx-container > *').forEach(part => part.remove());
    const style = document.createElement('style');
    style.textContent = '* { transition: none !important; animation: none !important }';
    document.head.append(style);
    const seen = {};
    for (const element of document.querySelectorAll('body *')) {
        const texts = [...element.childNodes].filter(node => node.nodeType === 3);
        if (!texts.some(text => text.data.trim().length > 1)) continue;
        if (!element.checkVisibility({ visibilityProperty: true })) continue;
        let behind = element, colour;
        do colour = getComputedStyle(behind).backgroundColor;
        while (colour === 'rgba(0, 0, 0, 0)' && (behind = behind.parentElement));
        const { color, fontSize, fontWeight } = getComputedStyle(element);
        const both = [element, element.parentNode];
        const names = both.map(one => one.tagName + one.className);
        const kind = [...names, color, fontSize, fontWeight, colour].join();
        seen[kind] = (seen[kind] || 0) + 1;
        element.toggleAttribute('data-asked', !asked.includes(kind) && seen[kind] <= 3);
    }
    for (const token of document.querySelectorAll('pre span, .sig span, code span'))
        if (!token.matches('[data-asked], :has([data-asked])'))
            token.replaceWith(token.textContent);
    return Object.keys(seen);
}"""
ASK = """async (question) => {
    await new Promise(requestAnimationFrame);  // until the page knows its new size
    await new Promise(requestAnimationFrame);
    return axe.run(...question);
}"""


def violations(tab, asked: set[str] | None = None) -> list[str]:
    """What axe-core finds serious on a page: of its form on screens wide and narrow, of
    its colours by day and by night. The page is changed by it.

    `asked` holds kinds of elements whose colours are known, and is added to."""
    from axe_playwright_python.base import AXE_SCRIPT

    asked = set() if asked is None else asked
    kinds = set(tab.evaluate(PREPARE, [*asked]))
    tab.evaluate(AXE_SCRIPT)
    form = {"rules": {"color-contrast": {"enabled": False}}}
    colours = {"runOnly": ["color-contrast", "link-in-text-block"]}
    side = {"runOnly": ["scrollable-region-focusable"]}
    questions = [(1400, "light", form, "html"), (390, "light", side, "html")]
    if kinds - asked:
        questions += [
            (1400, scheme, colours, "[data-asked]") for scheme in ("light", "dark")
        ]
    found = []
    for width, scheme, rules, where in questions:
        tab.set_viewport_size({"width": width, "height": 900})
        tab.emulate_media(color_scheme=scheme)
        options = {"resultTypes": ["violations"], "preload": False, **rules}
        answer = tab.evaluate(ASK, [{"include": [[where]]}, options])
        found += [
            f"{one['id']}, {scheme}, {width} pixels: {node['html'][:200]}"
            for one in answer["violations"]
            for node in one["nodes"]
            if one["impact"] in ("serious", "critical")
        ]
    asked |= kinds
    return found


def keep_screenshot(tab, name: str, width: int = 1400):
    """Store all of a tab's page as `name.png` in the folder `$CPC_NB_SCREENSHOTS`."""
    if folder := os.environ.get("CPC_NB_SCREENSHOTS"):
        tab.set_viewport_size({"width": width, "height": 900})
        tab.screenshot(path=Path(folder) / f"{name}.png", full_page=True)


def is_root() -> bool:
    return os.geteuid() == 0


@pytest.fixture
def disk(tmp_path):
    """`disk(kib)` mounts a small disk and returns its folder; skipped without root.

    `disk.protect(folder)` makes it read-only."""
    mounted = []

    def mount(kib: int) -> Path:
        folder = tmp_path / f"disk-{len(mounted)}"
        folder.mkdir()
        done = (
            subprocess.run(
                ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", folder],
                capture_output=True,
                text=True,
            )
            if is_root()
            else None
        )
        if done is None or done.returncode:
            pytest.skip(
                "mounting a small disk needs root"
                if done is None
                else f"cannot mount: {done.stderr.strip()}"
            )
        mounted.append(folder)
        return folder

    mount.protect = lambda folder: subprocess.run(
        ["mount", "-o", "remount,ro", folder], check=True
    )
    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", folder], check=True)


@pytest.fixture(
    params=[
        "cpu",
        pytest.param(
            "cuda",
            marks=pytest.mark.skipif(
                not torch.cuda.is_available(), reason="no GPU on this machine"
            ),
        ),
    ]
)
def device(request) -> torch.device:
    """The CPU, and a GPU where there is one."""
    return torch.device(request.param)
