"""A handful of real ranks; only what holds on any schedule, each with a hard limit."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("rank_script.py")
LIMIT_S = 100.0  # two busy cores take tens of seconds to import torch three times

pytestmark = pytest.mark.processes


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


class Ranks:
    """Ranks of rank_script.py without a launcher: rank 0 hosts the store."""

    def __init__(self, behaviour: str, world_size: int, only: tuple[int, ...] | None = None, **environment: str):
        port = environment.pop("port", None) or str(free_port())
        self.begin_s = time.monotonic()
        self.processes = {
            rank: subprocess.Popen(
                [sys.executable, str(SCRIPT), behaviour],
                env={
                    **os.environ,
                    "RANK": str(rank),
                    "WORLD_SIZE": str(world_size),
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": port,
                    **environment,
                },
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in (only or range(world_size))
        }

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes.values():
            process.kill()  # SIGKILL, also of a stopped one
            process.communicate()

    def end(self, rank: int) -> tuple[int, str, str]:
        """Exit code, output, errors."""
        process = self.processes[rank]
        output, errors = process.communicate(timeout=max(1.0, LIMIT_S - (time.monotonic() - self.begin_s)))
        return process.returncode, output, errors


def test_under_torchrun_all_replicas_end_identical_by_digest():
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3", str(SCRIPT), "train"],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ends = re.findall(r"digest (\w+) rounds (\d+)", done.stdout)
    assert len(ends) == 3
    assert len(set(ends)) == 1


def test_a_rank_that_raises_ends_the_others_within_seconds_with_its_words():
    with Ranks("raise", 3) as ranks:
        code, _, errors = ranks.end(1)
        raised_s = time.monotonic()
        assert code == 1 and "too many bananas" in errors
        for rank in (0, 2):
            code, _, errors = ranks.end(rank)
            assert code == 1
            assert re.search(rf"PeerError: rank {rank} of 3: round \d+: .*Rank 1 left: ValueError: too many", errors)
        assert time.monotonic() - raised_s < 10


def test_a_rank_that_raises_without_a_with_block_ends_by_its_own_error_and_the_others_have_its_words():
    with Ranks("raise unclosed", 2) as ranks:
        code, _, errors = ranks.end(1)
        assert code == 1 and errors.strip().endswith("ValueError: too many bananas")  # no abort of the interpreter
        code, _, errors = ranks.end(0)
    assert code == 1 and errors.count("Traceback") == 1
    words = r"Rank 1 left: its process ended without closing the averaging, after ValueError: too many bananas\."
    assert re.search(rf"PeerError: rank 0 of 2: round \d+: .*{words}", errors), errors


def test_a_rank_that_is_killed_is_named_within_seconds():
    with Ranks("die", 3) as ranks:
        assert ranks.end(1)[0] == -signal.SIGKILL
        killed_s = time.monotonic()
        for rank in (0, 2):
            code, _, errors = ranks.end(rank)
            assert code == 1
            assert "PeerError" in errors and "silent: rank 1" in errors
        assert time.monotonic() - killed_s < 10


def test_a_rank_that_never_starts_is_named_after_the_start_time_out():
    with Ranks("train", 3, only=(0, 2), START_TIMEOUT_S="3") as ranks:
        for rank in (0, 2):
            code, _, errors = ranks.end(rank)
            assert code == 1
            assert re.search(rf"PeerError: rank {rank} of 3: joined: .*nothing from rank 1 after 3", errors), errors


def test_a_port_in_use_is_a_configuration_error():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with Ranks("train", 2, only=(0,), port=str(taken.getsockname()[1]), START_TIMEOUT_S="5") as ranks:
            code, _, errors = ranks.end(0)
    assert code == 1
    assert re.search(r"ConfigurationError: rank 0 of 2: port \d+ on 127.0.0.1 is in use", errors), errors


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_rank_that_stands_still_is_named_after_the_time_out(stopped):
    # Rank 0 hosts the store, so its silence is the store's too.
    with Ranks(f"stop {stopped}", 3) as ranks:
        for rank in {0, 1, 2} - {stopped}:
            code, _, errors = ranks.end(rank)
            assert code == 1, errors
            assert "PeerError" in errors
            assert re.search(rf"silent: (rank )?{stopped}\.", errors), errors
