"""Letters that take as long as on slower links: link emulation in user space, for messages between ranks."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

from torch import Tensor

from lasgd.group.base import Letter, Mail

HEAD_BYTES = 64
"""What a letter costs beside its values."""


class MessageCost(Protocol):
    """What the emulated links are like; padded.EmulatedLink."""

    @property
    def latency_s(self) -> float:
        """One way, of a message."""
        ...

    def message_s(self, n_bytes: int, members: int) -> float:
        """Seconds for which one message of `n_bytes` has a link to itself, the latency apart."""
        ...


class PaddedMail:
    """Wraps any mail. Letters leave one after the other through the sender's link, and come in alike at the receiver.

    A letter that is handed over at t leaves at `left` = max(t, the end of the one before) + its time, and has arrived
    at max(left + latency, the end of the one that came before + its time). Both ends are on one clock, time.time(),
    which ranks on several hosts share as well as their hosts keep it. Letters to oneself cost nothing.
    """

    def __init__(self, mail: Mail, rank: int, members: int, link: MessageCost, clock: Callable[[], float] = time.time):
        self._mail, self._rank, self._members, self._link, self._clock = mail, rank, members, link, clock
        self._up_free_s = self._down_free_s = 0.0
        self._sending, self._taking_in = threading.Lock(), threading.Lock()
        self._waiting: dict[int, list[Letter]] = {}  # by box, in the order in which they came in

    @property
    def bytes_sent(self) -> int:
        """The wrapped mail's."""
        return self._mail.bytes_sent

    def send(self, peer: int, box: int, values: Tensor | None, weight: float, note: int, due_s: float = 0.0) -> None:
        """See Mail; says when the letter has left this rank's link."""
        if peer != self._rank:
            with self._sending:
                begin_s = max(self._clock(), self._up_free_s)
                self._up_free_s = begin_s + self._link.message_s(_bytes(values), self._members)
                due_s = self._up_free_s + self._link.latency_s
        self._mail.send(peer, box, values, weight, note, due_s)

    def wait_receive(self, box: int, peer: int | None, timeout_s: float) -> Letter | None:
        """See Mail: the next one that has come through the own link."""
        waiting = self._waiting.setdefault(box, [])
        deadline_s = self._clock() + timeout_s
        while True:
            while (letter := self._mail.wait_receive(box, None, 0.0)) is not None:
                waiting.append(self._taken_in(letter))
            first = min((each for each in waiting if peer in (None, each.source)), key=_due, default=None)
            now_s = self._clock()
            if first is not None and first.due_s <= now_s:
                waiting.remove(first)
                return first
            until_s = deadline_s if first is None else min(deadline_s, first.due_s)
            if now_s >= deadline_s:
                return None
            letter = self._mail.wait_receive(box, None, max(0.0, until_s - now_s))
            if letter is not None:
                waiting.append(self._taken_in(letter))

    def _taken_in(self, letter: Letter) -> Letter:
        """The letter as it comes through the own link, after those that came before."""
        if letter.source == self._rank:
            return replace(letter, due_s=0.0)
        seconds = self._link.message_s(_bytes(letter.values), self._members)
        with self._taking_in:
            # On its way through both links at once: it needs the own link for `seconds`, up to when it is here.
            self._down_free_s = max(letter.due_s, self._down_free_s + seconds)
            return replace(letter, due_s=self._down_free_s)

    def leave(self) -> None:
        """The wrapped mail's."""
        self._mail.leave()


def _bytes(values: Tensor | None) -> int:
    return HEAD_BYTES + (0 if values is None else values.nbytes)


def _due(letter: Letter) -> float:
    return letter.due_s
