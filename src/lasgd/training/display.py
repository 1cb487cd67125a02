"""What a person sees of a run: its progress on rank 0, and the closing table.

The training thread hands the latest `Snapshot` over and goes on; another thread shows it, four times a second on a
terminal, else one plain line every ten seconds.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.measure import Measurement
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from lasgd.health import Health
from lasgd.training.room import LEAST_ROOM, Room, room_of

OVERRUN_LIMIT = 0.02
"""Above this share of padded steps that outlasted their padding, rates stand for nothing."""

_NOTES_SHOWN = 4
_RANKS_SHOWN = 12


@dataclass(frozen=True)
class Snapshot:
    """Where a run stands. None where a thing is not known yet."""

    samples: int
    budget: int
    samples_per_s: float | None
    """Of all ranks together."""
    loss: float | None
    rounds: int
    staleness_steps: float | None
    waited_s: float
    wall_s: float
    left_s: float | None
    world_size: int
    fragments: int
    notes: Sequence[str] = ()
    """What went wrong and was mended, oldest first."""
    virtual_s: float | None = None
    """In a simulated run: seconds on the virtual clock, which `samples_per_s` and `waited_s` are of."""


class Display:
    """Shows the progress of one run; a context manager. Prints nothing once it is closed, which may happen twice."""

    def __init__(self, title: str, console: Console | None = None, plain_every_s: float = 10.0) -> None:
        self._title = title
        self._console = console or Console()
        self._plain_every_s = plain_every_s
        self._latest: Snapshot | None = None
        self._status = ""
        self._text = ""
        self._live: Live | None = None
        self._plain: threading.Thread | None = None
        self._closing = threading.Event()
        self._printing = threading.Lock()
        self._printed: Snapshot | None = None
        self._notes_printed = 0

    def __enter__(self) -> Display:
        if self._console.is_terminal:
            self._live = Live(console=self._console, get_renderable=self.render, refresh_per_second=4)
            self._live.start()
        else:
            self._plain = threading.Thread(target=self._print_lines, name="lasgd-display", daemon=True)
            self._plain.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def update(self, snapshot: Snapshot) -> None:
        """Takes over the latest state; costs the caller an assignment."""
        self._latest = snapshot

    def status(self, text: str, detail: str = "") -> None:
        """Says what is being done outside the local steps, such as `evaluating`; empty for training.

        `detail`, such as `3 of 9`, is for terminals: a log gets a line when the text changes.
        """
        is_news = text != self._text
        self._text, self._status = text, f"{text} {detail}".rstrip()
        if self._plain is not None and text and is_news:
            self._print_line()
            self._console.print(Text(text), soft_wrap=True)

    def close(self) -> None:
        """Shows the latest state a last time and ends the display's thread."""
        live, self._live = self._live, None
        if live is not None:
            live.stop()
        plain, self._plain = self._plain, None
        if plain is not None:
            self._closing.set()
            plain.join()
            self._print_line()

    def render(self) -> RenderableType:
        """The latest state, a few lines high."""
        heading = Text(self._title, style="bold", no_wrap=True, overflow="ellipsis")
        now = self._latest
        if now is None:
            return Group(heading, Text(f"{self._status or 'starting'} ...", style="dim"))
        share = min(1.0, now.samples / max(1, now.budget))
        bar = Table.grid(padding=(0, 1), expand=True)
        bar.add_column(ratio=1)
        bar.add_column(justify="right", no_wrap=True)
        bar.add_row(
            ProgressBar(total=1.0, completed=share),
            f"{share:4.0%}  {now.samples:,} of {now.budget:,} samples  {_left(now)}",
        )
        grid = Table.grid(padding=(0, 3), expand=False)
        for row in _figures(now):
            grid.add_row(*(f"[dim]{name}[/] {value}" for name, value in row))
        lines: list[RenderableType] = [heading, bar, grid]
        hidden = len(now.notes) - _NOTES_SHOWN
        if hidden > 0:
            lines.append(Text(f"! {hidden} earlier notes", style="yellow"))
        lines += [Text(f"! {note}", style="yellow") for note in now.notes[-_NOTES_SHOWN:]]
        if self._status:
            lines.append(Text(f"{self._status} ...", style="dim"))
        return Group(*lines)

    def _print_lines(self) -> None:
        while not self._closing.wait(self._plain_every_s):
            self._print_line()

    def _print_line(self) -> None:
        with self._printing:
            now = self._latest
            if now is None or now is self._printed:
                return
            self._printed = now
            for note in now.notes[self._notes_printed :]:
                self._console.print(Text(f"! {note}"), soft_wrap=True)
            self._notes_printed = len(now.notes)
            self._console.print(Text(plain_line(now)), soft_wrap=True)


