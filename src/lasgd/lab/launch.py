"""Starts the local ranks of one run, supervises them, and says how it ended.

The parent holds the store through which the ranks find each other. It listens on a port that the system chose, on an
address that other machines do not reach: the store has no authentication.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console

import lasgd.errors
from lasgd.errors import ConfigurationError, LasgdError
from lasgd.lab.cores import usable_cores
from lasgd.lab.rank_process import INTERRUPTED
from lasgd.lab.supervisor import Ended, Outcome, RankCommand, Supervisor
from lasgd.training.run_folder import (
    LinkEmulation,
    has_checkpoint,
    read_json,
    write_json_atomically,
    write_unfinished,
)
from lasgd.training.settings import Settings

TRAIN = ("-m", "lasgd.lab.rank_process", "lasgd.training.rank")
"""What Python runs in each rank, before the run folder and the options."""

_LOOPBACK = "127.0.0.1"


class Link(Protocol):
    """Where the ranks' traffic runs; `ShapedNetwork` is one."""

    @property
    def host_address(self) -> str:
        """An address of this machine that every rank reaches."""
        ...

    def command_prefix(self, rank: int) -> Sequence[str]:
        """What puts a command into the rank's place in the network."""
        ...

    def environment(self, rank: int) -> dict[str, str]:
        """What the rank must know to use it."""
        ...


class Loopback:
    """The machine's own loopback: nothing emulated, or by the ranks themselves."""

    host_address = _LOOPBACK

    def command_prefix(self, rank: int) -> Sequence[str]:
        """Nothing."""
        return ()

    def environment(self, rank: int) -> dict[str, str]:
        """Keeps Gloo on the loopback, whatever the host's name resolves to."""
        return {"GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo"}


def launch(
    settings: Settings,
    out: Path,
    resume: Path | None,
    world_size: int,
    *,
    command: Sequence[str] = TRAIN,
    grace_s: float = 5.0,
) -> int:
    """Trains on `world_size` local ranks until all have ended; returns 0, or 130 after Ctrl-C.

    Writes settings.json, logs/ and, where rank 0 could not, run.json into the folder `out`. Raises the error of the
    rank that failed first, or a LasgdError that says which rank was lost and how; nothing is left running in any case.
    """
    logs = out / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    write_json_atomically(out / "settings.json", settings.model_dump(mode="json"))
    earlier_run = _stamp(out / "run.json")

    with contextlib.ExitStack() as stack:
        link, emulation = _open_link(settings, world_size, stack)
        listener = stack.enter_context(socket.create_server((link.host_address, 0), backlog=max(128, 2 * world_size)))
        commands = [
            RankCommand(
                argv=(
                    *link.command_prefix(rank),
                    sys.executable,
                    *command,
                    str(out),
                    *(("--resume", str(resume)) if resume is not None else ()),
                    "--link-emulation",
                    emulation,
                ),
                environment=_environment(rank, world_size, listener.getsockname()) | link.environment(rank),
                error_file=logs / f"rank-{rank}.error.json",
                log=None if rank == 0 else _log(out, rank),
            )
            for rank in range(world_size)
        ]
        with Supervisor(commands, grace_s=grace_s) as ranks:
            store = _serve_store(listener, link.host_address)  # while the ranks start
            outcome = ranks.wait_ended()
            del store

    for end in outcome.ended.values():
        _keep_traceback(out, end)
        if end.rank == 0 and end.code < 0:
            _tidy_terminal()
    reason = None if outcome.cause is None else _reason(outcome.cause, world_size)
    _complete_record(out, settings, world_size, emulation, outcome, reason, earlier_run)
    if reason is not None and outcome.cause is not None:
        may_go_on = resume is None or type(reason) is not ConfigurationError  # then it is the resuming that cannot work
        raise _with_hints(reason, out, outcome.cause.rank, may_go_on and has_checkpoint(out, world_size))
    return INTERRUPTED if outcome.interrupted or _any_interrupted(outcome) else 0


def _any_interrupted(outcome: Outcome) -> bool:
    return any(end.code == INTERRUPTED for end in outcome.ended.values())


