"""The vectorised loss against a loop that follows the paper's equation word by word."""

import itertools
import math

import pytest
import torch

from cpc_nb.config import LossConfig
from cpc_nb.loss import InfoNCE, draw_candidates

B, T, D, H = 4, 12, 5, 7


def in_words(z, c, predictors, config, group_size, index):
    """Equation 4, a position at a time: L = -log( f(positive) / sum of f over positive and negatives ), f = exp(z W c)."""
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
                    if config.exclude_own
                    else [
                        (k + place * T // config.own_frames) % T
                        for place in range(config.own_frames)
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
                    if (w != b if config.exclude_own else (w, s) != (b, t + k))
                ]

            def log_f(w, s):
                """The log of f for the frame s of window w as the future of c[b, t]."""
                score = (
                    (W @ c[b, t]) @ z[w, s]
                    if config.project == "context"
                    else c[b, t] @ (W @ z[w, s])
                )
                return score / math.sqrt(len(W)) if config.scale else score

            positive, others = log_f(b, t + k), [log_f(w, s) for w, s in negatives]
            loss = loss - (
                positive - torch.logsumexp(torch.stack([positive, *others]), 0)
            )
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
]  # where there are any negatives
STEPS = [(1,), (1, 3), (2, 5, 9)]


def a_case(candidates, project, own, scale, group, steps, n_candidates=9):
    torch.manual_seed(0)
    config = LossConfig(
        steps=steps,
        project=project,
        candidates=candidates.removesuffix("_and_own"),
        exclude_own=own,
        scale=scale,
        n_candidates=n_candidates,
        own_frames=5 if candidates.endswith("own") else 0,
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
