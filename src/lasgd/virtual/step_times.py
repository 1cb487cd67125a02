"""Step times measured in an earlier run, read from its timeline or from a table.

timeline.json.gz   of any run: the `compute` intervals of each rank, one a local step
anything else      CSV with the columns rank, step_s and this header; a rank's steps in the order of its lines
"""

from __future__ import annotations

import csv
import gzip
import json
import math
import zlib
from collections.abc import Iterable
from itertools import filterfalse, islice
from pathlib import Path
from typing import Any

from lasgd.errors import DataError

StepTimes = tuple[tuple[float, ...], ...]
"""By rank: seconds of its local steps in their order."""

COLUMNS = ("rank", "step_s")

_SHOWN = 5  # ranks that an error names at most
_GZIP = b"\x1f\x8b"
_EXAMPLE = "Expected a run's timeline.json.gz, or CSV with the header rank,step_s and lines such as 0,0.105"


def read_step_times(path: Path | str) -> StepTimes:
    """The step times in the file, every rank from 0 to the largest that it names with at least one step.

    Raises DataError, with the file and the line or rank, for a file that cannot be read or is neither; for a missing
    rank or value; and for a time that is not a finite number above 0.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}. {_EXAMPLE}.") from error
    if not data.strip():
        raise DataError(f"{path} is empty. {_EXAMPLE}.")
    is_compressed = data.startswith(_GZIP) or path.suffix == ".gz"
    by_rank = _from_timeline(path, data) if is_compressed else _from_csv(path, data)
    last = max(by_rank)
    missing = islice(filterfalse(by_rank.__contains__, range(last)), _SHOWN + 1)
    if shown := _ranks(missing):
        raise DataError(
            f"{path} has no step times of {shown}, but of rank {last}. Every rank from 0 on needs at least one step."
        )
    return tuple(tuple(by_rank[rank]) for rank in range(len(by_rank)))


def _from_timeline(path: Path, data: bytes) -> dict[int, list[float]]:
    try:
        trace = json.loads(gzip.decompress(data))
        events = [event for event in trace["traceEvents"] if event["ph"] in "XM"]
        ranks = {event["pid"] for event in events}
        steps = [event for event in events if event["ph"] == "X" and event["name"] == "compute"]
        if not all(type(rank) is int and rank >= 0 for rank in ranks):
            raise ValueError("a pid is not a rank")
    except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError) as error:
        why = f"no {error}" if isinstance(error, KeyError) else error
        raise DataError(f"{path} is no timeline as runs write it: {why}. {_EXAMPLE}.") from error
    by_rank: dict[int, list[float]] = {}
    for event in steps:
        times = by_rank.setdefault(event["pid"], [])
        where = f"{path}: rank {event['pid']}, local step {len(times)}"
        duration_us = event.get("dur")
        if isinstance(duration_us, bool) or not isinstance(duration_us, int | float):
            raise _bad_time(where, duration_us)
        times.append(_checked(where, duration_us * 1e-6, duration_us))
    if silent := _ranks(sorted(ranks - set(by_rank))):
        raise DataError(f"{path} has no `compute` interval of {silent}: no step times to take from it.")
    if not by_rank:
        raise DataError(f"{path} has no `compute` interval: no step times to take from it.")
    return by_rank


def _from_csv(path: Path, data: bytes) -> dict[int, list[float]]:
    try:
        lines = csv.reader(data.decode("utf-8-sig").splitlines(), strict=True)
        header = [name.strip() for name in next(lines)]
        if tuple(header) != COLUMNS:
            raise DataError(f"{path}, line 1: the header is {','.join(header)[:60]!r}. {_EXAMPLE}.")
        by_rank: dict[int, list[float]] = {}
        for fields in lines:
            where = f"{path}, line {lines.line_num}"
            if not fields:
                continue
            if len(fields) != len(COLUMNS) or not all(field.strip() for field in fields):
                raise DataError(f"{where}: {','.join(fields)!r} is not a rank and a time. {_EXAMPLE}.")
            rank, step_s = (field.strip() for field in fields)
            if not (rank.isascii() and rank.isdecimal() and len(rank) < 10):
                raise DataError(f"{where}: {rank!r} is not a rank; expected a whole number from 0 on.")
            try:
                seconds = float(step_s)
            except ValueError:
                raise _bad_time(where, step_s) from None
            by_rank.setdefault(int(rank), []).append(_checked(where, seconds, step_s))
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is neither a timeline nor text: {error}. {_EXAMPLE}.") from error
    except csv.Error as error:
        raise DataError(f"{path} is no CSV: {error}. {_EXAMPLE}.") from error
    if not by_rank:
        raise DataError(f"{path} has a header and no step times. {_EXAMPLE}.")
    return by_rank


def _checked(where: str, seconds: float, shown: Any) -> float:
    if not 0 < seconds < math.inf:
        raise _bad_time(where, shown)
    return seconds


def _bad_time(where: str, shown: Any) -> DataError:
    return DataError(f"{where}: {shown!r} is not a step time; expected a finite number above 0.")


def _ranks(ranks: Iterable[int]) -> str:
    """`rank 1`, `ranks 1, 2`; nothing where there are none."""
    names = [str(rank) for rank in islice(ranks, _SHOWN + 1)]
    if len(names) > _SHOWN:
        names[_SHOWN] = "..."
    return f"rank{'s' * (len(names) > 1)} {', '.join(names)}" if names else ""
