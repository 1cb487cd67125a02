"""The settings of a training run: one frozen object for command line, config file, ranks and run folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from lasgd.errors import ConfigurationError
from lasgd.momentum import LEAST_FRAGMENTS, shared_out

Positive = Annotated[float, Field(gt=0)]
Timeout = Annotated[float, Field(ge=0.001, le=30 * 86400)]
"""Seconds. Less than a millisecond is over before anybody can answer; the upper bound fits the system's clocks."""

BUILT_IN_MODELS = ("cnn4", "resnet20", "resnet56")
"""What `--model` takes beside import paths; models.py makes them. Here, so that their names cost no import of torch."""


class Settings(BaseModel):
    """Everything that decides a run. Paths are kept as given; `--out` and `--config` belong to the command."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    data: str = "digits"
    """`digits` (bundled), a folder with train/<class>/* and val/<class>/*, or a .tar, .tar.gz, .tar.xz of one."""
    image_size: Annotated[int, Field(ge=4)] | None = None
    """Pixels a side; default: the images' own size where all of them share one up to 96, else 224."""
    workers: Annotated[int, Field(ge=0)] = 1
    """Worker processes per rank that decode and augment images."""

    model: str = "resnet20"
    """`resnet20`, `resnet56`, `cnn4`, or an import path `package.module:callable`, called with num_classes=."""
    norm: Literal["group", "batch"] = "group"
    """Normalisation of the built-in models."""

    algorithm: str = "lasgd"
    """How the ranks come to agree: docs/algorithms.md. `independent` never communicates."""
    merge: str = "full"
    """Merge rule: how much of a correction the replica shows at the step boundary."""
    wire: Literal["fp32", "bf16", "int8"] = "fp32"
    """How the averages of lasgd travel; what a coarse format rounds off is in the next contribution."""
    fragments: Literal["auto"] | Annotated[int, Field(ge=1, le=1000)] = "auto"
    """Parts of the vector, one averaged a round; auto: as the delay asks, 4 (1 without momentum of the mean) to 20."""
    steps_per_round: Annotated[float, Field(gt=0, le=1e6)] = 1.0
    """A round at most every so many local steps of the median rank, one every 30 s in any case; the H of others."""
    outer_lr: Positive | None = None
    """Of diloco's outer step; default 0.7."""
    outer_momentum: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Of diloco's outer step, default 0.9; of lasgd's mean, default its share of --momentum, none below 4 fragments."""
    pull: Annotated[float, Field(gt=0, le=1)] | None = None
    """Towards the anchor of overlap_local_sgd, default 0.6; towards easgd's centre, default 0.9 / ranks."""
    anchor_momentum: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Of overlap_local_sgd's anchor; default 0.7."""
    synchronous_share: Annotated[float, Field(ge=0, le=1)] | None = None
    """Of the budget, before post_local_sgd goes over to local SGD; default 0.5."""
    staleness_aware: bool | None = None
    """Whether parameter_server divides an update by its staleness; default no."""
    topology: Literal["ring", "complete", "exponential"] | None = None
    """Who writes to whom in d_psgd (default ring), ad_psgd (complete), sgp and osgp (exponential)."""
    ranks: Annotated[int, Field(ge=1, le=1024)] | None = None
    """Local ranks to start; under torchrun the environment decides."""

    samples: Annotated[int, Field(ge=1)] | None = None
    """Budget: samples of all ranks together."""
    epochs: Positive | None = None
    """Budget in passes over the training data, instead of samples; default 60 for digits, 10 otherwise."""
    seconds: Positive | None = None
    """Budget in seconds from the first local step, instead of samples."""
    batch_size: Annotated[int, Field(ge=1)] = 32
    """Samples of one local step of one rank."""

    lr: Positive = 0.1
    """Peak learning rate, reached after the warm-up; a cosine of global progress takes it to zero."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Of SGD, each rank's own; lasgd shares 0.9 out as 0.5 for the ranks and 0.8 for their mean (--outer-momentum)."""
    weight_decay: Annotated[float, Field(ge=0)] = 5e-4
    """Of SGD, on all parameters."""
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Share of the budget over which the learning rate rises linearly."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Decides initial values, the order of samples on each rank, augmentation and stalls."""

    condition: str = "fast"
    """`fast`, or joined with `+`: link=20mbit, step=100ms, straggler=last:4x, stall=1s@1%, round=1s."""

    evaluations: Annotated[int, Field(ge=0, le=10_000)] = 10
    """Means saved during the run, at equal distances in samples, and evaluated after it."""
    checkpoints: Annotated[int, Field(ge=0, le=10_000)] = 10
    """Checkpoints cut during the run, at equal distances in samples; Ctrl-C cuts one more."""

    device: str = "auto"
    """`auto`, `cpu` or `cuda` (one GPU per local rank)."""
    timeout_s: Timeout = 60.0
    """Seconds without a finished round after which the silent ranks are reported."""
    start_timeout_s: Timeout = 120.0
    """Seconds to wait for all ranks to start."""

    def algorithm_settings(self) -> dict[str, Any]:
        """What is given of the settings that are an algorithm's own, by name, and the mean's share of the momentum."""
        given = {name: value for name in OWN_TO_AN_ALGORITHM if (value := getattr(self, name)) is not None}
        if self._shares_momentum:
            given["outer_momentum"] = shared_out(self.momentum)[1]
        return given

    @property
    def optimizer_momentum(self) -> float:
        """Of each rank's SGD."""
        return shared_out(self.momentum)[0] if self._shares_momentum else self.momentum

    @property
    def _shares_momentum(self) -> bool:
        is_cut = self.fragments == "auto" or self.fragments >= LEAST_FRAGMENTS
        return self.algorithm == "lasgd" and self.outer_momentum is None and is_cut and self.ranks != 1

    def check_budget(self, samples: int, what: str, world_size: int) -> None:
        """Raises ConfigurationError, beginning with `what`, where `samples` is less than one batch on every rank."""
        needed = world_size * self.batch_size
        if samples < needed:
            ranks = "rank" if world_size == 1 else "ranks"
            raise ConfigurationError(
                f"{what} is less than one batch on every rank: {world_size} {ranks} times a batch of "
                f"{self.batch_size} need at least {needed:,}."
            )

    @model_validator(mode="after")
    def _one_budget(self) -> Settings:
        if sum(budget is not None for budget in (self.samples, self.epochs, self.seconds)) > 1:
            raise ValueError("give one of --samples, --epochs and --seconds")
        return self

    @field_validator("data")
    @classmethod
    def _expand_home(cls, data: str) -> str:
        return os.path.expanduser(data)


class SimulationSettings(Settings):
    """What decides a run in virtual time: a training run's settings, and the cluster that there is none of."""

    ranks: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    """Ranks of the virtual cluster."""
    network: str | None = None
    """`fast`, `20mbit`, `100mbit,latency=20ms`, `nodes=8x4,inside=10gbit,between=1gbit`; else what --condition says."""
    compute: str | None = None
    """A step: `100ms`, `lognormal=100ms,sigma=0.2`, `trace=FILE`, `measured`; else what --condition says, or 100ms."""
    all_reduce: Literal["ring", "halving_doubling", "tree", "hierarchical"] = "ring"
    """How an all-reduce goes through the network; `hierarchical` needs a network with nodes."""
    no_gradients: bool = False
    """Computes nothing, and says only how fast and how stale; for up to 10,000 ranks and more."""
    model_bytes: str | None = None
    """With --no-gradients: what is averaged, such as 102MB, in place of --data and --model."""


OWN_TO_AN_ALGORITHM = (
    "outer_lr",
    "outer_momentum",
    "pull",
    "anchor_momentum",
    "synchronous_share",
    "staleness_aware",
    "topology",
)
"""Settings that only some algorithms have; None stands for the algorithm's default."""

OWN_TO_A_RANK = frozenset({"ranks", "workers", "timeout_s", "start_timeout_s", "device"})
"""Settings in which ranks (and a resumed run) may differ."""


def default_out(settings: Settings, stamp: str) -> Path:
    """The run folder where none is given: runs/<data>-<model>-<algorithm>-<stamp>, `-virtual` before the stamp of a
    simulation, without data and model where it has none."""
    data = Path(settings.data).name.split(".")[0]
    what = f"{data}-{settings.model.split(':')[-1]}-{settings.algorithm}"
    if isinstance(settings, SimulationSettings):
        what = f"{settings.algorithm}-virtual" if settings.model_bytes is not None else f"{what}-virtual"
    return Path("runs") / f"{what}-{stamp}"
