"""Which runs a comparison consists of, in which order, and what may be added to it."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from pydantic import ValidationError

from compare_folders import SHARED, plan
from lasgd.cli.app import app
from lasgd.cli.entries import parse_entries
from lasgd.errors import ConfigurationError
from lasgd.lab.compare.entry import Entry, options, simulate, train, yardstick
from lasgd.lab.compare.plan import FILE, Cell, going_on, store
from lasgd.training.settings import Settings


def names(cells) -> list[str]:
    return [cell.entry.label for cell in cells]


def test_each_seed_begins_with_another_entry():
    asked = plan("a,b,c", seeds=(0, 1, 2))
    assert names(asked.cells(0, "fast")) == ["a", "b", "c", "independent"]
    assert names(asked.cells(1, "fast")) == ["b", "c", "independent", "a"]
    assert names(asked.cells(2, "fast")) == ["c", "independent", "a", "b"]


def test_the_yardstick_runs_once_where_it_is_an_entry():
    asked = plan("independent,a")
    assert names(asked.cells(0, "fast")) == ["independent", "a"]


def test_a_yardstick_with_settings_of_its_own_is_none():
    own = Entry("independent:momentum=0", "independent", {"momentum": 0.0})
    asked = replace(plan("a"), entries=(own,))
    assert names(asked.cells(0, "fast")) == ["independent:momentum=0", "independent"]


def test_the_grid_is_tried_value_by_value_and_entries_take_turns():
    asked = plan("a,b", lr_grid=(0.1, 0.2))
    tried = [(cell.entry.label, cell.lr) for cell in asked.tries("fast")]
    assert tried == [("a", 0.1), ("b", 0.1), ("independent", None), ("b", 0.2), ("a", 0.2)]


def test_an_entry_that_fixes_its_learning_rate_is_not_tuned():
    asked = replace(plan("a", lr_grid=(0.1, 0.2)), entries=(Entry("a:lr=0.3", "a", {"lr": 0.3}),))
    assert [(cell.entry.label, cell.lr) for cell in asked.tries("fast")] == [("a:lr=0.3", None), ("independent", None)]


def test_nothing_is_tried_again_once_the_rate_is_chosen():
    asked = plan("a,b", lr_grid=(0.1, 0.2)).with_choice("fast", "a", 0.2)
    assert {cell.entry.label for cell in asked.tries("fast") if cell.lr} == {"b"}
    [first, *_] = asked.cells(0, "fast")
    assert (first.entry.label, first.lr) == ("a", 0.2)


def test_the_trial_with_the_chosen_rate_is_the_first_seeds_run():
    asked = plan("a", lr_grid=(0.1, 0.2)).with_choice("fast", "a", 0.2)
    tried = [cell.folder for cell in plan("a", lr_grid=(0.1, 0.2)).tries("fast")]
    assert next(iter(asked.cells(0, "fast"))).folder in tried


def test_virtual_trials_lie_apart_and_are_no_runs():
    [tried, *_] = plan("a", lr_grid=(0.1, 0.2), tune="virtual").tries("fast")
    assert tried.is_virtual and tried.folder.parts[0] == "tuning"


def test_what_cannot_be_simulated_is_tuned_in_real_runs():
    peer = Entry("peer", "peer", can_be_simulated=False)
    asked = replace(plan("a", lr_grid=(0.1, 0.2), tune="virtual"), entries=(peer,))
    assert [cell.is_virtual for cell in asked.tries("fast")] == [False, False]


def test_folders_say_condition_entry_seed_and_rate():
    cell = Cell(Entry("local_sgd:steps-per-round=5 (2)", "local_sgd"), "straggler=last:4x+stall=1s@1%", 3, 0.05)
    assert cell.folder.as_posix() == ("runs/straggler=last-4x+stall=1s-1-/local_sgd-steps-per-round=5-2/seed-3-lr-0.05")


def test_entries_that_would_share_a_folder_are_refused():
    with pytest.raises(ConfigurationError, match="share the folder"):
        replace(plan("a"), entries=(Entry("a (2)", "a"), Entry("a-2", "a")))


def test_a_run_gets_what_all_share_and_what_is_its_own():
    entry = Entry("local_sgd:steps-per-round=5", "local_sgd", {"steps_per_round": 5.0})
    settings = entry.settings(SHARED, "slow", 7, 0.3)
    wanted = {"algorithm": "local_sgd", "steps_per_round": 5.0, "condition": "slow", "seed": 7, "lr": 0.3}
    assert settings == SHARED.model_copy(update=wanted)


def test_settings_that_do_not_go_together_are_refused():
    with pytest.raises(ValidationError):
        Entry("a", "a", {"epochs": 2.0}).settings(SHARED, "fast", 0)


def test_options_say_what_was_given_and_nothing_else():
    assert options(Settings(lr=0.2, samples=10, image_size=None)) == ["--samples", "10", "--lr", "0.2"]


def test_a_switch_that_is_off_is_said_too():
    settings = Settings(staleness_aware=False)
    assert options(settings) == ["--staleness-aware=false"]
    _, bound, _ = app.parse_args(["train", *options(settings)], exit_on_error=False, print_error=False)
    assert bound.kwargs["settings"] == settings
    assert options(Settings(staleness_aware=True)) == ["--staleness-aware"]


def test_the_command_is_lasgd_train_with_the_run_folder(tmp_path):
    argv = train(Entry("a", "a").settings(SHARED, "slow", 1), tmp_path)
    assert argv[1:4] == ["-m", "lasgd", "train"]
    assert argv[-2:] == ["--out", str(tmp_path)]
    assert argv[argv.index("--condition") + 1] == "slow"


def test_a_condition_without_a_step_time_is_simulated_with_a_measured_one(tmp_path):
    entry = Entry("lasgd", "lasgd")
    assert "measured" in simulate(entry.settings(SHARED, "fast", 0), tmp_path)
    assert "measured" not in simulate(entry.settings(SHARED, "slow", 0), tmp_path)


def test_the_yardstick_is_not_evaluated_on_the_way():
    assert yardstick().settings(SHARED, "fast", 0).evaluations == 0


# Going on in a folder


def test_a_new_folder_changes_nothing(tmp_path):
    assert going_on(plan(), tmp_path) == plan()


def test_other_shared_settings_are_refused_and_named(tmp_path):
    store(plan(lr_grid=(0.1,)), tmp_path)
    other = plan(shared=SHARED.model_copy(update={"samples": 2000, "image_size": 16}), lr_grid=(0.1, 0.2))
    with pytest.raises(ConfigurationError) as refused:
        going_on(other, tmp_path)
    said = str(refused.value)
    assert "--samples: 1,000 there, 2,000 now" in said
    assert "--image-size: not given there, 16 now" in said
    assert "--lr-grid: 0.1 there, 0.1,0.2 now" in said
    assert "--batch-size" not in said


def test_time_outs_may_change(tmp_path):
    store(plan(), tmp_path)
    going_on(plan(shared=SHARED.model_copy(update={"timeout_s": 5.0})), tmp_path)


def test_a_setting_that_the_stored_plan_did_not_know_counts_as_its_default(tmp_path):
    store(plan(), tmp_path)
    stored = json.loads((tmp_path / FILE).read_text())
    del stored["shared"]["norm"]
    (tmp_path / FILE).write_text(json.dumps(stored))
    going_on(plan(), tmp_path)
    with pytest.raises(ConfigurationError, match="--norm: group there, batch now"):
        going_on(plan(shared=SHARED.model_copy(update={"norm": "batch"})), tmp_path)


def test_an_entry_of_the_same_name_with_other_settings_is_refused(tmp_path):
    store(replace(plan("a"), entries=(Entry("peer", "peer", {"lr": 0.1}),)), tmp_path)
    with pytest.raises(ConfigurationError, match="'peer' has other settings"):
        going_on(replace(plan("a"), entries=(Entry("peer", "peer", {"lr": 0.2}),)), tmp_path)


def test_choices_and_the_tuning_seed_are_kept_and_earlier_calls_remembered(tmp_path):
    store(plan("a", lr_grid=(0.1, 0.2)).with_choice("fast", "a", 0.2), tmp_path)
    later = going_on(plan("a,b", lr_grid=(0.1, 0.2), seeds=(1,), tuning_seed=1), tmp_path)
    assert later.lr_of(later.entries[0], "fast") == 0.2
    assert later.tuning_seed == 0
    assert [call["seeds"] for call in later.earlier] == [[0]]


def test_a_file_that_is_no_plan_is_refused(tmp_path):
    (tmp_path / FILE).write_text("[]")
    with pytest.raises(ConfigurationError, match="not the plan of a comparison"):
        going_on(plan(), tmp_path)


# Learning rates from elsewhere


def tuned(name: str, **changes) -> Entry:
    return Entry(name, name, **changes)


def test_what_does_not_depend_on_the_condition_is_tuned_under_the_first():
    asked = replace(plan("b", lr_grid=(0.1, 0.2)), entries=(tuned("a", is_tuned_once=True), tuned("b")))
    asked = asked.with_choice("fast", "a", 0.2).with_choice("fast", "b", 0.1)
    assert {cell.entry.label for cell in asked.tries("slow") if cell.lr} == {"b"}
    assert asked.borrowed_lr(asked.entries[0], "slow") == 0.2
    assert asked.borrowed_lr(asked.entries[1], "slow") is None


def test_an_entry_takes_the_rate_of_the_one_that_computes_the_same_and_waits_for_it():
    same, own = tuned("same", tuned_as="own"), tuned("own")
    asked = replace(plan("own", lr_grid=(0.1, 0.2)), entries=(same, own))
    assert {cell.entry.label for cell in asked.tries("fast") if cell.lr} == {"own"}
    assert asked.with_choice("fast", "own", 0.1).borrowed_lr(same, "fast") == 0.1


def test_it_tries_the_grid_itself_where_the_other_is_not_compared():
    asked = replace(plan("a", lr_grid=(0.1, 0.2)), entries=(tuned("same", tuned_as="own"),))
    assert [cell.lr for cell in asked.tries("fast") if cell.entry.label == "same"] == [0.1, 0.2]


@pytest.mark.parametrize(("budget", "once"), [({"samples": 100}, True), ({"seconds": 5.0}, False)])
def test_synchronous_algorithms_are_tuned_once_where_the_budget_is_in_samples(budget, once):
    shared = Settings(data="digits", **budget)
    found = {entry.label: entry.is_tuned_once for entry in parse_entries(["sync_sgd,d_psgd,lasgd,ad_psgd"], shared)}
    assert found == {"sync_sgd": once, "d_psgd": once, "lasgd": False, "ad_psgd": False}
