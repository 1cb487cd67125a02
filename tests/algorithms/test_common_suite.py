"""What every algorithm of the registry must do: its own text, in virtual time, on quadratics with a known optimum."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from lasgd.algorithms import registry
from lasgd.pace import End
from lasgd.virtual.network_models import Network
from quadratics import Run, decaying

NAMES = registry.names()
AGREEING = [name for name in NAMES if registry.find(name).agrees]

SETTINGS = {"diloco": {"outer_lr": 0.5, "outer_momentum": 0.5}, "easgd": {"pull": 0.3}}
"""Where the defaults are not for one local step at a time, or for so few."""

RATE = {"parameter_server": 0.1}
"""n workers take n updates where the others take one of their mean."""

WAIT_FOR_ALL = ["local_sgd", "sync_sgd", "post_local_sgd", "diloco", "overlap_local_sgd", "cocod_sgd"]
WAIT_FOR_NEIGHBOURS = ["d_psgd", "sgp"]
WAIT_FOR_A_SERVER = ["parameter_server", "easgd"]
NEVER_WAIT = ["lasgd", "osgp", "ad_psgd", "independent"]

TARGETS = [[-2.0, 1.0], [0.5, 3.0], [4.5, -1.0], [1.0, 1.0]]
OPTIMUM = torch.tensor(TARGETS, dtype=torch.float64).mean(0)


def run(name: str, targets=TARGETS, steps: int = 400, lr=None, **options) -> Run:
    rate = RATE.get(name, 0.2)
    options = {"settings": SETTINGS.get(name)} | options
    return Run(name, targets, steps=steps, lr=decaying(rate) if lr is None else lr, **options)


def test_every_algorithm_is_in_one_of_the_groups():
    groups = WAIT_FOR_ALL + WAIT_FOR_NEIGHBOURS + WAIT_FOR_A_SERVER + NEVER_WAIT
    assert sorted(groups) == sorted(NAMES)


# Learning


@pytest.mark.parametrize("name", AGREEING)
@pytest.mark.parametrize("is_slow", [False, True], ids=["fast", "slow"])
def test_every_algorithm_ends_at_the_optimum_of_the_mean_with_equal_replicas(name, is_slow):
    # A message is of 80 bytes. At a server whoever waits less counts more: there the link must not make much of it.
    network = Network(4, 8000.0 if name in WAIT_FOR_A_SERVER else 40.0, latency_s=0.01)
    ended = run(name, network=network, round_s=1.7) if is_slow else run(name)
    assert ended.paces[0].end is End.SAMPLES
    assert all(torch.equal(ended.x(0), x) for x in ended.xs)
    torch.testing.assert_close(ended.x(0), OPTIMUM, rtol=0, atol=0.1)


@pytest.mark.parametrize("wire", ["bf16", "int8"])
def test_a_coarse_wire_format_ends_there_too_with_equal_replicas(wire):
    ended = run("lasgd", wire=wire, round_s=1.7)
    assert all(torch.equal(ended.x(0), x) for x in ended.xs)
    torch.testing.assert_close(ended.x(0), OPTIMUM, rtol=0, atol=0.1)


def test_independent_ranks_end_each_at_its_own_optimum():
    ended = run("independent")
    torch.testing.assert_close(ended.xs, torch.tensor(TARGETS, dtype=torch.float64), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", AGREEING)
@pytest.mark.parametrize("steps_per_round", [3, 8])
def test_fewer_rounds_end_there_too(name, steps_per_round):
    ended = run(name, steps_per_round=steps_per_round)
    assert all(torch.equal(ended.x(0), x) for x in ended.xs)
    torch.testing.assert_close(ended.x(0), OPTIMUM, rtol=0, atol=0.2)


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"diloco", "overlap_local_sgd", "easgd"}))
def test_one_rank_is_torchs_sgd_with_momentum_bit_for_bit(name):
    """But for an outer step, an anchor or a centre, which are momentum or averages over time of one replica too."""
    iterates: list[torch.Tensor] = []
    ended = run(name, [[3.0, -1.0]], steps=20, lr=0.07, momentum=0.9, dtype=torch.float32)
    alone = Run("independent", [[3.0, -1.0]], steps=40, lr=0.07, momentum=0.9, dtype=torch.float32)
    plain = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([plain], lr=0.07, momentum=0.9)
    for _ in range(40):
        optimizer.zero_grad()
        (0.5 * (plain - torch.tensor([3.0, -1.0])).square().sum()).backward()
        optimizer.step()
        iterates.append(plain.detach().clone())
    assert torch.equal(alone.x(0), iterates[-1])
    # Steps after the agreed end are discarded, so at 1 s a step and 0.1 s a round the last one or two are not in it.
    assert any(torch.equal(ended.x(0), iterate) for iterate in iterates[17:22])


@pytest.mark.parametrize("name", NAMES)
def test_the_same_input_gives_the_same_trace_and_bits(name):
    def once() -> tuple[list, torch.Tensor]:
        ended = run(name, steps=40, step_s=[1.0, 1.1, 0.7, 3.0], network=Network(4, 30.0, latency_s=0.01))
        return ended.trace, ended.xs

    (first, xs), (second, ys) = once(), once()
    assert first == second
    assert torch.equal(xs, ys)


SYNCHRONOUS = [name for name in NAMES if registry.find(name).is_synchronous]


def test_those_that_wait_for_all_or_for_neighbours_are_synchronous():
    assert sorted(SYNCHRONOUS) == sorted(WAIT_FOR_ALL + WAIT_FOR_NEIGHBOURS)


@pytest.mark.parametrize("name", NAMES)
def test_time_decides_when_synchronous_algorithms_learn_and_not_what(name):
    def points(step_s: list[float], bandwidth: float, round_s: float) -> list[torch.Tensor]:
        network = Network(4, bandwidth, latency_s=0.01)
        ended = run(name, steps=40, lr=0.1, steps_per_round=2, step_s=step_s, network=network, round_s=round_s)
        return ended.works[1].points[:30]

    even, uneven = points([1.0] * 4, 8000.0, 0.1), points([1.0, 1.1, 0.7, 3.0], 30.0, 1.7)
    same = all(torch.equal(one, other) for one, other in zip(even, uneven, strict=True))
    assert same == (name in SYNCHRONOUS or name == "independent")


# Health


@pytest.mark.parametrize("name", sorted(set(AGREEING) - {"sync_sgd"}))
def test_nan_on_one_rank_is_healed_by_the_others(name):
    steps = 400
    # After 5 updates: before the half of the budget in which post_local_sgd averages gradients is over, a replica with
    # NaN stays as it is; after it the others' mean replaces it.
    ended = run(name, steps=steps, poison=(1, steps * 3 // 4 if name == "post_local_sgd" else 5))
    assert ended.works[1].updates > 5
    assert torch.isfinite(ended.xs).all()
    assert all(torch.equal(ended.x(0), x) for x in ended.xs)
    torch.testing.assert_close(ended.x(0), OPTIMUM, rtol=0, atol=0.3)


# Waiting


@pytest.mark.parametrize("name", [name for name in NEVER_WAIT if name != "independent"])
def test_a_straggler_slows_nobody_who_never_waits(name):
    slow = run(name, steps=60, step_s=[1.0, 1.0, 1.0, 4.0], network=Network(4, 30.0))
    alone = run("independent", steps=60)
    for rank in range(3):
        steps = slow.of(rank, "compute")
        assert steps[:40] == alone.of(rank, "compute")[:40]
        assert slow.ranks[rank].tally.waited_s == 0
        assert not slow.of(rank, "wait")
    assert slow.steps[3] < slow.steps[0] / 3


@pytest.mark.parametrize("name", WAIT_FOR_ALL + WAIT_FOR_NEIGHBOURS)
def test_a_straggler_slows_all_who_wait_for_each_other(name):
    slow = run(name, steps=40, step_s=[1.0, 1.0, 1.0, 4.0])
    assert slow.cluster.ended_s is not None
    for rank in range(3):
        # Neighbours on a ring may be a step or two ahead of the straggler, not more.
        assert slow.steps[rank] <= slow.steps[3] + 3
        assert slow.ranks[rank].tally.waited_s > 0.6 * slow.cluster.ended_s


@pytest.mark.parametrize("name", WAIT_FOR_A_SERVER)
def test_workers_of_a_server_wait_for_its_answer_and_for_no_straggler(name):
    network = Network(4, math.inf, latency_s=0.25)
    slow = run(name, steps=40, step_s=[1.0, 1.0, 1.0, 4.0], network=network)
    assert slow.steps[1] == slow.steps[2] > 2.8 * slow.steps[3], "1.5 s a step instead of 4.5"
    assert [round(e - b, 9) for b, e in slow.of(1, "wait")[:5]] == [0.5] * 5, "there and back"
    assert slow.ranks[0].tally.waited_s == 0, "what a rank writes to itself is there at once"


@pytest.mark.parametrize("name", NAMES)
def test_times_add_up_whoever_waits_for_whom(name):
    ended = run(name, steps=50, step_s=[1.0, 1.3, 0.6, 2.0], network=Network(4, 25.0, latency_s=0.02), round_s=2.3)
    for rank in ended.ranks:
        assert rank.left_s is not None
        assert rank.compute_s + rank.tally.waited_s == pytest.approx(rank.tally.boundary_s)
        assert rank.tally.boundary_s <= rank.left_s
        assert sum(rank.tally.staleness.histogram.values()) == rank.tally.staleness.merges
    for rank in range(4):
        waits = ended.of(rank, "wait")
        assert sum(e - b for b, e in waits) == pytest.approx(ended.ranks[rank].tally.waited_s)
        busy = sorted(ended.of(rank, "compute") + ended.of(rank, "update") + waits)
        assert all(one[1] <= other[0] for one, other in pairwise(busy)), "one thing at a time"


# Counting


@pytest.mark.parametrize("name", AGREEING)
def test_staleness_is_counted_by_those_whose_averages_travel_meanwhile(name):
    tallies = [rank.tally for rank in run(name, steps=60, network=Network(4, 10.0), round_s=2.5).ranks]
    stale = {"lasgd", "cocod_sgd", "osgp", "ad_psgd", "parameter_server"}
    assert (max(tally.staleness.max_steps for tally in tallies) > 0) == (name in stale)


@pytest.mark.parametrize("name", AGREEING)
def test_messages_are_counted_as_exchanges_and_in_bytes(name):
    ended = run(name, steps=30)
    writes = registry.find(name).writes_messages
    for rank in ended.ranks:
        assert (rank.tally.exchanges > 0) == writes
        assert rank.bytes_sent > 0


@pytest.mark.parametrize("name", AGREEING)
def test_no_gradient_is_computed_and_no_update_made_after_the_agreed_end(name):
    ended = run(name, steps=30, step_s=[1.0, 1.1, 0.9, 2.5], steps_per_round=4)
    for rank, work in zip(ended.ranks, ended.works, strict=True):
        assert work.updates == rank.tally.local_steps
        assert work.gradients - work.updates in (0, 1), "a local step that waited for a message is dropped"
