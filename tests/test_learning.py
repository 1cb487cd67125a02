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
    runs = {(trial.cell_run, trial.label, trial.lr, trial.seed) for trial in trials}
    assert len({trial.folder(Path("runs")) for trial in trials}) == len(runs)


@pytest.mark.parametrize("label, waits", [("synchronous", True), ("local, H = 10", True), ("full", False)])
def test_one_run_of_those_who_wait_stands_for_every_delay_and_straggler(label, waits):
    from learning import Cell, Trial

    def command(cell):
        return Trial(cell, label, 0.05, 0).command(Path("digits"), Path("out"))

    assert (command(Cell(delay=20, straggler="last:4x")) == command(Cell(delay=5))) is waits
    assert command(Cell(ranks=8)) != command(Cell(ranks=4))


def test_bars_are_differences_of_means_and_unknown_where_a_run_failed():
    from learning import DEFAULT, SCREEN, bars

    def of(candidate, *top1):
        return {"cell": asdict(SCREEN), "candidate": candidate, "top1": list(top1), "lr": None, "grid": {}}

    made = bars([of(DEFAULT, 0.49, 0.5), of("local, H = 10", 0.45, 0.45), of("synchronous", 0.5, None)])
    assert made[0].value == pytest.approx(4.5)
    assert made[2].value is None


def test_untuned_is_judged_at_the_rate_that_synchronous_sgd_chooses():
    from learning import DEFAULT, DIGITS, FAR, bars

    def of(cell, candidate, lr, **grid):
        tried = {rate.replace("_", "."): final for rate, final in grid.items()}
        return {"cell": asdict(cell), "candidate": candidate, "lr": lr, "top1": [], "grid": tried}

    def verdicts(cell, ours, theirs=0.9):
        records = [
            of(cell, "synchronous", 0.1, **{"0_1": {"top1": theirs}, "0_05": {"top1": 0.7}}),
            of(cell, DEFAULT, 0.05, **{"0_1": ours, "0_05": {"top1": 0.95}}),
        ]
        return [bar for bar in bars(records) if bar.value is not None]

    (near,) = verdicts(DIGITS, {"top1": 0.89})
    assert near.value == pytest.approx(-1.0) and near.holds
    assert not verdicts(DIGITS, {"top1": 0.8})[0].holds
    assert verdicts(FAR, {"top1": 0.6})[0].holds
    assert not verdicts(FAR, None)[0].holds, "diverged"


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
