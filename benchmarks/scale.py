"""What a large virtual cluster costs: time and memory of runs of LASGD without gradients.

    a   link=20mbit+step=100ms             10,000 ranks x 1,000 local steps <= 60 s, and <= 4 GB
    b   step=100ms, links cost nothing     a round in every local step, the most there can be
    c   the same, log-normal step times    besides, hardly two ranks act at the same moment: the dearest of all

and how the cost grows with ranks x local steps: seconds / (n log2 n) at the largest size over the least of all smaller
ones that take long enough to be timed. A heap of n things costs n log n; a machine's caches, which hold the state of a
hundred ranks and not that of ten thousand, are what the bar leaves room for.

Every size is run in a fresh process, on one core. Seconds are of that process's CPU time and of the clock on the wall.

    python benchmarks/scale.py              about 8 minutes on one free core; draws docs/images/scale.svg
    python benchmarks/scale.py --quick      small sizes: does it work?
    python benchmarks/scale.py --draw       draw again from the stored result
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from common import RESULTS, Bar, Report, arguments_for, run_card, where_to_store
from drawing import BLUE, GREEN, GREY, IMAGES, PURPLE, pyplot, save

SECONDS, BYTES, GROWTH = 60.0, 4e9, 1.5
FULL = (10_000, 1_000)
RANKS_AT_100_STEPS = (100, 300, 1_000, 3_000, 10_000)
STEPS_AT_1000_RANKS = (30, 300, 1_000, 3_000)
TIMED_S = 0.2
"""A run that takes less is no yardstick: a single disturbance doubles its time."""
REPEAT_WITHIN_S = 3.0
"""Runs shorter than this are repeated, and the shortest counts: nothing makes a run faster than it is."""
ELEMENTS = 391_466  # of cnn4
BATCH_SIZE = 32
FIGURE = IMAGES / "scale.svg"


@dataclass(frozen=True)
class Cell:
    """Conditions of the virtual cluster."""

    compute: str
    network: str
    name: str
    color: str


CELLS = {
    "a": Cell("100ms", "20mbit", "link=20mbit+step=100ms", BLUE),
    "b": Cell("100ms", "fast", "step=100ms, links cost nothing", GREEN),
    "c": Cell("lognormal=100ms,sigma=0.2", "fast", "log-normal steps, links cost nothing", PURPLE),
}


def measure(cell: Cell, ranks: int, steps: int, seed: int) -> dict[str, Any]:
    """Runs it in this process; repeated where it is short."""
    from lasgd.algorithms import registry
    from lasgd.lab.compute_text import parse_compute
    from lasgd.lab.network_text import parse_network
    from lasgd.lab.simulation import Plan, simulated
    from lasgd.virtual.timing_replica import Vector

    def run(ranks: int, steps: int) -> dict[str, Any]:
        compute, network = parse_compute(cell.compute, ranks, seed), parse_network(cell.network, ranks)
        samples = ranks * BATCH_SIZE * steps
        plan = Plan(registry.find("lasgd"), ranks, compute, network, Vector(ELEMENTS), samples, BATCH_SIZE)
        cpu_s, wall_s = time.process_time(), time.perf_counter()
        outcome = simulated(plan)
        cpu_s, wall_s = time.process_time() - cpu_s, time.perf_counter() - wall_s
        return {
            "ranks": ranks,
            "steps": steps,
            "local_steps": sum(rank.tally.local_steps for rank in outcome.ranks),
            "rounds": outcome.rounds,
            "virtual_s": outcome.virtual_s,
            "cpu_s": cpu_s,
            "wall_s": wall_s,
        }

    run(10, 100)
    done = [run(ranks, steps)]
    while sum(each["wall_s"] for each in done) + done[-1]["wall_s"] < REPEAT_WITHIN_S:
        done.append(run(ranks, steps))
    unit = 1 if sys.platform == "darwin" else 1024
    peak_bytes = unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return min(done, key=lambda each: each["cpu_s"]) | {"peak_bytes": peak_bytes}


def in_a_fresh_process(key: str, ranks: int, steps: int, seed: int) -> dict[str, Any]:
    """`measure`, elsewhere. Raises SystemExit with its output if it fails."""
    command = [sys.executable, __file__, f"--one={key},{ranks},{steps}", f"--seed={seed}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, capture_output=True, text=True, timeout=3600, env=environment)
    if ended.returncode != 0:
        raise SystemExit(f"{ranks} ranks x {steps} steps ended with {ended.returncode}:\n{ended.stderr[-4000:]}")
    size = json.loads(ended.stdout.splitlines()[-1])
    print(
        f"{key}: {ranks:6} ranks x {steps:5} steps: {size['cpu_s']:7.2f} s of a core, {size['wall_s']:7.2f} s, "
        f"{size['peak_bytes'] / 1e6:5.0f} MB",
        flush=True,
    )
    return size


def cost(size: dict[str, Any]) -> float:
    """Seconds over n log2 n, with n the local steps of all ranks."""
    n = size["local_steps"]
    return size["cpu_s"] / (n * math.log2(n))


def growth(sizes: Sequence[dict[str, Any]]) -> float | None:
    """Cost of the largest size over the least of the smaller ones that can be timed; None where there is none.

    The least, because whatever disturbs a small one makes it dearer and would hide growth.
    """
    *smaller, largest = sorted(sizes, key=lambda size: size["local_steps"])
    costs = [cost(size) for size in smaller if size["cpu_s"] >= TIMED_S]
    return cost(largest) / min(costs) if costs else None


def plan(is_quick: bool) -> list[tuple[int, int]]:
    """(ranks, local steps of each), from small to large."""
    if is_quick:
        return [(100, 100), (300, 100), (1_000, 100)]
    sizes = [(ranks, 100) for ranks in RANKS_AT_100_STEPS]
    sizes += [(1_000, steps) for steps in STEPS_AT_1000_RANKS]
    return [*sorted(sizes, key=math.prod), FULL]


def judge(sizes: dict[str, list[dict[str, Any]]]) -> tuple[list[Bar], list[str]]:
    """The bars, and what is said of the cells that have none on their time."""
    bars = []
    name, largest = CELLS["a"].name, sizes["a"][-1]
    of = f"{largest['ranks']:,} ranks x {largest['steps']:,} local steps"
    bars.append(Bar(f"{name}, {of}: time of one core", largest["cpu_s"], at_most=SECONDS, unit=" s"))
    bars.append(Bar(f"{name}, {of}: time on the wall", largest["wall_s"], at_most=SECONDS, unit=" s"))
    for key, done in sizes.items():
        peak_gb = done[-1]["peak_bytes"] / 1e9
        bars.append(Bar(f"{CELLS[key].name}, {of}: peak memory", peak_gb, at_most=BYTES / 1e9, unit=" GB"))
        bars.append(Bar(f"{CELLS[key].name}: growth of seconds / (n log n)", growth(done), at_most=GROWTH))
    others = [
        f"{CELLS[key].name}: {done[-1]['cpu_s']:.0f} s of one core, {done[-1]['rounds']:,} rounds"
        for key, done in sizes.items()
        if key != "a"
    ]
    return bars, [
        f"The same {of} under conditions that no bar on time is held to, for how many rounds there are: "
        + "; ".join(others)
        + f". (With {name} there are {largest['rounds']:,}.)"
    ]


def draw(result: dict[str, Any]) -> None:
    """Seconds, and seconds over n log n, against ranks x steps."""
    plt = pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.3), width_ratios=(1.15, 1))
    for key, sizes in result["figures"]["sizes"].items():
        for series, style in (("steps", "o-"), ("ranks", "o:")):
            shown = [size for size in sizes if size[series] == {"steps": 100, "ranks": 1_000}[series]] + sizes[-1:]
            n, color = [size["local_steps"] for size in shown], CELLS[key].color
            left.plot(n, [size["cpu_s"] for size in shown], style, color=color)
            right.plot(n, [cost(size) * 1e9 for size in shown], style, color=color)
    for axes in (left, right):
        axes.set_xscale("log")
        axes.set_xlabel("n = local steps of all ranks")
        axes.grid(axis="y")
    left.set_yscale("log")
    left.axhline(SECONDS, color=GREY, linewidth=1, linestyle=(0, (4, 3)))
    left.text(left.get_xlim()[0], SECONDS * 1.15, " 60 s", va="bottom", fontsize=9)
    left.set_title("seconds of one core", loc="left")
    right.set_title("nanoseconds / (n log₂ n)", loc="left")
    right.set_ylim(0, None)
    left.plot([], [], "-", color=GREY, label="100 steps each, more ranks")
    left.plot([], [], ":", color=GREY, label="1,000 ranks, more steps")
    left.legend(loc="lower right", frameon=False, labelcolor=GREY, fontsize=8.5)
    figure.legend(
        handles=[plt.Line2D([], [], color=cell.color, marker="o", label=cell.name) for cell in CELLS.values()],
        loc="upper center", ncols=3, frameon=False, labelcolor="linecolor", bbox_to_anchor=(0.5, 1.02), fontsize=8.5,
    )  # fmt: skip
    figure.tight_layout(rect=(0, 0, 1, 0.94))
    save(figure, FIGURE, result["figures"])


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, judges, stores and draws; returns the exit code."""
    parser = arguments_for("scale", __doc__)
    parser.add_argument("--draw", action="store_true", help="draw again from the stored result")
    parser.add_argument("--one", type=_one, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.one:
        key, ranks, steps = arguments.one
        print(json.dumps(measure(CELLS[key], ranks, steps, arguments.seed)))
        return 0
    if arguments.draw:
        draw(json.loads((RESULTS / "scale.json").read_text(encoding="utf-8")))
        return 0
    settings = {
        "quick": arguments.quick,
        "vector": f"{ELEMENTS:,} float32",
        "batch_size": BATCH_SIZE,
        "fragments": "auto",
        "all-reduce": "ring",
    }
    report = Report("scale", run_card(settings, [arguments.seed]))
    sizes = {key: [in_a_fresh_process(key, *size, arguments.seed) for size in plan(arguments.quick)] for key in CELLS}
    report.figures["sizes"] = sizes
    bars, report.notes = judge(sizes)
    for bar in bars:
        report.add(bar)
    store = where_to_store("scale", arguments)
    code = report.finish(store)
    if store is not None and not arguments.quick:
        draw(report.as_json())
    return code


def _one(text: str) -> tuple[str, int, int]:
    key, ranks, steps = text.split(",")
    return key, int(ranks), int(steps)


if __name__ == "__main__":
    sys.exit(main())
