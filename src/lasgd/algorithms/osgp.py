"""OSGP, overlap stochastic gradient push: SGP whose gossip travels in the background while local steps go on.

Source: M. Assran, N. Loizou, N. Ballas, M. Rabbat, "Stochastic Gradient Push for Distributed Deep Learning" (2019),
arXiv 1811.10792, section 2 and algorithm 2.

    local step   z_i <- optimizer(z_i, g_i)                      compute, for ever
    boundary     z_i <- z_i + r_i ;  r_i <- 0

    push         s_i = z_i + r_i, sent with weight p_ji w_i      exchange, at most once every local step
    pull         m = sum_j p_ij w_j s_j / sum_j p_ij w_j         waits for its sources of this round
                 w_i <- sum_j p_ij w_j ;  r_i <- r_i + (m - s_i)

As in sgp.py; what learning has changed meanwhile is kept by the residual, as in lasgd.py. Difference with the paper:
its tau bounds how many steps late a message may be, and a rank that has waited so long stands still; here nobody stands
still, and a message is as late as the network makes it. A slow rank's exchange does not wait for its local steps.
"""

from __future__ import annotations

from collections.abc import Generator
from itertools import count

from lasgd.algorithms.ending import last_exact_average
from lasgd.algorithms.requests import Answer, Box, ExchangeEnded, Gradient, NextExchange, Request, Stop, Update
from lasgd.algorithms.sgp import Settings, push_sum
from lasgd.pace import End, Pace
from lasgd.replica import Replica

__all__ = ["Settings", "compute", "exchange"]


def compute(replica: Replica, pace: Pace, settings: Settings) -> Generator[Request, Answer, None]:
    """The training thread's part."""
    while pace.end is None:
        yield Gradient()
        yield Update()
        replica.merge()
    yield ExchangeEnded()
    if pace.end in (End.SAMPLES, End.LEFT):
        yield from last_exact_average(replica, pace)


def exchange(replica: Replica, pace: Pace, settings: Settings) -> Generator[Request, Answer, None]:
    """The exchanger's part; the round under way at the end is dropped."""
    (whole,) = replica.fragments
    w = 1.0
    for round in count():
        if isinstance((yield NextExchange(pace.pause_s)), Stop):
            return
        sent = replica.snapshot(whole)
        pushed = yield from push_sum(replica, pace, settings.topology, round, Box.EXCHANGE, sent, w)
        if pushed is None:
            return
        w = pushed.weight
        replica.correct(whole, sent, pushed.mean())
        replica.tally.exchanges += 1
