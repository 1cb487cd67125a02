"""One local step of the recipe: the same arithmetic in a rank's own loop and in virtual time."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from lasgd.training import schedule
from lasgd.training.settings import Settings


def gradient(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Forward and backward, adding to the parameters' gradients; the mean cross-entropy, detached."""
    loss = functional.cross_entropy(model(images), labels)
    loss.backward()
    return loss.detach()


def update(optimizer: torch.optim.Optimizer, settings: Settings, progress: float) -> None:
    """The optimizer's step at the learning rate of `progress` (0 to 1, of all ranks); clears the gradients."""
    lr = settings.lr * schedule.factor(progress, settings.warmup)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()
