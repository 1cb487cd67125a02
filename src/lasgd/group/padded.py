"""A group whose collectives take as long as on slower links: link emulation in user space."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lasgd.errors import PeerError
from lasgd.group.base import Group, GroupWithLane, GroupWithMail, GroupWithPieces, Lane
from lasgd.group.cost import broadcast_s, pieces_s, ring_all_reduce_s
from lasgd.group.padded_mail import PaddedMail


@dataclass(frozen=True)
class EmulatedLink:
    """What collectives cost on the links that are emulated, and sleeping until they have been paid for."""

    vector_bytes: int
    round_s: float | None
    bandwidth_bytes_per_s: float | None
    latency_s: float
    clock: Callable[[], float]
    sleep: Callable[[float], None]

    def __post_init__(self) -> None:
        given = {
            "vector_bytes": self.vector_bytes,
            "round_s": self.round_s,
            "bandwidth_bytes_per_s": self.bandwidth_bytes_per_s,
        }
        for name, value in given.items():
            if value is not None and not value > 0:
                raise ValueError(f"{name} is {value}; expected more than 0")
        if self.latency_s < 0 or (self.latency_s and self.bandwidth_bytes_per_s is None):
            raise ValueError(
                f"latency_s is {self.latency_s}; expected 0 or more, and more than 0 only with a bandwidth"
            )

    def all_reduce_s(self, part_bytes: int, header_bytes: int, members: int) -> float:
        """Seconds of one all-reduce of a part of the vector, with its header."""
        seconds = 0.0
        if self.round_s is not None:
            seconds = self.round_s * part_bytes / self.vector_bytes
        if self.bandwidth_bytes_per_s is not None:
            n_bytes = header_bytes + part_bytes
            link_s = ring_all_reduce_s(n_bytes, members, self.latency_s, self.bandwidth_bytes_per_s)
            seconds = max(seconds, link_s)
        return seconds

    def pieces_s(self, n_bytes: int, header_bytes: int, members: int) -> float:
        """Seconds of one all-to-all or all-gather whose pieces are `n_bytes` together, with its header.

        Where the links are only known by how long an all-reduce takes: half of one of as many bytes.
        """
        seconds = 0.0
        if self.round_s is not None:
            seconds = self.round_s * n_bytes / self.vector_bytes / 2
        if self.bandwidth_bytes_per_s is not None:
            link_s = pieces_s(n_bytes, members, self.latency_s, self.bandwidth_bytes_per_s)
            link_s += ring_all_reduce_s(header_bytes, members, 0.0, self.bandwidth_bytes_per_s)
            seconds = max(seconds, link_s)
        return seconds

    def message_s(self, n_bytes: int, members: int) -> float:
        """Seconds for which one message of `n_bytes` has a link to itself, the latency apart.

        Where the links are only known by how long an all-reduce takes, as long as on links where a ring would.
        """
        seconds = 0.0
        if self.round_s is not None and members > 1:
            seconds = self.round_s * n_bytes / self.vector_bytes * members / (2 * (members - 1))
        if self.bandwidth_bytes_per_s is not None:
            seconds = max(seconds, n_bytes / self.bandwidth_bytes_per_s)
        return seconds

    def broadcast_s(self, n_bytes: int, members: int) -> float:
        """Seconds of one broadcast."""
        if self.bandwidth_bytes_per_s is None:
            return 0.0
        return broadcast_s(n_bytes, members, self.latency_s, self.bandwidth_bytes_per_s)

    def wait_until(self, end_s: float) -> None:
        """Returns at `end_s` of the clock."""
        while (left_s := end_s - self.clock()) > 0:
            self.sleep(left_s)

    def wait_paid(self, end_s: float, deadline_s: float, timeout_s: float, what: str, n_bytes: int, group: Group):
        """Returns at `end_s`; PeerError at the deadline, if that is sooner."""
        self.wait_until(min(end_s, deadline_s))
        if end_s > deadline_s:
            others = ", ".join(str(member) for member in group.members if member != group.rank)
            raise PeerError(
                f"{what} of {n_bytes / 1e6:.3g} MB not finished after {timeout_s:.1f} s on the emulated link; it would "
                f"have been {end_s - deadline_s:.1f} s later. Waited for ranks {others or 'none'}. Raise timeout_s, or "
                f"choose a quicker condition"
            )


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
        self._group = group
        self._link = EmulatedLink(vector_bytes, round_s, bandwidth_bytes_per_s, latency_s, clock, sleep)

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
        link = self._link
        deadline_s = link.clock() + timeout_s
        joined_s, arrived_s = self._group.wait_all_reduce(header, vector, timeout_s)
        # The emulated time runs from when the last member joined, as on a slow link. This rank's own beginning would
        # be too early: after waiting for a straggler for longer than the padding it would get its mean for free.
        end_s = joined_s + self._all_reduce_s(header, vector)
        if end_s <= arrived_s:
            return joined_s, arrived_s
        link.wait_paid(end_s, deadline_s, timeout_s, "all-reduce", vector.nbytes, self._group)
        return joined_s, link.clock()

    def wait_all_to_all(
        self, header: Tensor, pieces: Tensor, received: Tensor, timeout_s: float
    ) -> tuple[float, float]:
        """As the wrapped group's, but ends later. PeerError if that does not fit into `timeout_s`."""
        link = self._link
        deadline_s = link.clock() + timeout_s
        joined_s, arrived_s = self._with_pieces().wait_all_to_all(header, pieces, received, timeout_s)
        end_s = joined_s + link.pieces_s(pieces.nbytes, header.nbytes, len(self._group.members))
        if end_s <= arrived_s:
            return joined_s, arrived_s
        link.wait_paid(end_s, deadline_s, timeout_s, "all-to-all", pieces.nbytes, self._group)
        return joined_s, link.clock()

    def wait_all_gather(self, piece: Tensor, received: Tensor, timeout_s: float) -> float:
        """As the wrapped group's, but ends later. PeerError if that does not fit into `timeout_s`.

        It follows an all-to-all at whose end all members are, so it begins for all when it begins here.
        """
        link = self._link
        begin_s = link.clock()
        arrived_s = self._with_pieces().wait_all_gather(piece, received, timeout_s)
        end_s = begin_s + link.pieces_s(received.nbytes, 0, len(self._group.members))
        if end_s <= arrived_s:
            return arrived_s
        link.wait_paid(end_s, begin_s + timeout_s, timeout_s, "all-gather", received.nbytes, self._group)
        return link.clock()

    def wait_broadcast(self, tensor: Tensor, source: int, timeout_s: float) -> None:
        """As the wrapped group's, but ends later. PeerError if that does not fit into `timeout_s`."""
        link = self._link
        deadline_s = link.clock() + timeout_s
        self._group.wait_broadcast(tensor, source, timeout_s)
        # Who joined when is not known here, so the time runs from the end: too long by the real broadcast, never short.
        end_s = link.clock() + link.broadcast_s(tensor.nbytes, len(self._group.members))
        link.wait_paid(end_s, deadline_s, timeout_s, "broadcast", tensor.nbytes, self._group)

    def wait_lane(self, timeout_s: float) -> PaddedLane:
        """The wrapped group's, on the same slow links."""
        if not isinstance(self._group, GroupWithLane):
            raise TypeError(f"{type(self._group).__name__} has no lane")
        return PaddedLane(self._group.wait_lane(timeout_s), self._group, self._link)

    def wait_mail(self, timeout_s: float) -> PaddedMail:
        """The wrapped group's, on the same slow links."""
        if not isinstance(self._group, GroupWithMail):
            raise TypeError(f"{type(self._group).__name__} has no mail")
        return PaddedMail(self._group.wait_mail(timeout_s), self.rank, len(self.members), self._link)

    def wait_exchange(self, topic: str, value: bytes, timeout_s: float) -> list[bytes]:
        """The wrapped group's, not padded: kilobytes at the start of a run."""
        return self._group.wait_exchange(topic, value, timeout_s)

    def leave(self, reason: str | None = None) -> None:
        """Leaves at once; may be called twice."""
        self._group.leave(reason)

    def _with_pieces(self) -> GroupWithPieces:
        if not isinstance(self._group, GroupWithPieces):
            raise TypeError(f"{type(self._group).__name__} moves no pieces")
        return self._group

    def _all_reduce_s(self, header: Tensor, vector: Tensor) -> float:
        return self._link.all_reduce_s(vector.nbytes, header.nbytes, len(self._group.members))


