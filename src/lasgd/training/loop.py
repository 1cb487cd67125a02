"""The training loop of one rank: an ordinary PyTorch loop with `lasgd.attach` around it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lasgd.lab.padding import StepPadding
from lasgd.runtime.averaging import Averaging
from lasgd.training import local_step
from lasgd.training.checkpoint import Checkpoints, copied, is_healthy
from lasgd.training.data import Batch
from lasgd.training.display import Snapshot
from lasgd.training.settings import Settings
from lasgd.training.writer import BackgroundWriter

SHOW_EVERY_S = 0.25
LAST_CHECKPOINT_S = 60.0
"""Seconds that the checkpoint of an interrupted run waits for the disk to take the one before."""
LOSS_SMOOTHING = 0.7


@dataclass
class Notes:
    """What went wrong and was mended. Any thread may add."""

    lines: list[str] = field(default_factory=list)
    """All of it, for the display."""
    troubles: list[str] = field(default_factory=list)
    """What run.json has no field of its own for."""
    skipped_images: dict[str, None] = field(default_factory=dict)
    say: Callable[[str], None] | None = None
    """Where a trouble is told at once; None: whoever shows `lines` does."""

    def add(self, trouble: str) -> None:
        """Something that was left out, such as a checkpoint on a full disk."""
        self.lines.append(trouble)
        self.troubles.append(trouble)
        if self.say is not None:
            self.say(trouble)

    def skipped(self, images: tuple[str, ...]) -> None:
        """Images that could not be read; each is named once."""
        for image in images:
            if image not in self.skipped_images:
                self.skipped_images[image] = None
                self.lines.append(f"skipped image {image}")


class Trainer:
    """One rank's local steps until the agreed end. Used by one thread."""

    def __init__(
        self,
        settings: Settings,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        batches: Iterator[Batch],
        averaging: Averaging,
        padding: StepPadding,
        checkpoints: Checkpoints,
        writer: BackgroundWriter,
        notes: Notes,
        show: Callable[[Snapshot], None],
        device: torch.device,
        earlier_wall_s: float = 0.0,
        position: int = 0,
    ):
        self.position = position
        """Samples that this rank has drawn since the start of the run."""
        self._settings, self._model, self._optimizer, self._batches = settings, model, optimizer, batches
        self._averaging, self._padding, self._notes, self._show = averaging, padding, notes, show
        self._checkpoints, self._writer, self._device = checkpoints, writer, device
        self._earlier_wall_s = earlier_wall_s
        self._cut = averaging.checkpoint_due
        self._saved = averaging.tally.saved_checkpoint
        self._reported_sicknesses = 0
        self._fetched: Batch | None = None
        self._loss: float | None = None
        self._shown_s = 0.0
        self._samples_before = averaging.pace.samples
        averaging.on_bucket(self._wait_bucket)

    def run(self) -> None:
        """Trains until `averaging.finished`, cutting checkpoints where they are due; inside `with averaging`."""
        while not self._averaging.finished:
            batch, self._fetched = self._fetched or next(self._batches), None
            loss = self._local_step(batch)
            self._cut_checkpoint_if_due()
            self._show_now_and_then(loss)
        self._cut_checkpoint_if_due(patience_s=LAST_CHECKPOINT_S)

    def fetch(self) -> None:
        """Fetches the first batch before the clock starts."""
        self._fetched = next(self._batches)

    def _local_step(self, batch: Batch) -> Tensor:
        self._notes.skipped(batch.skipped)
        images = batch.images.to(self._device, non_blocking=True)
        labels = batch.labels.to(self._device, non_blocking=True)
        self._padding.begin()
        loss = local_step.gradient(self._averaging.model, images, labels)
        self._wait_device()
        self._padding.wait_rest()
        self.position = batch.position + len(batch.labels)
        local_step.update(self._optimizer, self._settings, self._averaging.progress)
        return loss

    def _wait_bucket(self) -> None:
        self._wait_device()
        self._padding.wait_moment()

    def _wait_device(self) -> None:
        if self._device.type == "cuda" and not self._padding.is_idle:
            torch.cuda.current_stream(self._device).synchronize()  # a padded step is timed on the host

    def _cut_checkpoint_if_due(self, patience_s: float = 0.0) -> None:
        number = self._averaging.checkpoint_due
        self._averaging.tally.saved_checkpoint = self._saved
        if number == self._cut:
            return
        self._cut = number
        state = {
            "world_size": self._averaging.world_size,
            "settings": self._settings.model_dump(mode="json"),
            "position": self.position,
            "wall_s": self._wall_s(),
            "model": copied(self._model.state_dict()),
            "optimizer": copied(self._optimizer.state_dict()),
            "averaging": self._averaging.state_dict(),
            "torch_rng": torch.get_rng_state(),
        }
        durable = self._averaging.pace.durable_checkpoint
        if not self._writer.wait_submit(lambda: self._write(number, state, durable), patience_s):
            self._notes.add(f"checkpoint {number} left out: the disk is still busy with the one before")

    def _write(self, number: int, state: dict[str, Any], durable: int) -> None:
        self._checkpoints.write(number, state)
        if is_healthy(state):  # else the older ones, of which one may be, must stay
            self._saved = number
        self._checkpoints.remove_before(durable)

    def _wall_s(self) -> float:
        return self._earlier_wall_s + time.monotonic() - (self._averaging.first_step_s or time.monotonic())

    def _show_now_and_then(self, loss: Tensor) -> None:
        now_s = time.monotonic()
        if now_s - self._shown_s < SHOW_EVERY_S:
            return
        self._shown_s = now_s
        latest = loss.item()
        self._loss = latest if self._loss is None else LOSS_SMOOTHING * self._loss + (1 - LOSS_SMOOTHING) * latest
        self.show()

    def show(self) -> None:
        """Hands over where the run stands now; after the agreed end, where it stood then."""
        now_s = self._averaging.end_agreed_s or time.monotonic()
        pace, tally = self._averaging.pace, self._averaging.tally
        for sickness in pace.sicknesses[self._reported_sicknesses :]:
            self._reported_sicknesses += 1
            self._notes.lines.append(
                f"rank {sickness.rank} {sickness.found.said} at round {sickness.round}: takes the mean"
            )
        wall_s = now_s - (self._averaging.first_step_s or now_s)
        rate = (pace.samples - self._samples_before) / wall_s if wall_s and pace.samples else None
        self._show(
            Snapshot(
                samples=pace.samples,
                budget=pace.expected_samples,
                samples_per_s=rate,
                loss=self._loss,
                rounds=pace.round,
                staleness_steps=tally.staleness.mean_steps if tally.staleness.merges else None,
                waited_s=tally.waited_s,
                wall_s=wall_s,
                left_s=max(0, pace.expected_samples - pace.samples) / rate if rate else None,
                world_size=self._averaging.world_size,
                fragments=len(self._averaging.replica.fragments),
                notes=tuple(self._notes.lines),
            )
        )
