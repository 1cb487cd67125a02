"""Figures of run folders, targets, and results.json."""

from __future__ import annotations

import json
import math

import pytest

from compare_folders import plan, write_comparison, write_run_folder
from lasgd.lab.compare.entry import Entry, yardstick
from lasgd.lab.compare.figures import ENDED, LOG, crossing, figures, read_folder
from lasgd.lab.compare.plan import Cell
from lasgd.lab.compare.results import Folders, best, is_at_edge, results, trials

RISING = [
    {"wall_s": 1.0, "samples": 100, "top1": 0.2},
    {"wall_s": 3.0, "samples": 300, "top1": 0.6},
    {"wall_s": 4.0, "samples": 400, "top1": 0.5},
    {"wall_s": 6.0, "samples": 600, "top1": 0.9},
]
A, B = Entry("a", "a"), Entry("b", "b")


@pytest.mark.parametrize(
    ("target", "seconds", "samples"),
    [
        (0.4, 2.0, 200),  # half way from 0.2 to 0.6
        (0.6, 3.0, 300),
        (0.7, 5.0, 500),  # after the dip, half way from 0.5 to 0.9
        (0.55, 2.75, 275),  # the first time, not the second
        (0.1, 1.0, 100),  # nothing is known before the first evaluation
        (0.95, None, None),
    ],
)
def test_the_target_is_reached_between_two_evaluations(target, seconds, samples):
    assert crossing(RISING, target, "wall_s") == (None if seconds is None else pytest.approx(seconds))
    assert crossing(RISING, target, "samples") == (None if samples is None else pytest.approx(samples))


def test_an_evaluation_without_a_figure_is_passed_over():
    broken = [RISING[0], {"wall_s": 2.0, "samples": 200, "top1": None}, RISING[1]]
    assert crossing(broken, 0.4, "wall_s") == pytest.approx(2.0)


def test_a_level_curve_divides_by_nothing():
    level = [{"wall_s": 1.0, "samples": 1, "top1": 0.4}, {"wall_s": 2.0, "samples": 2, "top1": 0.5}]
    assert crossing(level, 0.5, "wall_s") == 2.0


def test_metrics_are_read_in_the_order_of_samples(tmp_path):
    write_run_folder(tmp_path, Cell(A, "fast", 0))
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))
    assert [line["samples"] for line in read_folder(tmp_path).metrics] == [250, 500, 750, 1000]


def test_a_simulated_run_is_judged_by_its_virtual_clock(tmp_path):
    write_run_folder(tmp_path, Cell(A, "fast", 0), virtual_s=99.0)
    (tmp_path / "metrics.jsonl").write_text('{"wall_s": 1, "virtual_s": 50, "samples": 5, "top1": 0.5}\n')
    found = read_folder(tmp_path)
    assert figures(found)["wall_s"] == 99.0
    assert crossing(found.metrics, 0.5, "wall_s") == 50


def test_steps_per_second_count_every_rank(tmp_path):
    write_run_folder(tmp_path, Cell(A, "fast", 0), wall_s=10.0)
    assert figures(read_folder(tmp_path))["steps_per_s"] == pytest.approx(2 * 50 / 10)


def test_time_that_no_step_accounts_for_counts_against_the_algorithm(tmp_path):
    rank = {"local_steps": 50, "compute_s": 5.0, "waited_s": 0.0, "bytes_sent": 0}
    ranks = [rank | {"rank": 0, "staleness_steps": {"mean": 0.0, "max": 0.0}}]
    write_run_folder(tmp_path, Cell(A, "fast", 0), wall_s=10.0, ranks=ranks)
    assert figures(read_folder(tmp_path))["steps_per_s"] == pytest.approx(50 / 10)


def test_independent_ranks_are_judged_by_their_own_time(tmp_path):
    ranks = [
        {"rank": 0, "local_steps": 50, "compute_s": 5.0},
        {"rank": 1, "local_steps": 50, "compute_s": 20.0},
    ]
    more = {"waited_s": 0.0, "staleness_steps": {"mean": 0.0, "max": 0.0}, "bytes_sent": 0}
    write_run_folder(tmp_path, Cell(yardstick(), "fast", 0), wall_s=5.0, ranks=[rank | more for rank in ranks])
    assert figures(read_folder(tmp_path))["steps_per_s"] == pytest.approx(50 / 5 + 50 / 20)


