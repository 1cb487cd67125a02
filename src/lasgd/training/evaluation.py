"""Evaluation of averaged models on the validation images, after the run: off the clock and off everybody's time.

During the run, means are only saved (`SavedMeans`); rank 0 evaluates them when all ranks are done.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional

from lasgd.training.data import ImageData, validation_batches
from lasgd.training.run_folder import Final, replacing

BATCH = 250


@dataclass(frozen=True)
class SavedMean:
    """One mean of the replicas, and when it was taken."""

    samples: int
    wall_s: float
    virtual_s: float | None  # in a simulated run
    vector: Tensor  # (D,)
    consensus: float | None = None  # how far the replicas were apart then: sqrt(mean_i |x_i - mean|^2)


class SavedMeans:
    """Means of the replicas, a file each, until they are evaluated: means/<samples>.safetensors."""

    def __init__(self, out: Path):
        self.folder = out / "means"

    def save(
        self,
        vector: Tensor,
        samples: int,
        wall_s: float,
        virtual_s: float | None = None,
        consensus: float | None = None,
    ) -> None:
        """Writes one mean, (D,). Raises LasgdError, naming the file."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with replacing(self.folder / f"{samples:012d}.safetensors") as temporary:
            metadata = {"samples": str(samples), "wall_s": repr(wall_s)}
            if virtual_s is not None:
                metadata["virtual_s"] = repr(float(virtual_s))
            if consensus is not None:
                metadata["consensus"] = repr(float(consensus))
            temporary.write_bytes(safetensors.torch.save({"mean": vector}, metadata=metadata))

    def __len__(self) -> int:
        """How many means are saved."""
        return len(list(self.folder.glob("*.safetensors")))

    def __iter__(self) -> Iterator[SavedMean]:
        """In the order of samples."""
        for path in sorted(self.folder.glob("*.safetensors")):
            with safetensors.safe_open(path, framework="pt") as file:
                metadata = file.metadata()
                yield SavedMean(
                    int(metadata["samples"]),
                    float(metadata["wall_s"]),
                    _number(metadata.get("virtual_s")),
                    file.get_tensor("mean"),
                    _number(metadata.get("consensus")),
                )

    def note_consensus(self, at_samples: Mapping[int, float]) -> None:
        """Adds to the means saved at so many samples how far the replicas were apart then. Raises LasgdError."""
        for mean in self:
            if mean.samples in at_samples:
                self.save(mean.vector, mean.samples, mean.wall_s, mean.virtual_s, at_samples[mean.samples])

    def remove(self, above_samples: int = -1) -> None:
        """Removes the means taken after `above_samples`, and the folder if it is empty then."""
        if not self.folder.is_dir():
            return
        for path in self.folder.glob("*.safetensors"):
            if int(path.stem) > above_samples:
                path.unlink()
        if not any(self.folder.iterdir()):
            self.folder.rmdir()


def _number(text: str | None) -> float | None:
    return None if text is None else float(text)


def evaluate(
    model: nn.Module,
    data: ImageData,
    device: torch.device,
    workers: int,
    asked_to_stop: Callable[[], bool] = lambda: False,
) -> tuple[Final | None, tuple[str, ...]]:
    """Top-1, top-5 and mean cross-entropy over the validation images; and the images that could not be read.

    None instead of figures where `asked_to_stop` became true on the way. Leaves the model in the mode it had.
    """
    found, skipped = evaluate_together([model], data, device, workers, asked_to_stop)
    return (found[0] if found else None), skipped


@torch.no_grad()
def evaluate_together(
    models: Sequence[nn.Module],
    data: ImageData,
    device: torch.device,
    workers: int,
    asked_to_stop: Callable[[], bool] = lambda: False,
) -> tuple[list[Final], tuple[str, ...]]:
    """The same for several models, for which each image is read once; no figures where `asked_to_stop` became true."""
    modes = [model.training for model in models]
    tallies = [_Tally() for _ in models]
    try:
        for model in models:
            model.eval()
        with validation_batches(data, BATCH, workers) as batches:
            for images, labels in batches:
                images, labels = images.to(device), labels.to(device)
                for model, tally in zip(models, tallies, strict=True):
                    tally.count(model(images).float(), labels)
                    if asked_to_stop():
                        return [], batches.skipped
            skipped = batches.skipped
    finally:
        for model, mode in zip(models, modes, strict=True):
            model.train(mode)
    return [tally.final() for tally in tallies], skipped


@dataclass
class _Tally:
    """What one model has got right so far."""

    seen: int = 0
    first: int = 0
    five: int = 0
    loss: float = 0.0

    def count(self, logits: Tensor, labels: Tensor) -> None:
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
        self.seen += len(labels)
        self.first += int(best[:, 0].sum())
        self.five += int(best.sum())
        self.loss += float(functional.cross_entropy(logits, labels, reduction="sum"))

    def final(self) -> Final:
        share = 1.0 / self.seen if self.seen else math.nan
        return Final(top1=self.first * share, top5=self.five * share, loss=self.loss * share)
