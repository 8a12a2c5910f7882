"""The how-to pages: their commands exist and take what they are given, and what the
comparison says of this project is there."""

import configparser
import importlib
import json
import re
import shlex
import sys
from types import SimpleNamespace

import pytest
from conftest import ROOT
from markdown_it import MarkdownIt

import cpc_nb.config
from cpc_nb.align import read_formats
from cpc_nb.config import EXTRAS, ConfigError, config_from_parameters
from cpc_nb.corpus import LIBRISPEECH_SUBSETS
from cpc_nb.evaluate import EVALUATE_PARAMETERS
from cpc_nb.evaluation import read_protocols
from cpc_nb.store import check_choices, launch_of
from cpc_nb.units import UnitsPlan

NBS = ROOT / "nbs"
PAGES = ["index", *sorted(path.stem for path in NBS.glob("7*.ipynb")), "20_launch"]
PROJECTS = "CPC_audio CPCLibriSpeech bshall/cpc s3prl torchaudio transformers".split()

settings = configparser.ConfigParser(delimiters=["="], interpolation=None)
settings.read(ROOT / "settings.ini")
SCRIPTS = dict(
    line.split("=") for line in settings["DEFAULT"]["console_scripts"].split()
)
MAKEFILE = (ROOT / "Makefile").read_text()
TARGETS = set(re.findall(r"^([a-z-]+):", MAKEFILE, re.M))
VARIABLES = set(re.findall(r"\b([A-Z]+)=", MAKEFILE))
VARIABLES |= set(re.findall(r"^([A-Z]+) *=", MAKEFILE, re.M))


class Parsed(Exception):
    """Ends a command once it has read its options."""


def options_of(script: str, arguments: list[str]) -> dict:
    """The options that a console script reads from `arguments`; it does not go on."""
    module, function = SCRIPTS[script].split(":")
    module = importlib.import_module(module)
    read = cpc_nb.config.parse_options

    def parse(*given, **more):
        raise Parsed(read(*given, **more))

    with pytest.MonkeyPatch.context() as patch:
        for name, one in list(sys.modules.items()):
            if name.startswith("cpc_nb") and hasattr(one, "parse_options"):
                patch.setattr(one, "parse_options", parse)
        patch.setattr(sys, "argv", [script, *arguments])
        with pytest.raises(Parsed) as parsed:
            getattr(module, function)()
    return parsed.value.args[0]


def check_data(data):
    """A subset of LibriSpeech exists; all else may be anywhere."""
    if str(data).startswith("librispeech:"):
        assert set(data.removeprefix("librispeech:").split(",")) <= {
            *LIBRISPEECH_SUBSETS
        }


def check_training(options: dict):
    """The configuration is possible, and its processes share a batch evenly."""
    given = {k: v for k, v in options.items() if k not in ("run_dir", "resume")}
    config = config_from_parameters(given.pop("preset", "demo"), **given)
    launch = config.launch
    processes = (launch.n_procs or launch.n_gpus or 1) * launch.nnodes
    groups = config.train.batch_size // config.group_size
    assert groups % (processes * launch.accumulate) == 0, f"{groups} for {processes}"
    assert (launch.nnodes > 1) == bool(launch.rdzv_endpoint)


def check_features(options: dict):
    names = ("format", "kind", "dtype", "standardise")
    check_choices(**{name: options[name] for name in names if name in options})
    launch_of(options)
    assert {"model", "data", "out"} <= options.keys()


def check_units(options: dict):
    fields = {name: options[name] for name in UnitsPlan._fields if name in options}
    UnitsPlan(**fields).check()
    assert "out" in options and ("features" in options or "model" in options)


def check_evaluation(options: dict):
    unknown = options.keys() - EVALUATE_PARAMETERS.keys()
    assert not unknown and "run_dir" in options
    read_protocols(options.get("protocols"))


def check_alignment(options: dict):
    assert {"data", "out"} <= options.keys()
    read_formats(options.get("formats", ""))


def check_export(options: dict):
    assert options["out"].endswith((".onnx", ".pt2")) and "model" in options


CHECKS = {
    "cpc_train": check_training,
    "cpc_features": check_features,
    "cpc_units": check_units,
    "cpc_evaluate": check_evaluation,
    "cpc_align": check_alignment,
    "cpc_export": check_export,
}


