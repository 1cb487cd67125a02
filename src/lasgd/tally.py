"""What one rank counts about itself: written by its training thread (exchanges in the background: by the exchanger),
read by its communicator for the header."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

RECENT_STEPS = 9
"""So many of the latest local steps say how long one takes."""


@dataclass(slots=True)
class Staleness:
    """Local steps between a snapshot and the merge of its correction, over all merges so far."""

    merges: int = 0
    total_steps: int = 0
    max_steps: int = 0
    histogram: dict[int, int] = field(default_factory=dict)
    """Staleness -> merges."""

    def add(self, steps: int) -> None:
        """Counts one merge of one fragment."""
        self.histogram[steps] = self.histogram.get(steps, 0) + 1
        self.merges += 1
        self.total_steps += steps
        self.max_steps = max(self.max_steps, steps)

    @property
    def mean_steps(self) -> float:
        """0 before the first merge."""
        return self.total_steps / self.merges if self.merges else 0.0


@dataclass(slots=True)
class Tally:
    """One rank's counters. Plain numbers: another thread reads either the old or the new one."""

    batch_size: int
    rank: int = 0
    """Whose counts these are."""
    local_steps: int = 0
    samples: int = 0
    waited_s: float = 0.0
    """Seconds in which the training thread stood still for the network, a lock or another rank."""
    staleness: Staleness = field(default_factory=Staleness)
    exchanges: int = 0
    """Times that the replica has taken in messages of other ranks; written by whoever runs that activity, alone."""
    has_left: bool = False
    """The rank takes no more local steps; its replica goes on answering as it is."""
    wants_stop: bool = False
    """The rank asks all ranks to end early (Ctrl-C)."""
    saved_checkpoint: int = 0
    """Number of the newest checkpoint that this rank has on disk, free of NaN and Inf."""

    started_s: float | None = None
    """time.monotonic() of the start; None before it."""
    earlier_s: float = 0.0
    """Seconds that a resumed run had taken up to its checkpoint."""
    boundary_s: float = 0.0
    """time.monotonic() of the latest step boundary, or of the start."""
    recent_s: array[float] = field(default_factory=lambda: array("d", [0.0] * RECENT_STEPS), repr=False)
    """Seconds of the latest local steps, boundary to boundary, in no order; 0 where there was none yet."""

    def count_step(self, now_s: float) -> None:
        """One more step boundary, at `now_s`."""
        self.recent_s[self.local_steps % RECENT_STEPS] = now_s - self.boundary_s
        self.local_steps += 1
        self.samples += self.batch_size
        self.boundary_s = now_s

    @property
    def step_s(self) -> float:
        """Seconds of a local step, lower median of the latest nine; 0 before the first."""
        ordered = sorted(self.recent_s)
        if not ordered[0]:
            ordered = [seconds for seconds in ordered if seconds] or [0.0]
        return ordered[(len(ordered) - 1) // 2]

    def start_clock(self, now_s: float) -> None:
        """The next step begins at `now_s`."""
        self.boundary_s = now_s
        if self.started_s is None:
            self.started_s = now_s

    @property
    def elapsed_s(self) -> float:
        """Seconds from the start of the run to the latest step boundary."""
        return self.earlier_s + (0.0 if self.started_s is None else self.boundary_s - self.started_s)

    def resume(self, local_steps: int, samples: int, checkpoint: int, elapsed_s: float = 0.0) -> None:
        """Goes on from a checkpoint's counts."""
        self.local_steps, self.samples, self.saved_checkpoint = local_steps, samples, checkpoint
        self.earlier_s = elapsed_s
