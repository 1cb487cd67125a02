"""How much does a rank's drift grow where no rank runs away, and what is it worth to find one that does?

    python benchmarks/runaway.py --data cifar10.tar.xz
    python benchmarks/runaway.py --quick      does it work?

A rank sits out when its drift per local step is GROWTH times what it was (src/lasgd/health.py). Here that growth is
noted in runs that come to their end without that: the digits and CIFAR-10, two models, small batches, fast and slow
networks, a straggler, and the transformer of characters.py with SGD and AdamW. A rank that sits out loses the local
steps of a cycle. Where one does, the run is done again without the watch, to see whether that was for nothing.

Last comes a run that diverges without it.
"""

from __future__ import annotations

import contextlib
import io
import math
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, ClassVar

import torch

import lasgd.replica
from characters import CLUSTERS, SAMPLES, Language, Run, said, trained
from common import Bar, Report, arguments_for, run_card, where_to_store
from lasgd.cli.app import main as command
from lasgd.health import GROWTH, DriftWatch
from lasgd.lab.cores import usable_cores
from lasgd.training.run_folder import read_run

DEFAULT = "momentum shared out"
WORSE = 1.01
"""Of a loss over that without the watch: what is not more is no loss."""
STEP = "step=100ms"
NETWORKS = {
    "fast": f"{STEP}+round=50ms",
    "delay 10": f"{STEP}+round=1s",
    "delay 10, straggler": f"{STEP}+round=1s+straggler=last:4x",
}
RATES = {"sgd": 0.8, "adamw": 1.6e-2}
"""Of characters.py: those that synchronous SGD learns best with, results/characters.json."""
RUNAWAY = Run("sgd", RATES["sgd"], DEFAULT, "delay 10, straggler last:4x", seed=5, samples=SAMPLES)
"""In which one rank runs away at the end of the warm-up."""


class Watches(DriftWatch):
    """All that have been made in this process."""

    made: ClassVar[list[Watches]] = []

    def __init__(self) -> None:
        super().__init__()
        self.found = 0
        self.made.append(self)

    def grew_too_much(self, fragment: int, drift: float, local_steps: int) -> bool:
        """Counts what it finds."""
        found = super().grew_too_much(fragment, drift, local_steps)
        self.found += found
        return found


class Blind(DriftWatch):
    """Finds nothing."""

    def grew_too_much(self, fragment: int, drift: float, local_steps: int) -> bool:
        """Never."""
        return False


@dataclass(frozen=True)
class Cell:
    """One run of `lasgd simulate`."""

    data: str
    network: str
    model: str = "cnn4"
    batch_size: int = 16
    lr: float = 0.05
    samples: int = 20_000

    @property
    def name(self) -> str:
        """In words."""
        return f"{Path(self.data).name.partition('.')[0]}, {self.model}, batches of {self.batch_size}, {self.network}"


@dataclass(frozen=True)
class Growth:
    """Of one run."""

    run: str
    loss: float | None
    """Final, held out; None where it diverged."""
    growth: float
    """The largest of a drift that was not too much."""
    found: int
    """Times that a rank sat out for its drift."""
    blind: float | None = None
    """The loss without the watch, where it had found something."""

    @property
    def is_worse(self) -> bool:
        """Sitting out has done harm."""
        if not self.found or self.blind is None:
            return False
        return self.loss is None or self.loss > WORSE * self.blind


def watched(work: Cell | Run) -> Growth:
    """Runs one, in a process that may be used for others after it."""
    torch.set_num_threads(1)  # an evaluation before this has taken all cores
    Watches.made.clear()
    lasgd.replica.DriftWatch = Watches
    loss = loss_of_run(work)
    growth = max((watch.largest_growth for watch in Watches.made), default=math.nan)
    found, blind = sum(watch.found for watch in Watches.made), None
    if found:
        lasgd.replica.DriftWatch = Blind
        blind = loss_of_run(work)
    return Growth(name_of(work), loss, growth, found, blind)


def loss_of_run(work: Cell | Run) -> float | None:
    """On held-out data, of the final mean; None where it diverged."""
    return simulated(work) if isinstance(work, Cell) else trained(Language.of_seed(0), work)


def name_of(work: Cell | Run) -> str:
    """In words."""
    if isinstance(work, Cell):
        return work.name
    return f"characters, {work.optimizer}, {work.cluster}, {work.samples:,} samples, seed {work.seed}"


def simulated(cell: Cell) -> float:
    """Its final loss. Raises RuntimeError with what the command said."""
    with tempfile.TemporaryDirectory() as folder:
        out, told = Path(folder) / "run", io.StringIO()
        words = ["simulate", "--data", cell.data, "--model", cell.model, "--ranks", "4"]
        words += ["--batch-size", str(cell.batch_size), "--samples", str(cell.samples), "--lr", str(cell.lr)]
        words += ["--condition", NETWORKS[cell.network], "--evaluations", "1", "--checkpoints", "0"]
        words += ["--device", "cpu", "--out", str(out)]
        with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
            code = command(words)
        if code:
            raise RuntimeError(f"{cell.name}: {told.getvalue()}")
        final = read_run(out).final
        assert final is not None
        return final.loss


def cells(data: Sequence[str], quick: bool) -> list[Cell | Run]:
    """Everything that is watched."""
    if quick:
        return [Cell("digits", "delay 10", samples=2000), Run("adamw", RATES["adamw"], DEFAULT, "delay 1", 0, 2000)]
    found: list[Cell | Run] = [Cell(each, network) for each in data for network in NETWORKS]
    found += [Cell(each, "delay 10", batch_size=4) for each in data]
    found += [Cell(each, "fast", model="resnet20", samples=5000) for each in data]
    found += [
        Run(optimizer, lr, DEFAULT, cluster, 0, 20_000) for optimizer, lr in RATES.items() for cluster in CLUSTERS
    ]
    return found


def table(records: Sequence[Growth]) -> str:
    """One line for each run that was watched."""
    lines = ["| run | largest growth | sat out | loss | without the watch |", "|---|---|---|---|---|"]
    for each in records:
        blind = said(each.blind) if each.found else ""
        lines.append(f"| {each.run} | {each.growth:.2f} | {each.found} | {said(each.loss)} | {blind} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs all of them and stores the growths."""
    parser = arguments_for("runaway", __doc__)
    parser.add_argument("--data", help="CIFAR-10, an archive or a folder; without it the digits alone")
    arguments = parser.parse_args(argv)
    works = cells(["digits", *([arguments.data] if arguments.data else [])], arguments.quick)
    works += [] if arguments.quick else [RUNAWAY]
    settings: dict[str, Any] = {"quick": arguments.quick, "growth": GROWTH, "ranks": 4}
    report = Report("runaway", run_card(settings, [0, RUNAWAY.seed]))
    records = []
    with ProcessPoolExecutor(usable_cores(), get_context("spawn")) as pool:
        for growth in pool.map(watched, works):
            records.append(growth)
            print(f"    {table([growth]).splitlines()[-1]}", flush=True)
    report.figures = {"growth": [vars(growth) for growth in records]}
    sat_out = [growth for growth in records if growth.found]
    report.add(Bar("runs that learn less because a rank sat out", sum(each.is_worse for each in sat_out), at_most=0))
    if not arguments.quick:
        report.add(Bar("the run that diverges without the watch comes to its end", records[-1].loss is not None))
    report.notes = [table(records)]
    return report.finish(where_to_store("runaway", arguments, bool(arguments.data)))


if __name__ == "__main__":
    sys.exit(main())
