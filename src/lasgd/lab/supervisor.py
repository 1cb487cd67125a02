"""Local processes that live and die together: one that fails ends all, Ctrl-C reaches each of them exactly once.

Why not torch.distributed.elastic.multiprocessing: its `SubprocessContext` takes every exit code but 0 for a failure,
so a rank that ended cleanly after Ctrl-C gets the others terminated in the middle of their own clean end; it terminates
at the first failure seen, when that is often a peer's "connection closed" and not the cause; its grace period is fixed
at 30 s; a rank that is killed leaves its DataLoader workers behind; and nothing ends the ranks when the parent is
killed. What is taken over from it: the format of its error files.

    starting -> running -> ended                    all ranks exit with 0 or 130
                running -> terminating -> ended     one failed (SIGTERM, after a grace SIGKILL)
                running -> interrupting -> ended    Ctrl-C: SIGINT once to each; a second one: SIGKILL
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO

from lasgd.lab.rank_process import ERROR_FILE, INTERRUPTED, SUPERVISOR, RecordedError, read_error

_POLL_S = 0.05


@dataclass(frozen=True)
class RankCommand:
    """How to start one rank."""

    argv: Sequence[str]
    environment: dict[str, str]
    """On top of the supervisor's own."""
    error_file: Path
    log: Path | None
    """Where stdout and stderr go; None: where the supervisor's go."""


@dataclass(frozen=True)
class Ended:
    """How one rank ended."""

    rank: int
    code: int
    """Exit code; minus the signal's number where a signal killed it."""
    time_s: float
    """Wall-clock time of its recorded error, else of when its end was seen."""
    error: RecordedError | None

    @property
    def blames_a_peer(self) -> bool:
        """Its error only says that another rank is lost, late or disagrees."""
        return self.error is not None and self.error.kind == "PeerError"


@dataclass
class Outcome:
    """How all ranks ended."""

    ended: dict[int, Ended] = field(default_factory=dict)
    cause: Ended | None = None
    """The earliest failure, those that only blame a peer after all others; None where nothing failed."""
    interrupted: bool = False
    killed: bool = False
    """A second Ctrl-C cut the clean end short."""


