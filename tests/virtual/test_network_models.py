"""What collectives cost on unequal links: closed forms, brute simulation, and networks that cannot be."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lasgd.errors import ConfigurationError
from lasgd.group.cost import halving_doubling_all_reduce_s, ring_all_reduce_s, tree_all_reduce_s
from lasgd.virtual import schedules
from lasgd.virtual.flows import Flows
from lasgd.virtual.network_models import METHODS, Network, Nodes

N_BYTES, LATENCY_S, BANDWIDTH = 1000.0, 0.25, 100.0
COSTS = {
    "ring": ring_all_reduce_s,
    "halving_doubling": halving_doubling_all_reduce_s,
    "tree": tree_all_reduce_s,
}
STEPS = {"ring": schedules.ring, "halving_doubling": schedules.halving_doubling, "tree": schedules.tree}


def in_steps_s(network: Network, steps, n_bytes: float) -> float:
    """Every message of every step through `Flows`; a step begins when the one before has arrived."""
    now_s = 0.0
    for step in steps:
        for _ in range(step.times):
            flows, last_s = Flows(network), now_s
            for source, target in step.pairs:
                flows.start(now_s, source, target, n_bytes * step.share)
            while (turn := flows.next_turn()) is not None:
                last_s = max([last_s, *(arrival.at_s for arrival in flows.advance(turn[0]))])
            now_s = last_s
    return now_s


def ring_s(network: Network, members: list[int], n_bytes: float) -> float:
    """The ring's 2(n-1) messages of each member, each sent as soon as the one before has been received and sent."""
    n = len(members)
    flows, sent, received, sending = Flows(network), [0] * n, [0] * n, [False] * n
    position: dict[int, int] = {}
    due: list[tuple[float, int]] = []  # messages that have left and not arrived
    now_s = 0.0
    while min(received) < 2 * (n - 1):
        for i in range(n):
            if not sending[i] and sent[i] < 2 * (n - 1) and sent[i] <= received[i]:
                sending[i] = True
                position[flows.start(now_s, members[i], members[(i + 1) % n], n_bytes / n)] = i
        turn = flows.next_turn()
        now_s = min([*(at_s for at_s, _ in due), *([turn[0]] if turn else [])])
        for at_s, flow in flows.advance(now_s):
            sender = position[flow]
            sending[sender] = False
            sent[sender] += 1
            due.append((at_s, (sender + 1) % n))
        for arrival in [arrival for arrival in due if arrival[0] <= now_s]:
            due.remove(arrival)
            received[arrival[1]] += 1
    return now_s


# Closed forms


@pytest.mark.parametrize("method", COSTS)
@pytest.mark.parametrize("n", range(1, 18))
def test_the_steps_of_a_method_add_up_to_its_closed_form(method, n):
    closed_s = COSTS[method](N_BYTES, n, LATENCY_S, BANDWIDTH)
    equal = Network(n, BANDWIDTH, latency_s=LATENCY_S)
    each = Network(n, [BANDWIDTH] * n, latency_s=[LATENCY_S] * n)
    assert equal.all_reduce_s(N_BYTES, range(n), method) == pytest.approx(closed_s)
    assert each.all_reduce_s(N_BYTES, range(n), method) == pytest.approx(closed_s)
    assert in_steps_s(each, STEPS[method](range(n)), N_BYTES) == pytest.approx(closed_s)


@pytest.mark.parametrize("k", range(1, 5))
def test_halving_and_doubling_moves_as_much_as_the_ring_in_fewer_messages(k):
    n = 2**k
    assert halving_doubling_all_reduce_s(N_BYTES, n, 0.0, BANDWIDTH) == ring_all_reduce_s(N_BYTES, n, 0.0, BANDWIDTH)
    assert halving_doubling_all_reduce_s(0.0, n, 1.0, BANDWIDTH) == 2 * k


def test_ranks_beyond_a_power_of_two_cost_two_messages_of_everything():
    for n, below in ((3, 2), (5, 4), (7, 4), (12, 8)):
        extra_s = 2 * (LATENCY_S + N_BYTES / BANDWIDTH)
        expected_s = halving_doubling_all_reduce_s(N_BYTES, below, LATENCY_S, BANDWIDTH) + extra_s
        assert halving_doubling_all_reduce_s(N_BYTES, n, LATENCY_S, BANDWIDTH) == pytest.approx(expected_s)


@pytest.mark.parametrize("cost", COSTS.values(), ids=COSTS)
def test_costs_refuse_no_ranks_and_no_bandwidth(cost):
    with pytest.raises(ValueError, match="world_size"):
        cost(1, 0, 0.0, 1.0)
    with pytest.raises(ValueError, match="bandwidth"):
        cost(1, 2, 0.0, 0.0)


# Schedules


