"""The package: the wheel, the export, and the environment that `make` sets up."""

import ast
import configparser
import email
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
import soundfile
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import cpc_nb
from cpc_nb import api
from cpc_nb.config import EXTRAS, ContextConfig, EncoderConfig

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


def metadata_of(wheel) -> email.message.Message:
    with zipfile.ZipFile(wheel) as archive:
        [name] = [name for name in archive.namelist() if name.endswith("METADATA")]
        return email.message_from_bytes(archive.read(name))


def requirements(wheel, extra: str = "") -> dict[str, Requirement]:
    """What the wheel requires by itself, or for an extra, by name."""
    found = map(Requirement, metadata_of(wheel).get_all("Requires-Dist"))
    return {
        canonicalize_name(one.name): one
        for one in found
        if (one.marker.evaluate({"extra": extra}) if one.marker else not extra)
    }


def test_constraints_pin_every_requirement(wheel):
    pinned = {
        line.split("==")[0]
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    }
    assert {*requirements(wheel), *requirements(wheel, "dev")} <= pinned


def test_features_take_no_notebook_and_no_synthesiser(wheel):
    assert set(requirements(wheel)) == set(
        "torch torchaudio numpy soundfile safetensors huggingface-hub pydantic "
        "filelock tqdm fastcore".split()
    )
    for name in ("torch", "torchaudio"):  # another one stays where it is
        found = requirements(wheel)[name].specifier
        assert all(found.contains(version) for version in ("2.7.0", "2.11.0", "2.14.1"))


@pytest.mark.parametrize("extra", ["", "train", "align", "notebooks", "all", "dev"])
def test_every_extra_is_what_this_environment_holds(wheel, extra):
    assert extra == "" or extra in metadata_of(wheel).get_all("Provides-Extra")
    for name, one in requirements(wheel, extra).items():
        assert one.specifier.contains(importlib.metadata.version(name)), one


def test_a_missing_package_is_looked_for_in_the_right_extra(wheel):
    """EXTRAS, which `need` reads, agrees with settings.ini."""
    sold_by = importlib.metadata.packages_distributions()
    sold_by["IPython"] = ["ipykernel"]  # which requires it
    for extra, packages in EXTRAS.items():
        required = requirements(wheel, extra)
        for package in packages:
            assert set(map(canonicalize_name, sold_by[package])) & set(required)
    together = {name for extra in EXTRAS for name in requirements(wheel, extra)}
    assert set(requirements(wheel, "all")) == together
    assert together <= set(requirements(wheel, "dev"))


# The wheel where nothing but its own requirements is installed

BARE = """
import importlib.metadata as metadata
import re, sys
from importlib.abc import MetaPathFinder

wanted, there = ["cpc_nb"], set()
while wanted:
    name = re.sub("[-_.]+", "-", wanted.pop()).lower()
    if name not in there:
        there.add(name)
        try:
            lines = metadata.requires(name) or []
        except metadata.PackageNotFoundError:  # of another platform
            continue
        wanted += [re.match("[-_.a-zA-Z0-9]+", x)[0] for x in lines if "extra" not in x]
blocked = {
    package
    for package, names in metadata.packages_distributions().items()
    if not {re.sub("[-_.]+", "-", name).lower() for name in names} & there
}


class Bare(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name in blocked:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Bare())
"""
FEATURES = """
import importlib, pkgutil, sys
import numpy as np
import cpc_nb

for module in pkgutil.iter_modules(cpc_nb.__path__, "cpc_nb."):
    try:
        importlib.import_module(module.name)
    except cpc_nb.ConfigError as error:  # what is made of widgets
        assert module.name in ("cpc_nb.explorer", "cpc_nb.sound_widgets")
        assert "cpc_nb[notebooks]" in str(error)
model = cpc_nb.CPC.from_pretrained(sys.argv[1])
wave = np.sin(np.arange(44_100, dtype=np.float32))
print(model.encode(wave, sample_rate=44_100).context.sum().item())
for call in (cpc_nb.config.use_plot_style, cpc_nb.align.load_decoder):
    try:
        call()
    except cpc_nb.ConfigError as error:
        print(error)
"""


