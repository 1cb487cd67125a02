"""How far the replicas are apart."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor


def mean_replica(replicas: Sequence[Any]) -> Tensor:
    """The mean of all x_i, (D,), a new vector; of those that are finite, where there are any."""
    vectors = _finite(replicas)
    return _mean(vectors) if any(True for _ in vectors()) else replicas[0].parameters()


def consensus_distance(replicas: Sequence[Any]) -> float:
    """sqrt(mean_i |x_i - mean_j x_j|^2), the Euclidean norm over the whole vector; NaN where no replica is finite."""
    vectors = _finite(replicas)
    if not any(True for _ in vectors()):
        return math.nan
    mean = _mean(vectors)
    squares = [float((vector - mean).double().square().sum()) for vector in vectors()]
    return math.sqrt(math.fsum(squares) / len(squares))


def _finite(replicas: Sequence[Any]) -> Callable[[], Iterable[Tensor]]:
    """One vector after the other, again and again: all of them at once would be one more copy of every replica."""
    return lambda: (vector for replica in replicas if torch.isfinite(vector := replica.parameters()).all())


def _mean(vectors: Callable[[], Iterable[Tensor]]) -> Tensor:
    total: Tensor | None = None
    dtype, count = torch.float32, 0
    for vector in vectors():
        total = vector.to(torch.float64, copy=True) if total is None else total.add_(vector)
        dtype, count = vector.dtype, count + 1
    assert total is not None
    return total.div_(count).to(dtype)
