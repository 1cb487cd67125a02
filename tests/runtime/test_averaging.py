"""The real Averaging and Communicator over the scripted network: forced interleavings, ends, errors, state."""

from __future__ import annotations

import math
import sys
import threading
import time

import pytest
import torch

import lasgd
from helpers import LIMIT_S, alone, raise_any, small_model, train_step, wait_all
from lasgd.errors import ConfigurationError, DivergenceError, PeerError, ProtocolError
from lasgd.group.scripted import Network
from lasgd.momentum import LEAST_FRAGMENTS
from lasgd.pace import Column, End
from lasgd.runtime.phase import Phase
from lasgd.training.checkpoint import is_healthy
from scripted_driver import Point, vector


def attach(model, group, lr=0.1, **options) -> tuple[lasgd.Averaging, torch.optim.Optimizer]:
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    options = {"samples": 10**6, "batch_size": 1, "fragments": 1, "timeout_s": LIMIT_S, **options}
    return lasgd.attach(model, optimizer, group=group, **options), optimizer


def attach_points(values, network=None, **options):
    """Points of unequal values, made so after the broadcast."""
    network = network or Network(len(values), deliver_at_once=True)
    models = [Point([0.0]) for _ in values]
    network.deliver_at_once = True
    attached = raise_any(
        wait_all([lambda r=r: attach(models[r], network.group(r), **options) for r in range(len(values))])
    )
    for model, value in zip(models, values, strict=True):
        with torch.no_grad():
            model.x.fill_(value)
    return network, models, attached


def step(model, optimizer, gradient=0.0) -> None:
    model.x.grad = torch.full_like(model.x, gradient)
    optimizer.step()


def wait_until(is_true, timeout_s: float = LIMIT_S) -> None:
    """Yields to the communicator until it has got there; a limit, not a schedule."""
    deadline_s, pause = time.monotonic() + timeout_s, threading.Event()
    while not is_true():
        assert time.monotonic() < deadline_s, "never came true"
        pause.wait(0.001)


class Stepwise:
    """Two ranks over a network that the test delivers by hand."""

    def __init__(self, values=(0.0, 4.0), lr=1.0, **options):
        self.network, self.models, attached = attach_points(values, lr=lr, **options)
        self.network.deliver_at_once = False
        self.averagings = [a for a, _ in attached]
        self.optimizers = [o for _, o in attached]
        for averaging in self.averagings:
            averaging.start()

    def begin(self):
        """Lets the rounds begin before the first step, so that its snapshots are of what the test has put there."""
        for averaging in self.averagings:
            averaging._communicator.begin()
        self.network.wait_joined()

    def step_until_it_raises(self, rank):
        """What has gone wrong in the background is met at this boundary or the next."""
        for _ in range(2):
            self.step(rank)
            wait_until(self.averagings[rank]._communicator.ended.is_set)

    def step(self, rank, gradient=0.0):
        step(self.models[rank], self.optimizers[rank], gradient)

    def deliver(self):
        rounds = [a.pace.round for a in self.averagings]
        self.network.deliver()
        wait_until(lambda: all(a.pace.round > r for a, r in zip(self.averagings, rounds, strict=True)))

    def x(self):
        return [m.x.item() for m in self.models]

    def close(self):
        for averaging in self.averagings:
            averaging.close("test over")


@pytest.fixture
def two():
    made = []

    def make(*args, **options):
        made.append(Stepwise(*args, **options))
        return made[-1]

    yield make
    for each in made:
        each.close()


# Interleavings


def test_a_late_mean_keeps_the_local_steps_taken_meanwhile(two):
    ranks = two()
    ranks.begin()  # both snapshots taken: 0 and 4
    for _ in range(3):
        ranks.step(0, gradient=-1.0)
    ranks.deliver()
    ranks.network.wait_joined()  # the corrections are in the residuals
    assert ranks.x() == [3.0, 4.0]
    ranks.step(0)
    ranks.step(1)
    assert ranks.x() == [2.0 + 3.0, 2.0]
    assert ranks.averagings[0].tally.staleness.max_steps == 4


