"""The timeline: what each rank did when, for Perfetto or chrome://tracing.

A rank's two threads add intervals to one `Timeline`; at the end rank 0 gathers all of them (`to_bytes`) and writes
timeline.json.gz, a process per rank with a row for each thread.
"""

from __future__ import annotations

import gzip
import json
import struct
import zlib
from array import array
from collections.abc import Iterable
from pathlib import Path

from lasgd.errors import ProtocolError
from lasgd.training.run_folder import replacing

COMMUNICATE_KINDS = frozenset({"snapshot", "round", "correction", "exchange"})
"""Kinds of interval that the communicator adds; all others belong to the training thread."""

_THREADS = ("compute", "communicate")
_HEADER = struct.Struct("<I")


class Timeline:
    """The intervals of one rank, at most `capacity` of them: later ones are counted, not kept.

    Each kind of interval is added by one thread only, so nothing here needs a lock: appending to a list is atomic,
    and each count of what was dropped has one writer. With two threads the list may exceed `capacity` by one.
    """

    def __init__(self, rank: int, capacity: int = 100_000) -> None:
        self.rank = rank
        self.capacity = capacity
        self.start_s: float | None = None
        """The common start on this rank's clock; None: all ranks read the same clock."""
        self._intervals: list[tuple[str, float, float]] = []
        self._dropped: dict[str, int] = {}

    def add(self, kind: str, begin_s: float, end_s: float) -> None:
        """Adds one interval, in seconds of this rank's monotonic clock."""
        if len(self._intervals) < self.capacity:
            self._intervals.append((kind, begin_s, end_s))
        else:
            self._dropped[kind] = self._dropped.get(kind, 0) + 1

    @property
    def intervals(self) -> list[tuple[str, float, float]]:
        """A copy of (kind, begin_s, end_s), in the order of adding."""
        return list(self._intervals)

    @property
    def dropped(self) -> int:
        """How many intervals came after the capacity was used up."""
        return sum(self._dropped.copy().values())

    def to_bytes(self) -> bytes:
        """This timeline, compressed, to a microsecond; about 5 bytes an interval."""
        intervals = self.intervals
        origin_s = intervals[0][1] if intervals else 0.0
        kinds = sorted({kind for kind, _, _ in intervals})
        codes = array("i", [kinds.index(kind) for kind, _, _ in intervals])
        begins, durations = array("q"), array("q")
        previous_us = 0
        for _, begin_s, end_s in intervals:
            begin_us = round((begin_s - origin_s) * 1e6)
            begins.append(begin_us - previous_us)  # differences are small and compress well
            durations.append(round((end_s - begin_s) * 1e6))
            previous_us = begin_us
        header = json.dumps(
            {
                "rank": self.rank,
                "capacity": self.capacity,
                "start_s": self.start_s,
                "origin_s": origin_s,
                "kinds": kinds,
                "intervals": len(intervals),
                "dropped": self._dropped.copy(),
            }
        ).encode()
        return zlib.compress(
            _HEADER.pack(len(header)) + header + codes.tobytes() + begins.tobytes() + durations.tobytes()
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> Timeline:
        """The timeline that `to_bytes` was called on. Raises ProtocolError for anything else."""
        try:
            raw = zlib.decompress(data)
            (length,) = _HEADER.unpack_from(raw)
            header = json.loads(raw[_HEADER.size : _HEADER.size + length])
            timeline = cls(header["rank"], header["capacity"])
            timeline.start_s = header["start_s"]
            timeline._dropped = header["dropped"]
            n, kinds, origin_s = header["intervals"], header["kinds"], header["origin_s"]
            columns, offset = [array("i"), array("q"), array("q")], _HEADER.size + length
            for column in columns:
                end = offset + n * column.itemsize
                column.frombytes(raw[offset:end])
                offset = end
            begin_us = 0
            for code, step_us, duration_us in zip(*columns, strict=True):
                begin_us += step_us
                begin_s = origin_s + begin_us * 1e-6
                timeline._intervals.append((kinds[code], begin_s, begin_s + duration_us * 1e-6))
        except (zlib.error, struct.error, ValueError, KeyError, IndexError) as error:
            raise ProtocolError(f"{len(data)} bytes are no timeline: {error}") from error
        return timeline


def write_chrome_trace(path: Path, timelines: Iterable[Timeline]) -> None:
    """Writes timeline.json.gz: microseconds since the common start. Raises LasgdError, naming the file."""
    timelines = list(timelines)
    same_clock_s = min((begin for t in timelines if t.start_s is None for _, begin, _ in t.intervals), default=0.0)
    events: list[dict] = []
    for timeline in sorted(timelines, key=lambda t: t.rank):
        events += _events(timeline, same_clock_s if timeline.start_s is None else timeline.start_s)
    trace = {
        "traceEvents": events,
        "displayTimeUnit": "ms",
        "otherData": {"dropped": {f"rank {t.rank}": t.dropped for t in timelines if t.dropped}},
    }
    data = gzip.compress(json.dumps(trace, separators=(",", ":")).encode(), compresslevel=6)
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def _events(timeline: Timeline, start_s: float) -> list[dict]:
    rank = timeline.rank
    name = f"rank {rank}"
    if timeline.dropped:
        name += f" ({timeline.dropped:,} later intervals were not kept)"
    events: list[dict] = [
        {"ph": "M", "pid": rank, "name": "process_name", "args": {"name": name}},
        {"ph": "M", "pid": rank, "name": "process_sort_index", "args": {"sort_index": rank}},
    ]
    for tid, thread in enumerate(_THREADS):
        events.append({"ph": "M", "pid": rank, "tid": tid, "name": "thread_name", "args": {"name": thread}})
        events.append({"ph": "M", "pid": rank, "tid": tid, "name": "thread_sort_index", "args": {"sort_index": tid}})
    for kind, begin_s, end_s in timeline.intervals:
        events.append(
            {
                "ph": "X",
                "pid": rank,
                "tid": int(kind in COMMUNICATE_KINDS),
                "name": kind,
                "cat": _THREADS[kind in COMMUNICATE_KINDS],
                "ts": round((begin_s - start_s) * 1e6, 3),
                "dur": round((end_s - begin_s) * 1e6, 3),
            }
        )
    return events
