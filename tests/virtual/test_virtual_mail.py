"""Messages between virtual ranks: their order, their time, and the end that sets free who waits for one."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import repeat

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lasgd.algorithms import agreement
from lasgd.algorithms.requests import Box, ExchangeEnded, Gradient, Message, NextExchange, Receive, Send, Stop, Update
from lasgd.errors import ProtocolError
from lasgd.pace import Pace
from lasgd.tally import Tally
from lasgd.virtual.clock import Clock
from lasgd.virtual.cluster import Cluster, Rank
from lasgd.virtual.network_models import Network
from lasgd.virtual.post import HEAD_BYTES, Post, links_for_messages
from lasgd.virtual.process import Moment
from lasgd.virtual.timing_replica import Size, TimingReplica, Vector


def posted(network: Network, letters: list[tuple[float, int, int, int]]) -> list[tuple[float, int, int, int]]:
    """Sends (when, from, to, bytes), each with its number for a note; (when, from, to, number) as they arrive."""
    clock, arrived = Clock(), []

    def take(letter) -> None:
        arrived.append((clock.now_s, letter.message.source, letter.target, letter.message.note))

    post = Post(clock, network, take)
    for number, (when, source, target, n_bytes) in enumerate(letters):

        def send(moment, source=source, target=target, n_bytes=n_bytes, number=number) -> None:
            post.send(target, Box.COMPUTE, Message(source, None, 1.0, number), n_bytes)

        clock.at(when, Moment(send))
    clock.run()
    return arrived


# The way


def test_a_message_takes_its_latency_and_its_bytes_over_the_slower_end():
    network = Network(3, [100.0, 50.0, 20.0], latency_s=0.25)
    assert posted(network, [(1.0, 0, 1, 100)]) == [(1.0 + 0.25 + 100 / 50, 0, 1, 0)]
    assert posted(network, [(1.0, 2, 0, 100)]) == [(1.0 + 0.25 + 100 / 20, 2, 0, 0)]


def test_two_messages_to_one_rank_share_its_link_and_the_longer_one_has_it_alone_then():
    arrived = posted(Network(3, math.inf, down_bytes_per_s=100.0), [(0.0, 1, 0, 100), (0.0, 2, 0, 300)])
    assert arrived == [(2.0, 1, 0, 0), (4.0, 2, 0, 1)]


def test_a_later_and_smaller_message_does_not_overtake_on_the_same_way():
    arrived = posted(Network(2, 100.0), [(0.0, 0, 1, 1000), (0.5, 0, 1, 1), (0.5, 1, 0, 1)])
    assert [(source, number) for _, source, _, number in arrived] == [(1, 2), (0, 0), (0, 1)]
    assert [when for when, *_ in arrived] == pytest.approx([0.51, 10.0, 10.01])


def test_what_a_rank_writes_to_itself_is_there_at_once():
    assert posted(Network(2, 1.0, latency_s=9.0), [(3.0, 1, 1, 10**9)]) == [(3.0, 1, 1, 0)]


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from([0.0, 0.1, 1.0, 1.5]), *[st.integers(0, 3)] * 2, st.sampled_from([1, 70, 999]))),
    st.sampled_from([10.0, 100.0, math.inf]),
    st.sampled_from([0.0, 0.3]),
    st.sampled_from([0.0, 0.5]),
    st.sampled_from([2.0, math.inf]),
)
def test_every_message_arrives_once_in_the_order_of_its_way_and_in_time(
    letters, bytes_per_s, latency_s, uneven, window_bytes
):
    network = Network(4, bytes_per_s, latency_s=latency_s, share_spread=uneven, first_window_bytes=window_bytes)
    arrived = posted(network, letters)
    assert sorted(number for *_, number in arrived) == list(range(len(letters)))
    assert arrived == posted(network, letters)
    for source in range(4):
        for target in range(4):
            sent = sorted((when, n) for n, (when, s, t, _) in enumerate(letters) if (s, t) == (source, target))
            assert [n for _, s, t, n in arrived if (s, t) == (source, target)] == [n for _, n in sent]
    for when, source, target, number in arrived:
        least_s = network.message_s(source, target, letters[number][3])
        assert when >= letters[number][0] + least_s - 1e-9


def test_where_only_an_all_reduces_time_is_known_messages_are_as_slow_as_on_its_links():
    network = links_for_messages(Network(4, 1000.0, latency_s=0.1, round_s=3.0), vector_bytes=300)
    # In a ring each of 4 ranks sends 2 x 3/4 of the vector: 450 bytes in 3 s.
    assert network.message_s(0, 1, 300) == pytest.approx(0.1 + 300 / 150)
    quick = Network(4, 1000.0)
    assert links_for_messages(quick, 300) is quick
    assert links_for_messages(Network(2, [1.0, 99.0], [5.0, 7.0], round_s=1.0), 10).up_bytes_per_s == (1.0, 10.0)


# Texts


def run(
    compute: Callable, exchange: Callable | None, n: int = 2, samples: int = 10**6, network=None, step_s=1.0
) -> tuple[Cluster, list[tuple]]:
    vector, trace = Vector(9), []
    ranks = [Rank(TimingReplica(vector, Tally(1, rank)), repeat(step_s)) for rank in range(n)]
    cluster = Cluster(
        compute,
        agreement.communicate,
        ranks,
        [Pace(n, samples)],
        lambda n_bytes, share: 0.0,
        vector.nbytes,
        lambda *event: trace.append(event),
        exchange=exchange,
        messages_over=network or Network(n, 100.0),
    )
    cluster.run()
    return cluster, trace


def test_a_receive_is_answered_by_sender_or_by_whoever_is_first():
    seen = []

    def compute(replica, pace):
        rank = replica.tally.rank
        yield Gradient()
        yield Update()
        if rank:
            yield Send(0, Box.COMPUTE, note=rank)
            yield Send(0, Box.COMPUTE, note=rank + 10)
        else:
            for peer in (2, None, None, None):
                seen.append((yield Receive(peer)).note)
        while pace.end is None:
            yield Gradient()
            yield Update()

    run(compute, None, n=3, samples=20, network=Network(3, math.inf, latency_s=[0.0, 0.1, 0.5]))
    assert seen == [2, 1, 11, 12]


def test_values_are_those_of_the_moment_of_sending_and_the_receivers_own():
    own = torch.tensor([1.0, 2.0])

    def compute(replica, pace):
        yield Gradient()
        yield Update()
        if replica.tally.rank == 0:
            yield Send(1, Box.COMPUTE, own, weight=0.5)
            own.zero_()
        else:
            message = yield Receive(0)
            assert (message.source, message.weight, message.values.tolist()) == (0, 0.5, [1.0, 2.0])
            message.values.fill_(9.0)

    cluster, _ = run(compute, None, samples=2)
    assert own.tolist() == [0.0, 0.0]
    assert cluster.ranks[0].bytes_sent - cluster.ranks[1].bytes_sent == own.nbytes + HEAD_BYTES


def test_the_end_sets_free_who_waits_for_a_message_if_it_wants_to_be():
    stopped = []

    def compute(replica, pace):
        yield Gradient()
        yield Update()
        if replica.tally.rank:
            stopped.append((yield Receive(0, until_end=True)))
        else:
            while pace.end is None:
                yield Gradient()
                yield Update()

    cluster, trace = run(compute, None, samples=30)
    assert isinstance(stopped[0], Stop)
    assert cluster.ended_s == pytest.approx(29.0)
    assert (1, "wait", 1.0, cluster.ended_s) in trace
    assert cluster.ranks[1].tally.waited_s == pytest.approx(28.0)


def test_exchanges_are_due_from_one_due_time_to_the_next_and_end_with_the_run():
    due: list[float] = []
    ends = []

    def compute(replica, pace):
        while pace.end is None:
            yield Gradient()
            yield Update()
        ends.append((yield ExchangeEnded()))

    def exchange(replica, pace):
        while not isinstance((yield NextExchange(2.5)), Stop):
            if replica.tally.rank == 0:
                due.append(now())
                yield Send(1, Box.EXCHANGE, Size(300, 300))
            else:
                yield Receive(0, until_end=True)

    clocks: list[Clock] = []
    now = lambda: clocks[0].now_s  # noqa: E731
    original = Clock.run

    def keeping(self):
        clocks.append(self)
        original(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Clock, "run", keeping)
        cluster, trace = run(compute, exchange, samples=60)
    assert due[:4] == [1.0, 3.5, 6.0, 8.5]
    # 364 bytes at 100 a second take 3.64 s, longer than 2.5 s: they queue on their way.
    received = [(begin, end) for rank, kind, begin, end in trace if (rank, kind) == (1, "exchange")]
    assert [end for _, end in received[:3]] == pytest.approx([4.64, 8.28, 11.92])
    assert ends == [None, None]
    assert cluster.ended_s is not None


def test_ranks_that_wait_for_messages_that_nobody_sends_are_named():
    def compute(replica, pace):
        yield Gradient()
        yield Update()
        yield Receive(None if replica.tally.rank else 1)

    with pytest.raises(ProtocolError, match=r"rank 0 waits for a message from rank 1\. rank 1 waits .* from anybody"):
        run(compute, None, samples=2)


def test_an_algorithm_that_was_given_no_network_for_messages_cannot_write_any():
    def compute(replica, pace):
        yield Send(0, Box.COMPUTE)

    replica = TimingReplica(Vector(1), Tally(1))
    cluster = Cluster(compute, None, [Rank(replica, repeat(1.0))], [Pace(1, 5)], lambda n, share: 0.0, 4)
    with pytest.raises(ProtocolError, match="rank 0: nobody can answer Send"):
        cluster.run()


def test_a_size_is_what_is_left_of_a_vector_and_meets_only_its_like():
    size = Size(10, 40)
    done = size.clone().zero_().mul_(2.0).div_(3.0).add_(size, alpha=0.5).sub_(size).lerp_(size, 0.1).copy_(size)
    assert done == size
    for change in (size.add_, size.sub_, size.copy_, lambda other: size.lerp_(other, 0.5)):
        with pytest.raises(ValueError, match="10 elements meets one of 3"):
            change(Size(3, 12))
