"""Writes the tables of the documents, between their markers, from the stored JSON of the benchmarks.

python benchmarks/render.py            writes them
python benchmarks/render.py --check    exit code 1 if a page is not what it would write
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common import FOLDER, RESULTS, format_value
from comparison import REFERENCE, Cell, contests, target_of
from lasgd.lab.compare.results import is_at_edge

PAGES = tuple(FOLDER.parent / "docs" / name for name in ("results.md", "simulation.md", "theory.md", "experiments.md"))
_BLOCK = re.compile(r"(<!-- begin: (\w+) -->\n).*?(<!-- end: \2 -->)", re.DOTALL)

Result = Mapping[str, Any]


def read_results(folder: Path = RESULTS) -> dict[str, Result]:
    """Every stored result, by the name of its benchmark."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}


def render(page: str, results: Mapping[str, Result]) -> str:
    """The page with every marked block written anew; what is outside of the markers stays."""
    return _BLOCK.sub(lambda block: block[1] + _block(block[2], results) + block[3], page)


def _block(name: str, results: Mapping[str, Result]) -> str:
    if name == "crossover":
        return _crossover(results["clusters"]["figures"]["crossover"])
    if name == "drift_limits":
        return _drift_limits(results["drift"])
    if name == "drift_mean_limits":
        return _drift_mean_limits(results["drift"])
    result = results.get(name)
    if name == "gpu_check" and (result is None or result["card"]["settings"].get("device") != "cuda"):
        return "**Not run on a GPU yet.** What is said of CUDA in these pages is by reading and by tests on a CPU.\n"
    if name.startswith("comparison_") and result is not None:
        return "\n".join(["", *_comparison(result)])
    if name == "learning" and result is not None:
        return "\n".join(["", *_learning(result)])
    if result is None:
        return f"Not measured yet: there is no `benchmarks/results/{name}.json`.\n"
    return "\n".join([*_verdict(result), "", *_table(result["bars"]), "", *_notes(result), _card(result["card"]), ""])


def _verdict(result: Result) -> list[str]:
    missed = sum(bar["holds"] is False for bar in result["bars"])
    unknown = sum(bar["holds"] is None for bar in result["bars"])
    said = f"**{missed} of {len(result['bars'])} bars missed.**" if missed else "All bars hold."
    if unknown:
        said = (said + " " if missed else "") + f"{unknown} of {len(result['bars'])} bars are not measured yet."
    if result["card"]["settings"].get("quick"):
        said += " This was a `--quick` run: its figures stand for nothing."
    return [said]


