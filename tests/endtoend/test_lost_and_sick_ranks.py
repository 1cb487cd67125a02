"""A rank that dies, that never comes, that disagrees, or that holds NaN: what the others do and what the user reads."""

from __future__ import annotations

import os
import re
import signal
import socket
import sys
import time

import pytest

from lasgd.training.run_folder import has_checkpoint, read_run
from training_runs import Command, Ranks, finished, running, wait_cut

pytestmark = [pytest.mark.processes, pytest.mark.timeout(180)]

SLOW = (
    "--model",
    "cnn4",
    "--samples",
    "20000",
    "--checkpoints",
    "40",
    "--condition",
    "step=20ms",
    "--evaluations",
    "0",
)
QUICK = ("--model", "cnn4", "--samples", "2000", "--evaluations", "2", "--checkpoints", "0", "--workers", "0")
in_proc = pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="looks for processes in /proc")


@in_proc
def test_a_rank_that_is_killed_ends_the_run_at_once_and_the_run_can_go_on(tmp_path):
    out = tmp_path / "run"
    with running(Command("--ranks", "2", *SLOW, "--out", "run", cwd=tmp_path)) as command:
        wait_cut(out, 2, 2)
        os.kill(command.rank(1), signal.SIGKILL)
        killed_s = time.monotonic()
        assert command.wait() == 1
        assert time.monotonic() - killed_s < 20
        command.wait_gone()
    assert "Traceback" not in command.out + command.err
    first, *others = command.err.splitlines()
    assert first.startswith("lasgd: rank 1 of 2 was killed by SIGKILL; the other ranks were ended.")
    assert others[-1] == "lasgd: The newest checkpoint is kept; go on with: lasgd train --resume run"
    record = read_run(out)
    assert record.status == "failed"
    assert "rank 1" in (record.error or "")
    with running(Ranks("--resume", "run", cwd=tmp_path)) as ranks:
        wait_cut(out, 2, 12)  # it goes on, past where it was
        ranks.signal(0, signal.SIGINT)
        assert ranks.wait() == [130, 130], ranks.said(0) + ranks.said(1)
    assert read_run(out).status == "interrupted"


@in_proc
def test_under_torchrun_a_signal_ends_the_run_cleanly_and_it_can_go_on(tmp_path):
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "lasgd")
    out = tmp_path / "run"
    with running(Command("train", *SLOW, "--out", "run", cwd=tmp_path, launcher=launcher)) as command:
        wait_cut(out, 2)
        command.signal(signal.SIGTERM)  # torchrun hands it to everything that its ranks have started
        command.wait()
        command.wait_gone()
    record = read_run(out)
    assert record.status == "interrupted"
    assert record.link_emulation == "none"
    assert has_checkpoint(out, 2)
    assert "go on with" in command.err
    assert "DataLoader" not in command.out + command.err


def test_a_rank_that_never_starts_is_named_after_the_time_out(tmp_path):
    with running(Ranks(*QUICK, "--out", "run", "--start-timeout-s", "2", cwd=tmp_path, started=[0])) as ranks:
        assert ranks.wait() == [1]
        assert re.search(r"nothing from rank 1 after 2(\.\d+)? s", ranks.said(0))
        assert "Traceback" not in ranks.said(0)
    # What the failed start has left does not stand in the way of the next one.
    with running(Ranks(*QUICK, "--out", "run", cwd=tmp_path)) as ranks:
        assert ranks.wait() == [0, 0], ranks.said(0) + ranks.said(1)
    finished(tmp_path / "run")


