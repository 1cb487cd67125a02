"""What the ranks of a c10d group tell each other, through the store, when something goes wrong.

Gloo tells a rank only of its own connections, and closes none while a collective is on its way. So whoever notices
trouble leaves a notice, and whoever waits looks for one from time to time. Nothing here raises: if the host of the
store is gone, so is whatever the ranks could have told each other.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")

ANSWER_S = 3.0
"""Longest wait for the store's host to answer."""
PATIENCE_S = 2.0
"""For others to notice too, before they are called silent; several times the interval at which they look."""
LINGER_S = 2.0
"""How long the host of the store stays for the others' last questions."""


class Notices:
    """The notices of one group, seen from one of its ranks."""

    def __init__(self, store: dist.Store, rank: int, world_size: int, hosts_store: bool):
        self._store, self._rank, self._ranks = store, rank, range(world_size)
        self._hosts_store = hosts_store

    def is_there_trouble(self) -> bool:
        """Some rank has noticed trouble, or is leaving because of it."""
        return self._asked(lambda: self._holds("trouble"), False)

    def account(self) -> str:
        """Tells the others that there is trouble; returns who has left and why, or else who is silent."""
        return self._asked(self._account, "The host of the store, rank 0 or its launcher, does not answer; silent: 0.")

    def reasons(self) -> str:
        """Who has left, and why; empty if nobody has said so."""
        return self._asked(self._reasons, "")

    def holds(self, *keys: str, within_s: float = ANSWER_S) -> bool:
        """The store holds all `keys`, as far as it answers."""
        return self._asked(lambda: self._holds(*keys), False, min(within_s, ANSWER_S))

    def missing(self, keys: list[str]) -> list[int] | None:
        """The ranks whose key the store does not hold; None if it does not answer."""
        return self._asked(lambda: [rank for rank, key in enumerate(keys) if not self._holds(key)], None)

    def leave(self, reason: str | None) -> None:
        """Tells the others that this rank leaves; the host of the store stays a little for those who still ask."""
        self._asked(lambda: self._leave(reason), None)

    def _leave(self, reason: str | None) -> None:
        if reason:
            self._set(f"reason/{self._rank}", reason)
            self._set("trouble", "1")
        self._set(f"left/{self._rank}", "1")
        if self._hosts_store:
            self._wait_until(lambda: all(self._holds(f"left/{rank}") for rank in self._ranks), LINGER_S)

    def _account(self) -> str:
        self._set(f"noticed/{self._rank}", "1")
        self._set("trouble", "1")
        silent: list[int] = []

        def all_are_accounted_for() -> bool:
            silent[:] = [rank for rank in self._ranks if not self._holds(f"noticed/{rank}")]
            return not silent or bool(self._reasons())

        self._wait_until(all_are_accounted_for, PATIENCE_S)
        if reasons := self._reasons():
            return reasons.strip()
        if self._rank in silent:  # not even the own notice is found
            return "The host of the store, rank 0 or its launcher, is gone; silent: 0."
        heard = [rank for rank in self._ranks if rank not in silent]
        return f"Last heard from {ranks_in_words(heard)}; silent: {ranks_in_words(silent)}."

    def _reasons(self) -> str:
        found = [(rank, self._get(f"reason/{rank}")) for rank in self._ranks if self._holds(f"reason/{rank}")]
        return "".join(f" Rank {rank} left: {reason}." for rank, reason in found)

    def _asked(self, question: Callable[[], T], otherwise: T, timeout_s: float = ANSWER_S) -> T:
        try:
            return wait_answer(question, timeout_s)
        except TimeoutError:
            return otherwise

    def _wait_until(self, is_true: Callable[[], bool], timeout_s: float) -> None:
        deadline_s = time.monotonic() + timeout_s
        while not is_true() and time.monotonic() < deadline_s:
            time.sleep(0.05)

    def _holds(self, *keys: str) -> bool:
        try:
            return self._store.check(list(keys))
        except (dist.DistError, RuntimeError):
            return False

    def _get(self, key: str) -> str:
        try:
            return self._store.get(key).decode(errors="replace")
        except (dist.DistError, RuntimeError):
            return "for an unknown reason"

    def _set(self, key: str, value: str) -> None:
        with contextlib.suppress(dist.DistError, RuntimeError):
            self._store.set(key, value)


def wait_answer(question: Callable[[], T], timeout_s: float) -> T:
    """What `question` returns or raises, asked on a thread of its own; TimeoutError if there is no answer.

    For questions to the store: a stopped process keeps its connections open, and torch's client waits for an answer
    without limit, whatever time-out it was given. The thread that waits is then left behind, a daemon.
    """
    answers: list[T] = []
    errors: list[Exception] = []

    def ask() -> None:
        try:
            answers.append(question())
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=ask, name="lasgd-ask-store", daemon=True)
    thread.start()
    thread.join(max(0.0, timeout_s))
    if errors:
        raise errors[0]
    if not answers:
        raise TimeoutError(f"no answer within {timeout_s:g} s")
    return answers[0]


def ranks_in_words(ranks: list[int]) -> str:
    """`rank 1`, `ranks 1, 2` or `nobody`."""
    if not ranks:
        return "nobody"
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))
