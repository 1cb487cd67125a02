"""Every rank's own replica at each evaluation, and what comes of them."""

from __future__ import annotations

import math

import pytest
import torch

from lasgd.training.replicas import SavedReplicas, compare


def test_the_mean_and_the_distance_of_the_replicas_are_those_of_the_definition():
    mean, consensus = compare([torch.tensor([1.0, 0.0]), torch.tensor([3.0, 4.0])])
    assert torch.equal(mean, torch.tensor([2.0, 2.0]))
    assert consensus == pytest.approx(math.sqrt(5.0))  # each is (1, 2) away


def test_a_rank_with_nan_does_not_count_and_nothing_given_is_changed():
    replicas = [torch.tensor([1.0, 3.0], dtype=torch.float64), torch.full((2,), float("nan"), dtype=torch.float64)]
    mean, consensus = compare([replicas[0], replicas[0].clone(), replicas[1]])
    assert torch.equal(mean, torch.tensor([1.0, 3.0], dtype=torch.float64)) and consensus == 0.0
    assert torch.equal(replicas[0], torch.tensor([1.0, 3.0], dtype=torch.float64))


def test_equal_replicas_are_no_distance_apart():
    assert compare([torch.ones(3)] * 4)[1] == 0.0


def test_evaluations_come_back_in_their_order_with_rank_0s_time(tmp_path):
    saved = SavedReplicas(tmp_path)
    for evaluation in (10, 2):
        for rank in (1, 0):
            saved.save(
                rank, evaluation, torch.full((2,), float(rank)), 100 * evaluation + rank, 0.5 * evaluation + rank
            )
    found = list(saved.compared(world_size=2))
    assert [(c.evaluation, c.samples, c.wall_s) for c in found] == [(2, 200, 1.0), (10, 1000, 5.0)]
    assert torch.equal(found[0].mean, torch.full((2,), 0.5))


def test_an_evaluation_that_a_rank_has_missed_is_left_out(tmp_path):
    saved = SavedReplicas(tmp_path)
    saved.save(0, 1, torch.ones(2), 1, 1.0)
    assert list(saved.compared(world_size=2)) == []


def test_removing_leaves_what_a_resumed_run_still_needs_and_then_nothing(tmp_path):
    saved = SavedReplicas(tmp_path)
    for evaluation in (1, 2, 3):
        saved.save(0, evaluation, torch.ones(2), evaluation, 1.0)
    saved.remove(above_evaluation=1)
    assert [c.evaluation for c in saved.compared(1)] == [1]
    saved.remove()
    assert not saved.folder.exists()
