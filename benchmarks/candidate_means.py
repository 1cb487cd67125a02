"""What goes into a mean, and what is done with it."""

from __future__ import annotations

import math
from dataclasses import replace
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from candidate_replica import REMEMBERED, Candidate, Text, stands_for
from lasgd.algorithms.requests import Contribution, Failure, Gradient, Mean, Update
from lasgd.layout import Fragment
from lasgd.pace import Pace
from lasgd.replica import Replica

LENGTHS: WeakKeyDictionary[Replica, float] = WeakKeyDictionary()
"""Of the latest gradient."""


class WeightedSteps(Candidate):
    """Who has learnt more since counts for more."""

    def __init__(self, replica: Replica, pace: Pace):
        super().__init__(replica, pace)
        self.before: dict[int, int] = {}

    def snapshot(self, fragment: Fragment) -> Contribution:
        """With the weight of its local steps."""
        sent, steps = self.replica.snapshot(fragment), self.replica.tally.local_steps
        taken, self.before[sent.begin] = steps - self.before.get(sent.begin, 0), steps
        return replace(sent, weight=sent.weight * max(1, taken))


def compute_measuring(replica: Replica, pace: Pace) -> Text:
    """Notes how long each gradient is: when a snapshot is made the next one may be half done."""
    while True:
        yield Gradient()
        gradients = [entry.tensor().grad for entry in replica.layout.entries]
        squares = [float(gradient.square().sum()) for gradient in gradients if gradient is not None]
        LENGTHS[replica] = math.sqrt(sum(squares))
        yield Update()
        replica.merge()


class WeightedGradient(Candidate):
    """Who has come down further counts for more. Its ranks compute as above."""

    def snapshot(self, fragment: Fragment) -> Contribution:
        """With the weight of the rank's latest gradient; 1 before there is one."""
        sent, length = self.replica.snapshot(fragment), LENGTHS.get(self.replica, 1.0)
        return replace(sent, weight=sent.weight / length) if 0 < length < math.inf else sent


class Dropped(Candidate):
    """The mean replaces what it finds."""

    takes_momentum = False

    def seen(self, fragment: Fragment, sent: Contribution, outcome: Mean, mean: Tensor) -> Mean:
        return replace(outcome, values=mean - (stands_for(self.replica, fragment) - sent.values))


class RememberedMean(Candidate):
    """A mean over the means of some ten cycles."""

    def __init__(self, replica: Replica, pace: Pace):
        super().__init__(replica, pace)
        size, dtype = replica.layout.size, replica.layout.dtype
        self.remembered = torch.full((size,), math.nan, dtype=dtype)  # NaN: no mean so far

    def seen(self, fragment: Fragment, sent: Contribution, outcome: Mean, mean: Tensor) -> Mean:
        part = self.remembered[fragment.begin : fragment.end]
        part.copy_(torch.where(part.isnan(), mean, part.lerp(mean, 1 - REMEMBERED)))
        return outcome

    def adopt(self, fragment: Fragment, outcome: Mean | Failure) -> None:
        """In place of the last exact average."""
        part = self.remembered[fragment.begin : fragment.end]
        if isinstance(outcome, Mean) and not part.isnan().any():
            outcome = replace(outcome, values=part)
        self.replica.adopt(fragment, outcome)
