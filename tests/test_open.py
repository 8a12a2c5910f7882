"""Where else the repository opens: containers, Binder, Colab; what its workflows do."""

import configparser
import json
import os
import re
import subprocess

import pytest
import yaml
from conftest import ROOT
from IPython.core.interactiveshell import InteractiveShell

CONTAINER = json.loads((ROOT / ".devcontainer" / "devcontainer.json").read_text())
POST_BUILD = ROOT / ".binder" / "postBuild"
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
MAKEFILE = (ROOT / "Makefile").read_text().replace("$(READY)", ".venv/.ready")
TARGETS = set(re.findall(r"^([\w./-]+):(?!=)", MAKEFILE, re.M))
HOME = "https://github.com/us/cpc_nb"


def settings() -> configparser.SectionProxy:
    parser = configparser.ConfigParser(delimiters=["="], interpolation=None)
    parser.read(ROOT / "settings.ini")
    return parser["DEFAULT"]


def can_run(command: str) -> bool:
    """Whether `command` makes a target of the Makefile or is a script that can run."""
    program, *arguments = command.split()
    if program == "make":
        return set(arguments) <= TARGETS
    return os.access(ROOT / program, os.X_OK)


def python_of(text: str) -> tuple[int, ...]:
    """The version of Python that `text` ends with."""
    return tuple(map(int, re.search(r"(\d+)\.(\d+)$", text.strip()).groups()))


def test_the_container_runs_make_and_shows_jupyterlab():
    assert can_run(CONTAINER["postCreateCommand"])
    assert not can_run("make no-such-target")
    assert CONTAINER["forwardPorts"] == [8888]  # where `make lab` serves
    least = python_of(settings()["min_python"])
    assert python_of(CONTAINER["image"]) >= least
    assert python_of((ROOT / ".binder" / "runtime.txt").read_text()) >= least


def test_binder_installs_extras_that_there_are_with_pins_that_there_are():
    assert os.access(POST_BUILD, os.X_OK)
    script = POST_BUILD.read_text()
    assert subprocess.run(["bash", "-n", POST_BUILD]).returncode == 0
    [pins], [extras] = (
        re.findall(r"-c (\S+)", script),
        re.findall(r"\.\[(.*?)]", script),
    )
    assert (ROOT / pins).is_file()
    assert {"notebooks", "train"} <= set(extras.split(","))
    assert all(f"{extra}_requirements" in settings() for extra in extras.split(","))


# --- workflows ---


def jobs_of(path) -> dict:
    return yaml.safe_load(path.read_text())["jobs"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_runs_commands_that_there_are(path):
    commands = [
        step["run"]
        for job in jobs_of(path).values()
        for step in job["steps"]
        if "run" in step
    ]
    assert commands and all(map(can_run, commands))


def test_only_publishing_may_write_and_only_main_is_published():
    for path in WORKFLOWS:
        workflow = yaml.safe_load(path.read_text())
        for name, job in workflow["jobs"].items():
            granted = job.get("permissions", workflow["permissions"])
            if name == "publish":
                assert granted == {"pages": "write", "id-token": "write"}
                condition = job["if"]
            else:
                assert set(granted.values()) == {"read"}, f"{path.name}: {name}"
    assert "github.event_name != 'pull_request'" in condition
    assert "github.ref == 'refs/heads/main'" in condition


# --- notebooks ---


def cell(notebook: str, text: str) -> str:
    """The source of the only code cell of `notebook` that has `text`."""
    cells = json.loads((ROOT / "nbs" / notebook).read_text())["cells"]
    sources = ["".join(one["source"]) for one in cells if one["cell_type"] == "code"]
    [source] = [source for source in sources if text in source]
    return source


class Colab(InteractiveShell):
    """An IPython that calls itself as Colab's does, and notes what pip is to do."""

    def __init__(self):
        super().__init__(history_length=0)
        self.asked = []
        self.register_magic_function(self.asked.append, magic_name="pip")

    def __repr__(self):
        return "<google.colab._shell.Shell object>"


@pytest.mark.parametrize("home", ["", HOME])
def test_in_colab_the_first_page_installs_the_package_or_says_how(home, capsys):
    source = cell("00_cpc.ipynb", "google.colab")
    assert f'HOME = "{settings()["git_url"]}"' in source  # one place tells the other
    source = re.sub('HOME = ".*"', f'HOME = "{home}"', source)
    shell = Colab()
    shell.run_cell(source).raise_error()
    install = f'install -q "cpc_nb[train] @ git+{home}"'
    assert shell.asked == ([install] if home else [])
    assert ("%pip install 'FOLDER[train]'" in capsys.readouterr().out) == (not home)


@pytest.mark.parametrize("home", ["", HOME, "https://example.org/us/cpc_nb"])
def test_the_readme_links_to_places_only_where_they_find_the_repository(
    home, tmp_path, monkeypatch
):
    (tmp_path / "nbs").mkdir()
    written = (ROOT / "settings.ini").read_text()
    written = re.sub("(?m)^git_url =.*", f"git_url = {home}/", written)
    (tmp_path / "settings.ini").write_text(written)
    monkeypatch.chdir(tmp_path / "nbs")
    shown = []
    names = {"Markdown": str, "display": shown.append}
    exec(cell("index.ipynb", "configparser"), names)
    links = re.findall(r"\]\((https://[^)]+)\)", "".join(shown))
    assert len(links) == (3 if home == HOME else 0)
    assert all("/us/cpc_nb" in link for link in links)
    for path in re.findall(r"nbs/\w+\.ipynb", "".join(links)):
        assert (ROOT / path).is_file()
