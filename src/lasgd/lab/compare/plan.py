"""Which runs a comparison consists of, in which order, where they lie; and what is stored of that in its folder.

    DIR/compare.json                                       this plan
    DIR/runs/<condition>/<entry>/seed-<s>[-lr-<lr>]/       a run folder each
    DIR/tuning/...                                         the same for runs in virtual time that choose learning rates
    DIR/results.json, report.html, report.md

The order interleaves: seed by seed, condition by condition, entry by entry, and each seed begins with another entry, so
that a machine that drifts drifts for all of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from lasgd.errors import ConfigurationError
from lasgd.lab.compare.entry import Entry, yardstick
from lasgd.training.run_folder import read_json, write_json_atomically
from lasgd.training.settings import Settings

FILE = "compare.json"
TARGET_SHARE = 0.95
"""The default target, as a share of what the reference reaches."""

Tune = Literal["real", "virtual"]
Item = TypeVar("Item")

_MAY_CHANGE = frozenset({"timeout_s", "start_timeout_s"})
"""Settings that decide no figure, so a comparison may go on with others."""


@dataclass(frozen=True)
class Cell:
    """One run of the comparison."""

    entry: Entry
    condition: str
    seed: int
    lr: float | None = None
    """From the grid; None where the settings say it."""
    is_virtual: bool = False
    """In virtual time, to choose a learning rate."""

    @property
    def folder(self) -> Path:
        """Relative to the comparison's."""
        name = f"seed-{self.seed}" + ("" if self.lr is None else f"-lr-{self.lr:.12g}")
        return Path("tuning" if self.is_virtual else "runs") / condition_slug(self.condition) / self.entry.slug / name


@dataclass(frozen=True)
class Plan:
    """A comparison: what all runs share, and what differs."""

    shared: Settings
    entries: tuple[Entry, ...]
    conditions: tuple[str, ...]
    seeds: tuple[int, ...]
    reference: str
    """The label of the entry that ratios are against, and that the default target is taken from."""
    target: float | None = None
    """Top-1 to be reached; None: TARGET_SHARE of the reference's final one, in each condition."""
    lr_grid: tuple[float, ...] = ()
    tune: Tune = "real"
    tuning_seed: int = 0
    command: str = ""
    """As it was typed."""
    earlier: tuple[Mapping[str, Any], ...] = ()
    """What earlier calls asked for in the same folder, beside this one: entries, conditions, seeds."""
    chosen: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Learning rates from the grid, by condition and label."""

    def __post_init__(self) -> None:
        slugs = [entry.slug for entry in self.with_yardstick]
        for entry in self.entries:
            if slugs.count(entry.slug) > 1:
                raise ConfigurationError(f"two entries would share the folder {entry.slug!r}: give them other labels.")

    @property
    def with_yardstick(self) -> tuple[Entry, ...]:
        """The entries, and the yardstick at the end unless it is one of them."""
        if any(entry.is_yardstick for entry in self.entries):
            return self.entries
        return (*self.entries, yardstick())

    def is_tuned(self, entry: Entry) -> bool:
        """The entry's learning rate is chosen from the grid."""
        return bool(self.lr_grid) and entry.may_be_tuned

    def lr_of(self, entry: Entry, condition: str) -> float | None:
        """The chosen learning rate; None before the choice, and for entries that are not tuned."""
        return self.chosen.get(condition, {}).get(entry.label) if self.is_tuned(entry) else None

    def borrowed_lr(self, entry: Entry, condition: str) -> float | None:
        """The learning rate that was chosen elsewhere and is this one too; None where there is none."""
        of_all = [self.chosen.get(condition, {})]
        if entry.is_tuned_once:
            of_all += self.chosen.values()
        for label in (entry.label, entry.tuned_as or entry.label):
            for of_condition in of_all:
                if label in of_condition:
                    return of_condition[label]
        return None

    def is_tried(self, entry: Entry, condition: str) -> bool:
        """The entry tries the grid itself under this condition, if it has not."""
        waits = any(entry.tuned_as == other.label and self.is_tuned(other) for other in self.entries)
        return self.is_tuned(entry) and not waits and self.borrowed_lr(entry, condition) is None

    def tries(self, condition: str) -> Iterator[Cell]:
        """The runs that choose learning rates under one condition; nothing where they are chosen.

        One value after another, each with all entries. Whatever needs no choice runs with the first value.
        """
        seed, real = self.tuning_seed, self.tune == "real"
        for index, lr in enumerate(self.lr_grid):
            for entry in rotated(self.with_yardstick, index):
                if self.is_tried(entry, condition):
                    yield Cell(entry, condition, seed, lr, is_virtual=not real and entry.can_be_simulated)
                elif not self.is_tuned(entry) and index == 0 and seed in self.seeds and real:
                    yield Cell(entry, condition, seed)

    def cells(self, seed: int, condition: str) -> Iterator[Cell]:
        """The runs of one seed under one condition, in order; with lr None where none of the grid could be chosen."""
        for entry in rotated(self.with_yardstick, self.seeds.index(seed)):
            yield Cell(entry, condition, seed, self.lr_of(entry, condition))

    def typed_as(self, command: str) -> Plan:
        """The same, asked for by `command`."""
        return replace(self, command=command)

    def with_choice(self, condition: str, label: str, lr: float) -> Plan:
        """The same with one more learning rate chosen."""
        chosen = {name: dict(of_entry) for name, of_entry in self.chosen.items()}
        chosen.setdefault(condition, {})[label] = lr
        return replace(self, chosen=chosen)


