"""SGP, stochastic gradient push: gossip in one direction, with push-sum weights that keep it unbiased.

Source: M. Assran, N. Loizou, N. Ballas, M. Rabbat, "Stochastic Gradient Push for Distributed Deep Learning" (2019),
arXiv 1811.10792, algorithm 1.

    local step   z_i <- optimizer(z_i, g_i)                      H times, at the de-biased z_i = x_i / w_i
    push         sends p_ji x_i and p_ji w_i to its targets      the columns of P sum to 1
    pull         x_i <- sum_j p_ij x_j                           waits for its sources of this round
                 w_i <- sum_j p_ij w_j ;  z_i = x_i / w_i

What travels is z_j with the weight p_ij w_j, so that z_i is a weighted mean. The model holds z_i. P is of topology.py,
where `exponential` gives one target a round; H is `pace.local_steps_between_rounds`, in the paper 1. Differences with
the paper: the update is z's, not x's (where all ranks take part in every round all w_i stay 1, and it is the same); the
agreed end, and an exact average of the z_i at it.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from itertools import count

from lasgd.algorithms import topology
from lasgd.algorithms.ending import last_exact_average
from lasgd.algorithms.mixing import WeightedMean
from lasgd.algorithms.requests import Answer, Box, Gradient, Receive, Request, Send, Stop, Update
from lasgd.pace import End, Pace
from lasgd.replica import Replica


@dataclass(frozen=True)
class Settings:
    """Of SGP."""

    topology: str = "exponential"  # the paper's, directed, one target a round

    def __post_init__(self) -> None:
        topology.check(self.topology)


def compute(replica: Replica, pace: Pace, settings: Settings) -> Generator[Request, Answer, None]:
    """The training thread's part."""
    yield from pushing_steps(replica, pace, settings)
    if pace.end in (End.SAMPLES, End.LEFT):
        yield from last_exact_average(replica, pace)


def pushing_steps(replica: Replica, pace: Pace, settings: Settings) -> Generator[Request, Answer, None]:
    """Local steps and rounds of push-sum until the end is agreed; the round under way then is dropped."""
    (whole,) = replica.fragments
    w = 1.0
    for round in count():
        for _ in range(pace.local_steps_between_rounds):
            yield Gradient()
            yield Update()
        if pace.end is not None:
            return
        sent = replica.snapshot(whole)
        pushed = yield from push_sum(replica, pace, settings.topology, round, Box.COMPUTE, sent, w)
        if pushed is None:
            return
        w = pushed.weight
        replica.correct(whole, sent, pushed.mean())
        replica.merge()
        replica.tally.exchanges += 1


def push_sum(
    replica: Replica, pace: Pace, name: str, round: int, box: Box, sent, w: float
) -> Generator[Request, Answer, WeightedMean | None]:
    """One round, from `sent` of weight `w`: the weighted mean of what stays and what comes; None after a Stop."""
    rank, n = replica.tally.rank, pace.world_size
    targets = topology.targets(name, rank, n, round)
    share = w / (1 + len(targets))
    for peer in targets:
        yield Send(peer, box, sent.values, share * sent.weight, round)
    pulled = WeightedMean(sent, share)
    for peer in topology.sources(name, rank, n, round):
        message = yield Receive(peer, until_end=True)
        if isinstance(message, Stop):
            return None
        pulled.add(message)
    return pulled
