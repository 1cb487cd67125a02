"""benchmarks/comparison.py: what it starts, what it stores, and what it holds `lasgd` to."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest

from lasgd.errors import ConfigurationError
from lasgd.training.settings import Settings

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))


def run(label, condition="slow", seed=0, seconds=10.0, top1=0.8, status="finished", budget="900 samples"):
    """A run that gets to `top1` in a straight line, in `seconds`."""
    curve = [[seconds * part / 10, 100 * part, top1 * part / 10, None] for part in range(1, 11)]
    rates = {"steps_per_s": 1000 / seconds}
    common = {"algorithm": label, "condition": condition, "seed": seed, "status": status, "final_top1": top1}
    common["budget"] = budget
    return common | rates | {"curve": curve if status == "finished" else []}


def found_bars(study, runs):
    from comparison import bars

    return {bar.what: bar for bar in bars(study, runs)}


def test_lasgd_is_held_to_the_reference_the_blocking_ones_and_the_others():
    runs = [run("lasgd"), run("sync_sgd", seconds=39.0), run("local_sgd:steps-per-round=10", seconds=11.0)]
    runs += [run("ad_psgd", seconds=9.5), run("peer:torchft_diloco", top1=0.5)]
    bars = found_bars("cifar10", runs)
    ddp = bars["slow, 900 samples: sooner than sync_sgd (DDP)"]
    assert (round(ddp.value, 2), ddp.holds) == (3.9, False)
    assert bars["slow, 900 samples: sooner than local_sgd:steps-per-round=10"].holds is False
    assert bars["slow, 900 samples: not 10 % later than ad_psgd"].holds is True
    late = bars["slow, 900 samples: sooner than peer:torchft_diloco"]
    assert (late.value, late.holds) == (math.inf, True)


def test_lasgd_is_held_to_torchs_own_ddp_as_to_the_reference():
    bars = found_bars("cifar10", [run("lasgd"), run("sync_sgd", seconds=50.0), run("peer:torch_ddp", seconds=39.0)])
    held = [bars[f"slow, 900 samples: sooner than {name}"].holds for name in ("sync_sgd (DDP)", "peer:torch_ddp")]
    assert held == [True, False]


def test_lasgd_is_held_at_its_best_settings_as_the_others_are_and_to_ddp_at_its_defaults_too():
    best = "lasgd:outer-momentum=0.8:momentum=0.5"
    runs = [run("lasgd", seconds=12.0) | {"final_loss": 1.4}, run(best) | {"final_loss": 1.3}]
    bars = found_bars("cifar10", [*runs, run("sync_sgd", seconds=45.0), run("ad_psgd", seconds=9.5)])
    assert bars[f"slow, 900 samples, {best}: sooner than sync_sgd (DDP)"].value == pytest.approx(4.5)
    assert bars["slow, 900 samples, lasgd at its defaults: sooner than sync_sgd (DDP)"].value == pytest.approx(3.75)
    assert bars[f"slow, 900 samples, {best}: not 10 % later than ad_psgd"].holds is True
    assert not any("than lasgd" in what for what in bars)


def test_lasgd_that_never_gets_there_is_sooner_than_nobody():
    bars = found_bars("cifar10", [run("lasgd", top1=0.5), run("sync_sgd"), run("ad_psgd", top1=0.5)])
    assert bars["slow, 900 samples: sooner than sync_sgd (DDP)"].holds is False
    assert bars["slow, 900 samples: not 10 % later than ad_psgd"].holds is False


def test_who_has_a_failed_run_was_not_measured():
    runs = [run("lasgd"), run("sync_sgd"), run("ad_psgd"), run("ad_psgd", seed=1, status="failed")]
    assert found_bars("cifar10", runs)["slow, 900 samples: not 10 % later than ad_psgd"].holds is None


def test_a_condition_without_the_reference_is_not_measured_and_not_passed_over():
    assert found_bars("cifar10", [run("lasgd")])["slow, 900 samples: sooner than sync_sgd (DDP)"].holds is None


def test_a_run_that_was_cut_short_is_not_kept():
    from comparison import merged

    cut, failed = run("osgp", status="interrupted"), run("sgp", status="failed")
    assert merged([cut], [failed]) == [failed]


def test_a_run_that_is_found_again_keeps_the_commit_at_which_it_was_made():
    from comparison import merged

    made, again = run("lasgd") | {"commit": "old"}, run("lasgd", seconds=9.0) | {"commit": "new"}
    assert merged([made], [run("lasgd") | {"commit": "new"}]) == [made]
    assert merged([made], [again]) == [again]


def test_one_seed_that_misses_the_target_is_a_miss():
    runs = [run("lasgd"), run("lasgd", seed=1, top1=0.7), run("sync_sgd"), run("sync_sgd", seed=1)]
    assert found_bars("cifar10", runs)["slow, 900 samples: sooner than sync_sgd (DDP)"].value == 0.0


def test_gossip_is_held_to_synchronous_sgd_in_points():
    runs = [run("sync_sgd", "fast"), run("ad_psgd", "fast", top1=0.79), run("sgp", "fast", top1=0.77)]
    bars = found_bars("digits", runs)
    assert bars["fast: ad_psgd behind sync_sgd, 1 seeds"].holds is True
    assert bars["fast: sgp behind sync_sgd, 1 seeds"].holds is False
    assert bars["fast: parameter_server behind sync_sgd, 0 seeds"].holds is None


def test_digits_without_a_run_at_equal_samples_are_not_measured_and_not_passed_over():
    bars = found_bars("digits", [run("sync_sgd", "fast", budget="30 seconds"), run("ad_psgd", "slow")])
    assert len(bars) == 3
    assert all(bar.holds is None for bar in bars.values())


def test_twins_are_held_together():
    twins = [run("lasgd", "fast"), run("lasgd (2)", "fast", seconds=10.4), run("sync_sgd", "fast")]
    bars = found_bars("quality", twins)
    assert bars["fast, 900 samples: lasgd twice, steps/s apart"].value == pytest.approx(0.0392, abs=1e-3)
    assert all(bar.holds for bar in bars.values())
    twins[1] = run("lasgd (2)", "fast", seconds=12.0)
    assert not any(bar.holds for bar in found_bars("quality", twins).values())


def test_runs_made_again_take_the_place_of_earlier_ones_and_others_stay():
    from comparison import merged

    earlier = [run("lasgd"), run("sync_sgd"), run("lasgd", seed=1)]
    runs = merged(earlier, [run("lasgd", seconds=5.0), run("osgp")])
    assert [(r["algorithm"], r["seed"]) for r in runs] == [("lasgd", 0), ("sync_sgd", 0), ("lasgd", 1), ("osgp", 0)]
    assert runs[0]["curve"][-1][0] == 5.0


def test_a_peer_is_started_with_what_all_share_and_its_own():
    from comparison import peer_entry

    entry = peer_entry("torchft_diloco:delay=0:fragments=1")
    settings = entry.settings(Settings(samples=1000, ranks=4, checkpoints=0, device="cpu"), "slow", 3, lr=0.1)
    command = entry.command(settings, Path("here"))
    assert Path(command[1]).parts[-2:] == ("peers", "run.py")
    assert command[2] == "torchft_diloco"
    assert command[-4:] == ["--delay=0", "--fragments=1", "--out", "here"]
    assert {"--samples", "--condition", "--seed", "--lr"} <= set(command)
    assert not {"--algorithm", "--checkpoints", "--device"} & set(command)
    assert not entry.can_be_simulated


def test_runs_of_another_budget_are_another_contest():
    from comparison import merged

    runs = [run("lasgd"), run("sync_sgd"), run("lasgd", budget="60 seconds", seconds=1.0)]
    assert merged([], runs) == runs
    bars = found_bars("cifar10", runs)
    assert bars["slow, 900 samples: sooner than sync_sgd (DDP)"].value == pytest.approx(1.0)
    assert bars["slow, 60 seconds: sooner than sync_sgd (DDP)"].holds is None  # its reference was not run


def test_a_condition_has_the_studys_seconds_unless_samples_are_asked_for():
    from comparison import STUDIES, said

    study = STUDIES["cifar10"]
    assert said(study.budget("slow", None)) == "200 seconds"
    assert said(study.budget("slow", "samples")) == said(study.budget("fast", None)) == "60,000 samples"
    with pytest.raises(ConfigurationError, match="none for 'fast'"):
        study.budget("fast", "seconds")


def test_a_learning_rate_that_is_tried_again_is_stored_once():
    from comparison import merged_trials

    tried = {"algorithm": "lasgd", "condition": "slow", "lr": 0.1, "final_loss": 1.0, "final_top1": 0.5}
    tried |= {"chosen": True, "at_edge": True, "virtual": True}
    stored = merged_trials([], [tried], "60 seconds")
    assert merged_trials(stored, [tried | {"final_loss": 0.9}], "60 seconds")[0]["final_loss"] == 0.9
    assert len(merged_trials(stored, [tried], "60 seconds")) == 1
    assert len(merged_trials(stored, [tried], "900 samples")) == 2


def test_every_studys_entries_can_be_read():
    from comparison import STUDIES, entries_of

    for study in STUDIES.values():
        assert entries_of(study, None, Settings(samples=1000), [])
