"""What candidates have in common: a replica that answers in another way, and what ranks agree on."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor

from lasgd.algorithms.requests import Answer, Contribution, Failure, Mean, Request
from lasgd.layout import Fragment
from lasgd.pace import Pace
from lasgd.replica import Replica

REMEMBERED = 0.9
"""Of what the headers have said so far, from round to round; of the means so far, from cycle to cycle."""

Text = Generator[Request, Answer, None]

SHARED: WeakKeyDictionary[Pace, Any] = WeakKeyDictionary()
"""By agreement, which all ranks of a virtual cluster share."""


class Candidate:
    """A replica as `lasgd.communicate` sees it. What a candidate answers in another way, it has a method for."""

    takes_momentum = True
    """Of the mean."""

    def __init__(self, replica: Replica, pace: Pace):
        self.replica, self.pace = replica, pace

    def __getattr__(self, name: str) -> Any:
        return getattr(self.replica, name)

    def correct(self, fragment: Fragment, sent: Contribution, outcome: Mean | Failure, momentum: float = 0.0) -> None:
        """As the replica's, once the candidate has seen the mean, if there is one."""
        if isinstance(outcome, Mean) and outcome.values is not None:
            outcome = self.seen(fragment, sent, outcome, outcome.values)
        self.replica.correct(fragment, sent, outcome, momentum)

    def seen(self, fragment: Fragment, sent: Contribution, outcome: Mean, mean: Tensor) -> Mean:
        """What is to be taken for the mean."""
        return outcome


def stands_for(replica: Replica, fragment: Fragment) -> Tensor:
    """z = x + r of a fragment without buffers, as of now."""
    whole = replica.parameters() + replica.wait_residual(1.0)
    return whole[fragment.begin : fragment.end]
