"""The report's tables, the same for HTML and Markdown: plain text in cells, numbers with their units."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lasgd.lab.report.source import Run, Source, spread


@dataclass(frozen=True)
class Table:
    """Columns and rows of text; the first column is set to the left, as are those in `left`."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: frozenset[int] = frozenset({0})
    marked: frozenset[int] = frozenset()
    """Rows that something is wrong with."""

    def markdown(self) -> str:
        """As a Markdown table."""
        rule = [":--" if index in self.left else "--:" for index in range(len(self.columns))]
        lines = [self.columns, rule, *([_escaped(cell) for cell in row] for row in self.rows)]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _escaped(cell: str) -> str:
    return cell.replace("|", "\\|").replace("\n", " ")


# Words for figures


def seconds(value: float | None) -> str:
    """`12.3 s`."""
    if value is None:
        return "-"
    return f"{value:,.0f} s" if value >= 1000 else f"{value:.1f} s" if value >= 10 else f"{value:.2f} s"


def percent(share: float | None, digits: int = 1) -> str:
    """`87.1 %`."""
    return "-" if share is None else f"{share * 100:.{digits}f} %"


def number(value: float | None, style: str = ",.0f") -> str:
    """A plain number."""
    return "-" if value is None else f"{value:{style}}"


def n_bytes(value: float | None) -> str:
    """`1.6 MB`."""
    if value is None:
        return "-"
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def times(ratio: float | None) -> str:
    """`4.2 x`."""
    return "-" if ratio is None else f"{ratio:.2f} x"


def with_spread(found: tuple[float, float, float] | None, say: Any) -> str:
    """`12.3 s (11.8 s to 13.0 s)`; the mean alone where lowest and highest are the same."""
    if found is None:
        return "-"
    middle, low, high = found
    return say(middle) if say(low) == say(high) else f"{say(middle)} ({say(low)} to {say(high)})"


# What is compared


@dataclass(frozen=True)
class Ratio:
    """How many times sooner than the reference, over the seeds with which both reached the target."""

    value: float
    seeds: int


def ratio(source: Source, condition: str, label: str) -> Ratio | None:
    """None where there is no seed with which both reached the target."""
    own, other = (
        {
            run.seed: run.figures["seconds_to_target"]
            for run in source.finished(condition, which)
            if run.figures["seconds_to_target"]
        }
        for which in (label, source.reference)
    )
    both = own.keys() & other.keys()
    if not both:
        return None
    return Ratio(sum(other[seed] for seed in both) / sum(own[seed] for seed in both), len(both))


def to_target(source: Source, condition: str) -> Table:
    """Time to accuracy, an entry a row, the soonest first."""
    rows = []
    for label in source.labels(condition):
        runs, asked = source.finished(condition, label), source.of(condition, label)
        reached = [run for run in runs if run.figures["seconds_to_target"] is not None]
        time_s = spread([run.figures["seconds_to_target"] for run in reached])
        found = ratio(source, condition, label)
        few = "" if found is None or found.seeds == len(asked) else f" ({found.seeds} of {len(asked)} seeds)"
        order = (-len(reached) / max(1, len(asked)), time_s[0] if time_s else 0.0)
        row = [
            label,
            _rates(asked),
            with_spread(time_s, seconds) if time_s else "not reached",
            f"{len(reached)} of {len(asked)}",
            "1" if label == source.reference and found else "-" if found is None else times(found.value) + few,
            with_spread(spread([run.figures["samples_to_target"] for run in reached]), number),
            with_spread(spread([run.figures["final_top1"] for run in runs]), percent),
            with_spread(spread([run.figures["final_loss"] for run in runs]), lambda loss: f"{loss:.3f}"),
        ]
        rows.append((order, row))
    columns = (
        "algorithm",
        "lr",
        "time to target",
        "seeds that reached it",
        f"sooner than {source.reference}",
        "samples to target",
        "final top-1",
        "final loss",
    )
    return Table(columns, [row for _, row in sorted(rows, key=lambda found: found[0])])


def _rates(runs: Sequence[Run]) -> str:
    return ", ".join(f"{lr:g}" for lr in sorted({run.figures["lr"] for run in runs}))


def pace(source: Source) -> Table:
    """Retention and waiting, a row per entry and condition."""
    rows = []
    for condition in source.conditions:
        for label in source.labels(condition):
            runs = source.finished(condition, label)
            if not runs:
                continue
            rows.append(
                [
                    label,
                    condition,
                    with_spread(spread([run.figures["steps_per_s"] for run in runs]), lambda rate: f"{rate:.1f}"),
                    with_spread(spread([run.figures["retention"] for run in runs]), percent),
                    with_spread(spread([run.figures["waited_s"] for run in runs]), seconds),
                    with_spread(spread([waited_share(run) for run in runs]), percent),
                    with_spread(spread([run.figures["wall_s"] for run in runs]), seconds),
                ]
            )
    columns = ("algorithm", "condition", "steps/s", "retention", "waited a rank", "of the time", "training time")
    return Table(columns, rows, frozenset({0, 1}))


def waited_share(run: Run) -> float | None:
    """Of the run's time, mean over its ranks."""
    waited_s, wall_s = run.figures["waited_s"], run.figures["wall_s"]
    return waited_s / wall_s if wall_s and waited_s is not None else None


