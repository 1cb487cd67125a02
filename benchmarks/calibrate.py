"""How far the simulator is from real runs: the same runs of both, predicted against measured.

    network    all-reduces alone, 4 ranks on emulated links of 20 and 100 Mbit/s      within 10 %
    messages   messages that share such a link, as a server's workers send them       within 10 %
    time       local steps per second and time per round, 4 ranks, cnn4, batch 16     within 10 %
    learning   top-1 after 60,000 samples of CIFAR-10, mean of 3 seeds                within 2 points

A prediction is made of the condition, the length of the model's vector and the batch size; nothing that was measured
in the runs that it predicts goes into it, nor into any constant of the simulator, but for two: how far a message's
window grows and how unevenly messages share were chosen when earlier runs of `parameter_server` behind a slow link were
known.

    python benchmarks/calibrate.py --data cifar10.tar.xz --runs kept       all of it; what `kept` holds is not run again
    python benchmarks/calibrate.py --part network,messages,time            without learning
    python benchmarks/calibrate.py --part time --quick --algorithms lasgd  does it work?
    python benchmarks/calibrate.py --part messages,time --algorithms ad_psgd,parameter_server --out FILE    of a part
    python benchmarks/calibrate.py --draw                                  the figure again, from the stored result
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import importlib.util
import json
import math
import shutil
import statistics
import subprocess
import sys
import tempfile
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import all_reduces
import messages
from common import FOLDER, RESULTS, Bar, Report, arguments_for, run_card, spread, where_to_store
from lasgd.algorithms import registry
from lasgd.lab.conditions import parse
from lasgd.lab.simulation import Plan, simulated
from lasgd.lab.virtual_conditions import from_condition
from lasgd.pace import Column
from lasgd.training.run_folder import RunRecord, read_metrics, read_run
from lasgd.virtual.flows import Flows
from lasgd.virtual.network_models import Network
from lasgd.virtual.timing_replica import Vector
from retention import PADDING_OVERRUN, make_images

PARTS = ("network", "messages", "time", "learning")
RANKS, MODEL, BATCH_SIZE = 4, "cnn4", 16
ALGORITHMS = ("lasgd", "local_sgd", "sync_sgd", "ad_psgd", "parameter_server")
STEPS_PER_ROUND = {"local_sgd": 10}
CONDITIONS = ("link=20mbit+step=100ms", "straggler=last:4x+step=100ms")
LEARNING_CONDITION = CONDITIONS[0]
LEARNING_SAMPLES = 60_000
LINKS = ("20mbit", "100mbit")
VECTOR_BYTES = (100_000, 400_000, 1_565_864)
"""Of the all-reduces alone; the last is cnn4's vector."""
PAUSE_S = 0.3
"""Longer than the emulated link needs to fill its bucket."""
TOGETHER = {
    "one": (0.0,),
    "two at once": (0.0, 0.0),
    "one half a message after the other": (0.0, 0.5),
    "three at once": (0.0, 0.0, 0.0),
    "three, a third of a message apart": (0.0, 1 / 3, 2 / 3),
}
"""When messages to one rank begin, in units of what one takes on its own."""
WITHIN, WITHIN_POINTS = 0.10, 2.0
FIGURE = FOLDER.parent / "docs" / "images" / "calibration.svg"
FIGURE_SAYS = "Predicted over measured rates and times, a dot each, around the band from 0.9 to 1.1."

Intervals = Mapping[int, Sequence[tuple[str, float, float]]]
"""By rank: (kind, begin_s, end_s) since the first local step's begin, as in timeline.json.gz."""


# What a run was like, of a real and of a simulated one by the same functions


