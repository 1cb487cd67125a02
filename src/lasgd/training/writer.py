"""Writes files beside the training: one thread, jobs in order, errors as values."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

from lasgd.errors import LasgdError


class BackgroundWriter:
    """One thread that runs jobs in the order of `submit`, until `wait_written` ends it.

    A job that raises does not end the others: what it raised is handed to `report` as text, on that thread.
    """

    def __init__(self, report: Callable[[str], None], capacity: int = 4):
        self._report = report
        self._jobs: queue.Queue[Callable[[], None] | None] = queue.Queue(capacity)
        self._thread = threading.Thread(target=self._work, name="lasgd-writer", daemon=True)
        self._thread.start()

    def submit(self, job: Callable[[], None]) -> bool:
        """Takes the job over; False, and nothing happens, if the disk is too slow for the jobs before it."""
        return self.wait_submit(job, 0.0)

    def wait_submit(self, job: Callable[[], None], timeout_s: float) -> bool:
        """`submit`, but with patience for the jobs before it."""
        try:
            self._jobs.put(job, block=timeout_s > 0, timeout=timeout_s or None)
        except queue.Full:
            return False
        return True

    def wait_written(self, timeout_s: float) -> bool:
        """Ends the thread after its last job; False if that takes longer than the time-out."""
        if self._thread.is_alive():
            try:
                self._jobs.put(None, timeout=timeout_s)
            except queue.Full:
                return False
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                job()
            except LasgdError as error:
                self._report(str(error))
            except Exception as error:  # a full disk shows in many ways; none may end the training
                self._report(f"{type(error).__name__}: {error}")
