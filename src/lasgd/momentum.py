"""How momentum is shared out between the ranks' optimizers and their mean.

Momentum of the optimizers stays with its rank and carries that rank's noise far before it is averaged; momentum of the
mean carries what all ranks have in common. A gradient moves the mean by lr / ((1 - ranks) (1 - mean)) in the end, so
at the same learning rate it goes as far with all of it here, there or shared out. What else changes: docs/theory.md.
"""

from __future__ import annotations

MOST_OF_RANKS = 0.5
"""What is left to the optimizers: a short memory of their own, within a cycle. With more the ranks drift apart, with
less the mean's memory is longer."""

LEAST_FRAGMENTS = 4
"""That the vector should be cut into: in a cycle of one to three local steps momentum of the mean comes back before
anything has answered it, and runs away at small learning rates already (docs/theory.md)."""


def shared_out(momentum: float) -> tuple[float, float]:
    """(of the optimizers, of the mean), from 0 to below 1, that together go as far as `momentum` in one place.

    >>> shared_out(0.9)
    (0.5, 0.8)
    """
    ranks = min(momentum, MOST_OF_RANKS)
    return ranks, round(1 - (1 - momentum) / (1 - ranks), 9)
