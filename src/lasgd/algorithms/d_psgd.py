"""D-PSGD: every step mixes with the neighbours' replicas, and waits for them.

Source: X. Lian et al., "Can Decentralized Algorithms Outperform Centralized Algorithms? A Case Study for Decentralized
Parallel Stochastic Gradient Descent" (2017), arXiv 1705.09056, algorithm 1.

    gradient     g_i at x_i                     while x_i travels to the neighbours
    mix          x_i <- sum_j W_ij x_j          waits for the neighbours' x_j of the same step
    update       x_i <- optimizer(x_i, g_i)

W is symmetric and doubly stochastic (topology.py). With H = `pace.local_steps_between_rounds` above 1 only every H-th
local step mixes, and x_i travels during all of them: x_i <- x_i + (sum_j W_ij s_j - s_i), with s the replicas H steps
ago. Differences with the paper: the optimizer may be any; the agreed end, and an exact average at it.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass

from lasgd.algorithms import topology
from lasgd.algorithms.ending import last_exact_average
from lasgd.algorithms.mixing import WeightedMean
from lasgd.algorithms.requests import Answer, Box, Contribution, Gradient, Receive, Request, Send, Stop, Update
from lasgd.pace import End, Pace
from lasgd.replica import Replica


@dataclass(frozen=True)
class Settings:
    """Of D-PSGD."""

    topology: str = "ring"  # the paper's

    def __post_init__(self) -> None:
        topology.check(self.topology)


def compute(replica: Replica, pace: Pace, settings: Settings) -> Generator[Request, Answer, None]:
    """The training thread's part."""
    yield from mixing_steps(replica, pace, settings)
    if pace.end in (End.SAMPLES, End.LEFT):
        yield from last_exact_average(replica, pace)


def mixing_steps(replica: Replica, pace: Pace, settings: Settings) -> Generator[Request, Answer, None]:
    """Local steps and mixing until the end is agreed; mixing that is under way then is dropped."""
    rank = replica.tally.rank
    weights = topology.mixing_weights(settings.topology, rank, pace.world_size)
    neighbours = [j for j in weights if j != rank]
    (whole,) = replica.fragments
    yield Gradient()  # from here on nobody but this algorithm changes the replica
    sent = yield from _sent(replica, neighbours)
    while True:
        for _ in range(pace.local_steps_between_rounds - 1):
            yield Update()
            yield Gradient()
        mixed = WeightedMean(sent, weights[rank])
        for peer in neighbours:
            message = yield Receive(peer, until_end=True)
            if isinstance(message, Stop):
                return
            mixed.add(message, weights[peer])
        if not sent.weight:  # x_i is NaN or Inf, and so is g_i: the neighbours' mean comes after it
            yield Update()
        replica.correct(whole, sent, mixed.mean())
        replica.merge()
        replica.tally.exchanges += 1
        if sent.weight:
            yield Update()
        if pace.end is not None:
            return
        sent = yield from _sent(replica, neighbours)
        yield Gradient()


def _sent(replica: Replica, neighbours: Sequence[int]) -> Generator[Request, Answer, Contribution]:
    (whole,) = replica.fragments
    sent = replica.snapshot(whole)
    for peer in neighbours:
        yield Send(peer, Box.COMPUTE, sent.values, sent.weight)
    return sent
