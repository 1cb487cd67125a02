"""What ranks conclude from the header: pure functions of the same tables."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lasgd.algorithms.requests import Failure, Mean
from lasgd.errors import ConfigurationError
from lasgd.pace import IDLE_S, LONGEST_PAUSE_S, MAX_FRAGMENTS, Column, Delay, End, Pace, Sickness
from lasgd.tally import Staleness, Tally


def tally(samples=0, step_s=0.0, **flags) -> Tally:
    return Tally(1, local_steps=samples, samples=samples, recent_s=[step_s], **flags)


def agree(paces: list[Pace], tallies: list[Tally], weights=None, sick=(), round_s=0.0, parts=1) -> None:
    """One round: the headers' sum reaches every rank."""
    weights = weights or [1.0] * len(paces)
    headers = [
        pace.header(rank, tallies[rank], weights[rank], rank in sick, round_s, parts).clone()
        for rank, pace in enumerate(paces)
    ]
    total = torch.stack(headers).sum(0)
    for pace in paces:
        pace.agree(Mean(None, total.clone()))


def paces(n: int, samples: int = 100, **options) -> list[Pace]:
    return [Pace(n, samples, **options) for _ in range(n)]


def test_the_next_round_is_due_after_the_median_ranks_step_not_after_the_stragglers():
    ranks = paces(4, steps_per_round=2.0)
    agree(ranks, [tally(step_s=s) for s in (0.1, 0.1, 0.2, 9.0)])
    assert {p.due_s for p in ranks} == {0.2}


def test_rounds_far_apart_come_sooner_where_a_mark_or_the_end_is_near():
    ranks = paces(2, samples=1000, steps_per_round=1e6, evaluations=4)
    agree(ranks, [tally(100, step_s=0.1), tally(50, step_s=0.2)])  # 15 samples a second, the next mark at 250
    assert ranks[0].due_s == pytest.approx(100 / 15)
    agree(ranks, [tally(125, step_s=0.1), tally(124, step_s=0.2)])  # one sample short
    assert ranks[0].due_s == pytest.approx(0.1), "but never oftener than every local step"


@pytest.mark.parametrize("step_s, due_s", [(0.1, LONGEST_PAUSE_S), (100.0, 100.0)])
def test_ranks_hear_of_each_other_after_a_while_whatever_the_pace(step_s, due_s):
    ranks = paces(2, samples=10**9, steps_per_round=1e6)
    agree(ranks, [tally(10, step_s=step_s)] * 2)
    assert ranks[0].due_s == due_s


def test_of_two_ranks_the_faster_one_is_the_median():
    ranks = paces(2)
    agree(ranks, [tally(step_s=0.4), tally(step_s=0.1)])
    assert ranks[0].due_s == 0.1


def test_ranks_that_do_not_know_their_step_time_yet_do_not_count():
    ranks = paces(3)
    agree(ranks, [tally(), tally(), tally()])
    assert ranks[0].due_s == IDLE_S
    agree(ranks, [tally(step_s=3.0), tally(), tally()])
    assert ranks[0].due_s == 3.0


@given(st.lists(st.lists(st.integers(0, 40), min_size=3, max_size=3), min_size=1, max_size=20), st.integers(0, 4))
def test_all_ranks_see_every_mark_and_the_end_in_the_same_round(rounds, marks):
    ranks = paces(3, samples=100, evaluations=marks, checkpoints=marks)
    tallies = [tally(), tally(), tally()]
    for steps in rounds:
        for one, more in zip(tallies, steps, strict=True):
            one.samples += more
        agree(ranks, tallies)
        assert len({(p.end, p.checkpoint, p.evaluation, p.samples, p.round, p.progress) for p in ranks}) == 1
        total = sum(t.samples for t in tallies)
        assert (ranks[0].end is End.SAMPLES) == (total >= 100)
        assert ranks[0].progress == min(1.0, total / 100)


def test_marks_divide_the_budget_and_the_last_is_the_end_itself():
    (pace,) = paces(1, samples=100, evaluations=4, checkpoints=2)
    seen = []
    for samples in (0, 24, 25, 49, 50, 75, 99, 100):
        agree([pace], [tally(samples)])
        seen.append((pace.evaluation, pace.checkpoint))
    assert seen == [(0, 0), (0, 0), (1, 0), (1, 0), (2, 1), (3, 1), (3, 1), (3, 1)]


def test_without_marks_none_is_ever_reached():
    (pace,) = paces(1, samples=10)
    agree([pace], [tally(10)])
    assert (pace.evaluation, pace.checkpoint, pace.end) == (0, 0, End.SAMPLES)


