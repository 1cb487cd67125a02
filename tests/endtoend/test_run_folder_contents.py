"""A run as a user starts it, and what it leaves behind."""

from __future__ import annotations

import gzip
import json
import signal

import pytest
import safetensors.torch
import torch

from lasgd.training.data import open_data
from lasgd.training.evaluation import evaluate
from lasgd.training.models import build_model
from lasgd.training.run_folder import read_metrics, read_run
from training_runs import Command, Ranks, finished, running, wait_until

pytestmark = [pytest.mark.processes, pytest.mark.timeout(180)]

KEYS = {
    "status",
    "algorithm",
    "condition",
    "settings",
    "environment",
    "world_size",
    "samples",
    "wall_s",
    "start_s",
    "finish_s",
    "final",
    "replicas_identical",
    "link_emulation",
    "padding_overrun",
    "ranks",
}
RANK_KEYS = {
    "rank",
    "local_steps",
    "samples",
    "rounds",
    "compute_s",
    "waited_s",
    "staleness_steps",
    "bytes_sent",
}


def test_a_small_run_leaves_a_complete_folder_and_a_model_that_does_what_it_says(tmp_path):
    options = ("--ranks", "2", "--model", "cnn4", "--samples", "6000", "--evaluations", "4", "--checkpoints", "3")
    options += ("--batch-size", "32")
    with running(Command(*options, "--out", "run", cwd=tmp_path)) as command:
        assert command.wait() == 0, command.err
        command.wait_gone()
    out = tmp_path / "run"

    run = json.loads((out / "run.json").read_text())
    assert run.keys() >= KEYS
    assert [rank.keys() for rank in run["ranks"]] == [RANK_KEYS] * 2
    record = finished(out)
    assert (record.algorithm, record.condition, record.world_size, record.link_emulation) == (
        "lasgd",
        "fast",
        2,
        "none",
    )
    assert record.samples >= 6000
    assert [rank.samples for rank in record.ranks] == [32 * rank.local_steps for rank in record.ranks]
    # The ranks' own counts include the steps that ended while the last round was on its way.
    assert sum(rank.samples for rank in record.ranks) >= record.samples
    assert all(rank.bytes_sent > 0 and rank.rounds > 0 for rank in record.ranks)
    assert all(0 <= rank.waited_s <= record.wall_s for rank in record.ranks)
    assert record.notes == []

    assert json.loads((out / "settings.json").read_text())["samples"] == 6000
    metrics = read_metrics(out / "metrics.jsonl")
    names = ["loss", "samples", "top1", "wall_s"]
    assert [sorted(line) for line in metrics] == [["consensus", *names]] * (len(metrics) - 1) + [names]
    assert [line["samples"] for line in metrics] == sorted(line["samples"] for line in metrics)
    assert metrics[-1]["samples"] == record.samples
    events = json.loads(gzip.decompress((out / "timeline.json.gz").read_bytes()))["traceEvents"]
    assert {(event["pid"], event["name"]) for event in events if event["ph"] == "X"} >= {
        (rank, kind) for rank in (0, 1) for kind in ("compute", "round")
    }
    assert not (out / "means").exists()
    assert not list(out.rglob("*.tmp"))

    data = open_data("digits")
    model = build_model("cnn4", num_classes=10, channels=1)
    model.load_state_dict(safetensors.torch.load_file(out / "model.safetensors"))
    final, _ = evaluate(model, data, torch.device("cpu"), workers=0)
    assert record.final is not None
    assert final.top1 == record.final.top1 == metrics[-1]["top1"]
    assert final.loss == pytest.approx(record.final.loss, rel=1e-4)  # another number of threads, another order of sums

    # What a log shows: few lines, no colours, the results at the end.
    lines = command.out.splitlines()
    assert lines[0] == "training cnn4 on digits with lasgd: 2 ranks, condition fast; results go to run"
    assert sum("evaluating" in line for line in lines) == 1
    assert lines[-1] == "results: run"
    assert "\x1b" not in command.out
    assert command.err == ""


SLOW_JUDGE = """
import time
from torch import nn


class Net(nn.Sequential):
    def __init__(self, num_classes):
        super().__init__(nn.Flatten(), nn.Linear(64, num_classes))

    def forward(self, images):
        if not self.training:
            time.sleep(0.3)
        return super().forward(images)
"""


def test_ctrl_c_during_the_evaluations_loses_neither_the_model_nor_the_record_of_the_run(tmp_path):
    (tmp_path / "slow_judge.py").write_text(SLOW_JUDGE)
    options = ("--model", "slow_judge:Net", "--samples", "6000", "--workers", "0", "--condition", "step=5ms")
    with running(Ranks(*options, "--out", "run", cwd=tmp_path)) as ranks:
        metrics = tmp_path / "run" / "metrics.jsonl"
        wait_until(lambda: metrics.exists() and metrics.read_text().count("\n") >= 1, "the first evaluation")
        ranks.signal(0, signal.SIGINT)
        assert ranks.wait() == [130, 0], ranks.said(0)
        assert "Traceback" not in ranks.said(0)
    record = read_run(tmp_path / "run")
    assert record.status == "interrupted"
    assert record.samples >= 6000
    assert len(record.ranks) == 2
    assert record.replicas_identical is True
    lines = read_metrics(metrics)
    assert record.final is not None
    assert lines[-1]["samples"] == record.samples
    assert lines[-1]["top1"] == record.final.top1
    assert 1 < len(lines) < 10
    assert (tmp_path / "run" / "model.safetensors").exists()
