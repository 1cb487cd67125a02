"""Algorithms that average every H local steps, against their equations, and against each other where they are equal."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quadratics import Run

TARGETS = [[-2.0, 1.0], [0.5, 3.0], [4.5, -1.0]]
AT = torch.tensor(TARGETS, dtype=torch.float64)
START = [[1.0, 0.0], [0.0, 2.0], [-1.0, 1.0]]
LR = 0.15


def local_steps(xs: Tensor, steps: int) -> Tensor:
    return AT + (xs - AT) * (1 - LR) ** steps


def averaged(xs: Tensor) -> Tensor:
    return xs.mean(0).expand_as(xs).clone()


def run(name: str, steps: int, every: int, **options) -> Run:
    return Run(name, TARGETS, start=START, steps=steps, lr=LR, steps_per_round=every, **options)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("every", [1, 4])
def test_local_sgd_by_its_equations(every):
    xs = torch.tensor(START, dtype=torch.float64)
    for _ in range(12 // every):
        xs = averaged(local_steps(xs, every))
    close(run("local_sgd", 12, every).xs, xs)


@pytest.mark.parametrize("every", [1, 4])
def test_diloco_with_an_outer_step_of_one_and_no_momentum_is_local_sgd(every):
    plain = run("local_sgd", 12, every)
    outer = run("diloco", 12, every, settings={"outer_lr": 1.0, "outer_momentum": 0.0})
    # All replicas begin alike in a real run; here only then are both the same from the first round on.
    close(outer.xs, plain.xs)
    assert outer.trace == plain.trace


def test_diloco_by_its_equations():
    alpha, mu, every = 0.7, 0.9, 3
    xs = torch.zeros(3, 2, dtype=torch.float64)
    theta, velocity = xs.clone(), torch.zeros_like(xs)
    for _ in range(5):
        moved = theta - averaged(local_steps(theta, every))
        velocity = mu * velocity + moved
        theta = theta - alpha * (moved + mu * velocity)
    close(Run("diloco", TARGETS, steps=15, lr=LR, steps_per_round=every).xs, theta)


def cut(name: str, local: int, every: int, **options) -> Tensor:
    """The replicas half a step after so many local steps."""
    return run(name, 10**6, every, stop_at_s=local + 0.5, **options).xs


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("round_s", [0.0, 0.4])
def test_cocod_adds_to_the_average_what_was_learnt_meanwhile(every, round_s):
    xs = local_steps(torch.tensor(START, dtype=torch.float64), every)
    for rounds in range(1, 5):
        sent = xs
        xs = averaged(sent) + (local_steps(sent, every) - sent)
        close(cut("cocod_sgd", every * (1 + rounds), every, round_s=round_s), xs)


@pytest.mark.parametrize("every", [1, 3])
def test_overlap_local_sgd_pulls_towards_the_anchor(every):
    alpha, beta = 0.6, 0.7
    settings = {"pull": alpha, "anchor_momentum": beta}
    xs = local_steps(torch.tensor(START, dtype=torch.float64), every)
    anchor = velocity = None
    for rounds in range(1, 5):
        mean, xs = averaged(xs), local_steps(xs, every)
        if anchor is None:
            anchor, velocity = mean.clone(), torch.zeros_like(mean)
        velocity = beta * velocity + (mean - anchor)
        anchor = anchor + velocity
        xs = xs - alpha * (xs - anchor)
        close(cut("overlap_local_sgd", every * (1 + rounds), every, settings=settings), xs)


def test_post_local_sgd_is_synchronous_and_then_local():
    share, steps, every = 0.5, 24, 4
    xs = torch.zeros(3, 2, dtype=torch.float64)
    optimum, switch = AT.mean(0), 13  # the header of the 13th gradient is the first that tells of half the samples
    xs = optimum + (xs - optimum) * (1 - LR) ** switch
    for _ in range(3):  # 25 steps: at 24 the budget is reached
        xs = averaged(local_steps(xs, every))
    ended = Run(
        "post_local_sgd", TARGETS, steps=steps, lr=LR, steps_per_round=every, settings={"synchronous_share": share}
    )
    assert ended.steps == [25, 25, 25]
    close(ended.xs, xs)


@pytest.mark.parametrize(("share", "other"), [(1.0, "sync_sgd"), (0.0, "local_sgd")])
def test_post_local_sgd_at_its_ends_is_one_of_the_two_bit_for_bit(share, other):
    options = {"steps": 24, "lr": LR, "steps_per_round": 4, "momentum": 0.9}
    ended = Run("post_local_sgd", TARGETS, settings={"synchronous_share": share}, **options)
    reference = Run(other, TARGETS, **options)
    assert torch.equal(ended.xs, reference.xs)
    assert ended.trace == reference.trace


# Time


@pytest.mark.parametrize("name", ["cocod_sgd", "overlap_local_sgd"])
def test_an_average_that_is_over_in_time_costs_nothing_and_one_that_is_not_what_is_missing(name):
    in_time = run(name, 40, 4, round_s=3.9)
    assert all(rank.tally.waited_s == 0 for rank in in_time.ranks)
    assert in_time.of(0, "round")[:2] == [(4.0, 7.9), (8.0, 11.9)]
    late = run(name, 40, 4, round_s=5.5)
    assert late.of(0, "wait")[:2] == [(8.0, 9.5), (13.5, 15.0)]
    assert not [end for _, end in late.of(0, "wait") if end > (late.cluster.ended_s or 0)]


@pytest.mark.parametrize("name", ["cocod_sgd", "overlap_local_sgd"])
def test_ranks_that_read_the_end_later_take_their_local_steps_before_it(name):
    ended = Run(name, TARGETS, steps=20, lr=LR, steps_per_round=5, step_s=[1.0, 1.0, 1.2], round_s=0.1)
    assert len(set(ended.steps)) == 1 and ended.steps[0] % 5 == 0
    assert ended.cluster.ended_s == pytest.approx(1.2 * ended.steps[0])
    assert all(torch.equal(ended.x(0), x) for x in ended.xs)
