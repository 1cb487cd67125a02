"""The engine: what runs when, what is repeated, and what a failed run does to the others. Nothing is started here."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import lasgd.lab.compare.engine as engine
from compare_folders import plan, write_run_folder
from lasgd.errors import ConfigurationError, LasgdError
from lasgd.lab.compare.engine import Comparison, Outcome, locked
from lasgd.lab.compare.entry import Entry
from lasgd.lab.compare.figures import LOG
from lasgd.lab.compare.plan import Cell, Plan
from lasgd.lab.compare.progress import Progress


class Runs:
    """Stands in for child processes: each writes the run folder that `how` says, by entry, condition, seed and lr."""

    def __init__(self) -> None:
        self.started: list[str] = []
        self.how: Callable[[str, Any], dict[str, Any] | int] = lambda name, settings: {}
        self.interrupt_at: int | None = None

    def run_child(self, argv: Sequence[str], log: Path, interrupts: Any, *_: Any) -> int:
        name, settings, folder = argv
        self.started.append(name)
        if self.interrupt_at == len(self.started):
            interrupts.count += 1
            return 130
        how = self.how(name, settings)
        if isinstance(how, int):
            log.write_text("what it said last\n")
            return how
        write_run_folder(Path(folder), Cell(Entry("x", settings.algorithm), settings.condition, settings.seed), **how)
        return 0 if how.get("status", "finished") == "finished" else 1

    def entry(self, label: str, **own: Any) -> Entry:
        def command(settings: Any, folder: Path) -> list[Any]:
            lr = f" lr {settings.lr:g}" if "lr" in settings.model_fields_set else ""
            return [f"{label} {settings.condition} {settings.seed}{lr}", settings, str(folder)]

        return Entry(label, label, own, command)


class Quiet(Progress):
    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def say(self, text: str, style: str = "") -> None:
        self.said.append(text)


@pytest.fixture
def runs(monkeypatch):
    runs = Runs()
    monkeypatch.setattr(engine, "run_child", runs.run_child)
    monkeypatch.setattr("lasgd.lab.compare.entry.simulate", lambda s, f: [f"virtual lr {s.lr:g}", s, str(f)])
    return runs


def compared(runs: Runs, out: Path, labels: str = "a,independent", **changes: Any) -> Outcome:
    return Comparison(asked(runs, labels, **changes), out, Quiet()).run()


def asked(runs: Runs, labels: str = "a,independent", **changes: Any) -> Plan:
    return replace(plan(labels, **changes), entries=tuple(map(runs.entry, labels.split(","))))


def test_runs_take_turns_seed_by_seed_and_condition_by_condition(runs, tmp_path):
    compared(runs, tmp_path, "a,independent", conditions=("fast", "slow"), seeds=(0, 1))
    assert runs.started == [
        *("a fast 0", "independent fast 0", "a slow 0", "independent slow 0"),
        *("independent fast 1", "a fast 1", "independent slow 1", "a slow 1"),
    ]


def test_called_again_it_repeats_no_finished_run(runs, tmp_path):
    compared(runs, tmp_path)
    before = (tmp_path / "runs/fast/a/seed-0/run.json").stat().st_mtime_ns
    outcome = compared(runs, tmp_path)
    assert len(runs.started) == 2
    assert (tmp_path / "runs/fast/a/seed-0/run.json").stat().st_mtime_ns == before
    assert not outcome.failed


def test_a_failed_run_does_not_end_the_others_and_says_why(runs, tmp_path):
    runs.how = lambda name, settings: {"status": "failed", "error": "it broke"} if name == "a fast 0" else {}
    outcome = compared(runs, tmp_path, seeds=(0, 1))
    assert len(runs.started) == 4
    [failed] = outcome.failed
    assert (failed["seed"], failed["status"], failed["error"]) == (0, "failed", "it broke")
    stored = json.loads((tmp_path / "results.json").read_text())
    assert stored["runs"][0]["error"] == "it broke"


def test_a_crash_that_leaves_nothing_is_a_failed_run(runs, tmp_path):
    runs.how = lambda name, settings: -11 if name == "a fast 0" else {}
    [failed] = compared(runs, tmp_path).failed
    assert failed["error"] == "exit code -11: what it said last"


def test_a_command_that_cannot_be_started_is_a_failed_run(runs, tmp_path, monkeypatch):
    def refuse(argv, *rest):
        if argv[0].startswith("a "):
            raise LasgdError("nothing there to start")
        return runs.run_child(argv, *rest)

    monkeypatch.setattr(engine, "run_child", refuse)
    [failed] = compared(runs, tmp_path).failed
    assert failed["error"] == "nothing there to start"


def test_a_failed_run_is_tried_again_in_a_new_folder(runs, tmp_path):
    runs.how = lambda name, settings: {"status": "failed", "error": "it broke"} if name == "a fast 0" else {}
    compared(runs, tmp_path)
    (tmp_path / "runs/fast/a/seed-0/left-over").write_text("of the first attempt")
    runs.how = lambda name, settings: {}
    assert not compared(runs, tmp_path).failed
    assert runs.started == ["a fast 0", "independent fast 0", "a fast 0"]
    assert not (tmp_path / "runs/fast/a/seed-0/left-over").exists()


def test_a_run_that_fails_is_tried_once_a_call(runs, tmp_path):
    runs.how = lambda name, settings: 1
    compared(runs, tmp_path, seeds=(0,), lr_grid=(0.1, 0.2))
    assert len(runs.started) == len(set(runs.started)) == 3


def test_an_interrupt_starts_no_further_run_and_results_are_written(runs, tmp_path):
    runs.interrupt_at = 2
    outcome = compared(runs, tmp_path, seeds=(0, 1))
    assert outcome.interrupted and len(runs.started) == 2
    statuses = [run["status"] for run in json.loads((tmp_path / "results.json").read_text())["runs"]]
    assert statuses == ["finished", "missing", "interrupted", "missing"]


def test_an_interrupted_comparison_goes_on_where_it_was(runs, tmp_path):
    runs.interrupt_at = 2
    compared(runs, tmp_path, seeds=(0, 1))
    outcome = compared(runs, tmp_path, seeds=(0, 1))
    assert not outcome.interrupted and not outcome.failed
    assert runs.started == ["a fast 0", "independent fast 0", *["independent fast 0", "independent fast 1", "a fast 1"]]


def test_seeds_conditions_and_entries_may_be_added(runs, tmp_path):
    compared(runs, tmp_path)
    outcome = compared(runs, tmp_path, "a,b,independent", conditions=("slow",), seeds=(3,), tuning_seed=3)
    cells = {(run["algorithm"], run["condition"], run["seed"]) for run in outcome.results["runs"]}
    first = {("a", "fast", 0), ("independent", "fast", 0)}
    assert cells == first | {(label, "slow", 3) for label in ("a", "b", "independent")}
    assert len(runs.started) == 5


def test_the_best_rate_of_the_grid_is_used_for_all_seeds(runs, tmp_path):
    runs.how = lambda name, settings: {"loss": abs(settings.lr - 0.2) + 0.1}
    outcome = compared(runs, tmp_path, seeds=(0, 1), lr_grid=(0.1, 0.2, 0.4))
    assert runs.started == [
        *("a fast 0 lr 0.1", "independent fast 0", "a fast 0 lr 0.2", "a fast 0 lr 0.4"),
        *("independent fast 1", "a fast 1 lr 0.2"),
    ]
    assert {(run["seed"], run["lr"]) for run in outcome.results["runs"] if run["algorithm"] == "a"} == {
        *((0, 0.2), (1, 0.2))
    }


def test_each_condition_chooses_for_itself(runs, tmp_path):
    runs.how = lambda name, settings: {"loss": settings.lr if settings.condition == "fast" else 1 - settings.lr}
    outcome = compared(runs, tmp_path, conditions=("fast", "slow"), lr_grid=(0.1, 0.2))
    chosen = {run["condition"]: run["lr"] for run in outcome.results["runs"] if run["algorithm"] == "a"}
    assert chosen == {"fast": 0.1, "slow": 0.2}


def test_a_rate_from_elsewhere_is_used_without_trying(runs, tmp_path):
    once = replace(runs.entry("once"), is_tuned_once=True)
    same = replace(runs.entry("same"), tuned_as="once")
    runs.how = lambda name, settings: {"loss": abs(settings.lr - 0.2) + 0.1}
    entries = (same, once, runs.entry("independent"))
    wanted = replace(plan("a", conditions=("fast", "slow"), lr_grid=(0.1, 0.2)), entries=entries)
    outcome = Comparison(wanted, tmp_path / "out", Quiet()).run()
    assert sorted(runs.started) == [
        *("independent fast 0", "independent slow 0", "once fast 0 lr 0.1", "once fast 0 lr 0.2"),
        *("once slow 0 lr 0.2", "same fast 0 lr 0.2", "same slow 0 lr 0.2"),
    ]
    assert not outcome.failed
    assert {run["lr"] for run in outcome.results["runs"] if run["algorithm"] != "independent"} == {0.2}


def test_a_trial_that_failed_is_not_tried_again_once_the_choice_is_made(runs, tmp_path):
    runs.how = lambda name, settings: {"status": "failed", "error": "NaN"} if name.endswith("lr 0.4") else {}
    compared(runs, tmp_path, lr_grid=(0.1, 0.4))
    before = list(runs.started)
    assert not compared(runs, tmp_path, lr_grid=(0.1, 0.4)).failed
    assert runs.started == before


def test_a_grid_that_failed_altogether_fails_the_entry_and_is_tried_again(runs, tmp_path):
    runs.how = lambda name, settings: {"status": "failed", "error": "NaN"} if name.startswith("a ") else {}
    outcome = compared(runs, tmp_path, seeds=(0, 1), lr_grid=(0.1, 0.4))
    assert [run["algorithm"] for run in outcome.failed] == ["a", "a"]
    assert "independent fast 1" in runs.started
    runs.how = lambda name, settings: {}
    assert not compared(runs, tmp_path, seeds=(0, 1), lr_grid=(0.1, 0.4)).failed


def test_tuned_in_virtual_time_the_first_seed_still_runs(runs, tmp_path):
    evaluations = {}

    def how(name: str, settings: Any) -> dict[str, Any]:
        evaluations[name] = settings.evaluations
        return {"loss": settings.lr}

    runs.how = how
    compared(runs, tmp_path, lr_grid=(0.1, 0.2), tune="virtual")
    assert (evaluations["virtual lr 0.1"], evaluations["a fast 0 lr 0.1"]) == (1, 4), "a trial is for its final loss"
    assert runs.started == ["virtual lr 0.1", "virtual lr 0.2", "a fast 0 lr 0.1", "independent fast 0"]


@pytest.mark.parametrize("trial", [3, 4])  # of four, the yardstick among them
def test_an_interrupt_in_the_grid_chooses_nothing(runs, tmp_path, trial):
    runs.interrupt_at = trial
    compared(runs, tmp_path, lr_grid=(0.1, 0.2, 0.4))
    assert json.loads((tmp_path / "compare.json").read_text())["chosen"] == {}


def test_what_is_left_counts_each_run_once(runs, tmp_path):
    comparison = Comparison(asked(runs, "a,independent", seeds=(0, 1), lr_grid=(0.1, 0.2)), tmp_path, Quiet())
    left = [(cell.entry.label, cell.seed, cell.lr) for cell in comparison._left()]
    assert sorted(left, key=str) == sorted(
        [("a", 0, 0.1), ("a", 0, 0.2), ("a", 1, None), ("independent", 0, None), ("independent", 1, None)], key=str
    )


def test_a_folder_of_somebody_else_is_left_alone(runs, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigurationError, match="is not empty and holds no comparison"):
        compared(runs, tmp_path)
    assert os.listdir(tmp_path) == ["thesis.txt"]


def test_two_comparisons_do_not_work_in_one_folder(runs, tmp_path):
    with locked(tmp_path), pytest.raises(ConfigurationError, match="is at work in"):
        compared(runs, tmp_path)
    assert runs.started == []
    compared(runs, tmp_path)


def test_a_run_gets_a_folder_with_nothing_but_its_log(runs, tmp_path, monkeypatch):
    def look(argv, log, *rest):
        assert [path.name for path in Path(argv[2]).iterdir()] == [LOG.parts[0]]
        return runs.run_child(argv, log, *rest)

    monkeypatch.setattr(engine, "run_child", look)
    assert not compared(runs, tmp_path).failed
