"""Who writes to whom in gossip, and how much of what arrives counts: pure functions of rank, world size and round.

    ring          the ranks before and after
    complete      everybody
    exponential   the ranks 1, 2, 4, ... places away

Undirected, for d_psgd and ad_psgd: W is symmetric and doubly stochastic (rows and columns sum to 1), so that mixing
x <- W x keeps the mean and, the graph being connected, brings all ranks to it at the rate of W's second eigenvalue.
Directed, for sgp and osgp: every rank gives its weight away in equal shares, so that P is column-stochastic.
"""

from __future__ import annotations

from collections.abc import Sequence

from lasgd.errors import unknown

NAMES = ("ring", "complete", "exponential")


def check(name: str) -> None:
    """Raises ConfigurationError with the nearest known name."""
    if name not in NAMES:
        raise unknown("topology", name, NAMES)


def neighbours(name: str, rank: int, world_size: int) -> tuple[int, ...]:
    """Who `rank` mixes with, ascending, without itself; they mix with it too."""
    check(name)
    others = {(rank + sign * hop) % world_size for hop in _hops(name, world_size) for sign in (1, -1)}
    return tuple(sorted(others - {rank}))


def mixing_weights(name: str, rank: int, world_size: int) -> dict[int, float]:
    """Row `rank` of W: Metropolis-Hastings weights, 1 / (1 + the larger number of neighbours), the rest for itself.

    Source: L. Xiao, S. Boyd, S. Lall (2005), Int. Symp. Information Processing in Sensor Networks.
    """
    own = neighbours(name, rank, world_size)
    row = {j: 1.0 / (1 + max(len(own), len(neighbours(name, j, world_size)))) for j in own}
    row[rank] = 1.0 - sum(row.values())
    return row


def partners(name: str, rank: int, world_size: int) -> tuple[int, ...]:
    """The odd ones among the neighbours of an even rank, the even ones of an odd rank.

    With edges between even and odd ranks alone the graph is bipartite, whatever the topology was; and still connected,
    since all topologies have the edges between a rank and the next.
    """
    return tuple(j for j in neighbours(name, rank, world_size) if (j - rank) % 2)


def targets(name: str, rank: int, world_size: int, round: int) -> tuple[int, ...]:
    """Whom `rank` writes to in a round: one rank, but all others for `complete`.

    `exponential` takes its hops in turn, one a round: after log2(n) rounds of a world of 2^k ranks everybody has heard
    of everybody (Assran et al. 2019, appendix A).
    """
    check(name)
    hops = _hops(name, world_size)
    if name == "exponential" and hops:
        hops = (hops[round % len(hops)],)
    return tuple((rank + hop) % world_size for hop in hops)


def sources(name: str, rank: int, world_size: int, round: int) -> tuple[int, ...]:
    """Who writes to `rank` in a round."""
    there = targets(name, 0, world_size, round)
    return tuple((rank - hop) % world_size for hop in there)


def _hops(name: str, world_size: int) -> Sequence[int]:
    """How many places away those are whom a rank writes to."""
    if name == "ring":
        return (1,) if world_size > 1 else ()
    if name == "complete":
        return tuple(range(1, world_size))
    return tuple(1 << k for k in range(max(0, (world_size - 1).bit_length())))
