"""How much of the ranks' pace is left with averaging, over real runs of `lasgd train`.

    a   link=20mbit+step=100ms, 4 ranks, cnn4             nobody waits for a slow link
    b   2 unpadded ranks on two cores, resnet20           and it is not hidden in the padding
    c   straggler=3:4x+step=100ms, 4 ranks, cnn4          nor for a slow rank

Retention is local steps per second with `lasgd` over the same with `independent`, which never communicates, under the
same condition. The runs of a pair follow each other, in turned order from pair to pair. Cell c also runs `lasgd`
without the straggler, for the time per round.

    python benchmarks/retention.py                       all cells, about 15 minutes
    python benchmarks/retention.py --quick --cell b      does it work?
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import Bar, Report, arguments_for, retention_bars, run_card, spread, where_to_store
from lasgd.lab.conditions import parse
from lasgd.training.run_folder import RunRecord, read_run

BATCH_SIZE = 16
WAITED_SHARE = 0.005
PADDING_OVERRUN = 0.02
ROUND_GROWTH = 0.10


@dataclass(frozen=True)
class Cell:
    """One row of the table above."""

    key: str
    model: str
    ranks: int
    condition: str
    step_s: float
    """Expected, of a rank that is no straggler: decides how many samples fill the wanted seconds."""
    retention: float
    held: tuple[int, ...]
    """The ranks whose pace must be kept."""
    without_straggler: str | None = None
    """The condition to compare the time per round with."""
    cores: int | None = None
    """Run on so many cores only."""

    @property
    def is_padded(self) -> bool:
        """Every rank stands for a machine of its own, so each is held to the bar; else they share cores."""
        return parse(self.condition).step_s is not None


CELLS = {
    cell.key: cell
    for cell in (
        Cell("a", "cnn4", 4, "link=20mbit+step=100ms", 0.1, retention=0.97, held=(0, 1, 2, 3)),
        Cell("b", "resnet20", 2, "fast", 0.06, retention=0.90, held=(0, 1), cores=2),
        Cell(
            "c",
            "cnn4",
            4,
            "straggler=3:4x+step=100ms",
            0.1,
            retention=0.97,
            held=(0, 1, 2),
            without_straggler="step=100ms",
        ),
    )
}

Run = tuple[str, str]
"""Algorithm and condition."""


def plan(cell: Cell, repeats: int) -> list[list[Run]]:
    """The runs, in order, one list per repeat; every second one turned round, so that drift hits both alike."""
    runs = [("independent", cell.condition), ("lasgd", cell.condition)]
    if cell.without_straggler:
        runs.append(("lasgd", cell.without_straggler))
    return [runs if repeat % 2 == 0 else runs[::-1] for repeat in range(repeats)]


def samples_for(cell: Cell, algorithm: str, condition: str, seconds: float) -> int:
    """The budget of all ranks together that takes about `seconds`.

    Independent ranks stop each at its own share, so a straggler goes on alone after the others: it may take twice as
    long, and the others' part is as much shorter as that demands.
    """
    parsed = parse(condition)
    step_s = [(parsed.step_s or cell.step_s) * parsed.factor(rank, cell.ranks) for rank in range(cell.ranks)]
    if algorithm == "independent":
        steps = min(seconds / min(step_s), 2 * seconds / max(step_s)) * cell.ranks
    else:
        steps = sum(seconds / s for s in step_s)
    return BATCH_SIZE * max(cell.ranks, math.ceil(steps))


def steps_per_s(run: RunRecord, rank: int) -> float:
    """A rank's local steps over the time in which it was stepping.

    `compute_s` is the sum of its steps' durations, each from boundary to boundary, so it has no gaps: data, merge and
    any wait within the loop are in it. It is the right divisor for independent ranks, of which each stops when its own
    share is done, while `wall_s` is rank 0's. With averaging all ranks step until the agreed end; there `wall_s` is
    taken where it is longer, so that time which no step accounts for counts against the averaging.
    """
    record = run.ranks[rank]
    stepping_s = record.compute_s if run.algorithm == "independent" else max(record.compute_s, run.wall_s)
    return record.local_steps / stepping_s if stepping_s > 0 else math.nan


def retentions(independent: RunRecord, lasgd: RunRecord, ranks: Sequence[int]) -> tuple[float, dict[int, float]]:
    """(of the ranks together, of each rank) for one pair of runs."""
    before = {rank: steps_per_s(independent, rank) for rank in ranks}
    after = {rank: steps_per_s(lasgd, rank) for rank in ranks}
    return sum(after.values()) / sum(before.values()), {rank: after[rank] / before[rank] for rank in ranks}


def s_per_round(run: RunRecord) -> float:
    """Seconds per round."""
    rounds = run.ranks[0].rounds
    return run.wall_s / rounds if rounds else math.nan


def waited_share(run: RunRecord) -> float:
    """The largest share of `wall_s` in which a rank's training thread stood still."""
    return max(record.waited_s for record in run.ranks) / run.wall_s if run.wall_s else math.nan


