"""The algorithms' own texts in virtual time: when things happen, and what is computed."""

from __future__ import annotations

import gc
import weakref
from itertools import pairwise, repeat

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lasgd.algorithms import registry
from lasgd.algorithms.requests import AllReduceMean
from lasgd.errors import ProtocolError
from lasgd.pace import End, Pace
from lasgd.replica import Replica
from lasgd.tally import Tally
from lasgd.virtual.cluster import Cluster, Rank
from lasgd.virtual.network_models import Network
from lasgd.virtual.timing_replica import TimingReplica, Vector
from scripted_driver import Point


class Descent:
    """Plain SGD on 0.5 |x - target|^2."""

    def __init__(self, model: Point, target, lr: float):
        self.model, self.target = model, torch.as_tensor(target, dtype=model.x.dtype)
        self.optimizer = torch.optim.SGD(model.parameters(), lr=lr)

    def begin(self) -> None:
        pass

    def gradient(self) -> None:
        self.optimizer.zero_grad()
        self.model(self.target).backward()

    def update(self, progress: float) -> None:
        self.optimizer.step()


class Run:
    """A cluster, its agreement and its trace, in the order in which things happened."""

    def __init__(
        self,
        algorithm,
        replicas,
        step_s,
        round_s,
        works=None,
        samples=100,
        vector_bytes=40,
        settings=None,
        **pace_options,
    ):
        text = registry.find(algorithm, settings)
        n = len(replicas)
        self.paces = [Pace(n, samples, **pace_options) for _ in range(1 if text.agrees else n)]
        self.trace: list[tuple] = []
        self.ranks = [
            Rank(replica, repeat(step_s[i] if isinstance(step_s, list) else step_s), works[i] if works else None)
            for i, replica in enumerate(replicas)
        ]
        seconds = round_s if callable(round_s) else lambda n_bytes, share: round_s * share
        self.cluster = Cluster(
            text.compute,
            text.communicate,
            self.ranks,
            self.paces,
            seconds,
            vector_bytes,
            lambda *e: self.trace.append(e),
            exchange=text.exchange,
            messages_over=Network(n, 4 / 3 * vector_bytes / seconds(0, 1.0)) if text.writes_messages else None,
        )
        self.cluster.run()

    def of(self, rank: int, kind: str) -> list[tuple[float, float]]:
        return [(round(b, 9), round(e, 9)) for r, k, b, e in self.trace if (r, k) == (rank, kind)]


def timed(n: int, elements: int = 10, fragments: int = 1) -> list[TimingReplica]:
    vector = Vector(elements)
    return [TimingReplica(vector, Tally(1, rank), fragments) for rank in range(n)]


def points(values, fragments: int = 1, dtype=torch.float64, **options) -> list[Replica]:
    return [Replica(Point(value, dtype), Tally(1, rank), fragments, **options) for rank, value in enumerate(values)]


# Time


def test_local_steps_follow_each_other_without_a_gap_however_slow_the_network():
    run = Run("lasgd", timed(3), 1.0, 7.0, samples=30)
    for rank in range(3):
        steps = run.of(rank, "compute")
        assert steps[:10] == [(float(k), float(k + 1)) for k in range(10)]
    assert all(rank.tally.waited_s == 0 for rank in run.ranks)


def test_rounds_are_back_to_back_on_a_slow_network_and_once_a_step_on_a_fast_one():
    slow = Run("lasgd", timed(2), 1.0, 2.5, samples=40)
    assert slow.of(0, "round")[:4] == [(1.0, 3.5), (4.5, 7.0), (7.0, 9.5), (9.5, 12.0)], (
        "how long a round takes is known to all only after the second"
    )
    fast = Run("lasgd", timed(2), 1.0, 0.25, samples=40)
    begins = [begin for begin, _ in fast.of(0, "round")]
    assert [b - a for a, b in pairwise(begins[2:10])] == pytest.approx([1.0] * 7)


def test_a_straggler_changes_neither_the_others_steps_nor_the_rounds():
    alone = Run("lasgd", timed(4), 1.0, 0.5, samples=200)
    held = Run("lasgd", timed(4), [1.0, 1.0, 1.0, 4.0], 0.5, samples=163)
    assert held.of(0, "compute")[:40] == alone.of(0, "compute")[:40]
    assert held.of(0, "round")[3:40] == [(b + 3.0, e + 3.0) for b, e in alone.of(0, "round")[3:40]], (
        "the first round waits for the straggler's first gradient, three seconds later"
    )


