"""One Gloo process group: made within a time-out, waited for with an eye on the others' trouble, given up at once."""

from __future__ import annotations

import atexit
import re
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import Tensor

from lasgd.errors import PeerError
from lasgd.group.notices import ANSWER_S, Notices, wait_answer

ABORT_S = 1.0
"""Longest wait for connections to close."""

EXIT_S = 10.0
"""Longest wait at exit for a collective that is on its way to end, in a group that has been given up."""

LOOK_S = 0.5
"""While something takes long, how often to look whether another rank has noticed trouble."""


class GlooConnections:
    """The connections of one process group to all other ranks. Its collectives are matched by order."""

    def __init__(self, store: dist.Store, rank: int, world_size: int, timeout_s: float, notices: Notices):
        """All ranks at the same time. Raises RuntimeError or TimeoutError where they do not come together."""
        self._notices = notices
        self._has_left = False
        time_out = timedelta(seconds=timeout_s)
        self._gloo: dist.ProcessGroupGloo | None = wait_answer(
            lambda: dist.ProcessGroupGloo(store, rank, world_size, time_out), timeout_s + ANSWER_S
        )

    @property
    def gloo(self) -> dist.ProcessGroupGloo | None:
        """None once given up."""
        return self._gloo

    def wait_guarded(self, collective: Callable, what: str, timeout_s: float):
        """What `collective(gloo)` returns; its RuntimeError becomes a PeerError, and the connections are given up."""
        if self._gloo is None:
            raise PeerError(f"{what}: this rank has left the group")
        begin_s = time.monotonic()
        try:
            return collective(self._gloo)
        except RuntimeError as error:
            raise self.failure(error, what, time.monotonic() - begin_s, timeout_s) from error

    def failure(self, error: Exception, what: str, after_s: float, timeout_s: float) -> PeerError:
        """What an error of Gloo stands for; gives the connections up, as they are out of step with the others'."""
        if self._has_left:  # the training thread has left meanwhile: this rank's own doing
            return PeerError(f"{what}: this rank has left the group")
        self._abort()
        return PeerError(
            f"{what} not finished after {after_s:.1f} s ({first_line(error)}). {self._notices.account()} "
            f"Raise timeout_s (now {timeout_s:g}) if the link is slow; see docs/footguns.md#silent-rank"
        )

    def wait_done(self, work: dist.Work) -> None:
        """Waits for a collective, which has a time-out of its own. Raises RuntimeError, also on others' trouble."""
        while True:
            try:
                work.wait(timedelta(seconds=LOOK_S))
                return
            except RuntimeError:
                if work.is_completed():
                    # Its own error, if it has one: it may have ended well between the time-out and this question.
                    work.wait()
                    return
                if self._has_left or self._notices.is_there_trouble():
                    raise RuntimeError("another rank is in trouble") from None

    def leave(self) -> None:
        """Gives the connections up; may be called twice."""
        self._has_left = True
        self._abort()

    def _abort(self) -> None:
        gloo, self._gloo = self._gloo, None
        if gloo is None:
            return
        # Closes the connections, so that whoever waits for this rank hears of it. Where the training thread leaves in
        # the middle of the communicator's collective, torch waits for that to end, in abort or in the destructor; so
        # the thread takes over the last reference.
        held = [gloo]
        del gloo
        give_up(held, abort=True)


def give_up(held: list[Any], abort: bool = False) -> None:
    """Lets go of a process group on a thread of its own, which is waited for a little.

    `held` has all the references, the ProcessGroupGloo itself first: it is released last. Its destructor waits for
    Gloo's threads, which need the interpreter to release the Python objects in a collective's thread-local state. By
    torch's binding it goes on meanwhile; where DDP's Reducer goes last instead, they wait for each other for ever.

    At exit the thread is waited for a little more: one that comes back from native code into an interpreter that is
    torn down may end the process by SIGABRT.
    """
    thread = threading.Thread(target=_give_up, args=(held, abort), name="lasgd-give-up", daemon=True)
    del held
    thread.start()
    thread.join(ABORT_S)
    if thread.is_alive():
        atexit.register(thread.join, EXIT_S)


def _give_up(held: list[Any], abort: bool) -> None:
    if abort:
        held[0].abort()
    while held:
        held.pop()


def megabytes(tensor: Tensor) -> str:
    """A tensor's size, for messages."""
    return f"{tensor.nbytes / 1e6:.3g} MB"


def first_line(error: Exception) -> str:
    """Gloo's message without source positions, addresses and advice."""
    text = str(error).strip().splitlines()[0].split(" This is typically")[0]
    return re.sub(r"\[[^\]]*\](:\d+)?:?\s*", "", text).strip(" .")[:160] or type(error).__name__
