"""The virtual-time driver: runs an algorithm's own text on every rank of a cluster, on a clock of its own.

    cluster = Cluster(lasgd.compute, lasgd.communicate, ranks, [pace], all_reduce_s, vector_bytes)
    cluster.run()

Each rank is two processes, the algorithm's `compute` and `communicate` generators; what they ask for takes virtual
time, and the clock jumps from one moment to the next. `clock.py` keeps what is to come: things at the same moment
happen in the order in which they were foreseen, so the same input gives the same run.

    request          answered
    Gradient         after the rank's next duration
    Update           at once; the optimizer's own time is part of the duration
    NextRound        not_before_s after the latest mean arrived here, but not before the rank's first gradient
    AllReduceMean    all_reduce_s after the last rank has joined, on all ranks at the same time; gradients sooner, by
                     what their buckets overlap with the backward pass

All ranks share one agreement (`Pace`): its conclusions are equal on all ranks by construction, and it takes in each
round once. Ranks that agree on nothing have one each.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from struct import Struct
from typing import Any, Protocol

import torch
from torch import Tensor

from lasgd.algorithms.requests import AllReduceMean, Answer, Gradient, Mean, NextRound, Request, Update
from lasgd.errors import ConfigurationError, ProtocolError
from lasgd.group.cost import ring_bytes_sent
from lasgd.pace import Column, Pace, header_row
from lasgd.tally import Tally
from lasgd.virtual.buckets import NO_OVERLAP, Buckets
from lasgd.virtual.clock import Clock

Text = Callable[[Any, Pace], Generator[Request, Answer, None]]
"""`compute` or `communicate` of an algorithm."""

AllReduceSeconds = Callable[[int, float], float]
"""(bytes, share of the whole vector) -> seconds, from when the last rank has joined."""

Record = Callable[[int, str, float, float], None]
"""(rank, kind, begin_s, end_s): `compute`, `round`, `wait`, `update`, as real runs record them."""


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


class Means(Protocol):
    """Who keeps means of the replicas, for evaluation: lasgd.runtime.means.MeanKeeper."""

    def is_wanted(self, pace: Pace) -> bool:
        """Somebody would use a mean of this moment."""
        ...

    def take(self, begin: int, values: Tensor, pace: Pace) -> None:
        """One round's mean of the elements from `begin` on. Copies what it needs."""
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


class _Process:
    """One generator of one rank, and what the driver remembers of it."""

    __slots__ = (
        "act",
        "arrived_s",
        "duration_s",
        "first_gradient",
        "index",
        "is_compute",
        "joined_s",
        "next_duration",
        "pace",
        "rank",
        "record",
        "request",
        "round_parts",
        "round_s",
        "send",
        "since_s",
        "tally",
        "work",
    )

    def __init__(
        self,
        index: int,
        rank: Rank,
        pace: Pace,
        is_compute: bool,
        text: Generator[Request, Answer, None],
        act: Callable[[_Process], None],
        record: Record | None,
    ):
        self.act = act  # when its moment has come
        self.record = record
        self.index, self.rank, self.pace, self.is_compute = index, rank, pace, is_compute
        self.send, self.next_duration, self.tally = text.send, rank.durations.__next__, rank.tally
        self.work = rank.work
        self.duration_s = 0.0  # of the step under way or just done
        self.since_s: float | None = None  # when it went on after waiting within the present step
        self.first_gradient: tuple[_Process, float] | None = None  # who waits for it, and how long after it
        self.request: AllReduceMean | None = None  # what it has joined with, and since when it waits
        self.joined_s = 0.0
        self.arrived_s: float | None = None  # when its latest mean came
        self.round_s, self.round_parts = 0.0, 0


class _Arrival:
    """The end of an all-reduce."""

    __slots__ = ("act", "joined")

    def __init__(self, act: Callable[[_Arrival], None], joined: Sequence[_Process]):
        self.act, self.joined = act, joined  # by rank


