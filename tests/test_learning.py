"""What benchmarks/learning.py runs can be run, and what it makes of the outcome."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
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
    ours = ("candidate", "common", "drawing", "learning")
    for name in [name for name in sys.modules if name.startswith(ours)]:
        sys.modules.pop(name)


def test_every_candidate_is_a_run_that_lasgd_takes(monkeypatch):
    import candidates
    from learning_trials import CANDIDATES, SCREEN

    monkeypatch.setattr(registry, "_ALGORITHMS", dict(registry._ALGORITHMS))
    candidates.register()
    for options in CANDIDATES.values():
        options = {name: value for name, value in options.items() if name != "bytes"}
        settings = SimulationSettings.model_validate({"condition": SCREEN.condition, **options})
        algorithm = registry.find(settings.algorithm, settings.algorithm_settings())
        algorithm.check_wire(settings.wire)
        algorithm.check_momentum(settings.optimizer_momentum)


def test_cells_say_how_long_a_step_and_a_round_take():
    from learning_trials import PARTS, Cell

    assert all(conditions.parse(cell.condition).step_s == 0.1 for cells in PARTS.values() for cell in cells)
    slow = conditions.parse(Cell(delay=20, straggler="last:4x").condition)
    assert slow.round_s == pytest.approx(2.0)
    assert slow.step_s == 0.1


def test_no_two_runs_share_a_key_and_no_two_candidates_do_the_same():
    from learning_trials import CANDIDATES, PARTS, Trial

    cells = dict.fromkeys(cell for cells in PARTS.values() for cell in cells)
    trials = [Trial(cell, label, lr, s) for cell in cells for label in CANDIDATES for lr in (0.1, 0.2) for s in (0, 1)]
    assert len({trial.key for trial in trials}) == len({(t.cell_run, t.label, t.lr, t.seed) for t in trials})


@pytest.mark.parametrize("label, waits", [("synchronous", True), ("local, H = 10", True), ("full", False)])
def test_one_run_of_those_who_wait_stands_for_every_delay_and_straggler(label, waits):
    from learning_trials import Cell, Trial

    def command(cell):
        return Trial(cell, label, 0.05, 0).command(Path("digits"), Path("out"))

    assert (command(Cell(delay=20, straggler="last:4x")) == command(Cell(delay=5))) is waits
    assert command(Cell(ranks=8)) != command(Cell(ranks=4))


def test_who_sends_twice_the_bytes_waits_twice_as_long_for_them():
    from learning_trials import SCREEN, Trial

    command = Trial(SCREEN, "momentum averaged", 0.05, 0).command(Path("digits"), Path("out"))
    assert "step=100ms+round=2s" in command and "--bytes" not in command


def known(*rows):
    """A study that knows rows of (cell, label, learning rate, seed, top-1 or None where it diverged)."""
    from learning import Study
    from learning_trials import Outcome, Trial

    trials = [
        (Trial(cell, label, lr, seed), Outcome(top1, None if top1 is None else -top1))
        for cell, label, lr, seed, top1 in rows
    ]
    return Study({trial.key: (trial, outcome) for trial, outcome in trials})


@pytest.mark.parametrize(
    "tried, missing",
    [
        ({}, [0.025, 0.05]),
        ({0.025: 0.4, 0.05: 0.5}, [0.1]),
        ({0.025: 0.4, 0.05: 0.5, 0.1: 0.3}, []),
        ({0.025: 0.5, 0.05: None}, [0.0125]),
        ({0.025: None, 0.05: None}, [0.0125]),
        ({0.0125: 0.5, 0.025: 0.4, 0.05: 0.3}, [0.00625]),
        ({0.05 / 2**k: None for k in range(8)}, []),  # it diverges with all
    ],
)
def test_learning_rates_are_tried_until_those_beside_the_best_are_worse(tried, missing):
    from learning_trials import SCREEN

    assert known(*((SCREEN, "full", lr, 0, top1) for lr, top1 in tried.items())).to_tune(SCREEN, "full") == missing


def test_bars_are_differences_over_the_seeds_that_both_were_run_with():
    from learning import bars
    from learning_trials import DEFAULT, SCREEN

    rows = [(SCREEN, DEFAULT, 0.05, 0, 0.49), (SCREEN, DEFAULT, 0.05, 1, 0.5), (SCREEN, DEFAULT, 0.1, 1, 0.9)]
    rows += [(SCREEN, "local, H = 10", 0.05, seed, 0.45) for seed in (0, 1, 2)]
    made = bars(known(*rows))
    assert made[0].value == pytest.approx(4.5)
    assert made[0].among == pytest.approx((4, 5))
    assert made[1].value is None and made[2].value is None


def test_untuned_is_judged_at_the_rate_that_synchronous_sgd_chooses():
    from learning import bars
    from learning_trials import DEFAULT, DIGITS, FAR

    def verdict(cell, ours):
        rows = [(cell, "synchronous", 0.1, 0, 0.9), (cell, "synchronous", 0.05, 0, 0.7)]
        study = known(*rows, (cell, DEFAULT, 0.1, 0, ours), (cell, DEFAULT, 0.05, 0, 0.95))
        (found,) = [bar for bar in bars(study) if bar.value is not None]
        return found

    assert verdict(DIGITS, 0.89).value == pytest.approx(-1.0)
    assert verdict(DIGITS, 0.89).holds and not verdict(DIGITS, 0.8).holds
    assert verdict(FAR, 0.6).holds and not verdict(FAR, 0.1).holds
    assert not verdict(FAR, None).holds, "diverged"


def test_what_is_stored_is_known_again_by_what_a_candidate_does(monkeypatch):
    import learning_trials
    from learning_trials import DEFAULT, SCREEN, restored, stored

    study = known((SCREEN, DEFAULT, 0.05, 0, 0.49), (SCREEN, "synchronous", 0.05, 0, None))
    rows = stored(study.trials)
    assert restored(rows) == {trial.key: (replace(trial, cell=trial.cell_run), o) for trial, o in study.trials.values()}
    candidates = {"another name": learning_trials.CANDIDATES[DEFAULT], "synchronous": {"algorithm": "gossip"}}
    monkeypatch.setattr(learning_trials, "CANDIDATES", candidates)
    ((trial, _),) = restored(rows).values()
    assert trial.label == "another name"


def test_those_who_wait_stand_in_the_table_of_every_cell_that_others_were_put_through():
    from learning_trials import DEFAULT, LONG, SCREEN

    rows = [(SCREEN, "synchronous", 0.05, 0, 0.5), (SCREEN, DEFAULT, 0.05, 0, 0.45), (LONG, "synchronous", 0.1, 0, 0.8)]
    found = [(record["name"], record["candidate"]) for record in known(*rows).records()]
    assert found == [(SCREEN.name, "synchronous"), (SCREEN.name, DEFAULT)]


def test_the_pictures_show_what_is_stored():
    import learning_figure
    from drawing import mark

    records = json.loads((BENCHMARKS / "results" / "learning.json").read_text(encoding="utf-8"))["figures"]["records"]
    screen, delay = learning_figure.of_screen(records), learning_figure.of_delay(records)
    assert set(delay) <= set(screen) and len(screen) > 3
    assert mark(screen) in learning_figure.BY_CANDIDATE.read_text(encoding="utf-8"), "draw again"
    assert mark(delay) in learning_figure.BY_DELAY.read_text(encoding="utf-8"), "draw again"


def test_the_default_is_also_tried_with_the_rate_of_synchronous_sgd(monkeypatch):
    import learning
    from learning_trials import DEFAULT, SCREEN, Outcome

    def top1(trial):
        return trial.lr if trial.label == "synchronous" and trial.lr < 0.3 else 0.1 / (1 + 100 * trial.lr)

    asked = []

    def run_all(trials, data, commit):
        for trial in trials:
            asked.append((trial.label, trial.lr, trial.seed))
            yield trial, Outcome(top1(trial), -top1(trial))

    monkeypatch.setattr(learning, "run_all", run_all)
    study = learning.Study({})
    for _ in study.run((SCREEN,), ["synchronous", DEFAULT], (0, 1), Path("digits"), "commit"):
        pass
    assert study.best(SCREEN, "synchronous") == 0.2
    assert (DEFAULT, 0.2, 0) in asked and (DEFAULT, 0.1, 0) not in asked
    assert len(set(asked)) == len(asked)
    assert ("synchronous", 0.2, 1) in asked and study.untuned(SCREEN)[0].top1 == pytest.approx(0.1 / 21)


def test_another_data_set_than_the_cells_is_refused_before_anything_runs(monkeypatch, capsys):
    import learning

    monkeypatch.setattr(learning, "run_all", lambda *_: pytest.fail("runs"))
    for data, said in (("digits", "digits: expected cifar10, which has 10 classes and images of 32"), ("no", "'no'")):
        with pytest.raises(SystemExit):
            learning.main(["screen", "--data", data])
        assert said in capsys.readouterr().err


@pytest.mark.processes
@pytest.mark.timeout(180)
def test_a_study_stores_what_real_runs_tell_and_goes_on_from_there(monkeypatch, tmp_path, capsys):
    import learning
    from learning_trials import Cell

    monkeypatch.setattr(learning.Study, "to_tune", lambda self, *pair: [] if self.tried(*pair) else [0.05])
    monkeypatch.setitem(learning.PARTS, "digits", (Cell(data="digits", delay=2.0, samples=1280),))
    asked = ["digits", "--data", "digits", "--candidates", "full, 2 fragments", "--seeds", "0"]
    asked += ["--out", str(tmp_path / "learning.json")]
    assert learning.main(asked) == 0
    assert "1 of 1" in capsys.readouterr().out
    stored = json.loads((tmp_path / "learning.json").read_text())["figures"]
    (trial,), (record,) = stored["trials"], stored["records"]
    assert (trial["lr"], trial["fragments"]) == (0.05, 2)
    assert 1 < trial["staleness_steps"] < 3
    assert record["top1"] == {"0": pytest.approx(100 * trial["top1"])} and trial["top1"] > 0.1
    assert learning.main(asked) == 0
    assert "1 of 1" not in capsys.readouterr().out, "run again"
    assert learning.main([*asked, "--again"]) == 0
    assert "1 of 1" in capsys.readouterr().out