def test_synchronous_sgd_waits_for_the_slowest_rank_and_the_network_in_every_step():
    run = Run("sync_sgd", timed(3), [1.0, 1.0, 2.0], 0.5, samples=15)
    assert run.of(0, "round")[:3] == [(1.0, 2.5), (3.5, 5.0), (6.0, 7.5)]
    assert run.ranks[0].tally.waited_s == pytest.approx(1.5 * run.cluster.rounds)
    assert run.ranks[2].tally.waited_s == pytest.approx(0.5 * run.cluster.rounds)


def test_local_sgd_waits_once_in_h_steps():
    run = Run("local_sgd", timed(2), 1.0, 2.0, samples=24, steps_per_round=3)
    assert run.of(0, "round") == [(3.0, 5.0), (8.0, 10.0), (13.0, 15.0), (18.0, 20.0)]
    assert [rank.tally.local_steps for rank in run.ranks] == [12, 12]
    assert run.paces[0].end is End.SAMPLES


def test_independent_ranks_end_each_at_its_own_share():
    run = Run("independent", timed(2), [1.0, 3.0], 1.0, samples=20)
    assert [rank.left_s for rank in run.ranks] == [10.0, 30.0]
    assert not run.of(0, "round")


def test_fragments_shorten_a_round_by_their_share():
    run = Run("lasgd", timed(2, fragments=5), 1.0, 5.0, samples=60, fragments=5)
    assert {round(end - begin, 9) for begin, end in run.of(0, "round")} == {1.0}


def test_auto_finds_the_fragments_that_the_network_asks_for():
    run = Run("lasgd", timed(2, elements=1000), 1.0, 6.0, samples=400, vector_bytes=4000, fragments="auto")
    assert run.paces[0].fragments == 6


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.sampled_from([0.5, 1.0, 1.7, 6.0]), min_size=1, max_size=4),
    st.sampled_from([0.01, 0.4, 3.3]),
    st.sampled_from([1, 3, "auto"]),
    st.sampled_from(registry.names()),
)
def test_with_and_without_gradients_the_same_things_happen_at_the_same_times(steps, round_s, fragments, algorithm):
    parts = fragments if fragments == 3 and algorithm == "lasgd" else 1
    asked = fragments if algorithm == "lasgd" else 1
    n, size = len(steps), 10
    bare = Run(algorithm, timed(n, size, parts), steps, round_s, samples=30, fragments=asked)
    models = [Point(torch.zeros(size), torch.float32) for _ in range(n)]
    works = [Descent(model, torch.full((size,), float(i)), 0.1) for i, model in enumerate(models)]
    real = Run(
        algorithm,
        [Replica(m, Tally(1, rank), parts) for rank, m in enumerate(models)],
        steps,
        round_s,
        works,
        samples=30,
        fragments=asked,
    )
    assert bare.trace == real.trace
    for one, other in zip(bare.ranks, real.ranks, strict=True):
        assert one.tally.staleness == other.tally.staleness
        assert (one.tally.local_steps, one.bytes_sent) == (other.tally.local_steps, other.bytes_sent)


def test_ranks_that_wait_for_each_other_for_ever_are_reported_not_waited_for():
    def quits(replica, pace):
        if replica is replicas[1]:
            return
        yield from registry.find("lasgd").communicate(replica, pace)

    replicas = timed(3)
    pace = Pace(3, 10**9)
    ranks = [Rank(r, iter([1.0] * 5)) for r in replicas]
    cluster = Cluster(_five_steps, quits, ranks, [pace], lambda n_bytes, share: 1.0, 40)
    with pytest.raises(ProtocolError, match=r"ranks 0, 2 in round 1 wait for rank 1\."):
        cluster.run()


@pytest.mark.parametrize("algorithm", registry.names())
def test_a_cluster_that_has_run_is_gone_when_nobody_needs_it_any_more(algorithm):
    text, ranks = registry.find(algorithm), [Rank(replica, repeat(1.0)) for replica in timed(3)]
    paces = [Pace(3, 30) for _ in range(1 if text.agrees else 3)]
    cluster = Cluster(
        text.compute,
        text.communicate,
        ranks,
        paces,
        lambda n_bytes, share: 0.5,
        40,
        exchange=text.exchange,
        messages_over=Network(3, 100.0) if text.writes_messages else None,
    )
    cluster.run()
    still_there = weakref.ref(cluster)
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        del cluster
        assert still_there() is None, "a sweep over many clusters would keep them all"
    finally:
        if was_enabled:
            gc.enable()


