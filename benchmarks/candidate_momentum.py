"""What becomes of the optimizers' momentum at a correction."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from candidate_gains import AdaptiveGain
from candidate_replica import SHARED, Candidate, Text
from lasgd.algorithms.requests import Contribution, Gradient, Mean, Update
from lasgd.layout import Fragment
from lasgd.pace import Pace
from lasgd.replica import Replica


def compute_cleared(replica: Replica, pace: Pace) -> Text:
    """Clears the optimizer's state wherever something has been shown."""
    while True:
        yield Gradient()
        yield Update()
        shown = replica.tally.staleness.merges
        replica.merge()
        if replica.tally.staleness.merges > shown:
            replica.on_recovery()


class MomentumAveraged(Candidate):
    """The optimizers' momentum goes with the replicas, and what it became meanwhile is kept as well."""

    takes_momentum = False

    def __init__(self, replica: Replica, pace: Pace):
        super().__init__(replica, pace)
        self.rounds = 0
        self.sent: list[Tensor] = []

    def snapshot(self, fragment: Fragment) -> Contribution:
        """With one of the momentum, which all ranks find under the same number."""
        self.rounds += 1
        self.sent = [buffer.clone() for buffer in momentum_of(self.replica, fragment)]
        sent = SHARED.setdefault(self.pace, {})
        sent.setdefault(self.rounds, []).append(self.sent)
        sent.pop(self.rounds - 2, None)
        return self.replica.snapshot(fragment)

    def seen(self, fragment: Fragment, sent: Contribution, outcome: Mean, mean: Tensor) -> Mean:
        of_all, buffers = SHARED[self.pace][self.rounds], momentum_of(self.replica, fragment)
        if all(len(each) == len(buffers) for each in of_all):
            for buffer, mine, *of_ranks in zip(buffers, self.sent, *of_all, strict=True):
                buffer.add_(sum(of_ranks) / len(of_ranks) - mine)
        return outcome


class MomentumScaled(AdaptiveGain):
    """Of the momentum as much is left as of the correction is taken."""

    def seen(self, fragment: Fragment, sent: Contribution, outcome: Mean, mean: Tensor) -> Mean:
        outcome = super().seen(fragment, sent, outcome, mean)
        for buffer in momentum_of(self.replica, fragment):
            buffer.mul_(self.gain)
        return outcome


class MomentumProjected(Candidate):
    """Momentum that leads away from the mean loses its part along the correction."""

    takes_momentum = False

    def seen(self, fragment: Fragment, sent: Contribution, outcome: Mean, mean: Tensor) -> Mean:
        correction = mean - sent.values
        buffers = momentum_of(self.replica, fragment)
        if buffers:
            momentum = torch.cat([buffer.reshape(-1) for buffer in buffers])
            away = float(momentum @ correction)  # a local step goes against the momentum
            if away > 0:
                momentum -= away / float(correction.square().sum()) * correction
                begin = 0
                for buffer in buffers:
                    buffer.copy_(momentum[begin : begin + buffer.numel()].view_as(buffer))
                    begin += buffer.numel()
        return outcome


def momentum_of(replica: Replica, fragment: Fragment) -> list[Tensor]:
    """The live momentum of a fragment without buffers; none before the first local step."""
    state = cast(Any, replica.on_recovery).__self__  # what clears the optimizer's state is a method of it
    found = []
    for piece in fragment.pieces:
        tensor = piece.entry.tensor()
        if tensor in state:
            buffer = state[tensor]["momentum_buffer"]
            found.append(buffer if piece.is_whole else buffer.narrow(0, piece.first_row, piece.rows))
    return found
