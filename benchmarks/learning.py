"""What never waiting costs per sample, and what wins it back: real gradients, in virtual time, at equal samples.

    python benchmarks/learning.py screen --data cifar10.tar.xz       all candidates in one cell
    python benchmarks/learning.py short --data cifar10.tar.xz        a fast network, a short run
    python benchmarks/learning.py delay --data cifar10.tar.xz        the same by delay
    python benchmarks/learning.py ranks --data cifar10.tar.xz        with 8 and 16 ranks
    python benchmarks/learning.py straggler --data cifar10.tar.xz    the last rank four times slower
    python benchmarks/learning.py long --data cifar10.tar.xz         twelve passes
    python benchmarks/learning.py tiny --data tiny-imagenet-20.tar.xz
    python benchmarks/learning.py digits --data digits
    python benchmarks/learning.py screen --data cifar10.tar.xz --candidates "full;int8" --seeds 0

A cell is what all candidates are put through: data set, ranks, how many local steps the whole float32 vector is on the
wire, who is slow, how many samples. A local step takes 100 virtual milliseconds. Learning rates lie on a ladder whose
rungs are a factor of two apart. For each candidate two rungs are tried, and then further ones until those on both sides
of the best have been tried and are worse, by the final loss with seed 0; the other seeds run with the best. The default
is also tried with the rate that synchronous SGD has come to.

Runs are `lasgd simulate` as anybody would type it, one on each core. What comes of each is stored as soon as it is
there, and what is stored is not run again, unless --again asks for it: a study that is cut off goes on where it was.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from common import Bar, Report, arguments_for, run_card, where_to_store
from lasgd.errors import DataError
from learning_trials import (
    CANDIDATES,
    DEFAULT,
    DIGITS,
    FAR,
    FAST,
    HELD,
    INT8,
    LONG,
    PARTS,
    SCREEN,
    SHORT,
    TINY,
    Cell,
    Outcome,
    Trial,
    Trials,
    check_data,
    restored,
    run_all,
    stored,
)

RUNGS = (0.025, 0.05)
"""Learning rates that every candidate begins with."""
LEAST = RUNGS[0] / 64
"""What diverges there too is given up."""
TUNED_WITH = 0
"""The seed."""
SEEDS = (0, 1, 2)


class Study:
    """What is known of candidates in cells, and what is still to be found out."""

    def __init__(self, trials: Trials) -> None:
        self.trials = trials

    def outcome(self, cell: Cell, label: str, lr: float, seed: int = TUNED_WITH) -> Outcome | None:
        """None where it was not run."""
        found = self.trials.get(Trial(cell, label, lr, seed).key)
        return found[1] if found else None

    def tried(self, cell: Cell, label: str) -> dict[float, Outcome]:
        """What was tuned with, by learning rate, the lowest first."""
        found = {t.lr: outcome for t, outcome in self._of(cell, label) if t.seed == TUNED_WITH}
        return dict(sorted(found.items()))

    def best(self, cell: Cell, label: str) -> float | None:
        """The learning rate of the least loss; None where no run came to its end."""
        losses = {lr: one.loss for lr, one in self.tried(cell, label).items() if one.loss is not None}
        return min(losses, key=losses.__getitem__) if losses else None

    def to_tune(self, cell: Cell, label: str) -> list[float]:
        """The next learning rates to try; none once the best has a worse one on either side."""
        tried = self.tried(cell, label)
        missing = [lr for lr in RUNGS if lr not in tried]
        if missing:
            return missing
        best = self.best(cell, label)
        beside = [min(tried) / 2] if best is None else [best / 2, best * 2]
        return [lr for lr in beside if lr not in tried and lr >= LEAST]

    def run(
        self, cells: Sequence[Cell], labels: Sequence[str], seeds: Sequence[int], data: Path, commit: str
    ) -> Iterator[None]:
        """Runs what is missing. Yields after each run, when `trials` holds it."""
        pairs = [(cell, label) for cell in cells for label in labels]
        while missing := self._to_tune(pairs):
            yield from self._run(missing, data, commit)
        best = {pair: self.best(*pair) for pair in pairs}
        more = [Trial(*pair, lr, seed) for pair, lr in best.items() if lr is not None for seed in seeds]
        yield from self._run([trial for trial in more if trial.key not in self.trials], data, commit)

    def _to_tune(self, pairs: Sequence[tuple[Cell, str]]) -> list[Trial]:
        """The next runs; in the end the default's with the rate that synchronous SGD has come to."""
        found = [Trial(*pair, lr, TUNED_WITH) for pair in pairs for lr in self.to_tune(*pair)]
        if found:
            return found
        rates = {cell: self.best(cell, "synchronous") for cell, label in pairs if label == DEFAULT}
        untuned = [Trial(cell, DEFAULT, lr, TUNED_WITH) for cell, lr in rates.items() if lr is not None]
        return [trial for trial in untuned if trial.key not in self.trials]

    def _run(self, trials: Sequence[Trial], data: Path, commit: str) -> Iterator[None]:
        ended = 0
        for trial, outcome in run_all(trials, data, commit):
            self.trials[trial.key] = trial, outcome
            ended += 1
            yield
        if ended < len({trial.key for trial in trials}):
            raise SystemExit("learning.py: some runs gave no result, for the reasons given above")

    # What comes of it

    def top1(self, cell: Cell, label: str) -> dict[int, float]:
        """In per cent, by seed, at the best learning rate; 0 where that diverged."""
        lr = self.best(cell, label)
        found = {t.seed: 100 * (outcome.top1 or 0.0) for t, outcome in self._of(cell, label) if t.lr == lr}
        return dict(sorted(found.items()))

    def _of(self, cell: Cell, label: str) -> list[tuple[Trial, Outcome]]:
        asked = Trial(cell, label, 0.0, TUNED_WITH).cell_run
        return [(t, outcome) for t, outcome in self.trials.values() if t.label == label and t.cell_run == asked]

    def points(self, cell: Cell, label: str, other: str, other_cell: Cell | None = None) -> list[float]:
        """By how many points of top-1 a candidate is above another one, for each seed that both were run with."""
        ours, theirs = self.top1(cell, label), self.top1(other_cell or cell, other)
        return [ours[seed] - theirs[seed] for seed in ours if seed in theirs]

    def untuned(self, cell: Cell) -> tuple[Outcome | None, Outcome | None]:
        """(the default, synchronous SGD) with the learning rate that the second chooses."""
        lr = self.best(cell, "synchronous")
        if lr is None:
            return None, None
        return self.outcome(cell, DEFAULT, lr), self.outcome(cell, "synchronous", lr)

    def figures(self) -> dict[str, Any]:
        """What is stored."""
        return {"records": self.records(), "trials": stored(self.trials)}

    def records(self) -> list[dict[str, Any]]:
        """A row for each cell, of those that anybody who never waits was put through, and candidate."""
        held = {trial.cell_run for trial, _ in self.trials.values() if not trial.waits}
        known = dict.fromkeys(cell for cells in PARTS.values() for cell in cells)
        cells = [*(cell for cell in known if cell in held), *(held - known.keys())]
        return [self._record(cell, label) for cell in cells for label in CANDIDATES if self.tried(cell, label)]

    def _record(self, cell: Cell, label: str) -> dict[str, Any]:
        lr, top1 = self.best(cell, label), self.top1(cell, label)
        chosen = self.outcome(cell, label, lr) if lr is not None else None
        return {
            "cell": asdict(cell),
            "name": cell.name,
            "candidate": label,
            "lr": lr,
            "top1": top1,
            "behind": self.points(cell, "synchronous", label),
            "tried": {f"{rate:g}": one.top1 for rate, one in self.tried(cell, label).items()},
            "staleness_steps": chosen and chosen.staleness_steps,
            "fragments": chosen and chosen.fragments,
        }


