"""Compute models: pure functions of seed and rank, and the same stalls as in real runs."""

from __future__ import annotations

import math
from itertools import islice

import pytest

from lasgd.errors import ConfigurationError
from lasgd.lab.conditions import Condition
from lasgd.lab.padding import stall_s
from lasgd.virtual.compute_models import CHUNK, Constant, LogNormal, Stalls, Stragglers, Trace

STEPS = 3 * CHUNK + 7


def first(model, rank, n=STEPS):
    return list(islice(model.durations(rank), n))


MODELS = {
    "constant": Constant(0.1),
    "log-normal": LogNormal(0.1, 0.3, seed=1),
    "stragglers": Stragglers(LogNormal(0.1, 0.3, seed=1), {2: 4.0}),
    "stalls": Stalls(Constant(0.1), 1.0, 0.1, seed=1),
    "trace": Trace([[0.1, 0.2], [0.3]]),
}


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_each_call_begins_afresh_whatever_other_ranks_have_drawn(model):
    before = first(model, 2)
    interleaved = [list(pair) for pair in zip(*(islice(model.durations(rank), STEPS) for rank in (2, 1)), strict=True)]
    assert [pair[0] for pair in interleaved] == before
    assert [pair[1] for pair in interleaved] == first(model, 1)


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_durations_are_plain_floats(model):
    assert {type(step_s) for step_s in first(model, 2)} == {float}


def test_constant_steps_are_all_alike():
    assert first(Constant(0.1), 5) == [0.1] * STEPS


def test_log_normal_steps_have_the_median_and_spread_that_were_asked_for():
    logs = [math.log(step_s / 0.1) for rank in range(4) for step_s in first(LogNormal(0.1, 0.2, seed=0), rank, 2500)]
    # 10,000 draws: the standard error of the mean is 0.002, of the deviation 0.0014; five of them allowed
    mean = sum(logs) / len(logs)
    assert mean == pytest.approx(0, abs=0.01)
    assert math.sqrt(sum((log - mean) ** 2 for log in logs) / len(logs)) == pytest.approx(0.2, abs=0.007)


def test_log_normal_ranks_and_seeds_draw_apart():
    drawn = [first(LogNormal(0.1, 0.2, seed), rank, 5) for seed in (0, 1) for rank in (0, 1)]
    assert len({step_s for row in drawn for step_s in row}) == 20


def test_log_normal_without_spread_is_constant():
    assert first(LogNormal(0.1, 0.0, seed=0), 0, 5) == pytest.approx([0.1] * 5)


def test_log_normal_steps_stay_the_same_from_version_to_version():
    # Stored simulations are repeated by their seed; numpy promises the stream of PCG64.
    assert first(LogNormal(0.1, 0.2, seed=3), 1, 3) == pytest.approx(
        [0.0889407505741216, 0.09190845679016015, 0.0775518097226488], rel=1e-12
    )


def test_a_stragglers_steps_are_longer_by_its_factor_and_nobody_elses():
    model = LogNormal(0.1, 0.3, seed=1)
    slowed = Stragglers(model, {2: 4.0})
    assert first(slowed, 2) == [4.0 * step_s for step_s in first(model, 2)]
    assert first(slowed, 1) == first(model, 1)


@pytest.mark.parametrize("seed, rank", [(0, 0), (0, 3), (7, 1), (2**40, 9999)])
def test_steps_stall_exactly_where_real_runs_stall(seed, rank):
    condition = Condition(stall_s=1.0, stall_probability=0.05)
    stalls = [step_s - 0.5 for step_s in first(Stalls(Constant(0.5), 1.0, 0.05, seed), rank)]
    assert stalls == [stall_s(condition, seed, rank, step) for step in range(STEPS)]
    assert set(stalls) == {0.0, 1.0}


def test_a_stall_is_not_multiplied_by_the_stragglers_factor():
    assert first(Stalls(Stragglers(Constant(0.1), {0: 4.0}), 1.0, 1.0, seed=0), 0, 2) == [1.4, 1.4]


def test_stalls_at_zero_per_cent_never_come():
    assert first(Stalls(Constant(0.1), 1.0, 0.0, seed=0), 0) == [0.1] * STEPS


def test_a_trace_begins_again_when_it_is_used_up():
    assert first(Trace([[0.1, 0.2, 0.3]]), 0, 7) == [0.1, 0.2, 0.3, 0.1, 0.2, 0.3, 0.1]


def test_a_rank_that_was_not_traced_takes_the_times_of_one_that_was_from_another_moment_on():
    trace = Trace([[0.1, 0.2, 0.3, 0.4], [0.5]])
    assert first(trace, 1, 3) == first(trace, 3, 3) == [0.5, 0.5, 0.5]
    begins = [first(trace, rank, 5) for rank in (0, 2, 4)]
    assert begins == [[0.1, 0.2, 0.3, 0.4, 0.1], [0.3, 0.4, 0.1, 0.2, 0.3], [0.1, 0.2, 0.3, 0.4, 0.1]]


@pytest.mark.parametrize(
    "make, shown",
    [
        (lambda: Constant(0.0), "step_s is 0.0; expected a finite number above 0"),
        (lambda: Constant(math.nan), "step_s is nan"),
        (lambda: Constant(math.inf), "step_s is inf"),
        (lambda: LogNormal(-1.0, 0.2, 0), "median_s is -1.0"),
        (lambda: LogNormal(0.1, -0.2, 0), "sigma is -0.2; expected 0 to 10"),
        (lambda: LogNormal(0.1, 0.2, -1), "seed is -1; expected 0 or more"),
        (lambda: Stragglers(Constant(0.1), {3: 0.0}), "factor of straggler 3 is 0.0"),
        (lambda: Stalls(Constant(0.1), 1.0, 1.5, 0), "stall probability is 1.5; expected 0 to 1"),
        (lambda: Stalls(Constant(0.1), -1.0, 0.5, 0), "stall_s is -1.0"),
        (lambda: Trace([]), "the trace is empty"),
        (lambda: Trace([[0.1], []]), "no step times of rank 1"),
        (lambda: Trace([[0.1], [0.1, -0.2]]), "the trace's rank 1, step 1, is -0.2"),
    ],
)
def test_settings_are_checked_when_the_model_is_made(make, shown):
    with pytest.raises(ConfigurationError) as refused:
        make()
    assert shown in str(refused.value)
