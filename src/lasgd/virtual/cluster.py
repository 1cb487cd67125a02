"""The virtual-time driver: runs an algorithm's own text on every rank of a cluster, on a clock of its own.

    cluster = Cluster(lasgd.compute, lasgd.communicate, ranks, [pace], all_reduce_s, vector_bytes)
    cluster.run()

Each rank is two or three processes, the algorithm's `compute`, `communicate` and `exchange` generators; what they ask
for takes virtual time, and the clock jumps from one moment to the next. `clock.py` keeps what is to come: things at the
same moment happen in the order in which they were foreseen, so the same input gives the same run.

    request          answered
    Gradient         after the rank's next duration
    Update           at once; the optimizer's own time is part of the duration
    NextRound        not_before_s after the latest mean arrived here, but not before the rank's first gradient
    AllReduceMean    all_reduce_s after the last rank has joined, on all ranks at the same time; gradients sooner, by
                     what their buckets overlap with the backward pass
    Begin            at once; what it has begun goes on as AllReduceMean does
    Join             when that is over, at once if it is
    ExchangeEnded    when the rank's `exchange` is over
    messages         see mail.py

All ranks share one agreement (`Pace`): its conclusions are equal on all ranks by construction, and it takes in each
round once. Ranks that agree on nothing have one each. Where ranks write to each other the local steps that would begin
after the agreed end are not taken, and what `compute` does instead of them takes no time.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from struct import Struct
from typing import Any, Protocol

import torch
from torch import Tensor

from lasgd.algorithms.requests import (
    AllReduceMean,
    Answer,
    Begin,
    ExchangeEnded,
    Gradient,
    Join,
    Mean,
    NextRound,
    Update,
)
from lasgd.errors import ConfigurationError, ProtocolError
from lasgd.group.cost import ring_bytes_sent
from lasgd.pace import Column, Pace, header_row
from lasgd.virtual.buckets import NO_OVERLAP, Buckets
from lasgd.virtual.clock import Clock
from lasgd.virtual.mail import WAITING, Mail, Waiting
from lasgd.virtual.network_models import Network
from lasgd.virtual.own_pace import OwnPace
from lasgd.virtual.process import Arrival, Moment, Process, Rank, Record, Text, Work
from lasgd.virtual.spread import mean_replica
from lasgd.wire import CodedMean, Wire, piece_bytes

__all__ = ["AllReduceSeconds", "Cluster", "Means", "Rank", "Record", "Text", "Work"]

AllReduceSeconds = Callable[[int, float], float]
"""(bytes, share of the whole vector) -> seconds, from when the last rank has joined."""


class Means(Protocol):
    """Who keeps means of the replicas, for evaluation: lasgd.runtime.means.MeanKeeper."""

    def is_wanted(self, pace: Pace) -> bool:
        """Somebody would use a mean of this moment."""
        ...

    def take(self, begin: int, values: Tensor, pace: Pace) -> None:
        """One round's mean of the elements from `begin` on. Copies what it needs."""
        ...


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
        exchange: Text | None = None,
        messages_over: Network | None = None,
        wire: Wire | None = None,
    ):
        """`paces` has one agreement, for all ranks, or one for each. Raises ConfigurationError without any rank.

        `record` is told of the first `recorded_ranks` ranks only (None: of all).
        `buckets`: how gradients are cut for their all-reduce, which then overlaps with the backward pass.
        `messages_over`: what carries the messages that ranks write to each other; None: they write none.
        `wire`: the format in which means travel, but for those that are asked for exactly; None: as they are.
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
        self._compute, self._communicate, self._exchange = compute, communicate, exchange
        self._paces, self._all_reduce_s, self._vector_bytes = paces, all_reduce_s, vector_bytes
        self._record, self._means, self._buckets = record, means, buckets
        self._recorded_ranks = len(ranks) if recorded_ranks is None else recorded_ranks
        self._processes: list[Process] = []  # of compute, by rank
        self._exchanging: list[Process] = []  # of exchange, by rank; empty where there is none
        self._writes_messages = messages_over is not None
        self._mail = None if messages_over is None else Mail(self.clock, messages_over, vector_bytes, self)
        self._wire, self._coded = wire, self._coded_means(wire)
        self._joining: list[Process | None] = [None] * len(ranks)  # by rank
        self._n_joined = 0
        self._bytes_sent = 0  # by each rank, in all-reduces
        self._ready_s = 0.0  # when the last rank had the first bucket of its gradients
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
        receiving = [] if self._mail is None else self._mail.waiting()
        if self._n_joined or waiting or receiving:
            raise ProtocolError(self._deadlock(waiting, receiving))
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
        if self._mail is not None:
            self._mail.close()
        self._processes, self._exchanging, self._mail = [], [], None
        for rank in self.ranks:
            rank.bytes_sent += self._bytes_sent

    def _begin(self) -> None:
        for rank in self.ranks:
            rank.tally.start_clock(0.0)
        act = self._gradient_is_there if self._mail is None else self._gradient_before_messages
        computing = self._processes = self._processes_of(self._compute, act)
        communicating = self._processes_of(self._communicate, self.advance)
        exchanging = self._exchanging = self._processes_of(self._exchange, self.advance)
        if self._mail is not None:
            self._mail.open(computing, exchanging)
        for process in (*computing, *communicating, *exchanging):
            self.advance(process)

    def _processes_of(self, text: Text | None, act: Callable[[Process], None]) -> list[Process]:
        return [] if text is None else [self._process(index, text, act) for index in range(len(self.ranks))]

    def _process(self, index: int, text: Text, act: Callable[[Process], None]) -> Process:
        rank, pace = self.ranks[index], self._paces[index % len(self._paces)]
        if self._communicate is None:
            pace = OwnPace(pace)
        record = self._record if index < self._recorded_ranks else None
        return Process(index, rank, pace, text is self._compute, text(rank.replica, pace), act, record)

    # Processes

    def _gradient_is_there(self, process: Process) -> None:
        """The end of a gradient's duration."""
        if process.work is not None:
            process.work.gradient()
        if process.first_gradient is not None:
            waiting, process.first_gradient = process.first_gradient, None
            for actor, after_s in waiting:
                self.clock.at(self.clock.now_s + after_s, actor)
        self.advance(process)

    def _gradient_before_messages(self, process: Process) -> None:
        process.gradient_of = process.tally.local_steps
        self._gradient_is_there(process)

    def advance(self, process: Process, answer: Answer = None) -> None:
        """Resumes a process, and answers at once what takes no time."""
        send = process.send
        try:
            request = send(answer)
            while True:
                if type(request) is Gradient:
                    if process.pace.end is None:
                        break
                    if not self._writes_messages:
                        self._close(process)
                        return
                    self._leave(process)
                    answer = None
                elif type(request) is Update:
                    self._update(process)
                    answer = None
                else:
                    answer = self._ask(process, request)
                    if answer is WAITING:
                        return
                request = send(answer)
        except StopIteration:
            self._close(process)
            return
        if process.work is not None:
            process.work.begin()
        process.duration_s = duration_s = process.next_duration()
        self.clock.at(self.clock.now_s + duration_s, process)

    def _ask(self, process: Process, request: Any) -> Answer | Waiting:
        if isinstance(request, NextRound):
            return self._wait_due(process, request)
        if isinstance(request, AllReduceMean):
            return self._join(process, request)
        if isinstance(request, Begin):
            process.is_travelling = True
            self._join(process, request.request)
            return None
        if isinstance(request, Join):
            return self._wait_arrival(process)
        if isinstance(request, ExchangeEnded):
            return self._wait_exchange_ended(process)
        if self._mail is not None:
            with suppress(LookupError):
                return self._mail.ask(process, request)
        raise ProtocolError(f"rank {process.index}: nobody can answer {type(request).__name__} in virtual time")

    def _update(self, process: Process) -> None:
        if process.rank.left_s is not None:
            return  # of a step that was not taken
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

    def _wait_exchange_ended(self, process: Process) -> Waiting | None:
        """`compute` asks for it when it takes no more local steps."""
        self._leave(process)
        if not self._exchanging or self._exchanging[process.index].has_ended:
            return None
        process.waits_since_s = self.clock.now_s
        return WAITING

    def _leave(self, process: Process) -> None:
        """Takes no more local steps."""
        rank, tally = process.rank, process.tally
        if rank.left_s is None:
            rank.left_s, rank.compute_s = self.clock.now_s, tally.boundary_s - tally.waited_s
            tally.has_left = True

    def _close(self, process: Process) -> None:
        process.has_ended = True
        if process.is_compute:
            self._leave(process)
        elif self._exchanging and process is self._exchanging[process.index]:
            self._exchange_has_ended(process)
        self._note_end(process.pace)

    def _exchange_has_ended(self, process: Process) -> None:
        computing = self._processes[process.index]
        if computing.rank.left_s is not None and computing.waits_since_s is not None:
            computing.waits_since_s = None
            self.advance(computing)

    def _note_end(self, pace: Pace) -> None:
        if self.ended_s is None and pace.end is not None:
            self.ended_s = self.clock.now_s
            if self._mail is not None:
                self.clock.at(self.clock.now_s, Moment(self._end_waiting))

    def _end_waiting(self, moment: Moment) -> None:
        if self._mail is not None:
            self._mail.end()

    # Rounds

    def _coded_means(self, wire: Wire | None) -> list[CodedMean]:
        """One for each rank that computes; as many at the start as in a real run, with rank 0's values."""
        replicas = [rank.replica for rank in self.ranks if rank.work is not None]
        if wire is None or not replicas:
            return []
        first = replicas[0].parameters()
        return [CodedMean(wire, index, len(replicas), first.clone()) for index in range(len(replicas))]

    def _wait_due(self, process: Process, request: NextRound) -> Waiting:
        now_s = self.clock.now_s
        if process.arrived_s is not None:
            self.clock.at(max(process.arrived_s + request.not_before_s, now_s), process)
        elif process.tally.local_steps or process.rank.left_s is not None:
            self.clock.at(now_s + request.not_before_s, process)
        else:
            computing = self._processes[process.index]
            computing.first_gradient = [*(computing.first_gradient or ()), (process, request.not_before_s)]
        return WAITING

    def _join(self, process: Process, request: AllReduceMean) -> Waiting:
        index, now_s, replica, sent = process.index, self.clock.now_s, process.rank.replica, request.sent
        row = header_row(process.tally, sent.weight, replica.health, process.round_s, process.round_parts)
        _ROW.pack_into(self._rows, index * _ROW.size, *row)
        process.round_parts = len(replica.fragments)
        process.request, process.joined_s = request, now_s
        if request.exact and process.is_compute:
            self._leave(process)
        if sent.is_gradient:
            before_s = self._buckets.ready_before_end_s(sent.values.nbytes, process.duration_s)
            self._ready_s = max(self._ready_s, now_s - before_s)
            if process.record is not None:
                process.record(index, "compute", process.tally.boundary_s, now_s)
        self._joining[index] = process
        self._n_joined += 1
        if self._n_joined == len(self.ranks):
            self._all_have_joined()
        return WAITING

    def _all_have_joined(self) -> None:
        joined: list[Any] = self._joining
        self._joining = [None] * len(self.ranks)
        self._n_joined = 0
        sizes = {process.request.sent.values.nbytes for process in joined}
        if len(sizes) > 1:
            raise ProtocolError(f"round {self.rounds + 1}: ranks contribute vectors of {sorted(sizes)} bytes")
        n_bytes = self._travelling_bytes(joined[0].request)
        now_s = self.clock.now_s
        if joined[0].request.exact:
            self._note_end(joined[0].pace)
        end_s = now_s + self._seconds(n_bytes)
        if joined[0].request.sent.is_gradient:
            last_bytes = self._buckets.last_bytes(n_bytes)
            end_s = min(end_s, max(now_s + self._seconds(last_bytes), self._ready_s + end_s - now_s))
            self._ready_s = 0.0
        self.clock.at(end_s, Arrival(self._deliver, joined))

    def _travelling_bytes(self, request: AllReduceMean) -> int:
        """As an all-reduce's; with a wire format the codes of all pieces together."""
        values, n = request.sent.values, len(self.ranks)
        if self._wire is None or request.exact:
            return values.nbytes
        return n * piece_bytes(self._wire, values.numel(), n)

    def _seconds(self, n_bytes: int) -> float:
        return self._all_reduce_s(n_bytes + self._table.nbytes, n_bytes / self._vector_bytes)

    def _deliver(self, arrival: Arrival) -> None:
        joined = arrival.joined
        now_s = self.clock.now_s
        self.rounds += 1
        requests: list[Any] = [process.request for process in joined]
        first, is_travelling = requests[0], joined[0].is_travelling
        if self._coded and not first.exact and first.sent.values.numel():
            mean = Mean(_coded_mean(self._coded, requests), self._table, is_coded=True)
        else:
            mean = Mean(_mean(requests), self._table)
        waits = joined[0].is_compute and not first.exact and not is_travelling
        if not waits and not first.exact:
            self._keep_mean(first, mean)
        self._bytes_sent += ring_bytes_sent(self._travelling_bytes(first) + self._table.nbytes, len(joined))
        for process in joined:
            process.arrived_s, process.round_s = now_s, now_s - process.joined_s
            if process.record is not None:
                process.record(process.index, "round", process.joined_s, now_s)
            if is_travelling:
                self._has_travelled(process, mean)
                continue
            if waits:
                self._has_waited(process, process.joined_s, first.sent.is_gradient)
            self.advance(process, mean)
        if is_travelling:
            return  # who reads it later knows the end later
        self._note_end(joined[0].pace)
        if not first.exact and (waits or self._writes_messages):
            self._keep_replica()

    def _wait_arrival(self, process: Process) -> Mean | Waiting:
        """The end of the round that this process has begun."""
        outcome, process.outcome = process.outcome, None
        if outcome is None:
            process.waits_since_s = self.clock.now_s
            return WAITING
        return outcome

    def _has_travelled(self, process: Process, mean: Mean) -> None:
        process.is_travelling = False
        since_s, process.waits_since_s = process.waits_since_s, None
        if since_s is None:
            process.outcome = mean
        else:
            self._has_waited(process, since_s, within_a_step=False)
            self.advance(process, mean)

    def _has_waited(self, process: Process, since_s: float, within_a_step: bool) -> None:
        now_s = self.clock.now_s
        process.tally.waited_s += now_s - since_s
        if process.record is not None:
            process.record(process.index, "wait", since_s, now_s)
        if within_a_step:
            process.since_s = now_s
        else:
            process.tally.start_clock(now_s)

    def begin_to_wait(self, process: Process) -> None:
        """`compute` waits for a message."""
        if process.record is not None and process.since_s is None and process.gradient_of == process.tally.local_steps:
            process.record(process.index, "compute", process.tally.boundary_s, self.clock.now_s)

    def end_to_wait(self, process: Process, is_stopped: bool = False) -> None:
        """The message is there; or it never will be, and what is done of the local step is dropped."""
        since_s, process.waits_since_s = process.waits_since_s, None
        if since_s is not None and process.rank.left_s is None:
            within_a_step = process.gradient_of == process.tally.local_steps
            self._has_waited(process, since_s, within_a_step and not is_stopped)

    # Means, for evaluation

    def _keep_mean(self, request: AllReduceMean, mean: Mean) -> None:
        """Of a round that no rank waited for: replicas were equal to it at no moment."""
        if self._means is not None and isinstance(mean.values, Tensor) and mean.values.numel():
            self._means.take(request.sent.begin, mean.values, self._paces[0])

    def _keep_replica(self) -> None:
        """After a round: the replica, where all are equal now; else their mean."""
        if self._means is None or not self._means.is_wanted(self._paces[0]):
            return
        replicas = [rank.replica for rank in self.ranks]
        vector = mean_replica(replicas) if self._writes_messages else replicas[0].parameters()
        self._means.take(0, vector, self._paces[0])

    def _deadlock(self, waiting_for_gradient: Sequence[int], receiving: Sequence[tuple[int, int | None]] = ()) -> str:
        joined = [process.index for process in self._joining if process is not None]
        missing = [index for index, process in enumerate(self._joining) if process is None]
        lines = [f"virtual time {self.now_s:g} s: nothing can happen any more."]
        if joined:
            lines.append(f"{_ranks(joined)} in round {self.rounds + 1} wait for {_ranks(missing)}.")
        if waiting_for_gradient:
            lines.append(f"{_ranks(waiting_for_gradient)} wait for their own first gradient.")
        for rank, peer in receiving[:8]:
            lines.append(f"rank {rank} waits for a message from {'anybody' if peer is None else f'rank {peer}'}.")
        return " ".join(lines)


