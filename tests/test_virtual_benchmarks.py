"""The benchmarks of the virtual cluster: what their figures mean, and that the documents' pictures show them."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def benchmarks_importable(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield
    for name in ("clusters", "common", "drawing", "drift", "scale"):
        sys.modules.pop(name, None)


def stored(name):
    path = BENCHMARKS / "results" / f"{name}.json"
    if not path.exists():
        pytest.skip(f"no stored result of {name}")
    return json.loads(path.read_text(encoding="utf-8"))


# scale


def size(local_steps, cpu_s, **changes):
    known = {"ranks": 10, "steps": 10, "rounds": 5, "wall_s": cpu_s, "peak_bytes": 1e9}
    return known | {"local_steps": local_steps, "cpu_s": cpu_s} | changes


def test_growth_is_one_where_the_time_is_n_log_n():
    from scale import growth

    sizes = [size(n, 1e-6 * n * math.log2(n)) for n in (10**6, 10**5, 10**7)]
    assert growth(sizes) == pytest.approx(1.0)
    assert growth([size(10**5, 1.0), size(10**7, 1e4)]) == pytest.approx(100 * 5 / 7), "n squared"


def test_growth_is_not_told_from_runs_too_short_to_be_timed():
    from scale import growth

    assert growth([size(10**3, 0.001), size(10**7, 100.0)]) is None
    assert growth([size(10**3, 0.001), size(10**5, 1.0), size(10**6, 12.0)]) == pytest.approx(1.0)


def test_a_small_run_that_was_disturbed_hides_no_growth():
    from scale import growth

    assert growth([size(10**5, 50.0), size(10**5, 1.0), size(10**6, 24.0)]) == pytest.approx(2.0)


def test_slow_large_or_steep_runs_miss_their_bars():
    from scale import judge

    def missed(of_a, of_b=()):
        sizes = {"a": [size(10**5, 0.8), size(10**7, 110.0) | dict(of_a)], "b": [size(10**7, 900.0) | dict(of_b)]}
        return [bar.what.rpartition(": ")[2] for bar in judge(sizes)[0] if bar.holds is False]

    assert missed({"cpu_s": 59.0, "wall_s": 59.0}) == []
    assert missed({"cpu_s": 61.0, "wall_s": 59.0}) == ["time of one core"]
    assert missed({"cpu_s": 59.0, "wall_s": 61.0}) == ["time on the wall"]
    assert missed({"cpu_s": 59.0, "wall_s": 59.0}, {"peak_bytes": 5e9}) == ["peak memory"]
    assert "growth of seconds / (n log n)" in missed({"cpu_s": 180.0})


def test_conditions_that_are_dearer_than_the_promised_one_are_told_beside_it():
    from scale import judge

    _, [note] = judge({"a": [size(10**7, 50.0)], "b": [size(10**7, 70.0)], "c": [size(10**7, 130.0)]})
    assert "70 s of one core" in note and "130 s of one core" in note


@pytest.mark.parametrize("is_quick", [True, False])
def test_sizes_go_from_small_to_large_and_end_with_what_is_promised(is_quick):
    from scale import FULL, plan

    sizes = [ranks * steps for ranks, steps in plan(is_quick)]
    assert sizes == sorted(sizes)
    assert is_quick or plan(is_quick)[-1] == FULL == (10_000, 1_000)


def test_one_size_is_run_and_measured():
    from scale import CELLS, measure

    found = measure(CELLS["c"], 5, 20, seed=1)
    assert found["local_steps"] >= 100 and found["rounds"] > 20
    assert found["cpu_s"] > 0 and found["peak_bytes"] > 1e6


# clusters


def test_fragments_settle_where_auto_does_in_a_run():
    from clusters import settled_fragments
    from lasgd.algorithms import registry
    from lasgd.lab.simulation import Plan, simulated
    from lasgd.virtual.compute_models import Constant
    from lasgd.virtual.network_models import Network
    from lasgd.virtual.timing_replica import Vector

    for latency_s, bytes_per_s in ((0.0, 1e4), (0.0, 1e3), (0.2, 1e4), (0.0, 1e9)):
        network = Network(2, bytes_per_s, latency_s=latency_s)

        def delay(parts, network=network):
            return network.all_reduce_s(40_000 / parts + 160, range(2))

        plan = Plan(registry.find("lasgd"), 2, Constant(1.0), network, Vector(10_000), samples=2 * 2_000, batch_size=1)
        assert simulated(plan).fragments == settled_fragments(delay), (latency_s, bytes_per_s)


def test_the_method_is_the_one_that_suits_the_message():
    from clusters import best_method
    from lasgd.virtual.network_models import Network

    assert best_method(Network(12, 1e6, latency_s=1e-6), 1e8) == "ring", "12 is no power of two"
    assert best_method(Network(16, 1e6, latency_s=1e-6), 1e8) == "halving_doubling"
    assert best_method(Network(12, 1e6, latency_s=1.0), 8) == "halving_doubling", "22 messages on end in a ring, 8 here"


def test_a_network_that_takes_so_many_steps_takes_them():
    from clusters import STEP_S, VECTOR, round_s, taking
    from lasgd.pace import Column

    network = taking(16, 2.5)
    assert round_s(network) == pytest.approx(2.5 * STEP_S)
    assert network.all_reduce_s(VECTOR.nbytes + 8 * len(Column) * 16, range(16)) == pytest.approx(2.5 * STEP_S)


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_crossover_of_equal_steps_is_the_one_on_paper(ranks):
    from clusters import crossover, crossover_of_equal_steps

    assert crossover(ranks, 0.0, seed=0) == pytest.approx(crossover_of_equal_steps(ranks), abs=2e-3)


def test_where_step_times_alone_cost_more_there_is_no_crossover():
    from clusters import crossover

    assert crossover(4, 0.5, seed=0) is None


def test_lasgd_that_waits_or_a_crossover_that_is_off_misses_its_bar():
    from clusters import crossover_of_equal_steps, judge

    def missed(retention=1.0, staleness=1.5, off=0.0):
        point = {"line": "lasgd", "retention": retention}
        figures = {
            "ranks": [{"line": "lasgd", "retention": 1.0}, {"line": "sync_sgd", "retention": 0.1}],
            "stragglers": [point],
            "curves": [{"line": "lasgd", "round_steps": 0.5, "staleness_steps": staleness}],
            "crossover": [{"ranks": 4, "sigma": 0.0, "round_steps": crossover_of_equal_steps(4) + off}],
        }
        return [bar.what for bar in judge(figures) if not bar.holds]

    assert missed() == []
    assert missed(retention=0.96) == ["lasgd: retention, least of all clusters"]
    assert missed(retention=1.06) == ["lasgd: retention, most of all clusters"]
    assert missed(staleness=2.1) == ["lasgd, rounds shorter than a step: staleness"]
    assert missed(off=0.02) == ["sync_sgd, equal steps: crossover, largest error to the closed form"]


def test_the_stored_figures_are_what_the_code_says_today():
    from clusters import against_ranks

    figures = stored("clusters")["figures"]
    seed = stored("clusters")["card"]["seeds"][0]
    few = [found for found in figures["ranks"] if found["ranks"] <= 16]
    for found, again in zip(few, against_ranks((4, 16), seed), strict=True):
        assert again == pytest.approx(found), "run python benchmarks/clusters.py"


# Pictures


def test_pictures_show_the_stored_figures():
    from clusters import PICTURES
    from drawing import mark
    from scale import FIGURE

    for name, (path, _) in PICTURES.items():
        shown = path.read_text(encoding="utf-8")
        assert mark(stored("clusters")["figures"][name]) in shown, "run python benchmarks/clusters.py --draw"
    if (BENCHMARKS / "results" / "scale.json").exists():
        shown = FIGURE.read_text(encoding="utf-8")
        assert mark(stored("scale")["figures"]) in shown, "run python benchmarks/scale.py --draw"


def test_the_picture_of_drift_shows_the_stored_figures_and_what_is_worked_out_today():
    import drift
    from drawing import mark

    figures = stored("drift")["figures"]
    assert mark(figures["lines"]) in drift.FIGURE.read_text(encoding="utf-8"), "run python benchmarks/drift.py --draw"
    few = [one for one in figures["limits"] if one["delay"] <= 5]
    assert few == drift.limits((1, 2, 5))


def test_a_picture_of_other_figures_is_marked_otherwise():
    from drawing import mark

    assert mark({"a": 1.0}) == mark({"a": 1.0}) != mark({"a": 1.5})
