"""A run is told where its averages came so late that they leave the learning rate little room."""

from __future__ import annotations

import pytest

from lasgd.lab.drift import Cycle, MeanCycle
from lasgd.training.display import warnings
from lasgd.training.room import LEAST_ROOM, room, room_of


def run(staleness: float, rounds: int, cut: int, steps: int = 1000, ranks: int = 2, **settings) -> dict:
    """run.json as far as it matters; every further rank took a tenth of the steps and of the staleness."""

    def rank(number: int) -> dict:
        share = 1.0 if number == 0 else 0.1
        late = {"mean": staleness * share, "max": 20}
        return {"rank": number, "local_steps": int(steps * share), "rounds": rounds, "staleness_steps": late}

    return {
        "algorithm": "lasgd",
        "settings": {"momentum": 0.9, "outer_momentum": None, "fragments": "auto", "lr": 0.1} | settings,
        "fragments": cut,
        "ranks": [rank(number) for number in range(ranks)],
    }


# Settings, staleness and steps per round of the cells of docs/experiments.md, and what became of them there.
@pytest.mark.parametrize(
    ("momentum", "outer", "fragments", "staleness", "steps_per_round", "is_enough"),
    [
        (0.9, 0.0, 1, 11, 10.0, False),  # 11.5 points behind
        (0.5, 0.8, 1, 2, 1.0, False),  # 9 points behind
        (0.9, 0.0, 10, 2, 1.0, True),
        (0.5, 0.8, 10, 2, 1.0, True),
        (0.5, 0.8, 4, 1, 1.0, True),
        (0.0, 0.0, 1, 11, 10.0, True),  # without momentum a whole vector that is late leaves half of it
    ],
)
def test_room_is_little_where_learning_was_clearly_worse(
    momentum, outer, fragments, staleness, steps_per_round, is_enough
):
    assert (min(room(momentum, outer, fragments, staleness, steps_per_round)) >= LEAST_ROOM) is is_enough


def test_room_is_either_limit_over_that_of_synchronous_sgd():
    of_ranks, of_mean = Cycle(4, 1, 0.5).limit(), MeanCycle(4, 1, 0.5, 0.8).limit()
    assert room(0.5, 0.8, 4, 2, 1.0) == pytest.approx((of_ranks / 3.8, of_mean / 3.8))
    of_mean = MeanCycle(1, 1, 0.5, 0.8).limit()
    assert room(0.5, 0.8, 1, 2, 1.0).of_mean == pytest.approx(of_mean / 3.8)
    assert room(0.5, 0.0, 4, 2, 1.0) == pytest.approx((min(1.0, Cycle(4, 1, 0.5).limit() / 3.0), 1.0))


def test_room_can_be_told_of_very_long_cycles():
    assert 0 < min(room(0.5, 0.8, 20, 2, 1000.0)) <= 1


def test_momentum_is_taken_as_it_was_shared_out():
    assert room_of(run(2.0, 1000, 10)) == room(0.5, 0.8, 10, 2, 1.0)
    assert room_of(run(2.0, 1000, 10, outer_momentum=0.0)) == room(0.9, 0.0, 10, 2, 1.0)
    assert room_of(run(11.0, 100, 1, fragments=1)) == room(0.9, 0.0, 1, 11, 10.0)


def test_the_rank_whose_means_came_latest_counts():
    assert room_of(run(11.0, 100, 1, fragments=1, ranks=4)) == room_of(run(11.0, 100, 1, fragments=1, ranks=2))


def test_one_rank_waits_for_nobody_s_average():
    assert room_of(run(11.0, 100, 1, fragments=1, ranks=1)) is None


@pytest.mark.parametrize(
    "changes", [{"algorithm": "sync_sgd"}, {"settings": {}}, {"settings": None}, {"fragments": None}, {"ranks": []}]
)
def test_nothing_is_said_of_what_is_no_run_of_late_averages(changes):
    assert room_of(run(11.0, 100, 1) | changes) is None


def test_a_run_without_a_round_says_nothing():
    assert room_of(run(0.0, 0, 1)) is None


BESIDE = {"replicas_identical": True, "padding_overrun": 0.0}


def test_the_summary_warns_below_a_tenth_and_only_there():
    (said,) = warnings(run(11.0, 100, 1, fragments=1) | BESIDE)
    assert "2% of the room" in said and "the ranks swing ever further apart" in said
    assert said.endswith("Use --fragments auto or --wire int8 or a lower --lr.")
    assert warnings(run(2.0, 1000, 10) | BESIDE) == []


def test_the_summary_advises_against_what_is_the_matter_and_nothing_that_is_so_already():
    (said,) = warnings(run(2.0, 1000, 1, outer_momentum=0.8, momentum=0.5) | BESIDE)
    assert "the mean swings ever further" in said
    assert "--outer-momentum 0" in said and "int8" not in said
    (said,) = warnings(run(51.0, 20, 1, outer_momentum=0.0, wire="int8") | BESIDE)
    assert "less than 1% of the room" in said
    assert said.endswith("Use a lower --lr.")
