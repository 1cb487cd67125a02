"""Algorithms by name."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass

from lasgd.algorithms import independent, lasgd, local_sgd, sync_sgd
from lasgd.algorithms.requests import Answer, Request
from lasgd.errors import unknown
from lasgd.pace import Pace
from lasgd.replica import Replica

Part = Callable[[Replica, Pace], Generator[Request, Answer, None]]


@dataclass(frozen=True)
class Algorithm:
    """One or two activities of a rank, and what they promise.

    Two never wait for each other. An algorithm without `communicate` asks within `compute`, and waits.
    """

    name: str
    compute: Part
    communicate: Part | None
    agrees: bool = True
    """The ranks agree on progress and the end, through the header; else each goes by itself."""
    ends_identical: bool = True
    """All replicas are equal, bit for bit, at the agreed end."""
    takes_fragments: bool = False
    """The vector may be cut; else it is averaged whole."""
    lets_ranks_leave: bool = True
    """A rank may take fewer local steps than the others and still end with them."""
    averages_gradients: bool = False
    """Every local step waits for the mean of all gradients, which a driver may also form during the backward pass."""


_ALGORITHMS = {
    algorithm.name: algorithm
    for algorithm in (
        Algorithm("lasgd", lasgd.compute, lasgd.communicate, takes_fragments=True),
        Algorithm("local_sgd", local_sgd.compute, None),
        Algorithm("sync_sgd", sync_sgd.compute, None, lets_ranks_leave=False, averages_gradients=True),
        Algorithm("independent", independent.compute, independent.communicate, agrees=False, ends_identical=False),
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