def test_a_rank_in_the_middle_of_a_long_step_joins_round_after_round(two):
    ranks = two(steps_per_round=1e-9)
    ranks.begin()
    for _ in range(5):  # rank 1's training thread does nothing at all
        ranks.deliver()
        ranks.step(0)
    assert [a.tally.local_steps for a in ranks.averagings] == [5, 0]
    assert ranks.averagings[0].pace.round == 5


def test_the_boundary_does_not_wait_while_the_communicator_holds_the_residual(two):
    # 1. a correction is there;  2. the communicator's lock is taken;  3. a step ends, with the correction still unseen;
    # 4. the lock is free, and the next step shows it.
    ranks = two()
    ranks.begin()
    ranks.deliver()
    ranks.network.wait_joined()
    replica = ranks.averagings[0].replica
    with replica._lock:
        ranks.step(0)
        assert ranks.models[0].x.item() == 0.0
    assert replica.deferred_merges == 1
    ranks.step(0)
    assert ranks.models[0].x.item() == 2.0


def test_rounds_begin_with_the_first_gradient_not_with_the_start(two):
    ranks = two()
    assert not ranks.network._joined
    ranks.step(0)
    ranks.step(1)
    ranks.network.wait_joined()


@pytest.mark.parametrize("round_", [1, 3])
def test_every_planned_fault_fires_on_every_rank_and_its_error_names_rank_and_round(two, round_):
    ranks = two(steps_per_round=1e-9)
    ranks.begin()
    for _ in range(round_ - 1):
        ranks.deliver()
    ranks.network.wait_joined()
    ranks.network.fail(PeerError("planned: silent: 1"))
    for rank, averaging in enumerate(ranks.averagings):
        wait_until(averaging._communicator.ended.is_set)
        with pytest.raises(PeerError, match=rf"rank {rank} of 2: round {round_}: planned: silent: 1"):
            ranks.step(rank)
        assert averaging._phase.now is Phase.FAILED


def test_an_exception_inside_the_communicator_is_met_at_the_next_boundary_and_the_lock_is_free(two):
    ranks = two()
    replica, held = ranks.averagings[0].replica, []

    def broken():
        held.append(replica._lock.locked())
        raise ZeroDivisionError("inside")

    replica.fences.before_reading = broken
    with pytest.raises(ProtocolError, match="communicator stopped: ZeroDivisionError: inside") as caught:
        ranks.step_until_it_raises(0)
    assert held == [True] and not replica._lock.locked()
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_a_parameter_unfrozen_later_is_a_clear_error():
    model = small_model()
    model[0].weight.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def train():
        with alone(model, optimizer):
            train_step(model, optimizer, 0)
            model[0].weight.requires_grad_(True)
            while True:
                train_step(model, optimizer, 0)

    with pytest.raises(ConfigurationError, match=r"frozen when lasgd\.attach was called is trainable now"):
        train()


def test_nan_on_the_only_rank_is_divergence_named_by_round():
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def train():
        with alone(model, optimizer) as averaging:
            with torch.no_grad():
                model[0].weight.fill_(float("nan"))
            while not averaging.finished:
                train_step(model, optimizer, 0)

    with pytest.raises(DivergenceError, match=r"rank 0 of 1: round \d+: every rank holds NaN"):
        train()


# The end


def train_to_the_end(r, models, attached, early=False, gradient=1.0):
    averaging, optimizer = attached[r]
    with averaging:
        for count in range(10**9):
            if averaging.finished or (early and count == 3):
                break
            step(models[r], optimizer, gradient * (r + 1))
    return averaging


def test_all_replicas_are_equal_bit_for_bit_at_the_agreed_end():
    _, models, attached = attach_points([0.0, 1.0, 5.0], samples=300, lr=0.001)
    ended = raise_any(wait_all([lambda r=r: train_to_the_end(r, models, attached) for r in range(3)]))
    assert len({m.x.item() for m in models}) == 1
    assert {a.pace.end for a in ended} == {End.SAMPLES}
    assert len({a.pace.round for a in ended}) == 1
    assert {a._phase.now for a in ended} == {Phase.CLOSED}


