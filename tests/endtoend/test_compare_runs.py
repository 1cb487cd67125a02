"""`lasgd compare` with real runs: two entries, one condition, one seed; and a Ctrl-C in the middle."""

from __future__ import annotations

import signal
import sys

import pytest

from lasgd.training.run_folder import read_json
from training_runs import Command, running, wait_until

OPTIONS = (
    *(
        "--algorithms",
        "lasgd,independent",
        "--ranks",
        "2",
        "--samples",
        "1200",
        "--model",
        "cnn4",
        "--batch-size",
        "16",
    ),
    *("--condition", "step=5ms", "--evaluations", "3", "--workers", "0", "--out", "compared"),
)
LAUNCHER = (sys.executable, "-m", "lasgd", "compare")


@pytest.mark.processes
@pytest.mark.timeout(300)
def test_two_algorithms_are_compared_interrupted_and_gone_on_with(tmp_path):
    out = tmp_path / "compared"
    with running(Command(*OPTIONS, cwd=tmp_path, launcher=LAUNCHER, OMP_NUM_THREADS="1")) as command:
        second = out / "runs" / "step=5ms" / "independent" / "seed-0"
        wait_until(lambda: (second / "settings.json").exists(), "the second run starts")
        command.signal(signal.SIGINT)
        assert command.wait() == 130
        assert "go on with: lasgd compare --algorithms lasgd,independent" in command.err
        command.wait_gone()
    statuses = {run["algorithm"]: run["status"] for run in read_json(out / "results.json")["runs"]}
    assert statuses == {"lasgd": "finished", "independent": "interrupted"}
    assert (out / "report.html").exists()
    first = (out / "runs" / "step=5ms" / "lasgd" / "seed-0" / "run.json").stat().st_mtime_ns

    with running(Command(*OPTIONS, cwd=tmp_path, launcher=LAUNCHER, OMP_NUM_THREADS="1")) as command:
        assert command.wait(150) == 0, command.err
    results = read_json(out / "results.json")
    for run in results["runs"]:
        assert run["status"] == "finished", run["error"]
        assert run["replicas_identical"] is (run["algorithm"] == "lasgd")
        assert run["retention"] > 0 and 0 < run["final_top1"] <= 1 and run["samples"] >= 1200
    assert results["target"]["top1"]["step=5ms"] == pytest.approx(
        0.95 * next(run["final_top1"] for run in results["runs"] if run["algorithm"] == "lasgd")
    )
    assert (out / "runs" / "step=5ms" / "lasgd" / "seed-0" / "run.json").stat().st_mtime_ns == first
    page = (out / "report.html").read_text()
    assert page.count('<svg class="strip"') == 2
