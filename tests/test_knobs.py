"""Knobs: what their pictures show against plain computation, and one that is turned in
a real JupyterLab."""

import itertools
import json

import nbformat
import numpy as np
import pytest
import torch
from conftest import jupyter_lab, keep_screenshot, save_notebook
from torch import nn

from cpc_nb.config import ConfigError, LossConfig
from cpc_nb.knobs import (
    SCHEMES,
    ReceptiveField,
    draw_negatives,
    nearest_phones,
    phone_means,
    receptive_field_knob,
    train_toy,
)
from cpc_nb.loss import InfoNCE
from cpc_nb.negatives import draw_candidates, negatives_of
from cpc_nb.soundmap import Sounds

# --- against plain computation ---


def seen_by_gradient(kernels, strides, frame: int) -> np.ndarray:
    """The samples that a frame depends on: those with a gradient."""
    layers = nn.Sequential(*(nn.Conv1d(1, 1, k, s) for k, s in zip(kernels, strides)))
    for layer in layers:
        nn.init.ones_(layer.weight)
    wave = torch.zeros(1, 1, 8000, requires_grad=True)
    layers(wave)[0, 0, frame].backward()
    return wave.grad[0, 0].nonzero().ravel().numpy()


@pytest.mark.parametrize(
    "kernels, strides",
    [
        ((10, 8, 4, 4, 4), (5, 4, 2, 2, 2)),
        ((5, 4, 2, 2, 2), (5, 4, 2, 2, 2)),
        ((3, 2, 5), (5, 2, 4)),  # with gaps
        ((7,), (1,)),
    ],
)
def test_a_frame_sees_the_samples_that_its_gradient_reaches(kernels, strides):
    field = ReceptiveField(kernels, strides)
    first, second = (seen_by_gradient(kernels, strides, frame) for frame in (0, 1))
    hop = int(np.prod(strides))
    assert np.array_equal(field.seen[0], first)
    assert np.array_equal(field.seen[0] + hop, second)
    text = field.describe()
    assert f"sees {len(first):,} samples, {(first[-1] + 1) / 16:,.1f} ms" in text
    assert f"shares {len(set(first) & set(second)):,}" in text
    frames = [seen_by_gradient(kernels, strides, frame) for frame in range(40)]
    seen, inner = np.concatenate(frames), np.arange(20 * hop, 21 * hop)
    skipped = 1 - np.isin(inner, seen).mean()
    assert (f"{skipped:.0%} of the samples are seen by no" in text) == (skipped > 0)


def test_cones_lead_to_the_middle_of_what_is_seen():
    field = ReceptiveField((3, 4, 2), (2, 3, 1))
    for layer, (kernel, stride) in enumerate(zip(field.kernels, field.strides)):
        for output in field.seen[layer + 1]:
            inputs = stride * output + np.arange(kernel)
            assert np.isin(inputs, field.seen[layer]).all()
            middle = field.ms(layer, inputs).mean()
            assert np.isclose(middle, field.ms(layer + 1, output))


def compared_by_the_loss(config, t, k, window, group_size, T) -> set:
    """The frames (time, window), positive included, that the loss of one prediction
    depends on: all other predictions are zero."""
    torch.manual_seed(0)
    z = torch.randn(group_size, T, 8, requires_grad=True)
    c = torch.zeros(group_size, T, 8)
    c[window, t] = 1
    index = None
    if config.candidates == "sampled":
        index = draw_candidates(0, 0, 1, group_size * T, config.n_candidates)
    loss, _ = InfoNCE(8, 8, group_size, config)(z, c, index)
    loss[config.steps.index(k)].backward()
    reached = z.grad.abs().sum(-1).nonzero().tolist()
    return {(frame, window) for window, frame in reached}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(
    "t, k, window, group_size, T",
    [(10, 6, 1, 4, 32), (0, 1, 0, 2, 20), (7, 12, 2, 3, 20)],
)
def test_negatives_are_those_of_the_loss(scheme, t, k, window, group_size, T):
    numbers = {"n_candidates": 24, "same_window_negatives": 4}
    config = LossConfig(**SCHEMES[scheme], **numbers)
    place = t, k, window, group_size, T
    negatives = list(map(tuple, negatives_of(config, *place).tolist()))
    assert len(set(negatives)) == len(negatives)
    assert {*negatives, (t + k, window)} == compared_by_the_loss(config, *place)