def test_a_rank_whose_loader_ends_early_goes_on_answering():
    _, models, attached = attach_points([0.0, 8.0], samples=400, lr=1e-4)
    ended = raise_any(wait_all([lambda r=r: train_to_the_end(r, models, attached, early=r == 0) for r in range(2)]))
    assert ended[0].tally.local_steps == 3
    assert ended[0].pace.samples >= 400
    assert models[0].x.item() == models[1].x.item()
    assert ended[0].tally.waited_s > 0


def test_when_all_loaders_end_early_that_is_the_end():
    _, models, attached = attach_points([0.0, 8.0], samples=10**6, lr=0.0)
    ended = raise_any(wait_all([lambda r=r: train_to_the_end(r, models, attached, early=True) for r in range(2)]))
    assert {a.pace.end for a in ended} == {End.LEFT}
    assert models[0].x.item() == models[1].x.item() == 4.0


def test_the_end_agreed_while_a_rank_is_inside_a_long_step_discards_that_step(two):
    ranks = two(samples=2, steps_per_round=1e-9)
    ranks.begin()  # this round's headers know of no samples yet
    ranks.step(0)
    ranks.step(1)
    ranks.deliver()
    ranks.network.wait_joined()
    ranks.network.deliver_at_once = True
    ranks.network.deliver()  # the round that finds the budget reached; the last exact average follows by itself
    wait_until(lambda: all(a._communicator.ended.is_set() for a in ranks.averagings))
    ranks.step(1, gradient=100.0)  # finishes after the end
    for averaging in ranks.averagings:
        averaging.wait_end()
        averaging.wait_end()  # twice is harmless
    assert ranks.x() == [2.0, 2.0]
    assert all(a.tally.waited_s < 1.0 for a in ranks.averagings)


def test_stop_from_a_signal_that_arrives_while_the_communicator_is_being_woken_is_harmless(two):
    # 1. the first gradient wakes the communicator;  2. in the middle of that a signal's handler calls stop().
    ranks = two(samples=10**6)
    (averaging, *_), wake = ranks.averagings, ranks.averagings[0]._communicator._wake

    class Interrupted:
        get = wake.get

        def put(self, token):
            averaging.stop()
            wake.put(token)

    averaging._communicator._wake = Interrupted()
    ranks.network.deliver_at_once = True
    ranks.step(0)
    ranks.step(1)
    raise_any(wait_all([a.wait_end for a in ranks.averagings]))
    assert averaging.pace.end is End.STOP


def test_stop_ends_all_in_the_same_round_without_a_last_average():
    _, models, attached = attach_points([0.0, 8.0], lr=1.0)

    def rank(r):
        averaging, optimizer = attached[r]
        with averaging:
            while not averaging.finished:
                step(models[r], optimizer)
                if r == 1 and averaging.tally.local_steps == 5:
                    averaging.stop()
            return averaging.pace.end, averaging.pace.round, averaging.checkpoint_due

    first, second = raise_any(wait_all([lambda: rank(0), lambda: rank(1)]))
    assert first == second
    assert first[0] is End.STOP and first[2] == 1


def test_waiting_for_the_end_counts_as_waiting_only_until_it_is_agreed(two):
    ranks = two(samples=10**6)
    ranks.begin()
    begin_s = time.monotonic()
    ranks.network.deliver_at_once = True
    raise_any(wait_all([averaging.wait_end for averaging in ranks.averagings] + [ranks.network.deliver]))
    for averaging in ranks.averagings:
        assert 0 < averaging.tally.waited_s <= averaging.end_agreed_s - begin_s


