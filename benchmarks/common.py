"""What all benchmarks share: the run card, the bars, and the one JSON object that ends their output."""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
RESULTS = FOLDER / "results"

DISTURBED = 1.05
"""Averaging makes no rank faster: a retention above this says that something else slowed the yardstick down."""

Value = float | bool | None


@dataclass(frozen=True)
class Bar:
    """One figure and what it is held to. A `value` of None could not be measured: neither held nor missed."""

    what: str
    value: Value
    at_least: float | None = None
    at_most: float | None = None
    """Neither given: `value` is a statement that must be true."""
    unit: str = ""
    among: tuple[float, float] | None = None
    """Lowest and highest of the values whose median `value` is."""

    @property
    def text(self) -> str:
        """The bar as a reader wants it, such as `>= 0.97`."""
        if self.at_least is not None:
            return f">= {self.at_least:g}{self.unit}"
        if self.at_most is not None:
            return f"<= {self.at_most:g}{self.unit}"
        return "true"

    @property
    def holds(self) -> bool | None:
        """None where there is no value; NaN holds nothing."""
        if self.value is None:
            return None
        if self.at_least is not None:
            return self.value >= self.at_least
        if self.at_most is not None:
            return self.value <= self.at_most
        return self.value is True


@dataclass
class Report:
    """What one benchmark has to say; figures and bars are filled in as they come."""

    benchmark: str
    card: dict[str, Any]
    figures: dict[str, Any] = field(default_factory=dict)
    bars: list[Bar] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, bar: Bar) -> None:
        """Takes in one bar and says on stdout how it went."""
        self.bars.append(bar)
        verdict = {True: "holds", False: "MISSED", None: "not measured"}[bar.holds]
        print(f"  {verdict:12}  {bar.what}: {format_value(bar.value)}{bar.unit}  ({bar.text})", flush=True)

    @property
    def holds(self) -> bool | None:
        """True if no bar was missed, None if nothing was measured at all."""
        verdicts = [bar.holds for bar in self.bars if bar.holds is not None]
        return all(verdicts) if verdicts else None

    def as_json(self) -> dict[str, Any]:
        """The object that ends the output and is stored."""
        bars = [
            {
                "what": bar.what,
                "value": bar.value,
                "among": bar.among,
                "unit": bar.unit,
                "bar": bar.text,
                "holds": bar.holds,
            }
            for bar in self.bars
        ]
        return _jsonable(
            {
                "benchmark": self.benchmark,
                "holds": self.holds,
                "bars": bars,
                "figures": self.figures,
                "notes": self.notes,
                "card": self.card,
            }
        )

    def store(self, out: Path) -> None:
        """Writes the JSON; what is cut off in the midst of it leaves the file that was there."""
        from lasgd.training.run_folder import write_json_atomically

        out.parent.mkdir(parents=True, exist_ok=True)
        write_json_atomically(out, self.as_json())

    def finish(self, out: Path | None) -> int:
        """Stores the JSON in `out`, if given, prints it as the last line, and returns the exit code."""
        if out is not None:
            self.store(out)
        print(json.dumps(self.as_json(), allow_nan=False), flush=True)
        return 1 if self.holds is False else 0


def arguments_for(benchmark: str, description: str | None) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark has."""
    parser = argparse.ArgumentParser(
        prog=f"benchmarks/{benchmark}.py", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, help=f"where the JSON is stored; default benchmarks/results/{benchmark}.json"
    )
    parser.add_argument(
        "--quick", action="store_true", help="short, to see that it works; stored only where --out is given"
    )
    parser.add_argument("--seed", type=int, default=0)
    return parser


def where_to_store(benchmark: str, arguments: argparse.Namespace, is_record: bool = True) -> Path | None:
    """`--out`; without it the standard place for a full measurement, and none for one that stands for nothing."""
    if arguments.out is not None:
        return arguments.out
    return RESULTS / f"{benchmark}.json" if is_record and not arguments.quick else None


def run_card(settings: dict[str, Any], seeds: Iterable[int]) -> dict[str, Any]:
    """Command, date, settings, seeds, versions, machine; neither host name nor path."""
    from lasgd.training.run_folder import environment

    known = environment()
    return {
        "command": _command(sys.argv),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "seeds": list(seeds),
        "settings": _jsonable(settings),
        "commit": _commit(),
        **{key: known.get(key) for key in ("lasgd", "torch", "python", "cpu", "cpu_count")},
    }


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median and range, with the values themselves."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "values": list(values)}


def retention_bars(what: str, retention: dict[str, Any], at_least: float) -> list[Bar]:
    """The bars of one `spread` of retentions: not too low, and not higher than can be true."""
    median, among = retention["median"], (retention["min"], retention["max"])
    return [
        Bar(what, median, at_least=at_least, among=among),
        Bar(f"{what}, undisturbed", median, at_most=DISTURBED, among=among),
    ]


def format_value(value: Value) -> str:
    """Four significant digits; words for statements."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}"


def _command(argv: Sequence[str]) -> str:
    # Folders say more about the machine than about the run: only the last part of every path is kept.
    words = [re.sub(r"[^=\s]*/", "", word.rstrip("/")) for word in argv[1:]]
    return " ".join(["python", f"benchmarks/{Path(argv[0]).name}", *words])


def _commit() -> str | None:
    """The commit that was measured, `+` after it if the sources differed from it; None outside a git checkout."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"],
            cwd=FOLDER,
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip() or None


def _jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value]
    if isinstance(value, Path):
        return value.name
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