def test_the_chance_that_is_drawn_is_the_loss_of_equal_scores():
    config = LossConfig(candidates="same_time", same_window_negatives=5, steps=(6,))
    title = draw_negatives(config, group_size=3, t=0, T=7).axes[0].get_title()
    z = torch.zeros(3, 7, 4)  # one position, from which frame 6 can be predicted
    loss, _ = InfoNCE(4, 4, 3, config)(z, z)
    assert title.endswith(f"= {loss.item():.2f} nats")


def test_neighbours_of_a_phone():
    """Four phones in a row, each with a sound that is further from its mean."""
    places = {"AA": 0.0, "B": 1.0, "D": 2.5, "S": 10.0}
    names = np.repeat([*places], 6)
    offsets = np.tile([0.004, -0.02, 0.02, -0.03, 0.036, -0.01], 4)
    values = np.array([places[name] for name in names]) + offsets
    values = np.stack([values, 3 * values], 1).astype(np.float32)
    rare = np.array([[5, 5]], np.float32)
    n = np.arange(25)
    names = np.append(names, "ZH")  # one sound is too few
    sounds = Sounds(np.concatenate([values, rare]), n, n, n + 1, names)
    means = phone_means(sounds)
    assert means.names.tolist() == ["AA", "B", "D", "S"]
    for name, typical in zip(means.names, means.typical):
        own = np.flatnonzero(names == name)
        distance = np.abs(sounds.values[own] - sounds.values[own].mean(0)).sum(1)
        assert typical == own[distance.argmin()]
    found, distance = nearest_phones(means, "B")
    assert found.tolist() == ["AA", "D", "S"]
    pairs = itertools.combinations(places.values(), 2)
    mean = np.mean([abs(one - other) for one, other in pairs])
    assert np.allclose(distance, np.array([1, 1.5, 9]) / mean, atol=0.01)
    with pytest.raises(ConfigError, match="2 phones have 5 sounds.*give more"):
        phone_means(Sounds(*(part[:12] for part in sounds)))


def test_a_small_training_leaves_the_random_numbers_of_a_notebook_alone():
    windows = torch.randn(8, 1, 1_600)
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    *_, losses = train_toy(windows, norm=True, updates=10)
    assert torch.equal(torch.rand(3), expected) and losses.isfinite().all()


def test_many_controls_that_are_turned_together():
    knob = receptive_field_knob()
    for number in (1, 2, 3, 4, 5):
        knob.controls[f"kernel_{number}"].value = 1
        knob.controls[f"stride_{number}"].value = 1
    [(data, metadata)] = knob.outputs()
    assert "sees 1 samples, 0.1 ms" in data["text/plain"]
    assert metadata["image/png"]["alt"] == data["text/plain"]


# --- in a browser ---

SOURCE = """
from cpc_nb.knobs import receptive_field_knob

receptive_field_knob()
"""
PICTURE = ".jp-OutputArea-output img"
IS_ANOTHER = f"before => document.querySelector('{PICTURE}').src !== before"


def test_a_slider_is_moved_in_jupyterlab_and_the_notebook_saved(tab, tmp_path):
    path = tmp_path / "knob.ipynb"
    cell = nbformat.v4.new_code_cell(SOURCE.strip())
    kernel = {"name": "python3", "display_name": "python3", "language": "python"}
    notebook = nbformat.v4.new_notebook(cells=[cell], metadata={"kernelspec": kernel})
    nbformat.write(notebook, path)
    with jupyter_lab(tmp_path) as address:
        tab.goto(f"{address}/lab/tree/knob.ipynb?token=test&reset")
        tab.get_by_text("Python 3 (ipykernel) | Idle").wait_for()
        tab.locator(".jp-CodeCell .cm-content").first.click()
        tab.keyboard.press("Shift+Enter")
        first = tab.locator(PICTURE).get_attribute("src")  # waits for it
        assert tab.get_by_role("slider").count() == 10

        tab.get_by_role("slider").last.press("ArrowRight")  # stride of layer 1: 6
        tab.wait_for_function(IS_ANOTHER, arg=first)
        assert tab.locator(".widget-readout").last.inner_text() == "6"
        keep_screenshot(tab, "jupyterlab-knob")
        save_notebook(tab)
        [output] = json.loads(path.read_text())["cells"][0]["outputs"]
        data = output["data"]  # no widget that nobody could show again
        assert "12.0 ms later" in "".join(data["text/plain"])
        assert data["image/png"].strip() in tab.locator(PICTURE).get_attribute("src")

        tab.goto(f"{address}/lab/tree/knob.ipynb?token=test&reset")
        shown = tab.locator(PICTURE).get_attribute("src")
        assert data["image/png"].strip() in shown
        assert tab.get_by_text("Error displaying widget").count() == 0
