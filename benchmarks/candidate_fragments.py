"""How the vector is cut, and which part goes when."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from candidate_replica import SHARED, Candidate
from lasgd.algorithms.requests import Contribution, Failure, Mean
from lasgd.layout import Fragment, Layout, Piece
from lasgd.pace import Pace
from lasgd.replica import Replica

PIECES = 10
"""Of each fragment that is no single run of rows, about."""


class ByLayer(Candidate):
    """A layer goes at a time."""

    def __init__(self, replica: Replica, pace: Pace):
        super().__init__(replica, pace)
        layout = self.replica.layout
        layout.cut = lambda fragments: layers(layout)  # whatever the number asked for

    def next_fragment(self, fragments: int) -> Fragment:
        """In turn, as the replica's."""
        return self.replica.next_fragment(len(layers(self.replica.layout)))


def layers(layout: Layout) -> list[Fragment]:
    """A fragment for each module that has averaged tensors of its own."""
    found = []
    for index, (_, of_layer) in enumerate(itertools.groupby(layout.entries, key=lambda entry: id(entry.owner))):
        entries = list(of_layer)
        pieces = (
            Piece(entry, 0, len(entry.tensor()) if entry.tensor().dim() else 1, True, entry.begin, entry.end)
            for entry in entries
        )
        found.append(Fragment(index, entries[0].begin, entries[-1].end, tuple(pieces)))
    return found


@dataclass(frozen=True)
class Scattered:
    """A fragment that is several of the replica's."""

    parts: tuple[Fragment, ...]


class Interleaved(Candidate):
    """A fragment has rows of the whole model."""

    takes_momentum = False

    def __init__(self, replica: Replica, pace: Pace):
        super().__init__(replica, pace)
        self.turn = -1
        self.sent: list[tuple[Contribution, Tensor]] = []

    def next_fragment(self, fragments: int) -> Any:
        """In turn, each with a part of the whole model's length at equal distances."""
        if self.turn < 0:
            self.replica.next_fragment(fragments * PIECES)
        self.turn = (self.turn + 1) % fragments
        return Scattered(tuple(self.replica.fragments[self.turn :: fragments]))

    def snapshot(self, fragment: Any) -> Contribution:
        """Its parts one behind the other."""
        if not isinstance(fragment, Scattered):
            return self.replica.snapshot(fragment)
        self.sent = []
        for part in fragment.parts:
            sent = self.replica.snapshot(part)
            self.sent.append((sent, sent.values.clone()))  # the replica's buffer is one for all its fragments
        weight = min(sent.weight for sent, _ in self.sent)
        return Contribution(torch.cat([values for _, values in self.sent]), weight)

    def correct(self, fragment: Any, sent: Contribution, outcome: Mean | Failure, momentum: float = 0.0) -> None:
        """Part by part."""
        if isinstance(outcome, Failure) or outcome.values is None:
            return
        begin = 0
        for part, (of_part, values) in zip(fragment.parts, self.sent, strict=True):
            of_part.values.copy_(values)
            mean = replace(outcome, values=outcome.values[begin : begin + part.size])
            self.replica.correct(part, replace(of_part, weight=sent.weight), mean)
            begin += part.size


@dataclass
class Drifts:
    """How much each fragment drifts in a round, and when it went last; the same for all ranks."""

    rate: dict[int, float] = field(default_factory=dict)
    went: dict[int, int] = field(default_factory=dict)
    chosen: tuple[int, int] = (-1, 0)
    """(round, index), so that all ranks take the same."""
    since: int = 1
    """Rounds between the latest two turns of the fragment that went last."""

    def next(self, round_: int, fragments: int) -> int:
        """Those that never went first, then the one that has most to gain."""
        if self.chosen[0] != round_:
            new = [index for index in range(fragments) if index not in self.rate]
            waiting = {index: self.rate.get(index, 0.0) * (round_ - self.went[index]) for index in self.went}
            self.chosen = (round_, new[0] if new else max(waiting, key=waiting.__getitem__))
        return self.chosen[1]

    def say(self, round_: int, index: int, drift: float) -> None:
        """One rank's squared difference from the mean; the ranks' are added up."""
        if self.went.get(index) != round_:
            self.since = max(1, round_ - self.went.get(index, 0))
            self.went[index], self.rate[index] = round_, 0.0
        self.rate[index] += drift / self.since


class ByDrift(Candidate):
    """The fragment goes that has drifted most."""

    @property
    def drifts(self) -> Drifts:
        """Of all ranks."""
        return SHARED.setdefault(self.pace, Drifts())

    def next_fragment(self, fragments: int) -> Fragment:
        """Whatever the number asked for: that of the replica."""
        return self.replica.fragments[self.drifts.next(self.pace.round, len(self.replica.fragments))]

    def seen(self, fragment: Fragment, sent: Contribution, outcome: Mean, mean: Tensor) -> Mean:
        difference = sent.values - mean
        self.drifts.say(self.pace.round, fragment.index, float(difference @ difference))
        return outcome
