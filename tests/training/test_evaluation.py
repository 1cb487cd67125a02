"""Evaluation of averaged models on the validation images."""

from __future__ import annotations

import torch

from lasgd.training.data import open_data
from lasgd.training.evaluation import evaluate, evaluate_together
from lasgd.training.models import build_model


def judges(count):
    torch.manual_seed(0)
    return [build_model("cnn4", num_classes=10, channels=1) for _ in range(count)]


def test_models_evaluated_together_are_judged_as_each_alone_and_left_in_their_modes():
    data, models = open_data("digits"), judges(3)
    models[1].eval()
    alone = [evaluate(model, data, torch.device("cpu"), workers=0)[0] for model in models]
    together, skipped = evaluate_together(models, data, torch.device("cpu"), workers=0)
    assert together == alone
    assert len({final.loss for final in together}) == 3
    assert skipped == ()
    assert [model.training for model in models] == [True, False, True]


def test_whoever_is_asked_to_stop_has_no_figures_and_its_modes_back():
    models = judges(2)
    found, _ = evaluate_together(models, open_data("digits"), torch.device("cpu"), 0, asked_to_stop=lambda: True)
    assert found == []
    assert all(model.training for model in models)
