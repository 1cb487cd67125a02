"""The background thread: runs an algorithm's `communicate` over a group, or serves one that waits.

It owns the group, the round's flat buffer and the agreement (`Pace`). What goes wrong here becomes a value,
`failure`, that the training thread meets at its next step boundary. It never dies quietly: `ended` is always set.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Generator

from torch import Tensor

from lasgd.algorithms.requests import (
    AllReduceMean,
    Answer,
    Contribution,
    Failure,
    Mean,
    NextRound,
    Request,
    Stop,
)
from lasgd.errors import ConfigurationError, DivergenceError, LasgdError, PeerError, ProtocolError
from lasgd.group.base import Group, GroupWithPieces, Lane
from lasgd.health import Health
from lasgd.pace import Column, End, Pace
from lasgd.replica import Replica
from lasgd.runtime.means import MeanKeeper
from lasgd.runtime.phase import PhaseTable
from lasgd.wire import CodedMean

Record = Callable[[str, float, float], None]
"""(kind, begin_s, end_s), both of time.monotonic()."""


LOOK_S = 1.0
"""While the training thread waits for a round, how often it looks whether this thread is still there."""


class Communicator(threading.Thread):
    """One rank's communicator."""

    def __init__(
        self,
        algorithm: Generator[Request, Answer, None] | None,
        group: Group,
        replica: Replica,
        pace: Pace,
        phase: PhaseTable,
        means: MeanKeeper,
        timeout_s: float,
        start_timeout_s: float,
        record: Record,
        lane: Lane | None = None,
        serves_after: bool = False,
        coded: CodedMean | None = None,
    ):
        """`serves_after`: when the algorithm's part has ended, the training thread still has something to ask for.

        `coded`: means travel in its wire format, but for those that are asked for exactly.
        """
        super().__init__(name=f"lasgd-communicator-{group.rank}", daemon=True)
        self.failure: LasgdError | None = None
        self.ended = threading.Event()
        self.end_agreed_s: float | None = None
        """time.monotonic() of the round in which the end was agreed."""
        self._algorithm, self._group, self._replica, self._pace = algorithm, group, replica, pace
        self._phase, self._means, self._record = phase, means, record
        self._timeout_s, self._start_timeout_s = timeout_s, start_timeout_s
        # A signal's handler may call `begin` in the middle of another `begin`: SimpleQueue.put is made for that, while
        # Event.set takes a lock that the handler might find taken, by the very thread that it interrupts.
        self._wake: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._has_begun = False
        self._is_awake = False
        self._lane, self._serves_after, self._coded = lane, serves_after, coded
        self._failing = threading.Lock()
        self._asked: queue.SimpleQueue[tuple[AllReduceMean, bool] | None] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[Mean | Failure] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._arrived_s: float | None = None
        self._due_s: float | None = None
        self._round_s, self._round_parts = 0.0, 0
        self._buffer = replica.fences.host_buffer(0, replica.layout.dtype)

    def begin(self) -> None:
        """Training thread, its signal handlers too: the first gradient is there, rounds may begin.

        Until then the model may still be loaded.
        """
        if not self._has_begun:
            self._has_begun = True
            self._wake.put(None)

    def close(self) -> None:
        """Training thread: leave at the next opportunity, without the others' agreement."""
        self._closing.set()
        self.begin()
        self.finish()

    def ask(self, request: AllReduceMean, keeps_mean: bool = False) -> None:
        """Training thread: has the request carried out here, one at a time.

        `keeps_mean`: its mean is that of the replicas at no moment that the training thread could see.
        """
        self._asked.put((request, keeps_mean))

    @property
    def has_answer(self) -> bool:
        """`wait_answer` would not wait."""
        return not self._answers.empty()

    def wait_answer(self) -> Mean | Failure:
        """Training thread: the answer to what it has asked for.

        Ends because rounds do, each within its time-out, and because this thread never dies without an answer.
        """
        while True:
            try:
                return self._answers.get(timeout=LOOK_S)
            except queue.Empty:
                if self.ended.is_set() and self._answers.empty():
                    cause = self.failure or ProtocolError(f"{self.where()}: the communicator has ended")
                    return Failure(cause)

    def finish(self) -> None:
        """Training thread: it has come to its end and asks for nothing more."""
        self._asked.put(None)

    def run(self) -> None:
        """The thread's body."""
        try:
            if self._algorithm is None:
                self._serve()
            else:
                self._drive(self._algorithm)
                if self._serves_after:
                    self._note_end()
                    self._serve()
            if self.failure is None and not self._closing.is_set():
                self._note_end()
                self._raise_if_diverged()
                self._phase.move("average", self._pace.round)
        except LasgdError as error:
            self.fail(error)
        except BaseException as error:  # whatever it is, the training thread must hear of it
            wrapped = ProtocolError(f"{self.where()}: the communicator stopped: {type(error).__name__}: {error}")
            wrapped.__cause__ = error
            self.fail(wrapped)
        finally:
            if self._algorithm is not None:
                self._algorithm.close()
            self.ended.set()

    def _serve(self) -> None:
        """Carries out what the training thread hands over, until it has nothing more."""
        while (asked := self._wait_asked()) is not None:
            if self.failure is None and not self._closing.is_set():
                self._note_end()
            self._answers.put(self._all_reduce_mean(*asked))

    def _wait_asked(self) -> tuple[AllReduceMean, bool] | None:
        if self._lane is None:
            return self._asked.get()
        while True:
            try:
                return self._asked.get(timeout=LOOK_S)
            except queue.Empty:
                # The training thread may stand in a collective of DDP's own, which hears of neighbours only.
                if self.failure is None:
                    self._check_peers(self._lane)

    def _check_peers(self, lane: Lane) -> None:
        try:
            lane.check_peers()
        except PeerError as error:
            self.fail(PeerError(f"{self.where()}: {error}"))

    def _drive(self, algorithm: Generator[Request, Answer, None]) -> None:
        answer: Answer = None
        while True:
            try:
                request = algorithm.send(answer)
            except StopIteration:
                return
            self._note_end()
            answer = self._answer(request)

    def _answer(self, request: Request) -> Answer:
        if isinstance(request, NextRound):
            return self._wait_due(request.not_before_s)
        if isinstance(request, AllReduceMean):
            return self._all_reduce_mean(request, keeps_mean=True)
        raise ProtocolError(f"{self.where()}: the communicator cannot answer {type(request).__name__}")

    def _wait_due(self, not_before_s: float) -> Stop | None:
        if not self._is_awake:
            self._wake.get()  # ended by begin() or close(), which leaving the `with` block calls
            self._is_awake = True
        if self.failure is None:
            self._due_s = (self._arrived_s or time.monotonic()) + not_before_s
            self._closing.wait(max(0.0, self._due_s - time.monotonic()))
        return Stop() if self._closing.is_set() or self.failure is not None else None

    def _all_reduce_mean(self, request: AllReduceMean, keeps_mean: bool) -> Mean | Failure:
        if self.failure is not None:
            return Failure(self.failure)
        replica, sent = self._replica, request.sent
        if any(parameter.requires_grad for parameter in replica.layout.frozen):
            raise ConfigurationError(
                f"{self.where()}: a parameter that was frozen when lasgd.attach was called is trainable now, and "
                "would not be averaged. End this averaging and attach anew after unfreezing"
            )
        header = self._pace.header(
            self._group.rank,
            replica.tally,
            sent.weight,
            replica.health if sent.weight else replica.health or Health.NOT_FINITE,
            self._round_s,
            self._round_parts,
        )
        begin_s = time.monotonic()
        is_first = self._arrived_s is None
        try:
            timeout_s = self._start_timeout_s if is_first else self._timeout_s
            mean, arrived_s = self._wait_mean(request, header, timeout_s)
        except PeerError as error:
            self.fail(PeerError(f"{self.where()}: {error}"))
            return Failure(error)
        n = sent.values.numel()
        if self._lane is None and n:  # else the rounds are the lane's, or there is nothing but the header
            self._record("round", begin_s, arrived_s)
        # From when it was due, where a pace was kept: what it takes to wake up and to make the snapshot is part of a
        # round, or rounds would come later than agreed by just that.
        self._arrived_s, self._round_s = arrived_s, arrived_s - (self._due_s or begin_s)
        self._due_s = None
        self._round_parts = len(replica.fragments)
        if keeps_mean and not request.exact and n and mean.values is not None:
            self._means.take(sent.begin, mean.values, self._pace)
        return mean

    def _wait_mean(self, request: AllReduceMean, header: Tensor, timeout_s: float) -> tuple[Mean, float]:
        """The mean, and when it was here in seconds of time.monotonic(). Raises PeerError."""
        sent = request.sent
        if self._coded is not None and not request.exact and sent.values.numel():
            return self._wait_coded_mean(self._coded, sent, header, timeout_s)
        vector = self._vector(sent.values.numel()).copy_(sent.values)
        if sent.weight != 1.0:
            vector.mul_(sent.weight)
        _, arrived_s = self._group.wait_all_reduce(header, vector, timeout_s)
        weight = _weight(header)
        return Mean(vector.div_(weight) if weight else None, header), arrived_s

    def _wait_coded_mean(
        self, coded: CodedMean, sent: Contribution, header: Tensor, timeout_s: float
    ) -> tuple[Mean, float]:
        group, values = self._group, sent.values
        assert isinstance(group, GroupWithPieces)
        end_s = time.monotonic() + timeout_s
        codes, received = coded.outgoing(values, sent.weight, sent.begin)
        _, arrived_s = group.wait_all_to_all(header, codes, received, timeout_s)
        weight = _weight(header)
        if not weight:
            return Mean(None, header), arrived_s
        piece = coded.reduce(values, received, weight)
        arrived_s = group.wait_all_gather(piece, received, max(0.001, end_s - time.monotonic()))
        return Mean(coded.finish(values, sent.weight, sent.begin, received), header, is_coded=True), arrived_s

    def _vector(self, size: int):
        """The round's buffer: as large as the largest fragment, replaced only when the vector is cut anew."""
        if not size:
            return self._buffer[:0]
        largest = max(fragment.size for fragment in self._replica.fragments)
        if self._buffer.numel() != largest:
            self._buffer = self._replica.fences.host_buffer(largest, self._replica.layout.dtype)
        return self._buffer[:size]

    def _note_end(self) -> None:
        if self._pace.end is None or self.end_agreed_s is not None:
            return
        self.end_agreed_s = time.monotonic()
        self._phase.move("agree_end", self._pace.round)
        self._raise_if_diverged()

    def _raise_if_diverged(self) -> None:
        if self._pace.end is End.DIVERGED:
            raise DivergenceError(
                f"{self.where()}: every rank holds NaN or Inf, so no mean is left to recover from. "
                "Lower the learning rate, lengthen the warm-up or clip gradients; a checkpoint is of use only if it "
                "was cut before that"
            )

    def fail(self, error: LasgdError) -> None:
        """Any thread: what the training thread is to meet at its next step boundary; the first failure counts."""
        with self._failing:
            if self.failure is not None:
                return
            self.failure = error
            self._phase.move("fail", self._pace.round)
        if self._lane is not None:
            self._lane.leave()  # whoever waits for its collectives hears of it

    def where(self) -> str:
        """Rank and round, for messages."""
        return f"rank {self._group.rank} of {self._group.world_size}: round {self._pace.round + 1}"


def _weight(header: Tensor) -> float:
    """Of all contributions together."""
    return float(header.numpy()[:, Column.WEIGHT].sum())