class Supervisor:
    """Starts the ranks on entering, and on leaving has left nothing of them running, whatever happened.

    SIGINT, SIGTERM and SIGHUP to this process count as Ctrl-C between the two (in the main thread only, and not where
    they were ignored, as under nohup). Ranks are process groups of their own, so a terminal's Ctrl-C comes here alone.
    """

    def __init__(self, commands: Sequence[RankCommand], grace_s: float = 5.0, cause_grace_s: float = 2.0) -> None:
        self._commands = commands
        self._grace_s = grace_s  # from SIGTERM to SIGKILL
        self._cause_grace_s = cause_grace_s  # for the culprit to show up after a rank that only blames a peer
        self._running: dict[int, subprocess.Popen[bytes]] = {}
        self._outcome = Outcome()
        self._interrupts = 0
        self._previous_handlers: dict[int, object] = {}

    def __enter__(self) -> Supervisor:
        self._catch_interrupts()
        try:
            for rank, command in enumerate(self._commands):
                self._running[rank] = _start(command)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def wait_ended(self, timeout_s: float | None = None) -> Outcome:
        """Waits until no rank is left. A run has no time limit of its own, hence None; raises TimeoutError."""
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        first_failure_s: float | None = None
        while self._running:
            self._reap()
            if self._killed_by_hand() or self._nothing_to_wait_for():
                break
            failures = [end for end in self._outcome.ended.values() if self._failed(end)]
            if failures:
                first_failure_s = first_failure_s or time.monotonic()
                cause = min(failures, key=lambda end: (end.blames_a_peer, end.time_s))
                self._outcome.cause = cause
                if not cause.blames_a_peer or time.monotonic() - first_failure_s >= self._cause_grace_s:
                    break
            if deadline_s is not None and time.monotonic() > deadline_s:
                raise TimeoutError(f"ranks {sorted(self._running)} still run after {timeout_s} s")
            if self._running:
                time.sleep(_POLL_S)
        self._terminate()
        return self._outcome

    def close(self) -> None:
        """Kills what still runs; may be called twice."""
        self._kill()
        for signum, handler in self._previous_handlers.items():
            signal.signal(signum, handler)  # type: ignore[arg-type]
        self._previous_handlers.clear()

    # Interrupts. The handler only counts; the loop in wait_ended acts.

    def _catch_interrupts(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(signum) is not signal.SIG_IGN:
                self._previous_handlers[signum] = signal.signal(signum, self._count_interrupt)

    def _count_interrupt(self, signum: int, frame: FrameType | None) -> None:
        self._interrupts += 1

    def _killed_by_hand(self) -> bool:
        """Forwards the first interrupt; at the second, kills all and says so."""
        if self._interrupts and not self._outcome.interrupted:
            self._outcome.interrupted = True
            self._signal(signal.SIGINT)
        if self._interrupts > 1 and self._running:
            self._outcome.killed = True
            self._kill()
        return self._outcome.killed

    def _nothing_to_wait_for(self) -> bool:
        """A rank that SIGINT killed had not begun to train, so the others cannot come to an agreed end."""
        return self._outcome.interrupted and any(e.code == -signal.SIGINT for e in self._outcome.ended.values())

    def _failed(self, end: Ended) -> bool:
        return end.code not in (0, INTERRUPTED) and not (self._outcome.interrupted and end.code == -signal.SIGINT)

    # Ending.

    def _reap(self) -> None:
        for rank, process in list(self._running.items()):
            code = process.poll()
            if code is not None:
                del self._running[rank]
                # Its DataLoader workers, if it could not end them itself. The number still means this group: as long
                # as it has members no new process gets it, and without members it was free for microseconds only.
                _signal_group(process.pid, signal.SIGKILL)
                error = read_error(self._commands[rank].error_file)
                seen_s = time.time() if error is None else error.time_s
                self._outcome.ended[rank] = Ended(rank, code, seen_s, error)

    def _terminate(self) -> None:
        """SIGTERM, and SIGKILL to those still there after the grace period or at one more Ctrl-C."""
        self._signal(signal.SIGTERM)
        deadline_s = time.monotonic() + self._grace_s
        interrupts = self._interrupts
        while self._running and time.monotonic() < deadline_s and self._interrupts == interrupts:
            self._reap()
            if self._running:
                time.sleep(_POLL_S)
        self._kill()

    def _kill(self) -> None:
        for process in self._running.values():
            _signal_group(process.pid, signal.SIGKILL)
        for process in self._running.values():
            with contextlib.suppress(subprocess.TimeoutExpired):  # stuck in the kernel: not ours to wait for
                process.wait(timeout=self._grace_s)
        self._reap()

    def _signal(self, signum: int) -> None:
        for process in self._running.values():
            process.send_signal(signum)


def _start(command: RankCommand) -> subprocess.Popen[bytes]:
    command.error_file.unlink(missing_ok=True)
    environment = os.environ | command.environment
    environment |= {SUPERVISOR: str(os.getpid()), ERROR_FILE: str(command.error_file)}
    output: IO[bytes] | None = None
    if command.log is not None:
        output = open(command.log, "ab")  # noqa: SIM115 closed below, the child has its own
    try:
        with _keeping_back_interrupts():  # inherited: until rank_process says otherwise
            return subprocess.Popen(
                command.argv,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=None if output is None else subprocess.STDOUT,
                process_group=0,  # in the same session: Linux gives each session its own share of the cores
            )
    finally:
        if output is not None:
            output.close()


@contextlib.contextmanager
def _keeping_back_interrupts() -> Iterator[None]:
    """Blocks SIGINT: a rank that gets one while Python starts would die of it with a traceback."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _signal_group(leader: int, signum: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, signum)