_ROW = Struct(f"{len(Column)}d")


class Cluster:
    """Runs one algorithm on all ranks, once."""

    def __init__(
        self,
        compute: Text,
        communicate: Text | None,
        ranks: Sequence[Rank],
        paces: Sequence[Pace],
        all_reduce_s: AllReduceSeconds,
        vector_bytes: int,
        record: Record | None = None,
        recorded_ranks: int | None = None,
        means: Means | None = None,
        buckets: Buckets = NO_OVERLAP,
    ):
        """`paces` has one agreement, for all ranks, or one for each. Raises ConfigurationError without any rank.

        `record` is told of the first `recorded_ranks` ranks only (None: of all).
        `buckets`: how gradients are cut for their all-reduce, which then overlaps with the backward pass.
        """
        if not ranks:
            raise ConfigurationError("a cluster needs at least one rank")
        self.clock = Clock()
        self.ended_s: float | None = None
        """When the end was agreed, or `stop` asked for it; on ranks that agree on nothing, when the first one ended."""
        self.was_stopped = False
        """`stop` came before the end."""
        self.rounds = 0
        self.ranks = ranks
        self._compute, self._communicate = compute, communicate
        self._paces, self._all_reduce_s, self._vector_bytes = paces, all_reduce_s, vector_bytes
        self._record, self._means, self._buckets = record, means, buckets
        self._recorded_ranks = len(ranks) if recorded_ranks is None else recorded_ranks
        self._processes: list[_Process] = []  # of compute, by rank
        self._joining: list[_Process | None] = [None] * len(ranks)  # by rank
        self._n_joined = 0
        self._bytes_sent = 0  # by each rank, in all-reduces
        self._ready_s = 0.0  # when the last rank had the first bucket of its gradients
        self._averages_gradients = False
        self._table = torch.zeros(len(ranks), len(Column), dtype=torch.float64)
        self._rows: Any = self._table.numpy().data.cast("B")

    @property
    def now_s(self) -> float:
        """Virtual seconds since the start."""
        return self.clock.now_s

    def run(self) -> None:
        """Until every rank has ended, or `stop`. Raises ProtocolError where ranks wait for each other for ever."""
        with _collecting_nothing(all(rank.work is None for rank in self.ranks)):
            self._begin()
            self.clock.run()
        if self.clock.is_stopped:
            self._leave_all()
            return
        waiting = [process.index for process in self._processes if process.first_gradient is not None]
        if self._n_joined or waiting:
            raise ProtocolError(self._deadlock(waiting))
        self._forget_processes()
        for rank in self.ranks:
            rank.replica.show_average()  # where the text has left one to be shown

    def stop(self) -> None:
        """Ends `run` at the present moment, without a last exact average. A signal handler may call it.

        Not by the ranks' agreement, as in real runs: the next round may be hours of computing away.
        """
        self.clock.stop()

    def _leave_all(self) -> None:
        self.was_stopped = True
        self.ended_s = self.clock.now_s
        for process in self._processes:
            if process.rank.left_s is None:
                self._close(process)
        self._forget_processes()

    def _forget_processes(self) -> None:
        """They know this cluster, and a cycle would keep all ranks until somebody looks for it."""
        self._processes.clear()
        for rank in self.ranks:
            rank.bytes_sent += self._bytes_sent

    def _begin(self) -> None:
        for rank in self.ranks:
            rank.tally.start_clock(0.0)
        for text, act in ((self._compute, self._gradient_is_there), (self._communicate, self._advance)):
            if text is None:
                continue
            processes = [self._process(index, text, act) for index in range(len(self.ranks))]
            self._processes = self._processes or processes
            for process in processes:
                self._advance(process)

    def _process(self, index: int, text: Text, act: Callable[[_Process], None]) -> _Process:
        rank, pace = self.ranks[index], self._paces[index % len(self._paces)]
        record = self._record if index < self._recorded_ranks else None
        return _Process(index, rank, pace, text is self._compute, text(rank.replica, pace), act, record)

    # Processes

    def _gradient_is_there(self, process: _Process) -> None:
        """The end of a gradient's duration."""
        if process.work is not None:
            process.work.gradient()
        if process.first_gradient is not None:
            waiting, after_s = process.first_gradient
            process.first_gradient = None
            self.clock.at(self.clock.now_s + after_s, waiting)
        self._advance(process)

    def _advance(self, process: _Process, answer: Answer = None) -> None:
        """Resumes a process, and answers at once what takes no time."""
        send = process.send
        try:
            request = send(answer)
            while type(request) is Update:
                self._update(process)
                request = send(None)
        except StopIteration:
            self._close(process)
            return
        if type(request) is Gradient:
            if process.pace.end is not None:
                self._close(process)
                return
            if process.work is not None:
                process.work.begin()
            process.duration_s = duration_s = process.next_duration()
            self.clock.at(self.clock.now_s + duration_s, process)
        elif isinstance(request, NextRound):
            self._wait_due(process, request)
        elif isinstance(request, AllReduceMean):
            self._join(process, request)
        else:
            raise ProtocolError(f"rank {process.index}: nobody can answer {type(request).__name__} in virtual time")

    def _update(self, process: _Process) -> None:
        now_s, tally = self.clock.now_s, process.tally
        if process.work is not None:
            process.work.update(process.pace.progress)
        if process.record is not None:
            if process.since_s is None:
                process.record(process.index, "compute", tally.boundary_s, now_s)
            else:
                process.record(process.index, "update", process.since_s, now_s)
        process.since_s = None
        tally.count_step(now_s)
        if self._averages_gradients and process.index == 0 and self._means is not None:
            self._keep_common_replica(process)

    def _keep_common_replica(self, process: _Process) -> None:
        """Where gradients are averaged replicas do not differ, and each is the mean."""
        assert self._means is not None
        if self._means.is_wanted(process.pace):
            replica = process.rank.replica
            self._means.take(0, replica.snapshot(replica.fragments[0]).values, process.pace)

    def _close(self, process: _Process) -> None:
        tally = process.tally
        if process.is_compute:
            process.rank.left_s, process.rank.compute_s = self.clock.now_s, tally.boundary_s - tally.waited_s
            tally.has_left = True
        self._note_end(process.pace)

    def _note_end(self, pace: Pace) -> None:
        if self.ended_s is None and pace.end is not None:
            self.ended_s = self.clock.now_s

    # Rounds

    def _wait_due(self, process: _Process, request: NextRound) -> None:
        now_s = self.clock.now_s
        if process.arrived_s is not None:
            self.clock.at(max(process.arrived_s + request.not_before_s, now_s), process)
        elif process.tally.local_steps or process.rank.left_s is not None:
            self.clock.at(now_s + request.not_before_s, process)
        else:
            self._processes[process.index].first_gradient = (process, request.not_before_s)

    def _join(self, process: _Process, request: AllReduceMean) -> None:
        index, now_s, replica, sent = process.index, self.clock.now_s, process.rank.replica, request.sent
        row = header_row(process.tally, sent.weight, replica.is_sitting_out, process.round_s, process.round_parts)
        _ROW.pack_into(self._rows, index * _ROW.size, *row)
        process.round_parts = len(replica.fragments)
        process.request, process.joined_s = request, now_s
        if sent.is_gradient:
            before_s = self._buckets.ready_before_end_s(sent.values.nbytes, process.duration_s)
            self._ready_s = max(self._ready_s, now_s - before_s)
            if process.record is not None:
                process.record(index, "compute", process.tally.boundary_s, now_s)
        self._joining[index] = process
        self._n_joined += 1
        if self._n_joined == len(self.ranks):
            self._all_have_joined()

    def _all_have_joined(self) -> None:
        joined: list[Any] = self._joining
        self._joining = [None] * len(self.ranks)
        self._n_joined = 0
        sizes = {process.request.sent.values.nbytes for process in joined}
        if len(sizes) > 1:
            raise ProtocolError(f"round {self.rounds + 1}: ranks contribute vectors of {sorted(sizes)} bytes")
        (n_bytes,) = sizes
        now_s = self.clock.now_s
        end_s = now_s + self._seconds(n_bytes)
        if joined[0].request.sent.is_gradient:
            last_bytes = self._buckets.last_bytes(n_bytes)
            end_s = min(end_s, max(now_s + self._seconds(last_bytes), self._ready_s + end_s - now_s))
            self._ready_s = 0.0
        self.clock.at(end_s, _Arrival(self._deliver, joined))

    def _seconds(self, n_bytes: int) -> float:
        return self._all_reduce_s(n_bytes + self._table.nbytes, n_bytes / self._vector_bytes)

    def _deliver(self, arrival: _Arrival) -> None:
        joined = arrival.joined
        now_s, advance = self.clock.now_s, self._advance
        self.rounds += 1
        requests: list[Any] = [process.request for process in joined]
        mean = Mean(_mean(requests), self._table)
        first = requests[0]
        if self._means is not None and isinstance(mean.values, Tensor):
            self._averages_gradients = first.sent.is_gradient
            if not first.exact and not first.sent.is_gradient:
                self._means.take(first.sent.begin, mean.values, self._paces[0])
        self._bytes_sent += ring_bytes_sent(first.sent.values.nbytes + self._table.nbytes, len(joined))
        for process in joined:
            process.arrived_s, process.round_s = now_s, now_s - process.joined_s
            if process.record is not None:
                process.record(process.index, "round", process.joined_s, now_s)
            if process.is_compute:
                self._has_waited(process, first.sent.is_gradient)
            advance(process, mean)
        self._note_end(joined[0].pace)

    def _has_waited(self, process: _Process, within_a_step: bool) -> None:
        now_s, joined_s = self.clock.now_s, process.joined_s
        process.tally.waited_s += now_s - joined_s
        if process.record is not None:
            process.record(process.index, "wait", joined_s, now_s)
        if within_a_step:
            process.since_s = now_s
        else:
            process.tally.start_clock(now_s)

    def _deadlock(self, waiting_for_gradient: Sequence[int]) -> str:
        joined = [process.index for process in self._joining if process is not None]
        missing = [index for index, process in enumerate(self._joining) if process is None]
        lines = [f"virtual time {self.now_s:g} s: nothing can happen any more."]
        if joined:
            lines.append(f"{_ranks(joined)} in round {self.rounds + 1} wait for {_ranks(missing)}.")
        if waiting_for_gradient:
            lines.append(f"{_ranks(waiting_for_gradient)} wait for their own first gradient.")
        return " ".join(lines)


def _mean(requests: Sequence[AllReduceMean]) -> Any:
    """The weighted mean, summed in the order of ranks; None where all weights are 0; a size where nothing else is."""
    first = requests[0].sent.values
    if not isinstance(first, Tensor):
        return first
    contributions = [request.sent for request in requests]
    weight = sum(contribution.weight for contribution in contributions)
    if not weight:
        return None
    total = torch.zeros_like(first)
    for contribution in contributions:
        if contribution.weight:
            total.add_(contribution.values, alpha=contribution.weight)
    return total.div_(weight)


@contextmanager
def _collecting_nothing(is_wanted: bool) -> Iterator[None]:
    """Python's search for cycles visits every process again and again, and here are none to find."""
    was_enabled = gc.isenabled()
    if is_wanted:
        gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _ranks(ranks: Sequence[int], most: int = 8) -> str:
    shown = ", ".join(map(str, ranks[:most]))
    more = f" and {len(ranks) - most} more" if len(ranks) > most else ""
    return ("rank " if len(ranks) == 1 else "ranks ") + shown + more