@pytest.mark.parametrize("n", range(1, 18))
def test_after_a_tree_or_halving_everybody_has_heard_of_everybody(n):
    for name in ("tree", "halving_doubling"):
        heard = [{rank} for rank in range(n)]
        for step in STEPS[name](range(n)):
            before = [set(known) for known in heard]
            for source, target in step.pairs:
                heard[target] |= before[source]
        assert heard == [set(range(n))] * n, name


@pytest.mark.parametrize("n", [2, 3, 5, 8, 13])
def test_nobody_sends_or_receives_two_messages_at_once(n):
    nodes = [list(range(first, min(first + 3, n))) for first in range(0, n, 3)]
    for steps in (*(steps(range(n)) for steps in STEPS.values()), schedules.hierarchical(nodes)):
        for step in steps:
            for ends in zip(*step.pairs, strict=True):
                assert len(set(ends)) == len(ends)


# Brute simulation


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_on_equal_links_the_ring_takes_its_closed_form_message_by_message(n):
    network = Network(n, BANDWIDTH, latency_s=LATENCY_S)
    closed_s = ring_all_reduce_s(N_BYTES, n, LATENCY_S, BANDWIDTH)
    assert ring_s(network, list(range(n)), N_BYTES) == pytest.approx(closed_s)


@given(
    up=st.lists(st.floats(10, 1000), min_size=4, max_size=4),
    down=st.lists(st.floats(10, 1000), min_size=4, max_size=4),
    members=st.lists(st.integers(0, 3), min_size=2, unique=True).map(sorted),
)
@settings(max_examples=15)
def test_the_rings_slowest_link_decides_message_by_message(up, down, members):
    network = Network(4, up, down)
    slowest = min(*(up[m] for m in members), *(down[m] for m in members))
    closed_s = ring_all_reduce_s(N_BYTES, len(members), 0.0, slowest)
    assert network.all_reduce_s(N_BYTES, members) == pytest.approx(closed_s)
    assert ring_s(network, members, N_BYTES) == pytest.approx(closed_s)


def test_with_unequal_links_a_latency_may_hide_behind_a_slow_neighbour():
    # Rank 1's messages are early, so rank 0 sends its second one at once: one latency in all, where steps count two.
    network = Network(2, [10.0, 20.0], 100.0, latency_s=LATENCY_S)
    assert network.all_reduce_s(N_BYTES, [0, 1]) == 100 + 2 * LATENCY_S
    assert ring_s(network, [0, 1], N_BYTES) == 100 + LATENCY_S


