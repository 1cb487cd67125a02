"""A clock that jumps: what is to happen, in the order of time and, at the same moment, of foresight.

The idea of a heap of moments is SimPy's (simpy.readthedocs.io). Here the heap holds each moment once, as a bare number,
and beside it who acts then: thousands of equal ranks act at the same moment.
"""

from __future__ import annotations

import math
from heapq import heappop, heappush
from typing import Any, Protocol

from lasgd.errors import ConfigurationError


class Actor(Protocol):
    """Something that happens."""

    act: Any
    """Called with the actor itself, when its moment has come."""


class Clock:
    """Virtual time, and what is to come."""

    __slots__ = ("_at", "_moments", "is_stopped", "now_s")

    def __init__(self) -> None:
        self.now_s = 0.0
        self.is_stopped = False
        self._moments: list[float] = []
        self._at: dict[float, Any] = {}  # one actor, or a list of several

    def at(self, time_s: float, actor: Actor) -> None:
        """Lets `actor` act at `time_s`, after all that is to happen then already.

        Raises ConfigurationError for a moment that never comes, or is past.
        """
        there = self._at.setdefault(time_s, actor)
        if there is actor:
            if not self.now_s <= time_s < math.inf:
                raise ConfigurationError(
                    f"virtual time {self.now_s:g} s: something would happen at {time_s:g} s. Expected step times from "
                    "0 s on, and rounds that end."
                )
            heappush(self._moments, time_s)
        elif type(there) is list:
            there.append(actor)
        else:
            self._at[time_s] = [there, actor]

    def run(self) -> None:
        """Until nothing is to come, or `stop`."""
        moments, at = self._moments, self._at
        while moments and not self.is_stopped:
            self.now_s = time_s = heappop(moments)
            actors = at.pop(time_s)
            if type(actors) is list:
                for actor in actors:
                    if self.is_stopped:
                        return
                    actor.act(actor)
            else:
                actors.act(actors)

    def stop(self) -> None:
        """Nothing acts any more but who is acting just now. A signal handler may call it."""
        self.is_stopped = True
