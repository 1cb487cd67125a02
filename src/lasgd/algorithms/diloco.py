"""DiLoCo: local SGD whose average takes an outer step with Nesterov's momentum.

Source: A. Douillard et al., "DiLoCo: Distributed Low-Communication Training of Language Models" (2023), arXiv
2311.08105, algorithm 1.

    local step   x_i <- optimizer(x_i, g_i)                  H times, from x_i = theta
    average      d   = theta - (1/n) sum_j x_j               all-reduce; nobody goes on before it is there
    outer step   v   <- mu v + d
                 theta <- theta - alpha (d + mu v)           the same on every rank
                 x_i <- theta

alpha is `outer_lr`, mu `outer_momentum`, H `pace.local_steps_between_rounds`, in the paper 500. With alpha 1 and mu 0
it is local SGD. Differences with the paper: the inner optimizer is the user's, not necessarily AdamW; buffers take the
outer step too. A resumed run begins with the mean of its replicas and without v.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

from lasgd.algorithms.requests import AllReduceMean, Answer, Gradient, Mean, Request, Update
from lasgd.errors import ConfigurationError
from lasgd.pace import Pace
from lasgd.replica import Replica


@dataclass(frozen=True)
class Settings:
    """Of DiLoCo; the defaults are the paper's."""

    outer_lr: float = 0.7  # alpha, above 0
    outer_momentum: float = 0.9  # mu, 0 to below 1

    def __post_init__(self) -> None:
        if not self.outer_lr > 0:
            raise ConfigurationError(f"outer_lr should be above 0, got {self.outer_lr!r}")
        if not 0 <= self.outer_momentum < 1:
            raise ConfigurationError(f"outer_momentum should be from 0 to below 1, got {self.outer_momentum!r}")


def compute(replica: Replica, pace: Pace, settings: Settings) -> Generator[Request, Answer, None]:
    """The training thread's part."""
    (whole,) = replica.fragments
    yield Gradient()  # from here on nobody but this algorithm changes the replica
    if pace.round:
        replica.adopt(whole, (yield AllReduceMean(replica.snapshot(whole))))
        replica.show_average()
    theta = replica.snapshot(whole).values.clone()
    velocity = theta.clone().zero_()
    yield Update()
    steps = pace.local_steps_between_rounds - 1
    while pace.end is None:
        for _ in range(steps):
            yield Gradient()
            yield Update()
        outcome = yield AllReduceMean(replica.snapshot(whole))
        pace.agree(outcome)
        if isinstance(outcome, Mean) and outcome.values is not None:
            moved = theta.clone().sub_(outcome.values)
            velocity.mul_(settings.outer_momentum).add_(moved)
            moved.add_(velocity, alpha=settings.outer_momentum)
            theta.sub_(moved, alpha=settings.outer_lr)
            replica.adopt(whole, Mean(theta))
            replica.show_average()
        steps = pace.local_steps_between_rounds
