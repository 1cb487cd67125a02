"""Algorithms by name."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass

from lasgd.algorithms import independent, lasgd
from lasgd.algorithms.requests import Answer, Request
from lasgd.errors import unknown
from lasgd.pace import Pace
from lasgd.replica import Replica

Part = Callable[[Replica, Pace], Generator[Request, Answer, None]]


@dataclass(frozen=True)
class Algorithm:
    """Two activities that never wait for each other, and what they promise of the end."""

    name: str
    compute: Part
    communicate: Part
    ends_identical: bool
    """All replicas are equal, bit for bit, at the agreed end."""


_ALGORITHMS = {
    algorithm.name: algorithm
    for algorithm in (
        Algorithm("lasgd", lasgd.compute, lasgd.communicate, ends_identical=True),
        Algorithm("independent", independent.compute, independent.communicate, ends_identical=False),
    )
}


def names() -> tuple[str, ...]:
    """The names that `--algorithm` takes."""
    return tuple(_ALGORITHMS)


def find(name: str) -> Algorithm:
    """Raises ConfigurationError with the nearest known name."""
    if not isinstance(name, str) or name not in _ALGORITHMS:
        raise unknown("algorithm", name, _ALGORITHMS)
    return _ALGORITHMS[name]
