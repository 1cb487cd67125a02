"""What never waiting costs per sample, and what wins it back: real gradients, in virtual time, at equal samples.

    python benchmarks/learning.py screen --data cifar10.tar.xz --runs kept      all candidates in one cell
    python benchmarks/learning.py short --data cifar10.tar.xz --runs kept       a fast network and a short run
    python benchmarks/learning.py delay --data cifar10.tar.xz --runs kept       the same by delay
    python benchmarks/learning.py ranks --data cifar10.tar.xz --runs kept       with 8 and 16 ranks
    python benchmarks/learning.py straggler --data cifar10.tar.xz --runs kept   the last rank four times slower
    python benchmarks/learning.py long --data cifar10.tar.xz --runs kept        twelve passes
    python benchmarks/learning.py tiny --data tiny-imagenet-20.tar.xz --runs kept
    python benchmarks/learning.py digits --data digits --runs kept
    python benchmarks/learning.py screen --data cifar10.tar.xz --candidates "full;int8" --seeds 0

A cell is what all candidates are put through: data set, ranks, how many local steps the whole float32 vector is on the
wire, who is slow, how many samples. Each candidate's learning rate is the best of one grid, the same for all, by its
final loss with the first seed; the other seeds run with that rate. A local step takes 100 virtual milliseconds.

Runs are `lasgd simulate` as anybody would type it, one on each core; what `--runs` holds is not run again. Results are
stored at the end, beside those of earlier calls.
"""

from __future__ import annotations

import json
import os
import queue
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from common import FOLDER, RESULTS, Bar, Report, arguments_for, run_card, where_to_store
from lasgd.algorithms import registry
from lasgd.errors import ConfigurationError
from lasgd.lab.cores import usable_cores
from lasgd.training.run_folder import read_run

SHIPPED = frozenset(registry.names())
STEP_S = 0.1
GRID = (0.0125, 0.025, 0.05, 0.1)
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Cell:
    """What all candidates are put through."""

    data: str = "cifar10"
    ranks: int = 4
    delay: float = 10.0
    """Local steps in which the whole float32 vector travels."""
    straggler: str = ""
    """As in a condition, such as last:4x."""
    samples: int = 60_000
    model: str = "cnn4"
    batch_size: int = 16

    @property
    def name(self) -> str:
        """In words."""
        slow = f", straggler {self.straggler}" if self.straggler else ""
        return f"{self.data}, {self.ranks} ranks, delay {self.delay:g}{slow}, {self.samples:,} samples"

    @property
    def condition(self) -> str:
        """As `lasgd simulate` takes it."""
        parts = [f"step={STEP_S * 1e3:g}ms", f"round={self.delay * STEP_S:g}s"]
        return "+".join(([f"straggler={self.straggler}"] if self.straggler else []) + parts)

    @property
    def slug(self) -> str:
        """As a folder name."""
        return f"{self.data}-{self.ranks}-{self.delay:g}-{self.straggler.replace(':', '')}-{self.samples}"


SCREEN = Cell()
"""The prototype's setting: what is known of the candidates before is known of this one."""
SHORT = Cell(delay=1.0, samples=20_000)
FAR = Cell(ranks=16, delay=20.0)
HELD = Cell(straggler="last:4x")
LONG = Cell(samples=600_000)
TINY = Cell(data="tiny-imagenet-20", batch_size=8, samples=30_000)
DIGITS = Cell(data="digits", samples=20_000)
PARTS: dict[str, tuple[Cell, ...]] = {
    "screen": (SCREEN,),
    "short": (SHORT,),
    "delay": tuple(Cell(delay=delay) for delay in (1.0, 5.0, 10.0, 20.0, 50.0)),
    "ranks": (Cell(ranks=8), Cell(ranks=8, delay=20.0), Cell(ranks=16), FAR),
    "straggler": (HELD,),
    "long": (LONG,),
    "tiny": (TINY,),
    "digits": (DIGITS,),
}

