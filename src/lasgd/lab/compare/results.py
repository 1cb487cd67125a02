"""results.json: what the run folders of a comparison say together. Read anew from the folders whenever asked for."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lasgd.lab.compare.entry import Entry, yardstick
from lasgd.lab.compare.figures import Folder, crossing, figures, mean, read_folder
from lasgd.lab.compare.plan import TARGET_SHARE, Cell, Plan
from lasgd.training.run_folder import environment

FILE = "results.json"


class Folders:
    """The run folders of a comparison; a finished one is read once."""

    def __init__(self, out: Path) -> None:
        self._out = out
        self._finished: dict[Path, Folder] = {}

    def read(self, cell: Cell) -> Folder:
        """The cell's run folder as it is now."""
        if cell.folder not in self._finished:
            found = read_folder(self._out / cell.folder)
            if found.status != "finished":
                return found
            self._finished[cell.folder] = found
        return self._finished[cell.folder]


@dataclass(frozen=True)
class Trial:
    """A value of the grid that was tried."""

    cell: Cell
    found: Folder

    @property
    def loss(self) -> float:
        """The final loss; infinite where the run failed or ended with NaN."""
        final = (self.found.run or {}).get("final") or {}
        loss = final.get("loss") if self.found.status == "finished" else None
        return math.inf if loss is None or math.isnan(loss) else loss


def best(trials: Sequence[Trial]) -> float | None:
    """The learning rate with the lowest final loss, the lower one of two equals; None where all failed."""
    usable = [(trial.loss, trial.cell.lr) for trial in trials if trial.loss < math.inf and trial.cell.lr is not None]
    return min(usable)[1] if usable else None


def is_at_edge(lr: float, grid: Sequence[float]) -> bool:
    """A better value may lie beyond the grid."""
    return len(grid) > 1 and lr in (min(grid), max(grid))


def results(plan: Plan, folders: Folders) -> dict[str, Any]:
    """The object in results.json."""
    entries = {entry.label: entry for entry in _entries(plan)}
    cells = list(dict.fromkeys(_cells(plan, entries)))
    conditions = list(dict.fromkeys(cell.condition for cell in cells))
    found = {cell: folders.read(cell) for cell in cells}
    targets = {condition: _target(plan, condition, found) for condition in conditions}
    pace = {
        (cell.condition, cell.seed): figures(folder)["steps_per_s"]
        for cell, folder in _yardsticks(plan, entries, cells, folders)
    }
    return {
        "runs": [
            _run(plan, cell, folder, targets[cell.condition], pace.get((cell.condition, cell.seed)))
            for cell, folder in found.items()
        ],
        "target": {
            "given": plan.target,
            "rule": _rule(plan),
            "top1": targets,
        },
        "reference": plan.reference,
        "conditions": conditions,
        "seeds": sorted({cell.seed for cell in cells}),
        "entries": [
            {"label": entry.label, "algorithm": entry.algorithm, "own": dict(entry.own)} for entry in entries.values()
        ],
        "grid": {
            "values": list(plan.lr_grid),
            "tune": plan.tune,
            "seed": plan.tuning_seed,
            "tried": list(_grid(plan, entries, conditions, folders)),
        },
        "yardstick": [
            _run(plan, cell, folder, None, None) for cell, folder in _yardsticks(plan, entries, cells, folders)
        ],
        "settings": plan.shared.model_dump(mode="json"),
        "environment": environment(),
        "command": plan.command,
    }


def _entries(plan: Plan) -> Iterator[Entry]:
    """Those of earlier calls first, in the order in which they came."""
    own = {entry.label: entry for entry in plan.entries}
    for call in plan.earlier:
        for entry in call["entries"]:
            yield own.get(entry["label"]) or Entry(entry["label"], entry["algorithm"], entry["own"])
    yield from plan.entries


