"""How long messages and collectives take between ranks whose links differ.

                      node 0                          backbone                      node 1
    rank 0 ── up, down ──┐                                                     ┌── up, down ── rank 4
    rank 1 ── up, down ──┼── node up, node down ───────────┬─── node up, node down ──┼── up, down ── rank 5
    ...                  ┘                                                     └  ...

Every rank has a link of its own, with a bandwidth each way. Where there are nodes, what leaves a node crosses the
node's link too, which its ranks share. What no link limits can still be limited by the backbone. A message costs what
Hockney's model says, latency_s + n_bytes/bandwidth, with the bandwidth of the slowest link on its path; messages that
are on their way at the same time share links fairly (max-min), or by their windows.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from lasgd.errors import ConfigurationError, unknown
from lasgd.group.cost import halving_doubling_all_reduce_s, ring_all_reduce_s, tree_all_reduce_s
from lasgd.virtual import schedules
from lasgd.virtual.schedules import Step

Resource = tuple[str, int]
"""Something with a capacity that messages share: ("up", rank), ("down", rank), ("node up", node), ("node down", node),
("backbone", 0)."""

Each = float | Sequence[float]
"""One value for all, or one for each."""

_BACKBONE: Resource = ("backbone", 0)

_ON_EQUAL_LINKS: dict[str, Callable[[float, int, float, float], float]] = {
    "ring": ring_all_reduce_s,
    "halving_doubling": halving_doubling_all_reduce_s,
    "tree": tree_all_reduce_s,
}
_STEPS: dict[str, Callable[[Sequence[int]], list[Step]]] = {
    "ring": schedules.ring,
    "halving_doubling": schedules.halving_doubling,
    "tree": schedules.tree,
}
METHODS = (*_STEPS, "hierarchical")
"""Of an all-reduce; `hierarchical` needs nodes."""

_COSTS_KEPT = 1024


class AlphaBeta(NamedTuple):
    """What a message or a collective costs: latency_s + s_per_byte * n_bytes.

    Source: R. W. Hockney (1994), The communication challenge for MPP, Parallel Computing 20(3).
    """

    latency_s: float
    s_per_byte: float

    def seconds(self, n_bytes: float) -> float:
        """For `n_bytes`."""
        return self.latency_s + self.s_per_byte * n_bytes


@dataclass(frozen=True)
class Nodes:
    """Ranks 0 to ranks_per_node - 1 are in node 0, and so on; the last node may have fewer."""

    ranks_per_node: int
    up_bytes_per_s: Each
    """Of each node's link, which all messages share that leave the node."""
    down_bytes_per_s: Each | None = None
    """None: as up."""
    inside_latency_s: float = 0.0
    """One way, of a message between two ranks of a node."""

    def of(self, rank: int) -> int:
        """The node that `rank` is in."""
        return rank // self.ranks_per_node


