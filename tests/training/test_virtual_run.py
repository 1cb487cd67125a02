"""Runs in virtual time with the recipe's own gradients, and the run folders that they leave."""

from __future__ import annotations

import gzip
import json

import pytest
import safetensors.torch
import torch

from lasgd.algorithms import registry
from lasgd.cli.app import main
from lasgd.errors import ConfigurationError, DivergenceError
from lasgd.lab.simulation import simulated
from lasgd.training import local_step, virtual_run, virtual_setup
from lasgd.training.data import open_data, training_batches
from lasgd.training.display import Display
from lasgd.training.run_folder import read_metrics, read_run
from lasgd.training.settings import SimulationSettings
from lasgd.training.setup import make_model, make_optimizer
from lasgd.training.virtual_data import SharedBatches
from lasgd.training.virtual_run import SimulatedRun, run_simulation

SMALL = {"model": "cnn4", "batch_size": 8, "workers": 0, "ranks": 3, "samples": 8 * 3 * 10, "evaluations": 2}


def settings(**changes) -> SimulationSettings:
    return SimulationSettings(**(SMALL | changes))


def run(out, **changes):
    out.mkdir()
    assert run_simulation(settings(**changes), out) == 0
    return read_run(out)


def weights(out) -> dict[str, torch.Tensor]:
    return safetensors.torch.load((out / "model.safetensors").read_bytes())


def trace(out) -> bytes:
    return gzip.decompress((out / "timeline.json.gz").read_bytes())


# What is computed


def test_one_rank_is_torch_sgd_on_its_own_batches_bit_for_bit(tmp_path):
    chosen = settings(ranks=1, samples=8 * 10, algorithm="sync_sgd", momentum=0.9, weight_decay=1e-3)
    tmp_path.joinpath("run").mkdir()
    run_simulation(chosen, tmp_path / "run")
    steps = read_run(tmp_path / "run").ranks[0].local_steps
    data = open_data("digits")
    model = make_model(chosen, data)
    optimizer = make_optimizer(chosen, model)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    batches = training_batches(data, seed=0, rank=0, batch_size=8, position=0, workers=0)
    for step in range(steps):
        batch = next(batches)
        local_step.gradient(model, batch.images, batch.labels)
        local_step.update(optimizer, chosen, min(1.0, step * 8 / 80))  # the header tells of the steps before
    torch.set_num_threads(threads)
    found = weights(tmp_path / "run")
    assert all(torch.equal(found[name], tensor) for name, tensor in model.state_dict().items())


def test_the_same_settings_give_the_same_bits_and_the_same_trace_with_any_number_of_threads(tmp_path):
    threads = torch.get_num_threads()
    condition = "link=20mbit+straggler=last:4x+step=20ms"
    run(tmp_path / "one", condition=condition)
    torch.set_num_threads(2)
    try:
        run(tmp_path / "two", condition=condition)
    finally:
        torch.set_num_threads(threads)
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert trace(tmp_path / "one") == trace(tmp_path / "two")


@pytest.mark.parametrize("algorithm", ["lasgd", "local_sgd", "sync_sgd"])
def test_with_gradients_and_without_the_same_things_happen_at_the_same_times(tmp_path, algorithm):
    changes = {"algorithm": algorithm, "condition": "link=20mbit+stall=1s@10%+step=50ms", "steps_per_round": 2.0}
    with_them = run(tmp_path / "with", **changes)
    without = run(tmp_path / "without", no_gradients=True, **changes)
    assert with_them.virtual_s == without.virtual_s
    assert [r.local_steps for r in with_them.ranks] == [r.local_steps for r in without.ranks]
    assert [r.rounds for r in with_them.ranks] == [r.rounds for r in without.ranks]
    assert without.final is None
    assert not (tmp_path / "without" / "model.safetensors").exists()


def test_replicas_are_identical_at_the_end_and_the_model_has_learnt_something(tmp_path):
    record = run(tmp_path / "run", samples=8 * 3 * 60, lr=0.05)
    assert record.replicas_identical is True
    assert record.final is not None and record.final.loss is not None
    assert record.final.loss < 2.1, "chance is ln 10 = 2.3"


def test_a_rank_that_diverges_with_all_the_others_ends_the_run_with_the_round(tmp_path):
    with pytest.raises(DivergenceError, match=r"round \d+: every rank holds NaN or Inf"):
        run(tmp_path / "run", lr=1e30)
    record = read_run(tmp_path / "run")
    assert record.status == "failed"
    assert record.error is not None and "NaN" in record.error


# The run folder


