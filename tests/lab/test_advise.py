"""What the advisor says of clusters that can be reckoned by hand."""

from __future__ import annotations

import math

import pytest
from rich.console import Console

from lasgd.algorithms import registry
from lasgd.errors import ConfigurationError
from lasgd.lab.advise import (
    ABOUT_EQUAL,
    MOST_WRITING_RANKS,
    SAME_TIME,
    Advice,
    _Kept,
    _Lab,
    advice_table,
    advise,
    ranked,
    rounds_to_hear_of_all,
)
from lasgd.lab.simulation import Plan, simulated
from lasgd.momentum import LEAST_FRAGMENTS
from lasgd.pace import Column
from lasgd.virtual.compute_models import Constant, LogNormal, Stalls, Stragglers
from lasgd.virtual.network_models import Network, Nodes
from lasgd.virtual.timing_replica import Vector

MODEL = Vector(11_250_000)  # 45 MB
STEP = Constant(0.2)
FAST_LAN = 1.25e10  # 100 Gbit/s
SLOW_LINK = 1.25e7  # 100 Mbit/s
HEADER_BYTES = 8 * 8 * len(Column)  # of eight ranks
THREE = ("lasgd", "local_sgd", "sync_sgd")


def advices(
    compute=STEP, bytes_per_s=SLOW_LINK, ranks=8, vector=MODEL, network=None, algorithms=THREE, **more
) -> list[Advice]:
    cluster = {"ranks": ranks, "compute": compute, "network": network or Network(ranks, bytes_per_s)}
    return advise(**cluster, vector=vector, batch_size=32, algorithms=algorithms, **more)


def of(found: list[Advice], algorithm: str, setting: str = "") -> Advice:
    [advice] = [a for a in found if a.algorithm == algorithm and a.setting == setting]
    return advice


def printed(found: list[Advice], width: int = 80, ranks: int = 8) -> str:
    console = Console(width=width, force_terminal=False)
    with console.capture() as capture:
        console.print(advice_table(found, ranks), crop=False)
    return capture.get()


# Cases


def test_on_a_fast_lan_synchronous_sgd_comes_first_because_nothing_is_stale():
    found = advices(bytes_per_s=FAST_LAN)
    assert found[0].algorithm == "sync_sgd"
    assert found[0].share_of_limit > 1 - ABOUT_EQUAL
    assert found[0].samples_per_s == pytest.approx(8 * 32 / 0.2, rel=ABOUT_EQUAL)
    assert found[0].staleness_steps == found[0].age_steps == 0


@pytest.mark.parametrize("bytes_per_s", [math.inf, FAST_LAN])
def test_lasgd_is_cut_as_a_training_would_cut_it_with_its_momentum_of_the_mean(bytes_per_s):
    assert of(advices(bytes_per_s=bytes_per_s), "lasgd").fragments == LEAST_FRAGMENTS


def test_a_network_that_costs_nothing_makes_all_equally_fast():
    found = advices(bytes_per_s=math.inf, algorithms=None)
    assert [advice.share_of_limit for advice in found] == pytest.approx([1.0] * len(found))
    assert [(found[0].algorithm, found[0].age_steps), found[1].setting] == [("sync_sgd", 0), "steps-per-round=1"]


def test_on_a_slow_link_what_never_waits_comes_first_and_the_others_pay_what_the_link_takes():
    found = advices()
    assert found[0].algorithm == "lasgd"
    assert found[0].share_of_limit == 1 and found[0].waited_share == 0
    whole_s = 2 * 7 / 8 * (MODEL.nbytes + HEADER_BYTES) / SLOW_LINK  # 6.3 s
    for steps in (1, 4, 16, 64):
        local = of(found, "local_sgd", f"steps-per-round={steps}")
        assert local.share_of_limit == pytest.approx(steps * 0.2 / (steps * 0.2 + whole_s), rel=1e-6)
        assert local.steps_between_averages == steps
    # Gradients overlap with the backward pass from the first full bucket on.
    overlapped_s = 2 / 3 * 0.2 * (1 - 2**20 / MODEL.nbytes)
    assert of(found, "sync_sgd").s_per_sample == pytest.approx((0.2 + whole_s - overlapped_s) / (8 * 32), rel=1e-3)
    assert "waits 6.17 s for the network" in of(found, "sync_sgd").reason


def test_the_smallest_number_of_steps_that_hides_the_network_is_found():
    found = advices(bytes_per_s=1.25e8)
    [enough] = [advice for advice in found if "fewer steps than" in advice.reason]
    steps = int(enough.setting.split("=")[-1])
    network_s = 2 * 7 / 8 * (MODEL.nbytes + HEADER_BYTES) / 1.25e8
    assert network_s / (steps * 0.2 + network_s) <= ABOUT_EQUAL < network_s / ((steps - 1) * 0.2 + network_s)


def test_a_number_of_steps_that_nobody_would_use_is_not_proposed():
    assert not [advice for advice in advices(bytes_per_s=1e6) if "fewer steps than" in advice.reason]


