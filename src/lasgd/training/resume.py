"""Going on from the newest checkpoint of which every rank has its part."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lasgd.runtime.averaging import Averaging
from lasgd.training.checkpoint import Checkpoints, check_same_run, newest_common
from lasgd.training.settings import Settings


@dataclass(frozen=True)
class Progress:
    """How far this rank's run has come before this process took it up."""

    position: int = 0
    """Samples that this rank has drawn."""
    wall_s: float = 0.0
    """Of the run so far."""
    samples: int | None = None
    """Of all ranks; None: a new run."""


def wait_resumed(
    folder: Path,
    out: Path,
    settings: Settings,
    averaging: Averaging,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
) -> Progress:
    """Gives model, optimizer, averaging and torch's generator the state of the run in `folder`; on all ranks.

    Each rank goes on from its own part. If the run goes on in the same folder, `out`, parts of newer cuts, which other
    ranks lack, are removed. Raises ConfigurationError where no cut is complete, or the run was another one.
    """
    stored, group = Checkpoints(folder, averaging.rank), averaging.group
    texts = group.wait_exchange("checkpoints", json.dumps(stored.numbers()).encode(), settings.start_timeout_s)
    number = newest_common([json.loads(text) for text in texts], stored.folder)
    state = stored.read(number)
    check_same_run(state, settings.model_dump(mode="json"), averaging.world_size, stored.folder)
    texts = group.wait_exchange("progress", json.dumps(_progress(state)).encode(), settings.start_timeout_s)
    agreed = _agreed([json.loads(text) for text in texts])
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    averaging.load_state_dict(state["averaging"] | agreed)
    torch.set_rng_state(state["torch_rng"])
    if out.samefile(folder):
        stored.remove_after(number)
        stored.remove_unfinished()
    return Progress(state["position"], state["wall_s"], averaging.pace.samples)


def _progress(state: dict[str, Any]) -> dict[str, Any]:
    averaging = state["averaging"]
    return {key: averaging[key] for key in ("samples", "round", "evaluation")}


def _agreed(progress: list[dict[str, Any]]) -> dict[str, Any]:
    """What the ranks agree on: a slow rank took its part of the cut some rounds later than the others."""
    return {
        "agreed_samples": sum(rank["samples"] for rank in progress),
        "round": max(rank["round"] for rank in progress),
        "evaluation": max(rank["evaluation"] for rank in progress),
    }
