"""AD-PSGD: asynchronous gossip, in which pairs of ranks average their replicas while all compute.

Source: X. Lian, W. Zhang, C. Zhang, J. Liu, "Asynchronous Decentralized Parallel Stochastic Gradient Descent" (2018),
arXiv 1710.06952, algorithm 1 and its appendix on deadlock.

    local step   x_i <- optimizer(x_i, g_i)            compute, for ever
    boundary     x_i <- x_i + r_i ;  r_i <- 0

    pair         an even (active) rank i draws one of its odd (passive) neighbours j, at most once every local step
    average      m = (s_i + s_j) / 2                   of z = x + r of both at that moment, sent both ways at once
    correct      r_i <- r_i + (m - s_i), and j alike

Averaging a pair is atomic: both correct by the same m, and what they learn meanwhile is kept by the residual, as in
lasgd.py. It cannot deadlock: an active rank has asked one passive rank and waits for it alone; a passive rank asks
nobody, and averages with one rank at a time, which has asked for it.

Differences with the paper: both ranks of a pair send when the passive one is free, which takes half the time of asking
with the whole replica; a rank's exchanges keep the median rank's pace, and do not wait for its own local steps; any
optimizer; the exact average at the agreed end, before which all exchanges are completed.
"""

from __future__ import annotations

import random
from collections.abc import Generator
from dataclasses import dataclass
from enum import IntEnum

from lasgd.algorithms import topology
from lasgd.algorithms.ending import last_exact_average
from lasgd.algorithms.mixing import WeightedMean
from lasgd.algorithms.requests import (
    Answer,
    Box,
    ExchangeEnded,
    Gradient,
    NextExchange,
    Receive,
    Request,
    Send,
    Stop,
    Update,
)
from lasgd.pace import End, Pace
from lasgd.replica import Replica


@dataclass(frozen=True)
class Settings:
    """Of AD-PSGD."""

    topology: str = "complete"  # only its edges between an even and an odd rank count

    def __post_init__(self) -> None:
        topology.check(self.topology)


class Word(IntEnum):
    """What a message without values says."""

    ASK = 1  # active: average with me
    YES = 2  # passive: here is my replica, send yours
    BYE = 3  # active: I shall ask no more


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
    """The exchanger's part."""
    rank = replica.tally.rank
    partners = topology.partners(settings.topology, rank, pace.world_size)
    if rank % 2:
        yield from _be_passive(replica, set(partners))
    elif partners:
        yield from _be_active(replica, pace, partners)


def _be_active(replica: Replica, pace: Pace, partners: tuple[int, ...]) -> Generator[Request, Answer, None]:
    draw = random.Random(replica.tally.rank)
    while not isinstance((yield NextExchange(pace.pause_s)), Stop):
        peer = draw.choice(partners)
        yield Send(peer, Box.EXCHANGE, note=Word.ASK)
        if isinstance((yield Receive(peer)), Stop):
            return
        yield from _average_with(peer, replica)
    for peer in partners:
        yield Send(peer, Box.EXCHANGE, note=Word.BYE)


def _be_passive(replica: Replica, asking: set[int]) -> Generator[Request, Answer, None]:
    while asking:
        asked = yield Receive()
        if isinstance(asked, Stop):
            return
        if asked.note == Word.BYE:
            asking.discard(asked.source)
            continue
        yield Send(asked.source, Box.EXCHANGE, note=Word.YES)
        yield from _average_with(asked.source, replica)


def _average_with(peer: int, replica: Replica) -> Generator[Request, Answer, None]:
    (whole,) = replica.fragments
    sent = replica.snapshot(whole)
    yield Send(peer, Box.EXCHANGE, sent.values, sent.weight)
    message = yield Receive(peer)
    if isinstance(message, Stop):
        return
    both = WeightedMean(sent, 0.5)
    both.add(message, 0.5)
    replica.correct(whole, sent, both.mean())
    replica.tally.exchanges += 1
