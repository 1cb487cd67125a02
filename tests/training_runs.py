"""Real training runs for tests: `lasgd train` as a user types it, and ranks started by hand from a warm process.

Importing torch takes a rank seconds. `Ranks` forks its ranks from a server that has imported everything once, and
gives them the environment that torchrun would; `Command` starts the command itself. Both run `lasgd train ...`.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lasgd.training.run_folder import RunRecord, read_run

LIMIT_S = 90.0
MARK = "LASGD_TEST_MARK"
"""An environment variable by which everything that a test started is found again."""

_warm = multiprocessing.get_context("forkserver")
_warm.set_forkserver_preload(["lasgd.training.rank", "lasgd.cli.app", "torch._dynamo", "kornia.augmentation"])


def wait_until(condition: Callable[[], Any], what: str, timeout_s: float = LIMIT_S) -> Any:
    """The first true value of `condition()`; looked at 50 times a second, because other processes make it true."""
    deadline_s = time.monotonic() + timeout_s
    while not (value := condition()):
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"not within {timeout_s:g} s: {what}")
        time.sleep(0.02)
    return value


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def left_running(mark: str) -> list[int]:
    """Processes with this mark in their environment; Linux only."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"{MARK}={mark}".encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
    return found


def kill_all(mark: str) -> None:
    for pid in left_running(mark):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def complete_cuts(out: Path, world_size: int) -> list[int]:
    """Numbers of the checkpoints of which every rank has its part, ascending."""
    return sorted(
        int(cut.name)
        for cut in (out / "checkpoints").glob("*")
        if all((cut / f"rank-{rank}.pt").exists() for rank in range(world_size))
    )


def wait_cut(out: Path, world_size: int, number: int = 1) -> int:
    """Waits until a checkpoint from `number` on is complete; its number."""

    def newest() -> int | None:
        return max((cut for cut in complete_cuts(out, world_size) if cut >= number), default=None)

    return wait_until(newest, f"checkpoint {number} in {out}")


class Command:
    """`lasgd train OPTIONS` (or another launcher's command line) as a process of its own."""

    def __init__(self, *options: str, cwd: Path, launcher: Sequence[str] = (), **environment: str) -> None:
        self.mark = uuid.uuid4().hex
        launcher = launcher or (sys.executable, "-m", "lasgd", "train")
        self.process = subprocess.Popen(
            [*launcher, *options],
            cwd=cwd,
            env=_clean_environment() | environment | {MARK: self.mark},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.out, self.err = "", ""

    def wait(self, timeout_s: float = LIMIT_S) -> int:
        """Its exit code; what it printed is then in `out` and `err`."""
        self.out, self.err = self.process.communicate(timeout=timeout_s)
        return self.process.returncode

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def rank(self, number: int) -> int:
        """The process of one of its ranks."""

        def find() -> int | None:
            for pid in left_running(self.mark):
                with contextlib.suppress(OSError):
                    environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                    parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
                    if f"RANK={number}".encode() in environment and parent == self.process.pid:
                        return pid
            return None

        return wait_until(find, f"rank {number}")

    def wait_gone(self, timeout_s: float = 10.0) -> None:
        """Returns when nothing that it started is left."""
        wait_until(lambda: not left_running(self.mark), "its processes are gone", timeout_s)

    def close(self) -> None:
        kill_all(self.mark)
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()


class Ranks:
    """`lasgd train OPTIONS` in `world_size` processes with the environment that torchrun sets; rank 0 has the store."""

    def __init__(
        self,
        *options: str,
        cwd: Path,
        world_size: int = 2,
        started: Sequence[int] | None = None,
        own_options: dict[int, Sequence[str]] | None = None,
        port: int | None = None,
        before: str = "",
        **environment: str,
    ) -> None:
        """`before` names a function `module:function` of the tests that each rank calls with its rank first."""
        self.cwd, self.mark = cwd, uuid.uuid4().hex
        common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port or free_port()), "WORLD_SIZE": str(world_size)}
        self.processes: dict[int, Any] = {}
        for rank in range(world_size) if started is None else started:
            own = common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} | environment | {MARK: self.mark}
            arguments = ["train", *options, *(own_options or {}).get(rank, ())]
            self.processes[rank] = _warm.Process(
                target=_rank_main, args=(arguments, own, str(cwd), str(self._log(rank)), before, list(sys.path))
            )
            self.processes[rank].start()

    def _log(self, rank: int) -> Path:
        return self.cwd / f"{self.mark}-{rank}.txt"

    def said(self, rank: int) -> str:
        """What the rank has printed so far."""
        return self._log(rank).read_text()

    def wait(self, timeout_s: float = LIMIT_S) -> list[int]:
        """Exit codes by rank; minus the signal's number where a signal ended one."""
        deadline_s = time.monotonic() + timeout_s
        for rank, process in self.processes.items():
            process.join(max(0.0, deadline_s - time.monotonic()))
            if process.exitcode is None:
                said = "\n".join(f"rank {rank} said:\n{self.said(rank)}" for rank in self.processes)
                raise TimeoutError(f"rank {rank} still runs after {timeout_s:g} s. {said}")
        return [process.exitcode for process in self.processes.values()]

    def kill(self) -> None:
        """SIGKILL for all at once, their worker processes included."""
        for process in self.processes.values():
            process.kill()
        for process in self.processes.values():
            process.join(10)

    def signal(self, rank: int, number: int) -> None:
        os.kill(self.processes[rank].pid, number)

    def close(self) -> None:
        self.kill()


def _rank_main(arguments: list[str], own: dict[str, str], cwd: str, log: str, before: str, path: list[str]) -> None:
    for name in [name for name in os.environ if name.startswith(("RANK", "WORLD_SIZE", "LASGD", "TORCHELASTIC"))]:
        del os.environ[name]
    os.environ.update(own)
    os.chdir(cwd)
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    sys.path[:] = path
    import torch

    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if before:
        module, _, function = before.partition(":")
        getattr(importlib.import_module(module), function)(int(own["RANK"]))
    from lasgd.cli.app import main

    code = main(arguments)
    sys.stdout.flush()
    os._exit(code)  # as `python -m lasgd` ends: no handlers of multiprocessing come after


def _clean_environment() -> dict[str, str]:
    ours = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "LASGD", "TORCHELASTIC", "OMP_NUM_THREADS")
    return {name: value for name, value in os.environ.items() if not name.startswith(ours)}


def finished(out: Path) -> RunRecord:
    """The record of a run that must have ended well."""
    record = read_run(out)
    assert record.status == "finished", record.error
    assert record.replicas_identical is True
    return record


def positions(folder: Path, rank: int) -> list[int]:
    """Where the batches of all local steps of a rank began, as `record_positions` wrote them."""
    return [json.loads(line) for line in (folder / f"positions-{rank}.txt").read_text().splitlines()]


def record_positions(rank: int) -> None:
    """In a rank: notes the position of each batch that a local step takes, before the step."""
    from lasgd.training.loop import Trainer

    step = Trainer._local_step

    def noted(self: Trainer, batch: Any) -> Any:
        with open(f"positions-{rank}.txt", "a") as file:
            file.write(f"{batch.position}\n")
        return step(self, batch)

    Trainer._local_step = noted  # type: ignore[method-assign]


@contextlib.contextmanager
def running(run: Command | Ranks) -> Iterator[Any]:
    """The run, killed at the end of the block if it has not ended."""
    try:
        yield run
    finally:
        run.close()
