"""Traces of step times: what runs and people write, and what is refused."""

from __future__ import annotations

import gzip
import json

import pytest

from lasgd.errors import DataError
from lasgd.training.timeline import Timeline, write_chrome_trace
from lasgd.virtual.step_times import read_step_times


def csv(tmp_path, text):
    path = tmp_path / "steps.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def timeline(tmp_path, events, compress=gzip.compress):
    path = tmp_path / "timeline.json.gz"
    path.write_bytes(compress(json.dumps({"traceEvents": events}).encode()))
    return path


def step(rank, duration_us, name="compute"):
    return {"ph": "X", "pid": rank, "tid": 0, "name": name, "ts": 0.0, "dur": duration_us}


def refused(path) -> str:
    with pytest.raises(DataError) as error:
        read_step_times(path)
    assert str(path) in str(error.value)
    return str(error.value)


def test_the_compute_intervals_of_a_runs_timeline_are_read_rank_by_rank(tmp_path):
    timelines = [Timeline(1), Timeline(0)]
    for written in timelines:
        begin_s = 50.0
        for k in range(3):
            end_s = begin_s + 0.1 * (k + 1) + written.rank
            written.add("compute", begin_s, end_s)
            written.add("round", begin_s, end_s + 7.0)
            begin_s = end_s
    write_chrome_trace(tmp_path / "timeline.json.gz", timelines)
    times = read_step_times(tmp_path / "timeline.json.gz")
    assert len(times) == 2
    assert times[0] == pytest.approx([0.1, 0.2, 0.3])
    assert times[1] == pytest.approx([1.1, 1.2, 1.3])


def test_a_table_keeps_the_order_of_each_ranks_lines(tmp_path):
    assert read_step_times(csv(tmp_path, "rank,step_s\n1,0.3\n0,0.1\n1,4e-1\n0,0.2\n")) == ((0.1, 0.2), (0.3, 0.4))


@pytest.mark.parametrize("text", [b"\xef\xbb\xbfrank,step_s\r\n0,0.1\r\n", b' rank , step_s\n"0", 0.1 \n\n'])
def test_what_spreadsheets_write_is_read_too(tmp_path, text):
    assert read_step_times(csv(tmp_path, text)) == ((0.1,),)


@pytest.mark.parametrize(
    "text, shown",
    [
        ("", "is empty"),
        ("\n\n", "is empty"),
        ("rank,step_s\n", "has a header and no step times"),
        ("0,0.1\n0,0.2\n", "line 1: the header is '0,0.1'. Expected"),
        ("rank,seconds\n0,0.1\n", "line 1: the header is 'rank,seconds'"),
        ("rank,step_s\n0,0.1\n0\n", "line 3: '0' is not a rank and a time"),
        ("rank,step_s\n0,0.1\n0,\n", "line 3: '0,' is not a rank and a time"),
        ("rank,step_s\n,0.1\n", "line 2: ',0.1' is not a rank and a time"),
        ("rank,step_s\n0,0.1,7\n", "line 2: '0,0.1,7' is not a rank and a time"),
        ("rank,step_s\n-1,0.1\n", "line 2: '-1' is not a rank"),
        ("rank,step_s\n1.5,0.1\n", "line 2: '1.5' is not a rank"),
        ("rank,step_s\n0,-0.1\n", "line 2: '-0.1' is not a step time; expected a finite number above 0"),
        ("rank,step_s\n0,0\n", "line 2: '0' is not a step time"),
        ("rank,step_s\n0,0.1\n0,fast\n", "line 3: 'fast' is not a step time"),
        ("rank,step_s\n0,nan\n", "line 2: 'nan' is not a step time"),
        ("rank,step_s\n0,inf\n", "line 2: 'inf' is not a step time"),
        ("rank,step_s\n0,1e-400\n", "line 2: '1e-400' is not a step time"),
        ("rank,step_s\n0,0.1\n3,0.1\n", "has no step times of ranks 1, 2, but of rank 3"),
        ("rank,step_s\n1,0.1\n", "has no step times of rank 0, but of rank 1"),
        ("rank,step_s\n999999999,0.1\n", "has no step times of ranks 0, 1, 2, 3, 4, ..., but of rank 999999999"),
        ('rank,step_s\n0,"0.1\n', "is no CSV"),
        (b"\xff\xfe\x00", "is neither a timeline nor text"),
    ],
)
def test_bad_tables_are_refused_with_the_line(tmp_path, text, shown):
    assert shown in refused(csv(tmp_path, text))


@pytest.mark.parametrize(
    "events, shown",
    [
        ([step(0, 1e5), step(0, -1.0)], "rank 0, local step 1: -1.0 is not a step time"),
        ([step(0, 0)], "rank 0, local step 0: 0 is not a step time"),
        ([step(0, float("nan"))], "rank 0, local step 0: nan is not a step time"),
        ([step(0, float("inf"))], "rank 0, local step 0: inf is not a step time"),
        ([step(0, "100")], "rank 0, local step 0: '100' is not a step time"),
        ([step(0, None)], "rank 0, local step 0: None is not a step time"),
        ([step(0, 1e5), step(2, 1e5)], "has no step times of rank 1, but of rank 2"),
        ([step(0, 1e5), step(1, 1e5, "round")], "has no `compute` interval of rank 1"),
        ([step(0, 1e5, "round")], "has no `compute` interval of rank 0"),
        ([], "has no `compute` interval"),
        ([step("zero", 1e5)], "is no timeline as runs write it: a pid is not a rank"),
        ([{"ph": "X"}], "is no timeline as runs write it: no 'pid'"),
        ("events", "is no timeline as runs write it"),
    ],
)
def test_bad_timelines_are_refused_with_the_rank(tmp_path, events, shown):
    assert shown in refused(timeline(tmp_path, events))


def test_a_timeline_that_is_cut_off_or_not_compressed_is_refused(tmp_path):
    whole = [step(0, 1e5 + k) for k in range(100)]
    assert "is no timeline" in refused(timeline(tmp_path, whole, lambda data: gzip.compress(data)[:-20]))
    assert "is no timeline" in refused(timeline(tmp_path, whole, lambda data: data))
    assert "is no timeline" in refused(timeline(tmp_path, whole, lambda data: gzip.compress(data[:-20])))


def test_a_file_that_does_not_exist_is_named(tmp_path):
    assert "cannot be read: No such file" in refused(tmp_path / "steps.csv")
