"""A rank whose local steps run away, finite as yet, sits out before it takes the others along."""

from __future__ import annotations

import pytest
import torch

from lasgd.health import GROWTH, Health
from lasgd.pace import Sickness
from scripted_driver import Point, Ranks, vector

BETA = 0.5


def ranks_of(n: int = 4, fragments: int = 4, **options) -> Ranks:
    """All at 0, with momentum of the mean."""
    return Ranks(
        [Point(torch.zeros(8)) for _ in range(n)],
        fragments=fragments,
        settings={"outer_momentum": BETA},
        **options,
    )


def move(ranks: Ranks, rank: int, by: float) -> None:
    """One local step that adds `by` to every element."""
    ranks.step(rank, lambda parameters: [torch.full_like(p, -by / ranks.lr) for p in parameters])


def cycle(ranks: Ranks, steps: list[float]) -> None:
    """One round of every fragment, and before each a local step of every rank, of this size."""
    for _ in range(len(ranks.replicas[0].fragments)):
        for rank, by in enumerate(steps):
            move(ranks, rank, by)
        ranks.round()


def started(**options) -> Ranks:
    """After some cycles in which all ranks have taken steps of about 1."""
    ranks = ranks_of(**options)
    for _ in range(6):
        cycle(ranks, [1 + 0.1 * rank for rank in range(ranks.n)])
    assert ranks.paces[0].sicknesses == []
    return ranks


def test_a_rank_that_runs_away_contributes_nothing_from_the_round_on_in_which_it_is_found():
    ranks = started()
    before = [ranks.z(rank) for rank in (0, 2, 3)]
    recovered = []
    ranks.replicas[1].on_recovery = lambda: recovered.append(True)
    move(ranks, 1, 1000 * GROWTH)
    ranks.cycle()
    assert ranks.paces[0].sicknesses == [Sickness(1, ranks.paces[0].round - 3, Health.RAN_AWAY)]
    assert all(ranks.replicas[rank].health is Health.WELL for rank in (0, 2, 3))
    after = [ranks.z(rank) for rank in (0, 2, 3)]
    assert max((a - b).abs().max() for a, b in zip(after, before, strict=True)) < 100
    ranks.boundary()
    assert recovered == [True]
    assert vector(ranks.models[1]).abs().max() < 100
    assert not ranks.replicas[1].is_sitting_out


def test_it_is_judged_anew_after_that_and_the_others_go_on_together():
    ranks = started()
    for _ in range(2):
        move(ranks, 1, 1000 * GROWTH)
        for _ in range(6):
            cycle(ranks, [1.0] * 4)
    assert [sickness.rank for sickness in ranks.paces[2].sicknesses] == [1, 1]
    ranks.cycle()
    ranks.boundary()
    assert max((vector(a) - vector(b)).abs().max() for a in ranks.models for b in ranks.models) < 20


def test_a_step_that_is_merely_large_takes_part():
    ranks = started()
    move(ranks, 1, 0.5 * GROWTH)
    sum_before = ranks.sum_of_z()
    ranks.round()
    assert ranks.paces[0].sicknesses == []
    fragment = ranks.replicas[0].fragments[0]
    others = [element for element in range(8) if not fragment.begin <= element < fragment.end]
    assert torch.allclose(ranks.sum_of_z()[others], sum_before[others])


def test_where_all_ranks_steps_grow_at_once_nobody_ends_and_nobody_loses_a_step():
    """As when the learning rate is raised. Not one has a weight, so there is no mean in that round, and that is all."""
    ranks = started()
    for rank in range(4):
        move(ranks, rank, 1000 * GROWTH + rank)
    before = [ranks.z(rank) for rank in range(4)]
    ranks.round()
    assert ranks.paces[0].end is None
    assert [sickness.rank for sickness in ranks.paces[0].sicknesses] == [0, 1, 2, 3]
    assert all(replica.health is Health.WELL for replica in ranks.replicas)
    assert all(torch.equal(ranks.z(rank), before[rank]) for rank in range(4))
    ranks.boundary()
    ranks.cycle()
    ranks.boundary()
    assert min(vector(model).min() for model in ranks.models) > 900 * GROWTH