UNTUNED = 2.0
"""Points of top-1 that the default may be behind synchronous SGD with the learning rate that this one chooses."""


def bars(study: Study) -> list[Bar]:
    """What the default is held to, as far as it has been measured."""
    return [
        _points(study, SCREEN, "the default against blocking local SGD", DEFAULT, "local, H = 10", 0.0),
        _points(study, SCREEN, "the default against full with one fragment", DEFAULT, "full, whole vector", 6.0),
        _points(study, SCREEN, "the default with int8 against synchronous", INT8, "synchronous", -2.0),
        _points(study, SHORT, "the default against synchronous", DEFAULT, "synchronous", -1.0),
        _points(study, FAST, "the default against synchronous", DEFAULT, "synchronous", -1.0),
        _points(study, LONG, "the default against synchronous", DEFAULT, "synchronous", -1.0),
        _points(study, LONG, "the default with int8 against synchronous", INT8, "synchronous", -0.5),
        _points(study, FAR, "the default against blocking local SGD as rarely", DEFAULT, "local, H = 20", -3.0),
        Bar(f"{FAR.name}: the default learns with the rate that synchronous SGD chooses", _learns_untuned(study)),
        _points(study, HELD, "the default against itself without the straggler", DEFAULT, DEFAULT, 0.0, SCREEN),
        *(_untuned(study, cell) for cell in (SCREEN, TINY, DIGITS)),
    ]


