"""The timeline: what is kept, what crosses ranks, and what Perfetto reads."""

from __future__ import annotations

import gzip
import json
import threading

import pytest

from lasgd.errors import LasgdError, ProtocolError
from lasgd.training.timeline import Timeline, write_chrome_trace


def read(path) -> dict:
    return json.loads(gzip.decompress(path.read_bytes()))


def intervals_of(trace: dict) -> list[tuple]:
    return [(e["pid"], e["tid"], e["name"], e["ts"], e["dur"]) for e in trace["traceEvents"] if e["ph"] == "X"]


def names_of(trace: dict, what: str) -> dict:
    return {(e["pid"], e.get("tid")): e["args"]["name"] for e in trace["traceEvents"] if e["name"] == what}


def test_the_trace_has_a_process_per_rank_and_a_row_per_thread(tmp_path):
    timelines = [Timeline(1), Timeline(0)]
    for timeline in timelines:
        timeline.add("compute", 100.0 + timeline.rank, 100.5 + timeline.rank)
        timeline.add("round", 100.25, 100.75)
    write_chrome_trace(tmp_path / "timeline.json.gz", timelines)
    trace = read(tmp_path / "timeline.json.gz")
    assert names_of(trace, "process_name") == {(0, None): "rank 0", (1, None): "rank 1"}
    rows = {(pid, tid): name for pid in (0, 1) for tid, name in ((0, "compute"), (1, "communicate"))}
    assert names_of(trace, "thread_name") == rows
    assert intervals_of(trace) == [
        (0, 0, "compute", 0.0, 500_000.0),
        (0, 1, "round", 250_000.0, 500_000.0),
        (1, 0, "compute", 1_000_000.0, 500_000.0),
        (1, 1, "round", 250_000.0, 500_000.0),
    ]


def test_ranks_with_clocks_of_their_own_meet_at_the_common_start(tmp_path):
    here, there = Timeline(0), Timeline(1)
    here.start_s, there.start_s = 50.0, 90_000.0
    here.add("wait", 51.0, 51.5)
    there.add("wait", 90_001.0, 90_001.5)
    write_chrome_trace(tmp_path / "t.json.gz", [here, there])
    assert [interval[3:] for interval in intervals_of(read(tmp_path / "t.json.gz"))] == [(1e6, 5e5), (1e6, 5e5)]


def test_a_timeline_survives_its_journey_to_a_microsecond():
    timeline = Timeline(3, capacity=4)
    timeline.start_s = 12.5
    for i in range(6):
        timeline.add("compute" if i % 2 else "round", 1e6 + 0.1 * i, 1e6 + 0.1 * i + 0.0123)
    arrived = Timeline.from_bytes(timeline.to_bytes())
    assert (arrived.rank, arrived.capacity, arrived.start_s, arrived.dropped) == (3, 4, 12.5, 2)
    assert [kind for kind, _, _ in arrived.intervals] == ["round", "compute"] * 2
    for sent, got in zip(timeline.intervals, arrived.intervals, strict=True):
        assert got[1:] == pytest.approx(sent[1:], abs=1.1e-6, rel=0)  # rounding of the begin and of the duration
    assert Timeline.from_bytes(Timeline(0).to_bytes()).intervals == []


def test_many_intervals_travel_in_few_bytes():
    timeline = Timeline(0)
    for i in range(20_000):
        timeline.add("compute", i * 0.0101, i * 0.0101 + 0.009 + (i * 7919 % 1000) * 1e-6)
    assert len(timeline.to_bytes()) < 20_000 * 6


def test_bytes_of_something_else_are_refused():
    for data in (b"", b"nothing", Timeline(0).to_bytes()[:-3]):
        with pytest.raises(ProtocolError, match="no timeline"):
            Timeline.from_bytes(data)


def test_what_exceeds_the_capacity_is_counted_and_said(tmp_path):
    timeline = Timeline(0, capacity=2)
    for i in range(5):
        timeline.add("compute", i, i + 1)
    assert (len(timeline.intervals), timeline.dropped) == (2, 3)
    write_chrome_trace(tmp_path / "t.json.gz", [timeline])
    trace = read(tmp_path / "t.json.gz")
    assert trace["otherData"]["dropped"] == {"rank 0": 3}
    assert names_of(trace, "process_name")[(0, None)] == "rank 0 (3 later intervals were not kept)"


def test_two_threads_lose_nothing():
    timeline = Timeline(0, capacity=30_000)

    def work(kind: str) -> None:
        for i in range(20_000):
            timeline.add(kind, i, i)

    threads = [threading.Thread(target=work, args=(kind,)) for kind in ("compute", "round")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 30_000 <= len(timeline.intervals) <= 30_001
    assert len(timeline.intervals) + timeline.dropped == 40_000


def test_a_folder_that_is_missing_is_named(tmp_path):
    with pytest.raises(LasgdError, match=r"t\.json\.gz could not be written"):
        write_chrome_trace(tmp_path / "missing" / "t.json.gz", [])
