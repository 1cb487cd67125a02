"""Runs a comparison: one child process after another, and results.json after each.

A finished run is never repeated; one that failed or was interrupted is, when the comparison is called again. A run that
fails ends no other. A value of the grid that failed has been tried: it is the worst, and the choice stands.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lasgd.errors import ConfigurationError, LasgdError
from lasgd.lab.compare import entry as entries
from lasgd.lab.compare.child import Interrupts, last_line, run_child
from lasgd.lab.compare.figures import ENDED, LOG, read_folder
from lasgd.lab.compare.plan import FILE, Cell, Plan, going_on, store
from lasgd.lab.compare.progress import Progress
from lasgd.lab.compare.results import FILE as RESULTS
from lasgd.lab.compare.results import Folders, best, results, trials
from lasgd.training.run_folder import write_json_atomically

LOCK = ".lock"


@dataclass(frozen=True)
class Outcome:
    """How a comparison ended."""

    results: dict[str, Any]
    """The object in results.json."""
    interrupted: bool

    @property
    def failed(self) -> list[dict[str, Any]]:
        """The runs that should be there and are not finished."""
        return [run for run in self.results["runs"] if run["status"] != "finished"]


class Comparison:
    """One call of a comparison in the folder `out`, which may hold earlier ones. Raises ConfigurationError."""

    def __init__(self, plan: Plan, out: Path, progress: Progress, run_limit_s: float | None = None) -> None:
        prepare(out)
        self.plan = going_on(plan, out)
        self.out, self.progress, self.run_limit_s = out, progress, run_limit_s
        self.folders = Folders(out)
        self.interrupts = Interrupts()
        self._lock: int | None = None
        self._met: set[Cell] = set()

    def run(self) -> Outcome:
        """All runs that are asked for and not finished. Raises LasgdError where files cannot be written."""
        with locked(self.out) as lock, self.interrupts.caught(), self.progress:
            self._lock = lock
            store(self.plan, self.out)
            self._write()
            self.progress.before(len(self._planned()) - len(self._left()))
            for cell in self._cells():
                if self.interrupts.count:
                    break
                self.progress.plan(self._left())
                self._run(cell)
                self.progress.finished(self._write())
            return Outcome(self._write(), bool(self.interrupts.count))

    def _cells(self) -> Iterator[Cell]:
        """In order, and each known only when its turn comes: learning rates are chosen on the way."""
        for number, seed in enumerate(self.plan.seeds):
            for condition in self.plan.conditions:
                if number == 0:
                    yield from (cell for cell in self.plan.tries(condition) if self._is_open(cell))
                    self._choose(condition)
                yield from (cell for cell in self.plan.cells(seed, condition) if self._is_open(cell))

    def _is_open(self, cell: Cell) -> bool:
        """It is to be run in this call, and has not been."""
        if self.plan.is_tuned(cell.entry) and cell.lr is None:
            return False
        return cell not in self._met and self.folders.read(cell).status != "finished"

    def _planned(self) -> list[Cell]:
        """All runs of this call, as far as they are known; a rate to be chosen stands for any of the grid."""
        planned: dict[Cell, None] = {}
        for condition in self.plan.conditions:
            tries = dict.fromkeys(self.plan.tries(condition))
            is_tried = {cell.entry for cell in tries if not cell.is_virtual and self.plan.is_tuned(cell.entry)}
            planned |= tries
            for seed in self.plan.seeds:
                for cell in self.plan.cells(seed, condition):
                    # The first seed's run is one of the trials, where those are real.
                    if not (cell.lr is None and seed == self.plan.tuning_seed and cell.entry in is_tried):
                        planned[cell] = None
        return list(planned)

    def _left(self) -> list[Cell]:
        """Those that are still to be run."""
        return [
            cell for cell in self._planned() if cell not in self._met and self.folders.read(cell).status != "finished"
        ]

    def _choose(self, condition: str) -> None:
        if self.interrupts.count:
            return
        for entry in sorted(self.plan.entries, key=lambda entry: entry.tuned_as is not None):
            if self.plan.is_tuned(entry) and self.plan.lr_of(entry, condition) is None:
                lr = self.plan.borrowed_lr(entry, condition)
                if lr is None:
                    lr = best(trials(self.plan, entry, condition, self.folders))
                if lr is None:
                    self.progress.say(f"{entry.label}, {condition}: no learning rate of the grid came to its end")
                else:
                    self.plan = self.plan.with_choice(condition, entry.label, lr)
                    store(self.plan, self.out)
                    self.progress.say(f"{entry.label}, {condition}: learning rate {lr:g}")

    def _run(self, cell: Cell) -> None:
        self._met.add(cell)
        folder = self.out / cell.folder
        if folder.exists():
            shutil.rmtree(folder)  # of an attempt that did not come to its end
        (folder / LOG).parent.mkdir(parents=True)
        settings = cell.entry.settings(self.plan.shared, cell.condition, cell.seed, cell.lr)
        if cell.is_virtual:  # for its final loss alone
            settings = settings.model_copy(update={"evaluations": 1})
        command = entries.simulate if cell.is_virtual else cell.entry.command
        begin_s = time.monotonic()
        self.progress.begin(cell, lambda: last_line(folder / LOG))
        reason, code = None, None
        try:
            code = run_child(
                command(settings, folder),
                folder / LOG,
                self.interrupts,
                self.progress.tick,
                () if self._lock is None else (self._lock,),
                self.run_limit_s,
            )
            if self.run_limit_s is not None and time.monotonic() - begin_s > self.run_limit_s and code != 0:
                reason = f"not over within --run-limit-s {self.run_limit_s:g}"
        except LasgdError as error:
            reason = str(error)
        took_s = time.monotonic() - begin_s
        (folder / LOG).parent.mkdir(parents=True, exist_ok=True)
        write_json_atomically(folder / ENDED, {"code": code, "took_s": took_s, "reason": reason})
        self.progress.end(cell, read_folder(folder))

    def _write(self) -> dict[str, Any]:
        found = results(self.plan, self.folders)
        write_json_atomically(self.out / RESULTS, found)
        return found


def prepare(out: Path) -> None:
    """Creates the folder. Raises ConfigurationError where it holds something else, or cannot be used."""
    try:
        if out.is_dir() and not (out / FILE).exists() and any(entry.name != LOCK for entry in out.iterdir()):
            raise ConfigurationError(
                f"--out: {out} is not empty and holds no comparison to go on with. Name another folder."
            )
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(f"--out: {out} cannot be used as a folder: {error.strerror or error}.") from error


@contextmanager
def locked(out: Path) -> Iterator[int]:
    """The descriptor of a lock on the folder, which children inherit: a run that outlives us keeps others out.

    Raises ConfigurationError where another comparison, or a run that it left behind, is at work there.
    """
    try:
        descriptor = os.open(out / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise ConfigurationError(f"--out: {out} cannot be written to: {error.strerror or error}.") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigurationError(
                f"--out: another comparison, or a run that one left behind, is at work in {out}. Wait until it is over."
            ) from error
        yield descriptor
    finally:
        os.close(descriptor)
