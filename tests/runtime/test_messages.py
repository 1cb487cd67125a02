"""The real driver with algorithms whose ranks write to each other, over the scripted network."""

from __future__ import annotations

import threading
import time
from dataclasses import replace

import pytest
import torch

import lasgd
from helpers import LIMIT_S, raise_any, run_attached, small_model, train_step, until_finished, values, wait_all
from lasgd.algorithms import osgp, registry
from lasgd.algorithms.requests import Box, Receive, Stop
from lasgd.errors import ConfigurationError, PeerError, ProtocolError
from lasgd.group.scripted import Network
from lasgd.pace import End, Pace
from lasgd.runtime.postbox import Postbox

WRITING = [name for name in registry.names() if registry.find(name).writes_messages]
NEVER_WAITING = ["ad_psgd", "osgp"]


def threads_named(*parts: str) -> list[str]:
    return [t.name for t in threading.enumerate() if any(part in t.name for part in parts)]


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("algorithm", WRITING)
def test_all_replicas_are_identical_at_the_agreed_end_and_no_thread_is_left(algorithm, world_size):
    ended = raise_any(run_attached(world_size, algorithm, until_finished, samples=15 * world_size))
    for model, averaging in ended:
        assert torch.equal(values(model), values(ended[0][0]))
        assert averaging.pace.end is End.SAMPLES
        assert averaging.tally.local_steps >= 1
    assert not threads_named("lasgd-exchanger")


@pytest.mark.parametrize("algorithm", WRITING)
def test_a_rank_that_leaves_early_ends_with_the_others(algorithm):
    def loop(r, model, averaging, optimizer):
        if r == 1:
            train_step(model, optimizer, seed=7)
        else:
            until_finished(r, model, averaging, optimizer)

    (first, one), (second, other) = raise_any(run_attached(2, algorithm, loop))
    assert torch.equal(values(first), values(second))
    assert (one.pace.end, other.tally.local_steps) == (End.SAMPLES, 1)


@pytest.mark.parametrize("algorithm", WRITING)
def test_an_early_end_leaves_every_rank_its_replica_and_no_thread(algorithm):
    def loop(r, model, averaging, optimizer):
        while not averaging.finished:
            train_step(model, optimizer, seed=100 * r + averaging.tally.local_steps)
            if averaging.tally.local_steps == 3:
                averaging.stop()

    ended = raise_any(run_attached(2, algorithm, loop, samples=10**6))
    assert [averaging.pace.end for _, averaging in ended] == [End.STOP] * 2
    assert not threads_named("lasgd-exchanger")


@pytest.mark.parametrize("algorithm", WRITING)
def test_a_rank_that_holds_nan_takes_what_the_others_have(algorithm):
    def loop(r, model, averaging, optimizer):
        while not averaging.finished:
            if r == 1 and averaging.tally.local_steps == 2:
                with torch.no_grad():
                    next(model.parameters()).fill_(float("nan"))
            train_step(model, optimizer, seed=100 * r + averaging.tally.local_steps)
            time.sleep(0.001)

    ended = raise_any(run_attached(3, algorithm, loop, samples=120))
    assert all(values(model).isfinite().all() for model, _ in ended)
    assert all(torch.equal(values(model), values(ended[0][0])) for model, _ in ended)


@pytest.mark.parametrize("algorithm", WRITING)
def test_a_failed_agreement_ends_every_rank_also_those_that_wait_for_a_message(algorithm):
    network = Network(2, deliver_at_once=True)
    is_cut = threading.Event()

    def loop(r, model, averaging, optimizer):
        while True:
            if averaging.pace.round >= 3:
                network.deliver_at_once = False
                is_cut.set()
            train_step(model, optimizer, seed=r)

    def fail_the_next_round():
        assert is_cut.wait(LIMIT_S)
        network.wait_joined()
        network.fail(PeerError("the link is cut"))

    threading.Thread(target=fail_the_next_round, daemon=True).start()
    for error in run_attached(2, algorithm, loop, network=network, samples=10**6):
        assert isinstance(error, PeerError)
        assert "the link is cut" in str(error)


def test_what_the_exchanger_stumbles_over_is_raised_at_the_next_step_boundary(monkeypatch):
    def broken(replica, pace, settings):
        yield "nonsense"

    monkeypatch.setitem(
        registry._ALGORITHMS, "osgp", replace(registry.find("osgp"), compute=osgp.compute, exchange=broken)
    )
    (error,) = run_attached(1, "osgp", until_finished, samples=10**6)
    assert isinstance(error, ProtocolError)
    assert "the exchanger cannot answer str" in str(error)


@pytest.mark.parametrize("algorithm", NEVER_WAITING)
def test_nobody_waits_where_exchanges_go_on_in_the_background(algorithm):
    def loop(r, model, averaging, optimizer):
        while not averaging.finished:
            train_step(model, optimizer, seed=100 * r + averaging.tally.local_steps)
            waited[r] = averaging.tally.waited_s

    waited = {}
    ended = raise_any(run_attached(2, algorithm, loop, samples=400))
    assert waited == {0: 0.0, 1: 0.0}
    assert all(averaging.tally.exchanges for _, averaging in ended)


