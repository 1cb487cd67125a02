"""Local SGD: H local steps, then every rank waits for the exact average of all.

Source: S. U. Stich, "Local SGD Converges Fast and Communicates Little" (2019), arXiv 1805.09767, algorithm 1.

    local step   x_i <- optimizer(x_i, g_i)       H times
    average      x_i <- (1/n) sum_j x_j           all-reduce; nobody goes on before it is there

H is `pace.local_steps_between_rounds`, n `world_size`. Differences with the paper: the optimizer may be any, and its
state (momentum) stays with its rank; the run ends with the average that finds the budget reached.
"""

from __future__ import annotations

from collections.abc import Generator

from lasgd.algorithms.requests import AllReduceMean, Answer, Gradient, Request, Update
from lasgd.pace import Pace
from lasgd.replica import Replica


def compute(replica: Replica, pace: Pace) -> Generator[Request, Answer, None]:
    """The training thread's part."""
    while pace.end is None:
        for _ in range(pace.local_steps_between_rounds):
            yield Gradient()
            yield Update()
        fragment = replica.next_fragment(1)
        sent = replica.snapshot(fragment)
        outcome = yield AllReduceMean(sent)
        pace.agree(outcome)
        replica.adopt(fragment, outcome)
        replica.show_average()
