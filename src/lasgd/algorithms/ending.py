"""The agreed end: one exact average of all replicas, in full precision.

    x <- mean_j (x_j + r_j) ;  r <- 0          fragment by fragment, then shown at once

All ranks come here after the same round, because they have read the end from the same header. Local steps that finish
meanwhile are discarded: x is overwritten.
"""

from __future__ import annotations

from collections.abc import Generator

from lasgd.algorithms.requests import AllReduceMean, Answer, Failure, Request
from lasgd.pace import Pace
from lasgd.replica import Replica


def last_exact_average(replica: Replica, pace: Pace) -> Generator[Request, Answer, None]:
    """Leaves the average in the replica, for `replica.show_average()`; a Failure leaves the replica as it is.

    A rank that turns out to hold NaN or Inf takes the others' mean here too; if all do, the run has diverged after all.
    """
    replica.freeze()
    for fragment in replica.fragments:
        sent = replica.snapshot(fragment)
        outcome = yield AllReduceMean(sent, exact=True)
        if isinstance(outcome, Failure):
            return
        if outcome.values is None:
            pace.diverge()
            return
        replica.adopt(fragment, outcome)
