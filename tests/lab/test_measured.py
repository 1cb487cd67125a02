"""What a run folder tells of machines, network and model, read back from folders made for it."""

from __future__ import annotations

import gzip
import itertools
import json
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import pytest
import safetensors.torch
import torch

from lasgd.errors import ConfigurationError, DataError
from lasgd.group.cost import ring_all_reduce_s, ring_bytes_sent
from lasgd.lab.measured import Measured, read_measured
from lasgd.pace import Column
from lasgd.training.run_folder import RankRecord, RunRecord, StalenessSteps, write_run
from lasgd.training.timeline import Timeline, write_chrome_trace
from lasgd.virtual.network_models import Network

ELEMENTS = 100_000
RANKS = 4
HEADER_BYTES = RANKS * 8 * len(Column)
LINK = {"latency_s": 0.002, "bandwidth_bytes_per_s": 2.5e6}


def round_s(fragments: int, **link: float) -> float:
    return ring_all_reduce_s(4 * ELEMENTS / fragments + HEADER_BYTES, RANKS, **(LINK | link))


@dataclass
class Folder:
    """A run folder, with what is asked for in it."""

    path: Path

    def write(
        self,
        *,
        step_s: tuple[float, ...] = (0.1, 0.1, 0.1, 0.4),
        rounds: list[float] | None = None,
        fragments: int = 5,
        settings: dict | None = None,
        with_model: bool = True,
        updates_s: float = 0.0,
        **run,
    ) -> Path:
        rounds = [round_s(1)] * 4 + [round_s(fragments)] * 30 if rounds is None else rounds
        timelines = []
        for rank, own_step_s in enumerate(step_s):
            timeline = Timeline(rank)
            timelines.append(timeline)
            begin_s = 0.0
            for step in range(20):
                length_s = own_step_s * (10 if step == 0 else 1)  # what a first step does once
                timeline.add("compute", begin_s, begin_s + length_s)
                begin_s += length_s
                if updates_s:
                    timeline.add("update", begin_s + 1, begin_s + 1 + updates_s)
                    begin_s += 1 + updates_s
            arrived_s = 0.0
            for number, seconds in enumerate(rounds):
                arrived_s += 1 + seconds
                waited_s = 0.3 * ((rank + number) % len(step_s))  # for the rank that joins last, each time another one
                timeline.add("round", arrived_s - seconds - waited_s, arrived_s)
        write_chrome_trace(self.path / "timeline.json.gz", timelines)
        if with_model:
            state = {"weight": torch.zeros(ELEMENTS // 2, 2), "batches": torch.zeros(7, dtype=torch.int64)}
            (self.path / "model.safetensors").write_bytes(safetensors.torch.save(state, metadata={"format": "pt"}))
        sent = len(rounds) * ring_bytes_sent(4 * ELEMENTS // fragments + HEADER_BYTES, RANKS)
        none = StalenessSteps(mean=None, max=None)
        ranks = [
            RankRecord(
                rank=rank,
                local_steps=20,
                samples=320,
                rounds=len(rounds),
                compute_s=1,
                waited_s=0,
                staleness_steps=none,
                bytes_sent=sent,
            )
            for rank in range(len(step_s))
        ]
        record = {
            "status": "finished",
            "algorithm": "lasgd",
            "condition": "fast",
            "settings": {"batch_size": 16, "fragments": "auto"} | (settings or {}),
            "environment": {},
            "world_size": len(step_s),
            "fragments": fragments,
            "ranks": ranks,
        }
        write_run(self.path, RunRecord(**(record | run)))
        return self.path


@pytest.fixture
def folder(tmp_path) -> Folder:
    return Folder(tmp_path)


def links(measured: Measured) -> tuple[float, float]:
    network = measured.network
    assert isinstance(network.up_bytes_per_s, float) and isinstance(network.latency_s, float)
    return network.up_bytes_per_s, network.latency_s


def test_step_times_are_those_of_the_timeline_without_each_ranks_first(folder):
    measured = read_measured(folder.write())
    assert measured.ranks == RANKS and measured.batch_size == 16
    assert list(islice(measured.compute.durations(0), 40)) == pytest.approx([0.1] * 40)
    assert next(measured.compute.durations(3)) == pytest.approx(0.4)
    assert "76 local steps of 4 ranks" in measured.said[0]
    assert "median 100 ms on the quickest and 400 ms on rank 3, the slowest" in measured.said[0]


def test_what_follows_a_wait_within_a_step_is_of_that_step(folder):
    measured = read_measured(folder.write(updates_s=0.02))
    assert next(measured.compute.durations(0)) == pytest.approx(0.12)


def test_the_vector_is_all_that_the_model_holds_in_floating_point(folder):
    vector = read_measured(folder.write()).vector
    assert (vector.elements, vector.nbytes) == (ELEMENTS, 4 * ELEMENTS)


def test_without_a_model_the_bytes_of_uncut_rounds_tell_its_length(folder):
    path = folder.write(with_model=False, fragments=1, settings={"fragments": 1})
    assert read_measured(path).vector.elements == pytest.approx(ELEMENTS, abs=1)
    path = folder.write(with_model=False)
    with pytest.raises(ConfigurationError, match=r"model\.safetensors does not exist.*cut, coded or never sent"):
        read_measured(path)


def test_two_sizes_of_rounds_tell_latency_from_bandwidth(folder):
    measured = read_measured(folder.write())
    assert links(measured) == pytest.approx((LINK["bandwidth_bytes_per_s"], LINK["latency_s"]), rel=1e-3)
    assert "an estimate, 20 Mbit/s and 2 ms latency" in measured.said[2]


def test_one_size_of_rounds_is_all_taken_for_bandwidth(folder):
    rounds = [round_s(1, latency_s=0.0)] * 20
    measured = read_measured(folder.write(rounds=rounds, fragments=1, algorithm="local_sgd"))
    assert links(measured) == pytest.approx((LINK["bandwidth_bytes_per_s"], 0.0), rel=1e-3)
    assert "do not tell latency from bandwidth" in measured.said[2]


def test_parts_that_take_as_long_as_the_whole_give_no_bandwidth_below_zero(folder):
    measured = read_measured(folder.write(rounds=[0.05] * 40))
    bandwidth, latency_s = links(measured)
    assert bandwidth > 0 and latency_s == 0


def test_the_estimate_gives_back_the_rounds_it_was_made_from(folder):
    measured = read_measured(folder.write())
    found_s = measured.network.all_reduce_s(4 * ELEMENTS / 5 + HEADER_BYTES, range(RANKS))
    assert found_s == pytest.approx(round_s(5), rel=1e-3)


def test_a_link_that_was_emulated_is_believed_and_a_round_too(folder):
    condition = "link=100mbit,latency=20ms+round=1s"
    measured = read_measured(folder.write(condition=condition, link_emulation="namespaces"))
    assert measured.network == Network(RANKS, 1.25e7 * 8948 / 9014, latency_s=0.02, round_s=1.0)
    assert condition in measured.said[2]
    ran_without = read_measured(folder.write(condition="link=100mbit"))
    assert "an estimate, 20 Mbit/s" in ran_without.said[2]


def test_more_ranks_repeat_the_measured_ones_from_other_moments_on(folder):
    path = folder.write()
    times = itertools.count(1)
    timeline = path / "timeline.json.gz"
    events = json.loads(gzip.decompress(timeline.read_bytes()))
    for event in events["traceEvents"]:
        if event["name"] == "compute":
            event["dur"] = next(times) * 1000.0
    timeline.write_bytes(gzip.compress(json.dumps(events).encode()))
    measured = read_measured(path, ranks=9)
    one, five, nine = (list(islice(measured.compute.durations(rank), 19)) for rank in (0, 4, 8))
    assert one != five != nine != one
    assert sorted(one) == sorted(five) == sorted(nine)
    assert measured.network.world_size == measured.ranks == 9
    assert "9, and 4 were measured" in measured.said[-1]


def test_fewer_ranks_are_the_first_ones(folder):
    measured = read_measured(folder.write(), ranks=2)
    assert measured.network.world_size == 2
    assert measured.said[-1] == "ranks: 2, the first of 4 that were measured"


def test_steps_that_outlasted_their_padding_are_pointed_out(folder):
    assert any("10.0% of the steps outlasted" in line for line in read_measured(folder.write(padding_overrun=0.1)).said)


def test_a_run_that_has_not_finished_is_refused(folder):
    with pytest.raises(ConfigurationError, match=r"interrupted.*no checkpoint to go on from"):
        read_measured(folder.write(status="interrupted"))
    cut = folder.path / "checkpoints" / "000001"
    cut.mkdir(parents=True)
    for rank in range(RANKS):
        (cut / f"rank-{rank}.pt").touch()
    with pytest.raises(ConfigurationError, match=r"interrupted.*Finish it first: lasgd train --resume"):
        read_measured(folder.write(status="interrupted"))
    with pytest.raises(ConfigurationError, match=r"interrupted.*Simulate it once more"):  # it cannot be resumed
        read_measured(folder.write(status="interrupted", link_emulation="virtual"))


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="is not a run folder"):
        read_measured(tmp_path)


def test_a_run_without_rounds_says_nothing_of_the_network_but_its_condition_may(folder):
    with pytest.raises(ConfigurationError, match=r"had no rounds.*Give the network yourself"):
        read_measured(folder.write(rounds=[], algorithm="independent"))
    path = folder.write(rounds=[], algorithm="independent", condition="link=20mbit", link_emulation="user space")
    assert read_measured(path).network == Network(RANKS, 2.5e6)


def test_one_rank_says_nothing_of_the_network(folder):
    with pytest.raises(ConfigurationError, match="had one rank"):
        read_measured(folder.write(step_s=(0.1,)))


def test_a_missing_or_broken_timeline_is_named(folder):
    path = folder.write()
    (path / "timeline.json.gz").write_bytes(b"no gzip")
    with pytest.raises(DataError, match=r"timeline\.json\.gz"):
        read_measured(path)
    (path / "timeline.json.gz").unlink()
    with pytest.raises(ConfigurationError, match=r"timeline\.json\.gz does not exist"):
        read_measured(path)


@pytest.mark.parametrize("content", [b"", b"\x05\0\0\0\0\0\0\0hello", b"\x02\0\0\0\0\0\0\0[]", b"\xff" * 8])
def test_a_broken_model_is_named(folder, content):
    path = folder.write()
    (path / "model.safetensors").write_bytes(content)
    with pytest.raises(ConfigurationError, match=r"model\.safetensors"):
        read_measured(path)


def test_zero_ranks_are_refused(folder):
    with pytest.raises(ConfigurationError, match="ranks is 0"):
        read_measured(folder.write(), ranks=0)