# A run folder in any state


def test_a_folder_that_is_not_there_is_a_run_that_is_missing(tmp_path):
    assert read_folder(tmp_path / "none").status == "missing"


def test_a_run_that_left_nothing_failed_with_the_last_line_it_printed(tmp_path):
    (tmp_path / LOG).parent.mkdir()
    (tmp_path / LOG).write_text("Traceback ...\nImportError: no module named peers\n\n")
    (tmp_path / ENDED).write_text('{"code": 1, "took_s": 2.5, "reason": null}')
    found = read_folder(tmp_path)
    assert (found.status, found.error) == ("failed", "exit code 1: ImportError: no module named peers")
    assert found.took_s == 2.5


def test_a_run_whose_end_nobody_saw_was_interrupted(tmp_path):
    (tmp_path / LOG).parent.mkdir()
    assert read_folder(tmp_path).status == "interrupted"


def test_a_run_ended_by_its_limit_failed_with_that_reason(tmp_path):
    write_run_folder(tmp_path, Cell(A, "fast", 0), status="interrupted")
    (tmp_path / ENDED).write_text('{"code": 130, "took_s": 9, "reason": "not over within --run-limit-s 5"}')
    found = read_folder(tmp_path)
    assert (found.status, found.error) == ("failed", "not over within --run-limit-s 5")


@pytest.mark.parametrize("text", ["", "[]", "{", '{"status": 3'])
def test_a_broken_run_json_is_a_failed_run(tmp_path, text):
    (tmp_path / LOG).parent.mkdir()
    (tmp_path / "run.json").write_text(text)
    found = read_folder(tmp_path)
    assert found.status == "failed" and "run.json" in (found.error or "")


def test_a_failed_run_has_no_figures_that_could_be_compared(tmp_path):
    write_run_folder(tmp_path, Cell(A, "fast", 0), status="failed", error="rank 1 was killed")
    known = figures(read_folder(tmp_path))
    assert known["error"] == "rank 1 was killed"
    assert [known[name] for name in ("steps_per_s", "final_top1", "wall_s", "waited_s")] == [None] * 4


# The target


def runs_of(asked, **of_label):
    return {
        cell: of_label.get(cell.entry.label, {})
        for condition in asked.conditions
        for seed in asked.seeds
        for cell in asked.cells(seed, condition)
    }


def test_the_default_target_is_a_share_of_the_references_mean_in_each_condition(tmp_path):
    asked = plan("a,b", conditions=("fast", "slow"), seeds=(0, 1), reference="b")
    how = runs_of(asked)
    for cell in how:
        top1 = 0.8 if cell.condition == "fast" else 0.6 if cell.seed == 0 else 0.4
        how[cell] = {"top1": (0.1, top1)}
    found = write_comparison(tmp_path, asked, how)
    assert found["target"]["top1"] == {"fast": pytest.approx(0.76), "slow": pytest.approx(0.475)}
    assert found["target"]["rule"] == "0.95 of the mean final top-1 of b under the same condition"


def test_a_given_target_is_the_same_everywhere(tmp_path):
    asked = plan("a,b", conditions=("fast", "slow"), target=0.7)
    found = write_comparison(tmp_path, asked, runs_of(asked))
    assert found["target"]["top1"] == {"fast": 0.7, "slow": 0.7}
    assert {run["seconds_to_target"] for run in found["runs"]} == {7.5}
    assert {run["samples_to_target"] for run in found["runs"]} == {750}


def test_without_a_finished_reference_there_is_no_target(tmp_path):
    asked = plan("a,b", reference="b")
    found = write_comparison(tmp_path, asked, runs_of(asked, b={"status": "failed", "error": "x"}))
    assert found["target"]["top1"] == {"fast": None}
    assert found["runs"][0]["seconds_to_target"] is None


# results.json