def test_a_straggler_holds_up_only_those_who_wait_and_is_named():
    found = advices(Stragglers(STEP, {3: 4.0}), bytes_per_s=FAST_LAN)
    assert found[0].algorithm == "lasgd" and found[0].share_of_limit == 1
    assert found[0].samples_per_s == pytest.approx(32 * (7 / 0.2 + 1 / 0.8))
    # Everybody at 0.8 s a step: 10 steps a second where 36.25 are possible.
    assert of(found, "sync_sgd").share_of_limit == pytest.approx(10 / 36.25, rel=0.01)
    assert "up to 0.6 s for rank 3" in of(found, "sync_sgd").reason
    assert "up to 2.40 s for rank 3" in of(found, "local_sgd", "steps-per-round=4").reason


def test_stalls_hold_up_those_who_wait_the_less_the_more_steps_are_in_a_round():
    found = advices(Stalls(Constant(0.055), 1.0, 0.01, seed=0), bytes_per_s=FAST_LAN, vector=Vector(391_466))
    assert found[0].algorithm == "lasgd" and found[0].share_of_limit == 1
    sync = of(found, "sync_sgd")
    # A step takes 1.055 s where any of 8 ranks stalls: 55 ms + (1 - 0.99^8) s, of which a rank's own are 65 ms.
    assert sync.share_of_limit == pytest.approx(0.065 / (0.055 + 1 - 0.99**8), rel=0.1)
    assert "for whichever rank is last" in sync.reason
    shares = [of(found, "local_sgd", f"steps-per-round={steps}").share_of_limit for steps in (1, 4, 16, 64)]
    assert shares == sorted(shares)


def test_late_means_are_as_late_as_a_round_takes():
    lasgd = of(advices(), "lasgd")
    assert lasgd.fragments == 20
    part_steps = 2 * 7 / 8 * (MODEL.nbytes / 20 + HEADER_BYTES) / SLOW_LINK / 0.2
    assert part_steps < lasgd.staleness_steps < part_steps + 1  # shown at the next step boundary
    assert lasgd.steps_between_averages == pytest.approx(20 * part_steps, rel=0.05)
    assert lasgd.bytes_per_s == pytest.approx(SLOW_LINK, rel=0.02)  # back to back, the link is always busy


def test_one_rank_has_nobody_to_wait_for():
    found = advices(ranks=1, algorithms=None)
    assert all(advice.share_of_limit == pytest.approx(1) for advice in found)
    assert found[0].algorithm == "sync_sgd"


def test_a_thousand_ranks_are_simulated_in_seconds():
    found = advices(Stragglers(STEP, {999: 4.0}), ranks=1000, network=Network(1000, SLOW_LINK, latency_s=1e-4))
    assert found[0].algorithm == "lasgd"
    assert "rank 999" in of(found, "sync_sgd").reason


def test_nodes_and_other_all_reduces_are_taken_into_account():
    network = Network(8, 1.25e9, latency_s=1e-4, nodes=Nodes(4, 1.25e7))
    ring, hierarchical = (
        of(advices(network=network, all_reduce=method), "sync_sgd") for method in ("ring", "hierarchical")
    )
    assert ring.share_of_limit != hierarchical.share_of_limit
    with pytest.raises(ConfigurationError, match="needs a network with nodes"):
        advices(all_reduce="hierarchical")


# How


def test_a_narrow_terminal_wraps_lines_and_cuts_no_figure():
    wide, narrow = (printed(advices(), width).split("\n\n")[0] for width in (80, 40))
    assert narrow == wide
    assert "…" not in narrow


def test_every_algorithm_that_agrees_is_advised_on_and_progress_says_so():
    lines: list[str] = []
    found = advices(bytes_per_s=FAST_LAN, algorithms=None, progress=lines.append)
    tried = {name for name in registry.names() if registry.find(name).agrees} - set(SAME_TIME)
    assert {advice.algorithm for advice in found} == tried
    assert [line for line in lines if "," not in line] == [f"simulating {n}" for n in registry.names() if n in tried]
    assert (
        "diloco takes the time of local_sgd. post_local_sgd takes the time of sync_sgd, then of local_sgd."
        in " ".join(printed(found).split())
    )


@pytest.mark.parametrize(("name", "other"), [("diloco", "local_sgd"), ("post_local_sgd", "sync_sgd")])
def test_what_is_not_tried_takes_the_time_of_what_is(name, other):
    settings = {"synchronous_share": 1.0} if name == "post_local_sgd" else {}
    runs = [
        simulated(Plan(algorithm, 4, Stragglers(STEP, {3: 2.0}), Network(4, 1e7), MODEL, 4 * 32 * 30))
        for algorithm in (registry.find(name, settings), registry.find(other))
    ]
    assert runs[0].virtual_s == pytest.approx(runs[1].virtual_s)


def test_where_too_many_ranks_would_write_to_each_other_those_algorithms_are_left_out_and_named():
    found = advices(ranks=MOST_WRITING_RANKS + 1, bytes_per_s=math.inf, algorithms=None)
    assert {a.algorithm for a in found} == {"lasgd", "local_sgd", "sync_sgd", "overlap_local_sgd", "cocod_sgd"}
    said = " ".join(printed(found, ranks=MOST_WRITING_RANKS + 1).split())
    assert "Left out, since on more than 128 ranks messages take long to simulate: d_psgd, sgp, osgp," in said


