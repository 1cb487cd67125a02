"""What lasgd.lab.drift foretells of quadratics is what the text of `lasgd` does there, in virtual time."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from test_cluster import Run, points

from lasgd.lab.drift import Cycle, MeanCycle, variance_alone
from lasgd.momentum import LEAST_FRAGMENTS

CURVATURE, N = 1.6, 4


class Noisy:
    """Heavy-ball SGD on a/2 x^2 with normal noise of variance 1 in the gradient, elements independent."""

    def __init__(self, model, rank: int, lr: float, momentum: float, noise: float):
        self.model, self.lr, self.momentum, self.noise = model, lr, momentum, noise
        self.buffer = torch.zeros_like(model.x)
        self.draw = torch.Generator().manual_seed(rank)
        self.seen: list[torch.Tensor] = []

    def begin(self) -> None:
        pass

    def gradient(self) -> None:
        x = self.model.x.detach()
        self.seen.append(x.clone())
        noise = torch.randn(x.shape, generator=self.draw, dtype=x.dtype)
        self.model.x.grad = CURVATURE * x + self.noise * noise

    def update(self, progress: float) -> None:
        with torch.no_grad():
            self.buffer.mul_(self.momentum).add_(self.model.x.grad)
            self.model.x.sub_(self.buffer, alpha=self.lr)


def seen(
    c: float, momentum: float, delay: int, steps: int, elements: int, noise: float = 1.0, outer: float = 0.0
) -> np.ndarray:
    """(step, rank, element): where gradients were taken, with the whole vector `delay` steps on its way."""
    lr = c / CURVATURE
    replicas = points([[float(rank == 0)] * elements for rank in range(N)], keeps_mean=outer > 0)
    models = [replica.layout.entries[0].owner for replica in replicas]
    works = [Noisy(model, rank, lr, momentum, noise) for rank, model in enumerate(models)]
    begins = iter([delay + 0.25])  # so that rounds begin a quarter into a step, and nothing is at the same moment

    def delay_s(n_bytes: float, share: float) -> float:
        return next(begins, float(delay))

    Run("lasgd", replicas, 1.0, delay_s, works, samples=N * steps, settings={"outer_momentum": outer})
    return torch.stack([torch.stack(work.seen[:steps]) for work in works], dim=1).numpy()


def differences(x: np.ndarray) -> np.ndarray:
    return x - x.mean(axis=1, keepdims=True)


@pytest.mark.parametrize(("c", "momentum", "delay"), [(0.3, 0.0, 1), (0.05, 0.0, 10), (0.3, 0.0, 10), (0.02, 0.9, 10)])
def test_replicas_are_as_far_apart_as_foretold(c, momentum, delay):
    x = seen(c, momentum, delay, steps=60 * delay + 200, elements=400)[100:]
    lr = c / CURVATURE
    expected = (1 - 1 / N) * lr**2 * Cycle(delay, delay, momentum).variance(c)
    assert np.square(differences(x)).mean() == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize(("c", "momentum", "delay"), [(0.3, 0.0, 10), (0.02, 0.9, 10)])
def test_the_mean_is_as_noisy_as_synchronous_sgd_whatever_the_delay(c, momentum, delay):
    x = seen(c, momentum, delay, steps=1500, elements=400)[500:].mean(axis=1)
    expected = (c / CURVATURE) ** 2 / N * variance_alone(c, momentum)
    assert np.square(x).mean() == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize(("momentum", "delay"), [(0.9, 10), (0.9, 5), (0.5, 10)])
def test_differences_die_out_below_the_limit_and_grow_above_it(momentum, delay):
    limit = Cycle(delay, delay, momentum).limit()

    def left(c: float) -> float:
        u = differences(seen(c, momentum, delay, steps=80 * delay, elements=1, noise=0.0))
        return np.abs(u[-delay:]).max() / np.abs(u[40 * delay : 41 * delay]).max()

    assert left(limit / 1.15) < 1 < left(limit * 1.15)


@pytest.mark.parametrize(("momentum", "outer", "delay"), [(0.5, 0.8, 1), (0.5, 0.8, 2), (0.8, 0.5, 1), (0.0, 0.9, 1)])
def test_the_mean_comes_to_rest_below_the_limit_of_its_momentum_and_runs_away_above_it(momentum, outer, delay):
    limit = MeanCycle(delay, delay, momentum, outer).limit()

    def left(c: float) -> float:
        mean = seen(c, momentum, delay, steps=400, elements=1, noise=0.0, outer=outer).mean(axis=1)
        return np.abs(mean[-40:]).max() / np.abs(mean[160:200]).max()

    assert left(limit / 1.15) < 1 < left(limit * 1.15)


def test_momentum_of_the_mean_needs_a_cycle_of_four_turns():
    """Each on its way for one local step at most: what `auto` sees to."""
    limits = [MeanCycle(fragments, 1, 0.5, 0.8).limit() for fragments in (1, 2, 3, LEAST_FRAGMENTS)]
    assert limits == sorted(limits)
    assert limits[0] < 0.1 < 2.5 < limits[-1]
    assert all(MeanCycle(LEAST_FRAGMENTS * late, late, 0.5, 0.8).limit() > 2.5 for late in (2, 5, 10, 20))


def test_without_momentum_of_its_own_the_mean_is_synchronous_sgd():
    assert MeanCycle(10, 10, 0.9, 0.0).limit() == pytest.approx(2 * (1 + 0.9), rel=0.03)


def test_momentum_and_delay_together_leave_little_room():
    """Synchronous SGD is stable up to 2 (1 + mu); a whole vector late by ten steps is not by far."""
    assert Cycle(10, 10, 0.9).limit() < 0.07 < 0.85 < Cycle(10, 10, 0.0).limit()


def test_fragments_in_turn_give_the_room_back():
    assert Cycle(10, 1, 0.9).limit() > 15 * Cycle(10, 10, 0.9).limit()


@pytest.mark.parametrize(("delay", "fragments"), [(20, 20), (20, 5), (20, 2), (10, 10)])
def test_in_flat_directions_late_averages_are_like_rarer_ones(delay, fragments):
    """Local SGD with H steps has from 0 to H - 1 of them apart; here it is from one delay on, for a whole cycle."""
    flat, late = 1e-6, delay // fragments
    assert Cycle(delay, delay, 0.0).variance(flat) == pytest.approx((3 * delay + 1) / 2, rel=1e-3)
    assert Cycle(delay, late, 0.0).variance(flat) == pytest.approx((delay + 2 * late + 1) / 2, rel=1e-3)
    assert Cycle(delay, 0, 0.0).variance(flat) == pytest.approx((delay - 1) / 2, rel=1e-3)


@pytest.mark.parametrize("delay", [2, 5, 10])
@pytest.mark.parametrize("c", [0.3, 0.8, 1.2, 1.9])
def test_without_momentum_a_whole_vectors_limit_is_that_of_two_lines_of_algebra(delay, c):
    """x comes to q^D x + q^(D-1) r, r to -(x + r): Jury's conditions on that matrix of two rows."""
    q = 1 - c
    is_stable = q ** (delay - 1) > 0 and c * q ** (delay - 1) < 1
    assert (Cycle(delay, delay, 0.0).growth(c) < 1) == is_stable


def test_differences_that_hardly_shrink_count_as_growing():
    """A billionth a cycle; to tell such eigenvalues from 1 double precision would not do."""
    cycle = Cycle(50, 50, 0.0)
    limit = cycle.limit()
    assert (1 - limit) ** 49 < 1e-9 < (1 - limit / 1.1) ** 49
    assert cycle.variance(limit) == math.inf
    assert cycle.variance(limit / 1.1) < math.inf


def test_a_smaller_gain_is_stable_where_the_whole_correction_is_not():
    c = 2 * Cycle(10, 10, 0.9).limit()
    assert Cycle(10, 10, 0.9).growth(c) > 1 > Cycle(10, 10, 0.9, gain=0.25).growth(c)


def test_there_is_no_variance_where_there_is_no_end_of_growing():
    assert Cycle(10, 10, 0.9).variance(1.0) == math.inf
    assert variance_alone(3.9, 0.9) == math.inf
