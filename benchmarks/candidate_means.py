"""What goes into a mean, and what is done with it."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from candidate_replica import REMEMBERED, Candidate, stands_for
from lasgd.algorithms.requests import Contribution, Failure, Mean
from lasgd.layout import Fragment
from lasgd.pace import Pace
from lasgd.replica import Replica


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


class WeightedGradient(Candidate):
    """Who has come down further counts for more."""

    def snapshot(self, fragment: Fragment) -> Contribution:
        """With the weight of the rank's gradient; 1 before there is one."""
        sent, gradients = self.replica.snapshot(fragment), self.gradients()
        length = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients))
        return replace(sent, weight=sent.weight / length) if 0 < length < math.inf else sent

    def gradients(self) -> list[Tensor]:
        """Of all parameters that have one."""
        found = (entry.tensor().grad for entry in self.replica.layout.entries)
        return [gradient for gradient in found if gradient is not None]


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