def test_a_checkpoint_is_durable_when_the_last_rank_has_it():
    ranks = paces(2)
    agree(ranks, [tally(saved_checkpoint=3), tally(saved_checkpoint=2)])
    assert ranks[0].durable_checkpoint == 2


def test_one_rank_that_asks_to_stop_ends_all_with_one_more_checkpoint():
    ranks = paces(2, samples=100, checkpoints=10)
    agree(ranks, [tally(25), tally(10)])
    before = ranks[0].checkpoint
    agree(ranks, [tally(25), tally(10, wants_stop=True)])
    assert [p.end for p in ranks] == [End.STOP] * 2
    assert [p.checkpoint for p in ranks] == [before + 1] * 2


def test_the_checkpoint_of_an_early_end_does_not_swallow_the_next_regular_one_after_a_resume():
    (pace,) = paces(1, samples=100, checkpoints=10)
    agree([pace], [tally(35)])
    agree([pace], [tally(36, wants_stop=True)])
    stopped_at = pace.checkpoint
    (again,) = paces(1, samples=100, checkpoints=10)
    again.resume(round_=pace.round, samples=36, checkpoint=stopped_at, evaluation=0)
    agree([again], [tally(39)])
    assert again.checkpoint == stopped_at
    agree([again], [tally(40)])
    assert again.checkpoint == stopped_at + 1


def test_the_run_goes_on_while_one_rank_has_not_left():
    ranks = paces(2)
    agree(ranks, [tally(1, has_left=True), tally(1)])
    assert ranks[0].end is None
    agree(ranks, [tally(1, has_left=True), tally(2, has_left=True)])
    assert [p.end for p in ranks] == [End.LEFT] * 2


def test_the_end_once_agreed_stays():
    (pace,) = paces(1, samples=5)
    agree([pace], [tally(5)])
    agree([pace], [tally(5, wants_stop=True, has_left=True)])
    assert (pace.end, pace.checkpoint) == (End.SAMPLES, 0)


def test_no_weight_at_all_is_divergence():
    ranks = paces(2)
    agree(ranks, [tally(), tally()], weights=[0.0, 0.0], sick=(0, 1))
    assert ranks[1].end is End.DIVERGED
    assert ranks[1].sicknesses == [Sickness(0, 1), Sickness(1, 1)]


def test_sample_counts_above_two_to_the_24_are_exact():
    ranks = paces(3, samples=2**53)
    counts = [2**24 + 1, 2**40 + 3, 2**52 - 2**41 + 7]
    agree(ranks, [tally(c) for c in counts])
    assert ranks[0].samples == sum(counts)
    assert ranks[0].end is None


def test_a_failed_round_changes_nothing():
    (pace,) = paces(1)
    agree([pace], [tally(3, step_s=1.0)])
    before = {k: v for k, v in vars(pace).items() if k != "_header"}
    pace.agree(Failure(RuntimeError()))
    assert {k: v for k, v in vars(pace).items() if k != "_header"} == before


def test_resume_goes_on_from_the_agreement_of_the_checkpoint():
    (pace,) = paces(1, samples=100, checkpoints=10)
    pace.resume(round_=7, samples=40, checkpoint=4, evaluation=2)
    assert (pace.round, pace.progress, pace.checkpoint, pace.durable_checkpoint) == (7, 0.4, 4, 4)
    agree([pace], [tally(41, saved_checkpoint=4)])
    assert (pace.round, pace.checkpoint, pace.evaluation) == (8, 4, 2)


def test_the_header_is_zero_but_for_the_own_row():
    pace = Pace(3, 10)
    header = pace.header(1, tally(5), 1.0, False, 0.0, 2)
    assert header[[0, 2]].abs().sum() == 0
    assert header[1, Column.SAMPLES] == 5
    assert header.dtype == torch.float64


def test_step_time_is_the_median_of_the_latest_nine():
    one = Tally(4)
    one.start_clock(100.0)
    now = 100.0
    for seconds in [50.0] + [1.0] * 4 + [2.0] * 5 + [2.0]:
        now += seconds
        one.count_step(now)
    assert (one.step_s, one.local_steps, one.samples) == (2.0, 11, 44)


def test_staleness_before_the_first_merge_is_zero():
    staleness = Staleness()
    assert (staleness.mean_steps, staleness.max_steps) == (0.0, 0)
    staleness.add(1)
    staleness.add(4)
    assert (staleness.mean_steps, staleness.max_steps) == (2.5, 4)


# fragments="auto"


