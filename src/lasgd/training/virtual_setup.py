"""From settings to a virtual cluster: which cluster, which model, and whether its replicas fit into memory."""

from __future__ import annotations

import copy
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from torch import nn

from lasgd.algorithms import registry
from lasgd.errors import ConfigurationError
from lasgd.lab import conditions
from lasgd.lab.compute_text import parse_compute
from lasgd.lab.network_text import parse_network
from lasgd.lab.quantities import BYTES, Reader
from lasgd.lab.simulation import Plan
from lasgd.lab.virtual_conditions import from_condition, slowed
from lasgd.layout import Layout
from lasgd.training import local_step
from lasgd.training.data import ImageData, TrainingSource
from lasgd.training.settings import SimulationSettings
from lasgd.training.setup import budget, make_optimizer
from lasgd.virtual.compute_models import ComputeModel
from lasgd.virtual.network_models import Network
from lasgd.virtual.timing_replica import Vector

DEFAULT_STEP_S = 0.1
BYTES_A_RANK = 20_000
"""Memory of a rank that computes nothing, at most: benchmarks/scale.py finds less."""

_READ = Reader("--model-bytes")


def cluster(settings: SimulationSettings, world_size: int, own_step_s: float) -> tuple[ComputeModel, Network]:
    """The compute model and the network that the settings ask for.

    `own_step_s` is what a step takes where they do not say. Raises ConfigurationError where they contradict themselves
    or cannot be understood, and DataError for a trace that cannot be read.
    """
    condition = conditions.parse(settings.condition)
    if settings.compute is not None and condition.step_s is not None:
        raise ConfigurationError(
            f"--compute {settings.compute} and step= in --condition {settings.condition} both say how long a local "
            "step takes. Keep one."
        )
    own_network = None
    if settings.network is not None:
        if condition.bandwidth_bytes_per_s is not None:
            raise ConfigurationError(
                f"--network {settings.network} and link= in --condition {settings.condition} both describe the links. "
                "Keep one."
            )
        own_network = parse_network(settings.network, world_size)
    compute, network = from_condition(condition, world_size, settings.seed, own_step_s, own_network)
    if settings.compute not in (None, "measured"):
        own = parse_compute(settings.compute, world_size, settings.seed)
        compute = slowed(own, condition, world_size, settings.seed)
    network.all_reduce_cost(tuple(range(world_size)), settings.all_reduce)  # refuses a method that it cannot do
    return compute, network


def vector_of_bytes(text: str) -> Vector:
    """`102MB` -> a vector of float32. Raises ConfigurationError."""
    n_bytes = _READ.quantity(text, text.strip().casefold(), "a size", BYTES, "102MB")
    if n_bytes < 4:
        _READ.refuse(text, "a vector needs at least one element of 4 bytes", "102MB")
    return Vector(int(n_bytes) // 4)


def vector_of(layout: Layout) -> Vector:
    """As long as what `layout` averages."""
    return Vector(layout.size, torch.finfo(layout.dtype).bits // 8)


def check_memory(layout: Layout | None, world_size: int, wire: str = "fp32", keeps_mean: bool = False) -> None:
    """Raises ConfigurationError, saying how much is needed, where the ranks do not fit into memory. Allocates nothing.

    A replica with its work holds five vectors: the parameters, their gradients, momentum, residual and what it sends;
    with a wire format the latest mean too, and with momentum of the mean.
    """
    vectors = 5 + (wire != "fp32") + keeps_mean
    needed = world_size * (BYTES_A_RANK if layout is None else vectors * vector_of(layout).nbytes)
    available = available_bytes()
    if needed > available:
        each = "" if layout is None else f" of {vectors} times {vector_of(layout).nbytes / 1e6:.3g} MB each"
        advice = "Use fewer ranks" if layout is None else "Use fewer ranks, a smaller model, or --no-gradients"
        raise ConfigurationError(
            f"--ranks: {world_size:,} replicas{each} need about {needed / 1e9:.3g} GB of memory, and "
            f"{available / 1e9:.3g} GB are free. {advice}."
        )


def available_bytes() -> int:
    """Memory that this process may still take: of the machine, and of its control group."""
    available = psutil.virtual_memory().available
    try:
        limit, used = (int(Path(f"/sys/fs/cgroup/memory.{name}").read_text()) for name in ("max", "current"))
    except (OSError, ValueError):  # no control groups here, or no limit ("max")
        return available
    return min(available, max(0, limit - used))


def says_no_step(settings: SimulationSettings) -> bool:
    """Neither --compute nor the condition says how long a local step takes."""
    return settings.compute in (None, "measured") and conditions.parse(settings.condition).step_s is None


@dataclass(frozen=True)
class StepTime:
    """How long a local step takes where the settings do not say."""

    seconds: float
    said: str
    """Where that comes from."""


def step_time(settings: SimulationSettings, model: nn.Module | None, data: ImageData | None) -> StepTime:
    """What `cluster` needs as own_step_s. Raises ConfigurationError."""
    if settings.compute != "measured":
        return StepTime(DEFAULT_STEP_S, "assumed; say --compute or step= in --condition")
    if model is None or data is None:
        raise ConfigurationError("--compute measured needs a model to measure; with --model-bytes give a duration.")
    return StepTime(measured_step_s(settings, model, data), "measured here")


def measured_step_s(settings: SimulationSettings, model: nn.Module, data: ImageData, steps: int = 12) -> float:
    """Median seconds of a local step on this machine, alone on it; leaves `model` as it was."""
    model = copy.deepcopy(model)
    optimizer = make_optimizer(settings, model)
    batch = TrainingSource(data, settings.seed, 0, settings.batch_size)[0]
    if isinstance(batch, Exception):
        raise batch
    device = next(model.parameters()).device
    images, labels = batch.images.to(device), batch.labels.to(device)
    seconds = []
    for _ in range(steps):
        begin_s = time.perf_counter()
        local_step.gradient(model, images, labels)
        local_step.update(optimizer, settings, 0.5)
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()
        seconds.append(time.perf_counter() - begin_s)
    return statistics.median(seconds[2:])


def budget_without_data(settings: SimulationSettings, world_size: int) -> int | None:
    """Samples of all ranks together, None for --seconds. Raises ConfigurationError where they are counted in epochs."""
    if settings.seconds is not None:
        return None
    if settings.samples is None:
        raise ConfigurationError("--model-bytes: without data there are no epochs; give --samples or --seconds.")
    settings.check_budget(settings.samples, f"--samples: {settings.samples:,}", world_size)
    return settings.samples


def plan(
    settings: SimulationSettings,
    world_size: int,
    vector: Vector,
    data: ImageData | None,
    own_step_s: float,
) -> Plan:
    """What is to be simulated. Raises ConfigurationError, DataError."""
    samples = budget_without_data(settings, world_size) if data is None else budget(settings, data, world_size)
    compute, network = cluster(settings, world_size, own_step_s)
    algorithm = registry.find(settings.algorithm, settings.algorithm_settings())
    algorithm.check_wire(settings.wire)
    algorithm.check_momentum(settings.optimizer_momentum)
    return Plan(
        algorithm,
        ranks=world_size,
        compute=compute,
        network=network,
        vector=vector,
        samples=samples,
        seconds=settings.seconds,
        batch_size=settings.batch_size,
        steps_per_round=settings.steps_per_round,
        fragments=settings.fragments,
        evaluations=0 if settings.no_gradients else settings.evaluations,
        wire=settings.wire,
        all_reduce=settings.all_reduce,
    )
