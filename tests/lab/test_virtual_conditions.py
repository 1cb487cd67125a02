"""Conditions in virtual time are those of real runs."""

from __future__ import annotations

import dataclasses
import math
from itertools import islice

import pytest

from lasgd.errors import ConfigurationError
from lasgd.group.cost import ring_all_reduce_s
from lasgd.lab.conditions import parse
from lasgd.lab.padding import StepPadding
from lasgd.lab.virtual_conditions import SHARE_SPREAD, from_condition
from lasgd.virtual.compute_models import Constant
from lasgd.virtual.network_models import Network
from virtual_clock import VirtualClock


def padded(text, rank, *, compute_s, seed=5, world_size=4, steps=300):
    """The length of each step of a rank of a real run, forward and backward of which take `compute_s`."""
    clock = VirtualClock()
    padding = StepPadding(parse(text), rank, world_size, seed, clock=clock, sleep=clock.sleep)
    lengths = []
    for _ in range(steps):
        begun_s = clock()
        padding.begin()
        clock.now_s += compute_s
        padding.wait_rest()
        lengths.append(clock() - begun_s)
    return lengths


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize(
    "text", ["fast", "step=100ms", "straggler", "straggler=0:2x+straggler=last:4x", "jitter", "stall=1s@20%+straggler"]
)
def test_steps_last_as_long_as_real_padded_ones(text, rank):
    compute, _ = from_condition(parse(text), 4, seed=5, own_step_s=0.02)
    assert list(islice(compute.durations(rank), 300)) == pytest.approx(padded(text, rank, compute_s=0.02))


def test_a_link_makes_rounds_as_long_as_on_the_emulated_one():
    _, network = from_condition(parse("link=20mbit,latency=20ms"), 4, 0, 0.1)
    on_the_wire = 1_570_000 * 9014 / 8948  # full frames of 9014 bytes, each with 8948 bytes of payload
    assert network.all_reduce_s(1_570_000, range(4)) == pytest.approx(ring_all_reduce_s(on_the_wire, 4, 0.02, 2.5e6))


def test_a_round_takes_at_least_what_the_condition_says_and_a_part_its_share():
    _, network = from_condition(parse("round=1s+link=20mbit"), 4, 0, 0.1)
    assert network.all_reduce_s(1000, range(4)) == 1.0
    assert network.all_reduce_s(100, range(4), share=0.1) == pytest.approx(0.1)
    assert network.all_reduce_s(10_000_000, range(4)) == pytest.approx(6.0 * 9014 / 8948)


def test_without_a_link_the_own_network_is_kept_and_costs_nothing_if_there_is_none():
    own = Network(4, 100.0)
    kept = from_condition(parse("step=100ms"), 4, 0, own_network=own)[1]
    tcp = {"share_spread": SHARE_SPREAD, "first_window_bytes": 15_000}
    assert kept == dataclasses.replace(own, **tcp)
    assert from_condition(parse("round=1s"), 4, 0, 0.1, own)[1] == Network(4, 100.0, round_s=1.0, **tcp)
    assert from_condition(parse("step=100ms"), 4, 0) == (Constant(0.1), Network(4, math.inf, **tcp))


def test_a_first_window_is_ten_frames_of_the_link():
    assert from_condition(parse("link=20mbit+step=100ms"), 4, 0)[1].first_window_bytes == 90_000
    assert from_condition(parse("link=1mbit+step=100ms"), 4, 0)[1].first_window_bytes == 15_000


def test_a_step_without_a_length_is_refused():
    with pytest.raises(ConfigurationError, match="condition 'fast' does not say how long a step takes"):
        from_condition(parse("fast"), 4, 0)


def test_a_straggler_who_does_not_exist_is_refused():
    with pytest.raises(ConfigurationError, match="no rank 4 among 4 ranks"):
        from_condition(parse("straggler=4:2x"), 4, 0, 0.1)
