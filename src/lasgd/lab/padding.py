"""Padding of local steps, so that few cores can stand for many machines, some of them slow.

The training thread calls `begin()` before forward and `wait_rest()` after backward; the step boundary is not padded.
Where gradients are averaged during the backward pass it also calls `wait_moment()` when a part of them is ready.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable

from lasgd.errors import ProtocolError
from lasgd.lab.conditions import Condition
from lasgd.stalls import is_stalled


def stall_s(condition: Condition, seed: int, rank: int, local_step: int) -> float:
    """Seconds for which `rank` stalls in its step number `local_step`: a pure function of its arguments."""
    stalls = is_stalled(condition.stall_probability, seed, rank, local_step)
    return condition.stall_s if stalls else 0.0


class StepPadding:
    """Makes forward and backward of one rank last as long as the condition says. Used by the training thread only.

    With `step=` they last step_s times the rank's straggler factor; with a straggler factor alone, that many times the
    time they took. A stall comes on top of either. Where the computing of a step alone outlasts step_s times the factor
    the step counts as an overrun: it is as long as it is, and the rates of the run stand for nothing if many are.

    A slower machine is slower from a step's beginning to its end. So with `wait_moment()` the step is stretched in
    proportion: what is ready after u seconds of a step that computes for c in all stands for the moment
    u * (padded length / c), and nothing that begins with it (an all-reduce) may begin sooner. c is not known yet
    then: the median of the latest nine steps stands for it, and the first step is stretched at its end alone. A stall
    comes at the step's beginning, so before all such moments.

    Time in which forward or backward stood still for the network, as `waited_s` tells, is no computing: it is neither
    stretched nor padded, and makes no step outlast its padding.

    A step is timed on the host: on a GPU wait for the device before `wait_moment()` and `wait_rest()`.
    """

    steps: int
    """Steps padded so far by this object."""
    overruns: int
    """How many of them outlasted their padding."""

    def __init__(
        self,
        condition: Condition,
        rank: int,
        world_size: int,
        seed: int,
        *,
        local_step: int = 0,
        waited_s: Callable[[], float] = lambda: 0.0,
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """`local_step` is the number of the next step: above 0 in a resumed run, so that its stalls carry on.
        `waited_s` counts the seconds in which forward and backward passes have stood still for the network.

        Raises ConfigurationError if the condition names a rank that is not among `world_size`.
        """
        condition.check(world_size)
        self.steps = 0
        self.overruns = 0
        self._condition = condition
        self._rank = rank
        self._seed = seed
        self._local_step = local_step
        self._factor = condition.factor(rank, world_size)
        self._idle = condition.step_s is None and self._factor == 1.0 and condition.stall_probability == 0.0
        self._clock = clock
        self._sleep = sleep
        self._waited_s = waited_s
        self._begun_s: float | None = None
        self._waited_before_s = 0.0  # of `waited_s`, at the beginning of the step
        self._slept_s = 0.0  # within the step
        self._stalled_s = 0.0
        self._recent_s: deque[float] = deque(maxlen=9)  # seconds of computing of the latest steps

    @property
    def is_idle(self) -> bool:
        """Nothing is padded."""
        return self._idle

    @property
    def overrun_share(self) -> float:
        """Share of the steps that outlasted their padding, 0.0 before the first step."""
        return self.overruns / self.steps if self.steps else 0.0

    def begin(self) -> None:
        """Marks the beginning of a step's forward pass; calling it again before `wait_rest()` begins afresh."""
        if not self._idle:
            self._begun_s, self._waited_before_s, self._slept_s = self._clock(), self._waited_s(), 0.0
            self._stalled_s = stall_s(self._condition, self._seed, self._rank, self._local_step)

    def wait_moment(self) -> None:
        """Between `begin()` and `wait_rest()`: sleeps until the moment that the present point of the step stands for.

        Outside of a step it does nothing.
        """
        if self._begun_s is None:
            return
        computed_s = self._computed_s(self._begun_s)
        self._sleep_to(self._begun_s, max(computed_s, self._moment_s(computed_s)))

    def _moment_s(self, computed_s: float) -> float:
        if self._condition.step_s is None:
            return computed_s * self._factor
        if not self._recent_s:
            return computed_s
        padded_s = self._condition.step_s * self._factor
        return min(padded_s, computed_s * padded_s / statistics.median(self._recent_s))

    def _computed_s(self, begun_s: float) -> float:
        """Seconds of this step's own computing up to now."""
        return self._clock() - begun_s - self._slept_s - self._network_s()

    def _network_s(self) -> float:
        return self._waited_s() - self._waited_before_s

    def _sleep_to(self, begun_s: float, length_s: float) -> None:
        """Until the step has lasted for `length_s`, its stall, and its waiting for the network."""
        # The deadline is absolute, from the step's own beginning, so that a late wake-up lengthens one step and is not
        # carried into the next. time.sleep on Linux wakes 0.1 ms late where a core is free (median; 0.2 ms at the 90th
        # percentile), and milliseconds late where none is: a busy wait would take a core from the other ranks.
        deadline_s = begun_s + self._network_s() + self._stalled_s + length_s
        asleep_s = now_s = self._clock()
        while (left_s := deadline_s - now_s) > 0:
            self._sleep(left_s)
            now_s = self._clock()
        self._slept_s += now_s - asleep_s

    def wait_rest(self) -> None:
        """After the backward pass: sleeps for what is left of the step. Raises ProtocolError without a `begin()`."""
        if self._idle:
            self.steps += 1
            return
        if self._begun_s is None:
            raise ProtocolError(f"rank {self._rank}: wait_rest() without begin() at local step {self._local_step}")
        computed_s = self._computed_s(self._begun_s)
        if self._condition.step_s is None:
            least_s = computed_s * self._factor
        else:
            least_s = self._condition.step_s * self._factor
            self.overruns += computed_s > least_s
        self._sleep_to(self._begun_s, max(computed_s, least_s))
        self._recent_s.append(computed_s)
        self.steps += 1
        self._local_step += 1
        self._begun_s = None
