"""Runs of the virtual cluster without gradients: what they report, and that they can be repeated to the bit."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lasgd.algorithms import registry
from lasgd.errors import ConfigurationError
from lasgd.lab.conditions import parse
from lasgd.lab.simulation import Plan, Simulated, simulated
from lasgd.lab.virtual_conditions import from_condition
from lasgd.pace import Column
from lasgd.virtual.compute_models import Constant, LogNormal, Stragglers
from lasgd.virtual.network_models import Network
from lasgd.virtual.timing_replica import Vector

VECTOR = Vector(10_000)
COMMUNICATING = [name for name in registry.names() if registry.find(name).agrees]


def plan(algorithm="lasgd", ranks=4, compute=None, network=None, steps=60, **changes) -> Plan:
    compute, network = compute or Constant(0.1), network or Network(ranks, 1e6, latency_s=1e-4)
    known = {"samples": ranks * steps, "batch_size": 1}
    return Plan(registry.find(algorithm), ranks, compute, network, VECTOR, **(known | changes))


def steps_of(outcome: Simulated) -> list[int]:
    return [rank.tally.local_steps for rank in outcome.ranks]


# What is reported


@pytest.mark.parametrize("algorithm", registry.names())
def test_every_algorithm_runs_to_its_budget(algorithm):
    # Over links that cost nothing: a server's link lets its own rank take more steps than the others.
    outcome = simulated(plan(algorithm, network=Network(4, math.inf)))
    assert outcome.samples >= 4 * 60
    assert min(steps_of(outcome)) >= 60
    assert outcome.virtual_s >= 6.0 - 1e-9


def test_a_coarse_wire_format_sends_and_waits_for_as_many_bytes_as_its_codes_have():
    def of_a_round(wire):
        outcome = simulated(plan(wire=wire, fragments=1, network=Network(4, 1e5), steps=200))
        rank = outcome.ranks[0]
        header = 4 * len(Column) * 8
        return rank.bytes_sent / outcome.rounds / 1.5 - header, outcome.virtual_s / outcome.rounds

    (fp32, slow_s), (bf16, _), (int8, quick_s) = map(of_a_round, ("fp32", "bf16", "int8"))
    assert fp32 == pytest.approx(40_000, rel=0.1)  # the last average is exact, whatever the format
    assert bf16 == pytest.approx(4 * 2560 * 2, rel=0.1)  # four pieces, of ten blocks each
    assert int8 == pytest.approx(4 * 2560 * 260 / 256, rel=0.1)
    assert quick_s == pytest.approx(1.5 * (int8 + 4 * len(Column) * 8) / 1e5, rel=0.1)
    assert slow_s > 3 * quick_s


def test_an_algorithm_that_would_lose_what_is_rounded_off_takes_no_wire_format():
    with pytest.raises(ConfigurationError, match="wire format int8: sync_sgd"):
        simulated(plan("sync_sgd", wire="int8"))


@pytest.mark.parametrize("bytes_per_s", [math.inf, 1e9])
@pytest.mark.parametrize(("beta", "fragments"), [(0.0, 1), (0.8, 4)])
def test_on_a_fast_network_auto_leaves_the_vector_whole_but_for_momentum_of_the_mean(beta, fragments, bytes_per_s):
    text = registry.find("lasgd", {"outer_momentum": beta})
    fast = Plan(text, 4, Constant(0.1), Network(4, bytes_per_s), VECTOR, samples=240, batch_size=1)
    assert simulated(fast).fragments == fragments


def test_without_communication_ranks_keep_their_own_pace_to_the_last():
    outcome = simulated(plan("independent", compute=Stragglers(Constant(0.1), {3: 4.0})))
    assert outcome.steps_per_s == pytest.approx(3 / 0.1 + 1 / 0.4)
    assert outcome.virtual_s == pytest.approx(60 * 0.4), "the straggler takes as many steps, and is the last to end"
    assert (outcome.rounds, outcome.waited_share, outcome.staleness_steps) == (0, 0.0, 0.0)


def test_lasgd_keeps_the_pace_of_ranks_that_do_not_communicate():
    compute = Stragglers(Constant(0.1), {3: 4.0})
    outcome = simulated(plan("lasgd", compute=compute, network=Network(4, 1e5), steps=400))
    assert outcome.waited_share == 0.0
    assert outcome.steps_per_s == pytest.approx(3 / 0.1 + 1 / 0.4, rel=0.01)
    assert outcome.staleness_steps > 1


def test_what_synchronous_sgd_waits_is_what_its_step_is_longer_by():
    network = Network(4, 1e5)
    outcome = simulated(plan("sync_sgd", network=network))
    round_s = network.all_reduce_s(VECTOR.nbytes + 4 * 8 * len(Column), range(4))
    assert outcome.steps_per_s == pytest.approx(4 / (0.1 + round_s)), "40 kB fit one bucket: nothing overlaps"
    assert outcome.waited_share == pytest.approx(round_s / (0.1 + round_s))
    assert outcome.staleness_steps == 0.0


def test_samples_count_each_rank_at_its_own_batch():
    few, many = (simulated(plan(batch_size=size, samples=4 * 60 * size)) for size in (1, 32))
    assert many.samples_per_s == pytest.approx(32 * few.samples_per_s)
    assert many.steps_per_s == few.steps_per_s


def test_a_straggler_slows_those_who_wait_for_it_and_nobody_else():
    compute = Stragglers(Constant(0.1), {0: 8.0})
    waiting, going_on = (simulated(plan(name, compute=compute, steps=400)) for name in ("sync_sgd", "lasgd"))
    assert waiting.steps_per_s < 4 / 0.8
    assert going_on.steps_per_s > 3 / 0.1


@pytest.mark.parametrize("algorithm", registry.names())
def test_whole_vectors_are_averaged_by_algorithms_that_take_no_fragments(algorithm):
    outcome = simulated(plan(algorithm, fragments=5))
    assert outcome.fragments == (5 if registry.find(algorithm).takes_fragments else 1)


def test_the_method_of_the_all_reduce_is_the_plans():
    network = Network(4, math.inf, latency_s=0.01)  # a ring of four has six messages on end, a tree four
    by_ring, by_tree = (simulated(plan("sync_sgd", network=network, all_reduce=m)) for m in ("ring", "tree"))
    assert by_ring.steps_per_s == pytest.approx(4 / 0.16)
    assert by_tree.steps_per_s == pytest.approx(4 / 0.14)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(registry.names()),
    st.integers(1, 6),
    st.sampled_from([1e4, 1e6, math.inf]),
    st.sampled_from([1, 3, "auto"]),
    st.floats(0, 1),
    st.integers(0, 9),
)
def test_whatever_the_cluster_time_and_steps_are_accounted_for(algorithm, ranks, bytes_per_s, fragments, sigma, seed):
    compute, network = LogNormal(0.1, sigma, seed), Network(ranks, bytes_per_s)
    outcome = simulated(plan(algorithm, ranks, compute, network, steps=20, fragments=fragments))
    assert outcome.samples >= 20 * ranks
    assert 0 <= outcome.waited_share < 1
    for rank in outcome.ranks:
        assert rank.left_s is not None and rank.compute_s >= 0
        assert rank.compute_s + rank.tally.waited_s == pytest.approx(rank.tally.boundary_s)
        assert rank.tally.boundary_s <= rank.left_s


# Repeating


def told(given: Plan) -> bytes:
    """All that happens in a run, and all that is counted, as text: floats in full."""
    events: list = []
    outcome = simulated(given, lambda *event: events.append(event))
    counts = [(dataclasses.asdict(rank.tally), rank.bytes_sent, rank.left_s) for rank in outcome.ranks]
    assert events or given.algorithm.name == "independent"
    return json.dumps([events, counts, outcome.virtual_s, outcome.rounds, outcome.fragments], default=list).encode()


def conditioned(algorithm: str, seed: int) -> Plan:
    """Stragglers, stalls and a slow link."""
    compute, network = from_condition(parse("link=1mbit+step=100ms+straggler=last:3x+stall=1s@5%"), 8, seed)
    return plan(algorithm, 8, compute, network, steps=100)


@pytest.mark.parametrize("algorithm", registry.names())
def test_the_same_seed_gives_the_same_trace_byte_for_byte_and_another_one_another(algorithm):
    first = told(conditioned(algorithm, 3))
    assert told(conditioned(algorithm, 3)) == first
    assert told(conditioned(algorithm, 4)) != first


@pytest.mark.parametrize("algorithm", COMMUNICATING)
def test_the_number_of_torchs_threads_changes_no_byte_of_the_trace(algorithm):
    compute = LogNormal(0.1, 0.4, 7)
    before = torch.get_num_threads()
    traces = []
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            traces.append(told(plan(algorithm, 64, compute, steps=40)))
    finally:
        torch.set_num_threads(before)
    assert traces[0] == traces[1] == traces[2]


def pulls_of_a_servers_workers(**of_the_network) -> list[list[float]]:
    """How long each of three workers waits each time, one after the other, whose message alone would take 0.63 s."""
    plan = Plan(
        registry.find("parameter_server"),
        ranks=4,
        compute=Constant(0.1),
        network=Network(4, 2.5e6, **of_the_network),
        vector=Vector(391_466),
        samples=None,
        seconds=120.0,
    )
    waits: list[list[float]] = [[] for _ in range(4)]

    def note(rank: int, kind: str, begin_s: float, end_s: float) -> None:
        if kind == "wait":
            waits[rank].append(end_s - begin_s)

    simulated(plan, note)
    return waits[1:]


def test_uneven_shares_keep_the_workers_of_a_server_from_marching_in_step():
    # In step the server's link down rests while all pull, and up while all push: half of what it could carry.
    in_step, uneven = (sum(map(len, pulls_of_a_servers_workers(share_spread=spread))) for spread in (0.0, 0.2))
    assert uneven > 1.2 * in_step


def test_with_windows_the_workers_of_a_server_fall_into_taking_turns():
    settled = [waits[-20:-1] for waits in pulls_of_a_servers_workers(share_spread=0.2, first_window_bytes=90_000)]
    # The link is never idle: three messages between one pull of a worker and its next, a step of 0.1 s among them.
    assert [sum(waits) / len(waits) for waits in settled] == pytest.approx([3 * 0.6264 - 0.1] * 3, rel=0.02)
