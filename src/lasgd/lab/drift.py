"""How far ranks drift apart between averages, and their mean runs away, on a quadratic: exact, in small matrices.

Rank i takes local steps on h/2 x^2 with gradient noise of variance s^2, learning rate l, momentum mu. With c = l h, and
of each rank's difference from the mean of all, which rounds move and the mean of all does not:

    local step   u <- mu u + c x + l noise ; x <- x - u        u is the momentum buffer times l
    merge        x <- x + r ; r <- 0                            at every step boundary
    snapshot     s <- x + r                                     when a round begins
    correction   r <- r - g s                                   when its mean comes, whose own difference is 0

A cycle of one fragment is a list of these moments. Their product is one matrix: where it shrinks every difference, the
covariance of (x, u, r, s) that it leaves as it was is the stationary one.

The mean of all ranks takes the same steps, and corrections move it by its momentum alone, beta of it:

    correction   r <- r + beta (s - m') ; m' <- s               s is the mean that has come, m' the one before

What follows: docs/theory.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_X, _U, _R, _S, _M = range(5)
_FROM, _TO, _PARTS = 1e-4, 4.0, 400
"""Of c, where its limit is looked for; no direction with c beyond 2 (1 + mu) <= 4 is stable without averaging."""
_LEAST_SHRINKING = 1e-9
"""Per cycle. What shrinks more slowly outlives any run, and noise adds up in it; and eigenvalues are no more exact."""


@dataclass(frozen=True)
class Cycle:
    """Of one fragment: its snapshot, the mean `flight` local steps later, the next snapshot `steps` after the first.

    A whole vector back to back has flight = steps, one of F fragments in turn flight = steps / F; flight = 0 is
    blocking local SGD, which takes no step before it has shown the mean.
    """

    steps: int
    flight: int
    momentum: float = 0.9
    gain: float = 1.0
    """g; 1 is the rule `full`."""

    def growth(self, c: float) -> float:
        """By how much a difference grows from cycle to cycle in a direction of this c: a spectral radius."""
        return _spectral_radius(self._product(c))

    def limit(self) -> float:
        """The least c at which differences grow, or do not shrink to speak of, to 3 %; infinite if none is below 4."""
        return _least_growing(self.growth)

    def variance(self, c: float) -> float:
        """Stationary, of x where gradients are taken, mean over a cycle's local steps, over (1 - 1/n) l^2 s^2.

        Infinite where differences grow, or do not shrink to speak of.
        """
        if self.growth(c) > 1 - _LEAST_SHRINKING:
            return math.inf
        kick = torch.zeros(4, dtype=torch.float64)
        kick[_X], kick[_U] = -1.0, 1.0
        noise, moments = torch.outer(kick, kick), self._moments(c)

        def through(covariance: Tensor) -> tuple[Tensor, float]:
            seen = 0.0
            for moment, is_step in moments:
                seen += float(covariance[_X, _X]) if is_step else 0.0
                covariance = moment @ covariance @ moment.T + (noise if is_step else 0.0)
            return covariance, seen / self.steps

        whole, added = self._product(c), through(torch.zeros(4, 4, dtype=torch.float64))[0]
        stationary = torch.linalg.solve(torch.eye(16, dtype=torch.float64) - torch.kron(whole, whole), added.flatten())
        return through(stationary.view(4, 4))[1]

    def _product(self, c: float) -> Tensor:
        step, merge, snapshot, correction = self._kinds(c)
        before = torch.linalg.matrix_power(merge @ step, self.flight) @ snapshot
        shown = correction @ before if self.flight else merge @ correction @ before
        return torch.linalg.matrix_power(merge @ step, self.steps - self.flight) @ shown

    def _moments(self, c: float) -> list[tuple[Tensor, bool]]:
        """(matrix, whether it is a local step), of one cycle in order."""
        step, merge, snapshot, correction = self._kinds(c)
        flight = [(step, True), (merge, False)] * self.flight
        after = [(step, True), (merge, False)] * (self.steps - self.flight)
        waited = [(merge, False)] if not self.flight else []
        return [(snapshot, False), *flight, (correction, False), *waited, *after]

    def _kinds(self, c: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        step, merge, snapshot, correction = _moments_of(4, c, self.momentum)
        correction[_R, _S] = -self.gain
        return step, merge, snapshot, correction


@dataclass(frozen=True)
class MeanCycle:
    """As `Cycle`, of the mean of all ranks with momentum of its own."""

    steps: int
    flight: int
    momentum: float
    """Of the optimizers."""
    outer_momentum: float
    """beta."""

    def growth(self, c: float) -> float:
        """By how much the mean's distance from the optimum grows from cycle to cycle: a spectral radius."""
        step, merge, snapshot, correction = _moments_of(5, c, self.momentum)
        correction[_R, _S], correction[_R, _M] = self.outer_momentum, -self.outer_momentum
        correction[_M, _S], correction[_M, _M] = 1.0, 0.0
        before = torch.linalg.matrix_power(merge @ step, self.flight) @ snapshot
        whole = torch.linalg.matrix_power(merge @ step, self.steps - self.flight) @ correction @ before
        return _spectral_radius(whole)

    def limit(self) -> float:
        """The least c at which the mean runs away, to 3 %; infinite if there is none below 4."""
        return _least_growing(self.growth)


def _moments_of(parts: int, c: float, momentum: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Step, merge, snapshot, and a correction that does nothing yet, on so many of (x, u, r, s, m')."""
    step, merge, snapshot, correction = (torch.eye(parts, dtype=torch.float64) for _ in range(4))
    step[_U, _X], step[_U, _U] = c, momentum
    step[_X, _X], step[_X, _U] = 1 - c, -momentum
    merge[_X, _R], merge[_R, _R] = 1.0, 0.0
    snapshot[_S, _X], snapshot[_S, _R], snapshot[_S, _S] = 1.0, 1.0, 0.0
    return step, merge, snapshot, correction


def _spectral_radius(whole: Tensor) -> float:
    """Infinite where a long cycle has taken it out of range."""
    return float(torch.linalg.eigvals(whole).abs().max()) if torch.isfinite(whole).all() else math.inf


def _least_growing(growth: Callable[[float], float]) -> float:
    rates = torch.logspace(math.log10(_FROM), math.log10(_TO), _PARTS, dtype=torch.float64)
    return next((c for c in rates.tolist() if growth(c) > 1 - _LEAST_SHRINKING), math.inf)


def variance_alone(c: float, momentum: float) -> float:
    """Of x, stationary, over l^2 s^2 / n, under synchronous SGD with the mean gradient of n ranks; the mean's too.

    It does not depend on rounds. Infinite where SGD is unstable.
    """
    if not 0 < c < 2 * (1 + momentum):
        return math.inf
    return (1 + momentum) / (c * (1 - momentum) * (2 * (1 + momentum) - c))