class Wire:
    """Rounds over a network where one of F fragments takes latency + bandwidth/F local steps, as ranks run it: what is
    asked for takes effect when a cycle is complete, and a round tells how long the one before it took."""

    def __init__(self, latency=0.0, bandwidth=0.0, noise=0.0, most_parts=1000, seed=0, least=1):
        self.latency, self.bandwidth, self.noise, self.most_parts = latency, bandwidth, noise, most_parts
        self.pace = Pace(1, 10**9, fragments="auto", least_fragments=least)
        self.parts, self.turn, self.latest = 1, -1, (0.0, 0)
        self.random = random.Random(seed)
        self.asked: list[int] = []

    def run(self, rounds: int) -> int:
        for _ in range(rounds):
            self.turn = (self.turn + 1) % self.parts
            if self.turn == 0:
                self.parts = min(self.pace.fragments, self.most_parts)
            agree([self.pace], [tally(step_s=0.5)], round_s=self.latest[0], parts=self.latest[1])
            steps = (self.latency + self.bandwidth / self.parts) * self.random.lognormvariate(0, self.noise)
            self.latest = (0.5 * steps, self.parts)
            self.asked.append(self.pace.fragments)
        return self.pace.fragments

    def changes(self) -> int:
        return sum(a != b for a, b in zip(self.asked, self.asked[1:], strict=False))


@pytest.mark.parametrize("delay, fragments", [(0.2, 1), (1.0, 1), (2.5, 3), (4.2, 5), (9.7, 10), (17, 17), (35, 20)])
def test_on_pure_bandwidth_the_fragments_are_the_delay_in_steps_rounded_up(delay, fragments):
    wire = Wire(bandwidth=delay)
    assert wire.run(60) == fragments
    assert wire.changes() <= 1


@pytest.mark.parametrize("latency", [0.5, 1.6, 3.3, 8.5])
def test_on_pure_latency_the_vector_is_whole_again_once_cutting_has_won_nothing(latency):
    wire = Wire(latency=latency)
    assert wire.run(200) == 1
    assert wire.changes() <= 2


def age(fragments: int, latency: float, bandwidth: float) -> float:
    """Mean age, in local steps, of what a rank knows of the others: rounds back to back, but one a step at most."""
    round_steps = latency + bandwidth / fragments
    return fragments * max(1.0, round_steps) / 2 + round_steps


@pytest.mark.parametrize("latency, bandwidth", [(1, 9), (3, 3), (0.2, 6), (0.5, 4), (2, 15), (6, 1)])
def test_of_both_the_number_is_the_one_with_the_freshest_averages(latency, bandwidth):
    wire = Wire(latency, bandwidth)
    best = min(range(1, MAX_FRAGMENTS + 1), key=lambda f: age(f, latency, bandwidth))
    assert abs(wire.run(200) - best) <= 1
    assert age(wire.asked[-1], latency, bandwidth) <= 1.1 * age(best, latency, bandwidth)
    assert wire.changes() <= 3


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("latency, bandwidth, least, most", [(0, 10, 6, 16), (0.5, 4, 3, 7), (4, 0, 1, 2)])
def test_noise_does_not_make_it_flap(latency, bandwidth, least, most, seed):
    wire = Wire(latency, bandwidth, noise=0.2, seed=seed)
    wire.run(600)
    assert wire.changes() <= 4
    late = wire.asked[100:]
    assert least <= min(late) and max(late) <= most


@pytest.mark.parametrize("before, after, fragments", [((8, 0), (0, 8), 8), ((0, 8), (8, 0), 1), ((4, 0), (1, 19), 7)])
def test_a_network_that_becomes_another_one_is_learnt_anew(before, after, fragments):
    wire = Wire(*before)
    wire.run(100)
    wire.latency, wire.bandwidth = 3 * after[0], 3 * after[1]  # and three times slower, or nothing tells it
    wire.run(200)
    wire.latency, wire.bandwidth = after
    assert abs(wire.run(300) - fragments) <= 1


def test_one_slow_round_changes_nothing():
    wire = Wire(bandwidth=5.0)
    wire.run(50)
    wire.bandwidth = 500.0
    wire.run(1)
    wire.bandwidth = 5.0
    wire.run(50)
    assert set(wire.asked[10:]) == {5}


@pytest.mark.parametrize("before, after, fragments", [(4, 16, 16), (16, 4, 4), (5, 7, 7), (12, 0.5, 1), (0.5, 12, 12)])
def test_a_link_that_changes_its_speed_mid_run_is_followed(before, after, fragments):
    wire = Wire(bandwidth=before)
    wire.run(100)
    wire.bandwidth = after
    assert abs(wire.run(300) - fragments) <= 1
    assert wire.changes() <= 6


