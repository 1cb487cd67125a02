"""The training loop's checkpoints: which of them count as saved."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lasgd.group.scripted import Network
from lasgd.lab import conditions
from lasgd.lab.padding import StepPadding
from lasgd.runtime.attach import attach
from lasgd.training.checkpoint import Checkpoints
from lasgd.training.loop import Notes, Trainer
from lasgd.training.settings import Settings
from lasgd.training.writer import BackgroundWriter


@pytest.fixture
def rank(tmp_path):
    """A rank that only cuts checkpoints: its model, its averaging, and cut(number)."""
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    group = Network(1, deliver_at_once=True).group(0)
    averaging = attach(model, optimizer, samples=1000, batch_size=1, group=group)
    checkpoints = Checkpoints(tmp_path, 0)
    padding = StepPadding(conditions.parse("fast"), 0, 1, 0)
    parts = (Settings(), model, optimizer, iter([]), averaging, padding)

    def cut(number: int) -> list[int]:
        """The checkpoints that are there afterwards."""
        writer = BackgroundWriter(pytest.fail)
        trainer = Trainer(*parts, checkpoints, writer, Notes(), lambda snapshot: None, torch.device("cpu"))
        averaging.pace.durable_checkpoint = averaging.tally.saved_checkpoint  # what the next round would tell
        averaging.pace.checkpoint = number
        trainer._cut_checkpoint_if_due()
        assert writer.wait_written(10)
        trainer._cut_checkpoint_if_due()
        return checkpoints.numbers()

    yield model, averaging, cut
    averaging.close()


def test_a_checkpoint_with_nan_does_not_count_as_saved_and_keeps_the_older_ones(rank):
    model, averaging, cut = rank
    assert cut(1) == [1]
    assert averaging.tally.saved_checkpoint == 1
    with torch.no_grad():
        model.bias.fill_(torch.nan)
    assert cut(2) == [1, 2]
    assert averaging.tally.saved_checkpoint == 1
    assert cut(3) == [1, 2, 3]
    with torch.no_grad():
        model.bias.fill_(0.5)
    assert cut(4) == [1, 2, 3, 4]
    assert averaging.tally.saved_checkpoint == 4
    assert cut(5) == [4, 5]
