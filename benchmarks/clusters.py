"""What the virtual cluster says of the algorithms: who loses how much time where, and what never waiting costs.

    ranks        4 to 10,000 ranks on slow, ordinary and fast links
    stragglers   one slow rank among 16, up to 16 times slower
    crossover    how long a round may take until synchronous SGD loses 5 % of its steps to waiting

All without gradients, for the times of ResNet-50 (25.6 million parameters, 102 MB; 0.2 s a local step). Retention is
local steps per second of all ranks together, over the same without any communication. Each all-reduce is by the method
that is fastest for its bytes and ranks on these links, as MPI libraries choose; its bytes include the header of 80
bytes a rank. LASGD's fragments are those at which `auto` settles when delays are the network's.

    python benchmarks/clusters.py              about 5 minutes on one free core; draws docs/images/*.svg
    python benchmarks/clusters.py --quick      few ranks: does it work?
    python benchmarks/clusters.py --draw       draw again from the stored result
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import RESULTS, Bar, Report, arguments_for, run_card, where_to_store
from drawing import BLUE, GREEN, IMAGES, ORANGE, PURPLE, pyplot, save
from lasgd.algorithms import registry
from lasgd.lab.simulation import Plan, Simulated, simulated
from lasgd.pace import Column, Delay
from lasgd.virtual.buckets import Buckets
from lasgd.virtual.compute_models import ComputeModel, Constant, LogNormal, Stragglers
from lasgd.virtual.network_models import Network
from lasgd.virtual.timing_replica import Vector

VECTOR = Vector(25_557_032)  # ResNet-50's parameters, float32
STEP_S, SIGMA = 0.2, 0.05
HEADER_BYTES = 8 * len(Column)
"""Of each rank, in every round."""
METHODS = ("ring", "halving_doubling")
"""On equal links a tree is never faster than both."""
LEAST_STEPS, LEAST_ROUNDS = 40, 3
DRIFTING_STEPS = 200
"""Of LASGD's runs: ranks begin together, a straggler late, and staleness is another once they have drifted apart."""


@dataclass(frozen=True)
class Links:
    """Equal links of all ranks."""

    name: str
    bytes_per_s: float
    latency_s: float

    def between(self, ranks: int) -> Network:
        """The network."""
        return Network(ranks, self.bytes_per_s, latency_s=self.latency_s)


@dataclass(frozen=True)
class Line:
    """An algorithm, and how the figures show it."""

    name: str
    algorithm: str
    steps_per_round: int
    color: str
    mark: str


LINKS = (
    Links("20 Mbit/s, 5 ms", 2.5e6, 5e-3),
    Links("1 Gbit/s, 0.2 ms", 1.25e8, 2e-4),
    Links("25 Gbit/s, 20 µs", 3.125e9, 2e-5),
)
LINES = (
    Line("lasgd", "lasgd", 1, BLUE, "o"),
    Line("local_sgd, H = 100", "local_sgd", 100, GREEN, "s"),
    Line("local_sgd, H = 10", "local_sgd", 10, PURPLE, "^"),
    Line("sync_sgd", "sync_sgd", 1, ORANGE, "D"),
)
RANKS = (4, 16, 64, 256, 1_024, 4_096, 10_000)
FACTORS = (1, 1.5, 2, 3, 4, 6, 8, 12, 16)
STRAGGLING = (16, LINKS[1:])
"""Ranks, and the links that are shown."""
LOST = 0.05
CROSSOVER_RANKS = (4, 16, 64, 256, 1_024)
SIGMAS = (0.0, 0.01, 0.02, 0.05, 0.1)
ROUND_STEPS = (0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2, 1.5, 2.0, 3.0, 5.0, 8.0, 12.0, 20.0)
CURVE_RANKS, CURVE_SIGMAS, CURVE_STEPS = 16, (0.0, 0.02, 0.05, 0.1), 1_000


# Runs


def best_method(network: Network, n_bytes: float) -> str:
    """The fastest all-reduce of `n_bytes` among all ranks."""
    members = range(network.world_size)
    return min(METHODS, key=lambda method: network.all_reduce_s(n_bytes, members, method))


