"""benchmarks/runaway.py notes what the ranks' watches have seen, in every run that it starts."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest

import lasgd.replica
from lasgd.health import DriftWatch

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def benchmarks_importable(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(lasgd.replica, "DriftWatch", DriftWatch)  # put back, whatever a run puts in its place
    yield
    for name in ("runaway", "characters", "common"):
        sys.modules.pop(name, None)


def test_both_kinds_of_runs_are_watched():
    from runaway import Cell, Run, watched

    simulated = watched(Cell("digits", "fast", batch_size=8, samples=600))
    assert simulated.run == "digits, cnn4, batches of 8, fast"
    assert 0 < simulated.loss < 3
    trained = watched(Run("sgd", 0.1, "momentum shared out", "delay 1", 0, 1500))
    assert trained.run == "characters, sgd, delay 1, 1,500 samples, seed 0"
    for growth in (simulated, trained):
        assert 0 < growth.growth < math.inf
        assert growth.found == 0


def test_what_a_watch_finds_is_counted_and_does_not_count_as_growth():
    from runaway import Watches

    watch = Watches()
    for cycle, drift in enumerate([1.0, 1.0, 2.0, 1000.0]):
        watch.grew_too_much(0, drift, 10 * cycle)
    assert (watch.found, watch.largest_growth) == (1, 2.0)
    assert watch in Watches.made


def test_a_command_that_fails_says_why():
    from runaway import Cell, simulated

    with pytest.raises(RuntimeError, match="no_such_model"):
        simulated(Cell("digits", "fast", model="no_such_model"))


def test_the_table_has_a_line_for_every_run():
    from runaway import Growth, table

    well, saved, hurt = Growth("a", 0.5, 1.234, 0), Growth("b", 0.5, 2.0, 1, None), Growth("c", 0.52, 2.0, 3, 0.5)
    assert table([well, saved, hurt]).splitlines()[2:] == [
        "| a | 1.23 | 0 | 0.5000 |  |",
        "| b | 2.00 | 1 | 0.5000 | diverged |",
        "| c | 2.00 | 3 | 0.5200 | 0.5000 |",
    ]
    assert [each.is_worse for each in (well, saved, hurt)] == [False, False, True]
