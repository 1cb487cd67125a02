"""Waiting for each other in the beginning of a run."""

from __future__ import annotations

from candidate_replica import Text
from lasgd.algorithms import lasgd
from lasgd.algorithms.requests import AllReduceMean, Gradient, NextRound, Update
from lasgd.pace import Pace
from lasgd.replica import Replica

WAITING_SHARE = 0.2
"""Of the run, in the beginning."""


def compute_waiting_first(replica: Replica, pace: Pace, settings: lasgd.Settings) -> Text:
    """In the beginning a whole cycle of rounds after every local step."""
    while pace.end is None and pace.progress < WAITING_SHARE:
        yield Gradient()
        yield Update()
        for _ in replica.fragments:
            fragment = replica.next_fragment(pace.fragments)
            sent = replica.snapshot(fragment)
            outcome = yield AllReduceMean(sent)
            pace.agree(outcome)
            replica.correct(fragment, sent, outcome, settings.outer_momentum)
        replica.merge()
    yield from lasgd.compute(replica, pace)


def communicate_after_waiting(replica: Replica, pace: Pace, settings: lasgd.Settings) -> Text:
    """Looks every now and then whether the beginning is over."""
    while pace.end is None and pace.progress < WAITING_SHARE:
        yield NextRound(1.0)
    yield from lasgd.communicate(replica, pace, settings)