def test_a_port_in_use_is_named(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with running(Ranks(*QUICK, "--out", "run", cwd=tmp_path, started=[0], port=port)) as ranks:
            assert ranks.wait() == [2]
    assert f"port {port} on 127.0.0.1 is in use by another program" in ranks.said(0)
    assert "Traceback" not in ranks.said(0)


def test_ranks_started_with_different_settings_all_say_which_and_where(tmp_path):
    own = {2: ("--momentum", "0.8")}
    with running(Ranks(*QUICK, "--out", "run", cwd=tmp_path, world_size=3, own_options=own)) as ranks:
        assert ranks.wait() == [2, 2, 2]
    for rank in range(3):
        assert "ranks disagree on momentum: rank 0 has 0.9, rank 2 has 0.8" in ranks.said(rank)
        assert "Traceback" not in ranks.said(rank)


MODELS = '''
import os
import torch
from torch import nn


class Net(nn.Sequential):
    """A model of one's own, in the current folder."""

    def __init__(self, num_classes, width=32):
        super().__init__(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, num_classes))


def uneven(num_classes):
    return Net(num_classes, width=32 + int(os.environ["RANK"]))


class Sick(Net):
    """On the ranks in SICK its weights turn NaN with the 20th training batch, and with every later one in INCURABLE.

    With FACTOR given they are multiplied by it instead.
    """

    def __init__(self, num_classes):
        super().__init__(num_classes)
        self.batches = 0

    def forward(self, images):
        self.batches += self.training
        falls_ill = self.batches == 20 or ("INCURABLE" in os.environ and self.batches > 20)
        if self.training and falls_ill and os.environ["RANK"] in os.environ["SICK"]:
            with torch.no_grad():
                self[1].weight.mul_(float(os.environ.get("FACTOR", "nan")))
        return super().forward(images)
'''


@pytest.fixture
def models(tmp_path):
    (tmp_path / "my_models.py").write_text(MODELS)
    return tmp_path


def test_a_model_that_differs_between_ranks_is_refused_with_the_rank_and_the_parameter(models):
    options = ("--model", "my_models:uneven", *QUICK[2:], "--out", "run")
    with running(Ranks(*options, cwd=models)) as ranks:
        assert ranks.wait() == [2, 2]
    for rank in range(2):
        said = ranks.said(rank)
        assert "ranks disagree on the model: rank 0 has 2,410 elements, rank 1 has 2,485." in said
        assert "'1.weight' float32 (32, 64) on rank 0, '1.weight' float32 (33, 64) on rank 1" in said
        assert "Traceback" not in said


SICK = ("--model", "my_models:Sick", "--samples", "6000", *QUICK[4:], "--condition", "step=5ms", "--out", "run")


def test_nan_on_one_rank_is_reported_and_the_run_finishes(models):
    with running(Ranks(*SICK, cwd=models, SICK="1")) as ranks:
        assert ranks.wait() == [0, 0], ranks.said(0) + ranks.said(1)
    record = finished(models / "run")
    assert {event.rank for event in record.health} == {1}
    assert "rank 1 held NaN or Inf at round" in ranks.said(0)
    assert record.final is not None
    assert record.final.top1 is not None
    assert record.final.top1 > 0.5


def test_a_rank_that_runs_away_is_reported_and_the_run_finishes(models):
    with running(Ranks(*SICK, "--fragments", "4", cwd=models, SICK="1", FACTOR="10000")) as ranks:
        assert ranks.wait() == [0, 0], ranks.said(0) + ranks.said(1)
    record = finished(models / "run")
    assert {(event.rank, event.found) for event in record.health} == {(1, "ran_away")}
    assert "rank 1 ran away from the mean at round" in ranks.said(0)
    assert record.final is not None
    assert record.final.top1 is not None
    assert record.final.top1 > 0.5


def test_nan_on_all_ranks_ends_the_run_with_the_round_and_no_traceback(models):
    with running(Ranks(*SICK, cwd=models, SICK="0,1", INCURABLE="yes")) as ranks:
        assert ranks.wait() == [1, 1]
    for rank in range(2):
        assert "every rank holds NaN or Inf" in ranks.said(rank)
        assert f"rank {rank} of 2: round " in ranks.said(rank)
        assert "Traceback" not in ranks.said(rank)
