"""Gradients averaged during the backward pass: two ranks, each in a thread, over Gloo."""

from __future__ import annotations

import contextlib
import copy
import io
import math
import time

import pytest
import torch
import torch.distributed as dist
from torch import nn

import lasgd
from helpers import LIMIT_S, alone, batch, raise_any, small_model, train_step, wait_all
from lasgd.errors import ConfigurationError, DivergenceError, PeerError, ProtocolError
from lasgd.group.c10d import C10dGroup
from lasgd.group.padded import PaddedGroup
from lasgd.merge import rule as merge_rule
from lasgd.pace import End
from lasgd.runtime.parallel import MeanGradients
from lasgd.tally import Tally


def values(model) -> torch.Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def step(call, optimizer, seed: int) -> None:
    x, y = batch(seed)
    nn.functional.mse_loss(call(x), y).backward()
    optimizer.step()
    optimizer.zero_grad()


def until_finished(r, averaging, model, optimizer):
    while not averaging.finished:
        step(averaging.model, optimizer, seed=100 * r + averaging.tally.local_steps)


def run_ranks(loop=until_finished, make=small_model, n=2, slow=None, **options):
    """Every rank in its own thread; (model, averaging) of each, or what it raised. `slow` goes to PaddedGroup."""
    store = dist.HashStore()
    models = [make() for _ in range(n)]
    options = {"samples": 24, "batch_size": 1, "timeout_s": 5.0, "algorithm": "sync_sgd", "ddp": True, **options}

    def rank(r):
        group = C10dGroup(dist.PrefixStore("run", store), r, n, LIMIT_S)
        if slow is not None:
            group = PaddedGroup(group, vector_bytes=4 * sum(p.numel() for p in models[r].parameters()), **slow)
        optimizer = torch.optim.SGD(models[r].parameters(), lr=0.05, momentum=0.9)
        with lasgd.attach(models[r], optimizer, group=group, **options) as averaging:
            loop(r, averaging, models[r], optimizer)
        return models[r], averaging

    return wait_all([lambda r=r: rank(r) for r in range(n)])


def test_all_ranks_end_in_the_same_step_with_equal_replicas():
    (first, one), (second, other) = raise_any(run_ranks(n=2))
    assert torch.equal(values(first), values(second))
    assert one.pace.end is other.pace.end is End.SAMPLES
    assert one.tally.local_steps == other.tally.local_steps == one.pace.round == 13


def test_ranks_see_the_same_progress_in_each_step_as_with_the_text_alone():
    seen = {True: [], False: []}

    def loop(r, averaging, model, optimizer):
        while not averaging.finished:
            step(averaging.model, optimizer, seed=r)
            if r == 0:
                pace = averaging.pace
                seen[ddp].append((pace.samples, pace.round, pace.checkpoint, pace.evaluation, pace.end))

    for ddp in (True, False):
        raise_any(run_ranks(loop, ddp=ddp, checkpoints=4, evaluations=3))
    assert seen[True] == seen[False]


def test_one_rank_alone_is_plain_sgd_bit_for_bit():
    [(model, averaging)] = raise_any(run_ranks(n=1, samples=5))
    reference = small_model()
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.05, momentum=0.9)
    for seed in range(averaging.tally.local_steps):
        step(reference, optimizer, seed)
    assert torch.equal(values(model), values(reference))


def test_a_round_that_takes_long_is_waited_for_in_the_backward_pass_and_counted():
    def loop(r, averaging, model, optimizer):
        kinds = []
        averaging.on_record(lambda kind, begin_s, end_s: kinds.append((kind, end_s - begin_s)))
        until_finished(r, averaging, model, optimizer)
        recorded.append(kinds)

    recorded: list = []
    ended = raise_any(run_ranks(loop, slow={"round_s": 0.03}, samples=8))
    for _, averaging in ended:
        assert averaging.tally.local_steps == 5
        assert 5 * 0.03 <= averaging.waited_within_passes_s <= averaging.tally.waited_s
    for kinds in recorded:
        assert [kind for kind, _ in kinds].count("compute") == 5
        assert sum(seconds for kind, seconds in kinds if kind == "wait") >= 5 * 0.03
        assert sum(seconds for kind, seconds in kinds if kind == "round") >= 5 * 0.03


def test_the_rank_is_told_when_a_bucket_is_full_before_its_all_reduce_begins():
    def loop(r, averaging, model, optimizer):
        def wait() -> None:
            if r == 1:
                time.sleep(0.1)
            told[r] += 1

        averaging.on_bucket(wait)
        until_finished(r, averaging, model, optimizer)

    told = [0, 0]
    (_, quick), (_, slow) = raise_any(run_ranks(loop, samples=8))
    assert told == [5, 5]
    assert quick.tally.waited_s > 5 * 0.06 > slow.tally.waited_s  # of 100 ms