def test_a_simulated_run_leaves_the_run_folder_of_a_real_one_with_virtual_seconds(tmp_path):
    record = run(tmp_path / "run", condition="link=20mbit+step=100ms", algorithm="sync_sgd", evaluations=4)
    assert (record.status, record.link_emulation, record.world_size) == ("finished", "virtual", 3)
    assert record.virtual_s is not None
    rank = record.ranks[0]
    assert rank.compute_s == pytest.approx(0.1 * rank.local_steps)
    assert rank.waited_s + rank.compute_s == pytest.approx(record.virtual_s)
    assert rank.bytes_sent > rank.rounds * 1_000_000
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert len(lines) == 4
    assert [line["virtual_s"] for line in lines] == sorted(line["virtual_s"] for line in lines)
    assert lines[-1]["virtual_s"] == record.virtual_s
    events = json.loads(trace(tmp_path / "run"))["traceEvents"]
    kinds = {event["name"] for event in events if event["ph"] == "X"}
    assert kinds == {"compute", "wait", "round", "update"}


def test_what_was_assumed_of_the_steps_is_told_so_that_the_run_can_be_repeated(tmp_path):
    assert run(tmp_path / "assumed", no_gradients=True).settings["compute"] == "100ms"
    measured = run(tmp_path / "measured", compute="measured", no_gradients=True).settings["compute"]
    assert measured.endswith("ms")
    assert run(tmp_path / "given", condition="step=30ms", no_gradients=True).settings["compute"] is None


@pytest.mark.parametrize("algorithm", ["lasgd", "local_sgd", "independent"])
def test_a_run_that_is_asked_to_stop_ends_at_that_moment_however_far_the_next_round_is(
    tmp_path, monkeypatch, algorithm
):
    chosen = settings(samples=10**6, algorithm=algorithm, condition="round=3000s", steps_per_round=30_000)
    with Display("a test") as display:
        stopped = SimulatedRun(chosen, tmp_path, display)
        update, updates = local_step.update, []

        def and_stop(*given):
            updates.append(update(*given))
            if len(updates) == 7:
                stopped.stop()

        monkeypatch.setattr(local_step, "update", and_stop)
        assert stopped.finish(stopped.run()) == 130
    record = read_run(tmp_path)
    assert record.status == "interrupted" and record.final is None
    assert len(updates) == 7
    assert [rank.local_steps for rank in record.ranks] == [3, 2, 2]
    assert record.virtual_s == pytest.approx(0.3)
    assert [rank.compute_s for rank in record.ranks] == pytest.approx([0.3, 0.2, 0.2])


# Memory


def test_more_replicas_than_memory_holds_are_refused_before_they_are_made(tmp_path, monkeypatch):
    monkeypatch.setattr(virtual_setup, "available_bytes", lambda: 10_000_000)
    with (
        Display("a test") as display,
        pytest.raises(ConfigurationError, match=r"5,000 replicas of 6 times 1\.56 MB .* about 46.9 GB .* 0\.01 GB"),
    ):
        SimulatedRun(settings(ranks=5000, samples=8 * 5000), tmp_path, display)


def test_memory_that_is_free_is_counted():
    assert 0 < virtual_setup.available_bytes() < 2**50


# Batches


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_ranks_that_share_workers_draw_what_they_would_draw_alone_in_any_order(workers):
    data = open_data("digits")
    alone = [training_batches(data, seed=5, rank=rank, batch_size=4, position=0, workers=0) for rank in range(3)]
    shared = SharedBatches(data, seed=5, ranks=3, batch_size=4, workers=workers)
    for rank in [0, 1, 2, 2, 2, 2, 0, 1, 1, 0, 2, 0, 0, 0]:
        ours, theirs = shared.take(rank), next(alone[rank])
        assert torch.equal(ours.images, theirs.images) and torch.equal(ours.labels, theirs.labels)
        assert ours.position == theirs.position
    shared.close()
    shared.close()


# Settings


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--compute", "50ms", "--condition", "step=100ms"], "both say how long a local step takes. Keep one"),
        (["--network", "20mbit", "--condition", "link=1mbit"], "both describe the links. Keep one"),
        (["--network", "20mbit+rank=1:0mbit"], "'0mbit' would isolate rank 1"),
        (["--all-reduce", "hierarchical"], "needs a network with nodes"),
        (["--model-bytes", "4MB"], "goes with --no-gradients"),
        (["--model-bytes", "4MB", "--no-gradients"], "without data there are no epochs; give --samples or --seconds"),
        (["--model-bytes", "much", "--no-gradients"], "'much' is not a size"),
        (["--compute", "trace=nowhere.csv"], "nowhere.csv"),
        (["--run", "somewhere"], "--run goes with --advise"),
        (["--advise", "--out", "somewhere"], "--out beside --advise"),
        (["--advise", "--wire", "int8", "--model-bytes", "4MB"], "--wire beside --advise"),
        (["--advise", "--run", "nowhere"], "nowhere"),
        (["--ranks", "100000000"], "--ranks"),
        (["--compute", "measured", "--no-gradients", "--model-bytes", "4MB", "--samples", "999"], "needs a model"),
        (["--nework", "20mbit"], "network"),
    ],
)
def test_what_cannot_work_is_refused_in_a_line_before_anything_is_computed(
    tmp_path, monkeypatch, capsys, options, message
):
    monkeypatch.chdir(tmp_path)
    assert main(["simulate", *options]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said
    assert all(line.startswith("lasgd: ") for line in said.splitlines())
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_not_empty_is_not_said_to_hold_a_run_to_continue(tmp_path, capsys):
    out = tmp_path / "run"
    run(out, no_gradients=True)
    assert main(["simulate", "--out", str(out)]) == 2
    said = capsys.readouterr().err
    assert "is not empty. Name another folder or remove it." in said and "--resume" not in said


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("0,0.1\n0,-0.2\n", "-0.2"),
        ("0,0.1\n0,fast\n", "fast"),
        ("0,0.1\n2,0.1\n", "rank 1"),
    ],
)
def test_a_trace_with_gaps_negative_or_other_than_numbers_is_refused_with_the_place(
    tmp_path, monkeypatch, capsys, lines, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "steps.csv").write_text("rank,step_s\n" + lines)
    assert main(["simulate", "--compute", "trace=steps.csv"]) in (1, 2)
    said = capsys.readouterr().err
    assert "steps.csv" in said and message in said


