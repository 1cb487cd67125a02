"""The contract, over the scripted network and over torch.distributed's Gloo."""

from __future__ import annotations

import re
import threading
import time

import pytest
import torch
import torch.distributed as dist

from group_contract import GroupContract
from helpers import raise_any, wait_all
from lasgd.errors import ConfigurationError, PeerError
from lasgd.group import c10d, gloo
from lasgd.group.c10d import C10dGroup
from lasgd.group.gloo import GlooConnections
from lasgd.group.scripted import Network


class TestScripted(GroupContract):
    def make(self, world_size):
        network = Network(world_size, deliver_at_once=True)
        return [lambda rank=rank: network.group(rank) for rank in range(world_size)]


class TestC10d(GroupContract):
    def make(self, world_size):
        store = dist.HashStore()
        return [
            lambda rank=rank: C10dGroup(dist.PrefixStore("run", store), rank, world_size, 20.0)
            for rank in range(world_size)
        ]


def test_a_rank_that_never_joins_is_named():
    store = dist.HashStore()
    joins = [lambda rank=rank: C10dGroup(dist.PrefixStore("run", store), rank, 3, 0.3) for rank in (0, 2)]
    for error in wait_all(joins):
        assert isinstance(error, PeerError)
        assert re.search(r"nothing from rank 1 after \d+\.\d+ s", str(error)), error


def test_a_rank_that_is_lost_while_gloo_connects_is_named_and_ends_in_time_itself(monkeypatch):
    stuck = threading.Event()

    def connect(store, rank, world_size, timeout):
        if rank == 0:
            raise RuntimeError("Connect timeout")
        stuck.wait(20.0)

    monkeypatch.setattr(dist, "ProcessGroupGloo", connect)
    monkeypatch.setattr(gloo, "ANSWER_S", 2.5)
    store = dist.HashStore()
    joins = [lambda rank=rank: C10dGroup(dist.PrefixStore("run", store), rank, 2, 1.0) for rank in range(2)]
    errors = wait_all(joins)
    stuck.set()
    assert all(isinstance(error, PeerError) for error in errors)
    assert "rank 0 of 2: no Gloo connection to the other ranks: Connect timeout" in str(errors[0])
    assert "silent: rank 1" in str(errors[0])
    assert "rank 1 of 2: no Gloo connection to the other ranks: no answer within 3.5 s" in str(errors[1])
    assert "Rank 0 left: rank 0 of 2" in str(errors[1])


def test_a_place_that_is_taken_is_refused_and_those_who_are_there_never_hear_of_it():
    store = dist.HashStore()

    def join(rank: int) -> C10dGroup:
        return C10dGroup(dist.PrefixStore("run", store), rank, 2, 20.0)

    groups = raise_any(wait_all([lambda: join(0), lambda: join(1)]))
    with pytest.raises(ConfigurationError, match=r"rank 1 of 2: RANK=1 is taken by process \d+ on .* RANK of its own"):
        join(1)
    sums = [torch.ones(1), torch.ones(1)]
    headers = [torch.zeros(1, dtype=torch.float64) for _ in groups]
    raise_any(wait_all([lambda r=r: groups[r].wait_all_reduce(headers[r], sums[r], 20.0) for r in range(2)]))
    assert [s.item() for s in sums] == [2.0, 2.0]
    assert not any(group._notices.is_there_trouble() for group in groups)
    wait_all([group.leave for group in groups])


@pytest.mark.parametrize("first, other", [(2, 3), (3, 2)])
def test_world_sizes_that_differ_are_named_on_the_rank_that_finds_out_and_told_to_the_others(first, other):
    store = dist.HashStore()
    store.set("run/world_size", f"{first} 0")  # rank 0 is the first to come
    sizes = (first, other)
    begin_s = time.monotonic()
    errors = wait_all([lambda r=r: C10dGroup(dist.PrefixStore("run", store), r, sizes[r], 15.0) for r in range(2)])
    assert time.monotonic() - begin_s < 10.0  # at once, not after the time-out
    words = f"ranks disagree on WORLD_SIZE: rank 0 has {first}, rank 1 has {other}"
    assert isinstance(errors[1], ConfigurationError) and words in str(errors[1])
    assert isinstance(errors[0], PeerError) and f"Rank 1 left: {words}" in str(errors[0])


@pytest.mark.parametrize(
    "environment, words",
    [
        ({"RANK": "two"}, "RANK should be a whole number, got 'two'"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 is not one of 0 to 1, for WORLD_SIZE=2"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK=-1 is not one of 0 to 1"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "WORLD_SIZE=0 should be at least 1"),
        ({"RANK": "0"}, "RANK=0 is set, WORLD_SIZE is not"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 is set, RANK is not"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR= and MASTER_PORT= do not say where rank 0 is"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "here", "MASTER_PORT": "70000"}, "MASTER_PORT=70000 do not"),
        (
            {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "here", "MASTER_PORT": "http"},
            "MASTER_PORT should be",
        ),
    ],
)
def test_an_environment_that_cannot_work_is_a_configuration_error(monkeypatch, environment, words):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigurationError, match=words):
        c10d.connect(1.0)


def test_without_an_environment_a_rank_is_alone(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    group = c10d.connect(5.0)
    assert (group.rank, group.world_size) == (0, 1)
    group.leave()


def test_nothing_arrives_over_the_scripted_network_until_the_test_says_so():
    network = Network(2)
    groups = [network.group(rank) for rank in range(2)]
    vectors = [torch.tensor([1.0]), torch.tensor([2.0])]

    def rank(r):
        return lambda: groups[r].wait_all_reduce(torch.zeros(1), vectors[r], 10.0)

    def script():
        network.wait_joined()
        before = [v.item() for v in vectors]
        network.deliver()
        network.wait_joined()
        network.fail(PeerError("planned"))
        return before

    def twice(r):
        def run():
            rank(r)()
            with pytest.raises(PeerError, match="planned"):
                rank(r)()

        return run

    results = wait_all([twice(0), twice(1), script])
    assert results == [None, None, [1.0, 2.0]]
    assert [v.item() for v in vectors] == [3.0, 3.0]
    assert network.collectives == 2


def test_collectives_in_different_orders_are_an_error_not_a_wrong_sum():
    network = Network(2, deliver_at_once=True)
    first, second = network.group(0), network.group(1)
    results = wait_all(
        [
            lambda: first.wait_exchange("a", b"", 0.5),
            lambda: second.wait_exchange("b", b"", 0.5),
        ]
    )
    assert all(isinstance(result, PeerError) for result in results)
    assert any("out of order" in str(result) for result in results)


class _Work:
    """A collective that ends between the time-out of one look and the question whether it has ended."""

    def __init__(self, error: Exception | None):
        self.error, self.looks = error, 0

    def wait(self, timeout=None):
        self.looks += 1
        if self.looks == 1:
            raise RuntimeError("Operation timed out!")
        if self.error:
            raise self.error

    def is_completed(self) -> bool:
        return True


def test_a_collective_that_ends_well_just_after_a_look_has_not_failed():
    work = _Work(error=None)
    GlooConnections.wait_done(object.__new__(GlooConnections), work)
    assert work.looks == 2


def test_a_collective_that_fails_just_after_a_look_gives_its_own_error():
    with pytest.raises(RuntimeError, match="reset by peer"):
        GlooConnections.wait_done(object.__new__(GlooConnections), _Work(RuntimeError("reset by peer")))
