"""The group contract: who is in, and how bytes move between them.

A group belongs to one thread. Every method that waits is named `wait_...`, is collective (all members call it, in
the same order) and ends within `timeout_s`, with a PeerError that names whom it waited for.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor


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

        They travel at the same time. Returns when the header and when the vector was complete here, in seconds of
        time.monotonic(). The header cannot be before all members have joined; on a loaded link it may be much later,
        queued behind the vector. Raises PeerError.
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