def plain_line(now: Snapshot) -> str:
    """One line without colours or motion, for logs."""
    figures = ", ".join(f"{name} {value}" for row in _figures(now) for name, value in row)
    share = min(1.0, now.samples / max(1, now.budget))
    return f"{now.samples:,} of {now.budget:,} samples ({share:.0%}), {_left(now)}, {figures}"


def _left(now: Snapshot) -> str:
    return "time left unknown" if now.left_s is None else f"{duration(now.left_s)} left"


def _figures(now: Snapshot) -> list[list[tuple[str, str]]]:
    """The figures as rows of (name, value with its unit)."""
    clock_s = now.wall_s if now.virtual_s is None else now.virtual_s
    share = now.waited_s / clock_s if clock_s > 0 else 0.0
    elapsed = [("elapsed", duration(now.wall_s))]
    if now.virtual_s is not None:
        elapsed.insert(0, ("virtual time", duration(now.virtual_s)))
    return [
        [
            ("samples/s", _number(now.samples_per_s, ",.0f")),
            ("loss", _number(now.loss, ".4f")),
            ("rounds", f"{now.rounds:,}"),
            ("fragments", str(now.fragments)),
        ],
        [
            ("ranks", f"{now.world_size:,}"),
            ("staleness", _number(now.staleness_steps, ".1f", " steps")),
            ("waited", f"{now.waited_s:.2f} s ({share:.1%})"),
            *elapsed,
        ],
    ]


def print_summary(run: Mapping[str, Any], console: Console | None = None, out: str | None = None) -> None:
    """Prints the closing tables of `run`, the object in run.json; `out` is the folder with the results."""
    console = console or Console()
    final = run.get("final") or {}
    virtual_s = run.get("virtual_s")
    clock_s = run["wall_s"] if virtual_s is None else virtual_s
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="dim")
    facts.add_column()
    rows: list[tuple[str, str]] = [("status", run["status"])]
    if final:
        rows += [
            ("top-1", _percent(final.get("top1"))),
            ("top-5", _percent(final.get("top5"))),
            ("loss", _number(final.get("loss"), ".4f")),
        ]
    rows += [
        ("samples", f"{run['samples']:,}"),
        *([] if virtual_s is None else [("virtual time", f"{duration(virtual_s)} ({virtual_s:,.1f} s)")]),
        ("wall time", f"{duration(run['wall_s'])} ({run['wall_s']:,.1f} s)"),
        (
            "samples/s" if virtual_s is None else "samples/virtual s",
            _number((run["samples"] - (run.get("resumed_from_samples") or 0)) / clock_s if clock_s else None, ",.0f"),
        ),
        ("replicas identical", {True: "yes", False: "no", None: "not compared"}[run.get("replicas_identical")]),
        ("condition", run["condition"]),
        *_virtual_cluster(run.get("settings") or {}),
        ("link emulation", run["link_emulation"]),
    ]
    if run.get("fragments"):
        rows.append(("fragments", str(run["fragments"])))
    if run.get("resumed_from_samples"):
        rows.append(("resumed from", f"{run['resumed_from_samples']:,} samples"))
    for name, value in rows:
        facts.add_row(name, escape(value))
    console.print()
    console.print(facts)
    if run["ranks"]:
        console.print()
        console.print(whole(_rank_table(run["ranks"], clock_s)), crop=False)
        if len(run["ranks"]) > _RANKS_SHOWN:
            console.print(Text(f"and {len(run['ranks']) - _RANKS_SHOWN:,} more ranks, in run.json", style="dim"))
    for warning in warnings(run):
        console.print(Text(f"! {warning}", style="yellow"), soft_wrap=not console.is_terminal)
    if run.get("error"):
        console.print(Text(f"error: {run['error']}", style="red"), soft_wrap=not console.is_terminal)
    if out is not None:
        console.print(Text(f"results: {out}"), soft_wrap=True)


