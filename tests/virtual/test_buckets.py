"""How much of the all-reduce of gradients the backward pass hides."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lasgd.algorithms import registry
from lasgd.pace import Pace
from lasgd.tally import Tally
from lasgd.virtual.buckets import NO_OVERLAP, Buckets
from lasgd.virtual.cluster import Cluster, Rank
from lasgd.virtual.timing_replica import TimingReplica, Vector

MIB = 2**20


@pytest.mark.parametrize(
    "n_bytes, last",
    [
        (1, 1),
        (MIB, MIB),  # all in the first bucket
        (MIB + 4, 4),
        (26 * MIB, 25 * MIB),  # two full ones
        (26 * MIB + 4, 4),
        (31 * MIB, 5 * MIB),
        (102_228_128, 102_228_128 - 76 * MIB),  # ResNet-50: one of 1 MiB, three of 25 MiB, and the rest
    ],
)
def test_the_last_bucket_holds_what_is_left(n_bytes, last):
    assert Buckets().last_bytes(n_bytes) == last


@given(st.integers(1, 10**11))
def test_the_last_bucket_is_never_empty_nor_larger_than_a_bucket(n_bytes):
    assert 0 < Buckets().last_bytes(n_bytes) <= min(n_bytes, 25 * MIB)


def test_the_first_bucket_is_full_when_its_share_of_the_backward_pass_is_done():
    buckets = Buckets()
    assert buckets.ready_before_end_s(10 * MIB, 3.0) == pytest.approx(2.0 * 0.9)
    assert buckets.ready_before_end_s(10**15, 3.0) == pytest.approx(2.0)


@given(st.integers(1, MIB))
def test_a_vector_of_one_bucket_is_ready_when_the_step_ends(n_bytes):
    assert Buckets().ready_before_end_s(n_bytes, 3.0) == 0.0


@given(st.integers(1, 10**11), st.floats(1e-6, 3600))
def test_without_overlap_all_is_sent_when_the_step_ends(n_bytes, step_s):
    assert NO_OVERLAP.ready_before_end_s(n_bytes, step_s) == 0.0
    assert NO_OVERLAP.last_bytes(n_bytes) == n_bytes


def seconds_per_step(round_s: float, buckets: Buckets, steps=(1.0, 1.0), algorithm="sync_sgd") -> float:
    """Of synchronous SGD on a vector of 40 MB, whose all-reduce takes round_s, and of a part its share."""
    vector, text = Vector(10_000_000), registry.find(algorithm)
    ranks = [Rank(TimingReplica(vector, Tally(1)), iter([step_s] * 50)) for step_s in steps]
    pace = Pace(len(steps), 20 * len(steps))
    seconds = lambda n_bytes, share: round_s * share  # noqa: E731
    cluster = Cluster(text.compute, text.communicate, ranks, [pace], seconds, vector.nbytes, buckets=buckets)
    cluster.run()
    assert ranks[0].left_s is not None
    return ranks[0].left_s / ranks[0].tally.local_steps


BUCKETS = Buckets(first_bytes=4e6, other_bytes=18e6)  # 4 + 18 + 18 MB: the first one is full 0.6 s before the end


@pytest.mark.parametrize(
    "round_s, step_s",
    [
        (0.0, 1.0),
        (0.2, 1.0 + 0.2 * 0.45),  # the last bucket begins when the step ends
        (1.0, 1.0 + 0.45),  # likewise, though the whole would be through 0.4 s after it
        (2.0, 0.4 + 2.0),  # the whole vector, begun when the first bucket was full
    ],
)
def test_a_step_ends_with_its_last_bucket_or_with_the_whole_vector(round_s, step_s):
    assert seconds_per_step(round_s, BUCKETS) == pytest.approx(step_s)
    assert seconds_per_step(round_s, NO_OVERLAP) == pytest.approx(1.0 + round_s)


def test_the_overlap_begins_with_the_last_rank_not_with_the_first():
    assert seconds_per_step(4.0, BUCKETS, steps=(1.0, 3.0)) == pytest.approx(3.0 * 0.4 + 4.0)


@settings(max_examples=30, deadline=None)
@given(st.floats(0, 5), st.floats(0.1, 3))
def test_overlap_never_costs_time_and_never_saves_more_than_the_backward_pass(round_s, slow_s):
    with_overlap = seconds_per_step(round_s, BUCKETS, (1.0, slow_s))
    without = seconds_per_step(round_s, NO_OVERLAP, (1.0, slow_s))
    assert without - 2 / 3 * max(1.0, slow_s) <= with_overlap + 1e-9 and with_overlap <= without + 1e-9


def test_averages_of_replicas_overlap_with_nothing():
    together = [seconds_per_step(2.0, buckets, algorithm="local_sgd") for buckets in (BUCKETS, NO_OVERLAP)]
    assert together[0] == together[1]
