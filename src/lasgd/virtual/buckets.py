"""How torch's DistributedDataParallel overlaps the all-reduce of gradients with the backward pass, roughly.

The gradients of the last layers are ready first. DDP collects them into buckets, a small one first and then larger
ones, and all-reduces each as soon as it is full. Here the backward pass fills the vector evenly:

    local step   |-- forward, 1/3 --|----------- backward, 2/3 -----------|
                                       ^ first bucket full                ^ last bucket full

So the all-reduces of one step end when the last bucket's is over, which begins no sooner than the last bucket is full,
or the whole vector's, which begins when the last rank has its first bucket, whichever is later.

Sources: S. Li et al., "PyTorch Distributed: Experiences on Accelerating Data Parallel Training" (2020), arXiv
2006.15704; the sizes are torch's defaults.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Buckets:
    """Sizes of the buckets in bytes, and how much of a local step is the backward pass."""

    first_bytes: float = 2**20
    other_bytes: float = 25 * 2**20
    backward_share: float = 2 / 3

    def ready_before_end_s(self, n_bytes: int, step_s: float) -> float:
        """Seconds from when the first bucket is full to the end of a step of `step_s`, for gradients of `n_bytes`."""
        return self.backward_share * step_s * (1 - min(1.0, self.first_bytes / n_bytes))

    def last_bytes(self, n_bytes: int) -> int:
        """Bytes of the last bucket."""
        after_first = n_bytes - self.first_bytes
        if after_first <= 0:
            return n_bytes
        full = math.ceil(after_first / self.other_bytes) - 1
        return round(after_first - full * self.other_bytes)


NO_OVERLAP = Buckets(first_bytes=math.inf, other_bytes=math.inf)
"""One bucket, full when the backward pass is over."""
