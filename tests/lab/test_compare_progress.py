"""What is shown of a comparison, on a terminal and in a log."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

import lasgd.lab.compare.progress as module
from compare_folders import plan, write_comparison
from lasgd.lab.compare.entry import Entry
from lasgd.lab.compare.figures import Folder
from lasgd.lab.compare.plan import Cell
from lasgd.lab.compare.progress import Progress, table

A, B = Entry("a", "a"), Entry("b", "b")
CELLS = [Cell(A, "fast", 0, 0.1), Cell(B, "fast", 0), Cell(A, "slow", 0), Cell(B, "slow", 0)]


def done(took_s: float = 10.0) -> Folder:
    return Folder({"final": {"top1": 0.812}}, (), "finished", None, took_s)


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass only when the test says so."""

    class Clock:
        now_s = 100.0

        def monotonic(self) -> float:
            return self.now_s

    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def paper(terminal: bool = False, width: int = 100) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=width, color_system=None, legacy_windows=False)


def written(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def shown(progress: Progress) -> str:
    console = paper()
    console.print(progress.render())
    return written(console)


def test_a_log_gets_a_line_when_a_run_begins_and_one_when_it_ends():
    console = paper()
    with Progress(console) as progress:
        progress.plan(CELLS)
        progress.begin(CELLS[0], lambda: "")
        progress.tick()
        progress.end(CELLS[0], done())
    assert written(console).splitlines() == [
        "run 1 of 4: a, fast, seed 0, lr 0.1; time left unknown",
        "a, fast, seed 0, lr 0.1: top-1 81.2 % after 0:00:10",
    ]


def test_a_failure_is_said_at_once_with_its_reason():
    console = paper()
    with Progress(console) as progress:
        progress.plan(CELLS)
        progress.end(CELLS[0], Folder(None, (), "failed", "out of memory", 1.0))
    assert "! a, fast, seed 0, lr 0.1: failed: out of memory" in written(console)
    assert ", 1 failed" in shown(progress)


def test_the_time_left_is_that_of_runs_like_those_that_are_left(clock):
    progress = Progress(paper())
    for cell, took_s in ((CELLS[0], 10.0), (CELLS[1], 20.0)):
        progress.end(cell, done(took_s))
    progress.plan([Cell(A, "fast", 1), Cell(B, "fast", 1), Cell(A, "slow", 1)])  # 10, 20, and 15 for want of a better
    assert "about 0:00:45 left" in shown(progress)
    progress.begin(Cell(B, "fast", 1), lambda: "")
    clock.now_s += 5
    assert "about 0:00:40 left" in shown(progress)
    clock.now_s += 100  # longer than expected takes nothing from the others
    assert "about 0:00:25 left" in shown(progress)


def test_the_present_run_shows_what_it_last_said():
    progress = Progress(paper())
    progress.plan(CELLS)
    progress.begin(CELLS[0], lambda: "2,000 of 4,000 samples (50%), 0:00:05 left")
    assert "starting ..." in shown(progress)
    progress.tick()
    assert "2,000 of 4,000 samples (50%)" in shown(progress)
    assert "0 of 4 runs" in shown(progress)


def test_an_interrupted_run_is_not_done():
    progress = Progress(paper())
    progress.plan(CELLS)
    progress.end(CELLS[0], Folder(None, (), "interrupted", None, 3.0))
    assert "0 of" in shown(progress)


def test_the_table_shows_finished_runs_and_how_the_others_ended(tmp_path):
    asked = plan("a,b", target=0.6)
    cells = list(asked.cells(0, "fast"))
    results = write_comparison(
        tmp_path, asked, {cells[0]: {}, cells[1]: {"status": "failed", "error": "x"}, cells[2]: {}}
    )
    console = paper()
    console.print(table(results["runs"]))
    first, second = written(console).splitlines()[1:]
    assert first.split() == ["a", "fast", "0", "0.1", "6.2", "s", "80.0", "%", "100.0", "%", "0.0", "s"]
    assert second.split() == ["b", "fast", "0", "0.1", "failed"]


@pytest.mark.parametrize("width", [40, 80, 200])
def test_every_width_is_drawn(width):
    console = paper(terminal=True, width=width)
    with Progress(console) as progress:
        progress.plan(CELLS)
        progress.begin(CELLS[0], lambda: "training")
        progress.tick()
    assert "\x1b[?25h" in written(console)  # the cursor is back
