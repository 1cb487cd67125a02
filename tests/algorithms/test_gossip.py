"""Gossip with nothing to learn: how fast unequal replicas become equal, and that nothing is lost on the way."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_topology import mixing_matrix

from lasgd.algorithms import ad_psgd, sgp
from lasgd.algorithms.requests import Message, Receive, Send
from lasgd.pace import Pace
from lasgd.replica import Replica
from lasgd.tally import Tally
from lasgd.virtual.network_models import Network
from quadratics import Run


def unequal(n: int, d: int = 5, seed: int = 0) -> list[list[float]]:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).tolist()


def cut_off(name: str, start, after: int, **options) -> Run:
    """A run of lr 0 that is cut off half a step after so many local steps, before the last exact average."""
    targets = [[0.0] * len(start[0])] * len(start)
    return Run(name, targets, steps=10**6, lr=0.0, start=start, stop_at_s=after + 0.5, **options)


def spread(xs: torch.Tensor) -> float:
    """The consensus distance of (n, d)."""
    return float((xs - xs.mean(0)).square().sum(1).mean().sqrt())


@pytest.mark.parametrize("topology", ["ring", "complete", "exponential"])
@pytest.mark.parametrize("n", [2, 3, 5, 8])
def test_d_psgd_contracts_per_round_by_the_second_eigenvalue_and_not_faster_in_the_end(topology, n):
    eigenvalues = np.sort(np.abs(np.linalg.eigvalsh(mixing_matrix(topology, n))))
    second = float(eigenvalues[-2])
    spreads = []
    for rounds in range(0, 13, 3):
        ended = cut_off("d_psgd", unequal(n), rounds, settings={"topology": topology})
        assert {rank.tally.exchanges for rank in ended.ranks} == {rounds}
        mixed = np.linalg.matrix_power(mixing_matrix(topology, n), rounds)
        expected = torch.from_numpy(mixed) @ torch.tensor(unequal(n), dtype=torch.float64)
        torch.testing.assert_close(ended.xs, expected, rtol=0, atol=1e-12)
        spreads.append(spread(ended.xs))
    for before, after in pairwise(spreads):
        assert after <= before * second**3 + 1e-12
    if second > 0.1:
        assert spreads[-1] > spreads[-2] * second**3 * 0.7, "asymptotically that is the rate"


@pytest.mark.parametrize("name", ["d_psgd", "sgp"])
@pytest.mark.parametrize("n", [2, 3, 6, 8])
def test_mixing_in_step_keeps_the_mean_to_rounding(name, n):
    start = unequal(n)
    ended = cut_off(name, start, 7, settings={"topology": "exponential"})
    torch.testing.assert_close(ended.xs.mean(0), torch.tensor(start, dtype=torch.float64).mean(0), rtol=0, atol=1e-14)
    assert spread(ended.xs) < 0.2 * spread(torch.tensor(start, dtype=torch.float64))


def test_sgp_that_pushes_to_all_averages_exactly_in_every_step():
    start = unequal(5)
    ended = cut_off("sgp", start, 1, settings={"topology": "complete"})
    mean = torch.tensor(start, dtype=torch.float64).mean(0).expand(5, -1)
    torch.testing.assert_close(ended.xs, mean, rtol=0, atol=1e-15)


def test_sgp_on_two_to_the_k_ranks_is_an_exact_average_after_k_steps():
    start = unequal(8)
    ended = cut_off("sgp", start, 3)
    mean = torch.tensor(start, dtype=torch.float64).mean(0).expand(8, -1)
    torch.testing.assert_close(ended.xs, mean, rtol=0, atol=1e-15)


@pytest.mark.parametrize("name", ["osgp", "ad_psgd"])
@pytest.mark.parametrize("n", [2, 3, 4, 7])
def test_gossip_in_the_background_brings_all_to_the_mean(name, n):
    start = unequal(n)
    ended = cut_off(name, start, 60, network=Network(n, 500.0, latency_s=0.05))
    mean = torch.tensor(start, dtype=torch.float64).mean(0)
    assert spread(ended.xs) < 1e-3 * spread(torch.tensor(start, dtype=torch.float64))
    # OSGP's weights differ while rounds are on their way, so that a cut finds the sum of w z conserved, not of z.
    torch.testing.assert_close(ended.xs.mean(0), mean, rtol=0, atol=1e-12 if name == "ad_psgd" else 1e-2)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_one_round_of_lasgd_makes_all_equal(n):
    start = unequal(n)
    ended = cut_off("lasgd", start, 3)
    mean = torch.tensor(start, dtype=torch.float64).mean(0).expand(n, -1)
    torch.testing.assert_close(ended.xs, mean, rtol=0, atol=1e-15)


# AD-PSGD


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 7),
    st.lists(st.sampled_from([0.3, 1.0, 1.1, 5.0]), min_size=7, max_size=7),
    st.sampled_from([20.0, 300.0, math.inf]),
    st.sampled_from([0.0, 0.4]),
    st.sampled_from(["ring", "complete", "exponential"]),
    st.integers(1, 40),
)
def test_ad_psgd_never_deadlocks_and_loses_nothing_at_its_end(n, step_s, bytes_per_s, latency_s, name, steps):
    start = unequal(n)
    network = Network(n, bytes_per_s, latency_s=latency_s)
    ended = Run(
        "ad_psgd",
        start,
        steps=steps,
        lr=0.0,
        start=start,
        step_s=step_s[:n],
        network=network,
        settings={"topology": name},
    )
    assert all(rank.left_s is not None for rank in ended.ranks)
    assert ended.paces[0].end is not None
    assert all(torch.equal(ended.x(0), x) for x in ended.xs)
    torch.testing.assert_close(ended.x(0), torch.tensor(start, dtype=torch.float64).mean(0), rtol=0, atol=1e-13)
    pairs = [rank.tally.exchanges for rank in ended.ranks]
    assert sum(pairs[0::2]) == sum(pairs[1::2]), "every exchange has an even and an odd rank, and both have finished it"


def test_an_even_rank_of_ad_psgd_does_not_wait_for_a_partner_that_computes():
    ended = Run("ad_psgd", [[0.0]] * 4, steps=40, step_s=[1.0, 50.0, 1.0, 1.0], lr=0.1)
    assert ended.steps[0] > 40
    assert ended.ranks[0].tally.waited_s == 0
    assert ended.ranks[1].tally.exchanges > 5 * ended.steps[1], "a passive rank answers in the midst of its local step"


def test_a_passive_rank_serves_who_has_not_seen_the_end_yet_after_another_one_has_left():
    # Rank 0 sees the end first and leaves; rank 2 asks once more before it does.
    replica = Replica(torch.nn.Linear(1, 1), Tally(batch_size=1, rank=1))
    text = ad_psgd.exchange(replica, Pace(4, samples=10), ad_psgd.Settings())
    assert isinstance(next(text), Receive)
    assert isinstance(text.send(Message(0, None, 1.0, ad_psgd.Word.BYE)), Receive)
    answer = text.send(Message(2, None, 1.0, ad_psgd.Word.ASK))
    assert isinstance(answer, Send) and (answer.peer, answer.note) == (2, ad_psgd.Word.YES)
    sent = text.send(None)
    assert isinstance(sent, Send) and sent.values is not None
    assert text.send(None) == Receive(2)
    assert isinstance(text.send(Message(2, torch.zeros(2), 1.0, 0)), Receive)
    with pytest.raises(StopIteration):
        text.send(Message(2, None, 1.0, ad_psgd.Word.BYE))


def test_what_a_rank_of_sgp_gives_away_is_a_share_of_the_weight_that_it_has():
    replica = Replica(torch.nn.Linear(1, 1), Tally(batch_size=1, rank=0))
    text = sgp.compute(replica, Pace(2, samples=10), sgp.Settings())
    given = []
    request = next(text)
    while len(given) < 3:
        answer = None
        if isinstance(request, Send):
            given.append(request.weight)
        elif isinstance(request, Receive):
            answer = Message(1, torch.zeros(2), 0.8, 0)
        request = text.send(answer)
    # It keeps as much as it gives, and is given 0.8: 1 -> 0.5 + 0.8 -> 0.65 + 0.8
    assert given == pytest.approx([0.5, 0.65, 0.725])
