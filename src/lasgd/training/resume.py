"""Going on from the newest checkpoint that every rank can use."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lasgd.errors import ConfigurationError
from lasgd.group.base import Group
from lasgd.runtime.averaging import Averaging
from lasgd.training.checkpoint import Checkpoints, check_same_run, common_cuts, is_healthy
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
    skipped: tuple[str, ...] = ()
    """Newer checkpoints that could not be used, each with the reason."""


@dataclass(frozen=True)
class Cut:
    """A checkpoint that all ranks have agreed to go on from."""

    number: int
    state: dict[str, Any]
    """This rank's part."""
    agreed: dict[str, Any]
    """What in it must be the same on all ranks."""
    skipped: tuple[str, ...]


def wait_resumed(
    folder: Path,
    out: Path,
    settings: Settings,
    averaging: Averaging,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
) -> Progress:
    """Gives model, optimizer, averaging and torch's generator the state of the run in `folder`; on all ranks.

    Each rank goes on from its own part. If the run goes on in the same folder, `out`, parts of newer cuts, which some
    rank lacks, cannot read or was sick in, are removed. Raises ConfigurationError where no cut is complete and usable,
    or the run was another one.
    """
    stored, group = Checkpoints(folder, averaging.rank), averaging.group
    texts = group.wait_exchange("checkpoints", json.dumps(stored.numbers()).encode(), settings.start_timeout_s)
    numbers = common_cuts([json.loads(text) for text in texts], stored.folder)
    cut = wait_usable_cut(stored, numbers, group, settings.start_timeout_s)
    check_same_run(cut.state, settings.model_dump(mode="json"), averaging.world_size, stored.folder)
    model.load_state_dict(cut.state["model"])
    optimizer.load_state_dict(cut.state["optimizer"])
    averaging.load_state_dict(cut.state["averaging"] | cut.agreed)
    torch.set_rng_state(cut.state["torch_rng"])
    if out.samefile(folder):
        stored.remove_after(cut.number)
        stored.remove_unfinished()
    return Progress(cut.state["position"], cut.state["wall_s"], averaging.pace.samples, cut.skipped)


def wait_usable_cut(stored: Checkpoints, numbers: Sequence[int], group: Group, timeout_s: float) -> Cut:
    """The first of the cuts `numbers` that every rank can read and in which all were healthy; on all ranks alike.

    Where all were healthy in none, the first that all can read and in which one was: the others take its mean. The
    ranks look at one cut after the other together, so that they go on from the same one. Raises ConfigurationError, the
    same on all ranks, where there is none.
    """
    skipped: list[str] = []
    second_best: Cut | None = None
    for number in numbers:
        state, word = _own_part(stored, number)
        texts = group.wait_exchange(f"checkpoint/{number}", json.dumps(word).encode(), timeout_s)
        words = [json.loads(text) for text in texts]
        troubles = "; ".join(word["trouble"] for word in words if word["trouble"])
        if not troubles:
            return Cut(number, state, _agreed(number, words), tuple(skipped))
        if second_best is None and all(map(_is_readable, words)) and not all(word["trouble"] for word in words):
            note = f"checkpoint {number} was the best to go on from, although {troubles}"
            second_best = Cut(number, state, _agreed(number, words), (*skipped, note))
        skipped.append(f"checkpoint {number} was skipped: {troubles}")
    if second_best is not None:
        return second_best
    raise ConfigurationError(
        f"no checkpoint in {stored.folder} can be used by every rank: {'. '.join(skipped)}. Start a new run"
    )


def _own_part(stored: Checkpoints, number: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """This rank's part of a cut, and what the other ranks must know of it."""
    try:
        state = stored.read(number)
    except ConfigurationError as error:
        return {}, {"trouble": str(error)}
    averaging = state["averaging"]
    word = {key: averaging[key] for key in ("samples", "round", "evaluation", "elapsed_s")}
    found = "sat out" if averaging.get("is_sitting_out") else "held NaN or Inf"
    return state, word | {"trouble": "" if is_healthy(state) else f"rank {stored.rank} {found}"}


def _is_readable(word: dict[str, Any]) -> bool:
    return "samples" in word


def _agreed(number: int, words: list[dict[str, Any]]) -> dict[str, Any]:
    """What the ranks agree on: a slow rank took its part of the cut some rounds later than the others."""
    return {
        "agreed_samples": sum(word["samples"] for word in words),
        "round": max(word["round"] for word in words),
        "elapsed_s": max(word["elapsed_s"] for word in words),
        "checkpoint": number,
        "evaluation": max(word["evaluation"] for word in words),
    }
