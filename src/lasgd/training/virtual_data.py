"""Batches for many ranks in one process, drawn ahead by a few workers that all ranks share.

Each rank's batches are those of a real run: pure functions of (seed, rank, position). In which order the ranks will ask
is not known for certain, so their next batches are drawn in the order in which they have asked last.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from lasgd.errors import DataError, LasgdError
from lasgd.training import augment
from lasgd.training.data import Batch, ImageData, TrainingSource, batches_ahead
from lasgd.training.workers import InOrder

_NOTHING = -1  # a key for which nothing is drawn


class SharedBatches:
    """The training batches of all ranks. Used by one thread; `close` ends the workers."""

    def __init__(self, data: ImageData, *, seed: int, ranks: int, batch_size: int, workers: int):
        augment.augmenter(data.augmentation, data.image_size)
        self._ranks = ranks
        self._taken = [0] * ranks  # batches
        self._arrived: dict[int, Batch] = {}  # by key; each rank has at most one drawn, being drawn or waiting for it
        self._next = deque(range(ranks))  # the keys to be drawn, the most urgent first
        self._being_drawn: deque[int] = deque()  # keys, in the order in which their batches will come
        workers = min(workers, ranks)
        self._source = _Source(data, seed, ranks, batch_size)
        self._results: InOrder[Batch | None] | None = None
        if workers:
            ahead = max(1, min(batches_ahead(data, batch_size), ranks // workers))
            self._results = InOrder(self._source, self._keys(), workers, ahead)

    def take(self, rank: int) -> Batch:
        """The rank's next batch. Raises DataError where no image can be read, or a worker died."""
        key = self._taken[rank] * self._ranks + rank
        self._taken[rank] += 1
        if self._results is None:
            batch = self._source[key]
            if isinstance(batch, LasgdError):
                raise batch
            assert batch is not None
            return batch
        self._next.append(key + self._ranks)
        while key not in self._arrived:
            batch, drawn = next(self._results), self._being_drawn.popleft()
            if batch is not None:
                self._arrived[drawn] = batch
        return self._arrived.pop(key)

    def close(self) -> None:
        """Ends the workers; may be called twice."""
        if self._results is not None:
            self._results.close()

    def _keys(self) -> Iterator[int]:
        while True:
            self._being_drawn.append(self._next.popleft() if self._next else _NOTHING)
            yield self._being_drawn[-1]


@dataclass(frozen=True)
class _Source:
    """Batch number `key // ranks` of rank `key % ranks`."""

    data: ImageData
    seed: int
    ranks: int
    batch_size: int

    def __getitem__(self, key: int) -> Batch | DataError | None:
        if key == _NOTHING:
            return None
        number, rank = divmod(key, self.ranks)
        return TrainingSource(self.data, self.seed, rank, self.batch_size)[number * self.batch_size]
