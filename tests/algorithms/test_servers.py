"""A parameter server and an elastic centre, against their equations written out for a schedule made by hand."""

from __future__ import annotations

import math

import pytest

from lasgd.virtual.network_models import Network
from quadratics import Run

TARGETS = [4.0, -2.0, 7.0]
STEP_S = [1.0, 2.6, 1.7]  # no two pushes at the same moment until 10 s
LR = 0.1
UNTIL_S = 9.9


def pushes(steps: int = 1) -> list[tuple[float, int]]:
    """(when, who), in order, up to UNTIL_S, of workers that push every so many steps and are answered at once."""
    times = [(k * steps * step_s, rank) for rank, step_s in enumerate(STEP_S) for k in range(1, 20)]
    return sorted((when, rank) for when, rank in times if when <= UNTIL_S)


def descended(x: float, target: float, steps: int) -> float:
    return target + (x - target) * (1 - LR) ** steps


def run(name: str, **options) -> Run:
    return Run(name, [[t] for t in TARGETS], steps=10**6, lr=LR, step_s=STEP_S, stop_at_s=UNTIL_S + 0.05, **options)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("staleness_aware", [False, True])
def test_the_server_takes_updates_in_the_order_of_arrival_each_of_what_its_worker_had_pulled(steps, staleness_aware):
    ended = run("parameter_server", steps_per_round=steps, settings={"staleness_aware": staleness_aware})
    server = 0.0
    pulled, versions = [0.0] * 3, [0] * 3
    staleness: list[list[int]] = [[], [], []]
    for version, (_, rank) in enumerate(pushes(steps)):
        others = version - versions[rank]
        staleness[rank].append(others)
        learnt = descended(pulled[rank], TARGETS[rank], steps) - pulled[rank]
        server += learnt / (max(1, others) if staleness_aware else 1)
        pulled[rank], versions[rank] = server, version + 1
    for rank in range(3):
        steps_since = ended.steps[rank] % steps
        assert ended.x(rank).item() == pytest.approx(descended(pulled[rank], TARGETS[rank], steps_since), abs=1e-12)
        counted = ended.ranks[rank].tally.staleness
        assert counted.merges == len(staleness[rank]) == ended.ranks[rank].tally.exchanges
        assert counted.total_steps == sum(staleness[rank])
        assert counted.histogram == {s: staleness[rank].count(s) for s in staleness[rank]}
    if steps == 1:
        assert staleness[1] == [3, 5, 3], "those at 1, 1.7, 2 s; at 3, 3.4, 4, 5, 5.1 s; at 6, 6.8, 7 s"


def test_a_worker_that_starts_before_the_server_has_anything_is_served_when_it_has():
    ended = Run("parameter_server", [[1.0], [1.0]], steps=4, step_s=[5.0, 1.0], lr=LR)
    assert ended.of(1, "wait")[0] == (1.0, 5.0)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("pull", [0.25, 1.0, None])
def test_worker_and_centre_move_towards_each_other(steps, pull):
    alpha = 0.9 / 3 if pull is None else pull
    ended = run("easgd", steps_per_round=steps, settings={} if pull is None else {"pull": pull})
    centre, xs = 0.0, [0.0] * 3
    for _, rank in pushes(steps):
        x = descended(xs[rank], TARGETS[rank], steps)
        xs[rank], centre = x - alpha * (x - centre), centre + alpha * (x - centre)
    for rank in range(3):
        since = ended.steps[rank] % steps
        assert ended.x(rank).item() == pytest.approx(descended(xs[rank], TARGETS[rank], since), abs=1e-12)


@pytest.mark.parametrize("name", ["parameter_server", "easgd"])
def test_workers_that_push_at_once_share_the_servers_link(name):
    bytes_per_s = 100.0
    message_s = (8 + 64) / bytes_per_s  # one float64 and the head
    ended = Run(name, [[1.0]] * 4, steps=10, lr=LR, network=Network(4, bytes_per_s))
    # Three messages share the link to the server, and then three answers the link back.
    assert ended.of(1, "wait")[0] == pytest.approx((1.0, 1.0 + 6 * message_s))
    alone = Run(name, [[1.0]] * 2, steps=10, lr=LR, network=Network(2, bytes_per_s, latency_s=0.1))
    assert alone.of(1, "wait")[0] == pytest.approx((1.0, 1.0 + 2 * (message_s + 0.1)))


def test_what_the_server_is_sent_after_the_agreed_end_is_dropped_and_nobody_waits_for_it():
    ended = Run("parameter_server", [[1.0]] * 3, steps=3, lr=LR, network=Network(3, math.inf, latency_s=50.0))
    assert ended.cluster.ended_s is not None and ended.cluster.ended_s < 50.0
    assert all(rank.tally.waited_s <= ended.cluster.ended_s for rank in ended.ranks)
