"""Results computed by worker processes ahead of need, handed over in order, with nothing left running afterwards."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from types import TracebackType
from typing import Any, Generic, Protocol, Self, TypeVar

import torch
from torch.utils.data import DataLoader

from lasgd.errors import DataError, LasgdError
from lasgd.lab.rank_process import die_with_parent

Result = TypeVar("Result")
Result_co = TypeVar("Result_co", covariant=True)


class Source(Protocol[Result_co]):
    """What the workers compute: a pure function of the key. Errors of lasgd are returned, not raised."""

    def __getitem__(self, key: int, /) -> Result_co | LasgdError: ...


class InOrder(Generic[Result]):
    """An iterator over `source[key]` for each of `keys`, in their order, whatever the number of workers.

    `workers` processes run ahead by `ahead` results each; 0 computes in the calling process. Whether a Ctrl-C or a
    launcher's SIGTERM ends anything is for the main process to decide: the workers ignore SIGINT, and sit in a process
    group of their own, which torchrun's signals do not reach. They end with `close()`, with a `with` block, with the
    last key, and on Linux at once when the main process is killed (elsewhere within seconds).

    Raises the LasgdError that a source returned, and DataError where a worker died.
    """

    def __init__(self, source: Source[Result], keys: Iterable[int], workers: int, ahead: int = 4) -> None:
        loader = DataLoader(
            source,  # type: ignore[arg-type]  # any object with __getitem__ serves
            batch_size=None,
            sampler=keys,
            num_workers=workers,
            prefetch_factor=ahead if workers else None,
            collate_fn=_unchanged,
            worker_init_fn=partial(_start_worker, _main_process()),
            multiprocessing_context=_context() if workers else None,
            generator=torch.Generator().manual_seed(0),  # the loader shall not draw from the training's generator
        )
        with _undisturbed_start():
            self._results: Iterator[Any] | None = iter(loader)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Result:
        if self._results is None:
            raise StopIteration
        try:
            result = next(self._results)
        except RuntimeError as error:
            if "DataLoader worker (pid" not in str(error):
                raise
            self.close()
            raise DataError(
                f"a worker process that reads images died: {error}. The usual causes are too little memory or too "
                "little room in /dev/shm; try fewer --workers (0 uses none) or a smaller --batch-size."
            ) from error
        if isinstance(result, LasgdError):
            self.close()
            raise result
        return result

    def close(self) -> None:
        """Ends the workers and waits for them; may be called twice, and after a failure."""
        results, self._results = self._results, None
        shut_down = getattr(
            results, "_shutdown_workers", None
        )  # torch offers no public way, and `del` leaves it to chance
        if shut_down is not None:
            shut_down()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _unchanged(result: Any) -> Any:
    return result


def _context() -> str | None:
    """Forked workers inherit the imported modules and the list of files; elsewhere the platform's own way."""
    return "fork" if sys.platform == "linux" and "fork" in multiprocessing.get_all_start_methods() else None


def _main_process() -> int | None:
    """Whose end is to end the workers at once; None in another thread, because the kernel means threads."""
    return os.getpid() if threading.current_thread() is threading.main_thread() else None


def _start_worker(main_process: int | None, worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux" and main_process is not None:
        # A forked worker holds copies of all sockets: as long as it lived on, the other ranks would not see ours close.
        die_with_parent(main_process)
        # torchrun signals a rank's whole group. A rank that is to end cleanly needs its batches until then.
        with suppress(OSError):
            os.setpgid(0, 0)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", module=r"PIL\.")  # odd metadata of a readable image is not worth a line per epoch


@contextmanager
def _undisturbed_start() -> Iterator[None]:
    """Around the start of worker processes, three things that would go wrong later or elsewhere.

    1. SIGINT is blocked, and workers inherit that: they are deaf to Ctrl-C from their first instruction on.
    2. torch installs a handler that raises in the main thread, wherever that is, when a worker dies: in the middle of
       a merge, say. It goes again; a dead worker is then noticed in `__next__`, within 5 s.
    3. Python warns of a fork beside threads. The workers use nothing that another thread of ours could hold locked.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    on_child = signal.getsignal(signal.SIGCHLD) if hasattr(signal, "SIGCHLD") else None
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT}) if hasattr(signal, "pthread_sigmask") else None
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*fork.*", category=DeprecationWarning)
            yield
    finally:
        if in_main_thread and on_child is not None:
            signal.signal(signal.SIGCHLD, on_child)
        if blocked is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
