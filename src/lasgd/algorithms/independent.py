"""Independent SGD: every rank for itself, no vector ever travels. The yardstick for retention.

    local step   x_i <- optimizer(x_i, g_i)

The replicas differ at the end, and are not averaged. Ranks agree on nothing but the end: each stops at its share of the
budget, samples / n, without asking the others.
"""

from __future__ import annotations

from collections.abc import Generator

from lasgd.algorithms.requests import Answer, Gradient, NextRound, Request, Stop, Update
from lasgd.pace import IDLE_S, Pace
from lasgd.replica import Replica


def compute(replica: Replica, pace: Pace) -> Generator[Request, Answer, None]:
    """The training thread's part."""
    while True:
        yield Gradient()
        yield Update()
        pace.count_alone(replica.tally)


def communicate(replica: Replica, pace: Pace) -> Generator[Request, Answer, None]:
    """Sends nothing; stays until the own end."""
    while pace.end is None:
        if isinstance((yield NextRound(IDLE_S)), Stop):
            return