@dataclass(frozen=True)
class StartedPadded:
    """An all-reduce on its way, and a marker ahead of it that arrives when the last member has joined."""

    marker: Any
    inner: Any
    n_bytes: int
    begin_s: float
    timeout_s: float


class PaddedLane:
    """Wraps any lane: its all-reduces follow each other on the emulated link, each from when all have joined it on.

    An all-reduce that all have joined at `joined` ends at max(joined, the end of the one before) + its emulated time.
    """

    def __init__(self, lane: Lane, group: Group, link: EmulatedLink):
        self._lane, self._group, self._link = lane, group, link
        self._free_s = 0.0  # when the link has done what was on it

    @property
    def process_group(self) -> dist.ProcessGroup:
        """The wrapped lane's, whose own collectives are not padded; see `wait_broadcast_rest`."""
        return self._lane.process_group

    @property
    def backend(self) -> dist.ProcessGroupGloo:
        """See Lane."""
        return self._lane.backend

    def set_timeout(self, timeout_s: float) -> None:
        """The wrapped lane's."""
        self._lane.set_timeout(timeout_s)

    def start_all_reduce(self, tensor: Tensor, timeout_s: float, is_payload: bool = True) -> StartedPadded:
        """As the wrapped lane's."""
        begin_s = self._link.clock()
        marker = self._lane.start_all_reduce(torch.zeros(1), timeout_s, is_payload=False)
        inner = self._lane.start_all_reduce(tensor, timeout_s, is_payload)
        return StartedPadded(marker, inner, tensor.nbytes, begin_s, timeout_s)

    def wait_all_reduce(self, started: StartedPadded) -> None:
        """As the wrapped lane's, but ends later. PeerError if that does not fit into the time-out."""
        self._lane.wait_all_reduce(started.marker)
        joined_s = self._link.clock()
        self._lane.wait_all_reduce(started.inner)
        seconds = self._link.all_reduce_s(started.n_bytes, 0, len(self._group.members))
        self._free_s = max(self._free_s, joined_s) + seconds
        deadline_s = started.begin_s + started.timeout_s
        what = "all-reduce of gradients"
        self._link.wait_paid(self._free_s, deadline_s, started.timeout_s, what, started.n_bytes, self._group)

    def wait_broadcast_rest(self, n_bytes: int) -> None:
        """Sleeps for a broadcast's time, from the end of the real one on, as PaddedGroup does."""
        self._link.wait_until(self._link.clock() + self._link.broadcast_s(n_bytes, len(self._group.members)))

    def failure(self, error: Exception, what: str, after_s: float) -> PeerError:
        """The wrapped lane's."""
        return self._lane.failure(error, what, after_s)

    def check_peers(self) -> None:
        """The wrapped lane's."""
        self._lane.check_peers()

    def leave(self) -> None:
        """The wrapped lane's."""
        self._lane.leave()
