"""Every rank's own replica at each evaluation, a file each, until rank 0 has compared them after the run.

replicas/<evaluation>/rank-<rank>.safetensors

From them comes the mean where no round brings one (gossip, servers), and how far apart the replicas were: the consensus
distance, the root of the mean over the ranks of |x_i - mean|^2. Ranks on several hosts need a run folder that all of
them share; without it there are no such figures.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
from torch import Tensor

from lasgd.training.run_folder import replacing
from lasgd.virtual.spread import consensus_distance, mean_replica


@dataclass(frozen=True)
class Compared:
    """The replicas of all ranks at one evaluation."""

    evaluation: int
    samples: int  # of all ranks, as rank 0 knew them
    wall_s: float  # on rank 0
    mean: Tensor  # (D,)
    consensus: float


class SavedReplicas:
    """The files of one run folder."""

    def __init__(self, out: Path):
        self.folder = out / "replicas"

    def save(self, rank: int, evaluation: int, vector: Tensor, samples: int, wall_s: float) -> None:
        """Writes one rank's replica, (D,). Raises LasgdError."""
        folder = self.folder / str(evaluation)
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / f"rank-{rank}.safetensors") as temporary:
            metadata = {"samples": str(samples), "wall_s": repr(wall_s)}
            temporary.write_bytes(safetensors.torch.save({"replica": vector}, metadata=metadata))

    def compared(self, world_size: int) -> Iterator[Compared]:
        """In the order of evaluations, those of which every rank's replica is here."""
        for folder in sorted(self.folder.glob("[0-9]*"), key=lambda found: int(found.name)):
            paths = [folder / f"rank-{rank}.safetensors" for rank in range(world_size)]
            if not all(path.exists() for path in paths):
                continue
            replicas = [safetensors.torch.load_file(path)["replica"] for path in paths]
            with safetensors.safe_open(paths[0], framework="pt") as file:
                metadata = file.metadata()
            mean, consensus = compare(replicas)
            yield Compared(int(folder.name), int(metadata["samples"]), float(metadata["wall_s"]), mean, consensus)

    def remove(self, above_evaluation: int = 0) -> None:
        """Removes what was saved after evaluation `above_evaluation`, and the folder if it is empty then."""
        for folder in self.folder.glob("[0-9]*"):
            if int(folder.name) > above_evaluation:
                shutil.rmtree(folder, ignore_errors=True)
        if self.folder.is_dir() and not any(self.folder.iterdir()):
            self.folder.rmdir()


@dataclass(frozen=True)
class _Stored:
    """A replica of which there are only the values."""

    values: Tensor

    def parameters(self) -> Tensor:
        return self.values


def compare(replicas: list[Tensor]) -> tuple[Tensor, float]:
    """The mean of equally long vectors, and their consensus distance; of those that are finite."""
    stored = [_Stored(values) for values in replicas]
    return mean_replica(stored), consensus_distance(stored)
