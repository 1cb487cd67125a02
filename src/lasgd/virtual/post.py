"""The way of messages from rank to rank in virtual time."""

from __future__ import annotations

import dataclasses
import random
from collections import deque
from collections.abc import Callable

from lasgd.algorithms.requests import Box, Message
from lasgd.virtual.clock import Clock
from lasgd.virtual.flows import Flows
from lasgd.virtual.network_models import Each, Network

HEAD_BYTES = 64
"""What a message costs beside its values."""


class Letter:
    """A message on its way."""

    __slots__ = ("act", "box", "message", "n_bytes", "target")

    def __init__(self, act: Callable[[Letter], None], target: int, box: Box, message: Message, n_bytes: int):
        self.act, self.target, self.box, self.message, self.n_bytes = act, target, box, message, n_bytes


class Post:
    """Carries messages over the network's links, which those share that are on their way at the same time.

    From one rank to another there is one connection: messages cross it one after another, and arrive in the order in
    which they were sent. What a rank writes to itself is there at the same moment.

    TCP shares a link out unevenly among those who begin together, another way each time. It matters: where all shares
    are equal, ranks that have once asked a server at the same moment do so for ever, and its link stands idle in
    between. So each message draws a weight, with the network's `share_spread`; the same ones in every run.
    """

    def __init__(self, clock: Clock, network: Network, deliver: Callable[[Letter], None]):
        self._clock, self._deliver = clock, deliver
        self._flows, self._spread = Flows(network), network.share_spread
        self._draw = random.Random(0)
        self._crossing: dict[int, Letter] = {}  # by flow
        self._behind: dict[tuple[int, int], deque[Letter]] = {}  # by connection, while something crosses it
        self._next: _Look | None = None

    def send(self, target: int, box: Box, message: Message, n_bytes: int) -> None:
        """`message` sets out now; `deliver` is called with it when it has arrived."""
        letter = Letter(self._deliver, target, box, message, n_bytes)
        if message.source == target:
            self._clock.at(self._clock.now_s, letter)
            return
        behind = self._behind.get((message.source, target))
        if behind is None:
            self._behind[message.source, target] = deque()
            self._start(letter)
        else:
            behind.append(letter)

    def close(self) -> None:
        """Delivers nothing any more, and forgets who would have taken it."""
        self._deliver = _drop

    def _start(self, letter: Letter) -> None:
        weight = self._draw.lognormvariate(0.0, self._spread) if self._spread else 1.0
        flow = self._flows.start(self._clock.now_s, letter.message.source, letter.target, letter.n_bytes, weight)
        self._crossing[flow] = letter
        self._look_at(self._clock.now_s)  # when all that starts at this moment has been started

    def _look_at(self, at_s: float) -> None:
        """Lets `_look` see what has left its links at `at_s`, unless it will look sooner and then see further."""
        if self._next is None or at_s < self._next.at_s:
            self._next = _Look(self._look, at_s)
            self._clock.at(at_s, self._next)

    def _look(self, look: _Look) -> None:
        if look is not self._next:
            return
        self._next = None
        for arrives_s, flow in self._flows.advance(look.at_s):
            letter = self._crossing.pop(flow)
            self._clock.at(arrives_s, letter)
            connection = letter.message.source, letter.target
            if self._behind[connection]:
                self._start(self._behind[connection].popleft())
            else:
                del self._behind[connection]
        if (turn := self._flows.next_turn()) is not None:
            self._look_at(turn[0])


class _Look:
    __slots__ = ("act", "at_s")

    def __init__(self, act: Callable[[_Look], None], at_s: float):
        self.act, self.at_s = act, at_s


def _drop(letter: Letter) -> None:
    pass


def links_for_messages(network: Network, vector_bytes: int) -> Network:
    """`network` with links no quicker than its `round_s` allows: where a ring all-reduce of the whole vector takes that
    long, each rank sends 2 (n-1)/n of it meanwhile."""
    n = network.world_size
    if not network.round_s or n == 1:
        return network
    most = 2 * (n - 1) / n * vector_bytes / network.round_s
    down = network.down_bytes_per_s
    return dataclasses.replace(
        network,
        up_bytes_per_s=_at_most(network.up_bytes_per_s, most),
        down_bytes_per_s=None if down is None else _at_most(down, most),
    )


def _at_most(values: Each, most: float) -> Each:
    return min(values, most) if isinstance(values, int | float) else [min(value, most) for value in values]
