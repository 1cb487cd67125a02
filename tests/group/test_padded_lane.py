"""All-reduces beside the communicator's, on emulated links."""

from __future__ import annotations

import pytest
import torch

from lasgd.errors import PeerError
from lasgd.group.cost import ring_all_reduce_s
from lasgd.group.padded import PaddedGroup
from lasgd.group.scripted import Network
from virtual_clock import VirtualClock

RING_S = ring_all_reduce_s(4000, 4, 0.01, 1000.0)  # of 1000 float32


class FakeLane:
    """All members have joined a collective when the clock shows `joins_s` of it; nothing else takes time."""

    def __init__(self, clock: VirtualClock) -> None:
        self.clock = clock
        self.joins_s: list[float] = []
        self.begun: list[tuple[int, bool]] = []
        self.error: PeerError | None = None

    def start_all_reduce(self, tensor, timeout_s, is_payload=True):
        self.begun.append((tensor.nbytes, is_payload))
        return (len(self.begun) - 1) // 2

    def wait_all_reduce(self, started) -> None:
        if self.error is not None:
            raise self.error
        if started < len(self.joins_s):
            self.clock.now_s = max(self.clock.now_s, self.joins_s[started])


class FakeGroup:
    """Four members, this one rank 1, with a lane."""

    rank, members, epoch, bytes_sent, world_size = 1, (0, 1, 2, 3), 0, 0, 4

    def __init__(self, clock: VirtualClock) -> None:
        self.clock, self.lane = clock, FakeLane(clock)

    def wait_all_reduce(self, header, vector, timeout_s):
        return self.clock.now_s, self.clock.now_s

    def wait_broadcast(self, tensor, source, timeout_s): ...

    def wait_exchange(self, topic, value, timeout_s): ...

    def leave(self, reason=None): ...

    def wait_lane(self, timeout_s):
        return self.lane


def opened(**emulation):
    clock = VirtualClock()
    inner = FakeGroup(clock)
    group = PaddedGroup(inner, vector_bytes=4000, clock=clock, sleep=clock.sleep, **emulation)  # pyright: ignore
    return group, group.wait_lane(9.0), inner.lane, clock


def link():
    return opened(bandwidth_bytes_per_s=1000.0, latency_s=0.01)


def test_a_bucket_takes_the_rings_time_and_a_marker_that_counts_as_nothing_sent():
    _, lane, inner, clock = link()
    lane.wait_all_reduce(lane.start_all_reduce(torch.zeros(1000), 60.0))
    assert clock() - 50.0 == pytest.approx(RING_S)
    assert inner.begun == [(4, False), (4000, True)]


def test_buckets_follow_each_other_on_the_link():
    _, lane, _, clock = link()
    first = lane.start_all_reduce(torch.zeros(1000), 60.0)
    second = lane.start_all_reduce(torch.zeros(1000), 60.0)
    lane.wait_all_reduce(first)
    assert clock() - 50.0 == pytest.approx(RING_S)
    lane.wait_all_reduce(second)
    assert clock() - 50.0 == pytest.approx(2 * RING_S)


def test_a_bucket_that_the_last_member_joins_late_takes_its_time_from_then_on():
    _, lane, inner, clock = link()
    inner.joins_s = [50.5, 80.0]
    started = [lane.start_all_reduce(torch.zeros(1000), 60.0) for _ in range(2)]
    for one in started:
        lane.wait_all_reduce(one)
    assert clock() == pytest.approx(80.0 + RING_S)


def test_a_bucket_takes_its_share_of_a_round():
    _, lane, _, clock = opened(round_s=2.0)
    lane.wait_all_reduce(lane.start_all_reduce(torch.zeros(250), 60.0))
    assert clock() - 50.0 == pytest.approx(0.5)


def test_a_bucket_longer_than_the_time_out_ends_at_the_time_out_with_a_peer_error():
    _, lane, _, clock = link()
    with pytest.raises(PeerError, match=r"gradients of 0.004 MB not finished after 2.0 s on the emulated link"):
        lane.wait_all_reduce(lane.start_all_reduce(torch.zeros(1000), 2.0))
    assert clock() - 50.0 == pytest.approx(2.0)


def test_an_error_of_the_wrapped_lane_comes_at_once():
    _, lane, inner, clock = link()
    inner.error = PeerError("rank 2 is lost")
    with pytest.raises(PeerError, match="rank 2 is lost"):
        lane.wait_all_reduce(lane.start_all_reduce(torch.zeros(1000), 60.0))
    assert clock() == 50.0


def test_a_broadcast_of_buffers_takes_the_links_time():
    _, lane, _, clock = link()
    lane.wait_broadcast_rest(4000)
    assert clock() - 50.0 == pytest.approx(2 * 0.01 + 4.0)


def test_a_group_without_a_lane_has_none_on_slow_links_either():
    group = PaddedGroup(Network(1, deliver_at_once=True).group(0), vector_bytes=4000, round_s=1.0)
    with pytest.raises(TypeError, match="ScriptedGroup has no lane"):
        group.wait_lane(1.0)
