import pytest

from lasgd.errors import ConfigurationError, ProtocolError
from lasgd.lab.conditions import Condition, parse
from lasgd.lab.padding import StepPadding, stall_s
from virtual_clock import VirtualClock


def durations(text, compute_s, *, rank=0, world_size=4, seed=0, local_step=0, late_s=0.0):
    """The length of each step, and the padding afterwards, for a rank that computes for `compute_s` in each."""
    clock = VirtualClock(late_s)
    padding = StepPadding(parse(text), rank, world_size, seed, local_step=local_step, clock=clock, sleep=clock.sleep)
    lengths = []
    for seconds in compute_s:
        begun_s = clock()
        padding.begin()
        clock.now_s += seconds
        padding.wait_rest()
        lengths.append(clock() - begun_s)
    return lengths, padding


def test_a_step_lasts_as_long_as_the_condition_says():
    lengths, padding = durations("step=100ms", [0.02, 0.05, 0.0])
    assert lengths == pytest.approx([0.1] * 3)
    assert (padding.steps, padding.overruns, padding.overrun_share) == (3, 0, 0.0)


def test_a_stragglers_step_is_longer_by_its_factor_and_nobody_elses():
    assert durations("straggler", [0.02], rank=3)[0] == pytest.approx([0.4])
    assert durations("straggler", [0.02], rank=2)[0] == pytest.approx([0.1])


def test_a_straggler_without_step_takes_its_factor_times_its_own_time():
    lengths, padding = durations("straggler=1:4x", [0.02, 0.05], rank=1)
    assert lengths == pytest.approx([0.08, 0.2])
    assert padding.overruns == 0


def test_a_step_that_outlasts_its_padding_is_counted_and_not_shortened():
    lengths, padding = durations("step=100ms", [0.02, 0.13, 0.02, 0.02])
    assert lengths == pytest.approx([0.1, 0.13, 0.1, 0.1])
    assert (padding.overruns, padding.overrun_share) == (1, 0.25)


def test_a_straggler_may_compute_for_its_longer_step():
    assert durations("straggler", [0.3], rank=3)[1].overruns == 0


def test_a_late_wake_up_is_not_carried_into_the_next_step():
    lengths, _ = durations("step=100ms", [0.02] * 50, late_s=0.003)
    assert lengths == pytest.approx([0.103] * 50)


def test_a_sleep_that_wakes_early_is_taken_up_again():
    clock = VirtualClock()
    wakes = iter([0.5, 0.9, 1.0])  # share of what was asked for
    padding = StepPadding(parse("step=100ms"), 0, 1, 0, clock=clock, sleep=lambda s: clock.sleep(s * next(wakes)))
    padding.begin()
    padding.wait_rest()
    assert clock() == pytest.approx(50.1)
    assert clock.sleeps == 3


def test_fast_neither_sleeps_nor_reads_the_clock():
    def untouched(*_):
        raise AssertionError("fast needs neither clock nor sleep")

    padding = StepPadding(Condition(), 0, 1, 0, clock=untouched, sleep=untouched)
    padding.begin()
    padding.wait_rest()
    assert (padding.steps, padding.overrun_share) == (1, 0.0)


def test_a_rank_that_is_no_straggler_is_not_padded_without_step():
    assert durations("straggler=1:4x", [0.02], rank=0)[0] == pytest.approx([0.02])


def test_a_link_is_no_business_of_the_steps():
    assert durations("link=20mbit+round=1s", [0.02])[0] == pytest.approx([0.02])


def test_a_stall_comes_on_top_of_the_padded_step():
    assert durations("stall=1s@100%+step=100ms", [0.02, 0.13])[0] == pytest.approx([1.1, 1.13])
    assert durations("stall=1s@100%", [0.02])[0] == pytest.approx([1.02])


def test_a_stall_is_no_overrun():
    assert durations("stall=1s@100%+step=100ms", [0.02])[1].overruns == 0


def test_stalls_are_the_same_for_the_same_seed_rank_and_step():
    jitter = parse("stall=1s@20%")
    drawn = [[stall_s(jitter, 7, rank, step) for step in range(100)] for rank in range(4)]
    assert drawn == [[stall_s(jitter, 7, rank, step) for step in range(100)] for rank in range(4)]
    assert len({tuple(row) for row in drawn}) == 4  # ranks stall at different steps
    assert drawn[0] != [stall_s(jitter, 8, 0, step) for step in range(100)]


def test_stalls_come_at_the_steps_at_which_they_have_always_come():
    # Stored runs are compared with new ones, so the draws must never change.
    jitter = parse("stall=1s@5%")
    assert [step for step in range(200) if stall_s(jitter, 0, 3, step)] == [
        0,
        31,
        32,
        35,
        37,
        39,
        62,
        69,
        88,
        95,
        125,
        134,
        164,
        188,
        194,
        199,
    ]


def test_stalls_come_as_often_as_their_probability():
    # 20,000 draws with p = 1 %: 200 expected, standard deviation 14; the draws are fixed, five deviations allowed
    stalls = sum(stall_s(parse("stall=1s@1%"), 0, rank, step) > 0 for rank in range(4) for step in range(5000))
    assert 130 <= stalls <= 270


