"""The peers are trained fairly, and what is said of them means the same as what is said of lasgd."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lasgd.errors import ConfigurationError
from lasgd.training.run_folder import RunRecord, read_metrics, read_run
from lasgd.training.settings import Settings

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
RUN = BENCHMARKS / "peers" / "run.py"
LIMIT_S = 100.0


@pytest.fixture(autouse=True)
def benchmarks_importable(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield
    for name in [name for name in sys.modules if name == "common" or name.split(".")[0] == "peers"]:
        sys.modules.pop(name)


# How many steps, and which replicas


@pytest.mark.parametrize(("every", "first", "expected"), [(1, 1, 63), (10, 10, 70), (10, 4, 64), (10, 100, 100)])
def test_the_last_step_is_a_synchronisation_and_the_budget_is_used_up(every, first, expected):
    from peers.common import steps_for

    steps = steps_for(4_000, 64, sync_every=every, first_sync=first)
    assert steps == expected
    assert steps * 64 >= 4_000
    assert (steps - first) % every == 0


def test_equal_replicas_are_their_own_mean_bit_for_bit():
    from peers.common import Replica, mean_of

    vector = torch.randn(1000)
    assert torch.equal(mean_of([Replica(vector, 1, 0.0)] * 3), vector)
    unequal = [Replica(torch.tensor([value]), 1, 0.0) for value in (1.0, 2.0, 6.0)]
    assert mean_of(unequal).item() == 3.0


def test_replicas_of_all_ranks_come_back_by_evaluation_and_the_files_are_gone(tmp_path):
    from peers.common import Replica, _read_replicas, _write_replicas

    here = {1: Replica(torch.ones(2), 10, 5.5), 3: Replica(torch.zeros(2), 30, 7.5)}
    _write_replicas(tmp_path, 0, 1.25, here)
    _write_replicas(tmp_path, 1, 1.5, {3: Replica(torch.ones(2), 40, 8.0)})
    begin_s, found = _read_replicas(tmp_path, 2)
    assert begin_s == 1.25
    assert list(found) == [3], "what one rank alone has kept has no mean"
    assert [(replica.samples, replica.at_s, replica.vector.tolist()) for replica in found[3]] == [
        (30, 7.5, [0, 0]),
        (40, 8.0, [1, 1]),
    ]
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("fragments", [1, 2, 3])
def test_diloco_gets_fragments_that_hold_every_parameter_once_and_are_as_equal_as_layers_allow(fragments):
    from lasgd.training.models import build_model
    from peers.torchft_diloco import cut

    model = build_model("cnn4", num_classes=10, channels=3, norm="group")
    parts = cut(model, fragments)
    assert len(parts) == fragments
    held = [parameter for part in parts for parameter in part.parameters()]
    assert [id(p) for p in held] == [id(p) for p in model.parameters()]
    if fragments == 2:  # the last convolution holds 75 % of all parameters, so no cut is fairer than just before it
        assert sum(p.numel() for p in parts[1].parameters()) < 0.8 * sum(p.numel() for p in held)


def test_hiveminds_groups_are_counted_from_what_it_logs():
    from peers.hivemind_optimizer import _Met

    met = _Met()
    for text in ("Averaged parameters with 4 peers", "Averaged parameters with 2 peers", "Averaging failed with X"):
        met.emit(logging.makeLogRecord({"msg": text}))
    logging.getLogger("hivemind").removeHandler(met)
    assert met.groups == [4, 2]
    assert str(met) == "averages: 1 in a group of 2, 1 in a group of 4; 1 failed"


# What cannot be


def test_a_condition_that_a_peer_cannot_have_is_refused(monkeypatch):
    from lasgd.training.settings import Settings
    from peers import run

    with pytest.raises(ConfigurationError, match="round= is made within lasgd's own group"):
        run.check_condition(Settings(condition="round=1s"), 4)
    monkeypatch.setattr(run.network, "why_not_namespaces", lambda *_: "network namespaces need root")
    with pytest.raises(ConfigurationError, match=r"network namespaces only.*need root"):
        run.check_condition(Settings(condition="link=20mbit"), 4)
    run.check_condition(Settings(condition="link=20mbit"), 1)
    run.check_condition(Settings(condition="straggler=last:4x+step=100ms"), 4)


def test_a_peer_of_another_version_says_what_to_install(monkeypatch):
    from peers import named

    monkeypatch.setattr(named, "installed_version", lambda package: None)
    with pytest.raises(ConfigurationError, match=r"hivemind 1\.1\.12, which is not installed.*requirements\.txt"):
        named.load("hivemind_optimizer")
    monkeypatch.setattr(named, "installed_version", lambda package: "0.1.0")
    assert "and 0.1.0 is installed here" in named.why_not("torchft_diloco")
    assert named.why_not("torch_ddp") is None


def test_the_versions_that_are_measured_are_those_of_the_requirements():
    from peers import named

    lines = (BENCHMARKS / "peers" / "requirements.txt").read_text().splitlines()
    pinned = {line for line in lines if line and not line.startswith("#")}
    assert pinned == {f"{peer.package}=={peer.version}" for peer in named.PEERS.values() if peer.version}


def test_wrong_options_are_told_without_a_traceback(tmp_path, capsys):
    from peers import run

    assert run.main(["torch_ddp", "--out", str(tmp_path / "run"), "--samples", "3"]) == 2
    assert "less than one batch on every rank" in capsys.readouterr().err
    assert run.main(["torch_ddp", "--out", str(tmp_path / "run"), "--lr", "many"]) == 2
    assert "--lr:" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run.main(["torch_dpp", "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def test_a_budget_in_seconds_is_as_many_samples_as_take_so_long():
    from peers.run import within

    settings = Settings(seconds=30.0, batch_size=16)
    assert within(settings, 30.0, 62.4, ranks=4).samples == 1872
    assert within(settings, 30.0, 62.4, ranks=4).seconds is None
    assert within(settings, 30.0, 0.1, ranks=4).samples == 64  # a step of every rank at least


def test_diloco_with_fragments_that_would_overtake_themselves_is_refused():
    from types import SimpleNamespace

    from lasgd.training.models import build_model
    from peers.torchft_diloco import Options, train

    model = build_model("cnn4", num_classes=10, channels=3, norm="group")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run = SimpleNamespace(model=model, optimizer=lambda: optimizer)
    for options in (Options(sync_every=20, delay=10), Options(sync_every=15), Options(delay=-1)):
        with pytest.raises(ConfigurationError, match="delay to be less than sync-every divided by"):
            train(run, options)


# Real runs

SHARED = ("--ranks", "2", "--samples", "1500", "--workers", "0", "--evaluations", "3", "--seed", "1")


def run_peer(name: str, out: Path, *options: str) -> RunRecord:
    command = [sys.executable, str(RUN), name, *SHARED, *options, "--out", str(out)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0, done.stdout + done.stderr
    record = read_run(out)
    assert record.status == "finished"
    assert record.algorithm == f"peer:{name}"
    assert record.final is not None and record.final.top1 is not None
    lines = read_metrics(out / "metrics.jsonl")
    assert lines[-1]["top1"] == record.final.top1
    assert [line["samples"] for line in lines] == sorted({line["samples"] for line in lines})
    assert all(0 < line["wall_s"] <= record.wall_s for line in lines)
    assert record.samples == sum(rank.samples for rank in record.ranks)
    for name in ("model.safetensors", "timeline.json.gz"):
        assert (out / name).exists()
    assert not (out / "replicas").exists() and not (out / "means").exists()
    return record


@pytest.mark.processes
@pytest.mark.timeout(240)
@pytest.mark.parametrize("condition", ["fast", "step=15ms"])
def test_ddp_ends_with_the_weights_of_sync_sgd(tmp_path, condition):
    peer = run_peer("torch_ddp", tmp_path / "peer", "--condition", condition)
    command = [sys.executable, "-m", "lasgd", "train", "--algorithm", "sync_sgd", "--condition", condition, *SHARED]
    subprocess.run(
        [*command, "--checkpoints", "0", "--device", "cpu", "--out", str(tmp_path / "own")],
        stdin=subprocess.DEVNULL,
        check=True,
        capture_output=True,
        timeout=LIMIT_S,
    )
    own = read_run(tmp_path / "own")
    assert peer.samples == own.samples
    theirs, ours = (load_file(tmp_path / which / "model.safetensors") for which in ("peer", "own"))
    assert theirs.keys() == ours.keys()
    for name, tensor in theirs.items():
        # The same sums in another order: 2^-24 each, grown over 24 steps. Another order of samples, another learning
        # rate in one step or another seed moves weights by more than 1e-2.
        torch.testing.assert_close(tensor, ours[name], rtol=0, atol=1e-4, msg=name)
    assert peer.replicas_identical
    assert peer.final and own.final
    assert peer.final.top1 == pytest.approx(own.final.top1, abs=0.01)
    if condition != "fast":
        assert all(0 < rank.waited_s < peer.wall_s for rank in peer.ranks)


@pytest.mark.processes
@pytest.mark.timeout(120)
def test_a_peers_own_pace_decides_what_fits_into_seconds(tmp_path):
    command = [sys.executable, str(RUN), "torch_ddp", "--ranks", "2", "--condition", "step=50ms", "--seconds", "5"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "run")], timeout=LIMIT_S, capture_output=True, check=False, text=True
    )
    assert done.returncode == 0, done.stderr
    record = read_run(tmp_path / "run")
    # How long that takes in the end is the machine's affair, which may be busier than a moment ago.
    said = re.search(r"(\d+) samples/s, so ([\d,]+) samples take 5(?:\.0)? seconds", done.stdout)
    assert said, done.stdout
    batch, step_s = record.settings["batch_size"], 0.05
    assert 0 < int(said[1]) <= 2 * batch / step_s
    assert record.settings["samples"] == int(said[2].replace(",", "")) == pytest.approx(5 * int(said[1]), abs=3)
    assert record.samples == pytest.approx(record.settings["samples"], abs=2 * batch)
    assert not (tmp_path / "run" / "pace").exists()


@pytest.mark.processes
@pytest.mark.timeout(120)
def test_post_local_sgd_averages_as_often_as_it_is_told(tmp_path):
    record = run_peer("torch_post_local_sgd", tmp_path / "run", "--sync-every", "6", "--ddp-share", "0.2")
    assert record.settings["peer"] == {"sync_every": 6, "ddp_share": 0.2}
    for rank in record.ranks:
        assert rank.local_steps == 24  # 5 by DDP; averages after the 6th, 12th, 18th and 24th
        assert rank.rounds == 5 + 4
        assert 0 < rank.waited_s < record.wall_s
    assert record.replicas_identical


@pytest.mark.processes
@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", ["torchft_local_sgd", "torchft_diloco", "hivemind_optimizer"])
def test_a_peer_that_is_installed_trains(tmp_path, name):
    from peers import named

    if (reason := named.why_not(name)) is not None:
        pytest.skip(reason)
    own = {
        "torchft_local_sgd": ("--sync-every", "4"),
        "torchft_diloco": ("--sync-every", "8", "--delay", "2"),
        "hivemind_optimizer": ("--condition", "step=50ms"),
    }
    record = run_peer(name, tmp_path / "run", *own[name])
    assert all(rank.rounds >= 1 for rank in record.ranks)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["settings"]["peer"]["sync_every"]