def traffic(source: Source) -> Table:
    """Staleness and bytes, a row per entry and condition."""
    rows = []
    for condition in source.conditions:
        for label in source.labels(condition):
            runs = source.finished(condition, label)
            if not runs:
                continue
            stale = [run.figures["staleness_steps"] for run in runs]
            ranks = [rank["staleness_steps"].get("mean") for run in runs for rank in run.record.get("ranks", ())]
            of_ranks = spread(ranks)
            fragments = sorted({run.figures["fragments"] for run in runs if run.figures.get("fragments")})
            rows.append(
                [
                    label,
                    condition,
                    number(_mean(s["mean"] for s in stale), ".1f"),
                    "-" if of_ranks is None else f"{of_ranks[1]:.1f} to {of_ranks[2]:.1f}",
                    number(max((s["max"] for s in stale if s["max"] is not None), default=None)),
                    ", ".join(map(str, fragments)) or "-",
                    n_bytes(_mean(run.figures["bytes_sent"] for run in runs)),
                    n_bytes(_mean(_bytes_per_1000(run) for run in runs)),
                ]
            )
    columns = (
        "algorithm",
        "condition",
        "staleness, steps",
        "means of single ranks",
        "max",
        "fragments",
        "sent by a rank",
        "sent by all, per 1,000 samples",
    )
    return Table(columns, rows, frozenset({0, 1}))


def _bytes_per_1000(run: Run) -> float | None:
    samples, ranks = run.figures["samples"], run.record.get("ranks", ())
    return 1000 * sum(rank["bytes_sent"] for rank in ranks) / samples if samples and ranks else None


def _mean(values: Any) -> float | None:
    found = spread(list(values))
    return None if found is None else found[0]


def grid(source: Source) -> Table:
    """The learning rates that were tried: a row per entry and condition, the chosen one in brackets."""
    values = sorted({trial["lr"] for trial in source.grid})
    cells: dict[tuple[str, str], dict[float, Mapping[str, Any]]] = {}
    for trial in source.grid:
        cells.setdefault((trial["algorithm"], trial["condition"]), {})[trial["lr"]] = trial
    rows = []
    for (label, condition), tried in cells.items():
        rows.append([label, condition, *(_trial(tried.get(lr)) for lr in values)])
    return Table(("algorithm", "condition", *(f"lr {lr:g}" for lr in values)), rows, frozenset({0, 1}))


def _trial(trial: Mapping[str, Any] | None) -> str:
    if trial is None:
        return "-"
    if trial["final_loss"] is None:
        return trial["status"] if trial["status"] != "finished" else "NaN"
    said = f"{trial['final_loss']:.3f}"
    return f"[{said}]" if trial["chosen"] else said


def all_runs(source: Source) -> Table:
    """Every run, with the reason of those that did not finish."""
    rows, marked = [], set()
    for run in source.runs:
        known = run.figures
        if not run.is_finished:
            marked.add(len(rows))
        rows.append(
            [
                run.label,
                run.condition,
                str(run.seed),
                f"{known['lr']:g}",
                known["status"] if run.is_finished else f"{known['status']}: {known['error'] or 'not run yet'}",
                seconds(known["seconds_to_target"]),
                percent(known["final_top1"]),
                number(known["samples"]),
                seconds(known["wall_s"]),
                percent(known["padding_overrun"]),
                known["folder"],
            ]
        )
    columns = (
        *("algorithm", "condition", "seed", "lr", "status", "to target", "top-1", "samples", "time", "overrun"),
        "folder",
    )
    return Table(columns, rows, frozenset({0, 1, 4, 10}), frozenset(marked))


def settings(source: Source) -> Table:
    """What all runs shared; a column per comparison where they differ."""
    names = list(dict.fromkeys(name for found in source.results for name in found["settings"]))
    hidden = {"algorithm", "condition", "seed"}
    rows = []
    for name in names:
        values = [_value(found["settings"].get(name)) for found in source.results]
        if name not in hidden:
            rows.append([name.replace("_", "-"), values[0] if len(set(values)) == 1 else " / ".join(values)])
    return Table(("setting", "value"), rows, frozenset({0, 1}))


def own_settings(source: Source) -> Table:
    """What entries have of their own."""
    rows = [
        [label, entry["algorithm"], ", ".join(f"{k.replace('_', '-')} {_value(v)}" for k, v in entry["own"].items())]
        for label, entry in source.entries.items()
    ]
    return Table(("entry", "algorithm", "settings of its own"), rows, frozenset({0, 1, 2}))


def machine(source: Source) -> Table:
    """What the figures depend on beside the settings."""
    rows = []
    for name in dict.fromkeys(name for found in source.results for name in found["environment"]):
        values = dict.fromkeys(_value(found["environment"].get(name)) for found in source.results)
        rows.append([name.replace("_", " "), " / ".join(values)])
    emulation = sorted({run.figures["link_emulation"] for run in source.runs if run.figures["link_emulation"]})
    rows.append(["links", ", ".join(emulation) or "-"])
    return Table(("machine", ""), rows, frozenset({0, 1}))


def _value(value: Any) -> str:
    return "-" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
