"""Momentum of the mean in `lasgd`: on quadratics in virtual time, and through a checkpoint."""

from __future__ import annotations

import math

import pytest
import torch

from lasgd.algorithms import registry
from lasgd.algorithms.requests import Mean
from lasgd.errors import ConfigurationError
from lasgd.replica import Replica
from lasgd.tally import Tally
from quadratics import Run, decaying
from scripted_driver import Point

TARGETS = [[-2.0, 1.0], [0.5, 3.0], [4.5, -1.0], [1.0, 1.0]]
OPTIMUM = torch.tensor(TARGETS, dtype=torch.float64).mean(0)


def run(beta: float, targets=TARGETS, **options) -> Run:
    options = {"steps": 100, "lr": 0.05, "round_s": 0.1} | options
    return Run("lasgd", targets, settings={"outer_momentum": beta}, **options)


def heavy_ball(target: torch.Tensor, lr: float, momentum: float, steps: int) -> torch.Tensor:
    """(step, element): torch's SGD with momentum from zero, before each step."""
    x = torch.nn.Parameter(torch.zeros_like(target))
    optimizer = torch.optim.SGD([x], lr=lr, momentum=momentum)
    seen = []
    for _ in range(steps):
        seen.append(x.detach().clone())
        x.grad = x.detach() - target
        optimizer.step()
    return torch.stack(seen)


def test_without_delay_it_is_sgd_with_momentum_of_all_ranks():
    """But for the first mean, which is of the first step: nobody knows the one before."""
    target, lr, beta = torch.tensor([2.0, -1.0], dtype=torch.float64), 0.05, 0.8
    ended = run(beta, [target.tolist()] * 3, lr=lr)
    seen = torch.stack(ended.works[0].points[:60])
    start, before = seen[2], seen[1]
    expected = [start]
    for _ in range(50):
        here = expected[-1]
        expected.append(here - lr * (here - target) + beta * (here - before))
        before = here
    torch.testing.assert_close(seen[2:50], torch.stack(expected)[:48], rtol=0, atol=1e-12)
    alone = heavy_ball(target, lr, beta, 60)
    assert (seen - alone).abs().max() < 0.2 * target.abs().max(), "and not far from where torch's begins from rest"


@pytest.mark.parametrize("round_s", [0.1, 3.7])
def test_the_mean_moves_alike_however_far_the_ranks_are_apart(round_s):
    spread = run(0.8, round_s=round_s)
    together = run(0.8, [OPTIMUM.tolist()] * 4, round_s=round_s)
    of_spread = torch.stack([torch.stack(work.points[:90]) for work in spread.works]).mean(0)
    torch.testing.assert_close(of_spread, torch.stack(together.works[0].points[:90]), rtol=0, atol=1e-9)
    assert not torch.equal(spread.works[0].points[50], spread.works[1].points[50])


@pytest.mark.parametrize("round_s", [0.1, 3.7, 12.0])
def test_a_gradient_moves_the_mean_ten_times_as_far_in_the_end(round_s):
    """A constant force: without momentum the mean goes lr a step, with 0.9 it comes to ten times that."""
    far = [[1e6]] * 3  # so far that its pull is the same throughout
    ended = run(0.9, far, lr=1e-9, steps=2000, round_s=round_s)
    late = torch.stack(ended.works[0].points[-1001:]).flatten()
    assert float(late[-1] - late[0]) / 1000 == pytest.approx(10 * 1e-9 * 1e6, rel=0.02)


@pytest.mark.parametrize("wire", ["fp32", "int8"])
@pytest.mark.parametrize("round_s", [0.1, 3.7])
def test_it_ends_at_the_optimum_with_equal_replicas(wire, round_s):
    long = [target * 300 for target in TARGETS]  # a code is of blocks of 256
    ended = run(0.9, long, steps=400, lr=decaying(0.05), round_s=round_s, wire=wire)
    assert all(torch.equal(ended.x(0), x) for x in ended.xs)
    torch.testing.assert_close(ended.x(0), OPTIMUM.repeat(300), rtol=0, atol=0.1)


def test_a_rank_with_nan_takes_the_mean_with_its_momentum():
    ended = run(0.9, steps=400, lr=decaying(0.05), poison=(1, 5))
    assert all(torch.equal(ended.x(0), x) for x in ended.xs)
    torch.testing.assert_close(ended.x(0), OPTIMUM, rtol=0, atol=0.3)


def replica_with(values: list[float], fragments: int = 1) -> Replica:
    return Replica(Point(values, torch.float64), Tally(1), fragments, keeps_mean=True)


