"""What the ranks agree on: the header that travels with every round, and what each rank concludes from it.

The header is a float64 table (world_size, columns), zero but for the own row, so that its sum over the ranks tells
every rank every row. (Float64: float32 loses integers above 2^24.) All conclusions below are pure functions of the
summed tables, hence equal on all ranks: when the next round is due, how far the run is, how many fragments there are,
when checkpoints and evaluations are cut, and the end.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import dataclass
from enum import Enum, IntEnum
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from lasgd.algorithms.requests import Failure, Mean
from lasgd.errors import ConfigurationError
from lasgd.health import Health
from lasgd.tally import Tally


class Column(IntEnum):
    """A row of the header, one rank's word."""

    SAMPLES = 0  # processed since the start of the run
    LOCAL_STEPS = 1  # likewise
    STEP_S = 2  # seconds per local step; 0: not known yet
    ROUND_S = 3  # seconds of the latest round, from when it was due (else from joining) to its end; 0: not known yet
    PARTS = 4  # fragments that the vector was cut into in that latest round
    WEIGHT = 5  # of this rank's contribution to this round
    SICK = 6  # a Health: why this rank sits out a cycle of fragments, if it does
    LEFT = 7  # 1: this rank takes no more local steps
    STOP = 8  # 1: this rank asks for an early end
    SAVED = 9  # number of the newest checkpoint that this rank has on disk, free of NaN and Inf
    ELAPSED_S = 10  # from the start of the run to this rank's latest step boundary


def header_row(tally: Tally, weight: float, health: Health, round_s: float, parts: int) -> tuple[float, ...]:
    """One rank's word, in the order of `Column`."""
    return (
        tally.samples,
        tally.local_steps,
        tally.step_s,
        round_s,
        parts,
        weight,
        health,
        tally.has_left,
        tally.wants_stop,
        tally.saved_checkpoint,
        tally.elapsed_s,
    )


class End(Enum):
    """Why the run ends."""

    SAMPLES = "the budget of samples or seconds is reached"
    LEFT = "every rank has left"
    STOP = "a rank asked for an early end"
    DIVERGED = "every rank holds NaN or Inf"


@dataclass(frozen=True)
class Sickness:
    """One rank held NaN or Inf, or had run away, from this round on, and takes the others' mean."""

    rank: int
    round: int
    found: Health = Health.NOT_FINITE


IDLE_S = 0.05
"""Seconds between rounds while no rank knows yet how long a local step takes."""

LONGEST_PAUSE_S = 30.0
"""Most seconds between rounds, but for a single local step that is longer: only in a round do ranks hear of a lost
rank, of a wish to stop, of the end."""

MAX_FRAGMENTS = 20
"""Most fragments that `auto` asks for."""