@dataclass(frozen=True)
class Seen:
    """One run."""

    steps_per_s: float
    """Of all ranks together: the samples that they had agreed on at the end, over the time until then."""
    steps_per_s_of_rank: list[float]
    s_per_round: float
    """From one round's end to the next one's, mean over the second half of the run, when the pace has settled; of
    `sync_sgd`, all of whose steps are alike and each of whose buckets is a round in the timeline, over all of it. Where
    ranks write to each other: from one exchange of a rank to its next, over all of the run, mean over the ranks."""
    all_reduce_s: float | None
    """From when the last rank joined a round to its end, mean over the same, for all fragments of the vector: how many
    there are is a choice between neighbours. None where rounds carry no vector."""
    fragments: int | None
    waited_share: float
    """Mean over the ranks of the time that they stood still."""
    staleness_mean: float
    staleness_max: float
    """Local steps between a fragment's snapshot and its merge, as the ranks count them."""
    staleness: dict[int, int]
    """Such steps -> rounds of all ranks with so many; empty where nobody goes on meanwhile."""


def seen(
    algorithm: str,
    intervals: Intervals,
    *,
    wall_s: float,
    samples: int,
    rounds: int,
    local_steps: Sequence[int],
    waited_s: Sequence[float],
    exchanges: Sequence[int] = (),
    staleness_steps: Sequence[tuple[float, float]],
    fragments: int | None,
) -> Seen:
    """`wall_s` runs from the first local step to the agreed end; staleness_steps are (mean, most) of each rank."""
    found = registry.find(algorithm)
    settled = rounds_within(intervals, wall_s / 2, wall_s)
    gaps = [later - earlier for (earlier, _), (later, _) in pairwise(settled)]
    in_buckets = algorithm == "sync_sgd"
    between = [wall_s / own for own in exchanges if own] if found.writes_messages else None
    means, most = zip(*staleness_steps, strict=True)
    return Seen(
        steps_per_s=samples / BATCH_SIZE / wall_s,
        steps_per_s_of_rank=[steps / wall_s for steps in local_steps],
        s_per_round=_mean(between) if between is not None else wall_s / rounds if in_buckets else _mean(gaps),
        all_reduce_s=None
        if in_buckets or found.writes_messages
        else _mean([seconds for _, seconds in settled]) * (fragments or 1),
        fragments=fragments,
        waited_share=statistics.fmean(min(seconds / wall_s, 1.0) for seconds in waited_s),
        staleness_mean=statistics.fmean(means),
        staleness_max=max(most),
        staleness=staleness(intervals, wall_s) if found.takes_fragments else {},
    )


def rounds_within(intervals: Intervals, begin_s: float, end_s: float) -> list[tuple[float, float]]:
    """(when it ended, how long from when the last rank joined) of rounds that end after begin_s and begin before end_s.

    Each rank's interval begins when that rank joins, so the shortest is that of the last one, who waited for nobody.
    Nothing is compared between the clocks of two ranks, which agree on the start to some 0.1 s only.
    """
    of_ranks = [[(b, e) for kind, b, e in of_rank if kind == "round"] for of_rank in intervals.values()]
    return [
        (same[0][1], min(e - b for b, e in same))
        for same in zip(*of_ranks, strict=False)
        if begin_s <= same[0][1] and same[0][0] < end_s  # the last exact average begins at the agreed end
    ]


def staleness(intervals: Intervals, wall_s: float) -> dict[int, int]:
    """Steps between snapshot and merge -> how many rounds of all ranks; of those that were merged before the end.

    The snapshot is taken when the round begins, and merged at the first step boundary after its end.
    """
    counts: Counter[int] = Counter()
    for of_rank in intervals.values():
        boundaries = sorted(end_s for kind, _, end_s in of_rank if kind == "compute")
        for kind, begin_s, end_s in of_rank:
            if kind == "round":
                merge = bisect_right(boundaries, end_s)
                if merge < len(boundaries) and boundaries[merge] <= wall_s:
                    counts[merge + 1 - bisect_right(boundaries, begin_s)] += 1
    return dict(sorted(counts.items()))


