"""Which image comes when: pure functions of (seed, rank, position), so that a resumed run repeats and loses nothing.

Random bits come from PCG64 raw output seeded by a SeedSequence, the two streams that NumPy promises never to change;
its `permutation` may change between releases, an argsort of raw bits cannot.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np

ORDER, AUGMENTATION, SPLIT = 1, 2, 3
"""What random bits are for; the first number of a key, so that no two uses share a stream."""


def seed_of(*key: int) -> int:
    """A 64-bit seed that depends on every number of `key` (none negative)."""
    return int(_raw_bits(1, key)[0])


def permutation(n: int, *key: int) -> np.ndarray:
    """A permutation of range(n), (n,) int64: a pure function of (n, key), the same on every machine."""
    return np.argsort(_raw_bits(n, key), kind="stable").astype(np.int64, copy=False)


def indices(n: int, seed: int, rank: int, begin: int, count: int) -> list[int]:
    """The `count` images that rank `rank` draws from position `begin` on, as indices below `n`.

    Each rank draws from its own permutation of the whole data set, a new one for each pass over it. A position counts
    the rank's samples since the start of the run; passes follow each other without a gap, inside a batch too.

    Raises ValueError where `n` < 1, or `begin` or `count` is negative.
    """
    if n < 1 or begin < 0 or count < 0:
        raise ValueError(f"need n >= 1, begin >= 0, count >= 0; got n={n}, begin={begin}, count={count}")
    one_pass = _passes(n, seed, rank)
    drawn: list[int] = []
    while len(drawn) < count:
        epoch, start = divmod(begin + len(drawn), n)
        drawn += one_pass(epoch)[start : start + count - len(drawn)].tolist()
    return drawn


@lru_cache(maxsize=64)  # of the ranks that one process draws for: one in a real run, many in virtual time
def _passes(n: int, seed: int, rank: int) -> Callable[[int], np.ndarray]:
    @lru_cache(maxsize=2)  # a batch touches one pass, or two where it straddles them
    def one_pass(epoch: int) -> np.ndarray:
        return permutation(n, ORDER, seed, rank, epoch).astype(np.int32 if n < 2**31 else np.int64)

    return one_pass


def _raw_bits(n: int, key: tuple[int, ...]) -> np.ndarray:
    return np.random.PCG64(np.random.SeedSequence(key)).random_raw(n)