class Pace:
    """The agreement so far. Written by `agree` alone; any thread may read its plain attributes."""

    def __init__(
        self,
        world_size: int,
        samples: int | None,
        steps_per_round: float = 1.0,
        fragments: int | Literal["auto"] = 1,
        evaluations: int = 0,
        checkpoints: int = 0,
        seconds: float | None = None,
        least_fragments: int = 1,
    ):
        """The budget is `samples` of all ranks together, or `seconds` from the start of the run.

        `least_fragments`: what "auto" begins with and does not go below.
        """
        if (samples is None) == (seconds is None):
            raise ConfigurationError("the budget is either a number of samples or one of seconds")
        self.world_size = world_size
        self.budget, self.budget_s = samples, seconds
        self.steps_per_round = steps_per_round
        self.fragments = least_fragments if fragments == "auto" else fragments
        self.round = 0
        """Finished rounds."""
        self.samples = 0
        self.elapsed_s = 0.0
        """Seconds from the start of the run to the latest step boundary of any rank."""
        self.due_s = 0.0
        """The next round begins no earlier than this many seconds after the latest one has ended."""
        self.pause_s = IDLE_S
        """Seconds from the begin of a round to the next, if it is over by then."""
        self.end: End | None = None
        self.checkpoint = 0
        """Number of the newest checkpoint that is to be cut; 0: none yet."""
        self.durable_checkpoint = 0
        """Every rank has this checkpoint or a newer one on disk, free of NaN and Inf."""
        self.evaluation = 0
        """Number of the newest evaluation that is due; 0: none yet."""
        self.sicknesses: list[Sickness] = []
        self._checkpoints, self._evaluations = checkpoints, evaluations
        self._passed_checkpoints = 0
        self._delay = Delay(least_fragments) if fragments == "auto" else None
        self._header: Tensor | None = None  # made when it is asked for: ranks that agree on nothing never do
        self._was_sick: frozenset[int] = frozenset()
        self._agreed_on: Mean | None = None

    @property
    def local_steps_between_rounds(self) -> int:
        """`steps_per_round` as a whole number, for algorithms that count their own local steps."""
        return max(1, round(self.steps_per_round))

    @property
    def progress(self) -> float:
        """Share of the budget that all ranks together have used, 0 to 1, as of the latest round."""
        return min(1.0, self._used(1))

    @property
    def expected_samples(self) -> int:
        """Samples that the run will have processed at its end; of a budget in seconds an estimate, 0 at the start."""
        if self.budget is not None:
            return self.budget
        return round(self.samples / self.progress) if self.progress else 0

    def _used(self, parts: int) -> float:
        """How many of so many equal parts of the budget are used; exact where the budget is in samples."""
        if self.budget is not None:
            return self.samples * parts / self.budget
        assert self.budget_s is not None
        return self.elapsed_s * parts / self.budget_s

    def header(self, rank: int, tally: Tally, weight: float, health: Health, round_s: float, parts: int) -> Tensor:
        """This rank's table for the next round; valid until the next call.

        round_s, parts: how long the latest round's vector took, and how many fragments there were then.
        """
        if self._header is None:
            self._header = torch.zeros(self.world_size, len(Column), dtype=torch.float64)
        # Written through NumPy, which keeps the interpreter lock: torch gives it away at every operation, and a
        # communicator on a machine with more busy threads than cores waits milliseconds to have it back.
        table = self._header.numpy()
        table.fill(0.0)
        table[rank] = header_row(tally, weight, health, round_s, parts)
        return self._header

    def agree(self, outcome: Mean | Failure) -> None:
        """Draws every conclusion from one round's summed header; a Failure leaves all as it was.

        Takes in each Mean once: ranks in one process, which are given the same one, may share an agreement.
        """
        if isinstance(outcome, Failure) or outcome is self._agreed_on:
            return
        self._agreed_on = outcome
        assert outcome.header is not None
        table = outcome.header.numpy()
        self.round += 1
        self.samples = int(table[:, Column.SAMPLES].sum())
        self.elapsed_s = float(table[:, Column.ELAPSED_S].max())
        self.durable_checkpoint = int(table[:, Column.SAVED].min())
        self._agree_on_time(table)
        self._agree_on_marks()
        self._agree_on_health(table)
        if self.end is None:
            self.end = self._reason_to_end(table)

    def diverge(self) -> None:
        """Communicator: not one rank could contribute to the last exact average; seen by all in the same round."""
        self.end = End.DIVERGED

    def count_alone(self, tally: Tally) -> None:
        """Takes the own share of the budget for the whole of it: for ranks that agree on nothing."""
        if self.end is not None:
            return
        self.samples, self.elapsed_s = tally.samples * self.world_size, tally.elapsed_s
        self._agree_on_marks()
        if tally.wants_stop or tally.has_left:
            self.checkpoint += tally.wants_stop
            self.end = End.STOP if tally.wants_stop else End.LEFT
        elif self._used(1) >= 1:
            self.end = End.SAMPLES

    def resume(self, round_: int, samples: int, checkpoint: int, evaluation: int, elapsed_s: float = 0.0) -> None:
        """Goes on from a checkpoint's agreement; the same values on every rank."""
        self.round, self.samples, self.elapsed_s = round_, samples, elapsed_s
        self.checkpoint, self.evaluation, self.durable_checkpoint = checkpoint, evaluation, checkpoint
        self._passed_checkpoints = self._passed(self._checkpoints)

    def _agree_on_time(self, table: np.ndarray) -> None:
        # The median, because a straggler drags the mean; the lower one, because of two ranks one may be a straggler.
        step_s = _median_low(_known(table[:, Column.STEP_S]))
        # The least, because the rank that joined last waited for nobody: its time is the round's own.
        round_s = float(_known(table[:, Column.ROUND_S]).min(initial=math.inf))
        round_s = 0.0 if round_s == math.inf else round_s
        self.pause_s = self._pause_s(table, step_s) if step_s else IDLE_S
        self.due_s = max(0.0, self.pause_s - round_s) if step_s else IDLE_S
        parts = int(table[:, Column.PARTS].max())  # the same on all that know it
        if self._delay and step_s and round_s:
            self.fragments = self._delay.fragments(self.fragments, parts, round_s / step_s)

    def _pause_s(self, table: np.ndarray, step_s: float) -> float:
        """Seconds from one round's begin to the next: `steps_per_round` local steps, or until something is due."""
        until_due_s = self._until_next_mark_s(table)
        return min(self.steps_per_round * step_s, max(step_s, min(LONGEST_PAUSE_S, until_due_s)))

    def _until_next_mark_s(self, table: np.ndarray) -> float:
        """Until the next checkpoint, evaluation or the end is due, at the ranks' present speeds."""
        left = min(
            (math.floor(self._used(n)) + 1 - self._used(n)) / n for n in (1, self._checkpoints, self._evaluations) if n
        )
        if self.budget is None:
            assert self.budget_s is not None
            return left * self.budget_s
        steps, duration_s = table[:, Column.LOCAL_STEPS], table[:, Column.STEP_S]
        working = (steps > 0) & (duration_s > 0) & (table[:, Column.LEFT] == 0)
        samples_per_s = float((table[working, Column.SAMPLES] / steps[working] / duration_s[working]).sum())
        return left * self.budget / samples_per_s if samples_per_s else math.inf

    def _agree_on_marks(self) -> None:
        passed = self._passed(self._checkpoints)
        if passed > self._passed_checkpoints:  # numbers count cuts, not marks: Ctrl-C adds cuts between them
            self.checkpoint += 1
            self._passed_checkpoints = passed
        self.evaluation = max(self.evaluation, self._passed(self._evaluations))

    def _passed(self, marks: int) -> int:
        """How many of `marks` equal parts of the budget are behind us; the end is no mark."""
        used = self.samples * marks // self.budget if self.budget is not None else int(self._used(marks))
        return min(max(marks - 1, 0), used)

    def _agree_on_health(self, table: np.ndarray) -> None:
        sick = frozenset(table[:, Column.SICK].nonzero()[0].tolist())
        self.sicknesses += [
            Sickness(rank, self.round, Health(int(table[rank, Column.SICK]))) for rank in sorted(sick - self._was_sick)
        ]
        self._was_sick = sick

    def _reason_to_end(self, table: np.ndarray) -> End | None:
        if not table[:, Column.WEIGHT].any() and not (table[:, Column.SICK] == Health.RAN_AWAY).any():
            return End.DIVERGED
        if table[:, Column.STOP].any():
            self.checkpoint += 1
            return End.STOP
        if self._used(1) >= 1:
            return End.SAMPLES
        if table[:, Column.LEFT].all():
            return End.LEFT
        return None


