"""The agreement by itself: for algorithms whose ranks average otherwise than by all-reduce.

Only the header travels, in the background and at the agreed pace, so that all ranks know how far the run is, and see
its end in the same round. A rank that holds NaN or Inf is counted with weight 0.
"""

from __future__ import annotations

from collections.abc import Generator

from lasgd.algorithms.requests import AllReduceMean, Answer, NextRound, Request, Stop
from lasgd.pace import Pace
from lasgd.replica import Replica


def communicate(replica: Replica, pace: Pace) -> Generator[Request, Answer, None]:
    """The communicator's part; `compute` takes the last exact average when this has ended."""
    while pace.end is None:
        if isinstance((yield NextRound(pace.due_s)), Stop):
            return
        pace.agree((yield AllReduceMean(replica.presence())))
