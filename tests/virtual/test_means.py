"""Which vector of a virtual run is kept for evaluation, and how far the replicas are apart then."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from lasgd.algorithms import registry
from lasgd.runtime.means import KeptMean, MeanKeeper
from lasgd.training.evaluation import SavedMeans
from lasgd.virtual.spread import consensus_distance, mean_replica
from quadratics import Run

TARGETS = [[-2.0, 1.0], [0.5, 3.0], [4.5, -1.0], [1.0, 1.0]]
WAIT_FOR_ALL = ["local_sgd", "sync_sgd", "post_local_sgd", "diloco"]
WRITING = [name for name in registry.names() if registry.find(name).writes_messages]


class Watched(MeanKeeper):
    """Keeps what is delivered, with all replicas at that moment."""

    def __init__(self) -> None:
        super().__init__(2, torch.float64)
        self.kept: list[tuple[KeptMean, Tensor]] = []
        self.run: Run | None = None
        self.deliver_evaluations(self._keep)

    def _keep(self, mean: KeptMean) -> None:
        assert self.run is not None
        self.kept.append((mean, self.run.xs.clone()))


class WatchedRun(Run):
    def __init__(self, name: str, watched: Watched, **options):
        watched.run = self
        super().__init__(name, TARGETS, lr=0.1, means=watched, **options)


def watched(name: str, evaluations: int = 5, **options) -> tuple[Watched, Run]:
    means = Watched()
    return means, WatchedRun(name, means, steps=40, evaluations=evaluations, **options)


@pytest.mark.parametrize("name", WAIT_FOR_ALL)
def test_where_all_wait_for_each_other_the_replica_is_kept_as_the_next_gradient_finds_it(name):
    means, _ = watched(name, steps_per_round=2)
    assert len(means.kept) >= 4
    for mean, xs in means.kept:
        assert all(torch.equal(mean.vector, x) for x in xs)


@pytest.mark.parametrize("name", WRITING)
def test_where_ranks_write_to_each_other_the_mean_of_all_replicas_of_one_moment_is_kept(name):
    means, _ = watched(name, step_s=[1.0, 1.3, 0.8, 3.0])
    assert len(means.kept) == 4
    for mean, xs in means.kept:
        torch.testing.assert_close(mean.vector, xs.mean(0), rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", ["lasgd", "cocod_sgd", "overlap_local_sgd"])
def test_where_averages_travel_meanwhile_the_average_is_kept(name):
    means, _ = watched(name, round_s=0.4)
    assert len(means.kept) >= 4
    for mean, xs in means.kept:
        # It is of replicas a local step ago, each of which has moved by less than lr times its distance since.
        assert (mean.vector - xs.mean(0)).abs().max() < 0.1 * 7


@pytest.mark.parametrize("name", registry.names())
def test_keeping_means_changes_nothing_that_happens(name):
    options = {"step_s": [1.0, 1.3, 0.8, 3.0], "round_s": 0.4}
    _, with_them = watched(name, **options)
    _, without = watched(name, evaluations=0, **options)
    assert with_them.trace == without.trace or name in ("lasgd", *WRITING), "rounds are due at evaluations, too"
    torch.testing.assert_close(with_them.xs, without.xs, rtol=0, atol=0.3)


class Held:
    def __init__(self, *values: float):
        self.values = torch.tensor(values)

    def parameters(self) -> Tensor:
        return self.values.clone()


def test_the_distance_is_the_root_of_the_mean_square_and_leaves_out_what_is_not_finite():
    replicas = [Held(0.0, 0.0), Held(6.0, 8.0)]
    assert consensus_distance(replicas) == pytest.approx(5.0)
    assert consensus_distance([*replicas, Held(math.nan, 1.0)]) == pytest.approx(5.0)
    assert mean_replica([*replicas, Held(math.inf, 1.0)]).tolist() == [3.0, 4.0]
    assert consensus_distance([replicas[1]] * 3) == 0.0
    assert math.isnan(consensus_distance([Held(math.nan)]))
    assert math.isnan(mean_replica([Held(math.nan)]).item())


def test_a_saved_mean_is_read_back_with_numbers_of_numpy_too(tmp_path):
    saved = SavedMeans(tmp_path)
    saved.save(torch.ones(3), 40, 1.5, np.float64(2.5), np.float64(0.25))
    saved.save(torch.ones(3), 80, 3.0)
    assert [(mean.samples, mean.virtual_s, mean.consensus) for mean in saved] == [(40, 2.5, 0.25), (80, None, None)]
