"""Gossip and servers in real processes, over real sockets: to the end, killed, interrupted, resumed."""

from __future__ import annotations

import json
import os
import signal
import time

import pytest

from lasgd.algorithms import registry
from lasgd.training.run_folder import read_metrics, read_run
from training_runs import Ranks, finished, running, wait_cut

pytestmark = [pytest.mark.processes, pytest.mark.timeout(180)]

WRITING = [name for name in registry.names() if registry.find(name).writes_messages]
QUICK = ("--model", "cnn4", "--samples", "1500", "--batch-size", "16", "--checkpoints", "0", "--workers", "0")
QUICK += ("--evaluations", "3")
SLOW = ("--model", "cnn4", "--samples", "8000", "--checkpoints", "20", "--condition", "step=20ms")
SLOW += (
    "--evaluations",
    "0",
)


@pytest.mark.parametrize("algorithm", WRITING)
def test_a_run_ends_with_equal_replicas_evaluations_and_counted_bytes(tmp_path, algorithm):
    with running(Ranks("--algorithm", algorithm, *QUICK, "--out", "run", cwd=tmp_path, world_size=3)) as ranks:
        assert ranks.wait() == [0, 0, 0], ranks.said(0) + ranks.said(1)
    record = finished(tmp_path / "run")
    metrics = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [line["samples"] for line in metrics] == sorted(line["samples"] for line in metrics)
    assert len(metrics) >= 2 and all("consensus" in line for line in metrics[:-1])
    for rank in record.ranks:
        assert rank.rounds >= 1
        assert rank.bytes_sent > 391_466 * 4  # one replica at least, beside headers and the last average
    assert not (tmp_path / "run" / "replicas").exists()


def test_on_a_link_in_user_space_a_message_takes_its_time(tmp_path):
    # One vector of 1.57 MB takes 0.125 s through 100 Mbit/s; a round of sgp is one message each way.
    condition = ("--condition", "link=100mbit+step=20ms")
    options = ("--algorithm", "sgp", *QUICK, *condition, "--out", "run")
    with running(Ranks(*options, cwd=tmp_path)) as ranks:
        assert ranks.wait() == [0, 0], ranks.said(0) + ranks.said(1)
    record = finished(tmp_path / "run")
    assert record.link_emulation == "user space"
    assert record.wall_s / record.ranks[0].rounds >= 0.125 + 0.02


@pytest.mark.parametrize("algorithm", ["ad_psgd", "parameter_server"])
def test_a_rank_that_is_killed_ends_the_others_with_its_name(tmp_path, algorithm):
    with running(Ranks("--algorithm", algorithm, *SLOW, "--out", "run", cwd=tmp_path, world_size=3)) as ranks:
        wait_cut(tmp_path / "run", 3, 2)
        os.kill(ranks.processes[2].pid, signal.SIGKILL)
        killed_s = time.monotonic()
        codes = ranks.wait()
        assert time.monotonic() - killed_s < 30
    assert codes == [1, 1, -signal.SIGKILL]
    assert "silent: rank 2" in ranks.said(0) and "Traceback" not in ranks.said(0)


@pytest.mark.parametrize("algorithm", ["ad_psgd", "d_psgd", "parameter_server"])
def test_an_interrupted_run_goes_on_to_its_end(tmp_path, algorithm):
    out = tmp_path / "run"
    with running(Ranks("--algorithm", algorithm, *SLOW, "--out", "run", cwd=tmp_path)) as ranks:
        wait_cut(out, 2, 2)
        ranks.signal(1, signal.SIGINT)
        assert ranks.wait() == [130, 130], ranks.said(0) + ranks.said(1)
    assert read_run(out).status == "interrupted"
    with running(Ranks("--resume", "run", cwd=tmp_path)) as ranks:
        assert ranks.wait() == [0, 0], ranks.said(0) + ranks.said(1)
    record = finished(out)
    assert record.resumed_from_samples and record.samples >= 8000


def test_a_budget_in_seconds_ends_the_run_when_they_are_over(tmp_path):
    options = ("--algorithm", "lasgd", "--model", "cnn4", "--seconds", "3", "--batch-size", "16", "--workers", "0")
    with running(Ranks(*options, "--evaluations", "3", "--out", "run", cwd=tmp_path)) as ranks:
        assert ranks.wait() == [0, 0], ranks.said(0) + ranks.said(1)
    record = finished(tmp_path / "run")
    assert 3.0 <= record.wall_s < 6.0  # by the round that finds it over, on a busy machine
    assert json.loads((tmp_path / "run" / "run.json").read_text())["settings"]["seconds"] == 3.0
