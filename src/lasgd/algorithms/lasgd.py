"""LASGD: local steps that never wait, with exact averaging in the background.

Source: T. Avidor, N. Tal Israel, "Locally Asynchronous Stochastic Gradient Descent for Decentralised Deep Learning",
arXiv 2203.13085 (2022).

    local step   x_i <- optimizer(x_i, g_i)       compute, for ever
    boundary     x_i <- x_i + r_i ; r_i <- 0      compute, after every local step (merge rule `full`)

    snapshot     s_i = x_i + r_i                  communicate, when a round begins; one fragment of the vector
    average      m   = (1/n) sum_j s_j            all-reduce, while local steps go on
    correct      r_i <- r_i + (m - s_i) + beta (m - m')     when m arrives; m' is these elements' mean before

x_i is the model's parameters, r_i `replica`'s residual, n `world_size`, beta `outer_momentum`. The m - s_i sum to zero
over the ranks, and the rest is equal on all, so the mean of all x_i + r_i changes by local steps and its momentum only.

With beta = 0, the default here, momentum is the optimizers' own, and stays with its rank. With beta = 0.9 and
optimizers without momentum the mean moves as with momentum 0.9 in each of them and the same learning rate, while one
rank's noise goes a tenth of the way before it is averaged. `lasgd train` has 0.8 and 0.5, which together go as far as
0.9 in one place: momentum.py, docs/theory.md. Source of the idea: J. Wang, V. Tantia, N. Ballas,
M. Rabbat, "SlowMo" (2020), arXiv 1910.00643, for ranks that wait for the mean.

Differences with the paper, of which only the abstract is public to us: averaging by fragments (one fragment is the
paper's whole vector), momentum of the mean, the agreed pace and end, the health rule for NaN and for runaways.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

from lasgd.algorithms.ending import last_exact_average
from lasgd.algorithms.requests import AllReduceMean, Answer, Gradient, NextRound, Request, Stop, Update
from lasgd.errors import ConfigurationError
from lasgd.momentum import LEAST_FRAGMENTS
from lasgd.pace import End, Pace
from lasgd.replica import Replica


@dataclass(frozen=True)
class Settings:
    """Of LASGD."""

    outer_momentum: float = 0.0  # beta, 0 to below 1

    def __post_init__(self) -> None:
        if not 0 <= self.outer_momentum < 1:
            raise ConfigurationError(f"outer_momentum should be from 0 to below 1, got {self.outer_momentum!r}")

    @property
    def keeps_mean(self) -> bool:
        """Corrections have momentum."""
        return self.outer_momentum > 0

    @property
    def least_fragments(self) -> int:
        """What "auto" begins with and does not go below."""
        return LEAST_FRAGMENTS if self.outer_momentum > 0 else 1


def compute(replica: Replica, pace: Pace) -> Generator[Request, Answer, None]:
    """The training thread's part."""
    while True:
        yield Gradient()
        yield Update()
        replica.merge()


def communicate(replica: Replica, pace: Pace, settings: Settings) -> Generator[Request, Answer, None]:
    """The communicator's part."""
    while pace.end is None:
        if isinstance((yield NextRound(pace.due_s)), Stop):
            return
        fragment = replica.next_fragment(pace.fragments)
        sent = replica.snapshot(fragment)
        outcome = yield AllReduceMean(sent)
        pace.agree(outcome)
        replica.correct(fragment, sent, outcome, settings.outer_momentum)
    if pace.end in (End.SAMPLES, End.LEFT):
        yield from last_exact_average(replica, pace)
