"""A group in one process whose network does what a test says: nothing arrives until then.

    network = Network(world_size=3)
    groups = [network.group(rank) for rank in range(3)]      one per thread
    network.wait_joined()                                    all ranks stand in the same collective
    network.deliver()                                        it succeeds, on all
    network.fail(PeerError("..."))                           it fails, on all

With `deliver_at_once=True` every collective succeeds as soon as all have joined.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lasgd.errors import PeerError
from lasgd.group.base import Letter
from lasgd.group.cost import pieces_bytes_sent, ring_bytes_sent


class Network:
    """Connects `world_size` scripted groups."""

    def __init__(self, world_size: int, deliver_at_once: bool = False):
        self.world_size = world_size
        self.deliver_at_once = deliver_at_once
        self.collectives = 0
        """Finished so far, failed ones included."""
        self.reasons: dict[int, str] = {}
        self._changed = threading.Condition()
        self._joined: dict[int, Any] = {}
        self._heard: set[int] = set()  # of those in the present collective, also those that have given up
        self._result: Any = None
        self._error: Exception | None = None
        self._left: set[int] = set()
        self._letters: dict[tuple[int, int], list[Letter]] = {}  # by rank and box, in the order of sending

    def group(self, rank: int) -> ScriptedGroup:
        """The group as `rank` sees it."""
        return ScriptedGroup(self, rank)

    def wait_joined(self, timeout_s: float = 10.0) -> None:
        """Returns when every rank stands in the next collective. Raises TimeoutError."""
        with self._changed:
            if not self._changed.wait_for(lambda: len(self._joined) == self.world_size, timeout_s):
                raise TimeoutError(f"only ranks {sorted(self._joined)} have joined after {timeout_s:g} s")

    def deliver(self) -> None:
        """Lets the collective that all have joined succeed."""
        self.wait_joined()
        with self._changed:
            self._finish(None)

    def fail(self, error: Exception) -> None:
        """Lets the present collective fail, on all ranks that stand in it."""
        with self._changed:
            self._finish(error)

    def _finish(self, error: Exception | None) -> None:
        self._error = error
        if error is None:
            _, combine, _ = next(iter(self._joined.values()))
            self._result = combine({rank: value for rank, (_, _, value) in sorted(self._joined.items())})
        self._joined.clear()
        self._heard.clear()
        self.collectives += 1
        self._changed.notify_all()

    def _wait_collective(self, rank: int, what: str, combine: Callable, value: Any, timeout_s: float) -> Any:
        with self._changed:
            number = self.collectives
            others = {there for there, _, _ in self._joined.values()} - {what}
            if others:
                raise PeerError(f"rank {rank} is in {what!r}, others are in {sorted(others)}: collectives out of order")
            self._joined[rank] = (what, combine, value)
            self._heard.add(rank)
            self._changed.notify_all()
            if self.deliver_at_once and len(self._joined) == self.world_size:
                self._finish(None)
            deadline_s = time.monotonic() + timeout_s
            while self.collectives == number:
                left = deadline_s - time.monotonic()
                if left <= 0 or self._left:
                    silent = sorted(set(range(self.world_size)) - self._heard)
                    self._joined.pop(rank, None)
                    why = "".join(f" Rank {r} left: {text}." for r, text in sorted(self.reasons.items()))
                    raise PeerError(f"{what} not finished (scripted network). Silent: {silent}.{why}")
                self._changed.wait(left)
            if self._error is not None:
                raise self._error
            return self._result

    def _leave(self, rank: int, reason: str | None) -> None:
        with self._changed:
            self._left.add(rank)
            if reason:
                self.reasons[rank] = reason
            self._changed.notify_all()

    def _send(self, peer: int, box: int, letter: Letter) -> None:
        with self._changed:
            self._letters.setdefault((peer, box), []).append(letter)
            self._changed.notify_all()

    def _wait_receive(self, rank: int, box: int, peer: int | None, timeout_s: float) -> Letter | None:
        def found() -> Letter | None:
            letters = self._letters.get((rank, box), [])
            first = next((letter for letter in letters if peer in (None, letter.source)), None)
            if first is not None:
                letters.remove(first)
            return first

        with self._changed:
            return self._changed.wait_for(found, timeout_s)


class ScriptedMail:
    """One rank's end of a Network's letters, which arrive at once. See Mail for the methods."""

    def __init__(self, network: Network, rank: int):
        self.bytes_sent = 0
        self._network, self._rank = network, rank

    def send(self, peer: int, box: int, values: Tensor | None, weight: float, note: int, due_s: float = 0.0) -> None:
        """See Mail."""
        if peer != self._rank and values is not None:
            self.bytes_sent += values.nbytes
        copy = None if values is None else values.clone()
        self._network._send(peer, box, Letter(self._rank, copy, weight, note, due_s))

    def wait_receive(self, box: int, peer: int | None, timeout_s: float) -> Letter | None:
        """See Mail."""
        return self._network._wait_receive(self._rank, box, peer, timeout_s)

    def leave(self) -> None:
        """See Mail."""


class ScriptedGroup:
    """One rank's end of a Network. See Group for the methods."""

    epoch = 0

    def __init__(self, network: Network, rank: int):
        self.rank = rank
        self.world_size = network.world_size
        self.members = tuple(range(network.world_size))
        self.bytes_sent = 0
        self._network = network

    def wait_all_reduce(self, header: Tensor, vector: Tensor, timeout_s: float) -> tuple[float, float]:
        """See Group."""

        def total(values: dict[int, tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
            # In the order of ranks: the same rounding everywhere and every time.
            return sum_in_order([h for h, _ in values.values()]), sum_in_order([v for _, v in values.values()])

        what = f"all-reduce of {vector.numel()} elements"
        sums = self._network._wait_collective(self.rank, what, total, (header.clone(), vector.clone()), timeout_s)
        header.copy_(sums[0])
        vector.copy_(sums[1])
        self.bytes_sent += ring_bytes_sent(vector.nbytes + header.nbytes, self.world_size)
        now_s = time.monotonic()
        return now_s, now_s

    def wait_all_to_all(
        self, header: Tensor, pieces: Tensor, received: Tensor, timeout_s: float
    ) -> tuple[float, float]:
        """See GroupWithPieces."""

        def exchanged(values: dict[int, tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
            return sum_in_order([h for h, _ in values.values()]), torch.stack([p for _, p in values.values()])

        what = f"all-to-all of {pieces.numel()} bytes"
        total, rows = self._network._wait_collective(
            self.rank, what, exchanged, (header.clone(), pieces.clone()), timeout_s
        )
        header.copy_(total)
        received.copy_(rows[:, self.rank])
        self.bytes_sent += ring_bytes_sent(header.nbytes, self.world_size)
        self.bytes_sent += pieces_bytes_sent(pieces.nbytes, self.world_size)
        now_s = time.monotonic()
        return now_s, now_s

    def wait_all_gather(self, piece: Tensor, received: Tensor, timeout_s: float) -> float:
        """See GroupWithPieces."""
        received.copy_(
            self._network._wait_collective(
                self.rank,
                f"all-gather of {received.numel()} bytes",
                lambda values: torch.stack(list(values.values())),
                piece.clone(),
                timeout_s,
            )
        )
        self.bytes_sent += pieces_bytes_sent(received.nbytes, self.world_size)
        return time.monotonic()

    def wait_broadcast(self, tensor: Tensor, source: int, timeout_s: float) -> None:
        """See Group."""
        found = self._network._wait_collective(
            self.rank, "broadcast", lambda values: values[source], tensor.clone(), timeout_s
        )
        tensor.copy_(found)

    def wait_exchange(self, topic: str, value: bytes, timeout_s: float) -> list[bytes]:
        """See Group."""
        return list(
            self._network._wait_collective(self.rank, topic, lambda values: list(values.values()), value, timeout_s)
        )

    def wait_mail(self, timeout_s: float) -> ScriptedMail:
        """See GroupWithMail."""
        return ScriptedMail(self._network, self.rank)

    def leave(self, reason: str | None = None) -> None:
        """See Group."""
        self._network._leave(self.rank, reason)


def sum_in_order(tensors: list[Tensor]) -> Tensor:
    """The sum, a new tensor, added up in the order given."""
    total = torch.zeros_like(tensors[0])
    for tensor in tensors:
        total += tensor
    return total