def test_a_rank_in_the_middle_of_its_cycle_goes_on_too_where_the_others_then_run_away():
    ranks = started()
    move(ranks, 1, 1000 * GROWTH)
    ranks.round()
    ranks.round()
    for rank in (0, 2, 3):
        move(ranks, rank, 1000 * GROWTH)
    ranks.round()
    assert ranks.paces[0].end is None
    assert not any(replica.is_sitting_out for replica in ranks.replicas)
    ranks.boundary()
    assert vector(ranks.models[1])[:2].abs().max() < 100, "what it had adopted is shown"
    for _ in range(6):
        cycle(ranks, [1.0] * 4)
    ranks.boundary()
    assert max((vector(a) - vector(b)).abs().max() for a in ranks.models for b in ranks.models) < 20 * GROWTH


def test_nan_on_all_ranks_after_that_is_still_the_end():
    ranks = started()
    with torch.no_grad():
        for model in ranks.models:
            model.x.fill_(float("nan"))
    ranks.round()
    assert ranks.paces[0].end is not None
    assert {sickness.found for sickness in ranks.paces[0].sicknesses} == {Health.NOT_FINITE}


def test_what_overflows_when_squared_is_found_at_once():
    ranks = started()
    move(ranks, 2, 1e30)
    ranks.round()
    assert ranks.replicas[2].health is Health.RAN_AWAY


def test_the_last_exact_average_takes_all_ranks_that_are_finite():
    """Of the agreed end there is no way back: had all ranks run away alike, no average would be left."""
    ranks = started(samples=100)
    while ranks.paces[0].end is None:
        ranks.boundary()
        ranks.begin_round()
        for rank in range(4):
            move(ranks, rank, 1000 * GROWTH + rank)
        ranks.deliver()
    ranks.end()
    assert all(torch.equal(vector(model), vector(ranks.models[0])) for model in ranks.models)


@pytest.mark.parametrize("n", [1, 2])
def test_one_rank_alone_never_stops_and_one_of_two_takes_the_other_s(n):
    ranks = started(n=n)
    move(ranks, 0, 1000 * GROWTH)
    ranks.cycle()
    ranks.boundary()
    assert (vector(ranks.models[0]).max() > 900 * GROWTH) == (n == 1)
    assert ranks.paces[0].end is None


def test_without_momentum_of_the_mean_there_is_no_mean_to_measure_by():
    ranks = Ranks([Point(torch.zeros(8)) for _ in range(4)], fragments=4)
    for _ in range(6):
        cycle(ranks, [1.0] * 4)
    move(ranks, 1, 1000 * GROWTH)
    ranks.cycle()
    assert ranks.paces[0].sicknesses == []


def test_a_large_fragment_is_measured_piece_by_piece(monkeypatch):
    monkeypatch.setattr("lasgd.latest_mean.SCRATCH", 3)
    ranks = started(fragments=2)
    move(ranks, 1, 1000 * GROWTH)
    ranks.round()
    assert ranks.replicas[1].health is Health.RAN_AWAY


def test_one_that_sat_out_when_it_was_stored_sits_out_when_it_goes_on():
    ranks = started()
    ranks.replicas[1].sit_out()
    ranks.round()
    assert [sickness.rank for sickness in ranks.paces[0].sicknesses] == [1]
    for _ in range(3):
        ranks.round()
    assert not ranks.replicas[1].is_sitting_out


def test_it_is_found_in_a_fragment_that_has_just_been_cut_out_of_others_too():
    ranks = started(fragments=4)
    for pace in ranks.paces:
        pace.fragments = 8
    for _ in range(5):
        ranks.round()
    move(ranks, 1, 1000 * GROWTH)
    ranks.round()
    assert len(ranks.replicas[1].fragments) == 8
    assert ranks.replicas[1].health is Health.RAN_AWAY


def test_a_rank_whose_steps_are_larger_from_now_on_sits_out_once():
    ranks = started()
    for _ in range(8):
        cycle(ranks, [1.0, 30 * GROWTH, 1.0, 1.0])
    assert [sickness.rank for sickness in ranks.paces[0].sicknesses if sickness.rank == 1] == [1]
