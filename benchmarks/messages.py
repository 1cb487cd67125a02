"""How long messages take that share an emulated link, over lasgd's own mail; calibrate.py asks for them.

Ranks from 1 on write to rank 0, all over its download, at times that all of them know; rank 0 notes when each message
is there.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import linked_ranks

_PAUSE_S = 1.0
"""Between two repetitions: longer than the link's bucket needs to fill."""


def measure(
    bandwidth_bytes_per_s: float, n_bytes: int, cases: Sequence[Sequence[float]], alone_s: float, repeats: int
) -> list[list[list[float]]]:
    """Seconds that messages of `n_bytes` took: by case, repetition and sender.

    A case is when ranks 1, 2, ... begin to write; `alone_s` is what one message is expected to take on its own.

    Raises as `linked_ranks.printed` does.
    """
    asked = [n_bytes, [list(case) for case in cases], alone_s, repeats]
    world_size = 1 + max(map(len, cases))
    return linked_ranks.printed(Path(__file__).resolve(), asked, world_size, bandwidth_bytes_per_s)[0]


def rank_main(
    n_bytes: int, cases: Sequence[Sequence[float]], alone_s: float, repeats: int
) -> list[list[list[float]]] | None:
    """One rank's part; rank 0 has the times."""
    import torch

    from lasgd.group.c10d import connect

    group = connect(start_timeout_s=60.0)
    mail, vector = group.wait_mail(60.0), torch.ones(n_bytes // 4)
    told = group.wait_exchange("begin", str(time.monotonic()).encode(), 60.0)
    now_s = max(map(float, told)) + _PAUSE_S  # one machine, one clock
    found = []
    for case in cases:
        of_case = []
        for _ in range(repeats + 1):  # the first one is not counted
            begins_s = [now_s + after_s for after_s in case]
            if group.rank == 0:
                took_s = [0.0] * len(case)
                for _ in case:
                    letter = mail.wait_receive(0, None, 60.0)
                    assert letter is not None, "60 s without a letter"
                    took_s[letter.source - 1] = time.monotonic() - begins_s[letter.source - 1]
                of_case.append(took_s)
            elif group.rank <= len(case):
                time.sleep(max(0.0, begins_s[group.rank - 1] - time.monotonic()))
                mail.send(0, 0, vector, 1.0, 0)
            now_s += max(case) + 1.5 * alone_s * len(case) + _PAUSE_S
        found.append(of_case[1:])
    group.wait_exchange("end", b"", 60.0)
    group.leave()
    return found if group.rank == 0 else None


if __name__ == "__main__":
    print(json.dumps(rank_main(*json.loads(sys.argv[1]))))
