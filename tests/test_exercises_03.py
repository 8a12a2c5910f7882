"""The exercises of nbs/03_loss.ipynb, done with the notebook's own cells."""

import math

import matplotlib
import nbformat
import pytest
import torch
from conftest import ROOT

from cpc_nb.textbook import info_nce


@pytest.fixture(scope="module")
def story() -> dict:
    """The notebook's imports, `gaussian_bound`, and the figure of the candidates."""
    matplotlib.use("Agg")
    names, told = {}, ("import ", "class InfoNCE", "self: InfoNCE")
    told += ("def gaussian_bound", "def candidates_of", "schemes = ")
    for cell in nbformat.read(ROOT / "nbs" / "03_loss.ipynb", 4).cells:
        if cell.cell_type == "code" and any(part in cell.source for part in told):
            exec(cell.source, names)
    return names


def test_any_score_gives_a_bound_and_the_log_ratio_the_best(story):
    bounds = {}
    for sharpness in (0.5, 1, 2):
        torch.manual_seed(0)
        bounds[sharpness] = story["gaussian_bound"](3, 64, sharpness=sharpness)
    assert max(bounds[0.5], bounds[2]) < bounds[1] - 0.05
    assert 2.3 < bounds[1] < 3


def test_copies_of_the_positive_are_a_floor():
    negatives = torch.cat([torch.full((7,), 50.0), torch.zeros(24)])
    loss = info_nce(torch.tensor(50.0), negatives)
    assert loss.item() == pytest.approx(math.log(8))


def test_chance_is_the_logarithm_of_the_candidates(story):
    assert [frames.sum() for frames in story["found"].values()] == [128, 97, 25, 8]
