"""Messages that are on their way at the same time, and how they share the links.

Shares are max-min fair: no message can have more without another one having less that has no more already. That is
what many TCP connections come near to on shared links, and what SimGrid's network models compute.

A message that has just begun has less than one that is well under way: TCP lets out a first window, and twice as much
each time that a window has been acknowledged (slow start), until it fills the link's queue; and shares of a full queue
are the windows'. With `Network.first_window_bytes` a message's weight grows like that, and who came first is through
first. Source: RFC 5681, Allman, Paxson, Blanton (2009), TCP Congestion Control, section 3.1.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple, TypeVar

from lasgd.errors import ProtocolError
from lasgd.virtual.network_models import Network, Resource

AnyResource = TypeVar("AnyResource", bound=Hashable)


def max_min_rates(
    flows: Sequence[Sequence[AnyResource]],
    capacities: Mapping[AnyResource, float],
    weights: Sequence[float] | None = None,
) -> list[float]:
    """The max-min fair rate of each flow; a flow is the resources that it crosses, each once.

    Progressive filling: all rates rise together from 0, each as `weights` (None: all alike) has it; where a resource is
    full, the flows that cross it stay at what they have, and the others' rates rise on. math.inf for a flow that
    crosses nothing of finite capacity.
    Source: Bertsekas & Gallager (1992), Data Networks, 2nd edition, section 6.5.2.

    With F flows over paths of length p: O(F p log(F p)). Raises ValueError for a capacity that is not positive.
    """
    rates = [math.inf] * len(flows)
    weights = [1.0] * len(flows) if weights is None else weights
    crossing: dict[AnyResource, list[int]] = {}
    for flow, path in enumerate(flows):
        for resource in path:
            if capacities[resource] != math.inf:
                crossing.setdefault(resource, []).append(flow)
    left = {resource: capacities[resource] for resource in crossing}
    rising = {resource: len(crossed_by) for resource, crossed_by in crossing.items()}
    slope = {resource: math.fsum(weights[flow] for flow in crossed_by) for resource, crossed_by in crossing.items()}
    for resource, capacity in left.items():
        if not capacity > 0:
            raise ValueError(f"capacity of {resource} is {capacity}; expected more than 0")
    # (level at which it is full, place in the order, itself). A level is out of date, and too low, once flows have
    # stopped rising elsewhere: it is brought up to date when it comes to the top.
    heap = [(left[resource] / slope[resource], place, resource) for place, resource in enumerate(crossing)]
    heapq.heapify(heap)
    level = 0.0
    while heap:
        full_at, place, resource = heapq.heappop(heap)
        if not rising[resource]:
            continue
        now_full_at = max(left[resource] / slope[resource], level)  # never falls but by rounding
        if now_full_at > full_at:
            heapq.heappush(heap, (now_full_at, place, resource))
            continue
        level = full_at
        for flow in crossing[resource]:
            if rates[flow] == math.inf:
                rate = rates[flow] = level * weights[flow]
                for crossed in flows[flow]:
                    if crossed in left:
                        left[crossed] -= rate
                        rising[crossed] -= 1
                        slope[crossed] -= weights[flow]
    return rates


class Arrival(NamedTuple):
    """A message has left its links, and arrives at `at_s`: its latency later."""

    at_s: float
    flow: int


class _Flow:
    __slots__ = (
        *("full_bytes", "id", "latency_s", "left_bytes", "path", "rate", "since_s", "turn_bytes", "turn_s"),
        *("weight", "window_bytes"),
    )

    def __init__(
        self, id: int, path: tuple[Resource, ...], n_bytes: float, latency_s: float, now_s: float, weight: float
    ) -> None:
        self.id, self.path, self.latency_s, self.weight = id, path, latency_s, weight
        self.left_bytes = float(n_bytes)
        """At `since_s`, since when `rate` is what it is."""
        self.rate = 0.0
        self.since_s = now_s
        self.turn_s, self.turn_bytes = math.inf, 0.0
        """When its window grows next, or else its last byte leaves; and what is left of it then."""
        self.window_bytes = self.full_bytes = 1.0

    def open_window(self, window_bytes: float, full_bytes: float) -> None:
        """It has `window_bytes` under way now; where that is full, no more than `full_bytes` from now on."""
        self.window_bytes, self.full_bytes = min(window_bytes, full_bytes), full_bytes
        is_full = self.window_bytes == full_bytes
        self.turn_bytes = 0.0 if is_full else max(self.left_bytes - self.window_bytes, 0.0)


class Flows:
    """Messages between ranks in virtual time, for a driver that asks when the next one ends.

        flow = flows.start(now_s, source, target, n_bytes)
        turn_s, flow = flows.next_turn()           # if nothing else is started before
        for at_s, flow in flows.advance(turn_s):   # arrivals, each told once

    A message holds its links from its start until its last byte has left them, and arrives its latency later.
    Time never runs backwards. Everything is deterministic: at equal times the message that was started first comes
    first.

    A start, an end or a grown window costs a new sharing among the messages that it touches through shared links,
    directly or not: little for pairs of ranks, all of them at a server. Starts at one time, and ends at one time, are
    shared out once.
    """

    def __init__(self, network: Network) -> None:
        self._network = network
        self._now_s = -math.inf
        self._flows: dict[int, _Flow] = {}
        self._on: dict[Resource, dict[int, _Flow]] = {}
        self._touched: dict[Resource, None] = {}
        """Links whose messages have changed since they were last shared out. A dictionary, for its order."""
        self._turns: list[tuple[float, int]] = []
        """A heap. An entry holds while it is its flow's `turn_s`."""
        self._arrivals: list[Arrival] = []
        self._started = 0

    def __len__(self) -> int:
        """Messages that hold links."""
        return len(self._flows)

    def start(self, now_s: float, source: int, target: int, n_bytes: float, weight: float = 1.0) -> int:
        """A message begins, whose share of a link goes by `weight`; returns its number, counted from 0.

        Raises ValueError if n_bytes is negative.
        """
        if not 0 <= n_bytes < math.inf:
            raise ValueError(f"n_bytes is {n_bytes}; expected a finite number from 0 on")
        if now_s != self._now_s:
            self._move_to(now_s)
        network = self._network
        path = tuple(r for r in network.path(source, target) if network.capacity(r) != math.inf) if n_bytes else ()
        flow = _Flow(self._started, path, n_bytes, network.message_latency_s(source, target), now_s, weight)
        self._started += 1
        self._flows[flow.id] = flow
        if path:
            if network.first_window_bytes != math.inf:
                slowest = min(map(network.capacity, path))
                flow.open_window(network.first_window_bytes, network.full_window_s * slowest)
            for resource in path:
                self._on.setdefault(resource, {})[flow.id] = flow
                self._touched[resource] = None
        else:
            self._set_rate(flow, math.inf)
        return flow.id

    def next_turn(self) -> tuple[float, int] | None:
        """When the next message's last byte leaves its links, or its window grows, and whose; None if there is none."""
        self._share_out()
        while self._turns:
            turn_s, id = self._turns[0]
            if (flow := self._flows.get(id)) is not None and flow.turn_s == turn_s:
                return turn_s, id
            heapq.heappop(self._turns)
        return None

    def advance(self, now_s: float) -> list[Arrival]:
        """Moves the time on; returns what has left its links up to then and was not told before, in that order."""
        self._move_to(now_s)
        arrivals, self._arrivals = self._arrivals, []
        return arrivals

    def _move_to(self, now_s: float) -> None:
        if not now_s >= self._now_s:
            raise ProtocolError(f"flows: time runs from {self._now_s} back to {now_s} s")
        while (turn := self.next_turn()) is not None and turn[0] <= now_s:
            self._now_s = turn[0]
            while self._turns and self._turns[0][0] == self._now_s:
                _, id = heapq.heappop(self._turns)
                if (flow := self._flows.get(id)) is not None and flow.turn_s == self._now_s:
                    self._turn(flow)
        self._now_s = now_s

    def _turn(self, flow: _Flow) -> None:
        for resource in flow.path:
            self._touched[resource] = None
        if flow.turn_bytes:
            flow.left_bytes, flow.since_s = flow.turn_bytes, self._now_s
            flow.rate, flow.turn_s = 0.0, math.inf  # until it is shared out anew
            flow.open_window(2 * flow.window_bytes, flow.full_bytes)
            return
        del self._flows[flow.id]
        self._arrivals.append(Arrival(self._now_s + flow.latency_s, flow.id))
        for resource in flow.path:
            del self._on[resource][flow.id]

    def _share_out(self) -> None:
        """Brings the rates up to date, of all messages that are connected to a touched link."""
        if not self._touched:
            return
        found: dict[int, _Flow] = {}
        links = list(self._touched)
        for link in links:  # grows while it is walked along
            for flow in self._on.get(link, {}).values():
                if flow.id not in found:
                    found[flow.id] = flow
                    for resource in flow.path:
                        if resource not in self._touched:
                            self._touched[resource] = None
                            links.append(resource)
        self._touched.clear()
        flows = [found[id] for id in sorted(found)]
        capacities = {link: self._network.capacity(link) for link in links}
        weights = [flow.weight * flow.window_bytes for flow in flows]
        for flow, rate in zip(flows, max_min_rates([flow.path for flow in flows], capacities, weights), strict=True):
            if rate != flow.rate:
                self._set_rate(flow, rate)

    def _set_rate(self, flow: _Flow, rate: float) -> None:
        now_s = self._now_s
        flow.left_bytes = max(flow.left_bytes - flow.rate * (now_s - flow.since_s), flow.turn_bytes)
        flow.rate, flow.since_s = rate, now_s
        flow.turn_s = now_s + (flow.left_bytes - flow.turn_bytes) / rate
        heapq.heappush(self._turns, (flow.turn_s, flow.id))
