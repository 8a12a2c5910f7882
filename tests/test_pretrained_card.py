"""Model cards: what they say, where they go along, and what they leave alone."""

import json
import os
import stat

import pytest
import torch
from conftest import ROOT
from huggingface_hub import HfApi, ModelCard, RepoUrl

from cpc_nb.card import has_weights_of, renew_card, save_run_card
from cpc_nb.checkpoint import CPCWithLoss, RunFolder
from cpc_nb.config import ContextConfig, EncoderConfig, make_config
from cpc_nb.model import CPC
from cpc_nb.pretrained import HubModel

METRICS = json.loads((ROOT / "nbs" / "results" / "demo.json").read_text())["runs"][0]
CHECKPOINT = "step-00000020"


def small(seed: int = 0) -> CPC:
    torch.manual_seed(seed)
    return CPC(EncoderConfig(channels=(16,)), ContextConfig(size=16))


def change(model: torch.nn.Module):
    with torch.no_grad():
        next(model.parameters()).mul_(2)


def evaluated(run: RunFolder, name: str = "evaluation", **model):
    """Metrics and a picture, as an evaluation leaves them in the run."""
    (run.path / name).mkdir(exist_ok=True)
    about = {**METRICS["model"], "checkpoint": CHECKPOINT, **model}
    text = json.dumps({**METRICS, "model": about})
    (run.path / name / "metrics.json").write_text(text)
    (run.path / name / "tsne.png").write_bytes(b"a picture")


@pytest.fixture
def trained(tmp_path):
    """A run folder as training leaves it, and its objective, which nobody trained."""
    changes = {
        "data.source": "/home/somebody/secret/voices",
        "encoder.channels": [16],
        "context.size": 16,
        "train.batch_size": 8,
        "data.test_fraction": 0.3,
    }
    config = make_config("demo", changes)
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    corpus = {"name": "voices | of us", "fingerprint": "0123", "duration_s": 7200.0}
    corpus |= {"utterances": 1234, "speakers": 56}
    machine = {"device": "an abacus", "precision": "float32"}
    lines = [
        {
            "step": step,
            "audio_seconds": 1.28 * 8 * step,
            "wall_seconds": 6.0 * step,
            "loss": 3.0,
            "accuracy_per_step": [0.4],
            "valid_loss": 2.0 + step / 100,
            "valid_accuracy_per_step": [0.5 + step / 1000],
            "lr": 1e-3,
        }
        for step in (20, 40)
    ]
    (run.path / "config.json").write_text(config.model_dump_json())
    (run.path / "corpus.json").write_text(json.dumps(corpus))
    (run.path / "machine.json").write_text(json.dumps(machine))
    (run.path / "metrics.jsonl").write_text(
        "".join(f"{json.dumps(x)}\n" for x in lines)
    )
    objective = CPCWithLoss(config)
    objective.checkpoint = CHECKPOINT
    objective.model.save_pretrained(run.path / "model")
    save_run_card(run, objective, run.path / "model")
    return run, objective


def card(folder) -> str:
    return (folder / "README.md").read_text()


# What it says


def test_of_a_run_it_has_data_budget_and_machine(trained):
    run, _ = trained
    text = card(run.path / "model")
    for fact in (
        r"voices \| of us (fingerprint `0123`): 2.0 hours, 1,234 utterances, 56 speak",
        "30% by speaker",
        "20 updates of 8 windows of 1.28 s, in which 3.4 minutes of audio were heard",
        "2.0 minutes",
        "a loss of 2.200 nats; step 1 ahead is told from its negatives in 52.0%",
        "an abacus; float32",
        "`train.batch_size` = 8",
        "It has not been evaluated.",
        "oord2018representation",
    ):
        assert fact in text, fact
    assert "secret" not in text and "Needed" not in text and "synthetic" not in text


def test_an_evaluation_renews_it_with_the_uncertainty_of_all_that_was_measured(trained):
    run, objective = trained
    evaluated(run)
    evaluated(run, "evaluation-other", checkpoint="step-00000040")
    (run.path / "evaluation-torn").mkdir()
    (run.path / "evaluation-torn" / "metrics.json").write_text('{"model": {"che')
    (run.path / "evaluation-old").mkdir()
    old = {"model": {"checkpoint": CHECKPOINT}, "data": {"corpus": "demo"}}
    (run.path / "evaluation-old" / "metrics.json").write_text(json.dumps(old))
    renew_card(run, objective)
    text = card(run.path / "model")
    assert text.count("### On demo") == 1  # of one checkpoint, whole
    phones, abx = METRICS["phone_frame"], METRICS["abx"]["within"]
    for results in (phones, abx):
        value, deviation = results["cpc"], results["deviation"]["cpc"]
        assert f"| {100 * value:.1f} ± {100 * deviation:.1f} |" in text
    first, deviation = (
        METRICS[f"prediction_{x}"][0] for x in ("accuracy", "deviation")
    )
    assert f"picked in {100 * first:.1f} ± {100 * deviation:.1f} % of" in text
    assert "](figure.png)" in text and "not been evaluated" not in text
    assert (run.path / "model" / "figure.png").read_bytes() == b"a picture"


def test_an_evaluation_of_other_weights_says_nothing_about_these(trained):
    run, objective = trained
    before = card(run.path / "model")
    evaluated(run)
    change(objective.model)
    renew_card(run, objective)
    assert card(run.path / "model") == before


