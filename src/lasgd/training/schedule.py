"""The learning rate as a function of global progress."""

from __future__ import annotations

import math


def factor(progress: float, warmup: float) -> float:
    """Share of the peak learning rate at `progress` (0 to 1, of all ranks): linear warm-up, then a cosine to zero.

    The warm-up begins at 1 % of the peak, so that the steps before the first round are not lost.
    Source of the cosine: Loshchilov & Hutter (2017), "SGDR", without restarts.
    """
    if progress < warmup:
        return max(0.01, progress / warmup)
    return 0.5 * (1.0 + math.cos(math.pi * (progress - warmup) / (1.0 - warmup)))
