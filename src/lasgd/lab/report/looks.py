"""How the report's figures look: colours that follow the page's light or dark, and SVG small enough to put inline.

matplotlib knows fixed colours only. So it draws with stand-ins, and each is replaced by the CSS variable that stands
for it; the page says what the variable is in light and in dark. Seven colours and three line styles tell entries apart:
a colour-blind reader has lightness, line style and marker beside the hue.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

LIGHT = ("#0b62a8", "#c4480a", "#0a7d5c", "#a23b80", "#2b8cc4", "#8a6d00", "#4a4a4a")
DARK = ("#5aa9f0", "#ff9152", "#35c69c", "#e88bc6", "#9fd8ff", "#e2c93c", "#d0d0d0")
"""Blue, vermilion, green, purple, sky, ochre, grey; after Okabe and Ito, darker for white paper, lighter for black."""

_DASHES = ("", "5 2.5", "1.5 2")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h", "*", "d", "8")
_HATCHES = ("", "////", "....")

INK, FAINT = "#010203", "#040506"
"""Stand-ins for text and for grid lines."""


@dataclass(frozen=True)
class Look:
    """How one entry is drawn, everywhere in the report."""

    index: int

    @property
    def colour(self) -> str:
        """matplotlib's stand-in."""
        return f"#0a0b{self.index % len(LIGHT):02x}"

    @property
    def css(self) -> str:
        """The same for CSS."""
        return f"var(--c{self.index % len(LIGHT)})"

    @property
    def dashes(self) -> str:
        """As SVG's stroke-dasharray; empty for a solid line."""
        return _DASHES[self.index // len(LIGHT) % len(_DASHES)]

    @property
    def line(self) -> Any:
        """As matplotlib's linestyle."""
        return (0, tuple(map(float, self.dashes.split()))) if self.dashes else "-"

    @property
    def marker(self) -> str:
        """As matplotlib's."""
        return _MARKERS[self.index % len(_MARKERS)]

    @property
    def hatch(self) -> str:
        """For bars."""
        return _HATCHES[self.index // len(LIGHT) % len(_HATCHES)]


def looks(labels: Sequence[str]) -> dict[str, Look]:
    """A look for each entry, by its place."""
    return {label: Look(index) for index, label in enumerate(labels)}


def css_variables(colours: Sequence[str]) -> str:
    """The series' colours as CSS variables."""
    return " ".join(f"--c{index}: {colour};" for index, colour in enumerate(colours))


def figure(width: float, height: float) -> tuple[Any, Any]:
    """A matplotlib figure with one pair of axes, set up."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        made = Figure(figsize=(width, height), layout="constrained")
        return made, made.subplots()


def svg(made: Any, says: str) -> str:
    """The figure as inline SVG, described by `says` for those who cannot see it."""
    import matplotlib

    paper = io.StringIO()
    with matplotlib.rc_context(_STYLE):
        made.savefig(
            paper,
            format="svg",
            transparent=True,
            metadata={"Date": None, "Creator": None, "Type": None, "Format": None},
        )
    return inlined(paper.getvalue(), says)


_STYLE: Any = {
    "svg.hashsalt": "lasgd",
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.grid": True,
    "axes.axisbelow": True,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "text.color": INK,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "hatch.linewidth": 0.8,
    "path.simplify": True,
}


def inlined(text: str, says: str) -> str:
    """A drawn SVG as part of a page: small, and with the page's colours."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', text))
    text = re.sub(r' id="([^"]+)"', lambda found: found[0] if found[1] in used else "", text)
    # A hundredth of a point is finer than any screen. Only within tags: what stands between them is for the reader.
    text = re.sub(r"<[^>]*>", lambda tag: re.sub(r"(\d+\.\d\d)\d+", r"\1", tag[0]), text)
    text = re.sub(r"\s*\n\s*", "\n", text)
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", text)
    text = text.replace(INK, "var(--ink)").replace(FAINT, "var(--faint)")
    text = re.sub(r"#0a0b(\d\d)", lambda found: f"var(--c{int(found[1], 16)})", text)
    head = re.match(r"<svg [^>]*>", text)
    assert head is not None
    view = re.search(r'viewBox="[^"]*"', head[0])
    assert view is not None
    described = says.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    # The xlink namespace is not needed inside HTML5, but the prefix is understood by its parser.
    width = float(view[0].split()[2])
    return (
        f'<svg class="chart" {view[0]} style="max-width: {1.5 * width:.0f}px" role="img" aria-label="{described}">'
        f"{text[head.end() :].strip()}"
    )