def test_the_hub_can_read_it(trained, tmp_path):
    run, objective = trained
    evaluated(run)
    renew_card(run, objective)
    small().save_pretrained(tmp_path / "plain")
    for folder in (run.path / "model", tmp_path / "plain"):
        data = ModelCard.load(folder / "README.md").data
        assert data.license == "apache-2.0" and data.library_name == "cpc_nb"
        assert "speech" in data.tags


class Licensed(CPC, license="cc-by-nc-4.0", tags=["birds"]):
    """A subclass says what its models are."""


def test_a_subclass_has_a_licence_and_a_name_of_its_own(tmp_path):
    config = EncoderConfig(channels=(16,)), ContextConfig(size=16)
    Licensed(*config).save_pretrained(tmp_path)
    data = ModelCard.load(tmp_path / "README.md").data
    assert data.license == "cc-by-nc-4.0" and "birds" in data.tags
    assert "`cc-by-nc-4.0`" in card(tmp_path)
    assert "model = Licensed.from_pretrained(" in card(tmp_path)


class Other(HubModel):
    """A network that is built in another way."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 3)


def test_a_network_without_an_encoder_has_a_card_too(tmp_path):
    Other().save_pretrained(tmp_path)
    assert "A network of 9 weights" in card(tmp_path)


def test_without_a_run_nothing_is_claimed(tmp_path):
    small().save_pretrained(tmp_path)
    assert "nothing is claimed about them" in card(tmp_path)
    assert "Needed" not in card(tmp_path)
    assert "## Results" not in card(tmp_path) and "±" not in card(tmp_path)


def test_of_an_older_run_the_machine_is_not_noted(trained):
    run, objective = trained
    (run.path / "machine.json").write_text("[")
    save_run_card(run, objective, run.path / "model")
    assert "not noted" in card(run.path / "model")


# Where it goes


def test_it_goes_along_while_the_weights_are_the_same(trained, tmp_path):
    run, objective = trained
    evaluated(run)
    renew_card(run, objective)
    model = CPC.from_pretrained(run.path / "model")
    model.save_pretrained(tmp_path / "copy")
    assert card(tmp_path / "copy") == card(run.path / "model")
    again = CPC.from_pretrained(tmp_path / "copy")
    again.save_pretrained(tmp_path / "copy")  # where it was loaded from
    assert "±" in card(tmp_path / "copy")
    assert (tmp_path / "copy" / "figure.png").exists()
    change(again)
    again.save_pretrained(tmp_path / "copy")
    assert "`" + "/".join((tmp_path / "copy").parts[-2:]) + "`" in card(
        tmp_path / "copy"
    )
    assert "±" not in card(tmp_path / "copy")
    assert not (tmp_path / "copy" / "figure.png").exists()


def test_a_folder_that_is_gone_is_no_hindrance(trained, tmp_path):
    run, _ = trained
    model = CPC.from_pretrained(run.path / "model")
    (run.path / "model").rename(tmp_path / "elsewhere")
    model.save_pretrained(tmp_path / "copy")
    assert "nothing is claimed" in card(tmp_path / "copy")


def test_the_hub_gets_it_too(trained, monkeypatch):
    run, objective = trained
    evaluated(run)
    renew_card(run, objective)
    sent = {}

    def upload(self, *, folder_path, **_):
        sent.update({path.name: path.read_bytes() for path in folder_path.iterdir()})
        return "done"

    url = RepoUrl("https://huggingface.co/us/voices")
    monkeypatch.setattr(HfApi, "create_repo", lambda self, **_: url)
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    model = CPC.from_pretrained(run.path / "model")
    assert model.push_to_hub("us/voices") == "done"
    assert sent["README.md"].decode() == card(run.path / "model")
    assert set(sent) == {"README.md", "config.json", "figure.png", "model.safetensors"}


def test_a_card_of_a_person_stays(trained, tmp_path):
    run, objective = trained
    own = run.path / "model" / "README.md"
    own.write_text("# Ours\n")
    evaluated(run)
    renew_card(run, objective)
    assert own.read_text() == "# Ours\n"
    objective.model.save_pretrained(run.path / "model")
    assert own.read_text() == "# Ours\n"
    (tmp_path / "aside").mkdir()
    save_run_card(run, objective, tmp_path / "aside")  # as when the run is resumed
    assert card(tmp_path / "aside") == "# Ours\n"


# Beside it


@pytest.mark.parametrize("mask, mode", [(0o022, 0o644), (0o027, 0o640)])
def test_weights_can_be_read_by_whom_the_umask_lets(tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        small().save_pretrained(tmp_path / "model")
    finally:
        os.umask(before)
    for path in (tmp_path / "model").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == mode, path


def test_weights_are_compared_by_name_type_and_value(tmp_path):
    small().save_pretrained(tmp_path)
    assert has_weights_of(small(), tmp_path)
    assert not has_weights_of(small(1), tmp_path)
    assert not has_weights_of(small().half(), tmp_path)
    assert not has_weights_of(small().encoder, tmp_path)
    assert not has_weights_of(small(), tmp_path / "none")
    (tmp_path / "model.safetensors").write_bytes(b"torn")
    assert not has_weights_of(small(), tmp_path)