DEFAULT = "ranks 0.5, mean 0.8"
"""What `lasgd train` does where nothing is said."""
INT8 = f"{DEFAULT}, int8"
CANDIDATES: dict[str, dict[str, Any]] = {
    "synchronous": {"algorithm": "sync_sgd"},
    "local, H = 10": {"algorithm": "local_sgd", "steps_per_round": 10},
    "local, H = 20": {"algorithm": "local_sgd", "steps_per_round": 20},
    "full, whole vector": {"fragments": 1, "outer_momentum": 0},
    "full, 2 fragments": {"fragments": 2, "outer_momentum": 0},
    "full, 5 fragments": {"fragments": 5, "outer_momentum": 0},
    "full": {"outer_momentum": 0},
    "full, 20 fragments": {"fragments": 20, "outer_momentum": 0},
    "bf16": {"wire": "bf16", "outer_momentum": 0},
    "int8": {"wire": "int8", "outer_momentum": 0},
    "momentum of the mean": {"outer_momentum": 0.9, "momentum": 0},
    "momentum of the mean, whole vector": {"outer_momentum": 0.9, "momentum": 0, "fragments": 1},
    "momentum of the mean, 0.8": {"outer_momentum": 0.8, "momentum": 0},
    "momentum of the mean, int8": {"outer_momentum": 0.9, "momentum": 0, "wire": "int8"},
    DEFAULT: {"outer_momentum": 0.8, "momentum": 0.5},
    INT8: {"outer_momentum": 0.8, "momentum": 0.5, "wire": "int8"},
    "ranks 0.5, mean 0.8, whole vector": {"outer_momentum": 0.8, "momentum": 0.5, "fragments": 1},
    "ranks 0.8, mean 0.5": {"outer_momentum": 0.5, "momentum": 0.8},
    "half gain": {"algorithm": "half_gain"},
    "half gain, whole vector": {"algorithm": "half_gain", "fragments": 1},
    "adaptive gain": {"algorithm": "adaptive_gain"},
    "adaptive gain, whole vector": {"algorithm": "adaptive_gain", "fragments": 1},
    "adaptive gain by fragment, 10": {"algorithm": "adaptive_gain_by_fragment", "fragments": 10},
    "learnt meanwhile dropped, whole vector": {"algorithm": "dropped", "fragments": 1},
    "learnt meanwhile dropped": {"algorithm": "dropped"},
    "momentum cleared, whole vector": {"algorithm": "cleared", "fragments": 1},
    "weighted by steps": {"algorithm": "weighted_steps"},
    "by drift, 10 fragments": {"algorithm": "by_drift", "fragments": 10},
    f"{DEFAULT}, mean of ten cycles": {"algorithm": "remembered_mean", "outer_momentum": 0.8, "momentum": 0.5},
}
"""Options of `lasgd simulate` by label. Where momentum is in both places, (1 - beta)(1 - mu) is 0.1 as with 0.9 in one:
so the same learning rate moves the mean as far."""


@dataclass(frozen=True)
class Trial:
    """One run."""

    cell: Cell
    label: str
    lr: float
    seed: int

    @property
    def cell_run(self) -> Cell:
        """Ranks that wait for each other learn the same however long: one run stands for all delays and stragglers."""
        name = CANDIDATES[self.label].get("algorithm", "lasgd")
        waits = name in SHIPPED and registry.find(name).is_synchronous
        return replace(self.cell, delay=1.0, straggler="") if waits else self.cell

    def folder(self, runs: Path) -> Path:
        """Where it lies."""
        label = "".join(c if c.isalnum() else "-" for c in self.label)
        return runs / self.cell_run.slug / label / f"lr-{self.lr:g}-seed-{self.seed}"

    def command(self, data: Path, out: Path) -> list[str]:
        """What anybody would type."""
        cell = self.cell_run
        options = {
            "data": data,
            "model": cell.model,
            "ranks": cell.ranks,
            "batch_size": cell.batch_size,
            "samples": cell.samples,
            "condition": cell.condition,
            "lr": self.lr,
            "seed": self.seed,
            "evaluations": 1,
            "checkpoints": 0,
            "device": "cpu",
            **CANDIDATES[self.label],
            "out": out,
        }
        words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
        is_shipped = options.get("algorithm", "lasgd") in SHIPPED
        program = ["-m", "lasgd"] if is_shipped else [str(FOLDER / "candidates.py")]
        return [sys.executable, *program, "simulate", *words]


# Running


def run_all(trials: Iterable[Trial], data: Path, runs: Path) -> None:
    """One on each core at a time; those whose folder holds a finished run are done. Says on stdout how each went."""
    waiting: queue.SimpleQueue[Trial] = queue.SimpleQueue()
    for folder, trial in {trial.folder(runs): trial for trial in trials}.items():
        if not is_finished(folder):
            waiting.put(trial)
    if waiting.empty():
        return
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [None] * usable_cores()
    workers = [threading.Thread(target=_work, args=(waiting, data, runs, core)) for core in cores]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