def check_script(script: str, arguments: list[str]):
    options = options_of(script, arguments)
    check_data(options.get("data"))
    if script in CHECKS:
        CHECKS[script](options)


def papermill_parameters(words: list[str]) -> dict:
    """The parameters in papermill's options `-p NAME VALUE`, `-r` and `-y`."""
    parameters, words = {}, list(words)
    while words:
        option = words.pop(0)
        if option == "-y":  # enough of YAML: {overrides: {name: value}}
            text = words.pop(0)
            found = re.fullmatch(r"\{overrides: \{([\w.]+): (\S+)\}\}", text)
            parameters["overrides"] = {found[1]: cpc_nb.config._read_value(found[2])}
            continue
        assert option in ("-p", "-r"), option
        name, value = words.pop(0), words.pop(0)
        as_it_is = option == "-r"
        parameters[name] = value if as_it_is else cpc_nb.config._read_value(value)
    return parameters


def check_papermill(words: list[str]):
    if words[0] == "--help-notebook":
        assert (ROOT / words[1]).is_file()
        return
    notebook, _, *rest = words
    parameters = papermill_parameters(rest)
    if notebook == "nbs/04_train.ipynb":
        check_training(parameters)
    else:
        assert notebook == "nbs/05_evaluate.ipynb"
        check_evaluation(parameters)


def check_make(words: list[str]):
    targets = [word for word in words if "=" not in word]
    given = dict(word.split("=", 1) for word in words if "=" in word)
    assert set(targets) <= TARGETS and set(given) <= VARIABLES, words
    if targets == ["run"]:
        parameters = papermill_parameters(shlex.split(given.get("TRAIN", "")))
        if "GPUS" in given:
            parameters["n_gpus"] = int(given["GPUS"])
        check_training(parameters | {"preset": given.get("PRESET", "demo")})
        check_data(given.get("DATA"))
        parameters = papermill_parameters(shlex.split(given.get("EVALUATE", "")))
        check_evaluation({"run_dir": given.get("RUN", ""), **parameters})


def check_pip(words: list[str]):
    [install, what] = words
    extras = re.fullmatch(r"\.(?:\[([\w,]+)\])?", what)[1]
    assert install == "install"
    assert set((extras or "").split(",")) - {""} <= {*EXTRAS, "all", "dev"}


def check_module(words: list[str]):
    """`-m MODULE OPTIONS`, of python or of torchrun."""
    module = words[words.index("-m") + 1]
    rest = words[words.index("-m") + 2 :]
    if module == "cpc_nb.headless":  # takes what papermill takes
        return check_papermill(rest) if rest else None
    [script] = [name for name in SCRIPTS if name == module.replace("cpc_nb.", "cpc_")]
    check_script(script, rest)


PROGRAMS = {
    "make": check_make,
    "pip": check_pip,
    "papermill": check_papermill,
    "python": check_module,
    "torchrun": check_module,
}
FORMS = {  # the one way in which a page uses these
    "git": r"clone ADDRESS cpc_nb",
    "mkdir": r"-p runs/mine/evaluation",
    "cd": r"cpc_nb",
    "source": r"\.venv/bin/activate",
    "touch": r"\S+/(stop|save)",
    "tensorboard": r"--logdir \S+/tensorboard",
}


def check(command: str):
    """Raise where a shell command could not work."""
    words = shlex.split(command, comments=True)
    while words and re.match(r"[A-Z_]+=", words[0]):
        words.pop(0)
    if not words:
        return
    program = words[0].removeprefix(".venv/bin/")
    if program in SCRIPTS:
        check_script(program, words[1:])
    elif program in FORMS:
        assert re.fullmatch(FORMS[program], " ".join(words[1:]))
    else:
        PROGRAMS[program](words[1:])


def markdown(page: str) -> list[str]:
    """The text cells of a notebook."""
    cells = json.loads((NBS / f"{page}.ipynb").read_text())["cells"]
    return ["".join(c["source"]) for c in cells if c["cell_type"] == "markdown"]


def spans(tokens):
    """The code in sentences and tables."""
    for token in tokens:
        yield from spans(token.children or [])
        if token.type == "code_inline":
            yield token.content


