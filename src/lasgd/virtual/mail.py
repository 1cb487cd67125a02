"""What the activities of virtual ranks ask for beside local steps and rounds: messages, and when to exchange.

request          answered
Send             at once; the message is under way (post.py)
Receive          when a message is there; Stop when the end is agreed and none is, if it is asked so
NextExchange     not_before_s after the latest one was due, the first one with the rank's first gradient; Stop when
                 the end is agreed
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

from lasgd.algorithms.requests import Answer, Message, NextExchange, Receive, Send, Stop
from lasgd.virtual.clock import Clock
from lasgd.virtual.network_models import Network
from lasgd.virtual.post import HEAD_BYTES, Letter, Post, links_for_messages
from lasgd.virtual.process import Moment, Process


class Waiting:
    """In place of an answer: it will come."""


WAITING = Waiting()


class Driver(Protocol):
    """Who runs the activities."""

    def advance(self, process: Process, answer: Answer = None) -> None:
        """Resumes an activity with what it has waited for."""
        ...

    def begin_to_wait(self, process: Process) -> None:
        """`compute` stands still from now on."""
        ...

    def end_to_wait(self, process: Process, is_stopped: bool = False) -> None:
        """It goes on from here; `is_stopped`: it will not finish its local step."""
        ...


class Mail:
    """All ranks' messages."""

    def __init__(self, clock: Clock, network: Network, vector_bytes: int, driver: Driver):
        self._clock, self._driver = clock, driver
        self._post = Post(clock, links_for_messages(network, vector_bytes), self._arrive)
        self._boxes: tuple[Sequence[Process], ...] = ()

    def open(self, compute: Sequence[Process], exchange: Sequence[Process]) -> None:
        """Says whose the boxes are, by rank, in the order of `Box`."""
        self._boxes = (compute, exchange)

    def ask(self, process: Process, request: object) -> Answer | Waiting:
        """Carries a request out. WAITING where the answer comes later, None of a Send; LookupError for others."""
        if isinstance(request, Send):
            return self._send(process, request)
        if isinstance(request, Receive):
            return self._receive(process, request)
        if isinstance(request, NextExchange):
            return self._wait_due(process, request)
        raise LookupError

    def end(self) -> None:
        """The end is agreed: nobody waits any more but for what must come."""
        for processes in self._boxes:
            for process in processes:
                asked = process.receiving
                if process.due is not None:
                    process.due = None
                    self._driver.advance(process, Stop())
                elif asked is not None and asked.until_end:
                    process.receiving = None
                    if process.is_compute:
                        self._driver.end_to_wait(process, is_stopped=True)
                    self._driver.advance(process, Stop())

    def close(self) -> None:
        """The run is over."""
        self._post.close()

    def waiting(self) -> list[tuple[int, int | None]]:
        """(rank, for whom) of each activity that waits for a message."""
        return [(p.index, p.receiving.peer) for box in self._boxes for p in box if p.receiving is not None]

    # Messages

    def _send(self, process: Process, request: Send) -> None:
        values = None if request.values is None else request.values.clone()
        message = Message(process.index, values, request.weight, request.note)
        n_bytes = HEAD_BYTES + (0 if values is None else values.nbytes)
        if request.peer != process.index:
            process.rank.bytes_sent += n_bytes
        self._post.send(request.peer, request.to, message, n_bytes)

    def _receive(self, process: Process, request: Receive) -> Message | Stop | Waiting:
        message = _taken(process.inbox, request.peer)
        if message is not None:
            return message
        if request.until_end and process.pace.end is not None:
            return Stop()
        process.receiving, process.waits_since_s = request, self._clock.now_s
        if process.is_compute:
            self._driver.begin_to_wait(process)
        return WAITING

    def _arrive(self, letter: Letter) -> None:
        process, message = self._boxes[letter.box][letter.target], letter.message
        if process.has_ended:
            return
        asked = process.receiving
        if asked is None or asked.peer not in (None, message.source):
            if process.inbox is None:
                process.inbox = deque()
            process.inbox.append(message)
            return
        process.receiving = None
        if process.is_compute:
            self._driver.end_to_wait(process)
        elif process.record is not None and message.values is not None and process.waits_since_s is not None:
            process.record(process.index, "exchange", process.waits_since_s, self._clock.now_s)
        self._driver.advance(process, message)

    # Exchanges

    def _wait_due(self, process: Process, request: NextExchange) -> Stop | Waiting:
        if process.pace.end is not None:
            return Stop()
        due = process.due = Moment(self._due_of(process))
        compute = self._boxes[0][process.index]
        if process.due_s is not None:
            self._clock.at(max(self._clock.now_s, process.due_s + request.not_before_s), due)
        elif process.tally.local_steps or compute.gradient_of >= 0:
            self._clock.at(self._clock.now_s, due)
        else:
            compute.first_gradient = [*(compute.first_gradient or ()), (due, 0.0)]
        return WAITING

    def _due_of(self, process: Process) -> Callable[[Moment], None]:
        def is_due(moment: Moment) -> None:
            if process.due is moment:  # else the end came first
                process.due, process.due_s = None, self._clock.now_s
                self._driver.advance(process)

        return is_due


def _taken(inbox: deque[Message] | None, peer: int | None) -> Message | None:
    """Out of the inbox: the first message from `peer`, from anybody if None."""
    if not inbox:
        return None
    if peer is None:
        return inbox.popleft()
    for place, message in enumerate(inbox):
        if message.source == peer:
            del inbox[place]
            return message
    return None
