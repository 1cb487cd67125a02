"""What benchmarks/learning.py runs can be run, and what it makes of the outcome."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from lasgd.algorithms import registry
from lasgd.lab import conditions
from lasgd.training.settings import SimulationSettings

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def benchmarks_importable(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield
    for name in ("candidates", "common", "learning"):
        sys.modules.pop(name, None)


def test_every_candidate_is_a_run_that_lasgd_takes(monkeypatch):
    import candidates
    from learning import CANDIDATES, SCREEN

    monkeypatch.setattr(registry, "_ALGORITHMS", dict(registry._ALGORITHMS))
    candidates.register()
    for options in CANDIDATES.values():
        settings = SimulationSettings.model_validate({"condition": SCREEN.condition, **options})
        algorithm = registry.find(settings.algorithm, settings.algorithm_settings())
        algorithm.check_wire(settings.wire)
        algorithm.check_momentum(settings.optimizer_momentum)


def test_cells_say_how_long_a_step_and_a_round_take():
    from learning import PARTS, Cell

    assert all(conditions.parse(cell.condition).step_s == 0.1 for cells in PARTS.values() for cell in cells)
    slow = conditions.parse(Cell(delay=20, straggler="last:4x").condition)
    assert slow.round_s == pytest.approx(2.0)
    assert slow.step_s == 0.1


def test_no_two_trials_share_a_folder():
    from learning import CANDIDATES, GRID, PARTS, Trial

    cells = dict.fromkeys(cell for cells in PARTS.values() for cell in cells)
    trials = [Trial(cell, label, lr, seed) for cell in cells for label in CANDIDATES for lr in GRID for seed in (0, 1)]
    assert len({trial.folder(Path("runs")) for trial in trials}) == len(trials)


def test_bars_are_differences_of_means_and_unknown_where_a_run_failed():
    from learning import DEFAULT, SCREEN, bars

    def of(candidate, *top1):
        return {"cell": asdict(SCREEN), "candidate": candidate, "top1": list(top1)}

    made = bars([of(DEFAULT, 0.49, 0.5), of("local, H = 10", 0.45, 0.45), of("synchronous", 0.5, None)])
    assert made[0].value == pytest.approx(4.5)
    assert made[2].value is None


@pytest.mark.processes
@pytest.mark.timeout(90)
def test_a_record_tells_of_real_runs_and_finds_them_again(monkeypatch, tmp_path, capsys):
    import learning

    monkeypatch.setattr(learning, "GRID", (0.05,))
    cell = learning.Cell(delay=2.0, samples=1280)
    (made,) = learning.study((cell,), ("full, 2 fragments",), (0,), Path("digits"), tmp_path)
    assert (made["lr"], made["fragments"]) == (0.05, 2)
    assert 1 < made["staleness_steps"] < 3
    assert made["top1"][0] > 0.1
    assert "top-1" in capsys.readouterr().out
    assert learning.study((cell,), ("full, 2 fragments",), (0,), Path("digits"), tmp_path) == [made]
    assert capsys.readouterr().out == ""