def _five_steps(replica, pace):
    from lasgd.algorithms.requests import Gradient, Update

    for _ in range(5):
        yield Gradient()
        yield Update()
        replica.merge()


@pytest.mark.parametrize("name", registry.names())
def test_what_the_registry_says_of_gradients_is_what_the_text_asks_for(name, monkeypatch):
    asked: list[AllReduceMean] = []
    join = Cluster._join
    monkeypatch.setattr(Cluster, "_join", lambda self, *given: asked.append(given[1]) or join(self, *given))
    run = Run(name, timed(2), 1.0, 0.1, samples=20)
    rounds = [request.sent for request in asked if not request.exact]
    assert bool(rounds) == (run.paces[0].round > 0)
    assert registry.find(name).averages_gradients == (bool(rounds) and all(sent.is_gradient for sent in rounds))


# Values


@pytest.mark.parametrize("algorithm", ["lasgd", "local_sgd", "sync_sgd", "independent"])
def test_one_rank_is_plain_sgd_bit_for_bit(algorithm):
    target = torch.tensor([3.0, -1.0, 0.5])
    model = Point(torch.tensor([0.1, 0.2, 0.3]), torch.float32)
    run = Run(algorithm, [Replica(model, Tally(1))], 1.0, 0.3, [Descent(model, target, 0.07)], samples=20)
    reference = Point(torch.tensor([0.1, 0.2, 0.3]), torch.float32)
    plain = Descent(reference, target, 0.07)
    iterates = []
    for _ in range(run.ranks[0].tally.local_steps):
        plain.gradient()
        plain.update(0.0)
        iterates.append(reference.x.detach().clone())
    # steps that end after the agreed end are discarded: at 1 s a step and 0.3 s a round, two
    assert any(torch.equal(model.x, iterate) for iterate in iterates[-3:])


@pytest.mark.parametrize("algorithm", ["lasgd", "local_sgd", "sync_sgd"])
def test_replicas_end_equal_bit_for_bit_near_the_optimum_of_the_mean(algorithm):
    targets = [-2.0, 0.5, 4.5]
    replicas = points([[0.3], [0.3], [0.3]], dtype=torch.float32)
    models = [replica.layout.entries[0].owner for replica in replicas]
    works = [Descent(model, [target], 0.05) for model, target in zip(models, targets, strict=True)]
    Run(algorithm, replicas, [1.0, 1.3, 1.0], 0.4, works, samples=3000)
    assert all(torch.equal(model.x, models[0].x) for model in models)
    assert models[0].x.item() == pytest.approx(1.0, abs=0.1)


def test_synchronous_sgd_is_sgd_on_the_mean_gradient():
    targets, lr, steps = [-2.0, 0.5, 4.5], 0.05, 12
    replicas = points([[0.3]] * 3)
    models = [replica.layout.entries[0].owner for replica in replicas]
    works = [Descent(model, [target], lr) for model, target in zip(models, targets, strict=True)]
    run = Run("sync_sgd", replicas, 1.0, 0.4, works, samples=3 * (steps - 1))
    assert run.ranks[0].tally.local_steps == steps
    expected = 1.0 + (0.3 - 1.0) * (1 - lr) ** steps
    assert models[1].x.item() == pytest.approx(expected, abs=1e-12)


def test_the_same_input_gives_the_same_trace_and_bits():
    def once():
        replicas = points([[0.1, 0.2]] * 3, fragments=2)
        models = [replica.layout.entries[0].owner for replica in replicas]
        works = [Descent(model, [float(i), 2.0], 0.03) for i, model in enumerate(models)]
        run = Run("lasgd", replicas, [1.0, 1.1, 3.0], 0.7, works, samples=200, fragments=2)
        return run.trace, [model.x.detach().clone() for model in models]

    (first, xs), (second, ys) = once(), once()
    assert first == second
    assert all(torch.equal(x, y) for x, y in zip(xs, ys, strict=True))
