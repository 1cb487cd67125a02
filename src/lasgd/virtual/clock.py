"""A clock that jumps: what is to happen, in the order of time and, at the same moment, of foresight.

The idea of a heap of moments is SimPy's (simpy.readthedocs.io). Here the heap holds each moment once, as a bare number,
and beside it who acts then: thousands of equal ranks act at the same moment.

Where ranks are thousands and unequal, a heap of all their moments lies all over the memory. So only the near ones are
in it, those of one window; later windows are unordered lists, as in a calendar (R. Brown (1988), Calendar queues,
Communications of the ACM 31(10)).
"""

from __future__ import annotations

import math
from heapq import heapify, heappop, heappush
from typing import Any, Protocol

from lasgd.errors import ConfigurationError

NEAR = 128
"""So many moments of one window are about as many as a processor keeps at hand."""

MOST_NEAR = 1024
"""Above it the windows are too wide."""


class Actor(Protocol):
    """Something that happens."""

    act: Any
    """Called with the actor itself, when its moment has come."""


class Clock:
    """Virtual time, and what is to come."""

    __slots__ = ("_at", "_later", "_moments", "_width_s", "_window", "_windows", "is_stopped", "now_s")

    def __init__(self) -> None:
        self.now_s = 0.0
        self.is_stopped = False
        self._moments: list[float] = []
        self._at: dict[float, Any] = {}  # one actor, or a list of several
        self._width_s = 0.0  # of a window; 0: there is one for all
        self._window = 0  # number of the present one
        self._later: dict[int, list[float]] = {}  # moments by window
        self._windows: list[int] = []  # a heap of the numbers in _later

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
            if self._width_s and int(time_s / self._width_s) > self._window:
                self._keep(int(time_s / self._width_s), time_s)
            else:
                heappush(self._moments, time_s)
        elif type(there) is list:
            there.append(actor)
        else:
            self._at[time_s] = [there, actor]

    def run(self) -> None:
        """Until nothing is to come, or `stop`."""
        moments, at = self._moments, self._at
        while not self.is_stopped:
            if not moments and not self._open_window():
                return
            if len(moments) > MOST_NEAR:
                self._divide()
            self.now_s = time_s = heappop(moments)
            actors = at.pop(time_s)
            if type(actors) is list:
                for actor in actors:
                    if self.is_stopped:
                        return
                    actor.act(actor)
            else:
                actors.act(actors)

    def _open_window(self) -> bool:
        """Takes the moments of the next window into the heap; False if there is none."""
        if not self._windows:
            return False
        self._window = heappop(self._windows)
        self._moments += self._later.pop(self._window)
        heapify(self._moments)
        return True

    def _divide(self) -> None:
        """Chooses windows anew, such that the nearest moments lie about NEAR to a window."""
        moments = sorted(self._moments)
        for later in self._later.values():
            moments += later
        self._later, self._windows = {}, []
        middle = MOST_NEAR // 2
        self._width_s = (moments[middle] - moments[0]) / middle * NEAR
        self._window = int(moments[0] / self._width_s)
        self._moments.clear()
        for time_s in moments:
            window = int(time_s / self._width_s)
            if window > self._window:
                self._keep(window, time_s)
            else:
                self._moments.append(time_s)
        heapify(self._moments)

    def _keep(self, window: int, time_s: float) -> None:
        there = self._later.get(window)
        if there is None:
            self._later[window] = [time_s]
            heappush(self._windows, window)
        else:
            there.append(time_s)

    def stop(self) -> None:
        """Nothing acts any more but who is acting just now. A signal handler may call it."""
        self.is_stopped = True
