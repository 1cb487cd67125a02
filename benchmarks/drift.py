"""How far ranks drift apart on a quadratic, and where that has no end: tables and figure of docs/theory.md.

    python benchmarks/drift.py            a few seconds; nothing is timed
    python benchmarks/drift.py --draw     the figure again, from the stored result

Worked out by lasgd.lab.drift; that the text of `lasgd` does the same in virtual time, tests/virtual/test_drift.py says.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from common import RESULTS, Report, arguments_for, run_card, where_to_store
from drawing import BLUE, GREEN, GREY, IMAGES, ORANGE, PURPLE, pyplot, save
from lasgd.lab.drift import Cycle, MeanCycle, variance_alone

MOMENTA = (0.0, 0.5, 0.9)
DELAYS = (1, 2, 5, 10, 20, 50)
FRAGMENTS = (1, 2, 5, 10)
MOMENTUM, DELAY, PER_DECADE = 0.9, 10, 16
LINES = {
    "local SGD, every 10 steps": Cycle(DELAY, 0, MOMENTUM),
    "whole vector, 10 steps late": Cycle(DELAY, DELAY, MOMENTUM),
    "the same with gain 0.3": Cycle(DELAY, DELAY, MOMENTUM, gain=0.3),
    "10 fragments in turn, 1 step late": Cycle(DELAY, 1, MOMENTUM),
    "the same, momentum of the mean": Cycle(DELAY, 1, 0.0),
}
SPLITS = ((0.9, 0.0), (0.8, 0.5), (0.5, 0.8), (0.0, 0.9))
"""Momentum of the optimizers and of the mean: the same learning rate moves the mean equally far, by and by."""
TURNS = (1, 2, 3, 4, 6, 10)
LATE = (1, 5, 20)
FIGURE = IMAGES / "drift.svg"


def limits(delays: Sequence[int] = DELAYS) -> list[dict[str, Any]]:
    """The least c = learning rate times curvature at which differences grow, by momentum, delay and fragments."""
    return [
        {
            "momentum": momentum,
            "delay": delay,
            "fragments": fragments,
            "limit": _finite(Cycle(delay, delay // fragments, momentum).limit()),
            "alone": 2 * (1 + momentum),
        }
        for momentum in MOMENTA
        for delay in delays
        for fragments in FRAGMENTS
        if delay % fragments == 0
    ]


def mean_limits() -> list[dict[str, Any]]:
    """The least c at which the mean itself runs away, by where momentum is, fragments and the delay of each."""
    return [
        {
            "momentum": momentum,
            "outer_momentum": outer,
            "fragments": fragments,
            "late": late,
            "limit": _finite(MeanCycle(fragments * late, late, momentum, outer).limit()),
            "alone": 2 * (1 + momentum),
        }
        for momentum, outer in SPLITS
        for late in LATE
        for fragments in TURNS
    ]


def lines() -> dict[str, list[tuple[float, float | None]]]:
    """(c, variance over that of ranks with momentum that never average); None where it grows without end."""
    places = [10 ** (k / PER_DECADE - 4) for k in range(4 * PER_DECADE + 1)]
    return {
        label: [(c, _finite(cycle.variance(c) / variance_alone(c, MOMENTUM))) for c in places]
        for label, cycle in LINES.items()
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def draw(result: Mapping[str, Any]) -> None:
    """How much of the drift is left, by c."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(7.2, 3.6), layout="constrained")
    colours = (GREY, ORANGE, PURPLE, BLUE, GREEN)
    for colour, (label, line) in zip(colours, result["figures"]["lines"].items(), strict=False):
        axes.plot(*zip(*((c, math.nan if v is None else v) for c, v in line), strict=True), color=colour, label=label)
    axes.set(xscale="log", yscale="log", xlabel="learning rate x curvature", ylabel="variance of the difference")
    axes.set_ylim(1e-4, 10)
    axes.grid(True)
    axes.legend(frameon=False, fontsize=8, loc="lower right", labelcolor=GREY)
    save(figure, FIGURE, result["figures"]["lines"])


def main() -> int:
    """Works it out and stores it."""
    parser = arguments_for("drift", __doc__)
    parser.add_argument("--draw", action="store_true", help="draw the figure again, from the stored result")
    arguments = parser.parse_args()
    if arguments.draw:
        draw(json.loads((RESULTS / "drift.json").read_text(encoding="utf-8")))
        return 0
    report = Report("drift", run_card({"figure": "momentum 0.9, delay 10"}, ()))
    report.figures = {"limits": limits(), "mean_limits": mean_limits(), "lines": lines()}
    where = where_to_store("drift", arguments)
    code = report.finish(where)
    if where == RESULTS / "drift.json":
        draw(report.as_json())
    return code


if __name__ == "__main__":
    sys.exit(main())
