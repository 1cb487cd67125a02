"""What is shown of a run, on a terminal, in a log, and at the end."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

from lasgd.training.display import Display, Snapshot, duration, plain_line, print_summary, warnings

HALF = Snapshot(
    samples=26_500,
    budget=50_000,
    samples_per_s=1234.4,
    loss=0.41234,
    rounds=512,
    staleness_steps=1.23,
    waited_s=0.05,
    wall_s=20.0,
    left_s=18.6,
    world_size=4,
    fragments=5,
)
NOTHING_YET = replace(
    HALF,
    samples=0,
    samples_per_s=None,
    loss=None,
    rounds=0,
    staleness_steps=None,
    waited_s=0.0,
    wall_s=0.0,
    left_s=None,
)


def console(terminal: bool, width: int = 80) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=width, color_system=None, legacy_windows=False)


def text_of(display: Display, width: int) -> str:
    paper = console(terminal=False, width=width)
    paper.print(display.render())
    return paper.file.getvalue()  # type: ignore[attr-defined]


def run(**changes) -> dict:
    def rank(number: int) -> dict:
        return {
            "rank": number,
            "local_steps": 12_345,
            "samples": 395_040,
            "rounds": 12_001,
            "compute_s": 100.0,
            "waited_s": 0.5,
            "staleness_steps": {"mean": 1.21, "max": 4},
            "bytes_sent": 1.57e9,
        }

    return {
        "status": "finished",
        "algorithm": "lasgd",
        "condition": "step=100ms",
        "world_size": 2,
        "samples": 400_000,
        "wall_s": 1000.0,
        "final": {"top1": 0.7123, "top5": 0.98, "loss": 0.8123},
        "replicas_identical": True,
        "link_emulation": "user space",
        "padding_overrun": 0.0,
        "ranks": [rank(0), rank(1)],
    } | changes


def summary(width: int = 80, **changes) -> str:
    paper = console(terminal=False, width=width)
    print_summary(run(**changes), paper, out="runs/one")
    return paper.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("width", [80, 120])
def test_the_display_shows_every_figure_within_the_width(width):
    display = Display("lasgd on digits, 4 ranks")
    display.update(replace(HALF, notes=("rank 2 held NaN at round 17: took the mean",)))
    text = text_of(display, width)
    for figure in ("53%", "26,500 of 50,000", "0:00:19 left", "1,234", "0.4123", "512", "fragments 5", "1.2 steps"):
        assert figure in text
    assert "0.05 s (0.2%)" in text
    assert "rank 2 held NaN at round 17" in text
    assert max(len(line) for line in text.splitlines()) <= width


def test_the_closing_table_keeps_its_figures_in_a_narrow_terminal():
    rows = [[line for line in summary(width).splitlines() if line.split()[:1] == ["1"]] for width in (40, 80)]
    assert rows[0] == rows[1]
    assert "…" not in rows[0][0]


def test_what_is_not_known_yet_is_a_dash_and_not_an_error():
    display = Display("a run")
    assert "starting" in text_of(display, 80)
    display.update(NOTHING_YET)
    assert "loss -" in text_of(display, 80)
    assert "time left unknown" in text_of(display, 80)


def test_only_the_latest_notes_are_shown_and_the_rest_counted():
    display = Display("a run")
    display.update(replace(HALF, notes=tuple(f"note {i}" for i in range(10))))
    text = text_of(display, 80)
    assert "6 earlier notes" in text
    assert "note 9" in text
    assert "note 5" not in text


def test_a_status_is_shown_until_it_is_taken_back():
    display = Display("a run")
    display.update(HALF)
    display.status("evaluating")
    assert "evaluating ..." in text_of(display, 80)
    display.status("")
    assert "evaluating" not in text_of(display, 80)


def test_a_terminal_gets_the_latest_state_when_the_display_closes():
    paper = console(terminal=True)
    with Display("a run", paper) as display:
        display.update(replace(HALF, samples=1))
        display.update(HALF)
    assert "26,500 of 50,000" in paper.file.getvalue()  # type: ignore[attr-defined]
    display.close()


def test_a_log_gets_plain_lines_and_each_note_once():
    paper = console(terminal=False)
    with Display("a run", paper, plain_every_s=1000.0) as display:
        display.update(replace(HALF, notes=("one",)))
        display._print_line()
        display._print_line()  # nothing new: no second line
        display.status("evaluating", "1 of 2")
        display.status("evaluating", "2 of 2")
        display.update(replace(HALF, notes=("one", "two")))
    display.close()
    lines = paper.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert lines == ["! one", plain_line(HALF), "evaluating", "! two", plain_line(HALF)]
    assert "\x1b" not in "".join(lines)


def test_a_log_line_holds_every_figure():
    assert plain_line(HALF) == (
        "26,500 of 50,000 samples (53%), 0:00:19 left, samples/s 1,234, loss 0.4123, rounds 512, fragments 5, "
        "ranks 4, staleness 1.2 steps, waited 0.05 s (0.2%), elapsed 0:00:20"
    )


@pytest.mark.parametrize("width", [80, 120])
def test_the_summary_shows_results_and_each_rank_within_the_width(width):
    text = summary(width)
    for figure in ("71.23%", "98.00%", "0.8123", "400,000", "0:16:40", "yes", "user space", "runs/one", "400"):
        assert figure in text
    assert text.count("12,345") == 2
    assert "0.50 s (0.05%)" in text
    assert "1.6 GB" in text
    assert max(len(line) for line in text.splitlines()) <= width


def test_rates_with_too_much_overrun_stand_for_nothing():
    assert "stand for nothing" in " ".join(summary(padding_overrun=0.021).split())
    assert "stand for nothing" not in summary(padding_overrun=0.02)


def test_the_summary_of_a_failed_run_shows_its_error():
    text = summary(status="failed", error="rank 1 was killed", final=None, ranks=[], wall_s=0.0, samples=0)
    assert "failed" in text
    assert "rank 1 was killed" in text


def test_warnings_name_sick_ranks_skipped_images_and_differing_replicas():
    found = warnings(
        run(health=[{"rank": 2, "round": 17}], skipped_images=["a.jpg", "b", "c", "d"], replicas_identical=False)
    )
    assert any("rank 2" in line and "round 17" in line for line in found)
    assert any("4 images" in line and "a.jpg, b, c, ..." in line for line in found)
    assert any("replicas differ" in line for line in found)
    assert warnings(run(algorithm="independent", replicas_identical=False)) == []


def test_warnings_tell_a_rank_that_ran_away_from_one_that_held_nan():
    found = warnings(run(health=[{"rank": 2, "round": 17, "found": "ran_away"}, {"rank": 1, "round": 3}]))
    assert found == [
        "rank 2 ran away from the mean at round 17: took the mean",
        "rank 1 held NaN or Inf at round 3: took the mean",
    ]


def test_the_summary_of_a_simulated_run_tells_its_network_and_its_steps():
    text = summary(virtual_s=50.0, condition="fast", settings={"network": "20mbit,latency=5ms", "compute": None})
    assert "20mbit,latency=5ms" in text and "compute" not in text
    assert "compute" in summary(virtual_s=50.0, settings={"network": None, "compute": "100ms"})
    assert "network" not in summary(settings={"lr": 0.1})


def test_ranks_that_were_sick_again_and_again_are_counted_not_listed():
    found = warnings(run(health=[{"rank": i % 2, "round": i} for i in range(1000)]))
    assert len(found) == 5
    assert found[-1] == "and 996 more, in run.json under `health`"


def test_what_was_left_out_is_told_and_a_long_list_counted():
    text = summary(notes=[f"rank 1: checkpoint {i} could not be written" for i in range(7)])
    assert "rank 1: checkpoint 0 could not be written" in text
    assert "and 3 more, in run.json" in text


def test_a_run_without_results_shows_none():
    assert "top-1" not in summary(status="interrupted", final=None)


def test_samples_of_an_earlier_run_do_not_count_as_speed():
    assert "samples/s           300" in summary(resumed_from_samples=100_000)


def test_durations_read_as_hours_minutes_seconds():
    assert [duration(s) for s in (0.4, 65, 3600 * 30 + 1, -1)] == ["0:00:00", "0:01:05", "30:00:01", "0:00:00"]