def test_the_command_simulates_thousands_of_ranks_without_gradients(tmp_path, capsys):
    out = tmp_path / "run"
    options = ["--ranks", "2000", "--no-gradients", "--model-bytes", "100MB", "--network", "10gbit,latency=50us"]
    assert main(["simulate", "--out", str(out), *options, "--samples", "640000", "--all-reduce", "tree"]) == 0
    record = read_run(out)
    assert record.world_size == 2000 and record.virtual_s is not None
    assert "and 1,988 more ranks, in run.json" in capsys.readouterr().out


def test_advice_names_what_to_try_first(tmp_path, capsys):
    options = ["--ranks", "4", "--model-bytes", "45MB", "--network", "100mbit", "--compute", "200ms"]
    assert main(["simulate", "--advise", *options]) == 0
    said = capsys.readouterr().out
    assert "Try first: lasgd." in said
    assert said.startswith("4 ranks, batch size 32 a rank")
    assert main(["simulate", "--advise", "--ranks", "1", "--model-bytes", "45MB"]) == 0
    assert capsys.readouterr().out.startswith("1 rank, batch size 32 a rank")
    assert "45 MB, as given" in said


def test_the_plan_of_a_run_is_what_the_settings_say():
    chosen = settings(algorithm="local_sgd", steps_per_round=5.0, condition="link=20mbit+step=100ms", no_gradients=True)
    plan = virtual_setup.plan(chosen, 3, virtual_setup.vector_of_bytes("1.5MB"), None, 0.1)
    assert (plan.ranks, plan.samples, plan.vector.nbytes, plan.cut) == (3, 240, 1_500_000, 1)
    assert simulated(plan).rounds == 2


# Several cores


def test_gradients_computed_ahead_on_several_threads_are_the_same_bit_for_bit(tmp_path, monkeypatch):
    for cores in (1, 3):
        monkeypatch.setattr(virtual_run, "usable_cores", lambda cores=cores: cores)
        run(tmp_path / str(cores), condition="link=20mbit+stall=1s@10%+step=50ms")
    one, three = weights(tmp_path / "1"), weights(tmp_path / "3")
    assert all(torch.equal(one[name], three[name]) for name in one)
    assert trace(tmp_path / "1") == trace(tmp_path / "3")


class WithDropout(torch.nn.Sequential):
    def __init__(self):
        super().__init__(torch.nn.Flatten(), torch.nn.Dropout(), torch.nn.Linear(64, 10))


def test_only_what_does_not_depend_on_when_is_computed_ahead():
    data = open_data("digits")
    assert virtual_run.may_compute_ahead(make_model(settings(), data), data)
    assert not virtual_run.may_compute_ahead(make_model(settings(norm="batch"), data), data)
    assert not virtual_run.may_compute_ahead(WithDropout(), data)


@pytest.mark.parametrize("algorithm", registry.names())
def test_every_algorithm_leaves_a_folder_that_says_how_far_apart_the_replicas_were(tmp_path, algorithm):
    condition = "link=200mbit+step=100ms"
    record = run(tmp_path / "run", algorithm=algorithm, condition=condition, evaluations=4, samples=480, lr=0.01)
    agrees = registry.find(algorithm).agrees
    assert record.replicas_identical is agrees
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert len(lines) >= (3 if agrees else 1)
    assert all(line["consensus"] >= 0 for line in lines)
    assert (lines[-1]["consensus"] < 1e-6) == agrees
    if algorithm in ("lasgd", "d_psgd", "sgp", "osgp", "ad_psgd", "easgd", "parameter_server"):
        assert lines[0]["consensus"] > 1e-3
    for rank in record.ranks:
        counted = rank.staleness_steps.histogram
        assert max(counted, default=0) == rank.staleness_steps.max
        assert rank.rounds > 0 or not agrees
