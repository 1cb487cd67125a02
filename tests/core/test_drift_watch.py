"""When a drift counts as a runaway: by what the same rank's was, whatever steps and networks do meanwhile."""

from __future__ import annotations

import math

import pytest

from lasgd.health import GROWTH, DriftWatch
from lasgd.layout import Layout
from scripted_driver import Point


def watched(drifts: list[float], steps: list[int] | None = None) -> list[bool]:
    """What a watch says of one fragment's drifts, of which the first has none before it."""
    watch = DriftWatch()
    steps = steps or [10 * cycle for cycle in range(len(drifts))]
    return [watch.grew_too_much(0, drift, step) for drift, step in zip(drifts, steps, strict=True)]


def test_a_drift_that_grows_beyond_the_factor_is_a_runaway_and_one_below_it_is_not():
    assert watched([9.0, 1.0, 0.99 * GROWTH]) == [False] * 3
    assert watched([9.0, 1.0, 1.01 * GROWTH]) == [False, False, True]


def test_with_nothing_before_it_nothing_is_a_runaway():
    assert watched([1.0, 1e9]) == [False, False]
    assert watched([0.0, 0.0, 1.0, 1.0]) == [False] * 4, "a learning rate of 0 to begin with"


@pytest.mark.parametrize("drifts", [[math.inf], [1.0, math.inf], [1.0, 1.0, math.inf]])
def test_a_drift_beyond_all_numbers_is_one_at_any_time(drifts):
    assert watched(drifts)[-1]


def test_a_drift_that_is_not_known_says_nothing_and_is_not_remembered():
    assert watched([math.nan, 1.0, 1.0, math.nan, 2.0]) == [False] * 5


def test_what_was_refused_does_not_become_the_measure():
    assert watched([1.0, 1.0, 100.0, 100.0]) == [False, False, True, True]


def test_a_small_drift_in_between_does_not_make_the_usual_one_a_runaway():
    assert watched([1.0, 1.0, 0.0, 1.0, 0.0, 0.0, 1.0]) == [False] * 7


@pytest.mark.parametrize("momentum", [0.0, 0.8, 0.95])
@pytest.mark.parametrize("stalled", [20, 1000, 100_000])
def test_a_network_that_stands_still_makes_no_runaway_then_nor_afterwards(momentum, stalled):
    watch, velocity, at = DriftWatch(), 0.0, 0
    for cycle in range(200):
        steps = stalled if cycle in (5, 50) else 10
        velocity = momentum * velocity + steps  # of the mean: what a correction brings, beside the own steps
        at += steps
        assert not watch.grew_too_much(0, steps + momentum * velocity, at), cycle


@pytest.mark.parametrize("others", [1, 10])
def test_a_rank_that_becomes_slow_or_stops_taking_steps_has_not_run_away(others):
    watch, at = DriftWatch(), 0
    for cycle in range(100):
        at += 20 if cycle < 30 else (1 if cycle < 60 else 0)
        own = 20 if cycle < 30 else (1 if cycle < 60 else 0)
        assert not watch.grew_too_much(0, own + others * 20, at), cycle


def test_a_warm_up_from_nothing_is_no_runaway():
    assert watched([0.0, *(float(cycle) for cycle in range(1, 50))]) == [False] * 50


@pytest.mark.parametrize("to", [1, 2, 5, 8])
def test_fragments_cut_anew_are_measured_by_those_they_are_cut_from(to):
    layout = Layout(Point([0.0] * 40))
    watch, before, after = DriftWatch(), layout.cut(4), layout.cut(to)
    for cycle in range(3):
        for fragment in before:
            watch.grew_too_much(fragment.index, 1.0, 10 * cycle)
    watch.cut_anew(before, after)
    for fragment in after:
        parts = sum(old.begin < fragment.end and fragment.begin < old.end for old in before)
        limit = GROWTH * math.sqrt(parts)
        assert not watch.grew_too_much(fragment.index, 0.5 * limit, 30)
    watch = DriftWatch()
    for cycle in range(3):
        for fragment in before:
            watch.grew_too_much(fragment.index, 1.0, 10 * cycle)
    watch.cut_anew(before, after)
    assert all(watch.grew_too_much(fragment.index, 2.1 * GROWTH, 30) for fragment in after)


def test_what_was_forgotten_is_no_measure_any_more():
    watch = DriftWatch()
    for cycle in range(3):
        watch.grew_too_much(0, 1.0, 10 * cycle)
    watch.forget()
    assert not watch.grew_too_much(0, 100.0, 30)
    assert not watch.grew_too_much(0, 100.0, 40)


def test_a_fragment_that_had_hardly_moved_may_come_to_drift_as_all_usually_do():
    watch = DriftWatch()
    for cycle in range(3):
        assert not watch.grew_too_much(0, 1.0, 10 * cycle)
        assert not watch.grew_too_much(1, 1e-6, 10 * cycle)
    assert watch.grew_too_much(1, 1.0, 30)
    assert not watch.grew_too_much(1, 0.7, 30)
