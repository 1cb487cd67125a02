"""What an algorithm may ask of whoever drives it, and what it gets back.

An algorithm is one or two generators, `compute` and `communicate`. Each yields one of the requests below and receives
the answer named beside it; a driver (real ranks, virtual time, a test's script) carries the request out. Failures are
answers too: nothing is thrown into an algorithm.

What `compute` asks for beside Gradient, Update, Begin and Send makes the rank wait. Algorithms whose ranks write to
each other may have a third generator, `exchange`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
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

    values: Tensor  # (d,) flat, CPU, owned by the replica, valid until its next snapshot; see Mean.is_coded
    weight: float
    begin: int = 0  # where in the whole vector the values lie
    is_gradient: bool = False  # else a replica, or a part of one


@dataclass(slots=True)
class AllReduceMean:
    """The weighted mean of all members' contributions, with the sum of their headers. Answer: Mean or Failure."""

    sent: Contribution
    exact: bool = False
    """Full precision whatever the wire format; used for the agreed end."""


@dataclass(slots=True)
class Begin:
    """Sends an AllReduceMean on its way and goes on meanwhile; one at a time. Answer: None."""

    request: AllReduceMean


@dataclass(frozen=True)
class Join:
    """Waits for the end of what Begin has sent on its way. Answer: Mean or Failure."""


@dataclass(frozen=True)
class Mean:
    """The answer to AllReduceMean and Join: the mean, and what all ranks now know of each other.

    Algorithms whose ranks write to each other make their own, of a few ranks' values and without a header.
    """

    values: Tensor | None  # (d,) flat, owned by the driver, valid until the next request; None where all weights were 0
    header: Tensor | None = None  # (world_size, columns) float64, every row filled
    is_coded: bool = False
    """It has travelled in a wire format, and the contribution's `values` now hold what of them has counted."""


class Box(IntEnum):
    """Which of a rank's activities a message is for."""

    COMPUTE = 0
    EXCHANGE = 1


@dataclass(slots=True)
class Send:
    """Hands a message over for `peer`, which may be the own rank. Answer: None, at once; `values` may change then.

    Messages from one activity to another arrive in their order. Nobody waits for their arrival.
    """

    peer: int
    to: Box
    values: Tensor | None = None  # (d,) flat, copied by the driver
    weight: float = 1.0
    note: int = 0  # what else there is to say, the algorithm's own


@dataclass(frozen=True)
class Receive:
    """Waits for the next message from `peer`; None: from anybody, in the order of arrival. Answer: Message or Stop."""

    peer: int | None = None
    until_end: bool = False
    """Do not wait any more once the end is agreed: then the answer is Stop, unless a message is there."""


@dataclass(frozen=True)
class Message:
    """The answer to Receive."""

    source: int
    values: Tensor | None  # (d,) flat, owned by who asked
    weight: float
    note: int


@dataclass(slots=True)
class NextExchange:
    """Waits until the next exchange is due. Answer: None, or Stop once the end is agreed."""

    not_before_s: float
    """Seconds after the latest exchange was due; the first one is with the rank's first gradient."""


@dataclass(frozen=True)
class ExchangeEnded:
    """Waits until this rank's `exchange` has come to its end. Answer: None."""


@dataclass(frozen=True)
class Failure:
    """The answer when a request could not be carried out."""

    cause: Exception


@dataclass(frozen=True)
class Stop:
    """The answer where nothing more will come: this rank is being closed by force, or the end is agreed. Leave."""


Request = Gradient | Update | NextRound | AllReduceMean | Begin | Join | Send | Receive | NextExchange | ExchangeEnded
Answer = Any  # None, Mean, Failure, Message or Stop, as each request says
