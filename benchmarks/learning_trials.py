"""What learning.py puts to the test: cells, candidates, and the runs that try one in the other."""

from __future__ import annotations

import json
import os
import queue
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from common import FOLDER
from lasgd.algorithms import registry
from lasgd.errors import ConfigurationError, DataError
from lasgd.lab.cores import usable_cores
from lasgd.training.data import open_data
from lasgd.training.run_folder import RunRecord, read_run

SHIPPED = frozenset(registry.names())
STEP_S = 0.1
CLASSES_AND_SIZE = {"cifar10": (10, 32), "tiny-imagenet-20": (20, 64), "digits": (10, 8)}
"""Of each data set: how many classes, and pixels a side."""


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


SCREEN = Cell()
"""The prototype's setting: what is known of the candidates before is known of this one."""
SHORT = Cell(delay=1.0, samples=20_000)
FAST = Cell(delay=0.5)
FAR = Cell(ranks=16, delay=20.0)
HELD = Cell(straggler="last:4x")
ALIKE = Cell(ranks=8, samples=120_000)
"""With eight ranks as many local steps each as with four."""
LONG = Cell(samples=600_000)
TINY = Cell(data="tiny-imagenet-20", batch_size=8, samples=30_000)
DIGITS = Cell(data="digits", samples=20_000)
PARTS: dict[str, tuple[Cell, ...]] = {
    "screen": (SCREEN,),
    "short": (SHORT, FAST),
    "delay": tuple(Cell(delay=delay) for delay in (1.0, 5.0, 10.0, 20.0, 50.0)),
    "ranks": (Cell(ranks=8), Cell(ranks=8, delay=20.0), Cell(ranks=16), FAR, ALIKE, Cell(ranks=8, delay=1.0)),
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
    "adaptive gain of the latest round, whole vector": {"algorithm": "adaptive_gain_of_latest", "fragments": 1},
    "adaptive gain by tensor, whole vector": {"algorithm": "adaptive_gain_by_tensor", "fragments": 1},
    "learnt meanwhile dropped, whole vector": {"algorithm": "dropped", "fragments": 1},
    "learnt meanwhile dropped": {"algorithm": "dropped"},
    "momentum cleared, whole vector": {"algorithm": "cleared", "fragments": 1},
    "momentum scaled by the gain, whole vector": {"algorithm": "momentum_scaled", "fragments": 1},
    "momentum projected, whole vector": {"algorithm": "momentum_projected", "fragments": 1},
    "momentum projected": {"algorithm": "momentum_projected"},
    "momentum averaged": {"algorithm": "momentum_averaged", "bytes": 2},
    "weighted by steps": {"algorithm": "weighted_steps"},
    "weighted by gradient": {"algorithm": "weighted_gradient"},
    "by drift, 10 fragments": {"algorithm": "by_drift", "fragments": 10},
    "by layer": {"algorithm": "by_layer", "fragments": 10},
    "interleaved, 10 fragments": {"algorithm": "interleaved", "fragments": 10},
    "full, waiting first": {"algorithm": "waits_first", "outer_momentum": 0},
    f"{DEFAULT}, waiting first": {"algorithm": "waits_first", "outer_momentum": 0.8, "momentum": 0.5},
    f"{DEFAULT}, mean of ten cycles": {"algorithm": "remembered_mean", "outer_momentum": 0.8, "momentum": 0.5},
}
"""Options of `lasgd simulate` by label, and as `bytes` how many times the whole vector travels. Where momentum is in
both places, (1 - beta)(1 - mu) is 0.1 as with 0.9 in one: so the same learning rate moves the mean as far."""


def check_data(data: Path, cells: Iterable[Cell]) -> None:
    """Raises DataError where it cannot be opened, or is not what the cells are about."""
    opened = open_data(str(data))
    found = len(opened.classes), opened.image_size
    for name in dict.fromkeys(cell.data for cell in cells):
        if found != CLASSES_AND_SIZE[name]:
            classes, size = CLASSES_AND_SIZE[name]
            raise DataError(
                f"{data}: expected {name}, which has {classes} classes and images of {size} pixels a side; "
                f"found {found[0]} classes and {found[1]} pixels."
            )


@dataclass(frozen=True)
class Trial:
    """A run of `lasgd simulate`, as anybody would type it."""

    cell: Cell
    label: str
    lr: float
    seed: int

    @property
    def options(self) -> dict[str, Any]:
        """The candidate's own."""
        return CANDIDATES[self.label]

    @property
    def waits(self) -> bool:
        """Its ranks wait for each other, so that they learn the same however long messages and stragglers take."""
        name = self.options.get("algorithm", "lasgd")
        return name in SHIPPED and registry.find(name).is_synchronous

    @property
    def cell_run(self) -> Cell:
        """One run of those who wait stands for all delays and stragglers."""
        return replace(self.cell, delay=1.0, straggler="") if self.waits else self.cell

    @property
    def key(self) -> str:
        """What is run: trials of one key are one run."""
        return json.dumps([asdict(self.cell_run), self.options, self.lr, self.seed], sort_keys=True)

    @property
    def name(self) -> str:
        """In words."""
        return f"{self.cell_run.name}: {self.label}, lr {self.lr:g}, seed {self.seed}"

    def command(self, data: Path, out: Path) -> list[str]:
        """What anybody would type."""
        options = dict(self.options)
        cell = replace(self.cell_run, delay=self.cell_run.delay * options.pop("bytes", 1))
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
            **options,
            "out": out,
        }
        words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
        is_shipped = options.get("algorithm", "lasgd") in SHIPPED
        program = ["-m", "lasgd"] if is_shipped else [str(FOLDER / "candidates.py")]
        return [sys.executable, *program, "simulate", *words]


