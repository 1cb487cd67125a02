"""What can be wrong with a replica: NaN or Inf, or a drift out of all proportion.

A rank whose local steps diverge holds NaN or Inf in the end, but before that it is finite, and a few rounds of it in
the mean take all ranks along. Its drift says so in time: how far its contribution is from the mean before, by fragment.
That is compared with what the same rank's drift was, because ranks may well differ from each other (in speed, batch
size, data), and one rank's drift seldom changes much from one cycle of fragments to the next.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import IntEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # what shows a run's health must not load torch for it
    from lasgd.layout import Fragment


class Health(IntEnum):
    """One rank's word in the header."""

    WELL = 0
    NOT_FINITE = 1  # it holds NaN or Inf
    RAN_AWAY = 2  # its drift has grown out of all proportion

    @property
    def said(self) -> str:
        """What the rank did, in words."""
        return {
            Health.WELL: "was well",
            Health.NOT_FINITE: "held NaN or Inf",
            Health.RAN_AWAY: "ran away from the mean",
        }[self]


GROWTH = 4.0
"""Drift per local step over what it was before, from which on a rank has run away. Steps, warm-ups and the changes of
a network make less of a difference: benchmarks/runaway.py measures how much."""

KEPT = 0.9
"""Of the steps that a fragment's drift was taken by, and of the largest it has been, from one cycle to the next."""


class DriftWatch:
    """One rank's drift by fragment, cycle by cycle; for one thread.

    Part of a drift is the mean's own momentum, which comes of the steps of earlier cycles. So a drift is taken by the
    local steps since the cycle before, but by no fewer than `KEPT` of what it was taken by then: after a network that
    stood still for a thousand steps, the mean moves on in steps of that size for a while. Such cycles tell too little
    of the usual drift to be learnt from: the largest one stands meanwhile.

    A fragment that has hardly moved, as behind weights that begin with zero, may come to drift as all usually do.
    """

    def __init__(self) -> None:
        self._before: dict[int, tuple[int, float, float]] = {}
        """By fragment: local steps then, those the drift was taken by, the largest drift."""
        self.largest_growth = 0.0
        """Of a drift per local step over the largest before it, among those that were not too much."""

    def grew_too_much(self, fragment: int, drift: float, local_steps: int) -> bool:
        """Takes in one fragment's drift, a distance, after so many local steps; NaN where it is not known yet.

        A drift of Inf, or one whose square is, has always grown too much.
        """
        if math.isnan(drift):
            return False
        if fragment not in self._before:
            self._before[fragment] = (local_steps, 0.0, 0.0)
            return drift == math.inf
        steps_before, counted, largest = self._before[fragment]
        steps, counted = local_steps - steps_before, KEPT * counted
        is_fresh, counted = steps >= counted, max(1.0, steps, counted)
        drift /= counted
        if drift == math.inf or (largest > 0 and drift > max(GROWTH * largest, self._usual())):
            return True
        self.largest_growth = max(self.largest_growth, drift / largest if largest else 0.0)
        self._before[fragment] = (local_steps, counted, max(drift, KEPT * largest if is_fresh else largest))
        return False

    def _usual(self) -> float:
        return math.sqrt(math.fsum(largest**2 for _, _, largest in self._before.values()) / len(self._before))

    def cut_anew(self, before: Sequence[Fragment], after: Sequence[Fragment]) -> None:
        """What is known of the old fragments, for the new ones: at most as far as those they are cut from together."""
        known, self._before = self._before, {}
        for fragment in after:
            within = [old.index for old in before if old.begin < fragment.end and fragment.begin < old.end]
            if all(index in known for index in within):
                steps, counted, largest = zip(*(known[index] for index in within), strict=True)
                self._before[fragment.index] = min(steps), max(counted), math.hypot(*largest)

    def forget(self) -> None:
        """The rank goes on from elsewhere."""
        self._before.clear()
