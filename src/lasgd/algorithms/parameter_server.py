"""Asynchronous SGD with a parameter server: workers push what they have learnt and pull what all have.

Source: J. Dean et al., "Large Scale Distributed Deep Networks" (2012), Downpour SGD, as written down by S. Zhang,
A. Choromanska, Y. LeCun (2015), arXiv 1412.6651, algorithm 3; staleness-aware: W. Zhang, S. Gupta, X. Lian, J. Liu,
"Staleness-aware Async-SGD for Distributed Deep Learning" (2016), arXiv 1511.05950.

    worker i     x_i <- optimizer(x_i, g_i)          H times, from x_i = X as pulled
                 push u_i = x_i - X as pulled        the gradient times -lr, where the optimizer is plain SGD
    server       X <- X + u_i / tau_i                in the order of arrival
    worker i     pull X ;  x_i <- X                  waits for it

H is `pace.local_steps_between_rounds`, in the paper's terms n_push = n_fetch. tau_i is the number of the others'
updates that X took in between i's pull and i's push, its staleness, at least 1; without `staleness_aware` every update
counts in full. The server is a thread of rank 0, beside rank 0's worker, which never waits for a link. n workers take n
updates where synchronous SGD takes one of their mean: 1/n of its learning rate moves X as far per sample.

Differences with the sources: the optimizer is the worker's, so its momentum is the worker's own; one server holds the
whole vector; the agreed end, and an exact average of the workers' replicas at it.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

from lasgd.algorithms.ending import last_exact_average
from lasgd.algorithms.requests import (
    Answer,
    Box,
    ExchangeEnded,
    Gradient,
    Mean,
    Receive,
    Request,
    Send,
    Stop,
    Update,
)
from lasgd.pace import End, Pace
from lasgd.replica import Replica

SERVER = 0
"""The rank whose exchanger is the server."""


@dataclass(frozen=True)
class Settings:
    """Of the parameter server."""

    staleness_aware: bool = False  # divides an update by its staleness


def compute(replica: Replica, pace: Pace, settings: Settings) -> Generator[Request, Answer, None]:
    """The training thread's part: the worker."""
    yield from _work(replica, pace)
    yield ExchangeEnded()
    if pace.end in (End.SAMPLES, End.LEFT):
        yield from last_exact_average(replica, pace)


def _work(replica: Replica, pace: Pace) -> Generator[Request, Answer, None]:
    (whole,) = replica.fragments
    yield Gradient()  # from here on nobody but this algorithm changes the replica
    pulled, version = replica.snapshot(whole).values.clone(), 0
    if replica.tally.rank == SERVER:
        yield Send(SERVER, Box.EXCHANGE, pulled)  # what the server begins with
    yield Update()
    steps = pace.local_steps_between_rounds - 1
    while pace.end is None:
        for _ in range(steps):
            yield Gradient()
            yield Update()
        sent = replica.snapshot(whole)
        yield Send(SERVER, Box.EXCHANGE, sent.values.sub_(pulled), sent.weight, note=version)
        message = yield Receive(SERVER, until_end=True)
        if isinstance(message, Stop):
            return
        replica.tally.staleness.add(message.note - version - 1)
        replica.tally.exchanges += 1
        pulled, version = message.values, message.note
        replica.adopt(whole, Mean(pulled))
        replica.show_average()
        steps = pace.local_steps_between_rounds


def exchange(replica: Replica, pace: Pace, settings: Settings) -> Generator[Request, Answer, None]:
    """The exchanger's part: the server, on one rank."""
    if replica.tally.rank != SERVER:
        return
    beginning = yield Receive(SERVER, until_end=True)
    if isinstance(beginning, Stop):
        return
    parameters, version = beginning.values, 0
    while True:
        push = yield Receive(until_end=True)
        if isinstance(push, Stop):
            return
        if push.weight:
            staleness = max(1, version - push.note) if settings.staleness_aware else 1
            parameters.add_(push.values, alpha=push.weight / staleness)
        version += 1
        yield Send(push.source, Box.COMPUTE, parameters, note=version)