@dataclass(frozen=True)
class Network:
    """Links between `world_size` ranks. math.inf as a bandwidth stands for a link that is never what limits."""

    world_size: int
    up_bytes_per_s: Each
    """Of each rank's own link, which everything crosses that it sends."""
    down_bytes_per_s: Each | None = None
    """The same for what it receives. None: as up."""
    latency_s: Each = 0.0
    """One way, of a message between two ranks (in different nodes, if there are nodes); the larger of both ends'."""
    nodes: Nodes | None = None
    backbone_bytes_per_s: float = math.inf
    """What all messages together (between nodes, if there are nodes) have at most."""
    round_s: float = 0.0
    """An all-reduce of the whole vector takes at least this long, of a part its share."""
    share_spread: float = 0.0
    """Of the shares that messages between ranks have of a link: the standard deviation of their weights' logarithm."""
    first_window_bytes: float = math.inf
    """Of a message between ranks, what may be under way when it begins; its share grows from there (flows.py)."""
    full_window_s: float = 0.1
    """Up to what its slowest link carries in this time."""
    _costs: dict[tuple[tuple[int, ...], str], AlphaBeta] = field(
        default_factory=dict, init=False, compare=False, repr=False
    )

    def __post_init__(self) -> None:
        if self.world_size < 1:
            raise ConfigurationError(f"network: world_size is {self.world_size}; expected at least 1.")
        down = self.up_bytes_per_s if self.down_bytes_per_s is None else self.down_bytes_per_s
        ranks = [(f"rank {rank}", "its") for rank in range(self.world_size)]
        set_field = object.__setattr__
        set_field(self, "up_bytes_per_s", _checked_links("up", self.up_bytes_per_s, ranks))
        set_field(self, "down_bytes_per_s", _checked_links("down", down, ranks))
        set_field(self, "latency_s", _checked_latencies(self.latency_s, self.world_size))
        if not self.backbone_bytes_per_s > 0:
            raise ConfigurationError(
                f"network: rank 0 is isolated: the backbone carries {self.backbone_bytes_per_s!r} bytes/s. "
                "Expected more than 0."
            )
        if not 0 <= self.round_s < math.inf:
            raise ConfigurationError(f"network: round_s is {self.round_s!r}; expected a finite number from 0 on.")
        if not self.first_window_bytes > 0:
            raise ConfigurationError(
                f"network: first_window_bytes is {self.first_window_bytes!r}; expected more than 0."
            )
        if not 0 < self.full_window_s < math.inf:
            raise ConfigurationError(
                f"network: full_window_s is {self.full_window_s!r}; expected a finite number above 0."
            )
        if not 0 <= self.share_spread <= 2:
            raise ConfigurationError(f"network: share_spread is {self.share_spread!r}; expected a number from 0 to 2.")
        if self.nodes is not None:
            set_field(self, "nodes", _checked_nodes(self.nodes, self.world_size))

    # Messages

    def path(self, source: int, target: int) -> tuple[Resource, ...]:
        """What a message crosses on its way; nothing if a rank sends to itself."""
        if source == target:
            return ()
        if self.nodes is None:
            if self.backbone_bytes_per_s == math.inf:
                return ("up", source), ("down", target)
            return ("up", source), _BACKBONE, ("down", target)
        here, there = self.nodes.of(source), self.nodes.of(target)
        if here == there:
            return ("up", source), ("down", target)
        return ("up", source), ("node up", here), _BACKBONE, ("node down", there), ("down", target)

    def capacity(self, resource: Resource) -> float:
        """In bytes/s; math.inf where it limits nothing."""
        kind, index = resource
        match kind:
            case "up":
                return _one(self.up_bytes_per_s, index)
            case "down":
                return _one(self.down_bytes_per_s, index)
            case "backbone":
                return self.backbone_bytes_per_s
            case "node up" if self.nodes is not None:
                return _one(self.nodes.up_bytes_per_s, index)
            case "node down" if self.nodes is not None:
                return _one(self.nodes.down_bytes_per_s, index)
        raise ValueError(f"{resource} is nothing that this network has")

    def message_latency_s(self, source: int, target: int) -> float:
        """From when a message's last byte leaves to when it arrives."""
        if source == target:
            return 0.0
        if self.nodes is not None and self.nodes.of(source) == self.nodes.of(target):
            return self.nodes.inside_latency_s
        if isinstance(self.latency_s, float):
            return self.latency_s
        return max(_one(self.latency_s, source), _one(self.latency_s, target))

    def message_s(self, source: int, target: int, n_bytes: float) -> float:
        """Seconds of a message that has its path to itself."""
        slowest = min(map(self.capacity, self.path(source, target)), default=math.inf)
        return self.message_latency_s(source, target) + n_bytes / slowest

    # Collectives

    def all_reduce_s(
        self, n_bytes: float, members: Sequence[int], method: str = "ring", *, share: float = 1.0
    ) -> float:
        """Seconds of an all-reduce of `n_bytes`, from when the last member joins.

        `share` is the share of the whole vector that is among these bytes; `round_s` is said of the whole vector.
        Raises as `all_reduce_cost` does.
        """
        return max(self.round_s * share, self.all_reduce_cost(members, method).seconds(n_bytes))

    def all_reduce_cost(self, members: Sequence[int], method: str = "ring") -> AlphaBeta:
        """What an all-reduce among `members` costs when nothing else is on the links.

        The sum over the method's steps (`schedules`): in each the largest latency and the slowest message decide. On
        equal links that is the closed form. On unequal ones it may be a few latencies more than it takes, since ranks
        that are early need not wait for a step to end everywhere.

        Raises ConfigurationError for a method that is not known, or `hierarchical` without nodes; ValueError for
        members that are not distinct ranks.
        """
        if method not in METHODS:
            raise unknown("all-reduce method", method, METHODS)
        if self._is_equal and method in _ON_EQUAL_LINKS:
            return self._cost_on_equal_links(len(members), _ON_EQUAL_LINKS[method])
        key = (tuple(members), method)
        if key not in self._costs:
            if len(self._costs) >= _COSTS_KEPT:
                self._costs.clear()
            self._costs[key] = self._cost_of(self._steps(sorted(members), method))
        return self._costs[key]

    @property
    def _is_equal(self) -> bool:
        each = (self.up_bytes_per_s, self.down_bytes_per_s, self.latency_s)
        return self.nodes is None and self.backbone_bytes_per_s == math.inf and all(isinstance(e, float) for e in each)

    def _cost_on_equal_links(self, n: int, cost: Callable[[float, int, float, float], float]) -> AlphaBeta:
        # A rank sends and receives at the same time in a ring, and in exchanges: the slower direction decides.
        bandwidth = min(_one(self.up_bytes_per_s, 0), _one(self.down_bytes_per_s, 0))
        return AlphaBeta(cost(0, n, _one(self.latency_s, 0), bandwidth), cost(1, n, 0.0, bandwidth))

    def _steps(self, members: Sequence[int], method: str) -> list[Step]:
        if not members or len(set(members)) < len(members) or not 0 <= members[0] <= members[-1] < self.world_size:
            raise ValueError(f"members are {members}; expected distinct ranks among {self.world_size}")
        if method in _STEPS:
            return _STEPS[method](members)
        if self.nodes is None:
            raise ConfigurationError(
                "all-reduce method 'hierarchical' needs a network with nodes, as in "
                "nodes=8x4,inside=10gbit,between=1gbit. Expected nodes, or one of ring, halving_doubling, tree."
            )
        by_node: dict[int, list[int]] = {}
        for rank in members:
            by_node.setdefault(self.nodes.of(rank), []).append(rank)
        return schedules.hierarchical(list(by_node.values()))

    def _cost_of(self, steps: Sequence[Step]) -> AlphaBeta:
        latency_s = s_per_byte = 0.0
        for step in steps:
            crossing = Counter(resource for pair in step.pairs for resource in self.path(*pair))
            # Max-min fair, the slowest messages are those that share the resource with the least capacity for each of
            # them: the first level at which progressive filling stops. They keep that rate to their end, since whoever
            # crosses that resource is as slow and as long as they are; and as the slowest they end the step.
            slowest = min(self.capacity(resource) / messages for resource, messages in crossing.items())
            latency_s += step.times * max(self.message_latency_s(*pair) for pair in step.pairs)
            s_per_byte += step.times * step.share / slowest
        return AlphaBeta(latency_s, s_per_byte)


