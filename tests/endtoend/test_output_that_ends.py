"""`lasgd train` when nobody takes its output: piped into a command that ends, or started without any."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from lasgd.training.run_folder import read_run

pytestmark = [pytest.mark.processes, pytest.mark.timeout(180)]

TRAIN = (sys.executable, "-m", "lasgd", "train", "--ranks", "2", "--model", "cnn4", "--samples", "600")
QUICK = ("--evaluations", "1", "--checkpoints", "0", "--workers", "0", "--out", "run")


def test_a_pipe_that_ends_does_not_end_the_run(tmp_path):
    """Neither one of both streams, as in `2>&1 | head -1`."""
    reading, writing = os.pipe()
    with subprocess.Popen([*TRAIN, *QUICK], cwd=tmp_path, stdout=writing, stderr=writing) as training:
        os.close(writing)
        with os.fdopen(reading, "rb") as output:
            assert output.readline().startswith(b"training cnn4")
        assert training.wait(150) == 0
    record = read_run(tmp_path / "run")
    assert record.status == "finished"
    assert [note for note in record.notes if "Broken pipe" in note]


def test_a_run_needs_no_standard_streams(tmp_path):
    command = f"exec {' '.join((*TRAIN, *QUICK))} <&- >&- 2>&-"
    assert subprocess.run(["sh", "-c", command], cwd=tmp_path, timeout=150).returncode == 0
    assert read_run(tmp_path / "run").status == "finished"