def test_rows_too_long_for_the_fragments_asked_for_end_in_a_stable_number():
    wire = Wire(bandwidth=10.0, most_parts=3)
    wire.run(200)
    assert wire.asked[-1] <= MAX_FRAGMENTS
    assert wire.changes() <= 2


def test_it_is_the_same_on_all_ranks():
    ranks = paces(3, fragments="auto")
    for round_ in range(30):
        agree(ranks, [tally(step_s=s) for s in (0.1, 0.2, 0.7)], round_s=1.0 + 0.1 * (round_ % 3), parts=1)
        assert len({p.fragments for p in ranks}) == 1
    assert ranks[0].fragments > 1


def test_a_given_number_of_fragments_is_never_changed():
    ranks = paces(1, fragments=3)
    for _ in range(20):
        agree(ranks, [tally(step_s=0.1)], round_s=5.0, parts=3)
    assert ranks[0].fragments == 3


@pytest.mark.parametrize("latency, bandwidth, fragments", [(0, 0, 4), (0.1, 0.1, 4), (8, 0, 4), (0, 3, 4), (0, 8, 8)])
def test_it_begins_with_the_least_number_and_does_not_go_below(latency, bandwidth, fragments):
    wire = Wire(latency, bandwidth, least=4)
    assert abs(wire.run(200) - fragments) <= (fragments > 4)
    assert wire.asked[0] == min(wire.asked) == 4
    assert max(wire.asked) <= 8, "twice as many are enough to tell latency from bandwidth"
    assert wire.changes() <= 3


@given(st.lists(st.tuples(st.integers(1, 30), st.floats(1e-6, 1e6)), max_size=60))
def test_whatever_is_measured_the_number_stays_within_its_bounds(samples):
    delay, asked = Delay(), 1
    for parts, steps in samples:
        asked = delay.fragments(asked, parts, steps)
        assert 1 <= asked <= MAX_FRAGMENTS


def test_ranks_that_ask_for_no_header_hold_no_table_of_all_ranks():
    Pace(10**13, 1)  # the table would be larger than any memory


def spent(elapsed_s: list[float], samples: int = 10) -> Mean:
    table = torch.zeros(len(elapsed_s), len(Column), dtype=torch.float64)
    table[:, Column.WEIGHT], table[:, Column.SAMPLES] = 1.0, samples
    table[:, Column.ELAPSED_S] = torch.tensor(elapsed_s, dtype=torch.float64)
    return Mean(torch.zeros(1), table)


def test_a_budget_in_seconds_is_used_up_by_the_rank_that_has_come_furthest():
    pace = Pace(2, samples=None, seconds=8.0, evaluations=4)
    pace.agree(spent([2.0, 1.0]))
    assert (pace.progress, pace.evaluation, pace.end) == (0.25, 1, None)
    assert pace.expected_samples == 80  # 20 in a quarter of the time
    pace.agree(spent([7.0, 7.5]))
    assert (pace.evaluation, pace.end) == (3, None)
    pace.agree(spent([7.9, 8.0]))
    assert pace.progress == 1.0
    assert pace.end is End.SAMPLES


def test_a_round_comes_sooner_where_the_time_is_nearly_up():
    pace = Pace(1, samples=None, seconds=10.0, steps_per_round=100)
    outcome = spent([8.0])
    assert outcome.header is not None
    outcome.header[:, Column.STEP_S] = 0.1
    pace.agree(outcome)
    assert pace.pause_s == pytest.approx(2.0)  # not 100 steps of 0.1 s


def test_ranks_that_agree_on_nothing_end_by_their_own_clock():
    pace, tally = Pace(2, samples=None, seconds=1.0), Tally(batch_size=1)
    tally.start_clock(50.0)
    tally.count_step(50.6)
    pace.count_alone(tally)
    assert pace.end is None
    tally.count_step(51.0)
    pace.count_alone(tally)
    assert pace.end is End.SAMPLES


def test_a_resumed_run_goes_on_counting_its_seconds():
    tally = Tally(batch_size=1)
    tally.resume(local_steps=3, samples=3, checkpoint=1, elapsed_s=7.0)
    tally.start_clock(100.0)
    tally.start_clock(101.0)  # after a wait: no new start
    tally.count_step(102.0)
    assert tally.elapsed_s == 9.0


@pytest.mark.parametrize("budget", [{"samples": None}, {"samples": 3, "seconds": 1.0}])
def test_a_budget_is_one_of_two(budget):
    with pytest.raises(ConfigurationError, match="either a number of samples or one of seconds"):
        Pace(1, **budget)
