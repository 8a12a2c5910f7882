"""The package: the wheel, the export, and the environment that `make` sets up."""

import configparser
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PARTS = [
    "nbs",
    "cpc_nb",
    "settings.ini",
    "setup.py",
    "pyproject.toml",
    "MANIFEST.in",
    "LICENSE",
    "README.md",
    "constraints.txt",
    "Makefile",
]

settings = configparser.ConfigParser(delimiters=["="], interpolation=None)
settings.read(ROOT / "settings.ini")
settings = settings["DEFAULT"]
SCRIPTS = [line.split("=")[0] for line in settings["console_scripts"].split()]


def run(*command, cwd, **kwargs):
    result = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        capture_output=True,
        text=True,
        **kwargs,
    )
    assert result.returncode == 0, (
        f"{' '.join(map(str, command))}\n{result.stdout}\n{result.stderr}"
    )
    return result.stdout


def environment(**changes):
    return {
        **{
            name: value
            for name, value in os.environ.items()
            if name not in ("IN_TEST", "PYTHONPATH", "MAKEFLAGS", "MAKELEVEL")
        },
        **changes,
    }


@pytest.fixture
def project(tmp_path):
    """A copy of the project, without caches and hidden files."""
    folder = tmp_path / "a project"
    folder.mkdir()
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(
                ROOT / part,
                folder / part,
                ignore=shutil.ignore_patterns("__pycache__", ".*"),
            )
        else:
            shutil.copy(ROOT / part, folder)
    return folder


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    }


# The wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from the source distribution."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, source / part)
        else:
            shutil.copy(ROOT / part, source)
    run(
        sys.executable,
        "-m",
        "build",
        "--no-isolation",
        "--outdir",
        out,
        source,
        cwd=out,
    )
    [wheel] = out.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The scripts folder of a fresh environment in which the wheel is installed.

    It sees the packages of this environment, but not its cpc_nb."""
    folder = tmp_path_factory.mktemp("fresh")
    venv.create(folder, with_pip=False, symlinks=True)
    run(
        sys.executable,
        "-m",
        "pip",
        "--python",
        folder / "bin" / "python",
        "install",
        "-q",
        "--no-deps",
        "--no-index",
        wheel,
        cwd=folder,
    )
    [site] = folder.glob("lib/python*/site-packages")
    (site / "packages.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin"


def test_wheel_holds_the_package_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"cpc_nb"}
    exported = {
        path.relative_to(ROOT).as_posix() for path in (ROOT / "cpc_nb").rglob("*.py")
    }
    assert exported <= set(names)
    for name in ("sentences.txt", "voices.txt", "phonemes.txt"):
        assert f"cpc_nb/{name}" in names
    metadata = (
        zipfile.ZipFile(wheel)
        .read(next(name for name in names if name.endswith("METADATA")))
        .decode()
    )
    assert (
        f"Version: {settings['version']}" in metadata
        and f"Requires-Python: >={settings['min_python']}" in metadata
    )
    assert any("LICENSE" in name for name in names)


def test_every_module_of_the_wheel_imports(installed, tmp_path):
    code = (
        "import importlib, pkgutil, cpc_nb\n"
        "for module in pkgutil.iter_modules(cpc_nb.__path__, 'cpc_nb.'):\n"
        "    print(importlib.import_module(module.name).__file__)\n"
        "print(cpc_nb.__version__)"
    )
    *files, version = run(
        installed / "python", "-c", code, cwd=tmp_path, env=environment()
    ).split()
    assert version == settings["version"]
    assert files and all(Path(file).is_relative_to(installed.parent) for file in files)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_of_the_wheel_explains_itself(installed, tmp_path, script):
    assert script in run(installed / script, "--help", cwd=tmp_path, env=environment())


def test_constraints_pin_every_requirement():
    pinned = {
        line.split("==")[0]
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    }
    required = {
        "".join(c if c.isalnum() or c in "-_" else " " for c in name)
        .split()[0]
        .replace("_", "-")
        .lower()
        for name in f"{settings['requirements']} {settings['dev_requirements']}".split()
    }
    assert required <= pinned


# The notebooks are the source


def test_the_package_is_what_the_notebooks_export(project):
    before = contents(project)
    scripts = Path(sys.executable).parent
    run(scripts / "nbdev_export", cwd=project, env=environment())
    run(scripts / "nbdev_clean", cwd=project, env=environment())
    after = contents(project)
    assert [
        name for name in sorted(before | after) if before.get(name) != after.get(name)
    ] == [], "run `make export`"


@pytest.mark.parametrize(
    "heading",
    [
        "Two commands",
        "The notebooks",
        "Your own speech",
        "Many GPUs, many machines",
        "The model to take away",
        "Change it",
    ],
)
def test_readme_has_what_a_newcomer_looks_for(heading):
    readme = (ROOT / "README.md").read_text()
    assert f"\n## {heading}\n" in readme


def test_readme_lists_every_notebook():
    readme = (ROOT / "README.md").read_text()
    notebooks = sorted((ROOT / "nbs").glob("[0-9]*.ipynb"))
    assert notebooks
    assert [path.stem for path in notebooks if f"[{path.stem}](" not in readme] == []


def test_readme_is_what_the_index_renders_to(project):
    readme = [sys.executable, "nbs/_sphinx/readme.py"]
    run(*readme, "--check", cwd=project, env=environment())
    before = contents(project)
    run(*readme, cwd=project, env=environment())
    assert contents(project) == before
    (project / "README.md").write_text("something else")
    stale = subprocess.run(
        [*readme, "--check"],
        cwd=project,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert stale.returncode == 1 and "make readme" in stale.stderr


# The environment

PYTHON = """#!/bin/sh
# A fake Python: records its arguments, makes an environment that holds itself, and
# fails on the arguments that the file `broken` holds.
if [ -e '{folder}/broken' ]; then
    case "$*" in *"$(cat '{folder}/broken')"*) exit 1;; esac