def _table(bars: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = ["| what | measured | bar | |", "|---|---|---|---|"]
    for bar in bars:
        measured = format_value(bar["value"]) + (bar["unit"] if bar["value"] is not None else "")
        if bar["among"] is not None and bar["among"][0] != bar["among"][1]:
            measured += f" ({format_value(bar['among'][0])} to {format_value(bar['among'][1])})"
        verdict = {True: "holds", False: "**missed**", None: "not measured"}[bar["holds"]]
        lines.append(f"| {bar['what']} | {measured} | {bar['bar']} | {verdict} |")
    return lines


def _comparison(result: Result) -> list[str]:
    """A table for each condition, the bars where there are any, and the cards of all parts."""
    runs, lines = result["figures"]["runs"], []
    for (condition, budget), found in contests(runs).items():
        target = target_of(found)
        said = "no target" if target is None else f"target {target:.1%}"
        lines += [f"**`{condition}`**, {budget}, {said}", ""]
        lines += ["| | lr | seconds to target | sooner than DDP | samples to target | final top-1 | waits |"]
        lines += ["|---|---|---|---|---|---|---|"]
        edges = _at_edge(result["figures"]["grid"], condition, budget)
        rows = {label: _comparison_row(cell, found, target, edges.get(label, "")) for label, cell in found.items()}
        lines += [rows[label] for label in sorted(rows, key=lambda label: _when(found[label], target))]
        lines += ["", f"Runs of {_made(found)}.", ""]
    if result["bars"]:
        lines += [*_verdict(result), "", *_table(result["bars"]), ""]
    return [*lines, *_notes(result), "The latest part: " + _card(result["card"]), ""]


def _made(found: Mapping[str, Cell]) -> str:
    """When and how the runs of one table were made: each in one of the calls named."""
    runs = [run for cell in found.values() for run in cell.runs]
    calls = dict.fromkeys((run["date"], run["commit"], run.get("command")) for run in runs)
    return "; ".join(
        f"{date} at commit {commit}" + (f", `{command}`" if command else "")
        for date, commit, command in sorted(calls, key=str)
    )


def _when(cell: Cell, target: float | None) -> float:
    return (cell.seconds_to(target) if target is not None else None) or math.inf


def _at_edge(grid: Sequence[Mapping[str, Any]], condition: str, budget: str) -> dict[str, str]:
    """Of the entries whose chosen learning rate is at an end of the grid, at which: a better one may lie beyond."""
    tried: dict[str, list[Mapping[str, Any]]] = {}
    for trial in grid:
        if (trial["condition"], trial["budget"]) == (condition, budget):
            tried.setdefault(trial["algorithm"], []).append(trial)
    found = {}
    for label, trials in tried.items():
        rates = sorted(trial["lr"] for trial in trials)
        chosen = next((trial["lr"] for trial in trials if trial["chosen"]), None)
        if chosen is not None and is_at_edge(chosen, rates):
            found[label] = " (lowest tried)" if chosen == rates[0] else " (highest tried)"
    return found


def _comparison_row(cell: Cell, found: Mapping[str, Cell], target: float | None, edge: str) -> str:
    label = cell.runs[0]["algorithm"]
    seconds = [None if target is None else Cell([run]).seconds_to(target) for run in cell.runs]
    samples = [None if target is None else Cell([run]).samples_to(target) for run in cell.runs]
    reached = [value for value in seconds if value is not None]
    reference = found[REFERENCE].seconds_to(target) if target is not None and REFERENCE in found else None
    mean_s = cell.seconds_to(target) if target is not None else None
    if len(reached) == len(cell.runs):
        when = _range(reached)
    elif target is None:
        when = "no target"
    else:
        when = f"{len(reached)} of {len(cell.runs)} seeds" if reached else "never"
    top1 = [run["final_top1"] for run in cell.finished if run["final_top1"] is not None]
    waits = [run["waited_s"] / run["wall_s"] for run in cell.finished if run["wall_s"]]
    columns = [
        f"`{label}`",
        ", ".join(sorted({f"{run['lr']:g}" for run in cell.runs})) + edge,
        when,
        f"{reference / mean_s:.2f} x" if reference and mean_s else "",
        f"{statistics.fmean(s for s in samples if s is not None):,.0f}" if reached else "",
        _range([100 * value for value in top1]) + " %" if top1 else cell.runs[0]["status"],
        f"{statistics.fmean(waits):.0%}" if waits else "",
    ]
    return "| " + " | ".join(columns) + " |"


def _range(values: Sequence[float]) -> str:
    mean = statistics.fmean(values)
    if len(values) == 1:
        return f"{mean:.3g}"
    return f"{mean:.3g} ({min(values):.3g} to {max(values):.3g})"


def _learning(result: Result) -> list[str]:
    """A table for each cell, the bars, and the card of the latest part."""
    by_cell: dict[str, list[Mapping[str, Any]]] = {}
    for record in result["figures"]["records"]:
        by_cell.setdefault(record["name"], []).append(record)
    lines: list[str] = []
    for name, records in by_cell.items():
        lines += [f"**{name}**", "", "| | lr | top-1 | behind synchronous | staleness, steps | seeds |"]
        lines += ["|---|---|---|---|---|---|"]
        lines += [_learning_row(record) for record in sorted(records, key=_top1, reverse=True)]
        lines += [""]
    return [*lines, *_verdict(result), "", *_table(result["bars"]), "", "The latest part: " + _card(result["card"]), ""]


def _top1(record: Mapping[str, Any]) -> float:
    """In per cent, over the seeds."""
    return statistics.fmean(record["top1"].values()) if record["top1"] else 0.0


def _learning_row(record: Mapping[str, Any]) -> str:
    lr, behind, staleness = record["lr"], record["behind"], record["staleness_steps"]
    columns = [
        record["candidate"],
        "diverges" if lr is None else f"{lr:g}",
        "" if lr is None else _range(list(record["top1"].values())) + " %",
        "" if not behind else f"{statistics.fmean(behind):+.1f} points",
        "" if staleness is None else f"{staleness:.1f}",
        ", ".join(record["top1"]),
    ]
    return "| " + " | ".join(columns) + " |"


def _crossover(found: Sequence[Mapping[str, Any]]) -> str:
    """Ranks across, spreads of the step times down."""
    ranks = list(dict.fromkeys(point["ranks"] for point in found))
    lines = ["| sigma | " + " | ".join(f"{n:,} ranks" for n in ranks) + " |", "|---" * (len(ranks) + 1) + "|"]
    for sigma in dict.fromkeys(point["sigma"] for point in found):
        longest = {point["ranks"]: point["round_steps"] for point in found if point["sigma"] == sigma}
        cells = ["never" if longest[n] is None else f"{longest[n]:.2f}" for n in ranks]
        lines.append(f"| {sigma:g} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def _drift_limits(result: Result) -> str:
    """Momenta and fragments down, delays across; empty where the fragments do not divide the delay."""
    found = {(one["momentum"], one["fragments"], one["delay"]): one for one in result["figures"]["limits"]}
    momenta, fragments, delays = (list(dict.fromkeys(key[k] for key in found)) for k in range(3))
    lines = ["| momentum | fragments | " + " | ".join(f"delay {delay}" for delay in delays) + " | alone |"]
    lines += ["|---" * (len(delays) + 3) + "|"]
    for momentum in momenta:
        for parts in fragments:
            cells = [found.get((momentum, parts, delay)) for delay in delays]
            alone = next(one["alone"] for one in cells if one is not None)
            limits = ["" if one is None else f"{min(one['limit'] or alone, alone):.2g}" for one in cells]
            lines.append(f"| {momentum:g} | {parts} | " + " | ".join(limits) + f" | {alone:.2g} |")
    return "\n".join([*lines, "", _card(result["card"]), ""])


def _drift_mean_limits(result: Result) -> str:
    """Where momentum is and how late a fragment's mean comes down, fragments across."""
    found = result["figures"]["mean_limits"]
    fragments = list(dict.fromkeys(one["fragments"] for one in found))
    lines = ["| optimizers | mean | steps on its way | " + " | ".join(f"{n} in turn" for n in fragments) + " |"]
    lines += ["|---" * (len(fragments) + 3) + "|"]
    rows: dict[tuple[float, float, int], list[str]] = {}
    for one in found:
        limit = min(one["limit"] or one["alone"], one["alone"])
        rows.setdefault((one["momentum"], one["outer_momentum"], one["late"]), []).append(f"{limit:.2g}")
    lines += [f"| {mu:g} | {beta:g} | {late} | {' | '.join(cells)} |" for (mu, beta, late), cells in rows.items()]
    return "\n".join([*lines, ""])


def _notes(result: Result) -> list[str]:
    return [line for note in result["notes"] for line in (note, "")]


def _card(card: Mapping[str, Any]) -> str:
    settings = ", ".join(
        f"{key} {_plain(value)}" for key, value in card["settings"].items() if key != "quick" and value is not None
    )
    seeds = "; seeds " + ", ".join(map(str, card["seeds"])) if card["seeds"] else ""
    device = f", {card['device']}" if card.get("device") else ""
    return (
        f"`{card['command']}`, {card['date']}. {settings}{seeds}. lasgd {card['lasgd']} "
        f"(commit {card['commit'] or 'unknown'}), torch {card['torch']}, Python {card['python']}; "
        f"{card['cpu_count']} cores, {card['cpu']}{device}."
    )


def _plain(value: Any) -> str:
    return "/".join(map(str, value)) if isinstance(value, list) else str(value)


def main(argv: Sequence[str] | None = None) -> int:
    """Writes or checks the pages; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="benchmarks/render.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="change nothing")
    arguments = parser.parse_args(argv)
    results, code = read_results(), 0
    for path in PAGES:
        before = path.read_text(encoding="utf-8")
        after = render(before, results)
        if arguments.check and before != after:
            print(f"docs/{path.name} is not what benchmarks/results/*.json say; run python benchmarks/render.py")
            code = 1
        elif not arguments.check:
            path.write_text(after, encoding="utf-8")
    return code


if __name__ == "__main__":
    sys.exit(main())
