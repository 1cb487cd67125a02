"""A group whose collectives take as long as on slower links: link emulation in user space."""

from __future__ import annotations

import time
from collections.abc import Callable

from torch import Tensor

from lasgd.errors import PeerError
from lasgd.group.base import Group
from lasgd.group.cost import broadcast_s, ring_all_reduce_s


class PaddedGroup:
    """Wraps any group: all-reduces and broadcasts go through it and then sleep until their emulated time is over.

    - `round_s`: an all-reduce of `vector_bytes` takes at least this long, of a part its share. The header travels free.
    - `bandwidth_bytes_per_s`, `latency_s`: every all-reduce takes at least the ring's time for all its bytes, the
      header's included, and every broadcast at least the time in which its bytes can reach everybody (`group/cost.py`).

    With both, the longer of the two. Everything else is the wrapped group's. Only `wait_...` methods sleep.
    """

    def __init__(
        self,
        group: Group,
        *,
        vector_bytes: int,
        round_s: float | None = None,
        bandwidth_bytes_per_s: float | None = None,
        latency_s: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """`vector_bytes` is the size of the whole vector as it counts for `round_s`. Takes over `group`.

        Raises ValueError if a size, a time or a bandwidth is not positive.
        """
        given = {"vector_bytes": vector_bytes, "round_s": round_s, "bandwidth_bytes_per_s": bandwidth_bytes_per_s}
        for name, value in given.items():
            if value is not None and not value > 0:
                raise ValueError(f"{name} is {value}; expected more than 0")
        if latency_s < 0 or (latency_s and bandwidth_bytes_per_s is None):
            raise ValueError(f"latency_s is {latency_s}; expected 0 or more, and more than 0 only with a bandwidth")
        self._group = group
        self._vector_bytes = vector_bytes
        self._round_s = round_s
        self._bandwidth_bytes_per_s = bandwidth_bytes_per_s
        self._latency_s = latency_s
        self._clock = clock
        self._sleep = sleep

    @property
    def rank(self) -> int:
        """This member's rank."""
        return self._group.rank

    @property
    def members(self) -> tuple[int, ...]:
        """The ranks that are in."""
        return self._group.members

    @property
    def epoch(self) -> int:
        """Counts changes of membership."""
        return self._group.epoch

    @property
    def bytes_sent(self) -> int:
        """As the wrapped group counts them."""
        return self._group.bytes_sent

    @property
    def world_size(self) -> int:
        """How many ranks the run has."""
        return self._group.world_size

    def wait_all_reduce(self, header: Tensor, vector: Tensor, timeout_s: float) -> tuple[float, float]:
        """As the wrapped group's, but the vector arrives later. PeerError if that does not fit into `timeout_s`."""
        deadline_s = self._clock() + timeout_s
        joined_s, arrived_s = self._group.wait_all_reduce(header, vector, timeout_s)
        # The emulated time runs from when the last member joined, as on a slow link. This rank's own beginning would
        # be too early: after waiting for a straggler for longer than the padding it would get its mean for free.
        end_s = joined_s + self._all_reduce_s(header, vector)
        if end_s <= arrived_s:
            return joined_s, arrived_s
        self._wait_until(end_s, deadline_s, timeout_s, "all-reduce", vector.nbytes)
        return joined_s, self._clock()

    def wait_broadcast(self, tensor: Tensor, source: int, timeout_s: float) -> None:
        """As the wrapped group's, but ends later. PeerError if that does not fit into `timeout_s`."""
        deadline_s = self._clock() + timeout_s
        self._group.wait_broadcast(tensor, source, timeout_s)
        if self._bandwidth_bytes_per_s is None:
            return
        # Who joined when is not known here, so the time runs from the end: too long by the real broadcast, never short.
        members = len(self._group.members)
        end_s = self._clock() + broadcast_s(tensor.nbytes, members, self._latency_s, self._bandwidth_bytes_per_s)
        self._wait_until(end_s, deadline_s, timeout_s, "broadcast", tensor.nbytes)

    def wait_exchange(self, topic: str, value: bytes, timeout_s: float) -> list[bytes]:
        """The wrapped group's, not padded: kilobytes at the start of a run."""
        return self._group.wait_exchange(topic, value, timeout_s)

    def leave(self, reason: str | None = None) -> None:
        """Leaves at once; may be called twice."""
        self._group.leave(reason)

    def _all_reduce_s(self, header: Tensor, vector: Tensor) -> float:
        seconds = 0.0
        if self._round_s is not None:
            seconds = self._round_s * vector.nbytes / self._vector_bytes
        if self._bandwidth_bytes_per_s is not None:
            n_bytes, members = header.nbytes + vector.nbytes, len(self._group.members)
            link_s = ring_all_reduce_s(n_bytes, members, self._latency_s, self._bandwidth_bytes_per_s)
            seconds = max(seconds, link_s)
        return seconds

    def _wait_until(self, end_s: float, deadline_s: float, timeout_s: float, what: str, n_bytes: int) -> None:
        while (left_s := min(end_s, deadline_s) - self._clock()) > 0:
            self._sleep(left_s)
        if end_s > deadline_s:
            others = ", ".join(str(member) for member in self._group.members if member != self._group.rank)
            raise PeerError(
                f"{what} of {n_bytes / 1e6:.3g} MB not finished after {timeout_s:.1f} s on the emulated link; it would "
                f"have been {end_s - deadline_s:.1f} s later. Waited for ranks {others or 'none'}. Raise timeout_s, or "
                f"choose a quicker condition"
            )
