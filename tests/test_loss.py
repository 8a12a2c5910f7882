"""The loss that runs against a loop that follows the paper's equation word by word."""

import itertools
import math

import pytest
import torch

import cpc_nb.contrast
from cpc_nb import textbook
from cpc_nb.config import ConfigError, LossConfig, make_config
from cpc_nb.contrast import Contrast
from cpc_nb.loss import InfoNCE
from cpc_nb.negatives import draw_candidates, n_candidates

B, T, D, H = 4, 12, 5, 7


def in_words(z, c, predictors, config, group_size, index):
    """Equation 4 for one position after another.

    L = -log(f(positive) / sum of f over positive and negatives), with f = exp(z W c).
    """
    losses, accuracies = [], []
    for k, W in zip(config.steps, predictors):
        loss, right, positions = 0, 0, 0
        for b, t in itertools.product(range(B), range(T - k)):
            group = range(
                b // group_size * group_size, (b // group_size + 1) * group_size
            )
            if config.candidates == "same_time":
                own = (
                    []
                    if config.exclude_same_window
                    else [
                        (k + place * T // config.same_window_negatives) % T
                        for place in range(config.same_window_negatives)
                    ]
                )
                negatives = [(w, t + k) for w in group if w != b] + [
                    (b, s) for s in own if s != t + k
                ]
            else:
                frames = [(w, s) for w in group for s in range(T)]
                if config.candidates == "sampled":
                    frames = [frames[i] for i in index[b // group_size].tolist()]
                negatives = [
                    (w, s)
                    for w, s in frames
                    if (w != b if config.exclude_same_window else (w, s) != (b, t + k))
                ]

            candidates = torch.stack([z[w, s] for w, s in [(b, t + k), *negatives]])
            if config.project == "context":
                scores = textbook.log_f(W @ c[b, t], candidates)
            else:
                scores = textbook.log_f(c[b, t], candidates @ W.T)
            if config.scale:
                scores = scores / math.sqrt(len(W))
            positive, others = scores[0], scores[1:]
            loss = loss + textbook.info_nce(positive, others)
            right += all(positive > other for other in others)
            positions += 1
        losses.append(loss / positions)
        accuracies.append(right / positions)
    return torch.stack(losses), torch.tensor(accuracies)


KINDS = ("all", "sampled", "same_time", "same_time_and_own")
SCHEMES = [
    (candidates, project, own, scale, group)
    for candidates in KINDS
    for project in ("context", "encoder")
    for own in (False, True)
    for scale in (False, True)
    for group in (1, 2, 4)
    if group > 1 or (candidates != "same_time" and not own)
    if not (own and candidates == "same_time_and_own")
]  # where there are any negatives, and a configuration allows them
STEPS = [(1,), (1, 3), (2, 5, 9)]


def a_case(candidates, project, own, scale, group, steps, n_candidates=9):
    torch.manual_seed(0)
    config = LossConfig(
        steps=steps,
        project=project,
        candidates=candidates.removesuffix("_and_own"),
        exclude_same_window=own,
        scale=scale,
        n_candidates=n_candidates,
        same_window_negatives=5 if candidates.endswith("own") else 0,
    )
    z, c = (
        torch.randn(B, T, D, requires_grad=True),
        torch.randn(B, T, H, requires_grad=True),
    )
    criterion = InfoNCE(D, H, group, config)
    index = (
        draw_candidates(3, 17, B // group, group * T, n_candidates)
        if candidates == "sampled"
        else None
    )
    return config, z, c, criterion, index


@pytest.mark.parametrize(
    "number, scheme",
    list(enumerate(SCHEMES)),
    ids=lambda x: "-".join(map(str, x)) if isinstance(x, tuple) else "",
)
def test_values_and_gradients_are_those_of_the_equation(number, scheme):
    config, z, c, criterion, index = a_case(*scheme, STEPS[number % len(STEPS)])
    weights = [p.weight for p in criterion.predictors]
    loss, accuracy = criterion(z, c, index)
    expected_loss, expected_accuracy = in_words(
        z, c, weights, config, scheme[-1], index
    )
    torch.testing.assert_close(loss, expected_loss, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(accuracy, expected_accuracy)
    mix = torch.arange(
        1.0, len(loss) + 1
    )  # so that the steps cannot be mistaken for each other
    for found, expected in zip(
        torch.autograd.grad(loss @ mix, [z, c, *weights]),
        torch.autograd.grad(expected_loss @ mix, [z, c, *weights]),
    ):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
        assert found.abs().max() > 1e-3


def test_a_position_without_negatives_has_no_loss_and_finite_gradients():
    config, z, c, criterion, _ = a_case(
        "sampled", "context", False, True, 2, (1,), n_candidates=1
    )
    index = torch.tensor(
        [[4], [4]]
    )  # the truth of position 3 of each group's first window is the only candidate
    loss, _ = criterion(z, c, index)
    expected, _ = in_words(
        z, c, [p.weight for p in criterion.predictors], config, 2, index
    )
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    for found, wanted in zip(
        torch.autograd.grad(loss.sum(), [z, c]),
        torch.autograd.grad(expected.sum(), [z, c]),
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("candidates", KINDS)
def test_a_tie_is_wrong(candidates):
    _, _, _, criterion, index = a_case(candidates, "context", False, False, 2, (1, 3))
    z, c = torch.ones(B, T, D), torch.ones(B, T, H)
    for predictor in criterion.predictors:
        torch.nn.init.constant_(
            predictor.weight, 0.25
        )  # sums that are exact in any order
    loss, accuracy = criterion(z, c, index)
    assert accuracy.tolist() == [0.0, 0.0]
    if candidates in ("all", "same_time"):
        assert loss.tolist() == pytest.approx(
            [math.log(2 * T if candidates == "all" else 2)] * 2, abs=1e-5
        )


@pytest.mark.parametrize("n_processes", [1, 2, 4])
def test_candidates_do_not_depend_on_the_number_of_processes(n_processes):
    whole, share = draw_candidates(5, 9, 4, 96, 20), 4 // n_processes
    pieces = [
        draw_candidates(5, 9, share, 96, 20, first_group=rank * share)
        for rank in range(n_processes)
    ]
    assert torch.equal(torch.cat(pieces), whole)
    assert all(
        len(set(row)) == 20 and 0 <= min(row) and max(row) < 96
        for row in whole.tolist()
    )
    assert not torch.equal(
        whole, draw_candidates(5, 10, 4, 96, 20)
    ) and not torch.equal(whole, draw_candidates(6, 9, 4, 96, 20))
    assert not torch.equal(whole[0], whole[1])


@pytest.mark.parametrize("candidates", KINDS)
def test_the_loss_of_two_processes_is_the_loss_of_one(candidates):
    _, z, c, criterion, index = a_case(candidates, "context", False, True, 2, (1, 3))
    halves = [
        criterion(z[half], c[half], None if index is None else index[row : row + 1])
        for row, half in enumerate((slice(0, 2), slice(2, 4)))
    ]
    for whole, one, other in zip(criterion(z, c, index), *halves):
        torch.testing.assert_close(whole, (one + other) / 2)


@pytest.mark.parametrize(
    "scheme",
    [
        (candidates, "context", own, True, 4)
        for candidates in KINDS
        for own in (False, True)
        if not (own and candidates == "same_time_and_own")
    ],
    ids=lambda x: "-".join(map(str, x)),
)
@pytest.mark.parametrize("at_once", [1, 50, 700, 10**6])
def test_a_group_cut_by_positions_has_the_same_loss(
    scheme, at_once, device, monkeypatch
):
    """Down to one position at a time."""
    config, z, c, criterion, index = a_case(*scheme, (1, 3))
    weights = [p.weight for p in criterion.predictors]
    expected, accuracy = in_words(z, c, weights, config, 4, index)
    expected_grads = torch.autograd.grad(expected.sum(), [z, c, *weights])
    criterion = criterion.to(device)
    index = None if index is None else index.to(device)
    monkeypatch.setitem(cpc_nb.contrast.SCORES_AT_ONCE, device.type, at_once)
    found, right = criterion(z.to(device), c.to(device), index)
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(right.cpu(), accuracy)
    wanted = [z, c, *criterion.parameters()]
    for one, other in zip(torch.autograd.grad(found.sum(), wanted), expected_grads):
        torch.testing.assert_close(one.cpu(), other, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("own", [False, True])
def test_one_large_group_works_on_few_scores_at_once(own, monkeypatch):
    monkeypatch.setitem(cpc_nb.contrast.SCORES_AT_ONCE, "cpu", 2**16)
    largest = 0

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):
            nonlocal largest
            result = operation(*arguments, **(keywords or {}))
            if isinstance(result, torch.Tensor):
                largest = max(largest, result.untyped_storage().nbytes())
            return result

    config = LossConfig(steps=(1,), exclude_same_window=own)
    criterion = InfoNCE(8, 8, 64, config)
    z, c = torch.randn(2, 64, 32, 8, requires_grad=True).unbind()
    with Largest():
        criterion(z, c)[0].sum().backward()
    assert largest <= 4 * 2**16  # all scores are 64 times as many


def test_cut_scores_in_bf16_have_the_gradients_of_whole_ones(device, monkeypatch):
    """A sum over blocks, rounded to bfloat16 after each of them, would be wrong."""
    torch.manual_seed(0)
    query, truth, negatives = (
        torch.randn(1, n, 16, device=device).bfloat16().requires_grad_()
        for n in (2048, 2048, 64)
    )
    grads = []
    for at_once in (2**26, 64):
        monkeypatch.setitem(cpc_nb.contrast.SCORES_AT_ONCE, device.type, at_once)
        loss, _ = Contrast.apply(query, truth, negatives, lambda *_: None)
        grads.append(torch.autograd.grad(loss, negatives)[0].float())
    assert (grads[0] - grads[1]).norm() < 0.01 * grads[0].norm()


@pytest.mark.parametrize("same_window_negatives", [0, 5])
def test_accuracy_in_bf16_is_that_of_the_features_as_they_are(
    same_window_negatives, device
):
    """Scores with a large common part must not be rounded to ties, which are wrong."""
    torch.manual_seed(0)
    config = LossConfig(
        steps=(1,),
        candidates="same_time",
        scale=False,
        same_window_negatives=same_window_negatives,
    )
    criterion = InfoNCE(64, 64, 88, config).to(device)
    torch.nn.init.eye_(criterion.predictors[0].weight)
    alike = torch.randn(88, 40, 64, device=device)
    noise = 3 * torch.randn_like(alike)
    z = (20 + alike).bfloat16().float()
    c = (alike.roll(-1, 1) + noise).bfloat16().float()
    exact = criterion(z, c)[1].item()
    with torch.autocast(device.type, torch.bfloat16):
        accuracy = criterion(z, c)[1].item()
    assert 0.3 < exact < 0.9 and accuracy == pytest.approx(exact, abs=2e-3)


@pytest.mark.parametrize("preset", ["paper", "minimal"])
@pytest.mark.parametrize(
    "changes",
    [
        {"candidates": "all"},
        {"candidates": "all", "exclude_same_window": True},
        {"candidates": "sampled", "n_candidates": 50},
        {"candidates": "sampled", "n_candidates": 50, "exclude_same_window": True},
        {"candidates": "sampled", "n_candidates": 10_000},
        {"candidates": "same_time"},
        {"candidates": "same_time", "exclude_same_window": True},
        {"candidates": "same_time", "same_window_negatives": 5},
        {"candidates": "same_time", "same_window_negatives": 5_000},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_candidates_are_as_many_as_the_masks_leave(preset, changes, monkeypatch):
    given = {f"loss.{name}": value for name, value in changes.items()}
    small = {"data.group_size": 4, "train.batch_size": 4, "data.window": 3_200}
    config = make_config(preset, {"loss.same_window_negatives": 0, **small, **given})
    T, counts = config.encoder.n_frames(3_200), []

    def count(scores, *_, **__):
        counts.append((scores > -math.inf).sum(-1).float().mean().item())
        return torch.zeros(())

    def count_shared(query, positive, negatives, mask):
        scores = query @ negatives.mT
        mask(scores, slice(0, 1), slice(0, query.shape[1]))
        counts.append(1 + (scores > -math.inf).sum(-1).float().mean().item())
        return torch.zeros(()), torch.zeros(())

    monkeypatch.setattr(Contrast, "apply", count_shared)
    monkeypatch.setattr(torch.nn.functional, "cross_entropy", count)
    criterion = InfoNCE(2, 2, 4, config.loss)
    draws = 300 if config.loss.candidates == "sampled" else 1
    for step in range(draws):
        index = (
            draw_candidates(0, step, 1, 4 * T, config.loss.n_candidates)
            if config.loss.candidates == "sampled"
            else None
        )
        criterion(torch.randn(4, T, 2), torch.randn(4, T, 2), index)
    tolerance = 0.01 if draws > 1 else 1e-6
    mean = sum(counts) / len(counts)
    assert n_candidates(config) == pytest.approx(mean, rel=tolerance)


@pytest.mark.parametrize(
    "loss, group, batch, index, message",
    [
        ({"candidates": "sampled"}, 2, 4, None, "give their index"),
        ({"candidates": "sampled"}, 2, 4, (1, 9), r"index is \(2, M\)"),
        ({"candidates": "sampled"}, 2, 4, (2, 0), "M above 0"),
        ({}, 2, 4, (2, 9), "an index is for sampled candidates"),
        ({"exclude_same_window": True}, 1, 4, None, "no negatives"),
        ({"candidates": "same_time"}, 1, 4, None, "no negatives"),
        ({}, 3, 4, None, "a batch of 4 windows has no whole groups of 3"),
        ({}, 2, 0, None, "a batch of 0 windows"),
        ({"steps": (1, T)}, 2, 4, None, f"{T} frames have none {T} steps ahead"),
    ],
)
def test_what_does_not_fit_is_said(loss, group, batch, index, message):
    index = index and torch.zeros(index, dtype=torch.long)
    with pytest.raises(ValueError, match=message):
        criterion = InfoNCE(D, H, group, LossConfig(**{"steps": (1, 3), **loss}))
        criterion(torch.randn(batch, T, D), torch.randn(batch, T, H), index)


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"loss.exclude_same_window": True, "loss.same_window_negatives": 3},
            "same_window_negatives: 3",
        ),
        ({"context.init_memory_frames": 1}, "init_memory_frames 1"),
        ({"context.init_memory_frames": 2}, "init_memory_frames 2"),
    ],
)
def test_what_would_be_ignored_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        make_config("minimal", changes)
