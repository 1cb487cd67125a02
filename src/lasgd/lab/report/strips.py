"""Timeline strips: who computes, who waits, and when rounds go on, for ten seconds from the middle of a run.

A strip is cut into columns; each says which share of it its rank computed and waited. So a strip is as true for steps
of a millisecond as for steps of a second, and as small: what is equal in neighbouring columns is drawn once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np

from lasgd.lab.report.source import Run

SECONDS = 10.0
COLUMNS = 800
LEVELS = 8
"""Shares are drawn to an eighth."""
ROW, BAR, ROUND, LEFT = 20, 11, 4, 44
BOUNDARY_COLUMNS = 5
"""Local steps at least so long get a mark where they end."""

_COMPUTE = frozenset({"compute", "update"})
_ROUND = frozenset({"round", "exchange"})


@dataclass(frozen=True)
class Row:
    """One rank's ten seconds; begins and ends in columns."""

    rank: int
    compute: np.ndarray
    """Share of each column, (COLUMNS,)."""
    wait: np.ndarray
    """The same for waiting."""
    rounds: Sequence[tuple[float, float]]
    boundaries: Sequence[float]


def window(run: Run, events: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """(begin_s, end_s) of the ten seconds in the middle of the run, or of all of it where it is shorter."""
    end_s = run.figures["wall_s"] or max((event["ts"] + event["dur"] for event in events), default=0.0) * 1e-6
    return max(0.0, end_s / 2 - SECONDS / 2), min(end_s, end_s / 2 + SECONDS / 2)


def rows(events: Iterable[Mapping[str, Any]], begin_s: float, end_s: float) -> list[Row]:
    """A row for each rank that did anything between begin_s and end_s."""
    per_s = COLUMNS / max(1e-9, end_s - begin_s)
    found: dict[int, list[tuple[str, float, float]]] = {}
    for event in events:
        begin, end = event["ts"] * 1e-6, (event["ts"] + event["dur"]) * 1e-6
        if end > begin_s and begin < end_s:
            columns = (max(0.0, (begin - begin_s) * per_s), min(float(COLUMNS), (end - begin_s) * per_s))
            found.setdefault(event["pid"], []).append((event["name"], *columns))
    return [_row(rank, found[rank]) for rank in sorted(found)]


def _row(rank: int, intervals: Sequence[tuple[str, float, float]]) -> Row:
    computing = [(begin, end) for kind, begin, end in intervals if kind in _COMPUTE]
    waiting = [(begin, end) for kind, begin, end in intervals if kind == "wait"]
    ends = [end for kind, begin, end in intervals if kind == "compute" and end - begin >= BOUNDARY_COLUMNS]
    rounds = [(begin, end) for kind, begin, end in intervals if kind in _ROUND]
    return Row(rank, coverage(computing), coverage(waiting), _joined(sorted(rounds)), ends)


def coverage(intervals: Sequence[tuple[float, float]], columns: int = COLUMNS) -> np.ndarray:
    """Which share of each of `columns` the intervals cover, (columns,); their ends are in columns."""
    total = np.zeros(columns + 1)
    edges = np.arange(columns + 1, dtype=float)
    for begin, end in intervals:
        if end - begin < 1.0 and int(begin) == int(end):
            total[int(begin)] += end - begin
            continue
        first, last = int(begin), min(int(np.ceil(end)), columns)
        total[first:last] += np.minimum(edges[first + 1 : last + 1], end) - np.maximum(edges[first:last], begin)
    return np.clip(total[:columns], 0.0, 1.0)


def _joined(rounds: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Rounds too close for a gap between them, drawn as one."""
    joined: list[tuple[float, float]] = []
    for begin, end in rounds:
        if joined and begin - joined[-1][1] < 0.75:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((begin, end))
    return joined


def strip(run: Run) -> str | None:
    """The strip of one run as inline SVG; None where it has no timeline."""
    events = run.trace()
    begin_s, end_s = window(run, events)
    found = rows(events, begin_s, end_s)
    if not found or end_s <= begin_s:
        return None
    height = len(found) * ROW + 14
    parts = [_drawn(row, index * ROW) for index, row in enumerate(found)]
    parts.append(_axis(begin_s, end_s, len(found) * ROW))
    says = f"Timeline of {run.label}, condition {run.condition}, {begin_s:.1f} s to {end_s:.1f} s: a row a rank."
    return (
        f'<svg class="strip" viewBox="0 0 {LEFT + COLUMNS + 6} {height}" role="img" '
        f'aria-label="{says.replace("&", "&amp;").replace("<", "&lt;").replace(chr(34), "&quot;")}">'
        f"{''.join(parts)}</svg>"
    )


def _drawn(row: Row, top: int) -> str:
    compute = np.round(row.compute * LEVELS).astype(int)
    wait = np.minimum(np.round(row.wait * LEVELS).astype(int), LEVELS - compute)
    # Little is not nothing: a wait too short for an eighth of a column is drawn where no rounding has hidden it.
    wait = np.where((wait == 0) & (row.wait > 0.02) & (compute < LEVELS), 1, wait)
    base = top + 2 + BAR
    parts = [f'<text class="t" x="{LEFT - 6}" y="{top + BAR + 1}" text-anchor="end">rank {row.rank}</text>']
    parts.append(_area(compute, np.zeros_like(compute), base, "k"))
    parts.append(_area(wait, compute, base, "w"))
    if row.boundaries:
        marks = "".join(f"M{LEFT + x:.1f} {top + 2}v{BAR}" for x in row.boundaries)
        parts.append(f'<path class="b" d="{marks}"/>')
    if row.rounds:
        parts.append(f'<path class="r" d="{"".join(_bar(x, y, base + 1) for x, y in row.rounds)}"/>')
    return "".join(parts)


def _bar(begin: float, end: float, top: float) -> str:
    """One round, a little shorter than it was, so that the next one is told from it."""
    x = LEFT + begin
    return f"M{x:.1f} {top}h{max(0.4, end - begin - 0.5):.1f}v{ROUND}H{x:.1f}z"


def _area(levels: np.ndarray, below: np.ndarray, base: float, kind: str) -> str:
    """Columns of `levels` on top of those of `below`, equal neighbours as one."""
    marks, x = [], 0
    for (level, start), group in groupby(zip(levels.tolist(), below.tolist(), strict=True)):
        width = len(list(group))
        if level:
            y, high = base - (start + level) * BAR / LEVELS, level * BAR / LEVELS
            marks.append(f"M{LEFT + x} {y:.4g}h{width}v{high:.4g}h-{width}z")
        x += width
    return f'<path class="{kind}" d="{"".join(marks)}"/>' if marks else ""


def _axis(begin_s: float, end_s: float, top: int) -> str:
    per_s = COLUMNS / (end_s - begin_s)
    step = next((s for s in (0.1, 0.2, 0.5, 1.0, 2.0) if (end_s - begin_s) / s <= 10), 2.0)
    first = int(np.ceil(begin_s / step - 1e-9))
    parts = []
    for index in range(first, int(np.floor(end_s / step + 1e-9)) + 1):
        x = LEFT + (index * step - begin_s) * per_s
        parts.append(f'<text class="t" x="{x:.1f}" y="{top + 11}" text-anchor="middle">{index * step:g} s</text>')
    return "".join(parts)
