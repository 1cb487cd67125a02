"""Which local steps stall: the same ones in real runs and in virtual time."""

from __future__ import annotations

import struct
from hashlib import blake2b


def is_stalled(probability: float, seed: int, rank: int, local_step: int) -> bool:
    """`rank` stalls in its step number `local_step`: true with this probability, a pure function of its arguments."""
    if probability == 0.0:
        return False
    digest = blake2b(struct.pack("<3q", seed, rank, local_step), digest_size=8, person=b"lasgd stall").digest()
    drawn = int.from_bytes(digest, "little") / 2**64  # uniform in [0, 1]: 100 % must always stall, hence <= below
    return drawn <= probability
