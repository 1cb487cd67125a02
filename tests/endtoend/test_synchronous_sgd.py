"""`lasgd train --algorithm sync_sgd`: torch's DistributedDataParallel, how it waits, and how it ends."""

from __future__ import annotations

import gzip
import json
import re
import signal
import time

import pytest

from lasgd.group.cost import ring_all_reduce_s, ring_bytes_sent
from lasgd.pace import Column
from lasgd.training.run_folder import read_run
from training_runs import Ranks, finished, running, wait_cut

pytestmark = [pytest.mark.processes, pytest.mark.timeout(180)]

OPTIONS = ("--algorithm", "sync_sgd", "--workers", "0", "--out", "run")
CNN4_BYTES = 4 * 390_890  # of grey digits: 9 * 32 weights for one channel where RGB has 9 * 96


def test_it_ends_with_identical_replicas_and_has_waited_for_a_slow_link(tmp_path):
    condition = ("--condition", "link=200mbit+step=30ms", "--model", "cnn4", "--batch-size", "16")
    with running(
        Ranks(*OPTIONS, *condition, "--samples", "960", "--evaluations", "2", "--checkpoints", "0", cwd=tmp_path)
    ) as ranks:
        assert ranks.wait() == [0, 0], ranks.said(0) + ranks.said(1)
    record = finished(tmp_path / "run")
    assert record.link_emulation == "user space"
    ring_s = ring_all_reduce_s(CNN4_BYTES, 2, 0.0, 25e6)
    for rank in record.ranks:
        assert rank.local_steps == rank.rounds == 31
        assert 31 * (ring_s - 0.03) < rank.waited_s < record.wall_s  # overlap saves no more than the computing is long
        header_bytes = 8 * 2 * len(Column)
        assert rank.bytes_sent == 31 * (ring_bytes_sent(CNN4_BYTES, 2) + ring_bytes_sent(header_bytes, 2))
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2
    trace = json.loads(gzip.decompress((tmp_path / "run" / "timeline.json.gz").read_bytes()))
    kinds = [event["name"] for event in trace["traceEvents"] if event["ph"] == "X" and event["pid"] == 0]
    assert kinds.count("compute") == 31
    assert {"wait", "update", "round"} < set(kinds)


LONG = ("--model", "cnn4", "--samples", "100000", "--evaluations", "0", "--checkpoints", "400")


def test_a_rank_that_is_killed_is_named_within_the_time_out(tmp_path):
    with running(Ranks(*OPTIONS, *LONG, "--timeout-s", "10", cwd=tmp_path)) as ranks:
        wait_cut(tmp_path / "run", 2)
        ranks.signal(1, signal.SIGKILL)
        killed_s = time.monotonic()
        assert ranks.wait() == [1, -signal.SIGKILL]
        assert time.monotonic() - killed_s < 20
    assert re.search(r"rank 0 of 2: round \d+: .* silent: rank 1\.", ranks.said(0)), ranks.said(0)
    assert "Traceback" not in ranks.said(0)


def test_ctrl_c_ends_all_ranks_in_the_same_step_and_the_run_goes_on_from_there(tmp_path):
    with running(Ranks(*OPTIONS, *LONG, cwd=tmp_path)) as ranks:
        wait_cut(tmp_path / "run", 2)
        ranks.signal(1, signal.SIGINT)
        assert ranks.wait() == [130, 130], ranks.said(0) + ranks.said(1)
    record = read_run(tmp_path / "run")
    assert record.status == "interrupted"
    first, second = record.ranks
    assert first.local_steps == second.local_steps
    with running(Ranks("--resume", "run", cwd=tmp_path)) as ranks:
        wait_cut(tmp_path / "run", 2, wait_cut(tmp_path / "run", 2) + 3)
        ranks.signal(0, signal.SIGINT)
        assert ranks.wait() == [130, 130], ranks.said(0) + ranks.said(1)
    assert read_run(tmp_path / "run").ranks[0].local_steps > first.local_steps


SICK = '''
import os
import torch
from torch import nn


class Sick(nn.Sequential):
    """Its loss is NaN on rank 1 from the 20th batch on."""

    def __init__(self, num_classes):
        super().__init__(nn.Flatten(), nn.Linear(64, 32), nn.BatchNorm1d(32), nn.Linear(32, num_classes))
        self.batches = 0

    def forward(self, images):
        self.batches += self.training
        is_sick = os.environ["RANK"] == "1" and self.batches > 20
        return super().forward(images) * (torch.nan if is_sick else 1.0)
'''


def test_nan_on_one_rank_spreads_with_the_mean_and_ends_the_run_on_all(tmp_path):
    (tmp_path / "my_sick_model.py").write_text(SICK)
    options = ("--model", "my_sick_model:Sick", "--samples", "6000", "--evaluations", "0", "--checkpoints", "0")
    with running(Ranks(*OPTIONS, *options, cwd=tmp_path)) as ranks:
        assert ranks.wait() == [1, 1]
    for rank in range(2):
        assert f"rank {rank} of 2: round 2" in ranks.said(rank)
        assert "every rank holds NaN or Inf" in ranks.said(rank)
        assert "Traceback" not in ranks.said(rank)


def test_buffers_end_as_rank_0_has_them(tmp_path):
    options = ("--norm", "batch", "--samples", "640", "--batch-size", "32", "--checkpoints", "0", "--evaluations", "0")
    with running(Ranks(*OPTIONS, *options, cwd=tmp_path)) as ranks:
        assert ranks.wait() == [0, 0], ranks.said(0) + ranks.said(1)
    finished(tmp_path / "run")
