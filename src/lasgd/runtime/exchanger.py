"""The second background thread of algorithms whose ranks write to each other: runs their `exchange`.

It owns the box for exchanges. What goes wrong here becomes the communicator's `failure`, which the training thread
meets at its next step boundary. It never dies quietly: `ended` is always set.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Generator

from lasgd.algorithms.requests import Answer, NextExchange, Receive, Request, Send, Stop
from lasgd.errors import LasgdError, ProtocolError
from lasgd.pace import Pace
from lasgd.runtime.communicator import Communicator, Record
from lasgd.runtime.postbox import LOOK_S, Postbox


class Exchanger(threading.Thread):
    """One rank's exchanger."""

    def __init__(
        self,
        algorithm: Generator[Request, Answer, None],
        postbox: Postbox,
        pace: Pace,
        communicator: Communicator,
        record: Record,
        rank: int,
    ):
        super().__init__(name=f"lasgd-exchanger-{rank}", daemon=True)
        self.ended = threading.Event()
        self._algorithm, self._postbox, self._pace = algorithm, postbox, pace
        self._communicator, self._record = communicator, record
        self._wake: queue.SimpleQueue[None] = queue.SimpleQueue()  # see Communicator
        self._has_begun = False
        self._closing = threading.Event()
        self._due_s: float | None = None

    def begin(self) -> None:
        """Training thread, its signal handlers too: the first gradient is there, exchanges may begin."""
        if not self._has_begun:
            self._has_begun = True
            self._wake.put(None)

    def close(self) -> None:
        """Training thread: leave at the next opportunity."""
        self._closing.set()
        self.begin()

    @property
    def is_closing(self) -> bool:
        """This rank is being closed, by force or because it is done."""
        return self._closing.is_set()

    def run(self) -> None:
        """The thread's body."""
        self._wake.get()  # ended by begin() or close(), which leaving the `with` block calls
        try:
            answer: Answer = None
            while not self._closing.is_set():
                try:
                    request = self._algorithm.send(answer)
                except StopIteration:
                    return
                answer = self._answer(request)
        except LasgdError as error:
            self._communicator.fail(error)
        except BaseException as error:  # whatever it is, the training thread must hear of it
            where = self._communicator.where()
            wrapped = ProtocolError(f"{where}: the exchanger stopped: {type(error).__name__}: {error}")
            wrapped.__cause__ = error
            self._communicator.fail(wrapped)
        finally:
            self._algorithm.close()
            self.ended.set()

    def _answer(self, request: Request) -> Answer:
        if isinstance(request, Send):
            return self._postbox.send(request)
        if isinstance(request, Receive):
            begin_s = time.monotonic()
            answer = self._postbox.wait_receive(request)
            if not isinstance(answer, Stop) and answer.values is not None:
                self._record("exchange", begin_s, time.monotonic())
            return answer
        if isinstance(request, NextExchange):
            return self._wait_due(request.not_before_s)
        raise ProtocolError(f"the exchanger cannot answer {type(request).__name__}")

    def _wait_due(self, not_before_s: float) -> Stop | None:
        now_s = time.monotonic()
        self._due_s = now_s if self._due_s is None else max(now_s, self._due_s + not_before_s)
        while True:
            if self._pace.end is not None or self._communicator.failure is not None or self._closing.is_set():
                return Stop()
            left_s = self._due_s - time.monotonic()
            if left_s <= 0:
                return None
            self._closing.wait(min(left_s, LOOK_S))
