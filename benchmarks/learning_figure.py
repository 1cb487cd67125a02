"""The pictures of docs/experiments.md, from what benchmarks/learning.py has stored.

    python benchmarks/learning_figure.py

One shows what every candidate comes to in the cell that all were put through, the other how it changes with the delay.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from common import RESULTS
from drawing import BLUE, GREEN, GREY, IMAGES, ORANGE, PURPLE, pyplot, save
from learning_trials import DEFAULT, INT8, SCREEN

BY_CANDIDATE, BY_DELAY = IMAGES / "learning_screen.svg", IMAGES / "learning_delay.svg"
MARK = "synchronous"
LINES = {
    MARK: GREY,
    "local, H = 10": PURPLE,
    "full, whole vector": ORANGE,
    "full": BLUE,
    DEFAULT: GREEN,
    INT8: GREEN,
}
DASHED = {INT8}

Points = dict[str, list[list[float]]]
"""By candidate: (where it stands, top-1 in per cent) of every seed."""


def of_screen(records: Sequence[Mapping[str, Any]]) -> Points:
    """Every candidate of the prototype's cell, the best last: its place, its top-1."""
    found = [record for record in records if record["top1"] and record["cell"] == asdict(SCREEN)]
    found.sort(key=lambda record: statistics.fmean(record["top1"].values()))
    return {
        record["candidate"]: [[place, value] for value in record["top1"].values()] for place, record in enumerate(found)
    }


def of_delay(records: Sequence[Mapping[str, Any]]) -> Points:
    """Some of them by delay, all else as in the prototype's cell."""
    found: Points = {}
    for record in sorted(records, key=lambda record: record["cell"]["delay"]):
        is_like = record["cell"] | {"delay": SCREEN.delay} == asdict(SCREEN)
        if record["candidate"] in LINES and record["top1"] and is_like:
            values = record["top1"].values()
            found.setdefault(record["candidate"], []).extend([record["cell"]["delay"], value] for value in values)
    return found


def draw_screen(points: Points) -> None:
    """A row for each candidate, a dot for each seed."""
    figure, axes = pyplot().subplots(figsize=(7.2, 0.6 + 0.2 * len(points)), layout="constrained")
    colours = {MARK: ORANGE, DEFAULT: GREEN}
    for label, seeds in points.items():
        places, values = zip(*seeds, strict=True)
        axes.plot(values, places, "o", color=colours.get(label, BLUE))
    if MARK in points:
        axes.axvline(statistics.fmean(value for _, value in points[MARK]), color=ORANGE, linewidth=0.8)
    axes.set_yticks(range(len(points)), list(points), fontsize=8)
    axes.set(ylim=(-0.6, len(points) - 0.4), xlabel="top-1 after 60,000 samples, %, at the best learning rate")
    axes.grid(True, axis="x")
    save(figure, BY_CANDIDATE, points)


def draw_delay(points: Points) -> None:
    """A line for each candidate through the means, a dot for each seed."""
    figure, axes = pyplot().subplots(figsize=(7.2, 3.4), layout="constrained")
    for label, colour in LINES.items():
        by_delay: dict[float, list[float]] = {}
        for delay, value in points.get(label, ()):
            by_delay.setdefault(delay, []).append(value)
        if by_delay:
            means = list(map(statistics.fmean, by_delay.values()))
            line, fill = ("--", "none") if label in DASHED else ("-", "full")
            axes.plot(list(by_delay), means, line, color=colour, label=label)
            axes.plot(*zip(*points[label], strict=True), "o", color=colour, fillstyle=fill)
    axes.set(xscale="log", xlabel="local steps that the whole vector is on the wire", ylabel="top-1, %")
    axes.set_xticks([0.5, 1, 5, 10, 20, 50], ["0.5", "1", "5", "10", "20", "50"])
    axes.minorticks_off()
    axes.grid(True)
    axes.legend(frameon=False, fontsize=8, labelcolor=GREY)
    save(figure, BY_DELAY, points)


def main() -> None:
    """Draws both."""
    records = json.loads((RESULTS / "learning.json").read_text(encoding="utf-8"))["figures"]["records"]
    draw_screen(of_screen(records))
    draw_delay(of_delay(records))


if __name__ == "__main__":
    main()