@pytest.fixture
def hasty_switches():
    """Threads change places as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.parametrize("fragments", [1, 3, "auto"])
def test_on_any_schedule_of_real_threads_no_step_is_lost_or_counted_twice(fragments, hasty_switches):
    # Each rank adds known whole numbers, and leaves when it has shown a correction: the end must be the mean of
    # everything, nothing missing.
    n, steps, size = 3, 150, 999
    network = Network(n, deliver_at_once=True)
    models = [Point(torch.zeros(size), torch.float64) for _ in range(n)]
    attached = raise_any(
        wait_all(
            [
                lambda r=r: attach(models[r], network.group(r), lr=1.0, fragments=fragments, steps_per_round=1e-9)
                for r in range(n)
            ]
        )
    )

    def rank(r):
        averaging, optimizer = attached[r]
        with averaging:
            while averaging.tally.local_steps < steps or not averaging.tally.staleness.merges:
                step(models[r], optimizer, -float(r + 1))
        return averaging

    ended = raise_any(wait_all([lambda r=r: rank(r) for r in range(n)]))
    assert all(a.pace.end is End.LEFT for a in ended)
    assert all(torch.equal(m.x, models[0].x) for m in models)
    expected = sum((r + 1) * a.tally.local_steps for r, a in enumerate(ended)) / 3
    # each of at most `rounds` means and corrections rounds values below twice the end to half an ulp, on three ranks
    tolerance = 3 * 3 * ended[0].pace.round * 2 * max(512, expected) * 2**-53
    assert (models[0].x - expected).abs().max() <= tolerance


@pytest.mark.parametrize("wire", ["bf16", "int8"])
@pytest.mark.parametrize("fragments", [1, 3])
def test_what_a_wire_format_rounds_off_is_in_the_last_exact_average(wire, fragments, hasty_switches):
    n, steps, size = 3, 60, 999
    network = Network(n, deliver_at_once=True)
    models = [Point(torch.zeros(size), torch.float64) for _ in range(n)]
    pushes = [torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(r)) for r in range(n)]
    options = {"lr": 1.0, "fragments": fragments, "steps_per_round": 1e-9, "wire": wire}
    attached = raise_any(wait_all([lambda r=r: attach(models[r], network.group(r), **options) for r in range(n)]))

    def rank(r):
        averaging, optimizer = attached[r]
        with averaging:
            while averaging.tally.local_steps < steps or not averaging.tally.staleness.merges:
                models[r].x.grad = -pushes[r]
                optimizer.step()
        return averaging

    ended = raise_any(wait_all([lambda r=r: rank(r) for r in range(n)]))
    assert all(torch.equal(m.x, models[0].x) for m in models)
    expected = sum(push * a.tally.local_steps for push, a in zip(pushes, ended, strict=True)) / n
    torch.testing.assert_close(models[0].x.detach(), expected, rtol=0, atol=1e-8)


def test_a_resumed_rank_reckons_from_the_same_latest_mean_as_the_others():
    def attached_pair(wire):
        network = Network(2, deliver_at_once=True)
        models = [Point([0.0] * 300) for _ in range(2)]
        made = wait_all([lambda r=r: attach(models[r], network.group(r), wire=wire) for r in range(2)])
        return models, [averaging for averaging, _ in raise_any(made)]

    _, before = attached_pair("int8")
    for rank, averaging in enumerate(before):
        averaging._coded.load(torch.full((300,), 1.0 + rank))  # stored at different moments, so of different rounds
    states = [averaging.state_dict() for averaging in before]
    _, after = attached_pair("int8")
    raise_any(wait_all([lambda r=r: after[r].load_state_dict(states[r]) for r in range(2)]))
    for averaging in (*before, *after):
        averaging.close("test over")
    assert [averaging._coded.latest.unique().tolist() for averaging in after] == [[1.0], [1.0]]


def test_a_resumed_rank_goes_on_with_the_momentum_of_rank_0s_mean():
    def attached_pair():
        network = Network(2, deliver_at_once=True)
        models = [Point([0.0, 0.0]) for _ in range(2)]
        with_momentum = {"algorithm_settings": {"outer_momentum": 0.9}}
        made = wait_all([lambda r=r: attach(models[r], network.group(r), **with_momentum) for r in range(2)])
        return [averaging for averaging, _ in raise_any(made)]

    before = attached_pair()
    for rank, averaging in enumerate(before):
        averaging.replica.load_latest_mean(torch.tensor([1.0 + rank, 0.5]))
    states = [averaging.state_dict() for averaging in before]
    after = attached_pair()
    unknown = after[1].state_dict()
    assert all(math.isnan(value) for value in unknown["latest_mean"].tolist()), "nothing is known yet"
    assert is_healthy({"averaging": unknown})
    raise_any(wait_all([lambda r=r: after[r].load_state_dict(states[r]) for r in range(2)]))
    resumed = [averaging.state_dict()["latest_mean"].tolist() for averaging in after]
    for averaging in (*before, *after):
        averaging.close("test over")
    assert resumed == [[1.0, 0.5], [1.0, 0.5]]


def test_momentum_of_coarse_averages_keeps_one_copy_of_the_mean_for_both():
    settings = {"algorithm_settings": {"outer_momentum": 0.8}}
    network = Network(1, deliver_at_once=True)
    averaging, _ = attach(Point([1.0] * 300), network.group(0), wire="int8", **settings)
    averaging.replica.load_latest_mean(torch.full((300,), 7.0))
    averaging._coded.load(torch.full((300,), 9.0))
    averaging.close("test over")
    assert averaging.replica.wait_latest_mean(1.0).tolist() == [9.0] * 300


def test_a_rank_that_sat_out_when_it_was_stored_sits_out_when_it_goes_on():
    before, _ = attach(Point([0.0, 0.0]), Network(1, deliver_at_once=True).group(0))
    before.replica.sit_out()
    state = before.state_dict()
    assert not is_healthy({"averaging": state})
    after, _ = attach(Point([0.0, 0.0]), Network(1, deliver_at_once=True).group(0))
    assert not after.replica.is_sitting_out
    after.load_state_dict(state)
    assert after.replica.is_sitting_out
    for averaging in (before, after):
        averaging.close("test over")


# Closing


def test_closing_twice_and_before_the_start_is_harmless():
    model = small_model()
    averaging, optimizer = attach(model, Network(1, deliver_at_once=True).group(0))
    averaging.close()
    averaging.close("again")
    train_step(model, optimizer, 0)  # the hooks are gone
    assert averaging.tally.local_steps == 0
    with pytest.raises(ConfigurationError, match="closed"), averaging:
        pass


def test_closing_within_the_with_block_leaves_it_quietly_and_tells_the_others():
    _, models, attached = attach_points([0.0, 8.0])

    def leaves():
        averaging, optimizer = attached[0]
        with averaging:
            step(models[0], optimizer)
            averaging.close()
        averaging.close()

    results = wait_all([leaves, lambda: train_to_the_end(1, models, attached)])
    assert results[0] is None
    assert isinstance(results[1], PeerError)
    assert "Rank 0 left: its averaging was closed before the agreed end" in str(results[1])


def test_closing_after_a_failure_and_while_a_collective_is_on_its_way_ends_the_thread(two):
    ranks = two()
    ranks.step(0)  # rank 0 stands in the first round, rank 1 has not come
    wait_until(lambda: 0 in ranks.network._joined)
    begin_s = time.monotonic()
    ranks.averagings[0].close()
    assert time.monotonic() - begin_s < 1.5
    assert not ranks.averagings[0]._communicator.is_alive()
    with pytest.raises(PeerError, match="Rank 0 left"):
        ranks.step_until_it_raises(1)
    ranks.averagings[1].close()
    ranks.averagings[1].close()


def test_an_exception_in_the_loop_reaches_the_others_with_its_words():
    _, models, attached = attach_points([0.0, 8.0, 1.0])

    def raises():
        averaging, optimizer = attached[1]
        with averaging:
            step(models[1], optimizer)
            raise ValueError("a truncated image")

    results = wait_all(
        [lambda: train_to_the_end(0, models, attached), raises, lambda: train_to_the_end(2, models, attached)]
    )
    assert isinstance(results[1], ValueError)
    for rank in (0, 2):
        assert isinstance(results[rank], PeerError)
        assert "Rank 1 left: ValueError: a truncated image" in str(results[rank])


def test_a_step_before_the_start_is_refused():
    model = small_model()
    averaging, optimizer = attach(model, Network(1, deliver_at_once=True).group(0))
    with pytest.raises(ConfigurationError, match="put the loop into `with averaging:`"):
        train_step(model, optimizer, 0)
    with pytest.raises(ConfigurationError, match="wait_end comes between start and close"):
        averaging.wait_end()
    averaging.close()


def test_entering_after_an_explicit_start_does_not_start_twice():
    model = small_model()
    averaging, optimizer = attach(model, Network(1, deliver_at_once=True).group(0), samples=3)
    averaging.start()
    with averaging:
        while not averaging.finished:
            train_step(model, optimizer, 0)
    with pytest.raises(ProtocolError, match="'start' cannot happen when closed"):
        averaging.start()


def test_attach_sees_to_the_least_number_of_fragments_that_momentum_of_the_mean_needs():
    model = small_model()
    options = {"fragments": "auto", "algorithm_settings": {"outer_momentum": 0.8}}
    averaging, optimizer = attach(model, Network(1, deliver_at_once=True).group(0), **options)
    with averaging:
        while averaging.pace.round < 12:
            train_step(model, optimizer, 0)
        assert averaging.pace.fragments >= LEAST_FRAGMENTS
        averaging.close()


# Means


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("fragments", [1, 3])
def test_mean_weights_during_the_run_are_the_mean_and_after_it_the_replica(keep, fragments):
    network = Network(2, deliver_at_once=True)
    models = [Point([0.0] * 6) for _ in range(2)]
    attached = raise_any(
        wait_all(
            [
                lambda r=r: attach(
                    models[r], network.group(r), lr=0.0, keep_mean=keep, fragments=fragments, steps_per_round=1e-9
                )
                for r in range(2)
            ]
        )
    )
    with torch.no_grad():
        models[1].x.fill_(6.0)
    seen = [None, None]
    both_have_seen = threading.Barrier(2)

    def rank(r):
        averaging, optimizer = attached[r]
        with averaging:
            step(models[r], optimizer)
            seen[r] = averaging.mean_weights()["x"].tolist()
            both_have_seen.wait(LIMIT_S)
            averaging.tally.has_left = True
            while not averaging.finished:
                step(models[r], optimizer)
        after = averaging.mean_weights()["x"]
        assert after.data_ptr() != models[r].x.data_ptr()
        return after.tolist()

    assert raise_any(wait_all([lambda: rank(0), lambda: rank(1)])) == [[3.0] * 6] * 2
    assert seen == [[3.0] * 6] * 2


def test_mean_weights_that_nobody_kept_are_a_clear_error_after_an_early_end():
    model = small_model()
    averaging, optimizer = attach(model, Network(1, deliver_at_once=True).group(0))
    with averaging:
        train_step(model, optimizer, 0)
        averaging.stop()
    with pytest.raises(ConfigurationError, match="keep_mean=True"):
        averaging.mean_weights()


def test_evaluations_get_whole_means_at_equal_parts_of_the_budget():
    model = Point([1.0] * 5)
    averaging, optimizer = attach(
        model, Network(1, deliver_at_once=True).group(0), samples=40, evaluations=4, lr=0.0, steps_per_round=1e-9
    )
    delivered = []
    averaging.on_evaluation(delivered.append)
    with averaging:
        while not averaging.finished:
            step(model, optimizer)
            rounds = averaging.pace.round  # the second round from here has this step's sample in its header
            wait_until(lambda rounds=rounds: averaging.finished or averaging.pace.round >= rounds + 2)
    assert [10 * (k.samples // 10) for k in delivered] == [10, 20, 30]  # the end of the last part is the run's
    assert all(kept.vector.tolist() == [1.0] * 5 for kept in delivered)
    assert [k.samples for k in delivered] == sorted({k.samples for k in delivered})


# State


def test_a_resumed_run_goes_on_with_the_same_residual_and_counts(two):
    ranks = two((0.0, 4.0), checkpoints=10, samples=10**4)
    ranks.begin()
    for rank in range(2):
        ranks.step(rank)
    ranks.deliver()  # of snapshots from before that step; the next round's header knows it
    ranks.network.wait_joined()
    states = [a.state_dict() for a in ranks.averagings]
    values = ranks.x()
    assert [s["residual"].tolist() for s in states] == [[2.0], [-2.0]]
    ranks.close()
    _, models, attached = attach_points(values, lr=0.0, checkpoints=10, samples=10**4, steps_per_round=1e-9)
    for (averaging, _), state in zip(attached, states, strict=True):
        averaging.load_state_dict(state)
        assert averaging.tally.local_steps == averaging.tally.samples == 1
        assert (averaging.pace.round, averaging.pace.samples) == (1, 0)
        again = averaging.state_dict()
        assert torch.equal(again.pop("residual"), state["residual"])
        assert again == {k: v for k, v in state.items() if k != "residual"}

    ended = raise_any(wait_all([lambda r=r: train_to_the_end(r, models, attached, early=True) for r in range(2)]))
    assert [m.x.item() for m in models] == [2.0, 2.0]
    assert ended[0].tally.local_steps == 4


def test_state_of_another_run_is_refused_with_what_differs():
    model = small_model()
    averaging, optimizer = attach(model, Network(1, deliver_at_once=True).group(0))
    state = averaging.state_dict()
    for key, value in (("world_size", 3), ("rank", 1), ("layout", "0"), ("version", 99)):
        with pytest.raises(ConfigurationError, match=f"its {key} is {value!r}"):
            averaging.load_state_dict({**state, key: value})
    with averaging:
        averaging.load_state_dict(state)  # after the start, before the first step
        train_step(model, optimizer, 0)
        with pytest.raises(ConfigurationError, match="before the first local step"):
            averaging.load_state_dict(state)
        averaging.stop()


def test_replicas_are_compared_by_digest_as_often_as_asked():
    _, models, attached = attach_points([1.0, 1.0])
    for equal in (True, False, True):
        with torch.no_grad():
            models[1].x.fill_(1.0 if equal else 2.0)
        answers = raise_any(wait_all([lambda a=a: a.wait_identical(LIMIT_S) for a, _ in attached]))
        assert answers == [equal, equal]
    for averaging, _ in attached:
        averaging.close()


def test_recorders_hear_of_every_round_and_step():
    model = small_model()
    averaging, optimizer = attach(model, Network(1, deliver_at_once=True).group(0), samples=20)
    records = []
    averaging.on_record(lambda kind, begin_s, end_s: records.append((kind, end_s >= begin_s)))
    with averaging:
        while not averaging.finished:
            train_step(model, optimizer, 0)
    kinds = [kind for kind, _ in records]
    assert kinds.count("compute") == averaging.tally.local_steps
    assert kinds.count("round") == averaging.pace.round + 1  # and the last exact average
    assert all(ordered for _, ordered in records)


def test_independent_ranks_never_exchange_a_vector():
    network, models, attached = attach_points([0.0, 4.0], algorithm="independent", samples=10, lr=0.0)
    collectives = network.collectives
    ended = raise_any(wait_all([lambda r=r: train_to_the_end(r, models, attached) for r in range(2)]))
    assert network.collectives == collectives
    assert [m.x.item() for m in models] == [0.0, 4.0]
    assert [a.tally.local_steps for a in ended] == [5, 5]
    assert vector(models[0]).item() == 0.0


def test_waking_up_and_making_the_snapshot_are_part_of_a_round_so_that_rounds_keep_the_agreed_pace():
    network = Network(1, deliver_at_once=True)
    model = Point([0.0])
    averaging, optimizer = attach(model, network.group(0))
    snapshot = averaging.replica.snapshot

    def slow_snapshot(fragment):
        time.sleep(0.02)
        return snapshot(fragment)

    averaging.replica.snapshot = slow_snapshot
    headers = []
    agree = averaging.pace.agree
    averaging.pace.agree = lambda outcome: (headers.append(outcome.header.clone()), agree(outcome))
    averaging.start()
    for _ in range(3):
        step(model, optimizer)
    wait_until(lambda: len(headers) >= 3)
    averaging.close("test over")
    assert headers[1][0, Column.ROUND_S] >= 0.02
    assert headers[2][0, Column.ROUND_S] >= 0.02
