"""How momentum is shared out between the ranks and their mean, and what settings make of it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lasgd.algorithms import registry
from lasgd.momentum import MOST_OF_RANKS, shared_out
from lasgd.training.settings import Settings


@given(st.floats(0.0, 0.99))
def test_both_together_go_as_far_as_the_whole_in_one_place(momentum):
    ranks, mean = shared_out(momentum)
    assert 0 <= ranks <= MOST_OF_RANKS
    assert 0 <= mean < 1
    assert (1 - ranks) * (1 - mean) == pytest.approx(1 - momentum, rel=1e-6)


def of_mean(settings: Settings) -> float:
    found = registry.find(settings.algorithm, settings.algorithm_settings()).settings
    return getattr(found, "outer_momentum", 0.0)


@pytest.mark.parametrize(
    ("given_", "ranks", "mean"),
    [
        ({}, 0.5, 0.8),
        ({"momentum": 0.95}, 0.5, 0.9),
        ({"momentum": 0.3}, 0.3, 0.0),
        ({"fragments": 4}, 0.5, 0.8),
        ({"fragments": 3}, 0.9, 0.0),
        ({"fragments": 1}, 0.9, 0.0),
        ({"outer_momentum": 0}, 0.9, 0.0),
        ({"ranks": 1}, 0.9, 0.0),
        ({"ranks": 2}, 0.5, 0.8),
        ({"outer_momentum": 0.9, "momentum": 0}, 0.0, 0.9),
        ({"algorithm": "sync_sgd"}, 0.9, 0.0),
        ({"algorithm": "diloco"}, 0.9, 0.9),
    ],
)
def test_settings_share_momentum_out_for_lasgd_alone_and_only_where_it_is_cut(given_, ranks, mean):
    settings = Settings.model_validate(given_)
    assert settings.optimizer_momentum == ranks
    assert of_mean(settings) == pytest.approx(mean)


def test_auto_does_not_go_below_the_least_number_of_fragments_with_it():
    assert registry.find("lasgd", Settings().algorithm_settings()).least_fragments == 4
    assert registry.find("lasgd", Settings(outer_momentum=0).algorithm_settings()).least_fragments == 1
