"""Documents show what the stored results say, and the figures in them mean what they claim."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def benchmarks_importable(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield
    for name in ("clusters", "common", "drawing", "render", "retention", "scale"):
        sys.modules.pop(name, None)


def result(**changes):
    bars = [
        {"what": "speed", "value": 0.98123, "among": [0.97, 0.99], "unit": "", "bar": ">= 0.97", "holds": True},
        {"what": "size", "value": 7.0, "among": None, "unit": " MB", "bar": "<= 5 MB", "holds": False},
    ]
    card = {
        "command": "python benchmarks/x.py",
        "date": "2026-01-01",
        "seeds": [0, 1],
        "settings": {"quick": False, "device": "cuda"},
        "commit": None,
        "lasgd": "0.1.0",
        "torch": "2.13.0",
        "python": "3.11",
        "cpu": "some",
        "cpu_count": 2,
    }
    return {"benchmark": "x", "holds": False, "bars": bars, "figures": {}, "notes": [], "card": card} | changes


def rank_record(rank, steps, compute_s, waited_s=0.0, rounds=100):
    return {
        "rank": rank,
        "local_steps": steps,
        "samples": 16 * steps,
        "rounds": rounds,
        "compute_s": compute_s,
        "waited_s": waited_s,
        "staleness_steps": {"mean": 1.0, "max": 2.0},
        "bytes_sent": 0,
    }


def run_record(algorithm, ranks, wall_s=10.0, **changes):
    from lasgd.training.run_folder import RunRecord

    fields = {
        "status": "finished",
        "algorithm": algorithm,
        "condition": "fast",
        "settings": {},
        "environment": {},
        "world_size": len(ranks),
        "wall_s": wall_s,
        "ranks": ranks,
        "replicas_identical": algorithm == "lasgd",
    }
    return RunRecord.model_validate(fields | changes)


def test_the_pages_are_what_render_makes_of_the_stored_results():
    import render

    for path in render.PAGES:
        page = path.read_text(encoding="utf-8")
        assert render.render(page, render.read_results()) == page, "run python benchmarks/render.py"


def test_a_page_is_rendered_between_its_markers_only():
    import render

    page = "before\n<!-- begin: x -->\nstale text\n<!-- end: x -->\nafter\n"
    rendered = render.render(page, {"x": result()})
    assert rendered.startswith("before\n<!-- begin: x -->\n**1 of 2 bars missed.**")
    assert rendered.endswith("<!-- end: x -->\nafter\n") and "stale text" not in rendered
    assert "| speed | 0.9812 (0.97 to 0.99) | >= 0.97 | holds |" in rendered
    assert "| size | 7 MB | <= 5 MB | **missed** |" in rendered
    assert render.render(rendered, {"x": result()}) == rendered


def test_the_page_says_that_the_gpu_check_has_not_run_until_it_has_on_a_gpu():
    import render

    page = "<!-- begin: gpu_check -->\n<!-- end: gpu_check -->\n"
    on_cpu = result()
    on_cpu["card"]["settings"] = {"quick": False, "device": "cpu"}
    for results in ({}, {"gpu_check": on_cpu}):
        assert "Not run on a GPU yet" in render.render(page, results)
    assert "Not run on a GPU yet" not in render.render(page, {"gpu_check": result()})


def test_a_bar_holds_what_it_says():
    from common import Bar

    assert Bar("a", 0.97, at_least=0.97).holds and not Bar("a", 0.96, at_least=0.97).holds
    assert Bar("a", 5, at_most=5, unit=" MB").text == "<= 5 MB" and not Bar("a", 6, at_most=5).holds
    assert Bar("a", math.nan, at_least=0.0).holds is False
    assert Bar("a", True).holds and Bar("a", False).holds is False and Bar("a", None).holds is None


def test_a_missed_bar_is_exit_code_1_and_the_last_line_is_the_json(capsys, tmp_path):
    import json

    from common import Bar, Report

    report = Report("x", {})
    report.add(Bar("good", 1.0, at_least=0.5))
    assert report.finish(None) == 0
    report.add(Bar("bad", math.inf, at_most=0.5))
    out = tmp_path / "new" / "x.json"
    assert report.finish(out) == 1
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["holds"] is False and last == json.loads(out.read_text())


def test_the_run_card_names_no_folder():
    from common import _command

    command = _command(
        ["/home/me/benchmarks/retention.py", "--data", "/home/me/images/", "--out=/tmp/x.json", "--quick"]
    )
    assert command == "python benchmarks/retention.py --data images --out=x.json --quick"


def test_pairs_of_runs_are_turned_round_from_one_to_the_next():
    from retention import CELLS, plan

    first, second = plan(CELLS["c"], 2)
    assert [algorithm for algorithm, _ in first] == ["independent", "lasgd", "lasgd"]
    assert second == first[::-1]


def test_an_independent_straggler_takes_at_most_twice_the_wanted_time():
    from retention import BATCH_SIZE, CELLS, samples_for

    cell = CELLS["c"]
    share = samples_for(cell, "independent", cell.condition, 30.0) / cell.ranks / BATCH_SIZE
    assert share * 0.4 == pytest.approx(60.0, abs=0.5)
    assert samples_for(cell, "lasgd", cell.condition, 30.0) / BATCH_SIZE == pytest.approx(30 * 32.5, abs=1)


def test_a_rank_is_timed_while_it_steps():
    from retention import steps_per_s

    ranks = [rank_record(0, 100, 10.0), rank_record(1, 100, 40.0)]
    alone = run_record("independent", ranks, wall_s=10.0)
    assert (steps_per_s(alone, 0), steps_per_s(alone, 1)) == (10.0, 2.5)
    together = run_record("lasgd", [rank_record(0, 90, 9.0), rank_record(1, 25, 10.4)], wall_s=10.0)
    assert steps_per_s(together, 0) == 9.0, "time that no step accounts for counts against the averaging"
    assert steps_per_s(together, 1) == 25 / 10.4


def test_one_slow_rank_waiting_or_disturbed_pair_is_a_missed_bar():
    from retention import CELLS, judge

    cell = CELLS["a"]

    def bars(steps=100, waited_s=0.0, others=100):
        independent = run_record("independent", [rank_record(rank, 100, 10.0) for rank in range(4)])
        ranks = [rank_record(0, steps, 10.0, waited_s), *(rank_record(rank, others, 10.0) for rank in (1, 2, 3))]
        lasgd = run_record("lasgd", ranks, link_emulation="namespaces")
        runs = {("independent", cell.condition): independent, ("lasgd", cell.condition): lasgd}
        return [bar.what.rpartition(": ")[2] for bar in judge(cell, [runs])[1] if not bar.holds]

    assert bars() == []
    assert bars(steps=95) == ["retention of the slowest held rank"]
    assert bars(waited_s=0.06) == ["waited_s / wall_s, worst rank and run"]
    assert bars(others=120) == ["retention, undisturbed"]


def test_a_table_of_several_calls_says_when_and_how_each_was_made():
    import render

    def run(label, seed, **made):
        curve = [[1.0, 100, 0.5, None], [2.0, 200, 0.9, None]]
        common = {"algorithm": label, "condition": "slow", "budget": "9 seconds", "seed": seed, "status": "finished"}
        return common | {"lr": 0.1, "final_top1": 0.9, "wall_s": 2.0, "waited_s": 0.0, "curve": curve} | made

    first = {"date": "2026-01-01", "commit": "aaa", "command": "python benchmarks/comparison.py x --seeds 0"}
    second = {"date": "2026-01-02", "commit": "bbb", "command": "python benchmarks/comparison.py x --seeds 1"}
    figures = {"runs": [run("sync_sgd", 0, **first), run("sync_sgd", 1, **second)], "grid": []}
    shown = render.render(
        "<!-- begin: comparison_x -->\n<!-- end: comparison_x -->\n",
        {"comparison_x": result(figures=figures, benchmark="comparison_x")},
    )
    assert (
        "Runs of 2026-01-01 at commit aaa, `python benchmarks/comparison.py x --seeds 0`; "
        "2026-01-02 at commit bbb, `python benchmarks/comparison.py x --seeds 1`." in shown
    )