def distance(one: Mapping[int, int], other: Mapping[int, int]) -> float:
    """Total variation between two histograms: the share of merges that would have to be other ones, 0 to 1."""
    n_one, n_other = sum(one.values()), sum(other.values())
    return sum(abs(one.get(k, 0) / n_one - other.get(k, 0) / n_other) for k in {*one, *other}) / 2


def deviation(predicted: float, measured: float) -> float:
    """predicted / measured - 1."""
    return predicted / measured - 1 if measured else math.nan


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values) if values else math.nan


# The two sides


def options_of(algorithm: str, condition: str, samples: int, seed: int) -> dict[str, Any]:
    """Of the command line, the same for `lasgd train` and `lasgd simulate`."""
    return {
        "model": MODEL,
        "algorithm": algorithm,
        "ranks": RANKS,
        "batch-size": BATCH_SIZE,
        "samples": samples,
        "condition": condition,
        "steps-per-round": STEPS_PER_ROUND.get(algorithm, 1),
        "seed": seed,
        "evaluations": 0,
        "checkpoints": 0,
        "device": "cpu",
    }


def predicted(algorithm: str, condition: str, samples: int, seed: int, elements: int) -> Seen:
    """A run without gradients."""
    compute, network = from_condition(parse(condition), RANKS, seed)
    plan = Plan(
        registry.find(algorithm),
        ranks=RANKS,
        compute=compute,
        network=network,
        vector=Vector(elements),
        samples=samples,
        batch_size=BATCH_SIZE,
        steps_per_round=STEPS_PER_ROUND.get(algorithm, 1),
    )
    intervals: dict[int, list[tuple[str, float, float]]] = {rank: [] for rank in range(RANKS)}
    run = simulated(plan, lambda rank, kind, begin_s, end_s: intervals[rank].append((kind, begin_s, end_s)))
    tallies = [rank.tally for rank in run.ranks]
    return seen(
        algorithm,
        intervals,
        wall_s=run.virtual_s,
        samples=run.samples,
        rounds=run.rounds,
        local_steps=[tally.local_steps for tally in tallies],
        waited_s=[tally.waited_s for tally in tallies],
        exchanges=[tally.exchanges for tally in tallies],
        staleness_steps=[(tally.staleness.mean_steps, tally.staleness.max_steps) for tally in tallies],
        fragments=run.fragments,
    )


def measured(run: RunRecord, timeline: bytes) -> Seen:
    """A run of `lasgd train`, from its run.json and its timeline.json.gz."""
    intervals: dict[int, list[tuple[str, float, float]]] = {rank: [] for rank in range(run.world_size)}
    for event in json.loads(gzip.decompress(timeline))["traceEvents"]:
        if event["ph"] == "X":
            begin_s = event["ts"] * 1e-6
            intervals[event["pid"]].append((event["name"], begin_s, begin_s + event["dur"] * 1e-6))
    return seen(
        run.algorithm,
        intervals,
        wall_s=run.wall_s,
        samples=run.samples,
        rounds=run.ranks[0].rounds,
        local_steps=[rank.local_steps for rank in run.ranks],
        waited_s=[rank.waited_s for rank in run.ranks],
        exchanges=[rank.rounds for rank in run.ranks],
        staleness_steps=[(rank.staleness_steps.mean or 0.0, rank.staleness_steps.max or 0.0) for rank in run.ranks],
        fragments=run.fragments,
    )


