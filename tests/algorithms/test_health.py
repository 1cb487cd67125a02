"""A rank with NaN or Inf contributes nothing, adopts every mean for one cycle, and goes on."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lasgd.pace import End, Sickness
from scripted_driver import Point, Ranks, towards, vector


def three(fragments: int = 1, **options) -> Ranks:
    return Ranks([Point([float(i)] * 6) for i in range(3)], fragments=fragments, **options)


def spoil(ranks: Ranks, rank: int, value: float = float("nan"), at: int = 0) -> None:
    with torch.no_grad():
        ranks.models[rank].x[at] = value


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("fragments", [1, 3])
@pytest.mark.parametrize("at", [0, 5])
def test_a_rank_with_nan_or_inf_contributes_nothing_and_takes_the_others_mean(value, fragments, at):
    ranks = three(fragments)
    recovered = []
    ranks.replicas[1].on_recovery = lambda: recovered.append(True)
    spoil(ranks, 1, value, at)
    for _ in range(2 * fragments):  # found at its fragment's turn, then one cycle
        ranks.round()
        ranks.boundary()
    assert recovered == [True]
    assert all(torch.isfinite(vector(m)).all() for m in ranks.models)
    healthy = at < 6 // fragments  # where fragment 0 is sick, rank 1 has never contributed
    if healthy:
        assert all(vector(m).tolist() == [1.0] * 6 for m in ranks.models)  # the mean of 0 and 2
    assert [s.rank for s in ranks.paces[0].sicknesses] == [1]
    assert ranks.paces[0].sicknesses == ranks.paces[2].sicknesses


def test_a_sick_rank_shows_nothing_until_it_has_adopted_a_whole_cycle():
    ranks = three(3)
    spoil(ranks, 2)
    ranks.round()
    ranks.round()
    ranks.boundary()
    assert vector(ranks.models[2]).isnan().any()
    ranks.round()
    ranks.boundary()
    assert vector(ranks.models[2]).tolist() == [0.5] * 6


def test_a_correction_that_was_still_to_be_shown_when_the_rank_fell_ill_is_not_shown_twice():
    ranks = three(3)
    ranks.cycle()  # all three fragments have arrived on rank 1, none is shown
    spoil(ranks, 1)
    ranks.round()
    ranks.round()  # two of three are adopted
    ranks.step(1)
    assert vector(ranks.models[1]).isnan().any()
    ranks.round()
    ranks.boundary()
    assert vector(ranks.models[1]).tolist() == [1.0] * 6


def test_the_sickness_is_reported_once_with_rank_and_round():
    ranks = three(2)
    ranks.round()
    ranks.boundary()
    spoil(ranks, 0, at=5)
    for _ in range(6):
        ranks.round()
        ranks.boundary()
    assert ranks.paces[1].sicknesses == [Sickness(rank=0, round=2)]


def test_a_rank_that_falls_ill_twice_is_reported_twice():
    ranks = three()
    for _ in range(2):
        spoil(ranks, 0)
        for _ in range(3):
            ranks.round()
            ranks.boundary()
    assert [s.rank for s in ranks.paces[0].sicknesses] == [0, 0]


def test_nan_on_all_ranks_is_the_end_on_all_in_the_same_round():
    ranks = three()
    for rank in range(3):
        spoil(ranks, rank)
    ranks.round()
    assert [p.end for p in ranks.paces] == [End.DIVERGED] * 3
    assert ranks.pending == [None] * 3


def test_nan_on_all_ranks_found_only_in_the_last_exact_average_is_divergence_too():
    ranks = Ranks([Point([1.0]), Point([2.0])], samples=1)
    ranks.step(0)
    ranks.begin_round()
    spoil(ranks, 0)
    spoil(ranks, 1)
    ranks.deliver()  # this round was healthy, and found the budget reached
    assert ranks.paces[0].end is End.SAMPLES
    ranks.round()
    assert [p.end for p in ranks.paces] == [End.DIVERGED] * 2
    assert ranks.pending == [None, None]


def test_a_rank_that_falls_ill_at_the_very_end_takes_the_others_average():
    ranks = Ranks([Point([1.0] * 4), Point([3.0] * 4), Point([5.0] * 4)], samples=1, fragments=2)
    ranks.step(0)
    ranks.begin_round()
    spoil(ranks, 0)
    ranks.deliver()
    ranks.end()
    assert all(torch.equal(vector(m), vector(ranks.models[2])) for m in ranks.models)
    assert torch.isfinite(vector(ranks.models[0])).all()
    # Fragment 0 had been averaged over all three, to 3, by the healthy round; fragment 1 is the mean of 3 and 5.
    assert vector(ranks.models[0]).tolist() == [3.0, 3.0, 4.0, 4.0]


@pytest.mark.parametrize("to", [1, 2, 6])
def test_a_cut_anew_while_a_rank_sits_out_makes_it_take_a_whole_new_cycle(to):
    ranks = three(3)
    ranks.round()
    spoil(ranks, 1, at=3)
    for pace in ranks.paces:
        pace.fragments = to
    for _ in range(2 + 2 * to):
        ranks.round()
        ranks.boundary()
    assert torch.isfinite(vector(ranks.models[1])).all()
    assert torch.allclose(vector(ranks.models[0]), vector(ranks.models[1]))
    assert not ranks.replicas[1].is_sitting_out


def test_a_cut_anew_before_the_recovered_rank_has_shown_anything_loses_nothing():
    ranks = three(2)
    spoil(ranks, 1)
    ranks.cycle()  # adopted, but rank 1 is in the middle of a long step
    for pace in ranks.paces:
        pace.fragments = 3
    ranks.round()
    recovered = []
    ranks.replicas[1].on_recovery = lambda: recovered.append(True)
    ranks.cycle()
    ranks.boundary()
    assert recovered == [True]
    assert torch.isfinite(vector(ranks.models[1])).all()
    assert torch.allclose(vector(ranks.models[0]), vector(ranks.models[1]))


def test_a_failed_round_leaves_the_sick_rank_waiting_for_the_fragment_it_missed():
    ranks = three(2)
    spoil(ranks, 1)
    ranks.round()
    ranks.begin_round()
    ranks.fail(RuntimeError("lost"))
    assert ranks.replicas[1].is_sitting_out
    ranks.cycle()
    ranks.boundary()
    assert not ranks.replicas[1].is_sitting_out
    assert torch.isfinite(vector(ranks.models[1])).all()


def test_the_healthy_ranks_go_on_as_if_the_sick_one_were_not_there():
    ranks, without = three(), Ranks([Point([0.0] * 6), Point([2.0] * 6)])
    spoil(ranks, 1)
    ranks.round()
    without.round()
    for here, there in ((0, 0), (2, 1)):
        ranks.step(here, towards(7.0))
        without.step(there, towards(7.0))
        assert torch.equal(vector(ranks.models[here]), vector(without.models[there]))


def test_nan_in_a_batchnorm_buffer_heals_like_one_in_a_parameter():
    def model(value: float) -> nn.Module:
        norm = nn.BatchNorm1d(3)
        with torch.no_grad():
            norm.running_mean.fill_(value)
        return norm

    ranks = Ranks([model(1.0), model(float("nan")), model(3.0)])
    ranks.round()
    ranks.boundary()
    assert [m.running_mean.tolist() for m in ranks.models] == [[2.0] * 3] * 3
    assert ranks.paces[0].sicknesses == [Sickness(rank=1, round=1)]


def test_nan_is_found_wherever_it_is_in_a_large_vector():
    for at in (0, 12_345, 99_999):
        ranks = Ranks([Point(torch.zeros(100_000)), Point(torch.ones(100_000))])
        spoil(ranks, 0, at=at)
        ranks.begin_round()
        assert ranks.replicas[0].is_sitting_out
        assert not ranks.replicas[1].is_sitting_out
