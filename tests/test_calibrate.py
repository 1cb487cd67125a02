"""What benchmarks/calibrate.py says of a simulated and of a real run means the same of both."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from test_results_page import rank_record, run_record

LINK = "link=20mbit+step=100ms"


@pytest.fixture(autouse=True)
def benchmarks_importable(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "benchmarks"))
    yield
    for name in ("all_reduces", "calibrate", "common", "linked_ranks", "messages", "retention"):
        sys.modules.pop(name, None)


def test_a_round_lasts_from_when_the_last_rank_joined_whatever_the_clocks_say():
    from calibrate import rounds_within

    intervals = {
        0: [("round", 1.0, 3.0), ("compute", 3.0, 4.0), ("round", 5.0, 5.5)],
        1: [("round", 102.5, 103.0), ("round", 104.0, 105.5)],
    }
    assert rounds_within(intervals, 0.0, 10.0) == [(3.0, 0.5), (5.5, 0.5)]
    assert rounds_within(intervals, 4.0, 10.0) == [(5.5, 0.5)]
    assert rounds_within(intervals, 0.0, 5.0) == [(3.0, 0.5)], "what begins at the agreed end is no round of the run"


def test_messages_that_share_a_link_are_foretold_from_when_each_begins():
    from calibrate import shared
    from lasgd.virtual.network_models import Network

    assert shared(Network(3, 100.0), [0.0, 0.5], 100) == pytest.approx({0: 1.5, 1: 1.5})
    assert shared(Network(3, 100.0, first_window_bytes=1.0, full_window_s=10.0), [0.0, 0.5], 100)[0] < 1.2


def test_staleness_counts_the_steps_from_snapshot_to_merge():
    from calibrate import staleness

    steps = [("compute", float(k), k + 1.0) for k in range(5)]
    within_a_step, over_two = ("round", 0.2, 0.8), ("round", 1.5, 3.5)
    merged_after_the_end = ("round", 3.6, 4.5)
    of_rank = [*steps, within_a_step, over_two, merged_after_the_end]
    assert staleness({0: of_rank, 1: of_rank}, wall_s=4.5) == {1: 2, 3: 2}


def test_histograms_are_as_far_apart_as_the_share_that_differs():
    from calibrate import distance

    assert distance({1: 3, 2: 1}, {1: 30, 2: 10}) == 0
    assert distance({1: 1}, {2: 7}) == 1
    assert distance({1: 1, 2: 1}, {1: 1}) == pytest.approx(0.5)


def as_real(virtual, folder, algorithm):
    """The same run as `lasgd train` would have written it."""
    from calibrate import RANKS
    from lasgd.training.run_folder import RunRecord
    from lasgd.training.timeline import Timeline, write_chrome_trace

    timelines = [Timeline(rank) for rank in range(RANKS)]
    for rank, timeline in enumerate(timelines):
        timeline.start_s = 1000.0 + 0.1 * rank  # clocks that are not set to the same time
        for kind, begin_s, end_s in virtual["intervals"][rank]:
            timeline.add(kind, begin_s + timeline.start_s, end_s + timeline.start_s)
    write_chrome_trace(folder / "timeline.json.gz", timelines)
    ranks = [
        rank_record(rank, steps, 0.0, waited_s, virtual["rounds"]) | {"staleness_steps": {"mean": mean, "max": most}}
        for rank, (steps, waited_s, (mean, most)) in enumerate(
            zip(virtual["local_steps"], virtual["waited_s"], virtual["staleness_steps"], strict=True)
        )
    ]
    changes = {key: virtual[key] for key in ("samples", "fragments")}
    run: RunRecord = run_record(algorithm, ranks, virtual["wall_s"], condition=LINK, **changes)
    return run, (folder / "timeline.json.gz").read_bytes()


@pytest.mark.parametrize("algorithm", ["lasgd", "local_sgd", "sync_sgd"])
def test_a_real_run_that_went_as_foretold_is_seen_as_foretold(algorithm, tmp_path, monkeypatch):
    import calibrate

    virtual = {}
    seen = calibrate.seen

    def keep(name, intervals, **figures):
        virtual.update(figures, intervals=intervals)
        return seen(name, intervals, **figures)

    monkeypatch.setattr(calibrate, "seen", keep)
    # Not 6400, of which half is the very moment at which a round ends: it counts or not by a microsecond.
    foretold = calibrate.predicted(algorithm, LINK, 6336, 0, 391_466)
    monkeypatch.undo()
    measured = calibrate.measured(*as_real(virtual, tmp_path, algorithm))
    assert measured.staleness == foretold.staleness
    compared = calibrate.quantities([(foretold, measured)])
    assert {"local steps/s, all ranks", "local steps/s, rank 3", "time per round, s"} <= compared.keys()
    for key, [(predicted, seen_in_real)] in compared.items():
        assert seen_in_real == pytest.approx(predicted, rel=1e-4, abs=1e-9), key
    assert all(
        bar.value == pytest.approx(0.0, abs=0.01) for bar in calibrate.time_bars("x", [(foretold, measured)] * 2)
    )


def test_an_all_reduce_of_cnn4_is_foretold_with_frames_and_header():
    from calibrate import predicted, vector_elements
    from lasgd.pace import Column

    elements = vector_elements()
    assert elements == 391_466
    foretold = predicted("local_sgd", LINK, 6400, 0, elements)
    assert foretold.all_reduce_s == pytest.approx(1.5 * (4 * elements + 4 * len(Column) * 8) / 2.5e6 * 9014 / 8948)
    assert foretold.s_per_round == pytest.approx(1.0 + foretold.all_reduce_s)
    assert foretold.staleness == {} and predicted("sync_sgd", LINK, 6400, 0, elements).all_reduce_s is None


def test_a_bar_is_missed_by_more_than_ten_per_cent_either_way():
    from calibrate import _bar, deviation

    assert deviation(1.1, 1.0) == pytest.approx(0.1) and deviation(0.8, 1.0) == pytest.approx(-0.2)
    assert math.isnan(deviation(1.0, 0.0))
    assert _bar("x", [0.09, -0.2, 0.05]).holds and _bar("x", [0.09, -0.2, 0.05]).value == pytest.approx(5.0)
    assert not _bar("x", [-0.11]).holds and not _bar("x", [math.nan]).holds
    assert _bar("x", None).holds is None


def test_learning_is_held_to_the_means_of_the_seeds():
    from calibrate import top1_bar

    assert top1_bar("x", [0.40, 0.50, 0.45], [0.50, 0.42, 0.46]).value == pytest.approx(1.0)
    assert not top1_bar("x", [0.40], [0.43]).holds


def test_a_budget_takes_the_wanted_time():
    from calibrate import BATCH_SIZE, predicted, samples_for

    samples = samples_for("local_sgd", LINK, 40.0, 391_466)
    foretold = predicted("local_sgd", LINK, samples, 0, 391_466)
    assert samples / BATCH_SIZE / foretold.steps_per_s == pytest.approx(40.0, rel=0.05)


def test_a_kept_run_is_not_run_again_unless_asked_for_otherwise(tmp_path, monkeypatch):
    import calibrate

    commands = []

    def run(command, **_):
        commands.append(command)
        out = Path(command[-1].partition("=")[2])
        out.mkdir()
        record = run_record("lasgd", [rank_record(0, 10, 1.0)])
        (out / "run.json").write_text(json.dumps(record.model_dump(mode="json")))
        return subprocess.CompletedProcess(command, 0, stdout="")

    monkeypatch.setattr(calibrate.subprocess, "run", run)
    out = tmp_path / "run"
    for samples in (100, 100, 200):
        assert calibrate.ran("train", out, {"samples": samples}, "abc").status == "finished"
    assert [command[4] for command in commands] == ["--samples=100", "--samples=200"]
    assert calibrate.commits_of(tmp_path) == ["abc"]


def test_all_reduces_are_timed_from_the_last_joining():
    from all_reduces import from_last_joining_s

    assert from_last_joining_s([[(0.0, 3.0), (4.0, 5.0)], [(2.5, 3.5), (3.0, 5.0)]]) == [1.0, 1.0]


def test_learning_compares_the_same_options_of_both_commands(tmp_path, monkeypatch, capsys):
    import calibrate
    from common import Report

    asked = {}

    def ran(command, out, options, commit):
        asked[command, options["seed"]] = options
        out.mkdir()
        top1 = {"simulate": 0.44, "train": 0.45}[command] + 0.01 * options["seed"]
        lines = [{"wall_s": 1.0, "samples": 100 * k, "top1": top1 * k / 2, "loss": 1.0} for k in (1, 2)]
        (out / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))

    monkeypatch.setattr(calibrate, "ran", ran)
    report = Report("calibrate", {"commit": None})
    calibrate.learning_part(report, ["lasgd"], [0, 1], tmp_path / "data", 200, {"lr": 0.05}, tmp_path)
    [bar] = report.bars
    assert bar.value == pytest.approx(1.0) and bar.holds
    assert asked["simulate", 1] == asked["train", 1] and asked["train", 1]["lr"] == 0.05
    assert "| lasgd | top-1, mean of the seeds | 0.445 | 0.455 | -2.2 % |" in report.notes[-1]
    without = Report("calibrate", {"commit": None})
    calibrate.learning_part(without, ["lasgd"], [0], None, 200, {}, tmp_path)
    assert without.holds is None and "no `--data` was given" in without.notes[0]


def test_the_figure_is_drawn_from_what_is_stored(tmp_path, monkeypatch):
    import calibrate

    pytest.importorskip("matplotlib")
    foretold = calibrate.predicted("lasgd", LINK, 3200, 0, 391_466)
    figures = {"lasgd, x": {"predicted": [vars(foretold)], "measured": [vars(foretold)]}, "network": {}}
    result = json.loads(json.dumps({"figures": figures}))
    calibrate.draw(result, tmp_path / "figure.svg")
    assert "lasgd, x: local steps/s, all ranks" in (tmp_path / "figure.svg").read_text()
