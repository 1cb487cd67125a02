"""A rank of the virtual cluster: what the caller brings, and its activities, one generator each."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from lasgd.algorithms.requests import AllReduceMean, Answer, Mean, Message, Receive, Request
from lasgd.pace import Pace
from lasgd.tally import Tally
from lasgd.virtual.clock import Actor

Text = Callable[[Any, Pace], Generator[Request, Answer, None]]
"""`compute`, `communicate` or `exchange` of an algorithm."""

Record = Callable[[int, str, float, float], None]
"""(rank, kind, begin_s, end_s): `compute`, `round`, `wait`, `update`, `exchange`, as real runs record them."""


class Work(Protocol):
    """What a rank really computes, where it does: gradients of its own model on its own data."""

    def begin(self) -> None:
        """The next gradient is asked for. Until `gradient` is called nobody changes the replica, so it may be computed
        meanwhile."""
        ...

    def gradient(self) -> None:
        """Forward and backward on the next batch, at the replica's present values: done when this returns."""
        ...

    def update(self, progress: float) -> None:
        """The optimizer's step. `progress`, 0 to 1, is the agreed one, for the learning rate."""
        ...


@dataclass(slots=True)
class Rank:
    """One rank of the cluster: what the caller brings, and what came of it."""

    replica: Any
    """A Replica or a TimingReplica."""
    durations: Iterator[float]
    """Seconds of its local steps, one after the other."""
    work: Work | None = None
    bytes_sent: int = 0
    compute_s: float = 0.0
    left_s: float | None = None
    """When it took its last local step."""

    @property
    def tally(self) -> Tally:
        """The rank's own counts."""
        return self.replica.tally


class Process:
    """One generator of one rank, and what the driver remembers of it."""

    __slots__ = (
        "act",
        "arrived_s",
        "due",
        "due_s",
        "duration_s",
        "first_gradient",
        "gradient_of",
        "has_ended",
        "inbox",
        "index",
        "is_compute",
        "is_travelling",
        "joined_s",
        "next_duration",
        "outcome",
        "pace",
        "rank",
        "receiving",
        "record",
        "request",
        "round_parts",
        "round_s",
        "send",
        "since_s",
        "tally",
        "waits_since_s",
        "work",
    )

    def __init__(
        self,
        index: int,
        rank: Rank,
        pace: Pace,
        is_compute: bool,
        text: Generator[Request, Answer, None],
        act: Callable[[Process], None],
        record: Record | None,
    ):
        self.act = act  # when its moment has come
        self.record = record
        self.index, self.rank, self.pace, self.is_compute = index, rank, pace, is_compute
        self.send, self.next_duration, self.tally = text.send, rank.durations.__next__, rank.tally
        self.work = rank.work
        self.has_ended = False
        self.duration_s = 0.0  # of the step under way or just done
        self.gradient_of = -1  # the local step whose gradient is there, where messages may come before its update
        self.since_s: float | None = None  # when it went on after waiting within the present step
        self.first_gradient: list[tuple[Actor, float]] | None = None  # who waits for it, and how long after it
        # Rounds
        self.request: AllReduceMean | None = None  # what it has joined with, and since when it is on its way
        self.joined_s = 0.0
        self.is_travelling = False  # it has begun that round, and not waited for its end
        self.outcome: Mean | None = None  # of a round that it has not asked for yet
        self.arrived_s: float | None = None  # when its latest mean came
        self.round_s, self.round_parts = 0.0, 0
        # What it waits for, and since when: the end of a round that it has begun, a message, its next exchange
        self.waits_since_s: float | None = None
        self.inbox: deque[Message] | None = None  # in the order of arrival
        self.receiving: Receive | None = None
        self.due: Actor | None = None
        self.due_s: float | None = None  # when its latest exchange was due


class Arrival:
    """The end of an all-reduce."""

    __slots__ = ("act", "joined")

    def __init__(self, act: Callable[[Arrival], None], joined: Sequence[Process]):
        self.act, self.joined = act, joined  # by rank


class Moment:
    """Something that is to happen once."""

    __slots__ = ("act",)

    def __init__(self, act: Callable[[Any], None]):
        self.act = act
