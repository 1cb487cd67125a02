"""Who writes to whom: the properties that gossip's convergence rests on, on any number of ranks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lasgd.algorithms import topology
from lasgd.errors import ConfigurationError

names = st.sampled_from(topology.NAMES)
sizes = st.integers(1, 40)


def mixing_matrix(name: str, n: int) -> np.ndarray:
    """W, (n, n)."""
    matrix = np.zeros((n, n))
    for rank in range(n):
        for peer, weight in topology.mixing_weights(name, rank, n).items():
            matrix[rank, peer] = weight
    return matrix


def pushing_matrix(name: str, n: int, round: int) -> np.ndarray:
    """P of one round, (n, n): column j is what rank j gives away."""
    matrix = np.zeros((n, n))
    for rank in range(n):
        targets = topology.targets(name, rank, n, round)
        for peer in (rank, *targets):
            matrix[peer, rank] += 1 / (1 + len(targets))
    return matrix


def reached(edges: np.ndarray) -> np.ndarray:
    """Whom each rank reaches along edges, in any number of steps."""
    n = len(edges)
    return np.linalg.matrix_power((edges + np.eye(n)) > 0, max(1, n)) > 0


@given(names, sizes)
def test_mixing_is_symmetric_doubly_stochastic_and_reaches_everybody(name, n):
    matrix = mixing_matrix(name, n)
    assert np.array_equal(matrix, matrix.T)
    assert (matrix >= -1e-15).all()
    np.testing.assert_allclose(matrix.sum(0), 1.0, atol=1e-12)
    np.testing.assert_allclose(matrix.sum(1), 1.0, atol=1e-12)
    assert reached(matrix).all()


@given(names, st.integers(2, 40))
def test_mixing_contracts_what_differs(name, n):
    others = np.sort(np.abs(np.linalg.eigvalsh(mixing_matrix(name, n))))[:-1]
    assert (others < 1 - 1e-6).all()


@given(names, sizes, st.integers(0, 12))
def test_pushing_gives_all_of_the_weight_away_and_sources_are_those_who_push(name, n, round):
    np.testing.assert_allclose(pushing_matrix(name, n, round).sum(0), 1.0, atol=1e-12)
    for rank in range(n):
        assert rank not in topology.targets(name, rank, n, round)
        for peer in topology.targets(name, rank, n, round):
            assert rank in topology.sources(name, peer, n, round)
        assert len(topology.sources(name, rank, n, round)) == len(topology.targets(name, rank, n, round))


@given(names, sizes)
def test_what_is_pushed_reaches_everybody_in_the_end(name, n):
    rounds = sum(pushing_matrix(name, n, round) for round in range(8))
    assert reached(rounds).all()


@given(st.integers(0, 6))
def test_log2_of_n_rounds_of_exponential_pushing_are_an_exact_average(k):
    n = 2**k
    product = np.eye(n)
    for round in range(k):
        product = pushing_matrix("exponential", n, round) @ product
    np.testing.assert_allclose(product, 1 / n, atol=1e-15)


@given(names, sizes)
def test_partners_are_an_even_and_an_odd_rank_and_know_of_each_other(name, n):
    edges = np.zeros((n, n))
    for rank in range(n):
        for peer in topology.partners(name, rank, n):
            assert (peer - rank) % 2 == 1
            assert rank in topology.partners(name, peer, n)
            edges[rank, peer] = 1
    assert reached(edges).all()


def test_small_worlds_by_hand():
    assert topology.neighbours("ring", 0, 4) == (1, 3)
    assert topology.neighbours("exponential", 0, 8) == (1, 2, 4, 6, 7)
    assert topology.targets("exponential", 0, 8, 2) == (4,)
    assert topology.targets("complete", 1, 4, 0) == (2, 3, 0)
    assert topology.mixing_weights("ring", 0, 2) == {1: 0.5, 0: 0.5}
    assert topology.targets("ring", 0, 1, 5) == topology.neighbours("complete", 0, 1) == ()


@pytest.mark.parametrize("call", [topology.neighbours, topology.partners, topology.mixing_weights])
def test_a_topology_that_is_not_known_is_refused_with_the_nearest_name(call):
    with pytest.raises(ConfigurationError, match="Did you mean 'ring'"):
        call("rign", 0, 4)
