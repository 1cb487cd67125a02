"""The real driver with algorithms that wait, over the scripted network."""

from __future__ import annotations

import threading

import pytest
import torch

import lasgd
from helpers import LIMIT_S, batch, raise_any, run_attached, small_model, train_step, until_finished, values
from lasgd.errors import ConfigurationError, PeerError
from lasgd.group.scripted import Network
from lasgd.pace import End

WAITING = ["local_sgd", "sync_sgd"]


def attach(model, group, algorithm, **options):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    options = {"samples": 24, "batch_size": 1, "timeout_s": LIMIT_S, "algorithm": algorithm, **options}
    return lasgd.attach(model, optimizer, group=group, **options), optimizer


@pytest.mark.parametrize("algorithm", WAITING)
def test_all_ranks_end_in_the_same_step_with_equal_replicas_and_have_waited(algorithm):
    ended = raise_any(run_attached(3, algorithm, until_finished, steps_per_round=4))
    first = values(ended[0][0])
    for model, averaging in ended:
        assert torch.equal(values(model), first)
        assert averaging.pace.end is End.SAMPLES
        assert averaging.tally.local_steps == ended[0][1].tally.local_steps
        assert averaging.tally.waited_s > 0


def test_synchronous_sgd_is_sgd_on_the_mean_gradient():
    ended = raise_any(run_attached(2, "sync_sgd", until_finished, samples=10))
    steps = ended[0][1].tally.local_steps
    reference = small_model(seed=0)
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.05, momentum=0.9)
    for step in range(steps):
        losses = [torch.nn.functional.mse_loss(reference(x), y) for x, y in (batch(step), batch(100 + step))]
        (sum(losses) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    # the same sums in another order: a few ulp a step
    assert torch.allclose(values(ended[1][0]), values(reference), rtol=0, atol=1e-6 * steps)


def test_local_sgd_averages_the_replicas_after_every_h_steps_and_not_between():
    seen = {}

    def loop(r, model, averaging, optimizer):
        while not averaging.finished:
            train_step(model, optimizer, seed=100 * r + averaging.tally.local_steps)
            seen[r, averaging.tally.local_steps] = values(model).clone()

    raise_any(run_attached(2, "local_sgd", loop, steps_per_round=3, samples=12))
    assert sorted(step for r, step in seen if r == 0) == [1, 2, 3, 4, 5, 6]
    assert [torch.equal(seen[0, step], seen[1, step]) for step in range(1, 7)] == [False, False, True] * 2


def test_a_rank_that_leaves_local_sgd_early_answers_for_its_replica_until_the_end():
    def loop(r, model, averaging, optimizer):
        if r == 1:
            train_step(model, optimizer, seed=7)
        else:
            until_finished(r, model, averaging, optimizer)

    (first, one), (second, other) = raise_any(run_attached(2, "local_sgd", loop, steps_per_round=2))
    assert torch.equal(values(first), values(second))
    assert (one.pace.end, other.tally.local_steps) == (End.SAMPLES, 1)


def test_a_rank_that_leaves_synchronous_sgd_early_is_told_what_to_do_and_the_others_why():
    def loop(r, model, averaging, optimizer):
        if r == 1:
            train_step(model, optimizer, seed=7)
        else:
            until_finished(r, model, averaging, optimizer)

    stays, leaves = run_attached(2, "sync_sgd", loop)
    assert isinstance(leaves, ConfigurationError)
    with pytest.raises(ConfigurationError, match=r"rank 1 of 2: its loop has ended.*until averaging.finished"):
        raise leaves
    assert isinstance(stays, PeerError)
    with pytest.raises(PeerError, match=r"rank 0 of 2: .*Rank 1 left"):
        raise stays


@pytest.mark.parametrize("algorithm", WAITING)
def test_a_local_step_after_the_end_is_refused_because_it_could_not_be_taken_back(algorithm):
    def loop(r, model, averaging, optimizer):
        until_finished(r, model, averaging, optimizer)
        train_step(model, optimizer, seed=1)

    for error in run_attached(2, algorithm, loop):
        assert isinstance(error, ConfigurationError)
        assert "a local step after the agreed end" in str(error)


@pytest.mark.parametrize("algorithm", WAITING)
def test_a_failed_round_is_raised_where_the_training_thread_waits_for_it(algorithm):
    network = Network(2, deliver_at_once=True)

    is_cut = threading.Event()

    def loop(r, model, averaging, optimizer):
        while True:
            if averaging.pace.round == 3:
                network.deliver_at_once = False
                is_cut.set()
            train_step(model, optimizer, seed=r)

    def fail_the_fourth_round():
        assert is_cut.wait(LIMIT_S)
        network.wait_joined()
        network.fail(PeerError("the link is cut"))

    threading.Thread(target=fail_the_fourth_round, daemon=True).start()
    for error in run_attached(2, algorithm, loop, network=network, samples=10**6):
        assert isinstance(error, PeerError)
        assert "the link is cut" in str(error)


@pytest.mark.parametrize("algorithm", ["overlap_local_sgd", "cocod_sgd"])
def test_the_last_exact_average_comes_after_the_end_and_is_not_waited_for(algorithm):
    waited_s = {}

    def loop(r, model, averaging, optimizer):
        stands_still, communicator = threading.Event(), averaging._communicator
        wait_answer, reduce = communicator.wait_answer, averaging.group.wait_all_reduce

        def standing_still():
            if averaging.pace.end is not None:
                waited_s[r] = averaging.tally.waited_s
                stands_still.set()
            return wait_answer()

        def late(*arguments):
            assert averaging.pace.end is None or stands_still.wait(LIMIT_S)
            return reduce(*arguments)

        communicator.wait_answer, averaging.group.wait_all_reduce = standing_still, late
        until_finished(r, model, averaging, optimizer)

    ended = raise_any(run_attached(2, algorithm, loop, steps_per_round=2))
    assert [averaging.tally.waited_s for _, averaging in ended] == [waited_s[0], waited_s[1]]


def test_one_rank_that_holds_nan_takes_the_others_average_in_local_sgd():
    def loop(r, model, averaging, optimizer):
        while not averaging.finished:
            if r == 1 and averaging.tally.local_steps == 2:
                with torch.no_grad():
                    next(model.parameters()).fill_(float("nan"))
            train_step(model, optimizer, seed=100 * r + averaging.tally.local_steps)

    ended = raise_any(run_attached(3, "local_sgd", loop, steps_per_round=2, samples=36))
    assert all(values(model).isfinite().all() for model, _ in ended)
    assert all(torch.equal(values(model), values(ended[0][0])) for model, _ in ended)
    assert [sickness.rank for sickness in ended[0][1].pace.sicknesses] == [1]


@pytest.mark.parametrize("algorithm", WAITING)
def test_evaluations_see_the_replicas_mean(algorithm):
    seen = []

    def loop(r, model, averaging, optimizer):
        if r == 0:
            averaging.on_evaluation(lambda kept: seen.append((kept.samples, kept.vector.clone())))
        while not averaging.finished:
            train_step(model, optimizer, seed=100 * r + averaging.tally.local_steps)
            if r == 0 and seen and len(seen[-1]) == 2:
                seen[-1] = (*seen[-1], values(model).clone())

    raise_any(run_attached(2, algorithm, loop, steps_per_round=2, samples=40, evaluations=4))
    assert len(seen) == 3
    for _, vector, model_values in seen:
        assert torch.equal(vector, model_values)
