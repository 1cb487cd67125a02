"""From the settings of a run to one rank's device, model, optimizer, budget and averaging."""

from __future__ import annotations

import math
import os

import torch
from torch import nn

from lasgd.algorithms import registry
from lasgd.errors import ConfigurationError
from lasgd.group import c10d
from lasgd.group.base import Group
from lasgd.group.padded import PaddedGroup
from lasgd.lab.conditions import Condition
from lasgd.layout import Layout
from lasgd.runtime.attach import attach
from lasgd.runtime.averaging import Averaging
from lasgd.training.data import ImageData
from lasgd.training.models import build_model, check_model, check_single_images
from lasgd.training.run_folder import LinkEmulation
from lasgd.training.settings import OWN_TO_A_RANK, Settings

DIGITS_EPOCHS = 60.0
EPOCHS = 10.0


def pick_device(name: str) -> torch.device:
    """`auto`: this local rank's GPU where there is one, else the CPU. Raises ConfigurationError."""
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigurationError(f"--device {name}: PyTorch finds no usable GPU here. Use --device cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def make_model(settings: Settings, data: ImageData) -> nn.Module:
    """The model that the settings name, checked with blank images. Raises ConfigurationError."""
    torch.manual_seed(settings.seed)
    model = build_model(settings.model, num_classes=len(data.classes), channels=data.channels, norm=settings.norm)
    check_model(model, channels=data.channels, image_size=data.image_size, num_classes=len(data.classes))
    if settings.batch_size == 1:
        check_single_images(model, channels=data.channels, image_size=data.image_size)
    return model


def make_optimizer(settings: Settings, model: nn.Module) -> torch.optim.Optimizer:
    """SGD with momentum and weight decay; the loop sets the learning rate before each step.

    Fused: the same bits on a CPU, in much less time.
    """
    return torch.optim.SGD(
        model.parameters(),
        lr=settings.lr,
        momentum=settings.optimizer_momentum,
        weight_decay=settings.weight_decay,
        fused=True,
    )


def seed_of_rank(settings: Settings, rank: int) -> int:
    """Of torch's generator when a rank begins: dropout and the like differ between ranks."""
    return settings.seed * 1_000_003 + rank


def budget(settings: Settings, data: ImageData, world_size: int) -> int | None:
    """Samples of all ranks together: --samples, or --epochs times the training images; None for --seconds.

    Raises ConfigurationError where that is less than one batch on every rank.
    """
    if settings.seconds is not None:
        return None
    if settings.samples is not None:
        settings.check_budget(settings.samples, f"--samples: {settings.samples:,}", world_size)
        return settings.samples
    epochs = settings.epochs or (DIGITS_EPOCHS if data.name == "digits" else EPOCHS)
    samples = math.ceil(epochs * len(data.train))
    settings.check_budget(samples, f"--epochs: {epochs:g} times {len(data.train):,} images", world_size)
    return samples


def wait_attached(
    settings: Settings,
    condition: Condition,
    link_emulation: LinkEmulation,
    samples: int | None,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
) -> Averaging:
    """Finds the other ranks, on links as slow as the condition says, and attaches the model.

    Raises ConfigurationError, and PeerError where ranks are missing or disagree; within start_timeout_s.
    """
    group: Group = c10d.connect(settings.start_timeout_s)
    in_user_space = link_emulation == "user space"
    if condition.round_s is not None or in_user_space:
        group = PaddedGroup(
            group,
            vector_bytes=_vector_bytes(model),
            round_s=condition.round_s,
            bandwidth_bytes_per_s=condition.bandwidth_bytes_per_s if in_user_space else None,
            latency_s=condition.latency_s if in_user_space else 0.0,
        )
    return attach(
        model,
        optimizer,
        samples=samples,
        seconds=settings.seconds,
        batch_size=settings.batch_size,
        algorithm=settings.algorithm,
        algorithm_settings=settings.algorithm_settings(),
        merge=settings.merge,
        wire=settings.wire,
        fragments=settings.fragments,
        steps_per_round=settings.steps_per_round,
        evaluations=settings.evaluations,
        checkpoints=settings.checkpoints,
        timeout_s=settings.timeout_s,
        start_timeout_s=settings.start_timeout_s,
        must_match={k: v for k, v in settings.model_dump(mode="json").items() if k not in OWN_TO_A_RANK},
        ddp=registry.find(settings.algorithm).averages_gradients,
        group=group,
    )


def _vector_bytes(model: nn.Module) -> int:
    layout = Layout(model)
    return layout.size * torch.finfo(layout.dtype).bits // 8
