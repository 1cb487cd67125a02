"""What is compared: an entry is an algorithm with settings of its own, and a command that runs it.

The command is the seam for other runners. It is given the settings of one run, condition, seed and learning rate
included, and the run folder to be; it returns what to start. Whatever that starts has to leave `run.json` (a
`RunRecord`: status, wall_s, final, ranks) and `metrics.jsonl` in the folder, and `timeline.json.gz` if it likes:

    Entry("torch DDP", "torch_ddp", command=lambda settings, folder: [
        sys.executable, "peers/ddp.py", *options(settings), "--out", str(folder)])
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lasgd.training.settings import Settings

YARDSTICK = "independent"
"""The algorithm that never communicates: what others keep of its local steps per second is their retention."""

Command = Callable[[Settings, Path], Sequence[str]]
"""From the settings of one run and its folder to the command line of the process that runs it."""


def options(settings: Settings) -> list[str]:
    """The settings that were given, as options of `lasgd train`."""
    words: list[str] = []
    for name in type(settings).model_fields:
        value = getattr(settings, name)
        if name not in settings.model_fields_set or value is None:
            continue
        option = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            words.append(option if value else f"{option}=false")
        else:
            words += [option, str(value)]
    return words


def train(settings: Settings, folder: Path) -> list[str]:
    """The command of every algorithm of lasgd's own."""
    return [sys.executable, "-m", "lasgd", "train", *options(settings), "--out", str(folder)]


def simulate(settings: Settings, folder: Path) -> list[str]:
    """The same run in virtual time; a step takes what the condition says, else what it takes here."""
    from lasgd.lab.conditions import parse

    measured = [] if parse(settings.condition).step_s is not None else ["--compute", "measured"]
    return [sys.executable, "-m", "lasgd", "simulate", *options(settings), *measured, "--out", str(folder)]


@dataclass(frozen=True)
class Entry:
    """One line of the comparison."""

    label: str
    """What it is called in results and report; no two entries share one."""
    algorithm: str
    own: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Settings, by field name, in which it differs from the others."""
    command: Command = field(default=train, compare=False, repr=False)
    can_be_simulated: bool = True
    """`lasgd simulate` knows the algorithm, so its learning rate may be tuned in virtual time."""
    is_tuned_once: bool = False
    """One condition's learning rate is chosen for all, as where the condition does not decide what it learns."""
    tuned_as: str | None = None
    """The label of an entry with the same local steps, whose learning rate it takes where that is in the comparison."""

    @property
    def slug(self) -> str:
        """The label as a folder name."""
        return re.sub(r"[^\w.=+]+", "-", self.label).strip("-")

    @property
    def is_yardstick(self) -> bool:
        """It communicates nothing, so it is what retention is measured against."""
        return self.algorithm == YARDSTICK and self.own.keys() <= {"evaluations"}

    @property
    def may_be_tuned(self) -> bool:
        """It takes a learning rate from the grid."""
        return "lr" not in self.own and self.algorithm != YARDSTICK

    def settings(self, shared: Settings, condition: str, seed: int, lr: float | None = None) -> Settings:
        """Those of one run: what all share, what is the entry's own, and `lr` from the grid if there is one.

        Raises pydantic's ValidationError where they do not go together.
        """
        values = shared.model_dump(exclude_unset=True) | dict(self.own)
        values |= {"algorithm": self.algorithm, "condition": condition, "seed": seed}
        return Settings.model_validate(values if lr is None else values | {"lr": lr})


def yardstick() -> Entry:
    """What retention is measured against, where it is not among the entries: only its pace is asked for."""
    return Entry(YARDSTICK, YARDSTICK, {"evaluations": 0})