def test_micro_batches_accumulate_outside_of_the_network_and_are_averaged_once():
    def loop(r, averaging, model, optimizer):
        while not averaging.finished:
            for part in range(2):
                with averaging.model.no_sync() if part == 0 else contextlib.nullcontext():
                    x, y = batch(100 * r + 2 * averaging.tally.local_steps + part)
                    (nn.functional.mse_loss(averaging.model(x), y) / 2).backward()
            optimizer.step()
            optimizer.zero_grad()

    (first, one), (second, _) = raise_any(run_ranks(loop, samples=8))
    assert torch.equal(values(first), values(second))
    assert one.tally.local_steps == one.pace.round == 5


def with_gradients(*gradients: torch.Tensor) -> MeanGradients:
    model = nn.ParameterList([torch.zeros_like(gradient) for gradient in gradients])
    for parameter, gradient in zip(model, gradients, strict=True):
        parameter.grad = gradient
    return MeanGradients(model, Tally(1), 1, merge_rule("full"))


@pytest.mark.parametrize("sick", [math.nan, math.inf, -math.inf])
def test_nan_and_inf_are_found_wherever_they_are(sick):
    for place in range(5):
        flat = torch.arange(5.0)
        flat[place] = sick
        assert with_gradients(flat[:2], flat[2:].view(1, 3), torch.empty(0)).gradient().weight == 0.0
    assert with_gradients(torch.full((3,), 3e38)).gradient().weight == 1.0


def test_to_look_for_nan_takes_no_longer_than_to_read_the_gradients_a_few_times():
    gradient = torch.ones(2**21)
    replica = with_gradients(gradient)

    def shortest_s(action) -> float:
        spent_s = []
        for _ in range(7):
            begin_s = time.perf_counter()
            action()
            spent_s.append(time.perf_counter() - begin_s)
        return min(spent_s)

    # One pass; the largest absolute value, by torch's norm, takes as long as 25 of them.
    assert shortest_s(replica.gradient) < 8 * shortest_s(lambda: torch.aminmax(gradient))


class Normed(nn.Sequential):
    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))


def test_buffers_are_rank_0s_at_the_end():
    def loop(r, averaging, model, optimizer):
        until_finished(r, averaging, model, optimizer)
        before.append((r, model[1].running_mean.clone()))

    before: list = []
    (first, _), (second, _) = raise_any(run_ranks(loop, Normed, slow={"bandwidth_bytes_per_s": 1e6}))
    own = dict(before)
    assert not torch.equal(own[0], own[1])
    for mine, theirs in zip(first.buffers(), second.buffers(), strict=True):
        assert torch.equal(mine, theirs)
    assert torch.equal(first[1].running_mean, own[0])


def test_a_loop_that_calls_the_model_itself_is_told_to_call_the_averagings():
    def loop(r, averaging, model, optimizer):
        step(model, optimizer, seed=r)

    for error in run_ranks(loop):
        assert isinstance(error, ConfigurationError)
        assert "call averaging.model(x) instead of model(x)" in str(error)


def test_a_gradient_that_grows_after_it_was_averaged_is_refused():
    def within_no_sync(r, averaging, model, optimizer):
        x, y = batch(r)
        nn.functional.mse_loss(averaging.model(x), y).backward()
        with averaging.model.no_sync():
            step(averaging.model, optimizer, seed=10 + r)

    def by_the_model_itself(r, averaging, model, optimizer):
        x, y = batch(r)
        nn.functional.mse_loss(averaging.model(x), y).backward()
        step(model, optimizer, seed=10 + r)

    for loop in (within_no_sync, by_the_model_itself):
        for error in run_ranks(loop):
            assert isinstance(error, ConfigurationError), error
            assert "outside of no_sync() for the last micro-batch" in str(error)


def test_an_error_of_the_models_own_forward_hook_is_not_taken_for_one_of_the_network():
    def fails(module, inputs):
        raise RuntimeError("wrong shape of bananas")

    def make():
        model = small_model()
        model.register_forward_pre_hook(fails)
        return model

    for error in run_ranks(make=make):
        assert type(error) is RuntimeError, error
        assert "bananas" in str(error)


class Partly(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, x):
        return self.used(x)


def test_a_parameter_that_takes_no_part_in_the_loss_is_refused_at_the_first_step():
    for error in run_ranks(make=Partly):
        assert isinstance(error, ConfigurationError)
        assert "let every trainable parameter take part in the loss" in str(error)


