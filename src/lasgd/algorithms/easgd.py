"""EASGD, elastic averaging SGD: workers and a centre pull at each other.

Source: S. Zhang, A. Choromanska, Y. LeCun, "Deep learning with Elastic Averaging SGD" (2015), arXiv 1412.6651,
algorithm 1 (asynchronous).

    worker i     x_i <- optimizer(x_i, g_i)            H times
                 sends x_i to the server and waits for c
                 x_i <- x_i - alpha (x_i - c)
    server       c   <- c + alpha (x_i - c)            in the order of arrival; answers with c before that

alpha is `pull`, in the paper 0.9 / n, which is the default; H is `pace.local_steps_between_rounds`, in the paper 10 and
more. The server is a thread of rank 0. Difference with the paper: the run ends with the exact average of the replicas,
where the paper takes the centre.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

from lasgd.algorithms.ending import last_exact_average
from lasgd.algorithms.parameter_server import SERVER
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
from lasgd.errors import ConfigurationError
from lasgd.pace import End, Pace
from lasgd.replica import Replica


@dataclass(frozen=True)
class Settings:
    """Of EASGD."""

    pull: float | None = None  # alpha, above 0 to 1; None: 0.9 / n

    def __post_init__(self) -> None:
        if self.pull is not None and not 0 < self.pull <= 1:
            raise ConfigurationError(f"pull should be above 0 and at most 1, got {self.pull!r}")

    def alpha(self, world_size: int) -> float:
        """The share of their distance by which worker and centre move."""
        return 0.9 / world_size if self.pull is None else self.pull


def compute(replica: Replica, pace: Pace, settings: Settings) -> Generator[Request, Answer, None]:
    """The training thread's part: the worker."""
    yield from _work(replica, pace, settings.alpha(pace.world_size))
    yield ExchangeEnded()
    if pace.end in (End.SAMPLES, End.LEFT):
        yield from last_exact_average(replica, pace)


def _work(replica: Replica, pace: Pace, alpha: float) -> Generator[Request, Answer, None]:
    (whole,) = replica.fragments
    yield Gradient()  # from here on nobody but this algorithm changes the replica
    if replica.tally.rank == SERVER:
        yield Send(SERVER, Box.EXCHANGE, replica.snapshot(whole).values)  # where the centre begins
    yield Update()
    steps = pace.local_steps_between_rounds - 1
    while pace.end is None:
        for _ in range(steps):
            yield Gradient()
            yield Update()
        sent = replica.snapshot(whole)
        yield Send(SERVER, Box.EXCHANGE, sent.values, sent.weight)
        message = yield Receive(SERVER, until_end=True)
        if isinstance(message, Stop):
            return
        pulled = sent.values.clone().lerp_(message.values, alpha if sent.weight else 1.0)
        replica.correct(whole, sent, Mean(pulled))
        replica.merge()
        replica.tally.exchanges += 1
        steps = pace.local_steps_between_rounds


def exchange(replica: Replica, pace: Pace, settings: Settings) -> Generator[Request, Answer, None]:
    """The exchanger's part: the server, on one rank."""
    if replica.tally.rank != SERVER:
        return
    alpha = settings.alpha(pace.world_size)
    beginning = yield Receive(SERVER, until_end=True)
    if isinstance(beginning, Stop):
        return
    centre = beginning.values
    while True:
        message = yield Receive(until_end=True)
        if isinstance(message, Stop):
            return
        yield Send(message.source, Box.COMPUTE, centre)
        if message.weight:
            centre.lerp_(message.values, alpha)
