"""Padding of local steps, so that few cores can stand for many machines, some of them slow.

The training thread calls `begin()` before forward and `wait_rest()` after backward; the step boundary is not padded.
"""

from __future__ import annotations

import time
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

    A step is timed on the host: on a GPU wait for the backward pass to be done before `wait_rest()`.
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
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """`local_step` is the number of the next step: above 0 in a resumed run, so that its stalls carry on.

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
        self._begun_s: float | None = None

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
            self._begun_s = self._clock()

    def wait_rest(self) -> None:
        """After the backward pass: sleeps for what is left of the step. Raises ProtocolError without a `begin()`."""
        if self._idle:
            self.steps += 1
            return
        if self._begun_s is None:
            raise ProtocolError(f"rank {self._rank}: wait_rest() without begin() at local step {self._local_step}")
        computed_s = self._clock() - self._begun_s
        if self._condition.step_s is None:
            least_s = computed_s * self._factor
        else:
            least_s = self._condition.step_s * self._factor
            self.overruns += computed_s > least_s
        stalled_s = stall_s(self._condition, self._seed, self._rank, self._local_step)
        # The deadline is absolute, from the step's own beginning, so that a late wake-up lengthens one step and is not
        # carried into the next. time.sleep on Linux wakes 0.1 ms late where a core is free (median; 0.2 ms at the 90th
        # percentile), and milliseconds late where none is: a busy wait would take a core from the other ranks.
        deadline_s = self._begun_s + max(computed_s, least_s) + stalled_s
        while (left_s := deadline_s - self._clock()) > 0:
            self._sleep(left_s)
        self.steps += 1
        self._local_step += 1
        self._begun_s = None
