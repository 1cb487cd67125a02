"""From settings to what one rank needs: what is refused before a local step."""

from __future__ import annotations

import pytest
import torch

from lasgd.errors import ConfigurationError
from lasgd.training.data import open_data
from lasgd.training.settings import Settings
from lasgd.training.setup import budget, make_model

DIGITS = open_data("digits")


def test_the_budget_is_the_samples_or_so_many_passes_over_the_training_images():
    assert budget(Settings(samples=999), DIGITS, 4) == 999
    assert budget(Settings(epochs=0.5), DIGITS, 4) == -(-len(DIGITS.train) // 2)
    assert budget(Settings(), DIGITS, 4) == 60 * len(DIGITS.train)


@pytest.mark.parametrize(
    ("settings", "what"),
    [(Settings(epochs=0.01), r"--epochs: 0\.01 times 1,4\d\d images"), (Settings(samples=63), "--samples: 63")],
)
def test_a_budget_of_less_than_one_batch_on_every_rank_is_refused_however_it_is_given(settings, what):
    expected = f"{what} is less than one batch on every rank: 2 ranks times a batch of 32 need at least 64"
    with pytest.raises(ConfigurationError, match=expected):
        budget(settings, DIGITS, 2)


def test_batch_norm_over_one_value_is_refused_and_where_there_are_more_it_is_not():
    with pytest.raises(ConfigurationError, match=r"--batch-size: .* one image at a time: .*more than 1 value"):
        make_model(Settings(model="cnn4", norm="batch", batch_size=1), DIGITS)
    make_model(Settings(model="cnn4", norm="batch", batch_size=2), DIGITS)
    make_model(Settings(model="cnn4", batch_size=1), DIGITS)
    make_model(Settings(model="resnet20", norm="batch", batch_size=1), DIGITS)  # its last feature map is 2x2


def test_looking_whether_single_images_will_do_changes_neither_the_model_nor_the_random_numbers():
    states = []
    for batch_size in (1, 2):
        model = make_model(Settings(model="resnet20", norm="batch", batch_size=batch_size), DIGITS)
        assert model.training
        states.append([*model.state_dict().values(), torch.get_rng_state()])
    assert all(map(torch.equal, *states))