def ran(command: str, out: Path, options: Mapping[str, Any], commit: str | None) -> RunRecord:
    """One run of `lasgd train` or `lasgd simulate`, or the one that `out` holds of these very options.

    Raises SystemExit with the end of its output if it fails.
    """
    asked, note = {"command": command} | {key: str(value) for key, value in options.items()}, out / "calibrate.json"
    with contextlib.suppress(OSError, ValueError):
        if json.loads(note.read_text(encoding="utf-8"))["asked"] == asked:
            print(f"{out.name}: kept from an earlier time", flush=True)
            return read_run(out)
    if out.exists():
        shutil.rmtree(out)
    words = [f"--{key}={value}" for key, value in options.items()]
    ended = subprocess.run(
        [sys.executable, "-m", "lasgd", command, *words, f"--out={out}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if ended.returncode != 0:
        raise SystemExit(f"{out.name}: lasgd {command} ended with {ended.returncode}:\n{ended.stdout[-4000:]}")
    run = read_run(out)
    if run.status != "finished":
        raise SystemExit(f"{out.name}: lasgd {command} is {run.status}: {run.error}")
    note.write_text(json.dumps({"asked": asked, "commit": commit}) + "\n", encoding="utf-8")
    return run


def commits_of(folder: Path) -> list[str]:
    """Which versions have made the kept runs."""
    notes = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*/calibrate.json")]
    return sorted({note["commit"] or "unknown" for note in notes})


# The parts


def network_part(report: Report, repeats: int) -> None:
    """All-reduces back to back, and each after a pause in which the emulated link's bucket fills."""
    from lasgd.lab.network import why_not_namespaces

    table = _Table("link", "vector", "quantity", unit="s")
    why_not = why_not_namespaces(world_size=RANKS)
    if why_not is not None:
        report.notes.append(f"Network: not measured, because {why_not}.")
    header_bytes = RANKS * len(Column) * 8
    figures = report.figures["network"] = {}
    for link in LINKS:
        condition = parse(f"link={link}+step=100ms")
        assert condition.bandwidth_bytes_per_s is not None
        _, network = from_condition(condition, RANKS, 0)
        found = {}
        if why_not is None:
            for pause_s in (0.0, PAUSE_S):
                found[pause_s] = all_reduces.measure(
                    condition.bandwidth_bytes_per_s, RANKS, VECTOR_BYTES, repeats, pause_s
                )
        for n_bytes in VECTOR_BYTES:
            name = f"network: {link}, all-reduce of {n_bytes / 1e6:.3g} MB, back to back"
            predicted_s = network.all_reduce_s(n_bytes + header_bytes, range(RANKS))
            if why_not is not None:
                report.add(_bar(name, None))
                continue
            seconds = spread(all_reduces.from_last_joining_s(found[0.0][n_bytes]))
            after_pause = spread(all_reduces.from_last_joining_s(found[PAUSE_S][n_bytes]))
            figures[f"{link}, {n_bytes}"] = {
                "predicted_s": predicted_s,
                "measured_s": seconds,
                "after_a_pause_s": after_pause,
            }
            report.add(_bar(name, [deviation(predicted_s, each) for each in seconds["values"]]))
            size = f"{n_bytes / 1e6:.3g} MB"
            table.add((link, size, "back to back"), predicted_s, seconds["median"])
            table.add((link, size, "after a pause"), predicted_s, after_pause["median"])
    if why_not is None:
        report.notes += [
            *table.lines,
            "After a pause an emulated link is quicker than a link of its speed: its token bucket lets 10 ms through "
            "at once. The simulator knows of no bucket.",
        ]


def messages_part(report: Report, repeats: int) -> None:
    """Messages of cnn4's vector to one rank: when the last one of each case is there, and each of them."""
    from lasgd.lab.network import why_not_namespaces

    world_size, n_bytes = 1 + max(map(len, TOGETHER.values())), VECTOR_BYTES[-1]
    table = _Table("link", "messages", "which", unit="s")
    why_not = why_not_namespaces(world_size=world_size)
    if why_not is not None:
        report.notes.append(f"Messages: not measured, because {why_not}.")
    figures = report.figures["messages"] = {}
    for link in LINKS:
        condition = parse(f"link={link}+step=100ms")
        assert condition.bandwidth_bytes_per_s is not None
        _, network = from_condition(condition, world_size, 0)
        alone_s = network.message_s(1, 0, n_bytes)
        cases = {name: [share * alone_s for share in shares] for name, shares in TOGETHER.items()}
        found = None
        if why_not is None:
            found = messages.measure(condition.bandwidth_bytes_per_s, n_bytes, list(cases.values()), alone_s, repeats)
        for k, (name, begins_s) in enumerate(cases.items()):
            what = f"messages: {link}, {name}, the last one there"
            if found is None:
                report.add(_bar(what, None))
                continue
            predicted_s = [took_s for _, took_s in sorted(shared(network, begins_s, n_bytes).items())]
            figures[f"{link}, {name}"] = {"predicted_s": predicted_s, "measured_s": found[k]}
            last_s = max(map(sum, zip(begins_s, predicted_s, strict=True)))
            measured_last_s = [max(map(sum, zip(begins_s, took_s, strict=True))) for took_s in found[k]]
            report.add(_bar(what, [deviation(last_s, each) for each in measured_last_s]))
            for which, took_s in enumerate(zip(*found[k], strict=True)):
                table.add((link, name, str(which + 1)), predicted_s[which], statistics.fmean(took_s))
    report.notes += table.lines


def shared(network: Network, begins_s: Sequence[float], n_bytes: int) -> dict[int, float]:
    """Seconds that messages of ranks 1, 2, ... to rank 0 take which begin at these times; from 0 on, in this order."""
    flows, took_s = Flows(network), {}
    for sender, begin_s in enumerate(begins_s, start=1):
        flows.start(begin_s, sender, 0, n_bytes)
    while (turn := flows.next_turn()) is not None:
        for at_s, flow in flows.advance(turn[0]):
            took_s[flow] = at_s - begins_s[flow]
    return took_s


def time_part(
    report: Report,
    algorithms: Sequence[str],
    conditions: Sequence[str],
    seeds: Sequence[int],
    seconds: float,
    folder: Path,
) -> None:
    """Steps, rounds, staleness and waiting of runs of `seconds`."""
    data, elements = folder / "noise", vector_elements()
    if not data.exists():
        make_images(data)
    table = _Table("algorithm", "condition", "quantity")
    for algorithm in algorithms:
        for condition in conditions:
            samples = samples_for(algorithm, condition, seconds, elements)
            pairs, overrun = [], 0.0
            for seed in seeds:
                options = options_of(algorithm, condition, samples, seed) | {"data": data, "lr": 0.01}
                out = folder / f"time-{algorithm}-{condition}-{seed}"
                run = ran("train", out, options, report.card["commit"])
                timeline = (out / "timeline.json.gz").read_bytes()
                pairs.append((predicted(algorithm, condition, samples, seed, elements), measured(run, timeline)))
                overrun = max(overrun, run.padding_overrun)
            name = f"{algorithm}, {condition}"
            report.figures[name] = {
                "predicted": [vars(one) for one, _ in pairs],
                "measured": [vars(other) for _, other in pairs],
                "padding_overrun": overrun,
                "samples": samples,
            }
            for bar in time_bars(name, pairs):
                report.add(bar)
            report.add(Bar(f"{name}: steps that outlast their padding", overrun, at_most=PADDING_OVERRUN))
            for quantity, values in quantities(pairs).items():
                table.add((algorithm, condition, quantity), *map(_mean, zip(*values, strict=True)))
            if pairs[0][0].staleness:
                apart = statistics.median(distance(one.staleness, other.staleness) for one, other in pairs)
                report.figures[name]["staleness_distance"] = apart
                table.add((algorithm, condition, "merges of another staleness, share"), apart, None)
    report.notes += table.lines


Pairs = Sequence[tuple[Seen, Seen]]
"""(predicted, measured) of each seed."""


def quantities(pairs: Pairs) -> dict[str, list[tuple[float, float]]]:
    """What is compared, each with (predicted, measured) of each seed."""
    first, _ = pairs[0]
    values = {"local steps/s, all ranks": [(one.steps_per_s, other.steps_per_s) for one, other in pairs]}
    for rank in range(len(first.steps_per_s_of_rank)):
        values[f"local steps/s, rank {rank}"] = [
            (one.steps_per_s_of_rank[rank], other.steps_per_s_of_rank[rank]) for one, other in pairs
        ]
    values["time per round, s"] = [(one.s_per_round, other.s_per_round) for one, other in pairs]
    if first.all_reduce_s:
        values["all-reduces of the vector, s"] = [
            (one.all_reduce_s or 0.0, other.all_reduce_s or 0.0) for one, other in pairs
        ]
    if first.staleness:
        values["staleness, mean steps"] = [(one.staleness_mean, other.staleness_mean) for one, other in pairs]
        values["staleness, most steps"] = [(one.staleness_max, other.staleness_max) for one, other in pairs]
        values["fragments"] = [(one.fragments or 0, other.fragments or 0) for one, other in pairs]
    values["share of the time waited"] = [(one.waited_share, other.waited_share) for one, other in pairs]
    return values


HELD = ("local steps/s, all ranks", "time per round, s", "all-reduces of the vector, s")


def time_bars(name: str, pairs: Pairs) -> list[Bar]:
    """The rate of all ranks, of the rank that is foretold worst, the time per round and that of an all-reduce."""
    compared = quantities(pairs)
    of_ranks = {key: values for key, values in compared.items() if key.startswith("local steps/s, rank")}
    bars = [_bar(f"{name}: {key}", [deviation(*pair) for pair in compared[key]]) for key in HELD if key in compared]
    worst = max(of_ranks.values(), key=lambda values: abs(statistics.median(deviation(*pair) for pair in values)))
    bars.insert(1, _bar(f"{name}: local steps/s, worst rank", [deviation(*pair) for pair in worst]))
    return bars


def samples_for(algorithm: str, condition: str, seconds: float, elements: int) -> int:
    """The budget that is foretold to take so long."""
    short = predicted(algorithm, condition, RANKS * BATCH_SIZE * 100, 0, elements)
    return BATCH_SIZE * max(RANKS, math.ceil(short.steps_per_s * seconds))


def vector_elements() -> int:
    """Of what cnn4 averages, for ten classes of colour images."""
    from lasgd.layout import Layout
    from lasgd.training.models import build_model

    return Layout(build_model(MODEL, num_classes=10, channels=3)).size


def learning_part(
    report: Report,
    algorithms: Sequence[str],
    seeds: Sequence[int],
    data: Path | None,
    samples: int,
    more: Mapping[str, Any],
    folder: Path,
) -> None:
    """Final top-1 of both, and that of the means on the way."""
    if data is None:
        report.notes.append("Learning: not measured, because no `--data` was given.")
    table = _Table("algorithm", "quantity")
    for algorithm in algorithms:
        name = f"learning: {algorithm}, {LEARNING_CONDITION}: top-1 after {samples:,} samples"
        if data is None:
            report.add(Bar(f"{name}, off by", None, at_most=WITHIN_POINTS, unit=" points"))
            continue
        curves: dict[str, list[list[dict[str, Any]]]] = {"simulate": [], "train": []}
        for seed in seeds:
            options = options_of(algorithm, LEARNING_CONDITION, samples, seed) | {"data": data, "evaluations": 5}
            for command, of_seeds in curves.items():
                out = folder / f"learning-{command}-{algorithm}-{seed}"
                ran(command, out, options | more, report.card["commit"])
                of_seeds.append(read_metrics(out / "metrics.jsonl"))
        final = {command: spread([curve[-1]["top1"] for curve in of_seeds]) for command, of_seeds in curves.items()}
        report.figures[name] = {"final_top1": final, "metrics": curves}
        report.add(top1_bar(name, final["simulate"]["values"], final["train"]["values"]))
        means = [statistics.fmean(final[command]["values"]) for command in ("simulate", "train")]
        table.add((algorithm, "top-1, mean of the seeds"), *means)
    if data is not None:
        report.notes += table.lines


def top1_bar(name: str, simulated_top1: Sequence[float], real_top1: Sequence[float]) -> Bar:
    """By how many points the means of the seeds differ."""
    points = 100 * abs(statistics.fmean(simulated_top1) - statistics.fmean(real_top1))
    return Bar(f"{name}, off by", points, at_most=WITHIN_POINTS, unit=" points")


# How it is told


def _bar(what: str, deviations: Sequence[float] | None) -> Bar:
    """Off by the median deviation, whichever way; in per cent, with the range of its values."""
    if deviations is None:
        return Bar(f"{what}, off by", None, at_most=100 * WITHIN, unit=" %")
    percent = [100 * value for value in deviations]
    among = min(map(abs, percent)), max(map(abs, percent))
    return Bar(f"{what}, off by", abs(statistics.median(percent)), at_most=100 * WITHIN, unit=" %", among=among)


class _Table:
    """Predicted beside measured, in Markdown and on stdout."""

    def __init__(self, *columns: str, unit: str = "") -> None:
        self._unit = f", {unit}" if unit else ""
        self._columns = columns
        self._rows: list[str] = []

    def add(self, names: Sequence[str], predicted: float, measured: float | None) -> None:
        values = [f"{predicted:.4g}", "-", "-"]
        if measured is not None:
            off = f"{100 * deviation(predicted, measured):+.1f} %" if measured else "-"
            values = [f"{predicted:.4g}", f"{measured:.4g}", off]
        self._rows.append(f"| {' | '.join([*names, *values])} |")
        print(f"    {', '.join(names)}: {values[0]} predicted, {values[1]} measured, {values[2]}", flush=True)

    @property
    def lines(self) -> list[str]:
        """One note."""
        head = [*self._columns, f"predicted{self._unit}", f"measured{self._unit}", "off"]
        return ["\n".join([f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *self._rows])] if self._rows else []


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Writes the figure as SVG, in a grey and a blue that read on white and on black: predicted over measured."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "lasgd"  # the same bytes every time
    from matplotlib import pyplot

    rows = [
        (name, quantity, 1 + statistics.median(deviation(*pair) for pair in values))
        for name, figures in result["figures"].items()
        if isinstance(figures, dict) and "predicted" in figures
        for quantity, values in quantities(
            [
                (_from_json(one), _from_json(other))
                for one, other in zip(figures["predicted"], figures["measured"], strict=True)
            ]
        ).items()
        if quantity in HELD
    ]
    figure, axes = pyplot.subplots(figsize=(8, 0.26 * len(rows) + 0.8))
    axes.axvspan(1 - WITHIN, 1 + WITHIN, color="#777777", alpha=0.2, linewidth=0)
    axes.axvline(1, color="#777777", linewidth=0.8)
    axes.plot([ratio for *_, ratio in rows], range(len(rows), 0, -1), "o", color="#4c78a8")
    labels = [f"{name}: {quantity.removesuffix(', s')}" for name, quantity, _ in rows]
    axes.set_yticks(range(len(rows), 0, -1), labels)
    reach = max([2 * WITHIN, *(abs(ratio - 1) * 1.1 for *_, ratio in rows)])
    axes.set_xlim(1 - reach, 1 + reach)
    axes.set_xlabel("predicted / measured", color="#777777")
    axes.tick_params(colors="#777777", labelsize=8)
    for spine in axes.spines.values():
        spine.set_visible(False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, transparent=True, metadata={"Date": None})


def _from_json(fields: Mapping[str, Any]) -> Seen:
    return Seen(**dict(fields) | {"staleness": {int(steps): n for steps, n in fields["staleness"].items()}})


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the chosen parts; returns the exit code."""
    parser = arguments_for("calibrate", __doc__)
    parser.add_argument("--part", type=_some_of(PARTS), default=PARTS, help=f"some of {','.join(PARTS)}; default all")
    parser.add_argument(
        "--algorithms", type=_some_of(ALGORITHMS), default=ALGORITHMS, help="of the part `time`; default all three"
    )
    parser.add_argument("--conditions", type=_conditions, default=CONDITIONS, help="of `time`, with commas between")
    parser.add_argument(
        "--learning", type=_some_of(ALGORITHMS), default=("lasgd",), help="algorithms of the part `learning`"
    )
    parser.add_argument("--seeds", type=_numbers, help="of runs; default 0,1,2, and 0 alone with --quick")
    parser.add_argument("--seconds", type=float, help="length of a run of the part `time`; default 60")
    parser.add_argument("--samples", type=int, help=f"of a run of `learning`; default {LEARNING_SAMPLES:,}")
    parser.add_argument("--lr", type=float, help="of `learning`; default lasgd's own")
    parser.add_argument("--data", type=Path, help="CIFAR-10, a folder or an archive in ImageNet layout")
    parser.add_argument("--runs", type=Path, help="a folder that keeps the runs, and from which they are taken again")
    parser.add_argument("--draw", action="store_true", help="draw the figure again from the stored result")
    arguments = parser.parse_args(argv)
    if arguments.draw:
        draw(json.loads((RESULTS / "calibrate.json").read_text(encoding="utf-8")), FIGURE)
        return 0
    quick = arguments.quick
    seeds = arguments.seeds or ([arguments.seed] if quick else [0, 1, 2])
    seconds = arguments.seconds or (10.0 if quick else 60.0)
    samples = arguments.samples or (4_000 if quick else LEARNING_SAMPLES)
    settings = {
        "quick": quick,
        "parts": list(arguments.part),
        "ranks": RANKS,
        "model": MODEL,
        "batch_size": BATCH_SIZE,
        "seconds": seconds,
        "samples": samples,
        "steps_per_round": "10 of local_sgd, else 1",
        "data": arguments.data.name if arguments.data else "random noise, 32x32 JPEG, 10 classes",
    }
    report = Report("calibrate", run_card(settings, seeds))
    more = {} if arguments.lr is None else {"lr": arguments.lr}
    with tempfile.TemporaryDirectory(prefix="lasgd-calibrate-") as name:
        folder = arguments.runs or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        if "network" in arguments.part:
            network_part(report, 5 if quick else 15)
        if "messages" in arguments.part:
            messages_part(report, 3 if quick else 10)
        if "time" in arguments.part:
            time_part(report, arguments.algorithms, arguments.conditions, seeds, seconds, folder)
        if "learning" in arguments.part:
            learning_part(report, arguments.learning, seeds, arguments.data, samples, more, folder)
        commits = commits_of(folder)
    if commits not in ([], [report.card["commit"] or "unknown"]):
        report.notes.append(f"Runs were kept from commits {', '.join(commits)}.")
    is_whole = set(arguments.part) == set(PARTS) and {*arguments.algorithms} == {*ALGORITHMS}
    is_record = is_whole and tuple(arguments.conditions) == CONDITIONS
    store = where_to_store("calibrate", arguments, is_record)
    is_on_the_page = store == RESULTS / "calibrate.json" and importlib.util.find_spec("matplotlib") is not None
    if is_on_the_page:
        report.notes.insert(0, f"![{FIGURE_SAYS}](images/{FIGURE.name})")
    code = report.finish(store)
    if is_on_the_page:
        draw(report.as_json(), FIGURE)
    return code


def _some_of(known: Sequence[str]) -> Any:
    def chosen(text: str) -> tuple[str, ...]:
        names = tuple(dict.fromkeys(text.split(",")))
        if unknown := [name for name in names if name not in known]:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not known; known: {', '.join(known)}")
        return names

    return chosen


def _conditions(text: str) -> tuple[str, ...]:
    conditions = tuple(dict.fromkeys(text.split(",")))
    for condition in conditions:
        if parse(condition).step_s is None:
            raise argparse.ArgumentTypeError(f"{condition!r} does not say how long a step takes, as in step=100ms")
    return conditions


def _numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


if __name__ == "__main__":
    sys.exit(main())