@given(
    up=st.lists(st.floats(10, 1000), min_size=7, max_size=7),
    node_up=st.floats(10, 1000),
    node_down=st.floats(10, 1000),
    backbone=st.floats(10, 1000) | st.just(math.inf),
    members=st.lists(st.integers(0, 6), min_size=2, unique=True).map(sorted),
    method=st.sampled_from(METHODS),
)
@settings(max_examples=40)
def test_costs_are_what_sharing_the_links_takes_step_by_step(up, node_up, node_down, backbone, members, method):
    nodes = Nodes(3, node_up, node_down, inside_latency_s=LATENCY_S)
    network = Network(7, up, latency_s=LATENCY_S, nodes=nodes, backbone_bytes_per_s=backbone)
    groups = [[m for m in members if m // 3 == node] for node in range(3)]
    steps = STEPS[method](members) if method in STEPS else schedules.hierarchical([g for g in groups if g])
    brute_s = in_steps_s(network, steps, N_BYTES)
    assert network.all_reduce_s(N_BYTES, members, method) == pytest.approx(brute_s)


def test_a_slow_rank_slows_only_the_messages_of_the_tree_that_are_its_own():
    network = Network(8, [100.0] * 7 + [10.0])
    # rank 7 sends once and receives once, in a round each; the other four rounds are as fast as ever
    assert network.all_reduce_s(1000, range(8), "tree") == pytest.approx(2 * 100 + 4 * 10)


def test_members_only_count():
    network = Network(4, [100.0, 100.0, 100.0, 1.0])
    assert network.all_reduce_s(1000, [0, 1, 2]) == pytest.approx(ring_all_reduce_s(1000, 3, 0.0, 100.0))
    assert network.all_reduce_s(1000, [2, 0, 1]) == network.all_reduce_s(1000, [0, 1, 2])


@pytest.mark.parametrize("method", METHODS)
def test_one_member_alone_waits_for_nobody(method):
    assert Network(4, [100.0] * 4, latency_s=1.0, nodes=Nodes(2, 10.0)).all_reduce_s(1000, [2], method) == 0.0


# Nodes


def test_between_nodes_the_hierarchical_ring_is_shorter_than_the_plain_one():
    # 8 nodes of 4: inside 10 Gbit/s, between 1 Gbit/s; 44.8 MB. By hand: each way two messages inside of everything,
    # and a ring of 8; the plain ring has 62 messages, each as slow as the slow links.
    inside, between, n_bytes, latency_s = 1.25e9, 1.25e8, 44.8e6, 50e-6
    network = Network(32, inside, latency_s=latency_s, nodes=Nodes(4, between))
    by_hand_s = 4 * n_bytes / inside + ring_all_reduce_s(n_bytes, 8, latency_s, between)
    assert network.all_reduce_s(n_bytes, range(32), "hierarchical") == pytest.approx(by_hand_s)
    plain_s = ring_all_reduce_s(n_bytes, 32, latency_s, between)
    assert network.all_reduce_s(n_bytes, range(32), "ring") == pytest.approx(plain_s)
    assert network.all_reduce_s(0, range(32), "hierarchical") < network.all_reduce_s(0, range(32), "ring") / 4


def test_ranks_of_a_node_that_exchange_with_another_node_share_its_link():
    network = Network(4, 1000.0, nodes=Nodes(2, 100.0))
    # nearest partners exchange half inside at 1000, then both ranks of each node a quarter at 50; and back
    assert network.all_reduce_s(1000, range(4), "halving_doubling") == pytest.approx(2 * (0.5 + 5.0))


def test_the_last_node_may_have_fewer_ranks():
    network = Network(5, 100.0, nodes=Nodes(2, [10.0, 20.0, 30.0]))
    assert network.capacity(("node up", 2)) == 30.0
    assert network.path(3, 4) == (("up", 3), ("node up", 1), ("backbone", 0), ("node down", 2), ("down", 4))


def test_a_rounds_length_is_a_least_and_a_part_takes_its_share():
    network = Network(4, 100.0, round_s=8.0)
    assert network.all_reduce_s(100, range(4)) == 8.0
    assert network.all_reduce_s(100, range(4), share=0.25) == 2.0
    assert network.all_reduce_s(1000, range(4)) == 15.0


def test_unlimited_links_cost_nothing():
    network = Network(4, math.inf)
    assert [network.all_reduce_s(1e9, range(4), method) for method in COSTS] == [0.0, 0.0, 0.0]


# Refusals


@pytest.mark.parametrize(
    "make, shown",
    [
        (lambda: Network(4, [1.0, 1.0, 1.0, 0.0]), "rank 3 is isolated: its up link has 0.0 bytes/s"),
        (lambda: Network(4, 1.0, [1.0, -1.0, 1.0, 1.0]), "rank 1 is isolated: its down link has -1.0 bytes/s"),
        (lambda: Network(4, [1.0, 1.0, math.nan, 1.0]), "rank 2 is isolated: its up link has nan bytes/s"),
        (lambda: Network(4, [1.0, 1.0, 1.0]), "rank 3 is isolated: its up link is missing (3 for 4)"),
        (lambda: Network(2, [1.0, None]), "rank 1 is isolated: its up link is missing"),  # pyright: ignore
        (lambda: Network(2, 0.0), "rank 0 is isolated: its up link has 0.0 bytes/s"),
        (lambda: Network(2, [1.0] * 3), "3 up links are given for 2; expected one for each"),
        (lambda: Network(4, 1.0, nodes=Nodes(2, [1.0, 0.0])), "rank 2 is isolated: node 1's up link has 0.0 bytes/s"),
        (lambda: Network(4, 1.0, nodes=Nodes(2, [1.0])), "rank 2 is isolated: node 1's up link is missing"),
        (lambda: Network(4, 1.0, nodes=Nodes(0, 1.0)), "ranks_per_node is 0"),
        (lambda: Network(4, 1.0, nodes=Nodes(2, 1.0, inside_latency_s=-1.0)), "inside_latency_s is -1.0"),
        (lambda: Network(4, 1.0, backbone_bytes_per_s=0.0), "the backbone carries 0.0 bytes/s"),
        (lambda: Network(4, 1.0, latency_s=[0.0] * 3), "3 latencies are given for 4 ranks"),
        (lambda: Network(4, 1.0, latency_s=[0.0, 0.0, -1.0, 0.0]), "latency_s of rank 2 is -1.0"),
        (lambda: Network(4, 1.0, latency_s=math.inf), "latency_s of rank 0 is inf"),
        (lambda: Network(4, 1.0, round_s=-1.0), "round_s is -1.0"),
        (lambda: Network(0, 1.0), "world_size is 0; expected at least 1"),
        (lambda: Network(4, 1.0).all_reduce_s(1, range(4), "rink"), "Did you mean 'ring'?"),
        (lambda: Network(4, 1.0).all_reduce_s(1, range(4), "hierarchical"), "needs a network with nodes, as in nodes="),
    ],
)
def test_what_cannot_be_is_refused_by_name(make, shown):
    with pytest.raises(ConfigurationError) as refused:
        make()
    assert shown in str(refused.value)


@pytest.mark.parametrize("members", [[], [0, 0], [0, 4], [-1, 0]])
def test_members_are_distinct_ranks(members):
    with pytest.raises(ValueError, match="expected distinct ranks among 4"):
        Network(4, [1.0] * 4).all_reduce_s(1, members)
