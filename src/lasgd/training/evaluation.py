"""Evaluation of averaged models on the validation images, after the run: off the clock and off everybody's time.

During the run, means are only saved (`SavedMeans`); rank 0 evaluates them when all ranks are done.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
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


@torch.no_grad()
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
    was_training = model.training
    model.eval()
    seen, first, five, loss = 0, 0, 0, 0.0
    try:
        with validation_batches(data, BATCH, workers) as batches:
            for images, labels in batches:
                images, labels = images.to(device), labels.to(device)
                logits = model(images).float()
                best = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
                seen += len(labels)
                first += int(best[:, 0].sum())
                five += int(best.sum())
                loss += float(functional.cross_entropy(logits, labels, reduction="sum"))
                if asked_to_stop():
                    return None, batches.skipped
            skipped = batches.skipped
    finally:
        model.train(was_training)
    share = 1.0 / seen if seen else math.nan
    return Final(top1=first * share, top5=five * share, loss=loss * share), skipped