def _points(
    study: Study, cell: Cell, what: str, label: str, other: str, at_least: float, other_cell: Cell | None = None
) -> Bar:
    found = study.points(cell, label, other, other_cell)
    among = (min(found), max(found)) if len(found) > 1 else None
    value = statistics.fmean(found) if found else None
    return Bar(f"{cell.name}: {what}", value, at_least=at_least, unit=" points", among=among)


def _untuned(study: Study, cell: Cell) -> Bar:
    ours, theirs = study.untuned(cell)
    value = None if ours is None or theirs is None else 100 * ((ours.top1 or 0.0) - (theirs.top1 or 0.0))
    what = f"{cell.name}: the default with the rate that synchronous SGD chooses"
    return Bar(what, value, at_least=-UNTUNED, unit=" points")


def _learns_untuned(study: Study) -> bool | None:
    """It has neither diverged nor come to no more than guessing."""
    ours, theirs = study.untuned(FAR)
    return None if ours is None or theirs is None else (ours.top1 or 0.0) > 0.5 * (theirs.top1 or 0.0)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a part and stores what comes of it."""
    parser = arguments_for("learning", __doc__)
    parser.add_argument("part", choices=tuple(PARTS))
    parser.add_argument("--data", type=Path, required=True, help="CIFAR-10 or tiny-imagenet, folder or archive")
    parser.add_argument("--candidates", help="some of them, separated by semicolons; default all")
    parser.add_argument("--cells", help="some of the part's, by number from 0, separated by commas; default all")
    parser.add_argument("--seeds", help="separated by commas; default 0,1,2")
    parser.add_argument("--again", action="store_true", help="run what is stored anew")
    arguments = parser.parse_args(argv)
    labels = arguments.candidates.split(";") if arguments.candidates else list(CANDIDATES)
    for label in labels:
        if label not in CANDIDATES:
            parser.error(f"--candidates: {label!r} is none of {'; '.join(CANDIDATES)}")
    cells = PARTS[arguments.part]
    try:
        cells = tuple(cells[int(number)] for number in arguments.cells.split(",")) if arguments.cells else cells
    except (ValueError, IndexError):
        parser.error(f"--cells: expected numbers from 0 to {len(cells) - 1}, got {arguments.cells!r}")
    try:
        seeds = tuple(map(int, arguments.seeds.split(","))) if arguments.seeds else SEEDS
    except ValueError:
        parser.error(f"--seeds: expected whole numbers separated by commas, got {arguments.seeds!r}")
    try:
        check_data(arguments.data, () if arguments.quick else cells)
    except DataError as error:
        parser.error(f"--data: {error}")
    if arguments.quick:
        cells, labels, seeds = (Cell(samples=2000),), ["synchronous", DEFAULT], (TUNED_WITH,)
    where = where_to_store("learning", arguments)
    trials = restored(_rows(where))
    if arguments.again:
        asked = {Trial(cell, label, 0.0, 0).cell_run: None for cell in cells for label in labels}
        trials = {k: (t, o) for k, (t, o) in trials.items() if t.label not in labels or t.cell_run not in asked}
    study = Study(trials)
    report = Report("learning", run_card({"part": arguments.part, "begun with": list(RUNGS)}, seeds))
    for _ in study.run(cells, labels, seeds, arguments.data, report.card["commit"]):
        if where is not None:  # so that nothing is lost where the study is cut off
            report.figures, report.bars = study.figures(), bars(study)
            report.store(where)
    report.figures, report.bars = study.figures(), []
    for bar in bars(study):
        report.add(bar)
    return report.finish(where)


def _rows(where: Path | None) -> Iterable[dict[str, Any]]:
    if where is None or not where.exists():
        return ()
    return json.loads(where.read_text(encoding="utf-8"))["figures"]["trials"]


if __name__ == "__main__":
    sys.exit(main())
