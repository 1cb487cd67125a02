"""The group contract: who is in, and how bytes move between them.

A group belongs to one thread. Every method that waits is named `wait_...`, is collective (all members call it, in
the same order) and ends within `timeout_s`, with a PeerError that names whom it waited for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch.distributed as dist
from torch import Tensor

from lasgd.errors import PeerError


@runtime_checkable
class Group(Protocol):
    """The members that average together, seen from one of them."""

    @property
    def rank(self) -> int:
        """This member's rank, a constant of the run."""
        ...

    @property
    def members(self) -> tuple[int, ...]:
        """The ranks that are in, ascending. Static groups: all ranks, always."""
        ...

    @property
    def epoch(self) -> int:
        """Counts changes of membership; static groups stay at 0."""
        ...

    @property
    def bytes_sent(self) -> int:
        """Payload bytes this member has put on the wire in all-reduces, by the ring's count: 2 (n-1)/n of each."""
        ...

    @property
    def world_size(self) -> int:
        """How many ranks the run has."""
        ...

    def wait_all_reduce(self, header: Tensor, vector: Tensor, timeout_s: float) -> tuple[float, float]:
        """Replaces both CPU tensors by their sums over the members, in place; bit-identical on all of them.

        The header may be a table (world_size, columns), zero but for this member's row: its sum has every member's.
        They travel at the same time; where the vector is empty, the header alone does. Returns when the header and
        when the vector was complete here, in seconds of time.monotonic(). The header cannot be before all members have
        joined; on a loaded link it may be much later, queued behind the vector. Raises PeerError.
        """
        ...

    def wait_broadcast(self, tensor: Tensor, source: int, timeout_s: float) -> None:
        """Replaces the CPU tensor by rank `source`'s, in place. Raises PeerError."""
        ...

    def wait_exchange(self, topic: str, value: bytes, timeout_s: float) -> list[bytes]:
        """Every member's `value`, in the order of `members`. For kilobytes, not for models. Raises PeerError.

        A `topic` is used once in a run.
        """
        ...

    def leave(self, reason: str | None = None) -> None:
        """Leaves at once; may be called twice. A `reason` (an error's text) is left behind for the others' messages."""
        ...


@runtime_checkable
class GroupWithPieces(Group, Protocol):
    """A group that moves pieces of a vector without adding them up, as averages in a wire format ask for."""

    def wait_all_to_all(
        self, header: Tensor, pieces: Tensor, received: Tensor, timeout_s: float
    ) -> tuple[float, float]:
        """Sends row k of `pieces` (n, bytes) to the k-th member, and fills row j of `received` with what the j-th sent.

        CPU tensors of uint8. The header travels at the same time and becomes its sum, as in `wait_all_reduce`, whose
        times these are. Raises PeerError.
        """
        ...

    def wait_all_gather(self, piece: Tensor, received: Tensor, timeout_s: float) -> float:
        """Fills row j of `received` (n, bytes) with the j-th member's `piece` (bytes,), the own one included.

        Returns when it was complete here, in seconds of time.monotonic(). Raises PeerError.
        """
        ...


class Lane(Protocol):
    """A second way to the same members, with an order of its own: for all-reduces beside the communicator's.

    The training thread starts them, in the same order on all members; another one waits for them, in that order.
    """

    @property
    def process_group(self) -> dist.ProcessGroup:
        """What torch's DistributedDataParallel takes. Its own collectives time out after `set_timeout`'s seconds."""
        ...

    @property
    def backend(self) -> dist.ProcessGroupGloo:
        """What carries `process_group`. Whoever holds that holds this too, and releases it last, by `gloo.give_up`."""
        ...

    def set_timeout(self, timeout_s: float) -> None:
        """For the collectives of `process_group` from now on; at first it is that of `wait_lane`."""
        ...

    def start_all_reduce(self, tensor: Tensor, timeout_s: float, is_payload: bool = True) -> Any:
        """Begins to replace the tensor by its sum over the members, in place. Returns at once what to wait for.

        What is no payload does not count as bytes sent. Raises PeerError where that cannot even begin.
        """
        ...

    def wait_all_reduce(self, started: Any) -> None:
        """Returns when the sum is there, bit-identical on all members. Raises PeerError."""
        ...

    def wait_broadcast_rest(self, n_bytes: int) -> None:
        """After a broadcast over `process_group`: until it would have ended on an emulated link."""
        ...

    def failure(self, error: Exception, what: str, after_s: float) -> PeerError:
        """What an error of `process_group` stands for; gives the lane up."""
        ...

    def check_peers(self) -> None:
        """Raises PeerError if another rank has noticed trouble, or has left because of some."""
        ...

    def leave(self) -> None:
        """Ends whatever is on its way, with errors; any thread, and twice is harmless."""
        ...


@runtime_checkable
class GroupWithLane(Group, Protocol):
    """A group over which gradients can be averaged during the backward pass."""

    def wait_lane(self, timeout_s: float) -> Lane:
        """Opens the lane: once, before the first local step, on all members. Leaving the group closes it."""
        ...


@dataclass(frozen=True)
class Letter:
    """A message from one rank to another."""

    source: int
    values: Tensor | None  # (d,) on the CPU, owned by the receiver
    weight: float
    note: int
    due_s: float = 0.0
    """time.time() before which it has not come through the sender's emulated link; 0: no link is emulated."""


class Mail(Protocol):
    """Letters between ranks, into numbered boxes. A box is read by one thread; any thread sends."""

    @property
    def bytes_sent(self) -> int:
        """Bytes of the letters that this rank has sent to others, without what the network adds."""
        ...

    def send(self, peer: int, box: int, values: Tensor | None, weight: float, note: int, due_s: float = 0.0) -> None:
        """Copies what is to be sent and returns at once. Letters of one sender to one box arrive in their order."""
        ...

    def wait_receive(self, box: int, peer: int | None, timeout_s: float) -> Letter | None:
        """The next letter in the own `box` from `peer`, or from anybody; None if there is none within the time."""
        ...

    def leave(self) -> None:
        """Gives all up, letters that have not arrived too; twice is harmless. By a thread that reads no box now."""
        ...


@runtime_checkable
class GroupWithMail(Group, Protocol):
    """A group whose ranks can write to each other."""

    def wait_mail(self, timeout_s: float) -> Mail:
        """Opens the boxes: once, before the first local step, on all members. Who has opened them leaves them."""
        ...