def test_a_server_is_as_slow_as_its_link_that_all_share():
    found = advices(ranks=16, bytes_per_s=1.25e8, algorithms=("parameter_server", "osgp"))
    server = of(found, "parameter_server", "steps-per-round=64")
    # Fifteen workers' vectors cross the server's link both ways, at once: 5.4 s for 64 steps of 0.2 s.
    assert server.samples_per_s < 16 * 32 * 64 / (64 * 0.2 + 15 * MODEL.nbytes / 1.25e8) * 1.15
    assert "for messages" in server.reason
    assert of(found, "osgp").share_of_limit == pytest.approx(1)


@pytest.mark.parametrize(
    ("name", "settings", "rounds"),
    [("d_psgd", {}, 4), ("sgp", {}, 3), ("ad_psgd", {}, 3), ("d_psgd", {"topology": "complete"}, 1), ("lasgd", {}, 1)],
)
def test_a_rank_hears_of_all_after_as_many_exchanges_as_the_topology_takes(name, settings, rounds):
    assert rounds_to_hear_of_all(registry.find(name, settings), 8) == rounds
    assert rounds_to_hear_of_all(registry.find(name, settings), 1) == 1


def test_the_limit_is_what_independent_reaches():
    compute = Stragglers(STEP, {3: 4.0})
    plan = Plan(registry.find("independent"), 8, compute, Network(8, 1e6), MODEL, samples=8 * 32 * 50)
    first = advices(compute)[0]
    assert first.samples_per_s / first.share_of_limit == pytest.approx(simulated(plan).samples_per_s)


@pytest.mark.parametrize("bytes_per_s, latency_s", [(SLOW_LINK, 0.0), (1.25e8, 0.0), (1.25e8, 5e-3), (2.5e6, 0.02)])
def test_the_number_of_fragments_is_the_one_that_auto_comes_to(bytes_per_s, latency_s):
    network = Network(8, bytes_per_s, latency_s=latency_s)
    plan = Plan(registry.find("lasgd"), 8, STEP, network, MODEL, samples=8 * 32 * 2000)
    found = of(advices(network=network), "lasgd").fragments
    assert found == pytest.approx(simulated(plan).fragments, abs=1)


def test_steps_joined_into_one_change_little_of_what_a_long_round_shows():
    lab = _Lab.of(8, STEP, Network(8, 1.25e5), MODEL, 32, "ring")  # a part takes 160 steps
    algorithm = registry.find("lasgd")
    alone, joined = (lab._simulated(algorithm, 1, 20, joined, 6000 // joined) for joined in (1, 6))
    assert joined.staleness_steps == pytest.approx(alone.staleness_steps, abs=6)  # one simulated step
    assert joined.steps_per_round == pytest.approx(alone.steps_per_round, rel=0.03)
    local = registry.find("local_sgd")
    alone, joined = (lab._simulated(local, 16, 1, joined, 160 // joined) for joined in (1, 16))
    assert joined.share_of_limit == pytest.approx(alone.share_of_limit)
    assert (joined.steps_per_round, joined.waits.rounds) == (alone.steps_per_round, alone.waits.rounds)


def test_step_times_that_are_kept_are_those_of_the_model():
    model = LogNormal(0.1, 0.5, seed=3)
    kept = _Kept(model, 2)
    assert kept.first(1, 10) == kept.first(1, 600)[:10]
    ours, theirs = kept.durations(1), model.durations(1)
    assert [next(ours) for _ in range(1500)] == [next(theirs) for _ in range(1500)]


# Ranking and words


def advice(name: str, s_per_sample: float, staleness: float = 0.0, apart: float = 0.0) -> Advice:
    return Advice(name, "", 1 / s_per_sample, s_per_sample, 1.0, staleness, 0.0, 0.0, 1, "because", apart)


def test_about_equal_times_are_ordered_by_age_and_others_by_time():
    found = ranked([advice("slow", 1.2), advice("stale", 1.0, 3.0), advice("fresh", 1.04), advice("rare", 1.01, 0, 9)])
    assert [a.algorithm for a in found] == ["fresh", "stale", "rare", "slow"]


def test_the_table_fits_eighty_columns_and_says_what_to_try_first():
    text = printed(advices(Stragglers(STEP, {7: 4.0})))
    assert max(map(len, text.splitlines())) <= 80
    assert "..." not in text and "…" not in text
    assert "Try first: lasgd." in text
    assert "expect to pay in accuracy" in " ".join(text.split())
    assert "not time to an accuracy" in " ".join(text.split())


def test_where_the_first_is_fresh_no_second_is_named():
    text = printed(advices(bytes_per_s=FAST_LAN))
    assert "Try first: sync_sgd." in text
    assert "If it learns too little" not in text


def test_no_advice_is_an_empty_table():
    assert "algorithm" in printed([])
