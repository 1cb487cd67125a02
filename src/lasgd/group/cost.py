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


def halving_doubling_all_reduce_s(
    n_bytes: float, world_size: int, latency_s: float, bandwidth_bytes_per_s: float
) -> float:
    """Seconds for an all-reduce by recursive halving and doubling of `n_bytes` over `world_size` equal links.

    Reduce-scatter by recursive halving, all-gather by recursive doubling (Rabenseifner): for n = 2^k
    2k exchanges, of 1/2, 1/4, ... 1/n of the bytes and back: 2 log2 n latency + 2 (n-1)/n n_bytes/bandwidth.

    For other n, with p the largest power of two below: n - p ranks first send all they have to a neighbour that stands
    for both, p ranks go on, and the neighbours send the result back: 2 latency + 2 n_bytes/bandwidth more.
    Source: Thakur, Rabenseifner & Gropp (2005), Int. J. High Perform. Comput. Appl. 19(1), and for other n their code
    in MPICH.

    Raises ValueError if world_size < 1 or bandwidth is not positive.
    """
    _check(world_size, bandwidth_bytes_per_s)
    exchanges = world_size.bit_length() - 1
    p = 1 << exchanges
    folds = 2 * (p != world_size)
    n_vectors = 2 * (p - 1) / p + folds
    return (2 * exchanges + folds) * latency_s + n_vectors * n_bytes / bandwidth_bytes_per_s


def tree_all_reduce_s(n_bytes: float, world_size: int, latency_s: float, bandwidth_bytes_per_s: float) -> float:
    """Seconds for a reduce and a broadcast of `n_bytes` along a binomial tree of `world_size` equal links.

    Each way ceil(log2 n) messages of all the bytes, one after another: 2 ceil(log2 n) (latency + n_bytes/bandwidth).
    Source: Thakur, Rabenseifner & Gropp (2005), as above.

    Raises ValueError if world_size < 1 or bandwidth is not positive.
    """
    _check(world_size, bandwidth_bytes_per_s)
    return 2 * (world_size - 1).bit_length() * (latency_s + n_bytes / bandwidth_bytes_per_s)


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


def pieces_bytes_sent(n_bytes: int, world_size: int) -> int:
    """Bytes that each rank sends in an all-to-all or an all-gather of `n_bytes` in n pieces: all but its own piece."""
    return (world_size - 1) * n_bytes // world_size


def pieces_s(n_bytes: float, world_size: int, latency_s: float, bandwidth_bytes_per_s: float) -> float:
    """Seconds for an all-to-all or an all-gather over equal links, where `n_bytes` are all pieces of one rank.

    n-1 messages of n_bytes/n each leave and reach every rank; with the latency of each, as half of a ring all-reduce.
    Raises ValueError if world_size < 1 or bandwidth is not positive.
    """
    return ring_all_reduce_s(n_bytes, world_size, latency_s, bandwidth_bytes_per_s) / 2