@pytest.fixture(scope="module")
def bare(installed, tmp_path_factory):
    """A function that runs Python with arguments where only the wheel and what it
    requires can be imported."""
    hook = tmp_path_factory.mktemp("hook")
    (hook / "sitecustomize.py").write_text(BARE)

    def run_bare(*arguments):
        return subprocess.run(
            [str(one) for one in (installed / "python", *arguments)],
            cwd=hook,
            env=environment(PYTHONPATH=str(hook)),
            capture_output=True,
            text=True,
        )

    return run_bare


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A small model in a folder."""
    torch.manual_seed(0)
    model = cpc_nb.CPC(EncoderConfig(channels=(16,)), ContextConfig(size=16))
    folder = tmp_path_factory.mktemp("saved") / "model"
    model.save_pretrained(folder)
    return folder


def test_nothing_but_the_requirements_can_be_imported(bare):
    """The hook blocks what it is to block, or the tests below could not fail."""
    for name in ("matplotlib", "sklearn", "joblib", "IPython", "pytest", "psutil"):
        assert "ModuleNotFoundError" in bare("-c", f"import {name}").stderr, name
    assert bare("-c", "import numpy, tqdm, pydantic").returncode == 0


def test_a_bare_environment_encodes(bare, saved):
    done = bare("-c", FEATURES, saved)
    assert done.returncode == 0, done.stderr
    total, plots, aligner = done.stdout.splitlines()[-3:]
    wave = torch.arange(44_100).sin()
    z, c = cpc_nb.CPC.from_pretrained(saved).encode(wave, sample_rate=44_100)
    assert abs(float(total) - c.sum().item()) < 1e-2
    assert (
        plots == 'matplotlib is not installed; run: pip install "cpc_nb[train]"'
        and 'pip install "cpc_nb[align]"' in aligner
    )


def test_a_bare_environment_writes_features(bare, saved, tmp_path):
    (tmp_path / "speech" / "one").mkdir(parents=True)
    wave = torch.randn(16_000).numpy() / 10
    soundfile.write(tmp_path / "speech/one/a.wav", wave, 16_000)
    options = "--model", saved, "--data", tmp_path / "speech", "--out", tmp_path / "out"
    done = bare("-m", "cpc_nb.features", *options, "--n_gpus", 0)
    assert done.returncode == 0, done.stderr
    assert any((tmp_path / "out").rglob("*a.*"))


@pytest.mark.parametrize(
    "program, missing",
    [
        ("cpc_train", "tensorboard, psutil are"),
        ("cpc_evaluate", "matplotlib, scikit-learn are"),
        ("cpc_pack", "espeakng-loader is"),
    ],
)
def test_a_command_says_in_a_line_what_it_lacks(bare, installed, program, missing):
    options = {"cpc_evaluate": ("--run_dir", "x"), "cpc_pack": ("demo",)}
    done = bare(installed / program, *options.get(program, ()))
    line = f'{program}: {missing} not installed; run: pip install "cpc_nb[train]"\n'
    assert (done.returncode, done.stderr) == (1, line)


# Names, description, torch.hub


def test_names_are_there_when_asked_for_and_not_before(installed, tmp_path):
    code = (
        "import sys, cpc_nb; print(sys.modules.keys() & {'torch', 'numpy', 'pydantic'})"
    )
    assert run(installed / "python", "-c", code, cwd=tmp_path) == "set()\n"
    for name, module in api.NAMES.items():
        found = getattr(cpc_nb, name)
        assert found is getattr(sys.modules[f"cpc_nb.{module}"], name)


def test_editors_know_the_same_names(wheel):
    tree = ast.parse((ROOT / "cpc_nb" / "__init__.py").read_text())
    [block] = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {one.names[0].asname: one.module for one in block.body}
    assert seen == {name: f"cpc_nb.{module}" for name, module in api.NAMES.items()}
    assert "cpc_nb/py.typed" in zipfile.ZipFile(wheel).namelist()


def links(markdown: str) -> list[str]:
    return re.findall(r"\]\(([^)\s]+)\)", markdown)


def test_no_link_of_the_description_is_dead(wheel, project):
    readme = (ROOT / "README.md").read_text()
    relative = [link for link in links(readme) if not link.startswith("http")]
    assert len(relative) > 20 and "nbs/images/cpc.svg" in relative

    homeless = metadata_of(wheel).get_payload()
    assert [link for link in links(homeless) if link not in links(readme)] == []
    assert not set(relative) & set(links(homeless))
    assert "CPC in forty lines" in homeless and "(Picture: The encoder" in homeless

    lines = (project / "settings.ini").read_text()
    home = "https://example.org/us/cpc_nb"
    lines = re.sub("(?m)^git_url =.*", f"git_url = {home}/", lines)
    (project / "settings.ini").write_text(lines)
    code = "from setuptools.build_meta import *; prepare_metadata_for_build_wheel('.')"
    run(sys.executable, "-c", code, cwd=project, env=environment())
    [path] = project.glob("*.dist-info/METADATA")
    shown = links(email.message_from_bytes(path.read_bytes()).get_payload())
    assert len(shown) == len(links(readme))
    assert f"{home}/blob/main/nbs/00_cpc.ipynb" in shown
    assert f"{home}/raw/main/nbs/images/cpc.svg" in shown
    assert all(link.startswith("https://") for link in shown)


def test_torch_hub_loads_a_model(saved):
    model = torch.hub.load(str(ROOT), "cpc", saved, source="local")
    assert isinstance(model, cpc_nb.CPC) and model.context.size == 16
    hubconf = ast.parse((ROOT / "hubconf.py").read_text())
    [named] = [node.value for node in hubconf.body if isinstance(node, ast.Assign)]
    required = settings["requirements"].replace("_", "-").split()
    names = {Requirement(one).name for one in required}
    assert {name.replace("_", "-") for name in ast.literal_eval(named)} == names


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
