"""How long local steps take.

A compute model gives each rank an endless iterator of seconds, one for each of its local steps: a pure function of the
model (its seed included) and the rank, so that a run can be repeated, and that a rank's steps do not depend on how many
other ranks there are.

The driver draws millions of them one by one. So random numbers are drawn in chunks, and the iterators are built from
itertools, `map` and lists: `next()` runs no Python code but once a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, count, repeat
from operator import add
from typing import Protocol

import numpy as np

from lasgd.errors import ConfigurationError
from lasgd.stalls import is_stalled

CHUNK = 32
"""Steps drawn at once: 1 kB a rank, and numpy's cost of a call is spread over so many steps."""

_GOLDEN = (math.sqrt(5) - 1) / 2
"""Multiples of it, without their whole part, lie apart from each other however many there are."""

_LOG_NORMAL = 1
"""What a stream of random numbers is for. Part of its seed, so that no two purposes share a stream."""


class ComputeModel(Protocol):
    """How long the local steps of each rank take."""

    def durations(self, rank: int) -> Iterator[float]:
        """Seconds of each local step of `rank`, from its first on, without end; each call begins afresh."""
        ...


@dataclass(frozen=True)
class Constant:
    """Every step of every rank takes `step_s`."""

    step_s: float

    def __post_init__(self) -> None:
        _check_positive("step_s", self.step_s)

    def durations(self, rank: int) -> Iterator[float]:
        """The same number for ever."""
        return repeat(self.step_s)


@dataclass(frozen=True)
class LogNormal:
    """Step times whose logarithm is normal with mean log(median_s) and standard deviation `sigma`.

    The mean is median_s * exp(sigma^2 / 2): 2 % above the median at sigma = 0.2.
    """

    median_s: float
    sigma: float
    seed: int

    def __post_init__(self) -> None:
        _check_positive("median_s", self.median_s)
        if not 0 <= self.sigma <= 10:  # beyond it a step may outlast what a float can hold
            raise ConfigurationError(
                f"compute: sigma is {self.sigma!r}; expected 0 to 10, as in lognormal=100ms,sigma=0.2."
            )
        _check_seed(self.seed)

    def durations(self, rank: int) -> Iterator[float]:
        """Drawn from PCG64, seeded with (seed, purpose, rank)."""
        return chain.from_iterable(self._chunks(rank))

    def _chunks(self, rank: int) -> Iterator[list[float]]:
        generator = np.random.Generator(np.random.PCG64([self.seed, _LOG_NORMAL, rank]))
        log_median = math.log(self.median_s)
        while True:
            yield generator.lognormal(log_median, self.sigma, CHUNK).tolist()


@dataclass(frozen=True)
class Stragglers:
    """`model`, with the steps of some ranks longer by a factor; of no rank beside those in `factors`."""

    model: ComputeModel
    factors: Mapping[int, float]

    def __post_init__(self) -> None:
        for rank, factor in self.factors.items():
            _check_positive(f"factor of straggler {rank}", factor)

    def durations(self, rank: int) -> Iterator[float]:
        """The model's, multiplied."""
        durations = self.model.durations(rank)
        factor = float(self.factors.get(rank, 1.0))
        return durations if factor == 1.0 else map(factor.__mul__, durations)


@dataclass(frozen=True)
class Stalls:
    """`model`, with `stall_s` on top of each step that stalls: the same steps as in real runs with this seed."""

    model: ComputeModel
    stall_s: float
    probability: float
    """0 to 1, of each local step of each rank."""
    seed: int

    def __post_init__(self) -> None:
        _check_positive("stall_s", self.stall_s)
        if not 0 <= self.probability <= 1:
            raise ConfigurationError(f"compute: stall probability is {self.probability!r}; expected 0 to 1.")
        _check_seed(self.seed)

    def durations(self, rank: int) -> Iterator[float]:
        """The model's, with stalls added."""
        durations = self.model.durations(rank)
        if self.probability == 0:
            return durations
        return map(add, durations, chain.from_iterable(self._chunks(rank)))

    def _chunks(self, rank: int) -> Iterator[list[float]]:
        for first in count(0, CHUNK):
            steps = range(first, first + CHUNK)
            yield [self.stall_s if is_stalled(self.probability, self.seed, rank, step) else 0.0 for step in steps]


@dataclass(frozen=True)
class Trace:
    """Measured step times, rank by rank, each list from its beginning again when it is used up.

    A rank without a list of its own takes that of rank r mod the number of lists, from another moment on: in lockstep
    with the rank that was measured it would never wait for it.
    """

    step_times_s: Sequence[Sequence[float]]

    def __post_init__(self) -> None:
        if not self.step_times_s:
            raise ConfigurationError("compute: the trace is empty; expected step times of at least rank 0.")
        for rank, times in enumerate(self.step_times_s):
            if not times:
                raise ConfigurationError(f"compute: the trace has no step times of rank {rank}; expected at least one.")
            for step, step_s in enumerate(times):
                _check_positive(f"the trace's rank {rank}, step {step},", step_s)

    def durations(self, rank: int) -> Iterator[float]:
        """The list of the rank, round and round."""
        copy, measured = divmod(rank, len(self.step_times_s))
        times = self.step_times_s[measured]
        begin = int(len(times) * (copy * _GOLDEN % 1))
        return chain(times[begin:], chain.from_iterable(repeat(times)))


def _check_positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ConfigurationError(f"compute: {name} is {value!r}; expected a finite number above 0.")


def _check_seed(seed: int) -> None:
    if seed < 0:
        raise ConfigurationError(f"compute: seed is {seed}; expected 0 or more.")