def corrected(replica: Replica, means: list[float], fragments: int = 1) -> None:
    """One cycle, whose means are given; all is shown."""
    for _ in range(fragments):
        fragment = replica.next_fragment(fragments)
        sent = replica.snapshot(fragment)
        mean = torch.tensor(means, dtype=torch.float64)[fragment.begin : fragment.end]
        replica.correct(fragment, sent, Mean(mean), 0.5)
    replica.merge()


def x_of(replica: Replica) -> list[float]:
    return replica.parameters().tolist()


def test_the_first_mean_has_no_momentum_and_the_second_has():
    replica = replica_with([0.0, 0.0])
    corrected(replica, [1.0, 2.0])
    assert x_of(replica) == [1.0, 2.0]
    corrected(replica, [3.0, 2.0])
    assert x_of(replica) == [3.0 + 0.5 * 2.0, 2.0]


def test_each_fragment_reckons_from_its_own_mean_and_new_cuts_keep_it():
    replica = replica_with([0.0, 0.0], fragments=2)
    corrected(replica, [1.0, 2.0], fragments=2)
    corrected(replica, [2.0, 2.0], fragments=1)
    assert x_of(replica) == [2.5, 2.0]


def test_a_resumed_replica_keeps_its_momentum():
    first, second = replica_with([0.0]), replica_with([1.0])
    corrected(first, [1.0])
    latest = first.wait_latest_mean(1.0)
    assert latest is not None
    second.load_latest_mean(latest)
    corrected(second, [3.0])
    assert x_of(second) == [4.0]


def test_what_is_not_known_of_all_elements_is_not_resumed_from():
    first, second = replica_with([0.0, 0.0], fragments=2), replica_with([0.0, 0.0])
    fragment = first.next_fragment(2)
    first.correct(fragment, first.snapshot(fragment), Mean(torch.ones(1, dtype=torch.float64)), 0.5)
    latest = first.wait_latest_mean(1.0)
    assert latest is not None and all(map(math.isnan, latest.tolist()))
    second.load_latest_mean(latest)
    corrected(second, [3.0, 3.0])
    assert x_of(second) == [3.0, 3.0]


def test_only_with_momentum_does_a_replica_keep_the_mean():
    assert registry.find("lasgd", {"outer_momentum": 0.9}).keeps_mean
    assert not registry.find("lasgd").keeps_mean
    assert Replica(Point([0.0]), Tally(1)).wait_latest_mean(1.0) is None


@pytest.mark.parametrize("beta", [-0.1, 1.0, 2.0])
def test_a_momentum_that_would_not_end_is_refused(beta):
    with pytest.raises(ConfigurationError, match="0 to below 1"):
        registry.find("lasgd", {"outer_momentum": beta})


def test_momentum_of_both_that_nobody_means_is_refused():
    found = registry.find("lasgd", {"outer_momentum": 0.9})
    with pytest.raises(ConfigurationError, match="multiply: a gradient would move the mean 100 times"):
        found.check_momentum(0.9)
    with pytest.raises(ConfigurationError, match=r"50 times as far as without \(limit 40\)"):
        registry.find("lasgd", {"outer_momentum": 0.8}).check_momentum(0.9)
    found.check_momentum(0.5)
    found.check_momentum(0.0)
    registry.find("lasgd", {"outer_momentum": 0.98}).check_momentum(0.5)  # 0.99, shared out
    registry.find("lasgd").check_momentum(0.99)
    registry.find("diloco").check_momentum(0.9)


def test_a_mean_that_is_shared_with_its_maker_gives_the_same_momentum_also_when_cut_anew():
    draw = torch.Generator().manual_seed(0)
    alone, sharing = replica_with([0.0] * 6, fragments=2), replica_with([0.0] * 6, fragments=2)
    made = torch.zeros(6, dtype=torch.float64)
    sharing.share_mean(made)
    for cycle in range(12):
        fragments = 2 if cycle < 5 else 3
        for _ in range(fragments):
            means = torch.randn(6, generator=draw, dtype=torch.float64)
            for replica in (alone, sharing):
                fragment = replica.next_fragment(fragments)
                sent = replica.snapshot(fragment)
                part = slice(fragment.begin, fragment.end)
                if replica is sharing:
                    made[part].copy_(means[part])  # as its maker does: before the correction, where it lies
                    replica.correct(fragment, sent, Mean(made[part]), 0.5)
                else:
                    replica.correct(fragment, sent, Mean(means[part].clone()), 0.5)
                replica.merge()
        assert x_of(sharing) == x_of(alone)
        assert torch.equal(sharing.wait_latest_mean(1.0), alone.wait_latest_mean(1.0))
    assert any(abs(value) > 0.1 for value in x_of(alone))