def _cells(plan: Plan, entries: Mapping[str, Entry]) -> Iterator[Cell]:
    """Every run that was ever asked for, condition by condition."""
    own = {"entries": [{"label": e.label} for e in plan.entries], "conditions": plan.conditions, "seeds": plan.seeds}
    for call in (*plan.earlier, own):
        for condition in call["conditions"]:
            for described in call["entries"]:
                entry = entries[described["label"]]
                for seed in call["seeds"]:
                    yield Cell(entry, condition, seed, plan.lr_of(entry, condition))


def _yardsticks(
    plan: Plan, entries: Mapping[str, Entry], cells: Sequence[Cell], folders: Folders
) -> Iterator[tuple[Cell, Folder]]:
    own = next((entry for entry in entries.values() if entry.is_yardstick), yardstick())
    for condition, seed in dict.fromkeys((cell.condition, cell.seed) for cell in cells):
        cell = Cell(own, condition, seed)
        yield cell, folders.read(cell)


def _rule(plan: Plan) -> str:
    if plan.target is not None:
        return f"top-1 of {plan.target:g}, as given"
    return f"{TARGET_SHARE:g} of the mean final top-1 of {plan.reference} under the same condition"


def _target(plan: Plan, condition: str, found: Mapping[Cell, Folder]) -> float | None:
    if plan.target is not None:
        return plan.target
    reached = mean(
        figures(folder)["final_top1"]
        for cell, folder in found.items()
        if cell.condition == condition and cell.entry.label == plan.reference
    )
    return None if reached is None else TARGET_SHARE * reached


def _run(plan: Plan, cell: Cell, found: Folder, target: float | None, pace: float | None) -> dict[str, Any]:
    known = figures(found)
    error = known.pop("error")
    if plan.is_tuned(cell.entry) and cell.lr is None:
        known["status"], error = "missing", "no learning rate of the grid was chosen: see the grid"
    rate = known["steps_per_s"]
    done = known["status"] == "finished" and target is not None
    return {
        "algorithm": cell.entry.label,
        "condition": cell.condition,
        "seed": cell.seed,
        "lr": cell.lr if cell.lr is not None else cell.entry.own.get("lr", plan.shared.lr),
        **known,
        "retention": rate / pace if rate and pace else None,
        "seconds_to_target": crossing(found.metrics, target, "wall_s") if done and target is not None else None,
        "samples_to_target": crossing(found.metrics, target, "samples") if done and target is not None else None,
        "folder": cell.folder.as_posix(),
        "error": error,
    }


def _grid(
    plan: Plan, entries: Mapping[str, Entry], conditions: Sequence[str], folders: Folders
) -> Iterator[dict[str, Any]]:
    for condition in conditions:
        for entry in entries.values():
            if not plan.is_tuned(entry):
                continue
            chosen = plan.lr_of(entry, condition)
            for trial in trials(plan, entry, condition, folders):
                if trial.found.status == "missing":
                    continue
                known = figures(trial.found)
                yield {
                    "algorithm": entry.label,
                    "condition": condition,
                    "lr": trial.cell.lr,
                    "status": known["status"],
                    "final_loss": known["final_loss"],
                    "final_top1": known["final_top1"],
                    "chosen": trial.cell.lr == chosen,
                    "at_edge": chosen is not None and trial.cell.lr == chosen and is_at_edge(chosen, plan.lr_grid),
                    "virtual": trial.cell.is_virtual,
                    "folder": trial.cell.folder.as_posix(),
                    "error": known["error"],
                }


def trials(plan: Plan, entry: Entry, condition: str, folders: Folders) -> list[Trial]:
    """The values of the grid for one entry under one condition, as far as they have been tried."""
    is_virtual = plan.tune == "virtual" and entry.can_be_simulated
    cells = [Cell(entry, condition, plan.tuning_seed, lr, is_virtual) for lr in plan.lr_grid]
    return [Trial(cell, folders.read(cell)) for cell in cells]
