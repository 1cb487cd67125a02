"""Ranks of a measurement as processes in network namespaces, whose links are emulated as in `lasgd train`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

_PORT = "29500"  # in a namespace of its own every port is free
_TIMEOUT_S = 300.0


def printed(script: Path, asked: Any, world_size: int, bandwidth_bytes_per_s: float) -> list[Any]:
    """Runs `script` as each rank, with `asked` as JSON for its argument; returns the JSON that each rank has printed.

    Raises ConfigurationError where links cannot be emulated by namespaces, RuntimeError for a rank that fails.
    """
    from lasgd.lab.network import ShapedNetwork

    with ShapedNetwork(world_size, bandwidth_bytes_per_s) as network:
        ranks = [
            subprocess.Popen(
                [*network.command_prefix(rank), sys.executable, str(script), json.dumps(asked)],
                env=os.environ
                | network.environment(rank)
                | {
                    "RANK": str(rank),
                    "WORLD_SIZE": str(world_size),
                    "MASTER_ADDR": network.rank_address(0),
                    "MASTER_PORT": _PORT,
                    "OMP_NUM_THREADS": "1",
                },
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(world_size)
        ]
        try:
            texts = [rank.communicate(timeout=_TIMEOUT_S)[0] for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()
    if any(rank.returncode for rank in ranks):
        raise RuntimeError(f"the ranks of {script.name} ended with {[rank.returncode for rank in ranks]}")
    return [json.loads(text) for text in texts]
