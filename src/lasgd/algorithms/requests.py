"""What an algorithm may ask of whoever drives it, and what it gets back.

An algorithm is one or two generators, `compute` and `communicate`. Each yields one of the requests below and receives
the answer named beside it; a driver (real ranks, virtual time, a test's script) carries the request out. Failures are
answers too: nothing is thrown into an algorithm.

What `compute` asks for beside Gradient and Update makes the rank wait.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Gradient:
    """Forward and backward on the next batch. Answer: None."""


@dataclass(frozen=True)
class Update:
    """The optimizer's step. Answer: None."""


@dataclass(slots=True)
class NextRound:
    """Wait until the next round is due. Answer: None."""

    not_before_s: float
    """Seconds after the latest round's end, the same on every rank; before the first round, after its own request."""


@dataclass(frozen=True)
class Contribution:
    """What one rank brings into a round: `values`, to count with `weight`. Zeros where the weight is 0."""

    values: Tensor  # (d,) flat, owned by the replica, valid until its next snapshot
    weight: float
    begin: int = 0  # where in the whole vector the values lie
    is_gradient: bool = False  # else a replica, or a part of one


@dataclass(slots=True)
class AllReduceMean:
    """The weighted mean of all members' contributions, with the sum of their headers. Answer: Mean or Failure."""

    sent: Contribution
    exact: bool = False
    """Full precision whatever the wire format; used for the agreed end."""


@dataclass(frozen=True)
class Mean:
    """The answer to AllReduceMean: the mean, and what all ranks now know of each other."""

    values: Tensor | None  # (d,) flat, owned by the driver, valid until the next request; None where all weights were 0
    header: Tensor  # (world_size, columns) float64, every row filled


@dataclass(frozen=True)
class Failure:
    """The answer when a request could not be carried out."""

    cause: Exception


@dataclass(frozen=True)
class Stop:
    """The answer to NextRound when this rank is being closed by force: leave the generator."""


Request = Gradient | Update | NextRound | AllReduceMean
Answer = Any  # None, Mean, Failure or Stop, as each request says