def round_s(network: Network, parts: int = 1) -> float:
    """Seconds of a round that carries one of `parts` fragments, and the header."""
    n_bytes = VECTOR.nbytes / parts + HEADER_BYTES * network.world_size
    return network.all_reduce_s(n_bytes, range(network.world_size), best_method(network, n_bytes))


def settled_fragments(delay_steps: Callable[[int], float]) -> int:
    """What `--fragments auto` ends at, if a round with one of F fragments always takes delay_steps(F) local steps."""
    delay, asked = Delay(), 1
    for _ in range(20):  # it changes its mind once or twice
        parts = asked
        for _ in range(max(parts, Delay.LEAST_ROUNDS)):
            asked = delay.fragments(asked, parts, delay_steps(parts))
        if asked == parts:
            break
    return asked


def run(line: Line, compute: ComputeModel, network: Network, least_steps: int) -> tuple[Simulated, str]:
    """One run in virtual time, long enough to say how fast it goes; and how it all-reduced."""
    ranks, fragments = network.world_size, 1
    algorithm = registry.find(line.algorithm)
    steps = line.steps_per_round * -(-least_steps // line.steps_per_round)
    if algorithm.takes_fragments:
        fragments = settled_fragments(lambda parts: round_s(network, parts) / STEP_S)
        steps = max(steps, round(LEAST_ROUNDS * round_s(network, fragments) / STEP_S))
    method = best_method(network, VECTOR.nbytes / fragments + HEADER_BYTES * ranks)
    plan = Plan(
        algorithm,
        ranks,
        compute,
        network,
        VECTOR,
        samples=ranks * steps,
        batch_size=1,
        steps_per_round=line.steps_per_round,
        fragments=fragments,
        all_reduce=method,
    )
    return simulated(plan), method


def alone(compute: ComputeModel, ranks: int) -> float:
    """Local steps per second of all ranks that never communicate."""
    samples = ranks * 2 * LEAST_STEPS
    plan = Plan(registry.find("independent"), ranks, compute, Network(ranks, 1.0), VECTOR, samples, batch_size=1)
    return simulated(plan).steps_per_s


def point(
    line: Line, compute: ComputeModel, network: Network, alone_per_s: float, least_steps: int | None = None
) -> dict[str, Any]:
    """What the figures show of one run."""
    enough = DRIFTING_STEPS if line.algorithm == "lasgd" else LEAST_STEPS
    outcome, method = run(line, compute, network, least_steps or enough)
    local_steps = sum(rank.tally.local_steps for rank in outcome.ranks) / len(outcome.ranks)
    rounds = outcome.rounds - outcome.fragments * (line.algorithm == "lasgd")  # but for the last exact average
    return {
        "retention": outcome.steps_per_s / alone_per_s,
        "waited_share": outcome.waited_share,
        "staleness_steps": outcome.staleness_steps,
        "steps_between_averages": local_steps / rounds * outcome.fragments,
        "fragments": outcome.fragments,
        "all_reduce": method,
    }


def step_times(sigma: float, seed: int) -> ComputeModel:
    """Log-normal around STEP_S."""
    return LogNormal(STEP_S, sigma, seed) if sigma else Constant(STEP_S)


# The three questions


def against_ranks(numbers: Sequence[int], seed: int) -> list[dict[str, Any]]:
    """Every algorithm on every network."""
    found = []
    for ranks in numbers:
        compute = step_times(SIGMA, seed)
        alone_per_s = alone(compute, ranks)
        for links in LINKS:
            network = links.between(ranks)
            for line in LINES:
                measured = point(line, compute, network, alone_per_s)
                found.append({"ranks": ranks, "links": links.name, "line": line.name} | measured)
                say(f"{ranks:6} ranks, {links.name:17} {line.name:18}", measured)
    return found


def against_straggler(factors: Sequence[float], seed: int) -> list[dict[str, Any]]:
    """One rank slower than the others."""
    found = []
    ranks, shown = STRAGGLING
    for factor in factors:
        compute = Stragglers(step_times(SIGMA, seed), {ranks - 1: float(factor)})
        alone_per_s = alone(compute, ranks)
        for links in shown:
            for line in LINES:
                measured = point(line, compute, links.between(ranks), alone_per_s)
                found.append({"factor": factor, "links": links.name, "line": line.name} | measured)
    say(f"stragglers up to {factors[-1]}x", found[-1])
    return found


def taking(ranks: int, round_steps: float) -> Network:
    """A network in which a round of the whole vector takes so many local steps, in proportion to its bytes."""
    n_bytes = VECTOR.nbytes + HEADER_BYTES * ranks
    return Network(ranks, 2 * (ranks - 1) / ranks * n_bytes / (round_steps * STEP_S))


def crossover(ranks: int, sigma: float, seed: int) -> float | None:
    """Local steps that a round may take until synchronous SGD loses LOST; None where it always does."""
    sync, compute = LINES[-1], step_times(sigma, seed)
    alone_per_s = alone(compute, ranks)

    def loses(round_steps: float) -> bool:
        return point(sync, compute, taking(ranks, round_steps), alone_per_s)["retention"] < 1 - LOST

    low, high = 1e-3, 1.0
    if loses(low):
        return None
    while high - low > 1e-3:
        middle = (low + high) / 2
        low, high = (low, middle) if loses(middle) else (middle, high)
    return (low + high) / 2


def crossover_of_equal_steps(ranks: int) -> float:
    """The same on paper, where all steps take the same time.

    The step ends when the all-reduce of the last bucket does, which begins with its end, or that of the whole vector,
    which begins when the first bucket is full; whichever is later is LOST late.
    """
    buckets, header_bytes = Buckets(), HEADER_BYTES * ranks
    late = 1 / (1 - LOST) - 1
    last_share = (buckets.last_bytes(VECTOR.nbytes) + header_bytes) / (VECTOR.nbytes + header_bytes)
    return min(late / last_share, late + buckets.ready_before_end_s(VECTOR.nbytes, 1.0))


def curves(seed: int) -> list[dict[str, Any]]:
    """Synchronous SGD and LASGD against the length of a round."""
    found = []
    for sigma in CURVE_SIGMAS:
        compute = step_times(sigma, seed)
        alone_per_s = alone(compute, CURVE_RANKS)
        for steps in ROUND_STEPS:
            for line, least_steps in ((LINES[-1], None), (LINES[0], CURVE_STEPS)):
                if line.algorithm == "sync_sgd" or sigma == SIGMA:
                    measured = point(line, compute, taking(CURVE_RANKS, steps), alone_per_s, least_steps)
                    found.append({"sigma": sigma, "round_steps": steps, "line": line.name} | measured)
    return found


def say(what: str, measured: dict[str, Any]) -> None:
    """Progress."""
    print(f"{what} retention {measured['retention']:.3f}", flush=True)


# Pictures


def draw(result: dict[str, Any]) -> None:
    """All of them."""
    for name, (path, drawn) in PICTURES.items():
        drawn(result["figures"][name], path)


def draw_ranks(points: list[dict[str, Any]], path: Path) -> None:
    """Retention above, what LASGD pays below, a column for each kind of link."""
    plt = pyplot()
    figure, axes = plt.subplots(2, 3, figsize=(8, 5.2), sharex=True, sharey="row", height_ratios=(1.35, 1))
    for column, links in enumerate(LINKS):
        top, bottom = axes[0][column], axes[1][column]
        top.set_title(links.name, loc="left")
        for line in LINES:
            of_line = [p for p in points if (p["links"], p["line"]) == (links.name, line.name)]
            ranks = [p["ranks"] for p in of_line]
            top.plot(ranks, [p["retention"] for p in of_line], line.mark + "-", color=line.color)
            if line.algorithm == "lasgd":
                bottom.plot(ranks, [p["staleness_steps"] for p in of_line], "o-", color=BLUE)
                bottom.plot(ranks, [p["steps_between_averages"] for p in of_line], "o:", color=BLUE, markersize=3)
        top.set_xscale("log", base=4)
        top.set_ylim(0, 1.05)
        top.grid(axis="y")
        bottom.set_yscale("log")
        bottom.set_yticks([1, 10, 100, 1000], ["1", "10", "100", "1,000"])
        bottom.minorticks_off()
        bottom.set_xticks(RANKS, ["4", "16", "64", "256", "1k", "", "10k"])
        bottom.grid(axis="y")
        bottom.set_xlabel("ranks")
    axes[0][0].set_ylabel("retention")
    axes[1][0].set_ylabel("lasgd: local steps", color=BLUE)
    figure.legend(
        handles=[plt.Line2D([], [], color=line.color, marker=line.mark, label=line.name) for line in LINES],
        loc="upper center", ncols=4, frameon=False, labelcolor="linecolor", bbox_to_anchor=(0.5, 1.0), fontsize=9,
    )  # fmt: skip
    axes[1][2].plot([], [], "o:", color=BLUE, markersize=3, label="between two averages")
    axes[1][2].plot([], [], "o-", color=BLUE, label="staleness")
    axes[1][2].legend(loc="upper left", frameon=False, labelcolor=BLUE, fontsize=9)
    figure.tight_layout(rect=(0, 0, 1, 0.94))
    save(figure, path, points)


def draw_stragglers(points: list[dict[str, Any]], path: Path) -> None:
    """Retention against the straggler's factor."""
    plt = pyplot()
    ranks, shown = STRAGGLING
    figure, axes = plt.subplots(1, len(shown), figsize=(8, 3.2), sharey=True)
    for panel, links in zip(axes, reversed(shown), strict=True):
        panel.set_title(f"{ranks} ranks, {links.name}", loc="left")
        for line in LINES:
            of_line = [p for p in points if (p["links"], p["line"]) == (links.name, line.name)]
            panel.plot(
                [p["factor"] for p in of_line], [p["retention"] for p in of_line], line.mark + "-", color=line.color
            )
        panel.set_xscale("log", base=2)
        panel.set_xticks([1, 2, 4, 8, 16], ["1x", "2x", "4x", "8x", "16x"])
        panel.set_ylim(0, 1.05)
        panel.grid(axis="y")
        panel.set_xlabel("the straggler's steps are longer by")
    axes[0].set_ylabel("retention")
    figure.legend(
        handles=[plt.Line2D([], [], color=line.color, marker=line.mark, label=line.name) for line in LINES],
        loc="upper center", ncols=4, frameon=False, labelcolor="linecolor", bbox_to_anchor=(0.5, 1.02), fontsize=9,
    )  # fmt: skip
    figure.tight_layout(rect=(0, 0, 1, 0.94))
    save(figure, path, points)


def draw_crossover(points: list[dict[str, Any]], path: Path) -> None:
    """Left what waiting costs synchronous SGD, right what not waiting costs LASGD, against the length of a round."""
    plt = pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.4))
    of_first = 0.0
    left.axhspan(1 - LOST, 1, color=ORANGE, alpha=0.18, linewidth=0)
    for number, sigma in enumerate(CURVE_SIGMAS):
        of_sync = [p for p in points if (p["sigma"], p["line"]) == (sigma, "sync_sgd") and p["round_steps"] <= 2]
        x, y = [p["round_steps"] for p in of_sync], [p["retention"] for p in of_sync]
        left.plot(x, y, "-", color=ORANGE, alpha=1 - 0.16 * number, linewidth=2 - 0.2 * number)
        left.text(x[0] * 0.93, y[0], f"{sigma:g}", color=ORANGE, ha="right", va="center", fontsize=8)
        of_first = max(of_first, y[0])
    left.text(0.093, of_first + 0.012, "sigma", color=ORANGE, ha="right", va="bottom", fontsize=8)
    left.text(1.9, 1 - LOST / 2, "less than 5 % lost", color=ORANGE, ha="right", va="center", fontsize=9)
    left.set_title("sync_sgd: retention", loc="left", color=ORANGE)
    left.set_xscale("log")
    left.set_xlim(0.06, 2)
    left.set_ylim(0.4, 1.01)
    left.grid(axis="y")
    ticks = (0.1, 0.2, 0.5, 1, 2)
    left.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    left.minorticks_off()
    of_lasgd = [p for p in points if (p["sigma"], p["line"]) == (SIGMA, "lasgd")]
    x = [p["round_steps"] for p in of_lasgd]
    right.plot(x, [p["steps_between_averages"] for p in of_lasgd], "o:", color=BLUE, markersize=3)
    right.plot(x, [p["staleness_steps"] for p in of_lasgd], "o-", color=BLUE)
    right.text(9, 13, "between two averages\nof an element", color=BLUE, ha="right", va="center", fontsize=9)
    right.text(20, 1.55, "staleness", color=BLUE, ha="right", va="center", fontsize=9)
    right.set_title("lasgd: local steps", loc="left", color=BLUE)
    right.set_xscale("log")
    right.set_yscale("log")
    ticks = (0.1, 0.3, 1, 3, 10, 20)
    right.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    right.set_yticks((1, 2, 5, 10, 20), ["1", "2", "5", "10", "20"])
    right.minorticks_off()
    right.grid(axis="y")
    for axes in (left, right):
        axes.set_xlabel("round of the whole vector / local step")
    figure.tight_layout()
    save(figure, path, points)


