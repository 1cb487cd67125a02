"""The rank's side of supervision: `python -m lasgd.lab.rank_process MODULE ARGUMENTS` runs MODULE as a supervised rank.

The process dies with its supervisor, dies quietly of a Ctrl-C until MODULE installs a handler of its own, and leaves
the reason of a failure in the error file. The error file is torchelastic's (TORCHELASTIC_ERROR_FILE, same format),
so under torchrun, `record_error` makes the reason appear in torchrun's own report.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import json
import os
import runpy
import signal
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

SUPERVISOR = "LASGD_SUPERVISOR_PID"
ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
INTERRUPTED = 130
"""Exit code of a rank that ended cleanly because it was asked to, and of the command then; shells have the same."""

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(frozen=True)
class RecordedError:
    """What a rank wrote down about its failure."""

    kind: str
    """The exception's class name."""
    text: str
    traceback: str
    time_s: float
    """Wall-clock time, to tell which rank failed first."""


def die_with_parent(parent: int) -> None:
    """Asks the kernel to kill this process when process `parent`, which started it, is gone; Linux only.

    The kernel means the *thread* that started this process: it should be one that lives as long as the parent does.
    Also for DataLoader workers: call it in `worker_init_fn`. Not inherited by children.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # gone before the kernel was asked
        os._exit(1)


def record_error(error: BaseException) -> None:
    """Writes `error` into the error file, if the environment names one; never raises."""
    path = os.environ.get(ERROR_FILE)
    if not path:
        return
    now_s = time.time()
    callstack = "".join(traceback.format_exception(error))
    report = {
        "message": {
            "message": f"{type(error).__name__}: {error}",
            "extraInfo": {"py_callstack": callstack, "timestamp": str(int(now_s))},
        },
        "lasgd": {"kind": type(error).__name__, "text": str(error), "time_s": now_s},
    }
    with contextlib.suppress(OSError):  # the supervisor still sees the exit code
        temporary = Path(f"{path}.tmp")
        temporary.write_text(json.dumps(report), encoding="utf-8")
        os.replace(temporary, path)


def read_error(path: Path) -> RecordedError | None:
    """What `record_error` wrote; None where a rank had no time to write anything."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        ours = report["lasgd"]
        return RecordedError(ours["kind"], ours["text"], report["message"]["extraInfo"]["py_callstack"], ours["time_s"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def main(argv: list[str]) -> None:
    """Runs module `argv[0]` as `__main__` with the remaining arguments. Does not return."""
    supervisor = os.environ.get(SUPERVISOR)
    if supervisor:
        die_with_parent(int(supervisor))
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)  # in the background of its terminal, and may write to it nonetheless
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # before training there is nothing to save: no traceback, just the end
    signal.pthread_sigmask(
        signal.SIG_UNBLOCK, {signal.SIGINT}
    )  # one that came before now was kept back, see supervisor
    faulthandler.enable()
    sys.argv = list(argv)
    code = 0
    try:
        runpy.run_module(argv[0], run_name="__main__", alter_sys=True)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
        if code == 0:
            raise
    except BaseException as error:
        record_error(error)
        code = 1
    if code:
        # Threads and process groups of a failed rank may never finish; what matters has been written.
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        os._exit(code)


if __name__ == "__main__":
    main(sys.argv[1:])
