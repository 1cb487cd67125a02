"""Ranks as threads of one process, averaging over real Gloo: several ranks on one GPU, with nothing to launch."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
import torch.distributed as dist

from lasgd.group.c10d import C10dGroup

Result = TypeVar("Result")

START_TIMEOUT_S = 60.0
TIMEOUT_S = 300.0

_runs = itertools.count()


def run_ranks(world_size: int, device: torch.device, body: Callable[[int, C10dGroup], Result]) -> list[Result]:
    """Calls body(rank, group) in one thread per rank, on a CUDA device each with a stream of its own.

    One rank alone runs in the calling thread: the profiler wants to be started by the main one.

    Returns their results in the order of ranks, when the device has done what they asked of it. Raises the error of
    the rank that failed first, or RuntimeError if one is not done in time.
    """
    store, prefix = dist.HashStore(), f"run-{next(_runs)}"
    results: dict[int, Result] = {}
    errors: list[BaseException] = []

    def rank_main(rank: int) -> None:
        try:
            with own_stream(device):
                group = C10dGroup(dist.PrefixStore(prefix, store), rank, world_size, START_TIMEOUT_S)
                try:
                    results[rank] = body(rank, group)
                finally:
                    group.leave()
        except BaseException as error:
            errors.append(error)

    if world_size == 1:
        rank_main(0)
    else:
        threads = [threading.Thread(target=rank_main, args=(rank,), daemon=True) for rank in range(world_size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(TIMEOUT_S)
    if errors:
        raise errors[0]
    if len(results) < world_size:
        raise RuntimeError(f"only ranks {sorted(results)} of {world_size} were done after {TIMEOUT_S:g} s")
    return [results[rank] for rank in range(world_size)]


@contextlib.contextmanager
def own_stream(device: torch.device) -> Iterator[None]:
    """On a CUDA device: a stream of this thread's own is current within, and empty at the end. Else nothing."""
    if device.type != "cuda":
        yield
        return
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.default_stream())
        with torch.cuda.stream(stream):
            yield
        stream.synchronize()


def settle(device: torch.device) -> None:
    """Waits until the current stream has done what it was asked to do."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
