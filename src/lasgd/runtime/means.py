"""Keeps the mean of the replicas as the rounds bring it, fragment by fragment, for evaluation."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lasgd.pace import Pace


@dataclass(frozen=True)
class KeptMean:
    """A mean of the whole vector, its fragments from one cycle of rounds."""

    vector: Tensor  # (D,) on the CPU, owned by the receiver
    samples: int  # processed by all ranks when its last fragment arrived
    at_s: float  # time.monotonic() of that moment
    evaluation: int = 0  # the number of the evaluation that it is for


class Collection:
    """A vector that successive rounds fill; complete when they have covered every element."""

    def __init__(self, size: int, dtype: torch.dtype):
        self.vector = torch.empty(size, dtype=dtype)
        self._filled = 0
        self._next_begin: int | None = None

    def take(self, begin: int, values: Tensor) -> bool:
        """Copies one round's mean in; True once complete."""
        size, end = self.vector.numel(), begin + values.numel()
        if self._next_begin not in (None, begin):
            self._filled = 0  # a round was missed
        self.vector[begin:end].copy_(values)
        self._filled += values.numel()
        self._next_begin = end % size
        return self._filled >= size


class MeanKeeper:
    """Fed by the communicator. Holds no memory until somebody wants a mean: then one vector of the model's size."""

    def __init__(self, size: int, dtype: torch.dtype):
        self._size, self._dtype = size, dtype
        self._lock = threading.Lock()
        self._kept: Collection | None = None
        self._is_complete = threading.Event()
        self._evaluation = 0
        self._collecting: Collection | None = None
        self._deliver: Callable[[KeptMean], None] | None = None

    def keep(self) -> None:
        """Any thread: hold the latest mean from now on."""
        with self._lock:
            if self._kept is None:
                self._kept = Collection(self._size, self._dtype)

    def deliver_evaluations(self, deliver: Callable[[KeptMean], None]) -> None:
        """Before the start: collect a mean when an evaluation is due, and hand it over on the communicator's thread."""
        self._deliver = deliver

    def is_wanted(self, pace: Pace) -> bool:
        """Somebody would use a mean of this moment."""
        if self._kept is not None or self._collecting is not None:
            return True
        return self._deliver is not None and pace.evaluation > self._evaluation

    def take(self, begin: int, values: Tensor, pace: Pace) -> None:
        """Communicator: one round's mean of the elements from `begin` on. Copies what it needs."""
        if self._kept is not None:
            with self._lock:
                if self._kept.take(begin, values):
                    self._is_complete.set()
        if self._deliver is None:
            return
        if self._collecting is None and pace.evaluation > self._evaluation:
            self._evaluation = pace.evaluation
            self._collecting = Collection(self._size, self._dtype)
        if self._collecting is not None and self._collecting.take(begin, values):
            done, self._collecting = self._collecting, None
            self._deliver(KeptMean(done.vector, pace.samples, time.monotonic(), self._evaluation))

    def wait_vector(self, timeout_s: float, is_over: Callable[[], bool]) -> Tensor | None:
        """A copy of the latest whole mean, (D,); None if none has come in time, or `is_over` says none will."""
        self.keep()
        deadline_s = time.monotonic() + timeout_s
        while not self._is_complete.wait(0.05):
            if is_over() or time.monotonic() > deadline_s:
                return None
        with self._lock:
            assert self._kept is not None
            return self._kept.vector.clone()
