import pytest
import torch

from lasgd.errors import PeerError
from lasgd.group.base import Group
from lasgd.group.cost import broadcast_s, ring_all_reduce_s
from lasgd.group.padded import PaddedGroup
from virtual_clock import VirtualClock

TIMEOUT_S = 60.0
HEADER = torch.zeros(4, 6, dtype=torch.float64)  # 192 bytes


class FakeGroup:
    """Four members, this one rank 1. A collective waits `join_s` for the last member and then takes `inner_s`."""

    def __init__(self, clock: VirtualClock, join_s: float = 0.0, inner_s: float = 0.0) -> None:
        self.rank, self.members, self.epoch, self.bytes_sent = 1, (0, 1, 2, 3), 0, 0
        self.clock, self.join_s, self.inner_s, self.error = clock, join_s, inner_s, None
        self.calls: list[tuple] = []

    @property
    def world_size(self) -> int:
        return 4

    def _collective(self, *call) -> tuple[float, float]:
        self.calls.append(call)
        self.clock.now_s += self.join_s
        joined_s = self.clock.now_s
        self.clock.now_s += self.inner_s
        if self.error is not None:
            raise self.error
        return joined_s, self.clock.now_s

    def wait_all_reduce(self, header, vector, timeout_s):
        times = self._collective("all_reduce", timeout_s)
        header.mul_(4)
        vector.mul_(4)
        self.bytes_sent += 100
        return times

    def wait_broadcast(self, tensor, source, timeout_s):
        self._collective("broadcast", source, timeout_s)
        tensor.fill_(7)

    def wait_exchange(self, topic, value, timeout_s):
        self._collective("exchange", topic, timeout_s)
        return [value] * 4

    def wait_all_to_all(self, header, pieces, received, timeout_s):
        return self._collective("all_to_all", timeout_s)

    def wait_all_gather(self, piece, received, timeout_s):
        return self._collective("all_gather", timeout_s)[1]

    def leave(self, reason=None):
        self.calls.append(("leave", reason))


def padded(join_s: float = 0.0, inner_s: float = 0.0, **emulation):
    clock = VirtualClock()
    inner = FakeGroup(clock, join_s, inner_s)
    return PaddedGroup(inner, vector_bytes=4000, clock=clock, sleep=clock.sleep, **emulation), inner, clock


def seconds(group, clock, vector, timeout_s=TIMEOUT_S) -> float:
    begun_s = clock()
    group.wait_all_reduce(HEADER.clone(), vector, timeout_s)
    return clock() - begun_s


def test_it_is_a_group_and_shows_the_wrapped_groups_attributes():
    group, inner, _ = padded()
    assert isinstance(group, Group)
    assert (group.rank, group.members, group.epoch, group.world_size) == (1, (0, 1, 2, 3), 0, 4)
    inner.epoch, inner.bytes_sent = 3, 17
    assert (group.epoch, group.bytes_sent) == (3, 17)


def test_an_attribute_that_neither_has_is_reported_as_usual():
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = padded()[0].no_such_thing


def test_results_and_arguments_pass_through():
    group, inner, _ = padded(round_s=1.0)
    header, vector = torch.ones(4, 6, dtype=torch.float64), torch.ones(1000)
    group.wait_all_reduce(header, vector, 12.0)
    group.wait_broadcast(vector[:3], 2, 13.0)
    assert group.wait_exchange("hello", b"x", 14.0) == [b"x"] * 4
    group.leave("because")
    assert vector.tolist() == [7.0] * 3 + [4.0] * 997
    assert header.eq(4).all()
    assert inner.calls == [
        ("all_reduce", 12.0),
        ("broadcast", 2, 13.0),
        ("exchange", "hello", 14.0),
        ("leave", "because"),
    ]


def test_an_all_reduce_of_the_whole_vector_takes_the_round():
    group, _, clock = padded(round_s=1.0)
    assert seconds(group, clock, torch.zeros(1000)) == pytest.approx(1.0)


