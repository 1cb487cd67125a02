"""What collectives cost at least, on equal links, in seconds."""

from __future__ import annotations


def ring_all_reduce_s(n_bytes: float, world_size: int, latency_s: float, bandwidth_bytes_per_s: float) -> float:
    """Seconds for a ring all-reduce of `n_bytes` over `world_size` equal links.

    2(n-1) messages of n_bytes/n each, one after another: 2(n-1) latency + 2 (n-1)/n n_bytes/bandwidth.
    Source: Patarasuk & Yuan (2009), J. Parallel Distrib. Comput. 69(2).

    Raises ValueError if world_size < 1 or bandwidth is not positive.
    """
    _check(world_size, bandwidth_bytes_per_s)
    messages = 2 * (world_size - 1)
    return messages * latency_s + messages / world_size * n_bytes / bandwidth_bytes_per_s


def broadcast_s(n_bytes: float, world_size: int, latency_s: float, bandwidth_bytes_per_s: float) -> float:
    """Seconds below which no broadcast of `n_bytes` from one rank to all ends.

    The bytes cross every receiver's link once, and with each latency those that have heard at most double:
    ceil(log2 n) latency + n_bytes/bandwidth; nothing for one rank alone.

    Raises ValueError if world_size < 1 or bandwidth is not positive.
    """
    _check(world_size, bandwidth_bytes_per_s)
    if world_size == 1:
        return 0.0
    return (world_size - 1).bit_length() * latency_s + n_bytes / bandwidth_bytes_per_s


def _check(world_size: int, bandwidth_bytes_per_s: float) -> None:
    if world_size < 1:
        raise ValueError(f"world_size is {world_size}; expected at least 1")
    if not bandwidth_bytes_per_s > 0:
        raise ValueError(f"bandwidth_bytes_per_s is {bandwidth_bytes_per_s}; expected more than 0")


def ring_bytes_sent(n_bytes: int, world_size: int) -> int:
    """Bytes that each rank sends in a ring all-reduce of `n_bytes`: 2 (n-1)/n of them (source as above)."""
    return 2 * (world_size - 1) * n_bytes // world_size