def _virtual_cluster(settings: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What a simulated run was told of its cluster beside the condition."""
    return [(name, str(settings[name])) for name in ("network", "compute") if settings.get(name) is not None]


def _rank_table(ranks: Sequence[Mapping[str, Any]], clock_s: float) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
    for name in ("rank", "steps", "rounds", "waited", "staleness", "max", "sent"):
        table.add_column(name, justify="right", no_wrap=True)
    for rank in _first_and_last(ranks):
        share = rank["waited_s"] / clock_s if clock_s else 0.0
        staleness = rank["staleness_steps"]
        table.add_row(
            str(rank["rank"]),
            f"{rank['local_steps']:,}",
            f"{rank['rounds']:,}",
            f"{rank['waited_s']:.2f} s ({share:.2%})",
            _number(staleness["mean"], ".1f", " steps"),
            _number(staleness["max"], "g"),
            _bytes(rank["bytes_sent"]),
        )
    return table


def whole(table: Table) -> Table:
    """The same table, with no column cut where the terminal is narrow; to be printed with crop=False, so lines wrap."""
    wide = Console(width=1_000)
    table.width = Measurement.get(wide, wide.options, table).maximum
    return table


def _first_and_last(ranks: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The last ranks too: `straggler=last:4x` is a usual condition."""
    if len(ranks) <= _RANKS_SHOWN:
        return list(ranks)
    return [*ranks[: _RANKS_SHOWN - 2], *ranks[-2:]]


def warnings(run: Mapping[str, Any]) -> list[str]:
    """What a reader must know before believing the figures of `run`."""
    found = []
    overrun = run.get("padding_overrun") or 0.0
    if overrun > OVERRUN_LIMIT:
        found.append(
            f"{overrun:.1%} of the steps outlasted their padding (limit {OVERRUN_LIMIT:.0%}): the rates of this run "
            "stand for nothing. Use a longer step=, a smaller model or fewer ranks."
        )
    room = room_of(run)
    if room is not None and min(room) < LEAST_ROOM:
        found.append(_of_little(room, run["settings"]))
    if run.get("replicas_identical") is False and run["algorithm"] != "independent":
        found.append("the replicas differ at the end, which must not happen: please report it.")
    found += _first(
        [
            f"rank {event['rank']} {_said(event)} at round {event['round']}: took the mean"
            for event in run.get("health", ())
        ],
        "health",
    )
    skipped = run.get("skipped_images") or ()
    if skipped:
        named = ", ".join(skipped[:3]) + (", ..." if len(skipped) > 3 else "")
        images = "image" if len(skipped) == 1 else "images"
        found.append(f"{len(skipped):,} {images} could not be decoded and skipped: {named}")
    return found + _first(run.get("notes") or (), "notes")


def _said(event: Mapping[str, Any]) -> str:
    return Health[event.get("found", Health.NOT_FINITE.name).upper()].said


def _of_little(room: Room, settings: Mapping[str, Any]) -> str:
    share = f"{min(room):.0%}" if min(room) >= 0.01 else "less than 1%"
    remedies = [] if settings.get("fragments") == "auto" else ["--fragments auto"]
    if room.of_mean < room.of_ranks:
        what = "the mean's momentum answers too late in so short a cycle, and the mean swings ever further"
        remedies.append("--outer-momentum 0")
    else:
        what = "the ranks swing ever further apart"
        remedies += ["--wire int8"] if settings.get("wire") in (None, "fp32") else []
    return (
        f"rounds like these leave the learning rate {share} of the room that synchronous SGD has (docs/theory.md): "
        f"where the loss is steep, {what} at a learning rate that would suit it. "
        f"Use {' or '.join([*remedies, 'a lower --lr'])}."
    )


def _first(lines: Sequence[str], key: str) -> list[str]:
    """As many as a terminal bears; `key` is where run.json has all of them."""
    hidden = len(lines) - _NOTES_SHOWN
    return [*lines[:_NOTES_SHOWN], *([f"and {hidden:,} more, in run.json under `{key}`"] if hidden > 0 else [])]


def duration(seconds: float) -> str:
    """`0:01:05`; hours may exceed 24."""
    whole = max(0, round(seconds))
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def _number(value: float | None, style: str, unit: str = "") -> str:
    return "-" if value is None else f"{value:{style}}{unit}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.2%}"


def _bytes(n: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1000
    return f"{n:.1f} TB"
