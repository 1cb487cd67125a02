"""What holds on any schedule; the generators of src/lasgd/algorithms, driven one move at a time."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import alone, small_model, train_step
from lasgd.errors import PeerError
from scripted_driver import Point, Ranks, towards, vector


def unequal(n: int, d: int = 7, seed: int = 0, dtype=torch.float32) -> list[Point]:
    generator = torch.Generator().manual_seed(seed)
    return [Point(torch.randn(d, generator=generator), dtype) for _ in range(n)]


@pytest.mark.parametrize("fragments", [1, 3])
def test_one_replica_is_plain_sgd_with_momentum_bit_for_bit(fragments):
    ours, plain = small_model(), small_model()
    options = {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3}
    optimizer, reference = torch.optim.SGD(ours.parameters(), **options), torch.optim.SGD(plain.parameters(), **options)
    with alone(ours, optimizer, samples=40, fragments=fragments) as averaging:
        for step in range(40):
            train_step(ours, optimizer, step)
            train_step(plain, reference, step)
            assert torch.equal(vector(ours), vector(plain))
            if step == 20:
                averaging.mean_weights()  # at least one whole cycle of rounds has come back by now
        assert averaging.pace.round >= fragments
    assert torch.equal(vector(ours), vector(plain))


@pytest.mark.parametrize("fragments", [1, 3])
@pytest.mark.parametrize("n", [2, 5])
def test_with_lr_zero_unequal_replicas_equal_their_mean_after_one_round_of_every_fragment(fragments, n):
    ranks = Ranks(unequal(n), fragments=fragments)
    mean = torch.stack([vector(m).double() for m in ranks.models]).mean(0)
    largest = max(vector(m).abs().max().item() for m in ranks.models)
    ranks.cycle()
    ranks.boundary()
    # m is rounded n times (n-1 additions, a division), m - s once, and x + (m - s) once: each by at most half an ulp of
    # a sum of n values, so (n + 2) * eps/2 * (n * largest) covers them.
    tolerance = (n + 2) * torch.finfo(torch.float32).eps / 2 * n * largest
    for model in ranks.models:
        assert (vector(model).double() - mean).abs().max() <= tolerance


def test_with_equal_weights_the_corrections_of_a_round_sum_to_zero():
    ranks = Ranks(unequal(4))
    before = [ranks.z(rank) for rank in range(4)]
    ranks.begin_round()
    ranks.deliver()
    corrections = [ranks.z(rank) - before[rank] for rank in range(4)]
    assert all(correction.abs().max() > 0.01 for correction in corrections)
    # Each rank rounds m - s once, to half an ulp of at most 8; the mean's own rounding enters four times.
    assert sum(corrections).abs().max() <= 8 * torch.finfo(torch.float32).eps * 8


def test_local_steps_taken_while_a_round_is_on_its_way_are_kept():
    ranks = Ranks([Point([0.0]), Point([8.0])], lr=1.0)
    ranks.begin_round()
    ranks.step(0, lambda _: [torch.tensor([-1.0])])  # rank 0 moves by +1, twice
    ranks.step(0, lambda _: [torch.tensor([-1.0])])
    ranks.deliver()
    ranks.boundary()
    assert [vector(m).item() for m in ranks.models] == [4.0 + 2.0, 4.0]


def test_a_snapshot_torn_by_an_update_changes_neither_the_sum_nor_the_steps():
    # 1. rank 0's update is applied to the second half of x;  2. the snapshot is taken;  3. the rest of the update.
    ranks = Ranks([Point([0.0] * 4), Point([8.0] * 4)], lr=1.0)
    x = ranks.models[0].x
    with torch.no_grad():
        x[2:] += 1.0
        ranks.begin_round()
        x[:2] += 1.0
    assert ranks.sent[0].tolist() == [0.0, 0.0, 1.0, 1.0]
    total = ranks.sum_of_z()
    ranks.deliver()
    assert torch.equal(ranks.sum_of_z(), total)
    ranks.boundary()
    # mean of what was sent, plus what rank 0 had done and not sent
    assert vector(ranks.models[0]).tolist() == [4.0 + 1.0, 4.0 + 1.0, 4.5, 4.5]
    assert vector(ranks.models[1]).tolist() == [4.0, 4.0, 4.5, 4.5]


def test_a_straggler_changes_others_staleness_but_not_their_steps_nor_the_pace_of_rounds():
    def run(straggles: bool):
        ranks = Ranks(unequal(3))
        finish = None
        for tick in range(12):
            ranks.begin_round()
            for rank in (0, 1):
                ranks.step(rank, towards(0.0))
            if not straggles:
                ranks.step(2, towards(0.0))
            elif tick % 4 == 0:
                finish = ranks.start_step(2, towards(0.0), step_s=4.0)
            elif tick % 4 == 3:
                finish()
            ranks.deliver()
        return ranks

    even, uneven = run(False), run(True)
    assert [t.local_steps for t in even.tallies] == [12, 12, 12]
    assert [t.local_steps for t in uneven.tallies] == [12, 12, 3]
    assert uneven.paces[0].round == even.paces[0].round == 12
    assert uneven.paces[0].due_s == even.paces[0].due_s == 1.0
    # The straggler's own steps are long, so it counts fewer of them per round; the sum is untouched by its absence.
    assert uneven.tallies[0].staleness.max_steps == even.tallies[0].staleness.max_steps


def test_a_network_that_answers_within_one_step_gives_mean_minus_lr_times_gradient_every_step():
    ranks = Ranks([Point([1.0, 5.0]), Point([3.0, -1.0])], lr=0.25)
    targets = [torch.tensor([0.5, 0.5]), torch.tensor([-0.5, 2.0])]
    for _ in range(20):
        x = [vector(m) for m in ranks.models]
        mean = (x[0] + x[1]) / 2
        finish = [ranks.start_step(rank, towards(targets[rank])) for rank in range(2)]
        ranks.round()  # begun and delivered while both compute their gradient
        for done in finish:
            done()
        for rank in range(2):
            expected = mean - 0.25 * (x[rank] - targets[rank])
            # x - lr g + (m - x): three roundings of values below 8
            torch.testing.assert_close(vector(ranks.models[rank]), expected, rtol=0, atol=3 * 8 * 2**-24)


def test_a_network_that_never_answers_leaves_independent_sgd():
    ranks = Ranks(unequal(2), lr=0.1)
    plain = unequal(2)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in plain]
    ranks.begin_round()  # and nothing comes back
    for _ in range(10):
        for rank in range(2):
            ranks.step(rank, towards(1.0))
            optimizers[rank].zero_grad()
            plain[rank](torch.tensor(1.0)).backward()
            optimizers[rank].step()
            assert torch.equal(vector(ranks.models[rank]), vector(plain[rank]))


def test_the_same_schedule_gives_the_same_trace_and_bit_equal_parameters():
    def run() -> Ranks:
        generator = torch.Generator().manual_seed(5)
        ranks = Ranks(unequal(3), fragments=2)
        for _ in range(60):
            move = torch.randint(0, 4, (), generator=generator).item()
            if move < 3:
                ranks.step(move, towards(torch.randn(7, generator=generator)))
            else:
                ranks.round()
        return ranks

    first, second = run(), run()
    assert first.trace == second.trace
    assert all(torch.equal(vector(a), vector(b)) for a, b in zip(first.models, second.models, strict=True))


def test_every_planned_fault_fires_changes_nothing_and_the_next_round_makes_up_for_it():
    ranks = Ranks(unequal(3))
    planned = {2: PeerError("rank 1: round 2"), 3: PeerError("rank 0: round 3"), 5: PeerError("rank 2: round 5")}
    total = ranks.sum_of_z()
    for round_ in range(1, 8):
        ranks.begin_round()
        if round_ in planned:
            before = [ranks.z(rank) for rank in range(3)]
            ranks.fail(planned[round_])
            assert all(torch.equal(before[rank], ranks.z(rank)) for rank in range(3))
        else:
            ranks.deliver()
    assert [error for _, error in ranks.faults] == list(planned.values())
    assert ranks.paces[0].round == 7 - 3
    ranks.boundary()
    torch.testing.assert_close(ranks.sum_of_z(), total, rtol=0, atol=1e-5)
    torch.testing.assert_close(vector(ranks.models[0]), vector(ranks.models[1]), rtol=0, atol=1e-6)


moves = st.lists(
    st.one_of(
        st.tuples(st.just("step"), st.integers(0, 2), st.integers(-8, 8)),
        st.tuples(st.just("round"), st.just(0), st.just(0)),
        st.tuples(st.just("begin"), st.just(0), st.just(0)),
        st.tuples(st.just("deliver"), st.just(0), st.just(0)),
        st.tuples(st.just("fail"), st.just(0), st.just(0)),
        st.tuples(st.just("recut"), st.integers(1, 7), st.just(0)),
    ),
    max_size=40,
)


def play(ranks: Ranks, schedule, check) -> None:
    under_way = False
    for what, number, move in schedule:
        if what == "step":
            ranks.step(number, lambda p, move=move: [torch.full_like(p[0], -float(move))])
            ranks.moved += move * ranks.lr
        elif what == "begin" and not under_way:
            ranks.begin_round()
            under_way = True
        elif what == "round" and not under_way:
            ranks.round()
        elif what in ("deliver", "fail") and under_way:
            ranks.deliver() if what == "deliver" else ranks.fail(PeerError("planned"))
            under_way = False
        elif what == "recut":
            for pace in ranks.paces:
                pace.fragments = number
        check()


@settings(max_examples=80, deadline=None)
@given(moves)
def test_no_schedule_of_steps_rounds_failures_and_recuts_creates_or_destroys_anything(schedule):
    # float64 and values that are multiples of a power of two: exact but for the mean's division by three
    ranks = Ranks(unequal(3, dtype=torch.float64), fragments=2, lr=0.5)
    ranks.moved = 0.0
    start = ranks.sum_of_z()

    def conserved() -> None:
        torch.testing.assert_close(ranks.sum_of_z(), start + ranks.moved, rtol=0, atol=1e-11)

    play(ranks, schedule, conserved)


@settings(max_examples=40, deadline=None)
@given(moves, st.sampled_from([torch.bfloat16, torch.float16]))
def test_coarse_parameters_lose_nothing_because_the_rounding_rest_stays_in_the_residual(schedule, dtype):
    ranks = Ranks(unequal(3, dtype=dtype), fragments=2, lr=0.0)  # no local progress: that would round by itself
    ranks.moved = 0.0
    start = ranks.sum_of_z()

    def conserved() -> None:
        # fp32 rounds each of at most 40 moves on three ranks to half an ulp of values below 8
        torch.testing.assert_close(ranks.sum_of_z(), start, rtol=0, atol=40 * 3 * 8 * 2**-23)

    play(ranks, schedule, conserved)


def test_the_end_is_identical_everywhere_and_the_mean_of_all_that_was_done():
    ranks = Ranks(unequal(3, dtype=torch.float64), samples=9, fragments=2)
    for step in range(3):
        for rank in range(3):
            ranks.step(rank, towards(float(step)))
    total = ranks.sum_of_z()
    ranks.end()
    assert all(torch.equal(vector(m), vector(ranks.models[0])) for m in ranks.models)
    torch.testing.assert_close(vector(ranks.models[0]), total / 3, rtol=0, atol=1e-12)


def test_local_steps_that_finish_after_the_agreed_end_are_discarded():
    ranks = Ranks([Point([0.0]), Point([4.0])], samples=1, lr=1.0)
    finish = ranks.start_step(1, towards(100.0))
    ranks.step(0)
    ranks.round()  # the end is agreed
    ranks.begin_round()  # the last exact average takes its snapshots
    finish()
    ranks.deliver()
    for replica in ranks.replicas:
        replica.show_average()
    assert [vector(m).item() for m in ranks.models] == [2.0, 2.0]


def test_independent_ranks_end_at_their_own_share_of_the_budget_once():
    ranks = Ranks([Point([0.0]), Point([1.0])], samples=6, algorithm="independent")
    for _ in range(3):
        assert ranks.paces[0].end is None
        ranks.step(0, towards(1.0))
    assert ranks.paces[0].end.name == "SAMPLES"
    ranks.tallies[0].wants_stop = True
    ranks.step(0)
    assert ranks.paces[0].end.name == "SAMPLES"
    assert ranks.paces[0].checkpoint == 0
    assert ranks.paces[1].end is None