def judge(cell: Cell, repeats: Sequence[dict[Run, RunRecord]]) -> tuple[dict[str, Any], list[Bar]]:
    """Figures and bars of one cell, from what its runs wrote."""
    independent, lasgd = ("independent", cell.condition), ("lasgd", cell.condition)
    pairs = [retentions(runs[independent], runs[lasgd], cell.held) for runs in repeats]
    of_rank = {rank: statistics.median(each[rank] for _, each in pairs) for rank in cell.held}
    averaged = [run for runs in repeats for (algorithm, _), run in runs.items() if algorithm == "lasgd"]
    everything = [run for runs in repeats for run in runs.values()]
    figures: dict[str, Any] = {
        "condition": cell.condition,
        "model": cell.model,
        "ranks": cell.ranks,
        "retention": spread([together for together, _ in pairs]),
        "retention_of_rank": of_rank,
        "steps_per_s": {
            run[0]: [[steps_per_s(runs[run], rank) for rank in range(cell.ranks)] for runs in repeats]
            for run in (independent, lasgd)
        },
        "s_per_round": spread([s_per_round(runs[lasgd]) for runs in repeats]),
        "staleness_steps": [[r.staleness_steps.mean for r in runs[lasgd].ranks] for runs in repeats],
        "fragments": [runs[lasgd].fragments for runs in repeats],
        "waited_share": max(waited_share(run) for run in averaged),
        "padding_overrun": max(run.padding_overrun for run in everything),
        "link_emulation": sorted({run.link_emulation for run in everything}),
    }
    name = f"{cell.key}: {cell.condition}, {cell.ranks} ranks, {cell.model}"
    bars = retention_bars(f"{name}: retention", figures["retention"], cell.retention)
    if cell.is_padded:
        bars.append(Bar(f"{name}: retention of the slowest held rank", min(of_rank.values()), at_least=cell.retention))
        bars.append(
            Bar(f"{name}: steps that outlast their padding", figures["padding_overrun"], at_most=PADDING_OVERRUN)
        )
    if cell.without_straggler:
        other = ("lasgd", cell.without_straggler)
        growth = [s_per_round(runs[lasgd]) / s_per_round(runs[other]) - 1 for runs in repeats]
        figures["round_growth"] = spread(growth)
        what, among = f"{name}: growth of the time per round", (min(growth), max(growth))
        bars.append(Bar(what, statistics.median(growth), at_most=ROUND_GROWTH, among=among))
    bars.append(Bar(f"{name}: waited_s / wall_s, worst rank and run", figures["waited_share"], at_most=WAITED_SHARE))
    identical = all(run.replicas_identical is True for run in averaged)
    bars.append(Bar(f"{name}: replicas identical at the end", identical))
    return figures, bars


