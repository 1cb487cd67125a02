"""The report's curves and bars, each an inline SVG."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lasgd.lab.report.looks import FAINT, INK, Look, figure, svg
from lasgd.lab.report.source import Run, Source, spread
from lasgd.lab.report.tables import waited_share

POINTS = 80
"""Of a mean over seeds."""
_AXES = {"wall_s": "seconds of training", "samples": "samples of all ranks"}


def curves(source: Source, condition: str, looks: dict[str, Look], over: str) -> str | None:
    """Top-1 against seconds or samples under one condition; None where nothing was evaluated."""
    made, axes = figure(5.2, 3.4)
    labels = source.labels(condition)
    drawn = [
        _band(axes, [run.metrics for run in source.finished(condition, label)], over, "top1", looks[label], len(labels))
        for label in labels
    ]
    if not any(drawn):
        return None
    target = source.targets.get(condition)
    if target is not None:
        axes.axhline(target, color=INK, linewidth=0.9, linestyle=(0, (2, 2)))
        axes.annotate(
            f"target {target:.1%}".replace("%", " %"),
            (0, target),
            xycoords=("axes fraction", "data"),
            xytext=(3, 2),
            textcoords="offset points",
            fontsize=8,
        )
    axes.set_xlabel(_AXES[over])
    axes.set_ylabel("top-1")
    axes.set_xlim(left=0)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}".replace("%", " %"))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
    _few_ticks(axes)
    return svg(made, f"Top-1 against {_AXES[over]}, condition {condition}, a line an algorithm.")


def consensus(source: Source, condition: str, looks: dict[str, Look]) -> str | None:
    """Distance of the replicas from their mean against samples; None where no run measured it."""
    made, axes = figure(5.2, 3.0)
    drawn = False
    for label in source.labels(condition):
        lines = [
            [line for line in run.metrics if (line.get("consensus") or 0) > 0]
            for run in source.finished(condition, label)
        ]
        drawn |= _band(axes, lines, "samples", "consensus", looks[label], len(source.labels(condition)))
    if not drawn:
        return None
    axes.set_yscale("log")
    lowest, highest = axes.get_ylim()
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    # Between powers of ten only where there are hardly any: labels would lie upon each other.
    axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if highest < 30 * lowest else "")
    axes.set_xlim(left=0)
    axes.set_xlabel(_AXES["samples"])
    axes.set_ylabel("distance from the mean")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
    _few_ticks(axes)
    return svg(made, f"Consensus distance against samples, condition {condition}.")


def histogram(source: Source, condition: str, looks: dict[str, Look]) -> str | None:
    """Shares of merges by their staleness; None where no run counted them."""
    made, axes = figure(5.2, 3.0)
    drawn = False
    for label in source.labels(condition):
        counts: dict[int, int] = {}
        for run in source.finished(condition, label):
            for rank in run.record.get("ranks", ()):
                for steps, merges in (rank["staleness_steps"].get("histogram") or {}).items():
                    counts[int(steps)] = counts.get(int(steps), 0) + merges
        total = sum(counts.values())
        if not total:
            continue
        drawn, look = True, looks[label]
        steps = np.arange(min(counts), max(counts) + 2)
        shares = np.array([counts.get(int(step), 0) / total for step in steps])
        axes.plot(steps, shares, drawstyle="steps-mid", color=look.colour, linestyle=look.line, linewidth=1.6)
    if not drawn:
        return None
    _few_ticks(axes, whole=True)
    axes.set_xlabel("staleness, local steps")
    axes.set_ylabel("share of merges")
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}".replace("%", " %"))
    return svg(made, f"Histogram of staleness, condition {condition}.")


def retention_bars(source: Source, looks: dict[str, Look]) -> str | None:
    """Retention per condition and entry."""
    return _bars(source, looks, lambda run: run.figures["retention"], "retention", "Retention")


def waiting_bars(source: Source, looks: dict[str, Look]) -> str | None:
    """Share of the time in which ranks stood still, per condition and entry."""
    return _bars(source, looks, waited_share, "share of time waited", "Waiting")


def _bars(
    source: Source, looks: dict[str, Look], of: Callable[[Run], float | None], axis: str, says: str
) -> str | None:
    conditions = [condition for condition in source.conditions if source.labels(condition)]
    most = max((len(source.labels(condition)) for condition in conditions), default=0)
    made, axes = figure(max(3.6, min(9.5, 0.16 * most * len(conditions) + 2.0)), 2.6)
    drawn = False
    for place, condition in enumerate(conditions):
        labels = source.labels(condition)
        width = 0.8 / max(1, len(labels))
        for index, label in enumerate(labels):
            found = spread([of(run) for run in source.finished(condition, label)])
            if found is None:
                continue
            drawn, look = True, looks[label]
            middle, low, high = found
            x = place - 0.4 + (index + 0.5) * width
            axes.bar(x, middle, width * 0.86, color=look.colour, hatch=look.hatch, edgecolor=FAINT, linewidth=0)
            axes.vlines(x, low, high, color=INK, linewidth=0.8)
    if not drawn:
        return None
    axes.set_xticks(range(len(conditions)), [_wrapped(condition) for condition in conditions])
    axes.tick_params(axis="x", length=0)
    axes.grid(axis="x", visible=False)
    axes.set_ylabel(axis)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}".replace("%", " %"))
    return svg(made, f"{says} per condition, a bar an algorithm; lines from the lowest to the highest seed.")


def _wrapped(condition: str) -> str:
    return condition if len(condition) <= 18 else condition.replace("+", "+\n")


def _few_ticks(axes: Any, whole: bool = False) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=whole))


def _band(axes: Any, runs: Sequence[Sequence[Any]], over: str, name: str, look: Look, among: int) -> bool:
    """Draws the mean of several seeds as a line, lowest to highest as a band; whether there was anything to draw.

    `among` entries share the axes: the more there are, the fainter are the bands.
    """
    lines = []
    for metrics in runs:
        points = [(line[over], line[name]) for line in metrics if line.get(name) is not None]
        if points:
            lines.append(np.array(sorted(points), dtype=float))
    if not lines:
        return False
    begin, end = max(line[0, 0] for line in lines), min(line[-1, 0] for line in lines)
    style = {"color": look.colour, "linestyle": look.line, "linewidth": 1.6}
    if len(lines) == 1 or end <= begin:
        for line in lines:
            axes.plot(line[:, 0], line[:, 1], marker=look.marker, markersize=3, **style)
        return True
    x = np.linspace(begin, end, POINTS)
    values = np.stack([np.interp(x, line[:, 0], line[:, 1]) for line in lines])
    axes.fill_between(x, values.min(0), values.max(0), color=look.colour, alpha=min(0.2, 0.9 / among), linewidth=0)
    axes.plot(x, values.mean(0), marker=look.marker, markersize=3.2, markevery=(4 + look.index % 8, 16), **style)
    return True
