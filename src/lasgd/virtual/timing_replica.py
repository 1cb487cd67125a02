"""A replica without values: what `lasgd.replica.Replica` offers to the algorithms' texts, for runs that ask only when.

It knows how long the vector is and how it is cut, which corrections have arrived, and how stale each was when shown.
Fragments are equal parts, for there are no rows to cut between.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

from lasgd.algorithms.requests import Contribution, Failure, Mean
from lasgd.health import Health
from lasgd.tally import Tally


class Size(NamedTuple):
    """Stands for a tensor of which only the size matters: what texts do to vectors leaves it as it is."""

    elements: int
    nbytes: int

    def numel(self) -> int:
        """Number of elements."""
        return self.elements

    def clone(self) -> Size:
        """A size is never changed, and needs no copy."""
        return self

    def zero_(self) -> Size:
        """As Tensor's."""
        return self

    def mul_(self, factor: float) -> Size:
        """As Tensor's, with a number."""
        return self

    def div_(self, divisor: float) -> Size:
        """As Tensor's, with a number."""
        return self

    def add_(self, other: Size, alpha: float = 1.0) -> Size:
        """As Tensor's; raises ValueError for another size."""
        return self._with(other)

    def sub_(self, other: Size, alpha: float = 1.0) -> Size:
        """As Tensor's; raises ValueError for another size."""
        return self._with(other)

    def lerp_(self, end: Size, weight: float) -> Size:
        """As Tensor's; raises ValueError for another size."""
        return self._with(end)

    def copy_(self, source: Size) -> Size:
        """As Tensor's; raises ValueError for another size."""
        return self._with(source)

    def _with(self, other: Size) -> Size:
        if other != self:
            raise ValueError(f"a vector of {self.elements} elements meets one of {other.elements}")
        return self


@dataclass(frozen=True, eq=False)
class SizedFragment:
    """One part of a vector that nobody holds."""

    index: int
    begin: int
    end: int
    sent: Contribution
    gradient: Contribution


class TimingReplica:
    """One rank's replica in a run without gradients. Shares its fragments with all ranks that are cut alike."""

    __slots__ = (
        "_arrived",
        "_asked_fragments",
        "_is_frozen",
        "_sent_step",
        "_snapshot_step",
        "_turn",
        "_vector",
        "fragments",
        "tally",
    )

    health = Health.WELL

    def __init__(self, vector: Vector, tally: Tally, fragments: int = 1):
        self.tally = tally
        self._vector = vector
        self._is_frozen = False
        self._sent_step = 0
        self._arrived: list[int] = []
        self._cut(fragments)
        self._turn = -1

    def next_fragment(self, fragments: int) -> SizedFragment:
        """See Replica."""
        self._turn += 1
        if self._turn == len(self.fragments):
            self._turn = 0
        if self._turn == 0 and fragments != self._asked_fragments:
            self._recut(fragments)
        return self.fragments[self._turn]

    def snapshot(self, fragment: SizedFragment) -> Contribution:
        """See Replica."""
        self._sent_step = self.tally.local_steps
        return fragment.sent

    def correct(
        self, fragment: SizedFragment, sent: Contribution, outcome: Mean | Failure, momentum: float = 0.0
    ) -> None:
        """See Replica."""
        if not isinstance(outcome, Failure) and fragment.index not in self._arrived:
            self._snapshot_step[fragment.index] = self._sent_step
            self._arrived.append(fragment.index)

    def presence(self) -> Contribution:
        """See Replica."""
        return _PRESENCE

    def gradient(self) -> Contribution:
        """See Replica."""
        return self.fragments[0].gradient

    def set_gradient(self, outcome: Mean | Failure) -> None:
        """See Replica."""

    def freeze(self) -> None:
        """See Replica."""
        self._is_frozen = True

    def adopt(self, fragment: SizedFragment, outcome: Mean | Failure) -> None:
        """See Replica."""

    def show_average(self) -> None:
        """See Replica."""
        self._arrived.clear()

    def merge(self) -> None:
        """See Replica."""
        arrived = self._arrived
        if not arrived or self._is_frozen:
            return
        steps, snapshot_step, staleness = self.tally.local_steps, self._snapshot_step, self.tally.staleness
        for index in arrived:
            staleness.add(steps - snapshot_step[index])
        arrived.clear()

    def _cut(self, fragments: int) -> None:
        self._asked_fragments = fragments
        self.fragments = self._vector.cut(fragments)
        self._snapshot_step = [0] * len(self.fragments)

    def _recut(self, fragments: int) -> None:
        before = list(zip(self.fragments, self._snapshot_step, strict=True))
        unseen = [(old, step) for old, step in before if old.index in self._arrived]
        self._cut(fragments)
        self._arrived = []
        for fragment in self.fragments:
            steps = [step for old, step in unseen if old.begin < fragment.end and fragment.begin < old.end]
            if steps:
                self._snapshot_step[fragment.index] = min(steps)
                self._arrived.append(fragment.index)


_NOTHING: Any = Size(0, 0)
_PRESENCE = Contribution(_NOTHING, weight=1.0)


class Vector:
    """The length of what is averaged, and its cuts, made once for all ranks."""

    def __init__(self, elements: int, element_bytes: int = 4):
        """Raises ValueError for a vector of nothing."""
        if elements < 1 or element_bytes < 1:
            raise ValueError(f"elements is {elements}, element_bytes {element_bytes}; expected at least 1")
        self.elements, self.element_bytes = elements, element_bytes
        self._cuts: dict[int, tuple[SizedFragment, ...]] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of the whole vector."""
        return self.elements * self.element_bytes

    def cut(self, fragments: int) -> tuple[SizedFragment, ...]:
        """About equal parts; fewer where there are not so many elements."""
        if fragments not in self._cuts:
            parts = min(fragments, self.elements)
            ends = [round(k * self.elements / parts) for k in range(parts + 1)]
            self._cuts[fragments] = tuple(
                self._fragment(k, begin, end) for k, (begin, end) in enumerate(pairwise(ends))
            )
        return self._cuts[fragments]

    def _fragment(self, index: int, begin: int, end: int) -> SizedFragment:
        values: Any = Size(end - begin, (end - begin) * self.element_bytes)
        sent = Contribution(values, weight=1.0, begin=begin)
        return SizedFragment(index, begin, end, sent, replace(sent, is_gradient=True))