fi
case "$*" in
    "-m venv .venv") mkdir -p .venv/bin && cp "$0" .venv/bin/python;;
    "--version") echo "Python 3.99";;
esac
case "$*" in "-c "*) ;; *) echo "$*" >> '{folder}/calls';; esac
"""


@pytest.fixture
def make(project, tmp_path):
    """A function that runs `make .venv/.ready` with a fake Python.

    It returns the process, with the arguments that Python was given as `calls`."""
    if not shutil.which("make"):
        pytest.skip("make is not installed")
    python = tmp_path / "python3"
    python.write_text(PYTHON.format(folder=tmp_path))
    python.chmod(0o755)

    def make(folder=project, broken=None):
        for name in ("broken", "calls"):
            (tmp_path / name).unlink(missing_ok=True)
        if broken:
            (tmp_path / "broken").write_text(broken)
        result = subprocess.run(
            ["make", f"PYTHON=/no/python {python}", ".venv/.ready"],
            cwd=folder,
            env=environment(),
            capture_output=True,
            text=True,
        )
        result.calls = (
            (tmp_path / "calls").read_text().splitlines()
            if (tmp_path / "calls").exists()
            else []
        )
        return result

    return make


def test_environment_is_set_up_once(make, project):
    first = make()
    assert first.returncode == 0, first.stderr
    assert any("-c constraints.txt -e .[dev]" in call for call in first.calls)
    assert make().calls == []
    os.utime(project / "settings.ini", (2e9, 2e9))
    again = make()
    assert "-m venv .venv" not in again.calls and any(
        "pip install" in call for call in again.calls
    )


def test_interrupted_installation_is_not_taken_for_whole(make, project):
    assert make(broken="pip install").returncode != 0
    assert (project / ".venv").exists() and not (project / ".venv/.ready").exists()
    assert "-m venv .venv" in make().calls
    os.utime(project / "settings.ini", (2e9, 2e9))
    assert make(broken="pip install").returncode != 0
    assert "-m venv .venv" in make().calls


def test_moved_project_gets_a_new_environment(make, project):
    make()
    moved = project.rename(project.with_name("elsewhere"))
    assert "-m venv .venv" in make(moved).calls


@pytest.mark.parametrize(
    "broken, message",
    [("version_info", "No Python 3.10 or newer"), ("ensurepip", "python3-venv")],
)
def test_unfit_python_is_named(make, project, broken, message):
    result = make(broken=broken)
    assert result.returncode != 0 and message in result.stderr
    assert not (project / ".venv").exists()


def test_make_alone_explains_the_targets(project):
    if not shutil.which("make"):
        pytest.skip("make is not installed")
    shown = run("make", cwd=project, env=environment())
    assert all(f"make {target} " in shown for target in ("run", "test", "docs", "lab"))
    assert not (project / ".venv").exists()