def test_an_all_reduce_of_a_part_takes_its_share():
    group, _, clock = padded(round_s=1.0)
    assert seconds(group, clock, torch.zeros(200)) == pytest.approx(0.2)


def test_fewer_bytes_an_element_take_a_smaller_share():
    group, _, clock = padded(round_s=1.0)
    assert seconds(group, clock, torch.zeros(1000, dtype=torch.bfloat16)) == pytest.approx(0.5)


def test_a_header_alone_is_no_part_of_the_round():
    group, _, clock = padded(round_s=1.0)
    assert seconds(group, clock, torch.zeros(0)) == 0.0


def test_a_link_is_paid_for_by_every_byte_the_headers_included():
    group, _, clock = padded(bandwidth_bytes_per_s=1000.0, latency_s=0.01)
    assert seconds(group, clock, torch.zeros(1000)) == pytest.approx(6 * 0.01 + 1.5 * 4192 / 1000)
    assert seconds(group, clock, torch.zeros(0)) == pytest.approx(6 * 0.01 + 1.5 * 192 / 1000)


@pytest.mark.parametrize(("bandwidth", "longer_s"), [(1e6, 1.0), (1e3, 1.5 * 4.192)])
def test_of_round_and_link_the_longer_counts(bandwidth, longer_s):
    group, _, clock = padded(round_s=1.0, bandwidth_bytes_per_s=bandwidth)
    assert seconds(group, clock, torch.zeros(1000)) == pytest.approx(longer_s)


def test_waiting_for_a_late_member_does_not_use_up_the_padding():
    group, _, clock = padded(join_s=5.0, round_s=1.0)
    assert seconds(group, clock, torch.zeros(1000)) == pytest.approx(6.0)


def test_the_real_transfer_is_part_of_the_emulated_one():
    group, _, clock = padded(join_s=5.0, inner_s=0.25, round_s=1.0)
    assert seconds(group, clock, torch.zeros(1000)) == pytest.approx(6.0)


def test_a_real_transfer_longer_than_the_emulated_one_is_not_padded():
    group, _, clock = padded(inner_s=2.5, round_s=1.0)
    assert seconds(group, clock, torch.zeros(1000)) == 2.5


def test_the_header_arrives_as_it_did_and_the_vector_after_its_padding():
    group, _, clock = padded(join_s=5.0, inner_s=0.25, round_s=1.0)
    begun_s = clock()
    assert group.wait_all_reduce(HEADER.clone(), torch.zeros(1000), TIMEOUT_S) == (
        begun_s + 5.0,
        pytest.approx(begun_s + 6.0),
    )


def test_without_an_emulation_nothing_sleeps():
    group, _, clock = padded(inner_s=0.25)
    assert seconds(group, clock, torch.zeros(1000)) == 0.25


def test_a_broadcast_pays_for_the_link_and_not_for_the_round():
    group, _, clock = padded(round_s=9.0, bandwidth_bytes_per_s=1000.0, latency_s=0.01)
    begun_s = clock()
    group.wait_broadcast(torch.zeros(1000), 0, TIMEOUT_S)
    assert clock() - begun_s == pytest.approx(2 * 0.01 + 4.0)


def test_a_round_longer_than_the_time_out_ends_at_the_time_out_with_a_peer_error():
    group, _, clock = padded(inner_s=0.5, round_s=5.0)
    begun_s = clock()
    with pytest.raises(PeerError, match=r"all-reduce of 0.004 MB not finished after 2.0 s .* ranks 0, 2, 3\. Raise"):
        group.wait_all_reduce(HEADER.clone(), torch.zeros(1000), 2.0)
    assert clock() - begun_s == pytest.approx(2.0)


def test_a_broadcast_longer_than_the_time_out_is_a_peer_error_too():
    group, _, _ = padded(bandwidth_bytes_per_s=100.0)
    with pytest.raises(PeerError, match="broadcast"):
        group.wait_broadcast(torch.zeros(1000), 0, 2.0)