def _work(waiting: queue.SimpleQueue[Trial], data: Path, runs: Path, core: int | None) -> None:
    while True:
        try:
            trial = waiting.get_nowait()
        except queue.Empty:
            return
        folder = trial.folder(runs)
        folder.parent.mkdir(parents=True, exist_ok=True)
        log = folder.with_suffix(".log")
        with open(log, "wb") as output:
            child = subprocess.Popen(
                trial.command(data, folder), stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
            )
            if core is not None:
                os.sched_setaffinity(child.pid, {core})  # before it has started a thread, as those inherit it
            child.wait()
        final = final_of(folder)
        said = "failed" if final is None else f"top-1 {final['top1']:.1%}, loss {final['loss']:.4f}"
        print(f"    {trial.cell.name}: {trial.label}, lr {trial.lr:g}, seed {trial.seed}: {said}", flush=True)


def is_finished(folder: Path) -> bool:
    """It holds a run that came to its end, or that has shown that its learning rate is too high."""
    try:
        run = read_run(folder)
    except ConfigurationError:  # no folder, or one of a run that was cut off
        return False
    return run.status == "finished" or (run.status == "failed" and "NaN or Inf" in (run.error or ""))


def final_of(folder: Path) -> dict[str, Any] | None:
    """top1 and loss of the last exact average; None where the run has failed."""
    try:
        run = read_run(folder)
    except ConfigurationError:
        return None
    return dict(run.final) if run.status == "finished" and run.final else None


# What comes of it


def study(cells: Sequence[Cell], labels: Sequence[str], seeds: Sequence[int], data: Path, runs: Path) -> list[Any]:
    """The grid with the first seed, then all seeds at the best rate. A record for each cell and candidate."""
    first = seeds[0]
    run_all([Trial(c, label, lr, first) for c in cells for lr in GRID for label in labels], data, runs)
    best: dict[tuple[Cell, str], float] = {}
    for cell in cells:
        for label in labels:
            found = {lr: final_of(Trial(cell, label, lr, first).folder(runs)) for lr in GRID}
            losses = {lr: final["loss"] for lr, final in found.items() if final and final["loss"] is not None}
            if losses:
                best[cell, label] = min(losses, key=losses.__getitem__)
    run_all([Trial(*key, lr, seed) for key, lr in best.items() for seed in seeds[1:]], data, runs)
    return [record(cell, label, best.get((cell, label)), seeds, runs) for cell in cells for label in labels]


