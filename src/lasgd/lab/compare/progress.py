"""What a person sees of a comparison: how far it is, the present run, and a growing table of what is done."""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from lasgd.lab.compare.figures import Folder
from lasgd.lab.compare.plan import Cell
from lasgd.training.display import duration

ROWS = 12
"""Of the table while the comparison runs; all are in the report."""

_SHARE = re.compile(r"\((\d+)%\)")


class Progress:
    """Shows one comparison; a context manager. On a terminal it moves, elsewhere it is a line per event."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console()
        self._live: Live | None = None
        self._left: Sequence[Cell] = ()
        self._done = 0
        self._took_s: dict[Cell, float] = {}
        self._present: Cell | None = None
        self._since_s = time.monotonic()
        self._tail: Callable[[], str] = str
        self._said_last = ""
        self._results: Mapping[str, Any] = {"runs": []}
        self._failed = 0

    def __enter__(self) -> Progress:
        if self._console.is_terminal:
            self._live = Live(console=self._console, get_renderable=self.render, refresh_per_second=4, transient=True)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        live, self._live = self._live, None
        if live is not None:
            live.stop()

    # What the engine tells

    def before(self, finished: int) -> None:
        """So many runs were finished by earlier calls."""
        self._done = finished

    def plan(self, left: Sequence[Cell]) -> None:
        """What is still to be run, the next one included."""
        self._left = left

    def begin(self, cell: Cell, tail: Callable[[], str]) -> None:
        """A run begins; `tail` gives the last line that it printed."""
        self._present, self._tail, self._since_s = cell, tail, time.monotonic()
        if self._live is None:
            number = self._done + 1
            self.say(f"run {number} of {self._done + len(self._left)}: {named(cell)}; {self._time_left()}")

    def tick(self) -> None:
        """Called a few times a second while a run goes on."""
        self._said_last = self._tail()

    def end(self, cell: Cell, found: Folder) -> None:
        """A run is over."""
        self._present, self._said_last = None, ""
        self._done += found.status in ("finished", "failed")
        if found.took_s is not None:
            self._took_s[cell] = found.took_s
        self._failed += found.status == "failed"
        if found.status != "finished":
            self.say(f"! {named(cell)}: {found.status}: {found.error or 'no reason given'}", "yellow")
        elif self._live is None:
            final = (found.run or {}).get("final") or {}
            self.say(f"{named(cell)}: top-1 {percent(final.get('top1'))} after {duration(found.took_s or 0)}")

    def finished(self, results: Mapping[str, Any]) -> None:
        """results.json is up to date."""
        self._results = results

    def say(self, text: str, style: str = "") -> None:
        """A line that stays."""
        self._console.print(Text(text, style=style), soft_wrap=self._live is None)

    # What is shown

    def render(self) -> RenderableType:
        """The present state."""
        lines: list[RenderableType] = []
        if rows := self._rows():
            lines.append(table(rows[-ROWS:]))
            if len(rows) > ROWS:
                lines.append(Text(f"and {len(rows) - ROWS:,} runs before these", style="dim"))
        total = self._done + len(self._left) - (0 if self._present else min(1, len(self._left)))
        total = max(total, self._done)
        share = (self._done + self._share()) / total if total else 1.0
        failed = f", {self._failed} failed" if self._failed else ""
        bar = Table.grid(padding=(0, 1), expand=True)
        bar.add_column(ratio=1)
        bar.add_column(justify="right", no_wrap=True)
        bar.add_row(
            ProgressBar(total=1.0, completed=min(1.0, share)),
            f"{self._done:,} of {total:,} runs{failed}  {self._time_left()}",
        )
        lines.append(bar)
        if self._present is not None:
            heading = Text(named(self._present), style="bold", no_wrap=True, overflow="ellipsis")
            heading.append(f"  {duration(time.monotonic() - self._since_s)}", style="dim")
            said = Text(self._said_last or "starting ...", style="dim", no_wrap=True, overflow="ellipsis")
            lines += [heading, said]
        return Group(*lines)

    def _rows(self) -> list[Mapping[str, Any]]:
        return [run for run in self._results["runs"] if run["status"] != "missing"]

    def _share(self) -> float:
        """Of the present run, as far as it says."""
        if self._present is None:
            return 0.0
        found = _SHARE.search(self._said_last)
        return int(found[1]) / 100 if found else 0.0

    def _time_left(self) -> str:
        """From runs of this call: of the same entry and condition, else of the same condition, else any."""
        if not self._took_s:
            return "time left unknown"
        seconds = sum(map(self._expected_s, self._left))
        if self._present is not None:
            seconds -= min(time.monotonic() - self._since_s, self._expected_s(self._present))
        return f"about {duration(seconds)} left"

    def _expected_s(self, cell: Cell) -> float:
        groups: dict[int, list[float]] = defaultdict(list)
        for other, took_s in self._took_s.items():
            same_condition = other.condition == cell.condition and other.is_virtual == cell.is_virtual
            groups[0 if same_condition and other.entry == cell.entry else 1 if same_condition else 2].append(took_s)
        nearest = groups[min(groups)]
        return sum(nearest) / len(nearest)


def named(cell: Cell) -> str:
    """One run in words."""
    lr = "" if cell.lr is None else f", lr {cell.lr:g}"
    return f"{cell.entry.label}, {cell.condition}, seed {cell.seed}{lr}{', virtual' if cell.is_virtual else ''}"


def table(runs: Sequence[Mapping[str, Any]]) -> Table:
    """Runs of results.json as a table."""
    found = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
    for name in ("algorithm", "condition"):
        found.add_column(name, overflow="fold")
    for name in ("seed", "lr", "to target", "top-1", "retention", "waited"):
        found.add_column(name, justify="right", no_wrap=True)
    for run in runs:
        if run["status"] == "finished":
            figures = [
                seconds(run["seconds_to_target"]),
                percent(run["final_top1"]),
                percent(run["retention"]),
                seconds(run["waited_s"]),
            ]
            found.add_row(run["algorithm"], run["condition"], str(run["seed"]), f"{run['lr']:g}", *figures)
        else:
            row = (run["algorithm"], run["condition"], str(run["seed"]), f"{run['lr']:g}", run["status"])
            found.add_row(*row, style="yellow")
    return found


def percent(share: float | None) -> str:
    """`87.1 %`, or a dash."""
    return "-" if share is None else f"{share:.1%}".replace("%", " %")


def seconds(value: float | None) -> str:
    """`12.3 s`, or a dash."""
    return "-" if value is None else f"{value:.1f} s" if value < 1000 else f"{value:,.0f} s"
