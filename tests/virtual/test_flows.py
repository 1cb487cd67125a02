"""Messages that share links: max-min fairness as its definition has it, and events in their order."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lasgd.errors import ConfigurationError, ProtocolError
from lasgd.virtual.flows import Arrival, Flows, max_min_rates
from lasgd.virtual.network_models import Network, Nodes

CAPACITY = st.floats(1e-3, 1e12)


@st.composite
def sharings(draw):
    capacities = draw(st.dictionaries(st.integers(0, 7), CAPACITY | st.just(math.inf), min_size=1, max_size=8))
    paths = st.lists(st.sampled_from(sorted(capacities)), unique=True, max_size=4)
    return draw(st.lists(paths, max_size=12)), capacities


def loads(flows, rates, capacities):
    return {
        resource: math.fsum(rate for path, rate in zip(flows, rates, strict=True) if resource in path)
        for resource in capacities
    }


# Rates come from a handful of subtractions of numbers no larger than a capacity: a billionth of it is ample.
NEARLY = 1e-9

few = settings(max_examples=40)


@given(sharings())
@few
def test_no_resource_carries_more_than_its_capacity(sharing):
    flows, capacities = sharing
    load = loads(flows, max_min_rates(flows, capacities), capacities)
    assert all(load[resource] <= capacity * (1 + NEARLY) for resource, capacity in capacities.items())


@given(sharings())
@few
def test_every_flow_is_among_the_fastest_on_some_resource_that_is_full(sharing):
    flows, capacities = sharing
    rates = max_min_rates(flows, capacities)
    load = loads(flows, rates, capacities)
    for path, rate in zip(flows, rates, strict=True):
        limited = [resource for resource in path if capacities[resource] != math.inf]
        if not limited:
            assert rate == math.inf
            continue
        assert rate > 0
        bottlenecks = [resource for resource in limited if load[resource] >= capacities[resource] * (1 - NEARLY)]
        fastest = [
            resource
            for resource in bottlenecks
            if all(other <= rate * (1 + 1e-6) for p, other in zip(flows, rates, strict=True) if resource in p)
        ]
        assert fastest


@given(sharings(), st.randoms(use_true_random=False))
@few
def test_rates_do_not_depend_on_the_order_of_the_flows(sharing, random):
    flows, capacities = sharing
    order = list(range(len(flows)))
    random.shuffle(order)
    rates = max_min_rates(flows, capacities)
    shuffled = max_min_rates([flows[k] for k in order], capacities)
    assert shuffled == pytest.approx([rates[k] for k in order], rel=1e-6)


def test_what_a_flow_cannot_use_on_one_link_is_left_to_the_others_there():
    flows = [["a"], ["a"], ["a", "b"], ["b"], ["c"]]
    rates = max_min_rates(flows, dict.fromkeys("abc", 1.0))
    assert rates == pytest.approx([1 / 3, 1 / 3, 1 / 3, 2 / 3, 1.0])


def test_a_capacity_of_nothing_is_refused():
    with pytest.raises(ValueError, match="capacity of link is 0"):
        max_min_rates([["link"]], {"link": 0.0})


def drained(flows: Flows) -> list[Arrival]:
    arrivals = []
    while (turn := flows.next_turn()) is not None:
        arrivals += flows.advance(turn[0])
    return arrivals


def test_a_message_alone_takes_its_latency_once_and_its_bytes_at_the_slowest_link():
    network = Network(2, up_bytes_per_s=[100.0, 100.0], down_bytes_per_s=[100.0, 20.0], latency_s=0.5)
    flows = Flows(network)
    flow = flows.start(3.0, 0, 1, 40)
    assert flows.next_turn() == (5.0, flow)
    assert flows.advance(4.9) == []
    assert flows.advance(6.0) == [Arrival(5.5, flow)]
    assert network.message_s(0, 1, 40) == 2.5
    assert flows.next_turn() is None


def test_what_everybody_sends_to_a_server_waits_for_the_servers_link():
    flows = Flows(Network(5, 100.0))
    for worker in range(1, 5):
        flows.start(0.0, worker, 0, 100)
    assert drained(flows) == [Arrival(4.0, flow) for flow in range(4)]


def test_a_server_with_a_faster_link_waits_for_the_workers():
    flows = Flows(Network(5, [400.0, 100.0, 100.0, 100.0, 100.0]))
    for worker in range(1, 5):
        flows.start(0.0, worker, 0, 100)
    assert drained(flows) == [Arrival(1.0, flow) for flow in range(4)]


def test_a_message_that_ends_leaves_its_share_to_the_others():
    flows = Flows(Network(3, 100.0))
    flows.start(0.0, 1, 0, 100)
    flows.start(0.0, 2, 0, 200)
    # half each until 2.0, then the second one's other 100 bytes alone
    assert drained(flows) == [Arrival(2.0, 0), Arrival(3.0, 1)]


def test_a_message_that_begins_takes_a_share_from_the_others():
    flows = Flows(Network(3, 100.0))
    flows.start(0.0, 1, 0, 100)
    assert flows.next_turn() == (1.0, 0)
    flows.start(0.5, 2, 0, 100)
    assert drained(flows) == [Arrival(1.5, 0), Arrival(2.0, 1)]


def test_the_two_directions_of_a_link_do_not_share():
    flows = Flows(Network(2, 100.0))
    flows.start(0.0, 0, 1, 100)
    flows.start(0.0, 1, 0, 100)
    assert drained(flows) == [Arrival(1.0, 0), Arrival(1.0, 1)]


def test_ranks_of_a_node_share_its_link_but_not_what_stays_inside():
    network = Network(4, 1000.0, latency_s=0.5, nodes=Nodes(2, 100.0, inside_latency_s=0.125))
    flows = Flows(network)
    flows.start(0.0, 0, 2, 100)
    flows.start(0.0, 1, 3, 100)
    flows.start(0.0, 1, 0, 100)
    # inside: 1000 bytes/s less the 50 that rank 1 sends out
    assert drained(flows) == [Arrival(pytest.approx(100 / 950 + 0.125), 2), Arrival(2.5, 0), Arrival(2.5, 1)]


def test_a_backbone_is_shared_by_all():
    flows = Flows(Network(4, 100.0, backbone_bytes_per_s=100.0))
    flows.start(0.0, 0, 1, 100)
    flows.start(0.0, 2, 3, 100)
    assert drained(flows) == [Arrival(2.0, 0), Arrival(2.0, 1)]


def test_messages_that_touch_no_common_link_do_not_change_each_other():
    flows = Flows(Network(4, 3.0))
    flows.start(0.0, 0, 1, 1)
    alone = flows.next_turn()
    for _ in range(5):
        flows.start(0.05, 2, 3, 0.7)
    assert flows.next_turn() == alone


def test_empty_messages_and_those_to_oneself_end_at_once():
    flows = Flows(Network(2, 100.0, latency_s=0.5))
    flows.start(1.0, 0, 1, 0)
    flows.start(1.0, 0, 0, 100)
    assert flows.next_turn() == (1.0, 0)
    assert flows.advance(1.0) == [Arrival(1.5, 0), Arrival(1.0, 1)]


def test_unlimited_links_cost_latency_only():
    flows = Flows(Network(2, math.inf, latency_s=0.5))
    flows.start(1.0, 0, 1, 10**12)
    assert drained(flows) == [Arrival(1.5, 0)]


def test_what_ended_before_a_start_is_told_at_the_next_advance():
    flows = Flows(Network(2, 100.0))
    flows.start(0.0, 0, 1, 100)
    flows.start(7.0, 0, 1, 100)
    assert len(flows) == 1
    assert flows.advance(7.0) == [Arrival(1.0, 0)]
    assert flows.advance(8.0) == [Arrival(8.0, 1)]


def test_time_does_not_run_backwards():
    flows = Flows(Network(2, 100.0))
    flows.advance(2.0)
    with pytest.raises(ProtocolError, match=r"runs from 2.0 back to 1.0"):
        flows.start(1.0, 0, 1, 100)


@pytest.mark.parametrize("n_bytes", [-1, math.nan, math.inf])
def test_senseless_sizes_are_refused(n_bytes):
    with pytest.raises(ValueError, match="n_bytes"):
        Flows(Network(2, 100.0)).start(0.0, 0, 1, n_bytes)


messages = st.tuples(st.floats(0, 2), st.integers(0, 3), st.integers(0, 3), st.integers(0, 500))


@given(st.lists(messages, max_size=12))
@few
def test_the_same_starts_give_the_same_arrivals_however_often_one_looks(starts):
    network = Network(4, [100.0, 50.0, 70.0, 10.0], latency_s=[0.0, 0.5, 0.0, 0.125], nodes=Nodes(2, 60.0))
    traces = []
    for looks in (0, 3):
        flows = Flows(network)
        for at_s, *message in sorted(starts):
            for _ in range(looks):
                flows.next_turn()
            flows.start(at_s, *message)
        trace = drained(flows)
        assert len(trace) == len(starts)
        traces.append({flow: at_s for at_s, flow in trace})
    assert traces[0] == pytest.approx(traces[1], rel=NEARLY)


def test_the_same_starts_give_the_same_trace_bit_for_bit():
    network = Network(4, [100.0, 50.0, 70.0, 10.0], latency_s=0.1, nodes=Nodes(2, 60.0))
    traces = []
    for _ in range(2):
        flows = Flows(network)
        for k in range(40):
            flows.start(k / 7, k % 4, k * 3 % 4 ^ 1, 10 + k % 5)
        traces.append(drained(flows))
    assert traces[0] == traces[1]


@given(st.lists(messages, max_size=12))
@few
def test_messages_end_neither_before_nor_after_their_bytes_can_have_left(starts):
    network = Network(4, [100.0, 50.0, 70.0, 10.0], nodes=Nodes(2, 60.0))
    flows = Flows(network)
    began = [(at_s, *message) for at_s, *message in sorted(starts)]
    for start in began:
        flows.start(*start)
    all_bytes = sum(n_bytes for *_, n_bytes in began)
    for at_s, flow in drained(flows):
        begin_s, source, target, n_bytes = began[flow]
        assert at_s >= begin_s + network.message_s(source, target, n_bytes) * (1 - NEARLY)
        assert at_s <= 2.0 + all_bytes / 10.0 * (1 + NEARLY)  # even one after another over the slowest link


def test_shares_go_by_weight_and_what_a_heavy_flow_cannot_use_the_others_have():
    # Weights 1 and 3 on a link of 8; the heavy one is held to 4 by another link, so the light one has 4 too.
    assert max_min_rates([["link"], ["link"]], {"link": 8.0}, [1.0, 3.0]) == [2.0, 6.0]
    assert max_min_rates([["link"], ["link", "thin"]], {"link": 8.0, "thin": 4.0}, [1.0, 3.0]) == [4.0, 4.0]


def test_a_heavier_message_leaves_sooner_and_both_when_the_bytes_are_through():
    flows = Flows(Network(3, 100.0))
    heavy, light = flows.start(0.0, 0, 2, 300, weight=3.0), flows.start(0.0, 1, 2, 300, weight=1.0)
    assert flows.next_turn() == (pytest.approx(4.0), heavy)  # 75 bytes/s
    flows.advance(4.0)
    assert flows.next_turn() == (pytest.approx(6.0), light)


def test_who_is_well_under_way_keeps_most_of_the_link_until_the_others_window_has_grown():
    # Windows of 10, 20, 40 bytes, and no more: 0.4 s of the link. The first one's is full when the second begins.
    flows = Flows(Network(3, 100.0, first_window_bytes=10.0, full_window_s=0.4))
    first = flows.start(0.0, 0, 2, 1000)
    assert flows.advance(1.0) == []
    second = flows.start(1.0, 1, 2, 50)
    # 10 bytes at 20/s, 20 at 33.3/s, the last 20 at 50/s
    arrivals = drained(flows)
    assert arrivals == [Arrival(pytest.approx(2.5), second), Arrival(pytest.approx(10.5), first)]


def test_a_windows_growth_costs_a_message_that_is_alone_nothing():
    network = Network(2, 100.0, latency_s=0.5, first_window_bytes=3.0)
    flows = Flows(network)
    flow = flows.start(0.0, 0, 1, 1000)
    assert drained(flows) == [Arrival(pytest.approx(network.message_s(0, 1, 1000)), flow)]


def test_messages_that_begin_together_share_evenly_whatever_their_windows():
    flows = Flows(Network(4, 100.0, first_window_bytes=7.0))
    for source in range(3):
        flows.start(0.0, source, 3, 100)
    assert drained(flows) == [Arrival(pytest.approx(3.0), flow) for flow in range(3)]


@given(st.lists(messages, max_size=12), st.sampled_from([1.0, 30.0, 1e9]), st.sampled_from([1e-9, 0.5, 1e9]))
@few
def test_windows_neither_lose_nor_add_bytes(starts, first_window_bytes, full_window_s):
    plain = Network(4, [100.0, 50.0, 70.0, 10.0])
    network = dataclasses.replace(plain, first_window_bytes=first_window_bytes, full_window_s=full_window_s)
    server, began = 3, [(at_s, source, n_bytes) for at_s, source, _, n_bytes in sorted(starts) if source != 3]
    last_s = []
    for links in (plain, network):
        flows = Flows(links)
        for at_s, source, n_bytes in began:
            flows.start(at_s, source, server, n_bytes)
        arrivals = drained(flows)
        assert sorted(flow for _, flow in arrivals) == list(range(len(began)))
        for at_s, flow in arrivals:
            begin_s, source, n_bytes = began[flow]
            assert at_s >= begin_s + network.message_s(source, server, n_bytes) * (1 - NEARLY)
        last_s.append(max((at_s for at_s, _ in arrivals), default=0.0))
    assert last_s[0] == pytest.approx(last_s[1])  # the server's link, the slowest one, is as busy


@pytest.mark.parametrize(
    ("wrong", "said"),
    [({"first_window_bytes": 0.0}, "first_window_bytes is 0.0"), ({"full_window_s": math.inf}, "full_window_s is inf")],
)
def test_a_window_that_holds_nothing_or_everything_is_refused(wrong, said):
    with pytest.raises(ConfigurationError, match=said):
        Network(2, 100.0, **wrong)
