"""LASGD on quadratics in virtual time is what can be worked out on paper, to 1e-6 in float64 and over 200 steps.

f_i(x) = a/2 (x - c_i)^2 on rank i, steps of 1 s, rate l. With q = 1 - l a a local step alone is x <- q x + (1 - q) c_i.
Written for one element; x(k) is x at boundary k, u_i = x_i - mean_j x_j, e_i = c_i - mean_j c_j. Corrections of a
round sum to zero over the ranks, so in all cases

    mean(k) - mean c = q^k (mean(0) - mean c)                                                              (mean)

**A network that answers within the step.** The snapshot is x_i(k), its correction is shown at boundary k + 1:
x_i(k+1) = q x_i(k) + (1 - q) c_i + mean(k) - x_i(k). Of that the deviation is u(k+1) = -l a u(k) + l a e, hence

    u(k) = u* + (-l a)^(k - k0) (u(k0) - u*),   u* = l a e / (1 + l a)                                     (fast)

**F fragments in turn, each within a step.** Each element's correction is shown once in F steps, others are plain:
over the F steps u' = q^(F-1) (-l a u + l a e) + (1 - q^(F-1)) e.                                          (turns)

**Rounds of d steps, back to back.** Round k begins in the step after boundary b = k d + b0, when the last one's mean
has just come: the snapshot is s = X + R with X = x(b) and R = r(b), not shown yet. It is shown at boundary b + 1, with
the gradient of x(b); d - 1 plain steps follow; then r(b + d) = mean s - s. With Q = q^d, of the deviations

    X' = Q X + q^(d-1) R + (1 - Q) e                 A = | Q   q^(d-1) |
    R' = -X - R                                          | -1    -1    |                                   (slow)

so (X, R)(k) = v + A^k ((X, R)(0) - v) with v = A v + ((1 - Q) e, 0). For d = 1 that is the delayed recursion
u(k+1) = -l a (u(k) + u(k-1)) + 2 l a e, whose roots are those of z^2 + l a z + l a.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_cluster import Descent, Run, points

from lasgd.replica import Replica
from lasgd.tally import Tally
from scripted_driver import Point

STARTS, TARGETS = np.array([0.3, -1.0, 2.0, 0.9]), np.array([-2.0, 0.5, 4.5, 1.0])
LR, CURVATURE, STEPS = 0.05, 1.6, 240
LA, Q = LR * CURVATURE, 1 - LR * CURVATURE
E = TARGETS - TARGETS.mean()
N = len(TARGETS)


class Quadratic:
    """SGD on a/2 |x - target|^2, and x at every boundary."""

    def __init__(self, model: Point, target: float):
        self.model, self.target, self.seen = model, target, []

    def begin(self) -> None:
        pass

    def gradient(self) -> None:
        x = self.model.x.detach()
        self.seen.append(x.clone())
        self.model.x.grad = CURVATURE * (x - self.target)

    def update(self, progress: float) -> None:
        assert self.model.x.grad is not None
        with torch.no_grad():
            self.model.x.sub_(self.model.x.grad, alpha=LR)


def trajectories(round_s, fragments: int = 1) -> tuple[Run, np.ndarray]:
    """(boundary, rank, element), the beginning included."""
    replicas = points([[start] * fragments for start in STARTS], fragments)
    models = [replica.layout.entries[0].owner for replica in replicas]
    works = [Quadratic(model, target) for model, target in zip(models, TARGETS, strict=True)]
    run = Run("lasgd", replicas, 1.0, round_s, works, samples=N * STEPS, fragments=fragments)
    seen = [torch.stack(work.seen[:STEPS]) for work in works]
    return run, torch.stack(seen, dim=1).numpy()


def deviations(x: np.ndarray) -> np.ndarray:
    return x - x.mean(axis=1, keepdims=True)


def assert_mean_is_that_of_sgd(x: np.ndarray) -> None:
    expected = TARGETS.mean() + Q ** np.arange(STEPS) * (STARTS.mean() - TARGETS.mean())
    assert x.mean(axis=1) == pytest.approx(expected[:, None].repeat(x.shape[2], 1), abs=1e-6)


def after_one_step_alone() -> np.ndarray:
    """u_i(1): no round begins before the first gradient."""
    return Q * (STARTS - STARTS.mean()) + (1 - Q) * E


@pytest.mark.parametrize("round_s", [0.0, 0.01, 0.45])
def test_a_network_that_answers_within_the_step_leaves_only_the_latest_gradient_apart(round_s):
    _, x = trajectories(round_s)
    assert_mean_is_that_of_sgd(x)
    fixed = LA * E / (1 + LA)
    k = np.arange(1, STEPS)[:, None]
    expected = fixed + (-LA) ** (k - 1) * (after_one_step_alone() - fixed)
    assert deviations(x)[1:, :, 0] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("fragments", [2, 5])
def test_each_fragment_drifts_until_its_turn_and_keeps_one_gradient_then(fragments):
    _, x = trajectories(0.4 * fragments, fragments)  # a part takes its share
    assert_mean_is_that_of_sgd(x)
    u = deviations(x)
    factor, drift = Q ** (fragments - 1), 1 - Q ** (fragments - 1)
    fixed = (factor * LA + drift) * E / (1 + factor * LA)
    for part in range(fragments):
        first = 1 + part  # the boundary behind which it is sent for the first time
        turns = u[first::fragments, :, part]
        alone = Q**first * (STARTS - STARTS.mean()) + (1 - Q**first) * E
        expected = fixed + (-LA * factor) ** np.arange(len(turns))[:, None] * (alone - fixed)
        assert turns == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("delay", [1, 2, 5, 12])
def test_rounds_of_d_steps_follow_the_recursion_with_their_delay(delay):
    begins = iter([delay + 0.25])  # so that rounds begin a quarter into a step, and nothing is at the same moment
    run, x = trajectories(lambda n_bytes, share: next(begins, float(delay)))
    assert_mean_is_that_of_sgd(x)
    u = deviations(x)[:, :, 0]
    assert {rank.tally.staleness.max_steps for rank in run.ranks} == {delay + 1}

    # The first round is of x(1), and there is a second one only a step after it, for nobody knows yet how long it took.
    first = int(run.of(0, "round")[1][0])
    assert first == delay + 2
    alone = Q ** (first - 1) * (STARTS - STARTS.mean()) + (1 - Q ** (first - 1)) * E
    at_first = Q * alone + (1 - Q) * E - after_one_step_alone()  # its correction is shown there
    decay = Q**delay
    matrix = np.array([[decay, Q ** (delay - 1)], [-1.0, -1.0]])
    pushed = np.stack([(1 - decay) * E, np.zeros(N)])  # (2, ranks)
    fixed = np.linalg.solve(np.eye(2) - matrix, pushed)
    start = np.stack([at_first, np.zeros(N)])
    roots, modes = np.linalg.eig(matrix)
    assert np.poly(roots) == pytest.approx([1, 1 - decay, Q ** (delay - 1) - decay])
    assert max(abs(roots)) < 1
    weights = np.linalg.solve(modes, start - fixed)
    for k, boundary in enumerate(range(first, STEPS, delay)):
        position, residual = fixed + (modes @ (roots[:, None] ** k * weights)).real
        for j in range(delay):
            if boundary + j < STEPS:
                plain = Q**j * position + (1 - Q**j) * E
                assert u[boundary + j] == pytest.approx(plain + (Q ** (j - 1) * residual if j else 0), abs=1e-6)


def test_one_rank_is_torch_sgd_with_momentum_and_weight_decay_bit_for_bit():
    target, begin = torch.tensor([3.0, -1.0, 0.5]), torch.tensor([0.1, 0.2, 0.3])

    class Momentum(Descent):
        def __init__(self, model):
            super().__init__(model, target, 0.07)
            self.optimizer = torch.optim.SGD(model.parameters(), lr=0.07, momentum=0.9, weight_decay=5e-3)
            self.seen = []

        def gradient(self):
            self.seen.append(self.model.x.detach().clone())
            super().gradient()

    averaged, plain = Momentum(Point(begin)), Momentum(Point(begin))
    Run("lasgd", [Replica(averaged.model, Tally(1), 3)], 1.0, 0.3, [averaged], samples=STEPS, fragments=3)
    for _ in range(STEPS):
        plain.gradient()
        plain.update(0.0)
    assert len(averaged.seen) >= STEPS
    assert all(torch.equal(x, y) for x, y in zip(averaged.seen, plain.seen, strict=False))
    assert not torch.equal(averaged.seen[0], averaged.seen[-1])