def _open_link(settings: Settings, world_size: int, stack: contextlib.ExitStack) -> tuple[Link, LinkEmulation]:
    from lasgd.lab import conditions

    condition = conditions.parse(settings.condition)
    if condition.bandwidth_bytes_per_s is None or world_size == 1:
        return Loopback(), "none"
    from lasgd.lab import network

    why_not = network.why_not_namespaces(condition.latency_s, world_size)
    if why_not is not None:
        print(f"lasgd: the link is emulated in user space, not with network namespaces: {why_not}", file=sys.stderr)
        return Loopback(), "user space"
    shaped = network.ShapedNetwork(world_size, condition.bandwidth_bytes_per_s, condition.latency_s)
    return stack.enter_context(shaped), "namespaces"


def _environment(rank: int, world_size: int, store: tuple[str, int]) -> dict[str, str]:
    """What torchrun sets, so that a rank cannot tell the difference."""
    host, port = store[:2]
    cores = usable_cores()
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": host,
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(max(1, cores // world_size)),
        "PYTHONUNBUFFERED": os.environ.get("PYTHONUNBUFFERED") or "1",  # logs that end where the rank ended
    }


def _serve_store(listener: socket.socket, host: str) -> Any:
    """Starts the store's server on the listening socket, so on that address only; it lives as long as the result."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]  re-exported, though not by name

    port = listener.getsockname()[1]
    return TCPStore(
        host,
        port,
        is_master=True,
        wait_for_workers=False,
        timeout=timedelta(seconds=30),
        master_listen_fd=listener.detach(),
    )


def _log(out: Path, rank: int) -> Path:
    return out / "logs" / f"rank-{rank}.log"


def _tidy_terminal() -> None:
    """After a rank 0 that a signal ended while its display hid the cursor."""
    console = Console()
    if console.is_terminal:
        console.show_cursor()
        console.line()


def _keep_traceback(out: Path, end: Ended) -> None:
    if end.error is not None:
        with contextlib.suppress(OSError), open(_log(out, end.rank), "a", encoding="utf-8") as log:
            log.write(end.error.traceback)


def _reason(end: Ended, world_size: int) -> LasgdError:
    """Why the run failed, as an error of the rank's own class where that is one of lasgd's."""
    who = f"rank {end.rank} of {world_size}"
    if end.error is not None:
        kind, text = getattr(lasgd.errors, end.error.kind, None), end.error.text.strip()
        if isinstance(kind, type) and issubclass(kind, LasgdError):
            return kind(text if text.startswith("rank ") else f"{who}: {text}")
        summary = f"{end.error.kind}: {text.splitlines()[0]}" if text else end.error.kind
        return LasgdError(f"{who} failed with an error that lasgd did not expect: {summary}")
    if end.code < 0:
        hint = " The system kills this way when memory runs out." if end.code == -signal.SIGKILL else ""
        return LasgdError(f"{who} was killed by {_signal_name(-end.code)}; the other ranks were ended.{hint}")
    return LasgdError(f"{who} exited with code {end.code} and gave no reason; the other ranks were ended.")


def _with_hints(reason: LasgdError, out: Path, rank: int, may_go_on: bool) -> LasgdError:
    """The same error, with where to look and how to go on."""
    lines = [str(reason)]
    log = _log(out, rank)
    if log.exists() and log.stat().st_size:
        lines.append(f"See {log}")
    if may_go_on:
        lines.append(f"The newest checkpoint is kept; go on with: lasgd train --resume {out}")
    return type(reason)("\n".join(lines))


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _complete_record(
    out: Path,
    settings: Settings,
    world_size: int,
    emulation: LinkEmulation,
    outcome: Outcome,
    error: LasgdError | None,
    earlier_run: tuple[int, int] | None,
) -> None:
    """Makes run.json tell how the run ended where rank 0 could not, or did not know the cause."""
    path = out / "run.json"
    written_by_rank_0 = _stamp(path) not in (None, earlier_run)
    interrupted = error is None and (outcome.interrupted or _any_interrupted(outcome))
    if error is None and (written_by_rank_0 or not interrupted):
        return
    text = str(error) if error is not None else "interrupted before its clean end"
    status = "interrupted" if interrupted else "failed"
    try:
        if written_by_rank_0:
            write_json_atomically(path, read_json(path) | {"status": status, "error": text})
        else:
            write_unfinished(out, settings.model_dump(mode="json"), world_size, emulation, status, text)
    except LasgdError as unwritten:
        print(f"lasgd: {unwritten}", file=sys.stderr)  # must not hide why the run failed


def _stamp(path: Path) -> tuple[int, int] | None:
    """Changes whenever the file is replaced; None where there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns
