"""Configurations saved under former field names, and the options of commands."""

import json

import pytest
from conftest import SMALL, options, script

from cpc_nb.checkpoint import RunFolder
from cpc_nb.config import Config, ConfigError, make_config
from cpc_nb.model import CPC
from cpc_nb.train import main

FORMER = {
    "context": {"init_memory_frames": "memory"},
    "loss": {
        "same_window_negatives": "own_frames",
        "exclude_same_window": "exclude_own",
    },
}


def give_former_names(path):
    """Rewrite a config.json as it was before its fields were renamed."""
    config = json.loads(path.read_text())
    for section, names in FORMER.items():
        for name, former in names.items():
            if name in config.get(section, {}):
                config[section][former] = config[section].pop(name)
    path.write_text(json.dumps(config))


def test_a_configuration_with_former_names_is_read_under_the_new(tmp_path):
    changes = {
        "context.init_memory_frames": 64,
        "loss.candidates": "all",
        "loss.exclude_same_window": True,
        "loss.same_window_negatives": 3,
    }
    config = make_config("demo", changes)
    config.save(path := tmp_path / "config.json")
    give_former_names(path)
    text = path.read_text()
    assert "memory_frames" not in text and "own_frames" in text
    assert Config.load(path) == config
    path.write_text(text.replace('"own_frames": 3', '"own_frames": -3'))
    with pytest.raises(ConfigError, match="loss.same_window_negatives = -3"):
        Config.load(path)


def test_a_run_with_former_names_goes_on_and_its_model_loads(speech, tmp_path):
    run = tmp_path / "run"
    changes = {**SMALL, "context.init_memory_frames": 16, "launch.n_gpus": 0}
    given = {"data": str(speech), "run_dir": str(run), "batch_size": 8}
    main(options({**given, "max_steps": 2, "overrides": changes}))
    give_former_names(run / "config.json")
    give_former_names(run / "model" / "config.json")
    assert '"memory": 16' in (run / "model" / "config.json").read_text()
    CPC.from_pretrained(run / "model").save_pretrained(tmp_path / "again")
    saved = json.loads((tmp_path / "again" / "config.json").read_text())
    assert saved["context"]["init_memory_frames"] == 16
    main(options({**given, "max_steps": 4, "overrides": changes}))
    assert RunFolder(run).metrics()[-1]["step"] == 4
    with pytest.raises(SystemExit, match="init_memory_frames is 32 now and was 16"):
        changes["context.init_memory_frames"] = 32
        main(options({**given, "max_steps": 6, "overrides": changes}))


def test_a_former_name_is_not_an_override():
    with pytest.raises(ConfigError, match="'loss.own_frames' is not a field"):
        make_config("demo", {"loss.own_frames": 3})


def test_cpc_pack_takes_names_like_every_command(speech, tmp_path):
    for number, arguments in enumerate(
        (
            ["--data", speech, "--folder", tmp_path / "0"],
            [speech, tmp_path / "1"],
            [speech, "--folder", tmp_path / "2"],
            ["--workers", "1", speech, tmp_path / "3"],
        )
    ):
        done = script("cpc_pack", *arguments)
        assert done.code == 0, done.output
        assert (tmp_path / str(number) / "samples.int16").exists()
    done = script("cpc_pack", "--folder", tmp_path / "4")
    assert done.code == 1 and done.last.startswith("cpc_pack: --data is missing")
    done = script("cpc_pack", speech, tmp_path / "5", "more")
    assert done.code == 2 and "'more' is not an option" in done.last