@dataclass(frozen=True)
class Outcome:
    """What is kept of a trial that has come to its end, or has shown that its learning rate is too high."""

    top1: float | None = None
    """Of the last exact average; None, as all else, where the run diverged."""
    loss: float | None = None
    staleness_steps: float | None = None
    """Mean over merges and ranks."""
    fragments: int | None = None
    """At the end."""
    commit: str | None = None
    """Of lasgd, when it was run."""

    @classmethod
    def of(cls, run: RunRecord, commit: str | None) -> Outcome:
        """Raises ValueError where the run says nothing of its learning rate."""
        if run.status == "failed" and "NaN or Inf" in (run.error or ""):
            return cls(commit=commit)
        if run.status != "finished" or run.final is None:
            raise ValueError(run.error or f"it is {run.status}")
        staleness = [rank.staleness_steps.mean for rank in run.ranks if rank.staleness_steps.mean is not None]
        return cls(
            run.final.top1, run.final.loss, statistics.fmean(staleness) if staleness else None, run.fragments, commit
        )

    @property
    def text(self) -> str:
        """In words."""
        return "diverges" if self.loss is None else f"top-1 {self.top1:.1%}, loss {self.loss:.4f}"


Trials = dict[str, tuple[Trial, Outcome]]
"""What is known, by `Trial.key`."""


def stored(trials: Trials) -> list[dict[str, Any]]:
    """As it lies in the JSON, in an order that does not depend on that of the runs."""
    rows = [
        {
            "cell": asdict(t.cell_run),
            "candidate": t.label,
            "options": t.options,
            "lr": t.lr,
            "seed": t.seed,
            **asdict(o),
        }
        for t, o in trials.values()
    ]
    return sorted(rows, key=lambda row: json.dumps([row["cell"], row["candidate"], row["lr"], row["seed"]]))


def restored(rows: Iterable[Mapping[str, Any]]) -> Trials:
    """Of those whose candidate is still one, under whatever name: what it does is what counts."""
    labels = {json.dumps(options, sort_keys=True): label for label, options in CANDIDATES.items()}
    found: Trials = {}
    for row in rows:
        label = labels.get(json.dumps(row["options"], sort_keys=True))
        if label is not None:
            trial = Trial(Cell(**row["cell"]), label, row["lr"], row["seed"])
            found[trial.key] = trial, Outcome(**{name: row[name] for name in Outcome.__dataclass_fields__})
    return found


def run_all(trials: Sequence[Trial], data: Path, commit: str | None) -> Iterator[tuple[Trial, Outcome]]:
    """One on each core at a time. Each as it ends; those that fail are said on stdout and left out."""
    waiting: queue.SimpleQueue[Trial] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[Trial, Outcome | str]] = queue.SimpleQueue()
    for trial in {trial.key: trial for trial in trials}.values():
        waiting.put(trial)
    count, stop = waiting.qsize(), threading.Event()
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [None] * usable_cores()
    workers = [threading.Thread(target=_work, args=(waiting, done, stop, data, commit, core)) for core in cores]
    for worker in workers:
        worker.start()
    try:
        for number in range(count):
            trial, outcome = done.get()
            said = outcome.text if isinstance(outcome, Outcome) else f"NO RESULT: {outcome}"
            print(f"    {number + 1} of {count}: {trial.name}: {said}", flush=True)
            if isinstance(outcome, Outcome):
                yield trial, outcome
    finally:
        stop.set()  # what runs is run to its end, or to that which Ctrl-C, which it gets as well, gives it
        for worker in workers:
            worker.join()


def _work(
    waiting: queue.SimpleQueue[Trial],
    done: queue.SimpleQueue[tuple[Trial, Outcome | str]],
    stop: threading.Event,
    data: Path,
    commit: str | None,
    core: int | None,
) -> None:
    while not stop.is_set():
        try:
            trial = waiting.get_nowait()
        except queue.Empty:
            return
        with tempfile.TemporaryDirectory() as temporary:
            out, log = Path(temporary, "run"), Path(temporary, "log")
            with open(log, "wb") as output:
                child = subprocess.Popen(
                    trial.command(data, out), stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
                )
                if core is not None:
                    os.sched_setaffinity(child.pid, {core})  # before it has started a thread, as those inherit it
                child.wait()
            try:
                outcome: Outcome | str = Outcome.of(read_run(out), commit)
            except ConfigurationError:  # it has not come so far as to write one
                outcome = (log.read_text(errors="replace").strip().splitlines() or ["no output"])[-1]
            except ValueError as error:
                outcome = str(error)
        done.put((trial, outcome))
