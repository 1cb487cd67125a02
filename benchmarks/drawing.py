"""How the figures of the documents look: greys and colours that read on white and on black, the same bytes every time.

Each picture names in its metadata the data that it was drawn from, so that a test can tell whether it is up to date
without drawing it again: what it would draw depends on matplotlib's version, which is no dependency of lasgd.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from common import FOLDER

IMAGES = FOLDER.parent / "docs" / "images"

GREY = "#777777"
BLUE, ORANGE, GREEN, PURPLE = "#4c78a8", "#e0862e", "#2f9e83", "#a667b8"
"""Told apart with any kind of colour vision, by hue or by lightness."""


def pyplot() -> Any:
    """matplotlib's, set up; imported only by who draws."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update(
        {
            "svg.hashsalt": "lasgd",  # the same bytes every time
            "axes.edgecolor": GREY,
            "axes.labelcolor": GREY,
            "axes.titlecolor": GREY,
            "axes.titlesize": 10,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "xtick.color": GREY,
            "ytick.color": GREY,
            "text.color": GREY,
            "grid.color": GREY,
            "grid.alpha": 0.25,
            "grid.linewidth": 0.6,
            "lines.linewidth": 1.8,
            "lines.markersize": 4.5,
        }
    )
    from matplotlib import pyplot as found

    return found


def save(figure: Any, path: Path, drawn_from: Any) -> None:
    """Writes `path` as SVG, transparent, marked with the data that it shows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, transparent=True, metadata={"Date": None, "Description": mark(drawn_from)})


def mark(data: Any) -> str:
    """What a picture of `data` says of itself."""
    text = json.dumps(data, sort_keys=True, allow_nan=False)
    return f"drawn from figures with SHA-256 {hashlib.sha256(text.encode()).hexdigest()}"
