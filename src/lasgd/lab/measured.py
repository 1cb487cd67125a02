"""What a finished run tells of its machines, its network and its model, for simulations of other runs on them.

    step times   `compute` intervals of timeline.json.gz, with what `update` adds to them, but for each rank's first
    network      the link that the run's condition names; else a + b n_bytes, estimated from its `round` intervals
    vector       model.safetensors: everything in floating point; else the bytes that rounds have sent

A round has taken what the rank waited that joined last, the least over the ranks. Rounds of one size cannot tell
latency from bandwidth. Runs with `fragments auto` have two: they begin with the whole vector, and end with parts.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import math
import statistics
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lasgd.errors import ConfigurationError, DataError
from lasgd.group.cost import ring_all_reduce_s, ring_bytes_sent
from lasgd.lab import conditions
from lasgd.lab.frames import payload_share
from lasgd.pace import Column, Delay
from lasgd.training.display import OVERRUN_LIMIT
from lasgd.training.run_folder import RunRecord, has_checkpoint, read_run
from lasgd.virtual.compute_models import ComputeModel, Trace
from lasgd.virtual.network_models import Network
from lasgd.virtual.step_times import read_step_times
from lasgd.virtual.timing_replica import Vector
from lasgd.wire import Wire, piece_bytes
from lasgd.wire import wire as wire_named

_KEPT_STEPS = 2000
"""The latest of each rank."""

_LONGEST_HEADER = 100_000_000
"""Bytes; the format allows no more."""

_ELEMENT_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


@dataclass(frozen=True)
class Measured:
    """A cluster and a model, as a run has found them."""

    ranks: int
    compute: ComputeModel
    network: Network
    vector: Vector
    batch_size: int
    said: list[str]
    """Where each figure comes from, a sentence each."""


def read_measured(run_folder: Path, ranks: int | None = None) -> Measured:
    """What the finished run in `run_folder` has measured, for `ranks` ranks (None: as many as it had).

    Raises ConfigurationError, naming the folder or file, for what is no run, has not finished, or has nothing to say
    of the network; DataError for step times that cannot be read.
    """
    run_folder = Path(run_folder)
    run = read_run(run_folder)
    if run.status != "finished":
        is_real = run.link_emulation != "virtual"
        if not is_real:
            remedy = "Simulate it once more, to its end."
        elif has_checkpoint(run_folder, run.world_size):
            remedy = f"Finish it first: lasgd train --resume {run_folder}"
        else:
            remedy = "It has no checkpoint to go on from: train once more, to the end."
        raise ConfigurationError(
            f"{run_folder} is a run that is {run.status}, and only a finished one says how long its rounds took. "
            f"{remedy}"
        )
    ranks = run.world_size if ranks is None else ranks
    if ranks < 1:
        raise ConfigurationError(f"ranks is {ranks}; expected at least 1")
    said: list[str] = []
    events = _events(run_folder / "timeline.json.gz")
    times = _step_times(run_folder / "timeline.json.gz", events, run.world_size)
    said.append(
        f"step times: {sum(map(len, times)):,} local steps of {run.world_size} ranks in the run's timeline, "
        f"{_range(times)}; each rank's first is left out"
    )
    if run.padding_overrun > OVERRUN_LIMIT:
        said.append(f"{run.padding_overrun:.1%} of the steps outlasted their padding: these step times mean little")
    vector, source = _vector(run_folder, run)
    said.append(f"vector: {vector.elements:,} values, {vector.nbytes / 1e6:.3g} MB, {source}")
    network, source = _network(run_folder, run, events, vector, ranks)
    said.append(f"network: {source}")
    batch_size = _batch_size(run_folder, run)
    said.append(f"batch size: {batch_size} a rank, the run's setting")
    if ranks > run.world_size:
        said.append(
            f"ranks: {ranks}, and {run.world_size} were measured: the others repeat them, slow ones included, from "
            "other moments on"
        )
    elif ranks < run.world_size:
        said.append(f"ranks: {ranks}, the first of {run.world_size} that were measured")
    return Measured(ranks, Trace(_repeated(times, ranks)), network, vector, batch_size, said)


# Step times


def _events(path: Path) -> list[dict[str, Any]]:
    """Intervals, in the order of their beginning."""
    if not path.exists():
        raise ConfigurationError(f"{path} does not exist: the run has kept no timeline, so its step times are unknown.")
    try:
        trace = json.loads(gzip.decompress(path.read_bytes()))
        events = [event for event in trace["traceEvents"] if event["ph"] == "X"]
        if not all(isinstance(event["dur"], int | float) and isinstance(event["name"], str) for event in events):
            raise ValueError("an interval has no duration or no name")
        return sorted(events, key=lambda event: (event["pid"], event["ts"]))
    except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is no timeline as runs write it: {error!r}.") from error


def _step_times(path: Path, events: Sequence[dict[str, Any]], world_size: int) -> list[list[float]]:
    """By rank; where ranks wait within a step, what comes after the wait is of that step too."""
    read = read_step_times(path)  # says in words what is wrong with a step
    if len(read) != world_size:
        raise DataError(
            f"{path} has step times of {len(read)} ranks, and the run had {world_size}: describe the cluster with "
            "--compute and --network in place of --run."
        )
    times: list[list[float]] = [[] for _ in read]
    for event in events:
        if event["name"] == "compute":
            times[event["pid"]].append(event["dur"] * 1e-6)
        elif event["name"] == "update" and times[event["pid"]]:
            times[event["pid"]][-1] += event["dur"] * 1e-6
    return [steps[1:][-_KEPT_STEPS:] or steps for steps in times]


def _range(times: Sequence[Sequence[float]]) -> str:
    medians = [statistics.median(steps) for steps in times]
    low, high = min(medians), max(medians)
    if high < 1.05 * low:
        return f"median {_seconds(low)}"
    return f"median {_seconds(low)} on the quickest and {_seconds(high)} on rank {medians.index(high)}, the slowest"


def _repeated(times: Sequence[Sequence[float]], ranks: int) -> list[list[float]]:
    """Ranks that were not measured take the steps of one that was, but not all at the same moment."""
    copies = math.ceil(ranks / len(times))
    repeated: list[list[float]] = []
    for rank in range(ranks):
        steps = times[rank % len(times)]
        begin = len(steps) * (rank // len(times)) // copies
        repeated.append([*steps[begin:], *steps[:begin]])
    return repeated


# Model


def _vector(run_folder: Path, run: RunRecord) -> tuple[Vector, str]:
    path = run_folder / "model.safetensors"
    if path.exists():
        return _vector_of(path), "the floating-point tensors of model.safetensors"
    rounds, sent = run.ranks[0].rounds if run.ranks else 0, run.ranks[0].bytes_sent if run.ranks else 0
    is_cut = run.fragments != 1 or run.settings.get("fragments") == "auto"
    if not rounds or not sent or is_cut or _wire(run) is not None:
        raise ConfigurationError(
            f"{path} does not exist, and the bytes that the run has sent do not tell how long its vector is, because "
            "it was cut, coded or never sent."
        )
    n_bytes = sent / rounds / ring_bytes_sent(10**9, run.world_size) * 10**9 - _header_bytes(run.world_size)
    return Vector(max(1, round(n_bytes / 4))), "from the bytes sent in each round"


def _vector_of(path: Path) -> Vector:
    """The header says all: 8 bytes of length, and JSON (huggingface.co/docs/safetensors)."""
    try:
        with open(path, "rb") as file:
            header = json.loads(file.read(min(int.from_bytes(file.read(8), "little"), _LONGEST_HEADER)))
        tensors = [entry for name, entry in header.items() if name != "__metadata__"]
        real = [entry for entry in tensors if entry["dtype"] in _ELEMENT_BYTES]
        elements = sum(math.prod(entry["shape"]) for entry in real)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigurationError(f"{path} is no model as runs write it: {error!r}.") from error
    if not elements:
        raise ConfigurationError(f"{path} holds nothing in floating point, so nothing was averaged.")
    return Vector(elements, 8 if any(entry["dtype"] == "F64" for entry in real) else 4)


def _batch_size(run_folder: Path, run: RunRecord) -> int:
    batch_size = run.settings.get("batch_size")
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ConfigurationError(f"{run_folder / 'run.json'} has no batch_size among its settings.")
    return batch_size


# Network


def _network(
    run_folder: Path, run: RunRecord, events: Sequence[dict[str, Any]], vector: Vector, ranks: int
) -> tuple[Network, str]:
    condition = conditions.parse(run.condition)
    if condition.bandwidth_bytes_per_s is not None and run.link_emulation != "none":
        # Links in user space carry what the ranks send and nothing else.
        link = condition.bandwidth_bytes_per_s
        share = payload_share(link) if run.link_emulation == "namespaces" else 1.0
        network = Network(ranks, share * link, latency_s=condition.latency_s)
        source = f"the run's condition {run.condition}"
    elif condition.round_s is not None:
        network, source = Network(ranks, math.inf), f"the run's condition {run.condition}"
    else:
        network, source = _estimated(run_folder, run, events, vector, ranks)
    if condition.round_s is not None:
        network = dataclasses.replace(network, round_s=condition.round_s)
    return network, source


def _wire(run: RunRecord) -> Wire | None:
    return wire_named(run.settings.get("wire", "fp32"))


def _travelling_bytes(run: RunRecord, vector: Vector, fragments: int) -> float:
    """Of one of so many fragments, in the run's wire format."""
    wire, n = _wire(run), run.world_size
    return vector.nbytes / fragments if wire is None else n * piece_bytes(wire, vector.elements // fragments, n)


def _estimated(
    run_folder: Path, run: RunRecord, events: Sequence[dict[str, Any]], vector: Vector, ranks: int
) -> tuple[Network, str]:
    n = run.world_size
    rounds = _round_times(events, n)
    if n == 1 or not rounds:
        why = "had one rank" if n == 1 else "had no rounds"
        raise ConfigurationError(
            f"{run_folder}: the run {why}, and its condition '{run.condition}' names no link, so it says nothing of "
            f"the network. Give the network yourself, as in --network 100mbit, with its step times: "
            f"--compute trace={run_folder / 'timeline.json.gz'}"
        )
    fragments = run.fragments or 1
    n_bytes = _travelling_bytes(run, vector, fragments) + _header_bytes(n)
    # The run's last rounds are cut as it says; the first one is slower, for it waits for all ranks to have started.
    late_s = statistics.median(rounds[-max(fragments, len(rounds) // 2) :])
    messages = 2 * (n - 1)
    whole_bytes = _travelling_bytes(run, vector, 1) + _header_bytes(n)
    early = rounds[1 : Delay.LEAST_ROUNDS]
    if fragments > 1 and run.settings.get("fragments") == "auto" and len(rounds) > Delay.LEAST_ROUNDS + fragments:
        s_per_byte = (min(early) - late_s) / (whole_bytes - n_bytes)
        fixed_s = late_s - s_per_byte * n_bytes
        if s_per_byte > 0 and fixed_s >= 0:
            network = Network(ranks, messages / n / s_per_byte, latency_s=fixed_s / messages)
            return network, _estimate(network, f"rounds of the whole vector and of one of {fragments} parts")
    bandwidth = n_bytes / late_s * ring_all_reduce_s(1.0, n, 0.0, 1.0)
    network = Network(ranks, bandwidth)
    which = "the whole vector" if fragments == 1 else f"one of {fragments} parts"
    return network, (
        _estimate(network, f"rounds of {which}, median {_seconds(late_s)}")
        + ". Rounds of one size do not tell latency from bandwidth: all is taken for bandwidth"
    )


def _estimate(network: Network, source: str) -> str:
    assert isinstance(network.up_bytes_per_s, float) and isinstance(network.latency_s, float)
    latency = f" and {_seconds(network.latency_s)} latency" if network.latency_s else ""
    mbit_per_s = float(f"{network.up_bytes_per_s * 8 / 1e6:.3g}")
    return f"an estimate, {mbit_per_s:,g} Mbit/s{latency}, from {source}"


def _round_times(events: Sequence[dict[str, Any]], world_size: int) -> list[float]:
    """Seconds of each round since its last rank joined."""
    by_rank: list[list[float]] = [[] for _ in range(world_size)]
    for event in events:
        if event["name"] == "round":
            by_rank[event["pid"]].append(event["dur"] * 1e-6)
    return [least for least in map(min, zip(*by_rank, strict=False)) if least > 0]


def _header_bytes(world_size: int) -> int:
    return world_size * len(Column) * 8


def _seconds(value: float) -> str:
    return f"{value:.3g} s" if value >= 1 else f"{value * 1e3:.3g} ms" if value >= 1e-3 else f"{value * 1e6:.3g} us"