PICTURES = {
    "ranks": (IMAGES / "ranks.svg", draw_ranks),
    "stragglers": (IMAGES / "stragglers.svg", draw_stragglers),
    "curves": (IMAGES / "crossover.svg", draw_crossover),
}
"""By the name of the figures that they show."""


def main(argv: Sequence[str] | None = None) -> int:
    """Simulates, judges, stores and draws; returns the exit code."""
    parser = arguments_for("clusters", __doc__)
    parser.add_argument("--draw", action="store_true", help="draw again from the stored result")
    arguments = parser.parse_args(argv)
    if arguments.draw:
        draw(json.loads((RESULTS / "clusters.json").read_text(encoding="utf-8")))
        return 0
    quick, seed = arguments.quick, arguments.seed
    settings = {
        "quick": quick,
        "vector": f"{VECTOR.elements:,} float32",
        "step": f"log-normal, median {STEP_S} s, sigma {SIGMA} (crossover: as said there)",
        "links": [links.name for links in LINKS],
        "all-reduce": list(METHODS),
    }
    report = Report("clusters", run_card(settings, [seed]))
    of_ranks = against_ranks(RANKS[:3] if quick else RANKS, seed)
    stragglers = against_straggler(FACTORS[::4] if quick else FACTORS, seed)
    crossovers = [
        {"ranks": ranks, "sigma": sigma, "round_steps": crossover(ranks, sigma, seed)}
        for ranks in (CROSSOVER_RANKS[:2] if quick else CROSSOVER_RANKS)
        for sigma in SIGMAS
    ]
    report.figures = {
        "ranks": of_ranks,
        "stragglers": stragglers,
        "crossover": crossovers,
        "curves": curves(seed),
    }
    for bar in judge(report.figures):
        report.add(bar)
    store = where_to_store("clusters", arguments)
    code = report.finish(store)
    if store is not None and not quick:
        draw(report.as_json())
    return code


def judge(figures: dict[str, Any]) -> list[Bar]:
    """What must hold whatever else the figures show."""
    everywhere = [p["retention"] for p in figures["ranks"] + figures["stragglers"] if p["line"] == "lasgd"]
    on_paper = [
        abs(found["round_steps"] - crossover_of_equal_steps(found["ranks"]))
        for found in figures["crossover"]
        if found["sigma"] == 0
    ]
    within_a_step = [p["staleness_steps"] for p in figures["curves"] if p["line"] == "lasgd" and p["round_steps"] < 1]
    return [
        Bar("lasgd: retention, least of all clusters", min(everywhere), at_least=0.97),
        Bar("lasgd: retention, most of all clusters", max(everywhere), at_most=1.05),
        Bar("lasgd, rounds shorter than a step: staleness", max(within_a_step), at_most=2.0, unit=" steps"),
        Bar("sync_sgd, equal steps: crossover, largest error to the closed form", max(on_paper), at_most=0.01),
    ]


if __name__ == "__main__":
    sys.exit(main())
