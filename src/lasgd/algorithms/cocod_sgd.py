"""CoCoD-SGD: local steps go on while the average of the replicas travels, and are added to it when it is there.

Source: S. Shen, L. Xu, J. Liu, X. Liang, Y. Cheng, "Faster Distributed Deep Net Training: Computation and Communication
Decoupled Stochastic Gradient Descent" (2019), arXiv 1906.12043, algorithm 1.

    snapshot     s_i = x_i
    local step   x_i <- optimizer(x_i, g_i)          H times, while m = (1/n) sum_j s_j travels
    average      x_i <- m + (x_i - s_i)              who comes too early waits for it

H is `pace.local_steps_between_rounds`, n `world_size`. It is LASGD's correction, with one whole round every H local
steps of every rank: a slow rank or a round longer than H steps makes all wait. Difference with the paper: the run ends
with an exact average.
"""

from __future__ import annotations

from collections.abc import Generator

from lasgd.algorithms.ending import last_exact_average
from lasgd.algorithms.requests import AllReduceMean, Answer, Begin, Gradient, Join, Request, Update
from lasgd.pace import End, Pace
from lasgd.replica import Replica


def compute(replica: Replica, pace: Pace) -> Generator[Request, Answer, None]:
    """The training thread's part."""
    (whole,) = replica.fragments
    yield from _local_steps(pace)
    while True:
        sent = replica.snapshot(whole)
        yield Begin(AllReduceMean(sent))
        yield from _local_steps(pace)
        outcome = yield Join()
        pace.agree(outcome)
        if pace.end is not None:
            break
        replica.correct(whole, sent, outcome)
        replica.merge()
    if pace.end in (End.SAMPLES, End.LEFT):
        yield from last_exact_average(replica, pace)


def _local_steps(pace: Pace) -> Generator[Request, Answer, None]:
    for _ in range(pace.local_steps_between_rounds):
        yield Gradient()
        yield Update()
