"""Overlap local SGD: every replica is pulled towards an anchor, whose average travels during the local steps.

Source: J. Wang, H. Liang, G. Joshi, "Overlap Local-SGD: An Algorithmic Approach to Hide Communication Delays in
Distributed SGD" (2020), arXiv 2002.09539, equations 3 to 5 and 10 to 11.

    local step   x_i <- optimizer(x_i, g_i)                   H times
    average      m   = (1/n) sum_j x_j                        of H local steps ago; it has travelled meanwhile, and who
                                                              comes too early waits for it
    anchor       v   <- beta v + (m - z) ;  z <- z + v
    pull         x_i <- x_i - alpha (x_i - z)                 then the next average sets out

alpha is `pull`, beta `anchor_momentum`, H `pace.local_steps_between_rounds`. Differences with the paper: the run ends
with an exact average of the replicas; a resumed run begins without anchor and v.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

from lasgd.algorithms.ending import last_exact_average
from lasgd.algorithms.requests import AllReduceMean, Answer, Begin, Gradient, Join, Mean, Request, Update
from lasgd.errors import ConfigurationError
from lasgd.pace import End, Pace
from lasgd.replica import Replica


@dataclass(frozen=True)
class Settings:
    """Of overlap local SGD; the defaults are the paper's."""

    pull: float = 0.6  # alpha, above 0 to 1
    anchor_momentum: float = 0.7  # beta, 0 to below 1

    def __post_init__(self) -> None:
        if not 0 < self.pull <= 1:
            raise ConfigurationError(f"pull should be above 0 and at most 1, got {self.pull!r}")
        if not 0 <= self.anchor_momentum < 1:
            raise ConfigurationError(f"anchor_momentum should be from 0 to below 1, got {self.anchor_momentum!r}")


def compute(replica: Replica, pace: Pace, settings: Settings) -> Generator[Request, Answer, None]:
    """The training thread's part."""
    (whole,) = replica.fragments
    anchor = velocity = None
    for _ in range(pace.local_steps_between_rounds):
        yield Gradient()
        yield Update()
    while True:
        yield Begin(AllReduceMean(replica.snapshot(whole)))
        for _ in range(pace.local_steps_between_rounds):
            yield Gradient()
            yield Update()
        outcome = yield Join()
        pace.agree(outcome)
        if pace.end is not None:
            break
        if not isinstance(outcome, Mean) or outcome.values is None:
            continue
        if anchor is None or velocity is None:
            anchor = outcome.values.clone()
            velocity = anchor.clone().zero_()
        velocity.mul_(settings.anchor_momentum).add_(outcome.values).sub_(anchor)
        anchor.add_(velocity)
        own = replica.snapshot(whole)
        replica.correct(whole, own, Mean(own.values.clone().lerp_(anchor, settings.pull if own.weight else 1.0)))
        replica.merge()
    if pace.end in (End.SAMPLES, End.LEFT):
        yield from last_exact_average(replica, pace)