def test_stalls_at_zero_per_cent_never_come():
    assert not any(stall_s(parse("stall=1s@0%"), 0, 0, step) for step in range(1000))


def test_a_resumed_run_carries_on_with_its_stalls():
    whole, _ = durations("stall=1s@20%", [0.02] * 60, seed=3)
    resumed, _ = durations("stall=1s@20%", [0.02] * 30, seed=3, local_step=30)
    assert resumed == pytest.approx(whole[30:])
    assert max(resumed) > 1


def test_waiting_without_a_beginning_is_a_bug_that_is_named():
    padding = StepPadding(parse("step=100ms"), 2, 4, 0)
    with pytest.raises(ProtocolError, match=r"rank 2: wait_rest\(\) without begin\(\)"):
        padding.wait_rest()


def test_a_rank_that_does_not_exist_is_refused():
    with pytest.raises(ConfigurationError, match="no rank 7"):
        StepPadding(parse("straggler=7:4x"), 0, 4, 0)


class Step:
    """A step whose gradients become ready bucket by bucket, on a clock that only computing, sleeping and waiting move.

    The last bucket's all-reduce takes `network_s`, in which the rank waits, and the padding is told so.
    """

    def __init__(self, text: str, *, rank: int = 0, seed: int = 0, late_s: float = 0.0) -> None:
        self.clock = VirtualClock(late_s)
        self.waited_s = 0.0
        self.padding = StepPadding(
            parse(text), rank, 4, seed, waited_s=lambda: self.waited_s, clock=self.clock, sleep=self.clock.sleep
        )

    def take(self, *parts_s: float, network_s: float = 0.0, broadcast_s: float = 0.0) -> list[float]:
        """Computes for `parts_s`, a bucket being ready after each; the buckets' moments and the end, from the begin."""
        begun_s = self.clock()
        self.padding.begin()
        self._wait(broadcast_s)
        moments = []
        for seconds in parts_s:
            self.clock.now_s += seconds
            self.padding.wait_moment()
            moments.append(self.clock() - begun_s)
        self._wait(network_s)
        self.padding.wait_rest()
        return [*moments, self.clock() - begun_s]

    def _wait(self, seconds: float) -> None:
        self.clock.now_s += seconds
        self.waited_s += seconds


def test_a_bucket_leaves_at_the_moment_that_it_stands_for_in_a_step_stretched_in_proportion():
    step = Step("step=100ms")
    step.take(0.012, 0.008)
    assert step.take(0.012, 0.008) == pytest.approx([0.06, 0.1, 0.1])
    assert step.take(0.005, 0.005, 0.010) == pytest.approx([0.025, 0.05, 0.1, 0.1])


def test_the_first_step_is_stretched_at_its_end_because_nobody_knows_yet_how_long_it_computes():
    assert Step("step=100ms").take(0.012, 0.008) == pytest.approx([0.012, 0.02, 0.1])


def test_the_median_of_nine_steps_stands_for_the_length_of_the_present_one():
    step = Step("step=100ms")
    for seconds in (0.02, 0.02, 0.09, 0.02, 0.02):
        step.take(seconds)
    assert step.take(0.01, 0.01)[0] == pytest.approx(0.05)
    for _ in range(9):
        step.take(0.04)
    assert step.take(0.01, 0.01)[0] == pytest.approx(0.025)


def test_a_step_slower_than_expected_is_stretched_to_its_padding_and_no_further():
    step = Step("step=100ms")
    step.take(0.02)
    assert step.take(0.03, 0.01) == pytest.approx([0.1, 0.11, 0.11])
    assert step.padding.overruns == 0


def test_a_straggler_without_step_is_stretched_by_its_factor_from_the_first_step_on():
    assert Step("straggler=1:4x", rank=1).take(0.012, 0.008) == pytest.approx([0.048, 0.08, 0.08])


def test_time_spent_waiting_for_the_network_is_neither_computing_nor_padding():
    step = Step("step=100ms")
    step.take(0.02)
    assert step.take(0.01, 0.01, network_s=0.9) == pytest.approx([0.05, 0.1, 1.0])
    assert step.take(0.01, 0.01, broadcast_s=0.3) == pytest.approx([0.35, 0.4, 0.4])
    assert step.padding.overruns == 0
    assert step.take(0.01, 0.01) == pytest.approx([0.05, 0.1, 0.1])  # nor does it count as the step's own length


def test_a_stall_comes_before_all_buckets_and_lengthens_the_step_once():
    step = Step("step=100ms+stall=1s@100%")
    assert step.take(0.01, 0.01) == pytest.approx([1.01, 1.02, 1.1])
    assert step.take(0.01, 0.01, network_s=0.5) == pytest.approx([1.05, 1.1, 1.6])


def test_late_wake_ups_within_a_step_are_made_up_for_at_its_later_moments():
    step = Step("step=100ms", late_s=0.003)
    step.take(0.02)
    *moments, end_s = step.take(0.005, 0.005, 0.010)
    assert moments == pytest.approx([0.028, 0.053, 0.103])
    assert end_s == pytest.approx(0.103)


def test_without_padding_a_bucket_leaves_at_once():
    step = Step("fast")
    assert step.take(0.01, 0.01) == pytest.approx([0.01, 0.02, 0.02])
    assert step.clock.sleeps == 0
