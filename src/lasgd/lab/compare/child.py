"""One run as a child process: its output to a log, Ctrl-C passed on, nothing left of it at the end.

The child sits in a session of its own, so a terminal's Ctrl-C comes to us alone, and we decide who hears of it:

    first     SIGINT to the child, which ends its run cleanly; no further run is started
    second    SIGINT again, on which `lasgd train` ends its ranks at once
    third     SIGKILL
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from lasgd.errors import LasgdError

POLL_S = 0.1
TAIL_BYTES = 4096

_OF_A_RANK = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Interrupts:
    """Counts Ctrl-C, SIGTERM and SIGHUP, and passes each on to the present child."""

    def __init__(self) -> None:
        self.count = 0
        self._child: subprocess.Popen[bytes] | None = None

    @contextmanager
    def caught(self) -> Iterator[Interrupts]:
        """Within the block signals are counted instead of ending this process. Those that are ignored stay so."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        numbers = [n for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) != signal.SIG_IGN]
        before = {number: signal.signal(number, self._handle) for number in numbers}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def reaching(self, child: subprocess.Popen[bytes]) -> Iterator[None]:
        """Within the block `child` hears of them; at once of one that came before."""
        self._child = child
        try:
            if self.count:
                self._pass_on()
            yield
        finally:
            self._child = None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.count += 1
        self._pass_on()

    def _pass_on(self) -> None:
        if self._child is not None:
            with suppress(ProcessLookupError):
                self._child.send_signal(signal.SIGINT if self.count < 3 else signal.SIGKILL)


def run_child(
    argv: Sequence[str],
    log: Path,
    interrupts: Interrupts,
    watch: Callable[[], None] = lambda: None,
    keep_open: Sequence[int] = (),
    limit_s: float | None = None,
) -> int:
    """Runs `argv` to its end; returns its exit code, minus the signal's number where a signal ended it.

    `watch` is called a few times a second meanwhile; `keep_open` are descriptors that the child inherits. After
    `limit_s` seconds the child is interrupted, and killed where that does not help within half a minute.
    Raises LasgdError where it cannot be started.
    """
    environment = {name: value for name, value in os.environ.items() if name not in _OF_A_RANK}
    try:
        with open(log, "wb") as output, _not_deaf_to_interrupts():
            child = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
                pass_fds=keep_open,
            )
    except OSError as error:
        raise LasgdError(f"{argv[0]} could not be started: {error.strerror or error}.") from error
    deadline_s = None if limit_s is None else time.monotonic() + limit_s
    try:
        with interrupts.reaching(child):
            while True:
                with suppress(subprocess.TimeoutExpired):
                    return child.wait(POLL_S)
                if deadline_s is not None and time.monotonic() > deadline_s:
                    return _end(child)
                watch()
    finally:
        if child.poll() is None:  # an error of ours: nothing goes on unseen
            _end(child, grace_s=5.0)


@contextmanager
def _not_deaf_to_interrupts() -> Iterator[None]:
    """A child that is started within hears of SIGINT, though this process ignores it, as `nohup ... &` makes it do."""
    is_ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    if not is_ignored or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, lambda *_: None)  # a handler does not survive the child's exec, SIG_IGN would
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def _end(child: subprocess.Popen[bytes], grace_s: float = 30.0) -> int:
    child.send_signal(signal.SIGINT)
    try:
        return child.wait(grace_s)
    except subprocess.TimeoutExpired:
        child.kill()
        return child.wait()


def last_line(log: Path) -> str:
    """The last line of a log that says something; empty where there is none."""
    try:
        with open(log, "rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - TAIL_BYTES))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""
