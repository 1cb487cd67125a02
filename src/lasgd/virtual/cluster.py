"""The virtual-time driver: runs an algorithm's own text on every rank of a cluster, on a clock of its own.

    cluster = Cluster(lasgd.compute, lasgd.communicate, ranks, [pace], all_reduce_s, vector_bytes)
    cluster.run()

Each rank is two processes, the algorithm's `compute` and `communicate` generators; what they ask for takes virtual
time, and the clock jumps from one event to the next. A heap of (time, order, what, process) holds what is to come;
`order` counts insertions, so events at the same time happen in the order in which they were foreseen, and the same
input gives the same run.

    request          answered
    Gradient         after the rank's next duration
    Update           at once; the optimizer's own time is part of the duration
    NextRound        not_before_s after the latest mean arrived here, but not before the rank's first gradient
    AllReduceMean    all_reduce_s after the last rank has joined, on all ranks at the same time

All ranks share one agreement (`Pace`): its conclusions are equal on all ranks by construction, and it takes in each
round once. Ranks that agree on nothing have one each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Any, Protocol

import torch

from lasgd.algorithms.requests import AllReduceMean, Answer, Gradient, Mean, NextRound, Request, Update
from lasgd.errors import ConfigurationError, ProtocolError
from lasgd.group.cost import ring_bytes_sent
from lasgd.pace import Column, Pace, header_row
from lasgd.tally import Tally

AllReduceSeconds = Callable[[int, float], float]
"""(bytes, share of the whole vector) -> seconds, from when the last rank has joined."""

Record = Callable[[int, str, float, float], None]
"""(rank, kind, begin_s, end_s): `compute`, `round`, `wait`, as real runs record them."""


class Work(Protocol):
    """What a rank really computes, where it does: gradients of its own model on its own data."""

    def gradient(self) -> None:
        """Forward and backward on the next batch, at the replica's present values."""
        ...

    def update(self, progress: float) -> None:
        """The optimizer's step. `progress`, 0 to 1, is the agreed one, for the learning rate."""
        ...


@dataclass
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


class _Process:
    """One generator of one rank."""

    __slots__ = ("arrived_s", "index", "is_compute", "pace", "rank", "round_parts", "round_s", "send")

    def __init__(self, index: int, rank: Rank, pace: Pace, is_compute: bool, text: Generator[Request, Answer, None]):
        self.index, self.rank, self.pace, self.is_compute = index, rank, pace, is_compute
        self.send = text.send
        self.arrived_s: float | None = None
        self.round_s, self.round_parts = 0.0, 0


_Joined = dict[int, tuple[_Process, AllReduceMean, float]]
"""By rank: who has joined an all-reduce, what it brings, and since when it waits."""

_STEP, _WAKE, _MEAN = range(3)