def rotated(items: Sequence[Item], by: int) -> tuple[Item, ...]:
    """The same items, beginning `by` places later."""
    if not items:
        return ()
    return (*items[by % len(items) :], *items[: by % len(items)])


def condition_slug(condition: str) -> str:
    """A condition as a folder name."""
    return re.sub(r"[^\w.=+]+", "-", condition)


# What is stored


def store(plan: Plan, out: Path) -> None:
    """Writes compare.json into the folder. Raises LasgdError."""
    write_json_atomically(
        out / FILE,
        {
            "command": plan.command,
            "shared": plan.shared.model_dump(mode="json"),
            "lr_grid": plan.lr_grid,
            "tune": plan.tune,
            "tuning_seed": plan.tuning_seed,
            "reference": plan.reference,
            "target": plan.target,
            "asked": [*plan.earlier, _asked(plan)],
            "chosen": plan.chosen,
        },
    )


def going_on(plan: Plan, out: Path) -> Plan:
    """`plan`, with what the folder remembers of earlier calls; as it is where the folder is new.

    Raises ConfigurationError where the folder holds a comparison with other shared settings, and says which.
    """
    if not (out / FILE).exists():
        return plan
    stored = read_stored(out)
    differences = list(_differences(stored, plan))
    if differences:
        listed = "\n".join(f"  {line}" for line in differences)
        raise ConfigurationError(
            f"--out: {out} holds a comparison with other settings:\n{listed}\n"
            "Runs with different settings cannot be compared: name another folder, or leave these options as they were."
        )
    asked = stored["asked"]
    own = _asked(plan)
    entries = {entry["label"]: entry for call in asked for entry in call["entries"]}
    for entry in own["entries"]:
        if entries.get(entry["label"], entry) != entry:
            raise ConfigurationError(
                f"--out: in {out} the entry {entry['label']!r} has other settings. Name another folder."
            )
    return replace(
        plan,
        tuning_seed=stored["tuning_seed"],
        earlier=tuple(call for call in asked if call != own),
        chosen=stored["chosen"],
    )


def read_stored(out: Path) -> dict[str, Any]:
    """compare.json. Raises ConfigurationError where it is missing or is something else."""
    stored = read_json(out / FILE)
    needed = {"shared", "lr_grid", "tune", "tuning_seed", "asked", "chosen"}
    if not isinstance(stored, dict) or not needed <= stored.keys():
        raise ConfigurationError(f"{out / FILE} is not the plan of a comparison. Name another folder.")
    return stored


def _asked(plan: Plan) -> dict[str, Any]:
    entries = [{"label": e.label, "algorithm": e.algorithm, "own": dict(e.own)} for e in plan.entries]
    return {"entries": entries, "conditions": list(plan.conditions), "seeds": list(plan.seeds)}


def _differences(stored: Mapping[str, Any], plan: Plan) -> Iterable[str]:
    before, now = stored["shared"], plan.shared.model_dump(mode="json")
    defaults = Settings().model_dump(mode="json")
    for name in now:
        there = before.get(name, defaults.get(name))
        if there != now[name] and name not in _MAY_CHANGE:
            yield f"--{name.replace('_', '-')}: {_said(there)} there, {_said(now[name])} now"
    if list(stored["lr_grid"]) != list(plan.lr_grid):
        yield f"--lr-grid: {_said(stored['lr_grid'])} there, {_said(plan.lr_grid)} now"
    if stored["tune"] != plan.tune and plan.lr_grid:
        yield f"--tune: {stored['tune']} there, {plan.tune} now"


def _said(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ",".join(f"{item:g}" for item in value) or "none"
    return "not given" if value is None else f"{value:,}" if type(value) is int else str(value)
