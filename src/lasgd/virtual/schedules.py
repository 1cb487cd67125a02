"""Who sends to whom in an all-reduce: each method as steps, whose messages are on their way at the same time.

A step ends when its last message has arrived, and the next one begins. On equal links the steps add up to the closed
forms of `group/cost.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Step(NamedTuple):
    """Messages that begin together, `times` times over."""

    pairs: list[tuple[int, int]]
    """(source, target) of each."""
    share: float
    """Of the vector, in each message."""
    times: int = 1


def ring(members: Sequence[int]) -> list[Step]:
    """Everybody sends one part in n to the next, 2 (n-1) times. Source: Patarasuk & Yuan (2009), as in `cost`."""
    n = len(members)
    if n == 1:
        return []
    return [Step([(members[i], members[(i + 1) % n]) for i in range(n)], 1 / n, 2 * (n - 1))]


def halving_doubling(members: Sequence[int]) -> list[Step]:
    """Recursive halving and back by doubling, nearest partners first, as in MPICH (`cost` names the source).

    Where n is no power of two, neighbours among the first members share one place each.
    """
    exchanges = len(members).bit_length() - 1
    doubles = len(members) - (1 << exchanges)
    folded, standing = members[0 : 2 * doubles : 2], members[1 : 2 * doubles : 2]
    active = [*standing, *members[2 * doubles :]]
    steps = [
        Step([(member, active[i ^ 1 << k]) for i, member in enumerate(active)], 0.5 ** (k + 1), times=2)
        for k in range(exchanges)
    ]
    if doubles:
        steps.insert(0, Step(list(zip(folded, standing, strict=True)), 1.0))
        steps.append(Step(list(zip(standing, folded, strict=True)), 1.0))
    return steps


def tree(members: Sequence[int]) -> list[Step]:
    """A reduce along a binomial tree to the first member, and a broadcast back."""
    reduce = _reduce(members)
    return [*reduce, *_mirrored(reduce)]


def hierarchical(nodes: Sequence[Sequence[int]]) -> list[Step]:
    """Inside each node a reduce to its first member, a ring of these, and inside each node a broadcast.

    Inside along binomial trees, all nodes at the same time.
    """
    together: list[Step] = []
    for members in nodes:
        for k, step in enumerate(_reduce(members)):
            if k == len(together):
                together.append(Step([], 1.0))
            together[k].pairs.extend(step.pairs)
    return [*together, *ring([members[0] for members in nodes]), *_mirrored(together)]


def _reduce(members: Sequence[int]) -> list[Step]:
    n = len(members)
    distances = [1 << k for k in range((n - 1).bit_length())]
    return [Step([(members[i + d], members[i]) for i in range(0, n - d, 2 * d)], 1.0) for d in distances]


def _mirrored(steps: Sequence[Step]) -> list[Step]:
    return [Step([(target, source) for source, target in step.pairs], step.share) for step in reversed(steps)]
