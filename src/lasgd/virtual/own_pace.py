"""What each rank knows of one agreement, where ranks read a round's header at different moments."""

from __future__ import annotations

from lasgd.algorithms.requests import Failure, Mean
from lasgd.pace import Pace


class OwnPace(Pace):
    """One rank's reading of an agreement, which draws each round's conclusions once for all ranks.

    A rank may be a round behind the others, no more: the next one cannot end without it.
    """

    def __init__(self, shared: Pace):
        self._shared = shared
        vars(self).update(vars(shared))

    def agree(self, outcome: Mean | Failure) -> None:
        """See Pace."""
        self._shared.agree(outcome)
        vars(self).update(vars(self._shared))

    def diverge(self) -> None:
        """See Pace."""
        self._shared.diverge()
        self.end = self._shared.end