def commands(page: str) -> list[str]:
    """The shell commands of a page: lines of its blocks of code that are not Python,
    and code in sentences that begins as a command does."""
    found = []
    for text in markdown(page):
        tokens = MarkdownIt().enable("table").parse(text)
        for token in tokens:
            block = token.content.replace("\\\n", " ")
            is_shell = token.type == "code_block" or token.info in ("bash", "sh")
            if is_shell and not re.match(r"(from|import|#!) ?", block):
                found += block.splitlines()
        names = "|".join([*SCRIPTS, *PROGRAMS, *FORMS])
        found += [one for one in spans(tokens) if re.match(rf"({names}) \S", one)]
    return found


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page_exist_and_take_their_options(page):
    for command in commands(page):
        try:
            check(command)
        except (Exception, SystemExit) as error:
            raise AssertionError(f"{page}: {command}") from error


def test_the_script_for_slurm_trains_what_its_processes_can_share():
    [script] = [text for text in markdown("20_launch") if "#SBATCH" in text]
    script = script.replace("\\\n", " ").replace("$endpoint", "10.0.0.1:29400")
    [line] = re.findall(r"srun (.*)", script)
    check(line)


@pytest.mark.parametrize(
    "wrong",
    [
        "cpc_train --preset papre",
        "cpc_train --epoch 3",
        "cpc_train --preset paper --n_gpus 16",
        "cpc_train --overrides '{\"train.rate\": 1}'",
        "cpc_pack --data librispeech:train-clean",
        "cpc_features --model m --data d --out o --format npx",
        "cpc_evaluate --run_dir runs/demo --protocols '[\"phone\"]'",
        "cpc_export --model m --out model.pt",
        "make runs",
        "make run PRESETS=paper",
        "pip install '.[training]'",
        "papermill nbs/04_train.ipynb OUT -p preset paper -p nnodes 2",
        "cpc_trian",
    ],
)
def test_a_wrong_command_is_noticed(wrong):
    with pytest.raises((ConfigError, AssertionError, KeyError, SystemExit)):
        check(wrong)


comparison = json.loads((NBS / "results" / "comparison.json").read_text())
ROWS = [row for group in comparison["groups"] for row in group["rows"]]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["what"])
def test_a_row_of_the_comparison_has_a_source_for_each_project(row):
    assert set(row) == {"what", "cpc_nb", *PROJECTS}
    for name, cell in row.items():
        if name == "what":
            continue
        assert cell["is"] in ("yes", "partly", "no")
        assert ("at" in cell) != ("without" in cell), "one source"
        assert "without" not in cell or cell["is"] == "no"
        assert cell["is"] != "partly" or cell.get("note"), "how far, partly?"


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["what"])
def test_what_the_comparison_says_of_us_is_there(row):
    cell = SimpleNamespace(**row["cpc_nb"])
    assert (NBS / cell.at).is_file()
    if hasattr(cell, "command"):
        check(cell.command)
    elif hasattr(cell, "file"):
        assert (ROOT / cell.file).is_file()
    elif getattr(cell, "is") != "no":
        assert re.search(rf"\b{cell.name}\b", (NBS / cell.at).read_text())


def test_projects_are_compared_at_a_commit_or_release_that_the_page_names():
    assert list(comparison["projects"]) == ["cpc_nb", *PROJECTS]
    page = (NBS / "73_compare.ipynb").read_text()
    for name in PROJECTS:
        about = comparison["projects"][name]
        ref = about.get("commit") or about["release"]
        assert re.fullmatch(r"[0-9a-f]{40}|v\d+\.\d+\.\d+", ref)
        assert f"{about['url']}/tree/{ref}" in page


def test_the_page_shows_the_comparison_as_it_is():
    cells = json.loads((NBS / "73_compare.ipynb").read_text())["cells"]
    shown = "".join(
        "".join(output.get("data", {}).get("text/markdown", []))
        for cell in cells
        for output in cell.get("outputs", [])
    )
    for row in ROWS:
        line = re.search(rf"^\| {re.escape(row['what'])} \|(.*)\|$", shown, re.M)
        found = [
            re.sub(r"\]\(.*", "", one).strip("[* ") for one in line[1].split(" | ")
        ]
        expected = [row[name]["is"] for name in ("cpc_nb", *PROJECTS)]
        assert found == expected, row["what"]