def _mean(requests: Sequence[AllReduceMean]) -> Any:
    """The weighted mean, summed in the order of ranks; None where all weights are 0; a size where nothing else is."""
    first = requests[0].sent.values
    if not isinstance(first, Tensor):
        return first
    if not first.numel():  # the header alone
        return first if any(request.sent.weight for request in requests) else None
    contributions = [request.sent for request in requests]
    weight = sum(contribution.weight for contribution in contributions)
    if not weight:
        return None
    total = torch.zeros_like(first)
    for contribution in contributions:
        if contribution.weight:
            total.add_(contribution.values, alpha=contribution.weight)
    return total.div_(weight)


def _coded_mean(coded: Sequence[CodedMean], requests: Sequence[AllReduceMean]) -> Tensor | None:
    """The same by way of a wire format: each rank's part of it in turn, the pieces handed on in memory."""
    contributions = [request.sent for request in requests]
    weight = sum(contribution.weight for contribution in contributions)
    codes = [c.outgoing(sent.values, sent.weight, sent.begin)[0] for c, sent in zip(coded, contributions, strict=True)]
    if not weight:
        return None
    received = [torch.stack([row[index] for row in codes]) for index in range(len(coded))]
    pieces = torch.stack(
        [
            c.reduce(sent.values, rows, weight).clone()
            for c, sent, rows in zip(coded, contributions, received, strict=True)
        ]
    )
    means = [
        c.finish(sent.values, sent.weight, sent.begin, pieces) for c, sent in zip(coded, contributions, strict=True)
    ]
    return means[0]


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