def test_an_error_of_the_wrapped_group_comes_at_once():
    group, inner, clock = padded(round_s=5.0)
    inner.error = PeerError("rank 2 is lost")
    begun_s = clock()
    with pytest.raises(PeerError, match="rank 2 is lost"):
        group.wait_all_reduce(HEADER.clone(), torch.zeros(1000), TIMEOUT_S)
    assert clock() == begun_s


@pytest.mark.parametrize(
    "bad",
    [
        {"vector_bytes": 0},
        {"vector_bytes": 1, "round_s": 0.0},
        {"vector_bytes": 1, "bandwidth_bytes_per_s": -1.0},
        {"vector_bytes": 1, "latency_s": 0.1},
        {"vector_bytes": 1, "latency_s": -0.1, "bandwidth_bytes_per_s": 1.0},
    ],
)
def test_senseless_emulations_are_refused(bad):
    with pytest.raises(ValueError, match="expected"):
        PaddedGroup(FakeGroup(VirtualClock()), **bad)


def test_the_ring_costs_what_patarasuk_and_yuan_say():
    assert ring_all_reduce_s(4e6, 4, 0.0, 1e6) == pytest.approx(6.0)
    assert ring_all_reduce_s(0, 4, 0.5, 1e6) == pytest.approx(3.0)
    assert ring_all_reduce_s(4e6, 1, 0.5, 1e6) == 0.0


def test_a_broadcast_reaches_twice_as_many_with_each_latency():
    assert [broadcast_s(0, n, 1.0, 1e6) for n in (1, 2, 3, 4, 5, 8, 9)] == [0, 1, 2, 2, 3, 3, 4]
    assert broadcast_s(2e6, 4, 0.0, 1e6) == pytest.approx(2.0)


@pytest.mark.parametrize("cost", [ring_all_reduce_s, broadcast_s])
def test_costs_refuse_no_ranks_and_no_bandwidth(cost):
    with pytest.raises(ValueError, match="world_size"):
        cost(1, 0, 0.0, 1.0)
    with pytest.raises(ValueError, match="bandwidth"):
        cost(1, 2, 0.0, 0.0)


# Pieces


def seconds_of_pieces(group, clock, n_bytes, timeout_s=TIMEOUT_S) -> float:
    pieces, begun_s = torch.zeros(4, n_bytes // 4, dtype=torch.uint8), clock()
    group.wait_all_to_all(HEADER.clone(), pieces, pieces.clone(), timeout_s)
    group.wait_all_gather(pieces[0], pieces.clone(), timeout_s)
    return clock() - begun_s


def test_pieces_there_and_back_take_what_an_all_reduce_of_as_many_bytes_takes():
    group, _, clock = padded(bandwidth_bytes_per_s=1000.0, latency_s=0.01)
    assert seconds_of_pieces(group, clock, 4000) == pytest.approx(6 * 0.01 + 1.5 * 4192 / 1000)
    group, _, clock = padded(round_s=1.0)
    assert seconds_of_pieces(group, clock, 1000) == pytest.approx(0.25)  # of 4,000 bytes
    group, _, clock = padded(join_s=5.0, round_s=1.0)
    assert seconds_of_pieces(group, clock, 4000) == pytest.approx(5.0 + 0.5 + 5.0)


def test_real_pieces_that_take_longer_are_not_padded():
    group, _, clock = padded(inner_s=2.5, round_s=1.0)
    assert seconds_of_pieces(group, clock, 4000) == 5.0


def test_pieces_that_outlast_their_time_out_are_a_clear_error():
    group, _, clock = padded(bandwidth_bytes_per_s=1000.0)
    with pytest.raises(PeerError, match=r"all-to-all of 0\.004 MB not finished after 1\.0 s on the emulated link"):
        seconds_of_pieces(group, clock, 4000, timeout_s=1.0)
