"""LASGD: local steps that never wait, with exact averaging in the background.

Source: T. Avidor, N. Tal Israel, "Locally Asynchronous Stochastic Gradient Descent for Decentralised Deep Learning",
arXiv 2203.13085 (2022).

    local step   x_i <- optimizer(x_i, g_i)       compute, for ever
    boundary     x_i <- x_i + r_i ; r_i <- 0      compute, after every local step (merge rule `full`)

    snapshot     s_i = x_i + r_i                  communicate, when a round begins; one fragment of the vector
    average      m   = (1/n) sum_j s_j            all-reduce, while local steps go on
    correct      r_i <- r_i + (m - s_i)           when m arrives

x_i is the model's parameters, r_i `replica`'s residual, n `world_size`. sum_i (x_i + r_i) changes by local steps only.

Differences with the paper, of which only the abstract is public to us: averaging by fragments (one fragment is the
paper's whole vector), the agreed pace and end, the health rule. Momentum stays with its rank.
"""

from __future__ import annotations

from collections.abc import Generator

from lasgd.algorithms.ending import last_exact_average
from lasgd.algorithms.requests import AllReduceMean, Answer, Gradient, NextRound, Request, Stop, Update
from lasgd.pace import End, Pace
from lasgd.replica import Replica


def compute(replica: Replica, pace: Pace) -> Generator[Request, Answer, None]:
    """The training thread's part."""
    while True:
        yield Gradient()
        yield Update()
        replica.merge()


def communicate(replica: Replica, pace: Pace) -> Generator[Request, Answer, None]:
    """The communicator's part."""
    while pace.end is None:
        if isinstance((yield NextRound(pace.due_s)), Stop):
            return
        fragment = replica.next_fragment(pace.fragments)
        sent = replica.snapshot(fragment)
        outcome = yield AllReduceMean(sent)
        pace.agree(outcome)
        replica.correct(fragment, sent, outcome)
    if pace.end in (End.SAMPLES, End.LEFT):
        yield from last_exact_average(replica, pace)
