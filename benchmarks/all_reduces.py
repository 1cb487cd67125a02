"""How long all-reduces of lasgd's own group take between processes on emulated links; calibrate.py asks for them.

Each rank is a process in a network namespace, as in `lasgd train`, and prints when each all-reduce began and ended.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import linked_ranks

Times = list[tuple[float, float]]
"""(begin_s, end_s) of each all-reduce on one rank's clock, which is all ranks' on one machine."""


def measure(
    bandwidth_bytes_per_s: float, world_size: int, sizes: Sequence[int], repeats: int, pause_s: float
) -> dict[int, list[Times]]:
    """By bytes of the vector: by rank, the times of `repeats` all-reduces with `pause_s` between two.

    Raises ConfigurationError where links cannot be emulated by namespaces, RuntimeError for a rank that fails.
    """
    asked = [list(sizes), repeats, pause_s]
    of_ranks = linked_ranks.printed(Path(__file__).resolve(), asked, world_size, bandwidth_bytes_per_s)
    return {
        size: [[(begin_s, end_s) for begin_s, end_s in times[k]] for times in of_ranks] for k, size in enumerate(sizes)
    }


def from_last_joining_s(of_ranks: Sequence[Times]) -> list[float]:
    """Seconds of each all-reduce from when the last rank joined until it ended, on the rank where it ended last."""
    return [
        max(end_s for _, end_s in same) - max(begin_s for begin_s, _ in same) for same in zip(*of_ranks, strict=True)
    ]


def rank_main(sizes: Sequence[int], repeats: int, pause_s: float) -> list[Times]:
    """One rank's part."""
    import torch

    from lasgd.group.c10d import connect
    from lasgd.pace import Column

    group = connect(start_timeout_s=60.0)
    header = torch.zeros(group.world_size, len(Column), dtype=torch.float64)
    done: list[Times] = []
    for size in sizes:
        vector = torch.ones(size // 4)
        times: Times = []
        for _ in range(repeats + 1):  # the first one is not counted
            time.sleep(pause_s)
            begin_s = time.monotonic()
            _, end_s = group.wait_all_reduce(header, vector, timeout_s=60.0)
            times.append((begin_s, end_s))
        done.append(times[1:])
    group.leave()
    return done


if __name__ == "__main__":
    print(json.dumps(rank_main(*json.loads(sys.argv[1]))))