@pytest.mark.parametrize("algorithm", ["d_psgd", "sgp", "parameter_server", "easgd"])
def test_waiting_for_a_message_is_counted(algorithm):
    def loop(r, model, averaging, optimizer):
        while not averaging.finished:
            if r == 1:
                time.sleep(0.02)  # the thing that takes time
            train_step(model, optimizer, seed=100 * r + averaging.tally.local_steps)

    (_, quick), (_, slow) = raise_any(run_attached(2, algorithm, loop, samples=20))
    assert quick.tally.exchanges and slow.tally.exchanges
    if algorithm in ("d_psgd", "sgp"):  # in lock-step with a slow neighbour
        assert quick.tally.waited_s > 4 * 0.02
        # a neighbour is one step ahead at most, and the end is seen a step sooner or later
        assert abs(quick.tally.local_steps - slow.tally.local_steps) <= 2


def test_every_rank_hands_its_own_replica_over_after_each_part_of_the_budget():
    seen = {0: [], 1: []}

    def loop(r, model, averaging, optimizer):
        averaging.on_replica(lambda own: seen[r].append((own.evaluation, own.vector, values(model).clone())))
        while not averaging.finished:
            train_step(model, optimizer, seed=100 * r + averaging.tally.local_steps)
            time.sleep(0.002)

    raise_any(run_attached(2, "ad_psgd", loop, samples=100, evaluations=4))
    for r in (0, 1):
        assert [number for number, _, _ in seen[r]] == [1, 2, 3]
        assert all(torch.equal(vector, model_values) for _, vector, model_values in seen[r])


def test_gossip_has_no_mean_before_the_end_and_says_so():
    def loop(r, model, averaging, optimizer):
        train_step(model, optimizer, seed=1)
        with pytest.raises(ConfigurationError, match="ad_psgd has no mean of all replicas before the agreed end"):
            averaging.mean_weights()
        until_finished(r, model, averaging, optimizer)
        averaging.wait_end()
        assert torch.equal(averaging.mean_weights()["0.weight"], model[0].weight)

    raise_any(run_attached(2, "ad_psgd", loop))


def test_settings_of_another_algorithm_are_refused():
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options = {"samples": 10, "batch_size": 1, "group": Network(1, deliver_at_once=True).group(0)}
    with pytest.raises(ConfigurationError, match="outer_lr is no setting of ad_psgd, but of diloco"):
        lasgd.attach(model, optimizer, algorithm="ad_psgd", algorithm_settings={"outer_lr": 1.0}, **options)
    with pytest.raises(ConfigurationError, match="Did you mean 'outer_lr'"):
        lasgd.attach(model, optimizer, algorithm="diloco", algorithm_settings={"outer_rl": 1.0}, **options)
    with pytest.raises(ConfigurationError, match=r"topology 'rong' is not known.*Did you mean 'ring'"):
        lasgd.attach(model, optimizer, algorithm="sgp", algorithm_settings={"topology": "rong"}, **options)
    with pytest.raises(ConfigurationError, match="outer_lr should be above 0"):
        lasgd.attach(model, optimizer, algorithm="diloco", algorithm_settings={"outer_lr": 0}, **options)


def test_ranks_that_disagree_on_an_algorithms_setting_are_told():
    network = Network(2, deliver_at_once=True)

    def rank(r):
        model = small_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        settings = {"topology": ("ring", "complete")[r]}
        return lasgd.attach(
            model, optimizer, samples=10, batch_size=1, algorithm="sgp", algorithm_settings=settings,
            group=network.group(r), timeout_s=LIMIT_S,
        )  # fmt: skip

    for error in wait_all([lambda r=r: rank(r) for r in range(2)]):
        assert isinstance(error, ConfigurationError)
        assert "ranks disagree on algorithm_settings" in str(error)


def opened(network: Network, is_over=lambda: False, timeout_s=LIMIT_S) -> tuple[Postbox, Pace]:
    pace = Pace(2, samples=10)
    mail = network.group(0).wait_mail(LIMIT_S)
    return Postbox(mail, Box.COMPUTE, pace, is_over, timeout_s, lambda: "rank 0 of 2: round 1"), pace


def test_a_silent_peer_is_named_after_the_time_out():
    postbox, _ = opened(Network(2), timeout_s=0.01)
    with pytest.raises(PeerError, match=r"rank 0 of 2: round 1: no message from rank 1 within 0\.01 s"):
        postbox.wait_receive(Receive(1))


def test_after_the_end_only_what_is_there_is_received():
    network = Network(2)
    postbox, pace = opened(network)
    pace.end = End.SAMPLES
    network.group(1).wait_mail(LIMIT_S).send(0, Box.COMPUTE, torch.ones(1), 1.0, 4)
    assert postbox.wait_receive(Receive(1, until_end=True)).note == 4
    assert isinstance(postbox.wait_receive(Receive(1, until_end=True)), Stop)


def test_who_is_being_closed_waits_for_no_message():
    postbox, _ = opened(Network(2), is_over=lambda: True)
    assert isinstance(postbox.wait_receive(Receive(1)), Stop)
