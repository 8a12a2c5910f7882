"""The exercises of nbs/04_train.ipynb, done with the notebook's own cells."""

import matplotlib
import nbformat
import pytest
from conftest import ROOT

from cpc_nb.config import ConfigError, TrainConfig
from cpc_nb.trainer import chance, learning_rate


@pytest.fixture(scope="module")
def story() -> dict:
    """What the notebook has defined before its exported cells and its run."""
    matplotlib.use("Agg")
    names = {}
    for cell in nbformat.read(ROOT / "nbs" / "04_train.ipynb", 4).cells:
        told = "#| export" not in cell.source and "#| eval: false" not in cell.source
        if cell.cell_type == "code" and told:
            exec(cell.source, names)
    return names


def test_at_a_rate_that_is_too_high_the_loss_explodes(story):
    config = story["config"]
    fast = config.model_copy(
        update={"train": config.train.model_copy(update={"lr": 3.0})}
    )
    _, history = story["plain_loop"](fast, story["windows"], updates=40)
    assert history[-5:].mean() > 2 * chance(config)
    assert story["history"][-5:].mean() < chance(config) - 0.3


def test_four_processes_cannot_share_two_groups(story):
    with pytest.raises(ConfigError, match="more than the 2 groups of a batch"):
        story["first_loss"](0, 4)


def test_a_longer_budget_is_the_same_run_only_where_the_rate_is_constant():
    def rates(schedule, total_steps):
        config = TrainConfig(max_steps=total_steps, schedule=schedule)
        return [learning_rate(step, config, total_steps, 10) for step in range(40)]

    assert rates("constant", 40) == rates("constant", 80)
    assert rates("cosine", 40) != rates("cosine", 80)