class Cluster:
    """Runs one algorithm on all ranks, once."""

    def __init__(
        self,
        compute: Callable[[Any, Pace], Generator[Request, Answer, None]],
        communicate: Callable[[Any, Pace], Generator[Request, Answer, None]] | None,
        ranks: Sequence[Rank],
        paces: Sequence[Pace],
        all_reduce_s: AllReduceSeconds,
        vector_bytes: int,
        record: Record | None = None,
    ):
        """`paces` has one agreement, for all ranks, or one for each. Raises ConfigurationError without any rank."""
        if not ranks:
            raise ConfigurationError("a cluster needs at least one rank")
        self.now_s = 0.0
        self.ended_s: float | None = None
        """When the end was agreed; on ranks that agree on nothing, when the first one ended."""
        self.rounds = 0
        self.ranks = ranks
        self._paces, self._all_reduce_s, self._vector_bytes, self._record = paces, all_reduce_s, vector_bytes, record
        self._heap: list[tuple[float, int, int, Any]] = []
        self._order = 0
        self._joining: _Joined = {}
        self._table = torch.zeros(len(ranks), len(Column), dtype=torch.float64)
        self._rows: list[tuple[float, ...]] = [()] * len(ranks)
        self._waiting_for_gradient: dict[int, tuple[_Process, float]] = {}
        self._compute, self._communicate = compute, communicate

    def run(self) -> None:
        """Until every rank has ended. Raises ProtocolError where ranks wait for each other for ever."""
        heap = self._heap
        for index, rank in enumerate(self.ranks):
            pace = self._paces[index % len(self._paces)]
            rank.tally.start_clock(0.0)
            self._advance(_Process(index, rank, pace, True, self._compute(rank.replica, pace)), None)
        if self._communicate is not None:
            for index, rank in enumerate(self.ranks):
                pace = self._paces[index % len(self._paces)]
                text = self._communicate(rank.replica, pace)
                self._advance(_Process(index, rank, pace, False, text), None)
        while heap:
            self.now_s, _, what, who = heappop(heap)
            if what == _STEP:
                self._gradient_is_there(who)
            elif what == _WAKE:
                self._advance(who, None)
            else:
                self._deliver(*who)
        if self._joining or self._waiting_for_gradient:
            raise ProtocolError(self._deadlock())
        for rank in self.ranks:
            rank.replica.show_average()  # where the text has left one to be shown

    # Processes

    def _advance(self, process: _Process, answer: Answer) -> None:
        """Resumes a process, and answers at once what takes no time."""
        send = process.send
        while True:
            try:
                request = send(answer)
            except StopIteration:
                self._close(process)
                return
            kind = type(request)
            if kind is Gradient:
                if process.pace.end is not None:
                    self._close(process)
                    return
                duration_s = next(process.rank.durations)
                process.rank.compute_s += duration_s
                self._at(self.now_s + duration_s, _STEP, process)
                return
            if kind is Update:
                self._update(process)
                answer = None
                continue
            if isinstance(request, NextRound):
                self._wait_due(process, request)
            elif isinstance(request, AllReduceMean):
                self._join(process, request)
            else:
                raise ProtocolError(f"rank {process.index}: nobody can answer {kind.__name__} in virtual time")
            return

    def _gradient_is_there(self, process: _Process) -> None:
        rank = process.rank
        if rank.work is not None:
            rank.work.gradient()
        waiting = self._waiting_for_gradient.pop(process.index, None)
        if waiting is not None:
            self._at(self.now_s + waiting[1], _WAKE, waiting[0])
        self._advance(process, None)

    def _update(self, process: _Process) -> None:
        rank = process.rank
        if rank.work is not None:
            rank.work.update(process.pace.progress)
        if self._record is not None:
            self._record(process.index, "compute", rank.tally.boundary_s, self.now_s)
        rank.tally.count_step(self.now_s)

    def _close(self, process: _Process) -> None:
        if process.is_compute:
            process.rank.left_s = self.now_s
            process.rank.tally.has_left = True
        if self.ended_s is None and process.pace.end is not None:
            self.ended_s = self.now_s

    # Rounds

    def _wait_due(self, process: _Process, request: NextRound) -> None:
        if process.arrived_s is None:
            if process.rank.tally.local_steps == 0 and process.rank.left_s is None:
                self._waiting_for_gradient[process.index] = (process, request.not_before_s)
                return
            due_s = self.now_s + request.not_before_s
        else:
            due_s = process.arrived_s + request.not_before_s
        self._at(max(due_s, self.now_s), _WAKE, process)

    def _join(self, process: _Process, request: AllReduceMean) -> None:
        index, replica = process.index, process.rank.replica
        self._rows[index] = header_row(
            replica.tally, request.sent.weight, replica.is_sitting_out, process.round_s, process.round_parts
        )
        process.round_parts = len(replica.fragments)
        joined = self._joining
        joined[index] = (process, request, self.now_s)
        if len(joined) < len(self.ranks):
            return
        self._joining = {}
        sizes = {one.sent.values.nbytes for _, one, _ in joined.values()}
        if len(sizes) > 1:
            raise ProtocolError(f"round {self.rounds + 1}: ranks contribute vectors of {sorted(sizes)} bytes")
        (n_bytes,) = sizes
        seconds = self._all_reduce_s(n_bytes + self._table.nbytes, n_bytes / self._vector_bytes)
        self._at(self.now_s + seconds, _MEAN, (joined, n_bytes))

    def _deliver(self, joined: _Joined, n_bytes: int) -> None:
        self.rounds += 1
        self._table.numpy()[:] = self._rows
        mean = Mean(_mean([joined[index][1] for index in range(len(self.ranks))]), self._table)
        sent_bytes = ring_bytes_sent(n_bytes + self._table.nbytes, len(self.ranks))
        for index in range(len(self.ranks)):
            process, _, joined_s = joined[index]
            process.arrived_s, process.round_s = self.now_s, self.now_s - joined_s
            process.rank.bytes_sent += sent_bytes
            if self._record is not None:
                self._record(index, "round", joined_s, self.now_s)
            if process.is_compute:
                process.rank.tally.waited_s += self.now_s - joined_s
            self._advance(process, mean)

    # The clock

    def _at(self, time_s: float, what: int, who: Any) -> None:
        if not time_s < math.inf:
            raise ConfigurationError(f"virtual time {self.now_s:g} s: something would take {time_s:g} s")
        self._order += 1
        heappush(self._heap, (time_s, self._order, what, who))

    def _deadlock(self) -> str:
        joined = sorted(self._joining)
        missing = sorted(set(range(len(self.ranks))) - set(joined))
        lines = [f"virtual time {self.now_s:g} s: nothing can happen any more."]
        if joined:
            lines.append(f"{_ranks(joined)} in round {self.rounds + 1} wait for {_ranks(missing)}.")
        if self._waiting_for_gradient:
            lines.append(f"{_ranks(sorted(self._waiting_for_gradient))} wait for their own first gradient.")
        return " ".join(lines)


def _mean(requests: Sequence[AllReduceMean]) -> Any:
    """The weighted mean, summed in the order of ranks; None where nothing was sent but sizes, or all weights are 0."""
    contributions = [request.sent for request in requests]
    if not isinstance(contributions[0].values, torch.Tensor):
        return contributions[0].values
    weight = sum(contribution.weight for contribution in contributions)
    if not weight:
        return None
    total = torch.zeros_like(contributions[0].values)
    for contribution in contributions:
        if contribution.weight:
            total.add_(contribution.values, alpha=contribution.weight)
    return total.div_(weight)


def _ranks(ranks: Sequence[int], most: int = 8) -> str:
    shown = ", ".join(map(str, ranks[:most]))
    more = f" and {len(ranks) - most} more" if len(ranks) > most else ""
    return ("rank " if len(ranks) == 1 else "ranks ") + shown + more