def test_nan_on_one_rank_ends_the_run_on_all():
    def loop(r, averaging, model, optimizer):
        while not averaging.finished:
            if r == 1 and averaging.tally.local_steps == 3:
                with torch.no_grad():
                    model[0].weight.fill_(torch.nan)
            step(averaging.model, optimizer, seed=r)

    errors = run_ranks(loop)
    assert all(isinstance(error, DivergenceError) for error in errors), errors


def test_a_rank_that_fails_is_named_and_why_at_the_others_next_step_boundary():
    def loop(r, averaging, model, optimizer):
        while not averaging.finished:
            if r == 1 and averaging.tally.local_steps == 3:
                raise ValueError("too many bananas")
            step(averaging.model, optimizer, seed=r)

    stays, fails = run_ranks(loop, samples=10**6)
    assert isinstance(fails, ValueError)
    assert isinstance(stays, PeerError)
    with pytest.raises(PeerError, match=r"rank 0 of 2: round 4: .*Rank 1 left: ValueError: too many bananas"):
        raise stays


def test_a_rank_that_leaves_early_is_told_what_to_do_and_the_others_why():
    def loop(r, averaging, model, optimizer):
        step(averaging.model, optimizer, seed=r)
        if r == 0:
            until_finished(r, averaging, model, optimizer)

    begin_s = time.monotonic()
    stays, leaves = run_ranks(loop)
    assert time.monotonic() - begin_s < 4  # sooner than timeout_s, though DDP broadcasts in the second forward pass
    assert isinstance(leaves, ConfigurationError)
    with pytest.raises(
        PeerError, match=r"rank 0 of 2: round 2: .*Rank 1 left: ConfigurationError: rank 1 of 2: its loop has ended"
    ):
        raise stays


def test_a_wish_to_stop_ends_all_ranks_in_the_same_step():
    def loop(r, averaging, model, optimizer):
        while not averaging.finished:
            if r == 1 and averaging.tally.local_steps == 3:
                averaging.stop()
            step(averaging.model, optimizer, seed=r)

    (first, one), (second, other) = raise_any(run_ranks(loop, samples=10**6))
    assert one.pace.end is other.pace.end is End.STOP
    assert one.tally.local_steps == other.tally.local_steps
    assert torch.equal(values(first), values(second))


def test_a_local_step_after_the_end_is_refused_and_nobody_waits_for_it():
    def loop(r, averaging, model, optimizer):
        until_finished(r, averaging, model, optimizer)
        if r == 1:
            step(averaging.model, optimizer, seed=1)

    _, error = run_ranks(loop)
    assert isinstance(error, ConfigurationError)
    assert "a local step after the agreed end" in str(error)


def test_a_recorder_that_raises_on_the_reducers_thread_is_heard_of_and_nobody_waits_for_ever():
    def record(kind, begin_s, end_s):
        if kind == "round":
            raise ValueError("no more paper")

    def loop(r, averaging, model, optimizer):
        if r == 1:
            averaging.on_record(record)
        until_finished(r, averaging, model, optimizer)

    stays, fails = run_ranks(loop)
    assert isinstance(fails, ProtocolError)
    assert "the reducer: ValueError: no more paper" in str(fails)
    assert isinstance(stays, PeerError)
    assert "Rank 1 left: ProtocolError" in str(stays)


def test_only_algorithms_that_average_gradients_take_it():
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with pytest.raises(ConfigurationError, match="ddp=True is for algorithms that average gradients, and lasgd"):
        lasgd.attach(model, optimizer, samples=10, batch_size=1, ddp=True)


def test_a_group_without_a_lane_is_refused():
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with pytest.raises(ConfigurationError, match="needs a group with a lane"):
        alone(model, optimizer, algorithm="sync_sgd", ddp=True)


def test_without_it_the_model_to_call_is_the_model():
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with alone(model, optimizer, algorithm="sync_sgd", samples=2) as averaging:
        assert averaging.model is model
        assert averaging.waited_within_passes_s == 0.0
        while not averaging.finished:
            train_step(model, optimizer, seed=1)


def test_a_copy_of_the_model_can_be_made_and_stored_during_the_run_and_is_on_its_own():
    def loop(r, averaging, model, optimizer):
        step(averaging.model, optimizer, seed=r)
        stored = io.BytesIO()
        torch.save(model, stored)
        stored.seek(0)
        for copied in (copy.deepcopy(model), torch.load(stored, weights_only=False)):
            step(copied, torch.optim.SGD(copied.parameters(), lr=0.1), seed=r)
        until_finished(r, averaging, model, optimizer)

    (first, _), (second, _) = raise_any(run_ranks(loop, make=lambda: Normed()))
    assert torch.equal(values(first), values(second))