def _one(values: Each | None, index: int) -> float:
    if isinstance(values, int | float):
        return values
    assert values is not None  # __post_init__ has filled it in
    return values[index]


def _checked_links(way: str, given: Each | None, ends: Sequence[tuple[str, str]]) -> float | tuple[float, ...]:
    """`ends` are who needs a link, as in ("rank 3", "its"): what an error calls it, and whose link it is."""
    wanted = "Every rank needs more than 0 bytes/s each way"
    if isinstance(given, int | float):
        who, whose = ends[0]
        if not given > 0:
            raise ConfigurationError(f"network: {who} is isolated: {whose} {way} link has {given!r} bytes/s. {wanted}.")
        return float(given)
    values = [] if given is None else list(given)
    for k, (who, whose) in enumerate(ends):
        if k >= len(values) or values[k] is None:
            raise ConfigurationError(
                f"network: {who} is isolated: {whose} {way} link is missing ({len(values)} for {len(ends)}). {wanted}."
            )
        if not values[k] > 0:
            raise ConfigurationError(
                f"network: {who} is isolated: {whose} {way} link has {values[k]!r} bytes/s. {wanted}."
            )
    if len(values) > len(ends):
        raise ConfigurationError(
            f"network: {len(values)} {way} links are given for {len(ends)}; expected one for each."
        )
    return tuple(float(value) for value in values)


def _checked_latencies(given: Each, world_size: int) -> float | tuple[float, ...]:
    values = [given] if isinstance(given, int | float) else list(given)
    if not isinstance(given, int | float) and len(values) != world_size:
        raise ConfigurationError(
            f"network: {len(values)} latencies are given for {world_size} ranks; expected as many."
        )
    for rank, value in enumerate(values):
        if not 0 <= value < math.inf:
            raise ConfigurationError(
                f"network: latency_s of rank {rank} is {value!r}; expected a finite number from 0 on."
            )
    return float(given) if isinstance(given, int | float) else tuple(float(value) for value in values)


def _checked_nodes(nodes: Nodes, world_size: int) -> Nodes:
    size = nodes.ranks_per_node
    if size < 1:
        raise ConfigurationError(f"network: ranks_per_node is {size}; expected at least 1.")
    if not 0 <= nodes.inside_latency_s < math.inf:
        raise ConfigurationError(
            f"network: inside_latency_s is {nodes.inside_latency_s!r}; expected a finite number from 0 on."
        )
    ends = [(f"rank {first}", f"node {first // size}'s") for first in range(0, world_size, size)]
    down = nodes.up_bytes_per_s if nodes.down_bytes_per_s is None else nodes.down_bytes_per_s
    return Nodes(
        size,
        _checked_links("up", nodes.up_bytes_per_s, ends),
        _checked_links("down", down, ends),
        float(nodes.inside_latency_s),
    )