def test_every_run_that_was_asked_for_has_an_entry(tmp_path):
    asked = plan("a,b", conditions=("fast", "slow"), seeds=(0, 1))
    found = write_comparison(tmp_path, asked, {Cell(asked.entries[0], "fast", 0): {}})
    assert len(found["runs"]) == 8
    assert [run["status"] for run in found["runs"]].count("missing") == 7
    needed = {"algorithm", "condition", "seed", "status", "steps_per_s", "retention", "seconds_to_target"}
    assert needed | {"samples_to_target", "final_top1", "waited_s", "lr", "folder"} <= found["runs"][0].keys()


def test_retention_is_against_the_yardstick_of_the_same_condition_and_seed(tmp_path):
    asked = plan("a", seeds=(0, 1))
    how = runs_of(asked)
    for cell in how:
        how[cell] = {"wall_s": 5.0 if cell.entry.is_yardstick and cell.seed == 1 else 10.0}
    found = write_comparison(tmp_path, asked, how)
    assert [run["retention"] for run in found["runs"]] == [pytest.approx(1.0), pytest.approx(0.5)]


def test_a_failed_yardstick_takes_only_the_retention_away(tmp_path):
    asked = plan("a")
    found = write_comparison(tmp_path, asked, runs_of(asked, independent={"status": "failed", "error": "x"}))
    [run] = found["runs"]
    assert run["retention"] is None and run["steps_per_s"] and run["status"] == "finished"


def test_nan_is_null_so_that_anybody_can_read_it(tmp_path):
    asked = plan("a")
    found = write_comparison(tmp_path, asked, runs_of(asked, a={"loss": None, "top1": (0.1, math.nan)}))
    assert found["runs"][0]["final_loss"] is None
    json.loads((tmp_path / "results.json").read_text(), parse_constant=lambda name: pytest.fail(name))


# The grid


def tuned(tmp_path, **losses):
    """A comparison of entry `a` with a trial for each `lr_<value>`; None: the run failed."""
    rates = {float(name.removeprefix("lr_").replace("_", ".")): loss for name, loss in losses.items()}
    asked = plan("a", lr_grid=tuple(sorted(rates)))
    how = {
        Cell(asked.entries[0], "fast", 0, lr): {"status": "failed", "error": "NaN"} if loss is None else {"loss": loss}
        for lr, loss in rates.items()
    }
    write_comparison(tmp_path, asked, how)
    return asked, best(trials(asked, asked.entries[0], "fast", Folders(tmp_path)))


def test_the_lowest_final_loss_wins(tmp_path):
    assert tuned(tmp_path, lr_0_1=0.5, lr_0_2=0.3, lr_0_4=0.4)[1] == 0.2


def test_the_lower_rate_of_two_equals_wins(tmp_path):
    assert tuned(tmp_path, lr_0_1=0.5, lr_0_2=0.5)[1] == 0.1


def test_a_failed_trial_is_the_worst(tmp_path):
    assert tuned(tmp_path, lr_0_1=9.0, lr_0_2=None)[1] == 0.1


def test_a_grid_that_failed_altogether_chooses_nothing(tmp_path):
    assert tuned(tmp_path, lr_0_1=None, lr_0_2=None)[1] is None


def test_the_edges_of_a_grid_are_said(tmp_path):
    assert is_at_edge(0.1, (0.1, 0.2, 0.4)) and is_at_edge(0.4, (0.1, 0.2, 0.4))
    assert not is_at_edge(0.2, (0.1, 0.2, 0.4))
    assert not is_at_edge(0.1, (0.1,))


def test_results_tell_what_was_tried_and_what_was_chosen(tmp_path):
    asked, chosen = tuned(tmp_path, lr_0_1=0.5, lr_0_2=0.3)
    found = results(asked.with_choice("fast", "a", chosen), Folders(tmp_path))
    assert [(t["lr"], t["final_loss"], t["chosen"], t["at_edge"]) for t in found["grid"]["tried"]] == [
        (0.1, 0.5, False, False),
        (0.2, 0.3, True, True),
    ]
    assert [(run["lr"], run["final_loss"]) for run in found["runs"]] == [(0.2, 0.3)]


def test_a_run_without_a_chosen_rate_says_so(tmp_path):
    asked, _ = tuned(tmp_path, lr_0_1=None)
    [run] = results(asked, Folders(tmp_path))["runs"]
    assert run["status"] == "missing" and "no learning rate of the grid" in run["error"]