class Delay:
    """How many fragments the measured delays ask for.

    A round that carries one of F fragments takes t(F) = a + b/F local steps: a part that does not shrink (latency,
    and threads that wait for a core) and one that does (bandwidth). Back to back, an element is averaged every F t(F)
    steps and its mean is t(F) steps late, so what a rank knows of the others is on average as old as

        F t(F) / 2 + t(F) = a F/2 + b/2 + a + b/F          least at F = sqrt(2 b/a)

    More than D = a + b fragments win nothing, because a mean is shown at the next step boundary at the soonest. So
    F = min(D, sqrt(2 b/a)), rounded up: D where bandwidth is all, 1 where cutting only makes averages rarer.

    The share q = a/D is learnt where F changes much, and forgotten where D does: until it is known again, F = D, but of
    more than one at most twice as many, for behind a latency the way back from too many is long.
    Delays are medians of the latest rounds: one slow round changes nothing, a link that has changed its speed is
    believed when it has been so for half of them. Rounds of another cut than the present one are not mixed in.
    """

    LEAST_ROUNDS = 3
    CLEAR_CHANGE = 1.5
    """F must have changed by this factor to tell latency from noise."""
    OTHER_NETWORK = 2.5
    """Where D has changed by this factor since q was learnt, the network is taken for another one."""

    def __init__(self, least: int = 1) -> None:
        """`least` fragments are asked for in any case, as soon as the delay is known."""
        self.least = least
        self._parts = 0
        self._recent: deque[float] = deque()  # rounds of the present cut, in local steps
        self._before: tuple[int, float] | None = None  # the cut before: F and its delay
        self._latency_share = 0.0
        self._learnt_at = 0.0  # D when the share was learnt; 0: it was not

    def fragments(self, asked: int, parts: int, round_steps: float) -> int:
        """Takes in one round's delay in local steps, measured with `parts` fragments; returns how many to ask for.

        `asked` is the number asked for so far, which takes effect when a cycle is complete, and of which long rows
        may leave fewer.
        """
        if parts != self._parts:
            if len(self._recent) >= self.LEAST_ROUNDS:
                self._before = (self._parts, statistics.median(self._recent))
            self._parts = parts
            self._recent = deque(maxlen=max(9, 2 * parts))
        self._recent.append(round_steps)
        if len(self._recent) < max(self.LEAST_ROUNDS, parts):
            return asked
        wanted = self._wanted(parts, statistics.median(self._recent))
        # A band around the present number, so that noise does not recut the vector again and again.
        if asked * 0.8 - 1 <= wanted <= asked * 1.1 + 0.2:
            return max(self.least, asked)
        return min(MAX_FRAGMENTS, max(self.least, math.ceil(wanted)))

    def _wanted(self, parts: int, delay: float) -> float:
        before, self._before = self._before, None
        if before is not None and _factor(before[0], parts) >= self.CLEAR_CHANGE:
            self._latency_share = _latency_share(*before, parts, delay)
            self._learnt_at = self._whole(parts, delay)
        elif self._learnt_at and _factor(self._whole(parts, delay), self._learnt_at) >= self.OTHER_NETWORK:
            self._latency_share = self._learnt_at = 0.0
        whole, share = self._whole(parts, delay), self._latency_share
        if not self._learnt_at and parts > 1:
            return min(whole, 2.0 * parts)
        return min(whole, math.sqrt(2 * (1 - share) / share)) if share else whole

    def _whole(self, parts: int, delay: float) -> float:
        """D, from the delay of one of `parts` fragments."""
        return delay / (self._latency_share + (1 - self._latency_share) / parts)


def _factor(one: float, other: float) -> float:
    """By how much two positive numbers differ, at least 1."""
    return max(one / other, other / one)


def _latency_share(f0: int, t0: float, f1: int, t1: float) -> float:
    """a/(a+b) of a + b/F, from two numbers of fragments and their round times."""
    b = (t0 - t1) / (1 / f0 - 1 / f1)
    a = t0 - b / f0
    return min(1.0, max(0.0, a / (a + b))) if a + b > 0 else 0.0


def _known(values: np.ndarray) -> np.ndarray:
    """Those that are not 0, which stands for "not known yet"."""
    return values[values > 0]


def _median_low(values: np.ndarray) -> float:
    """The lower median; 0 where there is none."""
    return float(np.sort(values)[(len(values) - 1) // 2]) if len(values) else 0.0
