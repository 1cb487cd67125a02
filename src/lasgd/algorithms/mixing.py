"""The weighted mean of a few ranks' values, as they come."""

from __future__ import annotations

from lasgd.algorithms.requests import Contribution, Mean, Message


class WeightedMean:
    """m = sum_j w_j s_j / sum_j w_j over what was added; values of weight 0, of a rank with NaN, do not count."""

    def __init__(self, own: Contribution, weight: float):
        """Begins with `own` values, which are copied and count with `weight` times their own weight."""
        self.weight = 0.0
        """sum_j w_j so far."""
        self._sum = own.values.clone().zero_()
        self._take(own.values, weight * own.weight)

    def add(self, message: Message, share: float = 1.0) -> None:
        """Another rank's values, to count with `share` of their weight."""
        assert message.values is not None
        self._take(message.values, share * message.weight)

    def mean(self) -> Mean:
        """m; without values where all weights were 0. Ends the adding."""
        return Mean(self._sum.div_(self.weight) if self.weight else None)

    def _take(self, values, weight: float) -> None:
        if weight:
            self._sum.add_(values, alpha=weight)
            self.weight += weight