def train(cell: Cell, run: Run, seconds: float, data: Path, seed: int, out: Path) -> RunRecord:
    """One real run; returns what it wrote. Raises SystemExit with the end of its output if it fails."""
    algorithm, condition = run
    options = {
        "data": data,
        "model": cell.model,
        "algorithm": algorithm,
        "ranks": cell.ranks,
        "batch-size": BATCH_SIZE,
        "samples": samples_for(cell, algorithm, condition, seconds),
        "condition": condition,
        "lr": 0.01,
        "seed": seed,
        "evaluations": 0,
        "checkpoints": 0,
        "device": "cpu",
        "out": out,
    }
    command = [sys.executable, "-m", "lasgd", "train", *(f"--{key}={value}" for key, value in options.items())]
    ended = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300 + 10 * seconds
    )
    if ended.returncode != 0:
        raise SystemExit(
            f"cell {cell.key}: {algorithm} at {condition} ended with {ended.returncode}:\n{ended.stdout[-4000:]}"
        )
    record = read_run(out)
    if record.status != "finished":
        raise SystemExit(f"cell {cell.key}: {algorithm} at {condition} is {record.status}: {record.error}")
    return record


def make_images(folder: Path, per_class: int = 64, classes: int = 10, size: int = 32) -> Path:
    """Random-noise JPEGs in ImageNet layout: the benchmark needs images to decode, not images to learn."""
    import numpy as np
    from PIL import Image

    generator = np.random.default_rng(0)
    for part, count in (("train", per_class), ("val", 4)):
        for label in range(classes):
            here = folder / part / f"class{label}"
            here.mkdir(parents=True)
            for index in range(count):
                pixels = generator.integers(0, 256, (size, size, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(here / f"{index:04}.jpg", quality=90)
    return folder


@contextlib.contextmanager
def only_cores(count: int | None) -> Iterator[None]:
    """This process and those it starts run on at most `count` of its cores, where the system can arrange it."""
    if count is None or not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[:count])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def measure(
    cell: Cell, repeats: int, seconds: float, data: Path, seed: int, folder: Path
) -> list[dict[Run, RunRecord]]:
    """All runs of one cell."""
    done = []
    with only_cores(cell.cores):
        for number, runs in enumerate(plan(cell, repeats)):
            records = {}
            for algorithm, condition in runs:
                out = folder / f"{cell.key}-{number}-{len(records)}"
                record = train(cell, (algorithm, condition), seconds, data, seed + number, out)
                records[algorithm, condition] = record
                rates = ", ".join(f"{steps_per_s(record, rank):.2f}" for rank in range(cell.ranks))
                print(
                    f"cell {cell.key}, pair {number + 1} of {repeats}: {algorithm:11} {condition}: {rates} steps/s",
                    flush=True,
                )
            done.append(records)
    return done


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the chosen cells; returns the exit code."""
    parser = arguments_for("retention", __doc__)
    parser.add_argument("--cell", type=_cells, default=tuple(CELLS), help="some of a,b,c; default all")
    parser.add_argument("--repeats", type=int, help="pairs of runs per cell; default 3")
    parser.add_argument("--seconds", type=float, help="length of a run; default 30")
    parser.add_argument("--data", type=Path, help="a folder or archive of 32x32 images; default: random noise")
    arguments = parser.parse_args(argv)
    repeats = arguments.repeats or (1 if arguments.quick else 3)
    seconds = arguments.seconds or (5.0 if arguments.quick else 30.0)
    settings = {
        "quick": arguments.quick,
        "cells": list(arguments.cell),
        "repeats": repeats,
        "seconds": seconds,
        "batch_size": BATCH_SIZE,
        "data": arguments.data.name if arguments.data else "random noise, 32x32 JPEG, 10 classes",
    }
    report = Report("retention", run_card(settings, [arguments.seed + number for number in range(repeats)]))
    with tempfile.TemporaryDirectory(prefix="lasgd-retention-") as name:
        folder = Path(name)
        data = arguments.data or make_images(folder / "data")
        for key in arguments.cell:
            cell = CELLS[key]
            figures, bars = judge(cell, measure(cell, repeats, seconds, data, arguments.seed, folder))
            report.figures[key] = figures
            for bar in bars:
                report.add(bar)
    return report.finish(where_to_store("retention", arguments, set(arguments.cell) == set(CELLS)))


def _cells(text: str) -> tuple[str, ...]:
    keys = tuple(dict.fromkeys(text.split(",")))
    if unknown := [key for key in keys if key not in CELLS]:
        raise argparse.ArgumentTypeError(f"cell {unknown[0]!r} is not known; known: {', '.join(CELLS)}")
    return keys


if __name__ == "__main__":
    sys.exit(main())
