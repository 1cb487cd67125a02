"""What a report is made of: the results of one or more comparisons, and what their run folders hold beyond them."""

from __future__ import annotations

import contextlib
import gzip
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from lasgd.errors import ConfigurationError
from lasgd.lab.compare.figures import crossing, read_folder
from lasgd.lab.compare.results import FILE
from lasgd.training.run_folder import read_json


@dataclass(frozen=True)
class Run:
    """One run: its figures from results.json, and its folder."""

    figures: Mapping[str, Any]
    path: Path

    @property
    def label(self) -> str:
        """The entry that it is of."""
        return self.figures["algorithm"]

    @property
    def condition(self) -> str:
        """As it is called in the results."""
        return self.figures["condition"]

    @property
    def seed(self) -> int:
        """Of the run."""
        return self.figures["seed"]

    @property
    def is_finished(self) -> bool:
        """It came to its end, so its figures count."""
        return self.figures["status"] == "finished"

    @cached_property
    def metrics(self) -> Sequence[Mapping[str, Any]]:
        """Its evaluations; empty where the folder is gone."""
        return read_folder(self.path).metrics if self.is_finished else ()

    @cached_property
    def record(self) -> Mapping[str, Any]:
        """Its run.json; empty where the folder is gone."""
        return read_folder(self.path).run or {}

    def trace(self) -> list[Mapping[str, Any]]:
        """The events of its timeline; empty where there is none, or it cannot be read."""
        with contextlib.suppress(OSError, EOFError, ValueError, KeyError, TypeError, zlib.error):
            trace = json.loads(gzip.decompress((self.path / "timeline.json.gz").read_bytes()))
            return [event for event in trace["traceEvents"] if event.get("ph") == "X"]
        return []


@dataclass(frozen=True)
class Source:
    """Everything that the report is about."""

    folders: Sequence[Path]
    results: Sequence[Mapping[str, Any]]
    """results.json of each folder."""
    entries: Mapping[str, Mapping[str, Any]]
    """Label to what is known of the entry; its place decides colour and line."""
    conditions: Sequence[str]
    runs: Sequence[Run]
    grid: Sequence[Mapping[str, Any]]
    targets: Mapping[str, float | None]
    rules: Sequence[str]
    reference: str
    yardstick: Sequence[Run] = field(default_factory=tuple)

    def of(self, condition: str, label: str | None = None) -> list[Run]:
        """The runs under one condition, of one entry or of all."""
        return [run for run in self.runs if run.condition == condition and label in (None, run.label)]

    def finished(self, condition: str, label: str) -> list[Run]:
        """Those of them that count."""
        return [run for run in self.of(condition, label) if run.is_finished]

    def labels(self, condition: str) -> list[str]:
        """The entries that have runs under one condition, in their order."""
        there = {run.label for run in self.of(condition)}
        return [label for label in self.entries if label in there]


def read_source(folders: Sequence[Path]) -> Source:
    """Reads the folders of comparisons. Raises ConfigurationError where one is none."""
    results = [_read_results(folder) for folder in folders]
    entries: dict[str, Mapping[str, Any]] = {}
    targets: dict[str, float | None] = {}
    runs: list[Run] = []
    grid: list[Mapping[str, Any]] = []
    yardstick: list[Run] = []
    for folder, found in zip(folders, results, strict=True):
        names = _names(folder, found, runs)
        for entry in found["entries"]:
            entries.setdefault(names[entry["label"]], entry)
        for condition in found["conditions"]:
            if targets.get(condition) is None:
                targets[condition] = found["target"]["top1"].get(condition)
        runs += [Run(_renamed(run, names), folder / run["folder"]) for run in found["runs"]]
        grid += [_renamed(trial, names) for trial in found["grid"]["tried"]]
        yardstick += [Run(run, folder / run["folder"]) for run in found["yardstick"]]
    if len(folders) > 1:
        runs = [_held_to(run, targets[run.condition]) for run in runs]
    return Source(
        folders=folders,
        results=results,
        entries=entries,
        conditions=list(targets),
        runs=runs,
        grid=grid,
        targets=targets,
        rules=list(dict.fromkeys(found["target"]["rule"] for found in results)),
        reference=results[0]["reference"],
        yardstick=yardstick,
    )


def _read_results(folder: Path) -> Mapping[str, Any]:
    if not (folder / FILE).is_file():
        what = "is not a folder" if not folder.is_dir() else f"holds no {FILE}"
        raise ConfigurationError(f"{folder} {what}: expected a folder that `lasgd compare` wrote.")
    found = read_json(folder / FILE)
    needed = {"runs", "entries", "conditions", "target", "grid", "reference", "yardstick", "settings", "environment"}
    if not isinstance(found, dict) or not needed <= found.keys():
        raise ConfigurationError(f"{folder / FILE} is not the results of this version of `lasgd compare`.")
    return found


def _names(folder: Path, found: Mapping[str, Any], runs: Sequence[Run]) -> dict[str, str]:
    """Labels of this folder as the report calls them: with the folder's name where a run of the same name is there."""
    taken = {(run.label, run.condition, run.seed) for run in runs}
    own = [(run["algorithm"], run["condition"], run["seed"]) for run in found["runs"]]
    twice = {label for label, condition, seed in own if (label, condition, seed) in taken}
    names = {}
    for entry in found["entries"]:
        name = label = entry["label"]
        number = 1
        while label in twice and any((name, *rest) in taken for _, *rest in own):
            number += 1
            name = f"{label} [{folder.name or number}]" if number == 2 else f"{label} [{folder.name} {number - 1}]"
        names[label] = name
    return names


def _renamed(run: Mapping[str, Any], names: Mapping[str, str]) -> Mapping[str, Any]:
    return {**run, "algorithm": names.get(run["algorithm"], run["algorithm"])}


def _held_to(run: Run, target: float | None) -> Run:
    """The same run with the target of the whole report."""
    found = dict(run.figures)
    for name, over in (("seconds_to_target", "wall_s"), ("samples_to_target", "samples")):
        found[name] = crossing(run.metrics, target, over) if target is not None and run.is_finished else None
    return Run(found, run.path)


def spread(values: Iterator[float | None] | Sequence[float | None]) -> tuple[float, float, float] | None:
    """(mean, lowest, highest) of the values that are there; None where there are none."""
    known = [value for value in values if value is not None]
    return (sum(known) / len(known), min(known), max(known)) if known else None
