"""The phases of one rank's averaging, and the moves between them.

    ready ──start──> running ──agree_end──> ending ──average──> averaged ──close──> closed
      │                 │                      │                                      ^
      │                 └───────fail───────────┴──> failed ───────────close───────────┤
      └──────────────────────────────close─────────────────────────────────────────────┘

`start` and `close` are the training thread's, the others the communicator's: those may come late, when the training
thread has closed already, and then change nothing.
"""

from __future__ import annotations

import threading
from enum import Enum

from lasgd.errors import ProtocolError


class Phase(Enum):
    """Where the averaging of this rank stands."""

    READY = "ready"
    RUNNING = "running"
    ENDING = "ending"
    AVERAGED = "averaged"
    FAILED = "failed"
    CLOSED = "closed"


MOVES: dict[tuple[Phase, str], Phase] = {
    (Phase.READY, "start"): Phase.RUNNING,
    (Phase.READY, "close"): Phase.CLOSED,
    (Phase.RUNNING, "agree_end"): Phase.ENDING,
    (Phase.RUNNING, "fail"): Phase.FAILED,
    (Phase.RUNNING, "close"): Phase.CLOSED,
    (Phase.ENDING, "average"): Phase.AVERAGED,
    (Phase.ENDING, "fail"): Phase.FAILED,
    (Phase.ENDING, "close"): Phase.CLOSED,
    (Phase.AVERAGED, "close"): Phase.CLOSED,
    (Phase.FAILED, "close"): Phase.CLOSED,
    (Phase.CLOSED, "close"): Phase.CLOSED,
    (Phase.CLOSED, "agree_end"): Phase.CLOSED,
    (Phase.CLOSED, "average"): Phase.CLOSED,
    (Phase.CLOSED, "fail"): Phase.CLOSED,
}
"""Every legal move; whatever is not here raises."""


class PhaseTable:
    """The present phase. Any thread may move it; an illegal move raises ProtocolError and changes nothing."""

    def __init__(self, who: str):
        self._who = who
        self._phase = Phase.READY
        self._lock = threading.Lock()

    @property
    def now(self) -> Phase:
        """The present phase."""
        return self._phase

    def move(self, event: str, round_: int) -> Phase:
        """Takes the move; returns the new phase."""
        with self._lock:
            if (self._phase, event) not in MOVES:
                raise ProtocolError(f"{self._who}: round {round_}: {event!r} cannot happen when {self._phase.value}")
            self._phase = MOVES[self._phase, event]
            return self._phase