def record(cell: Cell, label: str, lr: float | None, seeds: Sequence[int], runs: Path) -> dict[str, Any]:
    """What is stored of one candidate in one cell."""
    tried = {f"{each:g}": final_of(Trial(cell, label, each, seeds[0]).folder(runs)) for each in GRID}
    found = [] if lr is None else [final_of(Trial(cell, label, lr, seed).folder(runs)) for seed in seeds]
    staleness = fragments = None
    if lr is not None and final_of(Trial(cell, label, lr, seeds[0]).folder(runs)):
        run = read_run(Trial(cell, label, lr, seeds[0]).folder(runs))
        staleness = statistics.fmean(rank.staleness_steps.mean for rank in run.ranks)
        fragments = run.fragments
    return {
        "cell": asdict(cell),
        "name": cell.name,
        "candidate": label,
        "options": CANDIDATES[label],
        "lr": lr,
        "seeds": list(seeds),
        "top1": [None if final is None else final["top1"] for final in found],
        "loss": [None if final is None else final["loss"] for final in found],
        "grid": tried,
        "staleness_steps": staleness,
        "fragments": fragments,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a part and stores its records."""
    parser = arguments_for("learning", __doc__)
    parser.add_argument("part", choices=tuple(PARTS))
    parser.add_argument("--data", type=Path, required=True, help="CIFAR-10 or tiny-imagenet, folder or archive")
    parser.add_argument("--runs", type=Path, help="where runs are kept, and found again")
    parser.add_argument("--candidates", help="some of them, separated by semicolons; default all")
    parser.add_argument("--cells", help="some of the part's, by number from 0, separated by commas; default all")
    parser.add_argument("--seeds", help="separated by commas; default 0,1,2")
    arguments = parser.parse_args(argv)
    labels = arguments.candidates.split(";") if arguments.candidates else list(CANDIDATES)
    for label in labels:
        if label not in CANDIDATES:
            parser.error(f"--candidates: {label!r} is none of {'; '.join(CANDIDATES)}")
    seeds = tuple(map(int, arguments.seeds.split(","))) if arguments.seeds else SEEDS
    cells = PARTS[arguments.part]
    if arguments.cells:
        try:
            cells = tuple(cells[int(number)] for number in arguments.cells.split(","))
        except (ValueError, IndexError):
            parser.error(f"--cells: expected numbers from 0 to {len(cells) - 1}, got {arguments.cells!r}")
    if arguments.quick:
        cells, labels, seeds = (Cell(samples=2000),), labels[:2], (0,)
    report = Report("learning", run_card({"part": arguments.part, "grid": list(GRID)}, seeds))
    where = where_to_store("learning", arguments)
    with tempfile.TemporaryDirectory() as temporary:
        found = study(cells, labels, seeds, arguments.data, arguments.runs or Path(temporary))
    earlier = _earlier(where)
    kept = {(json.dumps(r["cell"], sort_keys=True), r["candidate"]): r for r in [*earlier, *found]}
    report.figures = {"records": list(kept.values())}
    for bar in bars(report.figures["records"]):
        report.add(bar)
    return report.finish(where)


def _earlier(where: Path | None) -> list[dict[str, Any]]:
    if where is None or not where.exists() or where.parent != RESULTS:
        return []
    return json.loads(where.read_text(encoding="utf-8"))["figures"]["records"]


def mean_top1(records: Iterable[Mapping[str, Any]], cell: Cell, label: str) -> float | None:
    """In per cent, over the seeds; None unless all of them have come to their end."""
    for found in records:
        if found["cell"] == asdict(cell) and found["candidate"] == label:
            values = found["top1"]
            return 100 * statistics.fmean(values) if values and None not in values else None
    return None


UNTUNED = 2.0
"""Points of top-1 that the default may be behind synchronous SGD with the learning rate that this one chooses."""


def bars(records: Sequence[Mapping[str, Any]]) -> list[Bar]:
    """What the default is held to, as far as it has been measured."""
    return [
        _points(records, SCREEN, "the default against blocking local SGD", DEFAULT, "local, H = 10", 0.0),
        _points(records, SCREEN, "the default against full with one fragment", DEFAULT, "full, whole vector", 6.0),
        _points(records, SCREEN, "the default with int8 against synchronous", INT8, "synchronous", -2.0),
        _points(records, SHORT, "the default against synchronous", DEFAULT, "synchronous", -1.0),
        _points(records, LONG, "the default against synchronous", DEFAULT, "synchronous", -1.0),
        _points(records, LONG, "the default with int8 against synchronous", INT8, "synchronous", -0.5),
        _points(records, FAR, "the default against blocking local SGD as rarely", DEFAULT, "local, H = 20", -3.0),
        Bar(f"{FAR.name}: the default learns with the rate that synchronous SGD chooses", _learns_untuned(records)),
        _points(records, HELD, "the default against itself without the straggler", DEFAULT, DEFAULT, 0.0, SCREEN),
        *(_untuned(records, cell) for cell in (SCREEN, TINY, DIGITS)),
    ]


def _points(
    records: Sequence[Mapping[str, Any]],
    cell: Cell,
    what: str,
    label: str,
    other: str,
    at_least: float,
    other_cell: Cell | None = None,
) -> Bar:
    ours, theirs = mean_top1(records, cell, label), mean_top1(records, other_cell or cell, other)
    value = None if ours is None or theirs is None else ours - theirs
    return Bar(f"{cell.name}: {what}", value, at_least=at_least, unit=" points")


def _untuned(records: Sequence[Mapping[str, Any]], cell: Cell) -> Bar:
    ours, theirs = _at_the_reference_rate(records, cell)
    value = None if not ours or not theirs else 100 * ((ours["top1"] or 0.0) - theirs["top1"])
    what = f"{cell.name}: the default with the rate that synchronous SGD chooses, first seed"
    return Bar(what, value, at_least=-UNTUNED, unit=" points")


def _learns_untuned(records: Sequence[Mapping[str, Any]]) -> bool | None:
    """It has neither diverged nor come to no more than guessing."""
    ours, theirs = _at_the_reference_rate(records, FAR)
    return None if theirs is None else ours is not None and (ours["top1"] or 0.0) > 0.5 * theirs["top1"]


def _at_the_reference_rate(
    records: Sequence[Mapping[str, Any]], cell: Cell
) -> tuple[Mapping[str, Any] | None, Mapping[str, Any] | None]:
    """Finals of (the default, synchronous SGD) at its rate, first seed; None where it failed or was not run."""
    found = {record["candidate"]: record for record in records if record["cell"] == asdict(cell)}
    if DEFAULT not in found or "synchronous" not in found or found["synchronous"]["lr"] is None:
        return None, None
    rate = f"{found['synchronous']['lr']:g}"
    return found[DEFAULT]["grid"].get(rate), found["synchronous"]["grid"].get(rate)


if __name__ == "__main__":
    sys.exit(main())
