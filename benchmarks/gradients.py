"""What a simulated local step costs beyond its gradient: `lasgd simulate` with real gradients on 16 virtual ranks.

    bare        forward and backward of 16 models, one after the other, on batches that lie ready
    simulated   the same steps of a simulated run: batches, optimizer, rounds, step boundaries, the clock
    vmap        the bare gradients of all 16 at once, replicas as rows of one tensor (torch.func.vmap)

Bare gradients are one thread's. The simulated run has its batches drawn by one worker beside it, as by default, and
computes on one thread, too, or on those of two cores, which is its default where there are two. All are measured in
turn. `vmap` decides nothing: it says whether rows of one tensor would be the faster way.

    python benchmarks/gradients.py            about 4 minutes
    python benchmarks/gradients.py --quick    does it work?
"""

from __future__ import annotations

import contextlib
import io
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn import functional

from common import Bar, Report, arguments_for, run_card, spread, where_to_store
from lasgd.training import local_step, virtual_run
from lasgd.training.data import ImageData, TrainingSource, open_data
from lasgd.training.display import Display
from lasgd.training.settings import SimulationSettings
from lasgd.training.setup import make_model
from retention import make_images

RANKS = 16
BATCH_SIZE = 16
OVERHEAD = 1.10
CORES = (1, 2)
CONDITIONS = {
    "link=20mbit+step=100ms": "rounds by fragments, about one a step",
    "step=100ms": "the whole vector of every rank in every step: the most that averaging can cost",
}


def settings_for(data: Path, condition: str, samples: int) -> SimulationSettings:
    """A simulated run that computes and averages, and evaluates nothing on its way."""
    return SimulationSettings(
        data=str(data),
        model="cnn4",
        ranks=RANKS,
        batch_size=BATCH_SIZE,
        samples=samples,
        condition=condition,
        lr=0.01,
        evaluations=0,
    )


def bare_s(models: Sequence[nn.Module], batches: Sequence[Any], rounds: int) -> float:
    """Seconds of one gradient, median over passes through all models."""
    passes = []
    for _ in range(rounds):
        begin_s = time.perf_counter()
        for model, batch in zip(models, batches, strict=True):
            local_step.gradient(model, batch.images, batch.labels)
            model.zero_grad()
        passes.append((time.perf_counter() - begin_s) / len(models))
    return statistics.median(passes)


def simulated_s(data: Path, condition: str, steps: int, cores: int) -> float:
    """Seconds of a simulated local step on `cores`, all of it: the run's own wall time over its steps."""
    virtual_run.usable_cores = lambda: cores
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.redirect_stdout(io.StringIO()),
        Display("gradients") as display,
    ):
        run = virtual_run.SimulatedRun(settings_for(data, condition, steps * RANKS * BATCH_SIZE), Path(folder), display)
        begin_s = time.perf_counter()
        outcome = run.run()
        seconds = time.perf_counter() - begin_s
        return seconds / sum(rank.tally.local_steps for rank in outcome.ranks)


def vmap_s(models: Sequence[nn.Module], batches: Sequence[Any], rounds: int) -> float:
    """Seconds of one gradient where all are computed at once."""
    parameters, buffers = stack_module_state(list(models))
    base = models[0]

    def loss(parameters: Any, buffers: Any, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(functional_call(base, (parameters, buffers), (images,)), labels)

    images, labels = torch.stack([b.images for b in batches]), torch.stack([b.labels for b in batches])
    gradients: Callable[..., Any] = vmap(grad(loss))
    passes = []
    for _ in range(rounds):
        begin_s = time.perf_counter()
        gradients(parameters, buffers, images, labels)
        passes.append((time.perf_counter() - begin_s) / len(models))
    return statistics.median(passes)


def prepared(opened: ImageData, data: Path) -> tuple[list[nn.Module], list[Any]]:
    """Models of all ranks, and a batch for each."""
    settings = settings_for(data, "step=100ms", RANKS * BATCH_SIZE)
    models = [make_model(settings, opened) for _ in range(RANKS)]
    batches = [TrainingSource(opened, 0, rank, BATCH_SIZE)[0] for rank in range(RANKS)]
    return models, batches


def _cores(n: int) -> str:
    return "one core" if n == 1 else f"{n} cores"


def main(argv: Sequence[str] | None = None) -> int:
    """Measures; returns the exit code."""
    arguments = arguments_for("gradients", __doc__).parse_args(argv)
    repeats, steps, rounds = (1, 5, 3) if arguments.quick else (4, 25, 12)
    card = run_card({"quick": arguments.quick, "ranks": RANKS, "batch_size": BATCH_SIZE}, [arguments.seed])
    report = Report("gradients", card)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="lasgd-gradients-") as name:
        data = make_images(Path(name) / "data")
        models, batches = prepared(open_data(str(data)), data)
        cells = [(condition, cores) for condition in CONDITIONS for cores in CORES]
        overheads: dict[tuple[str, int], list[float]] = {cell: [] for cell in cells}
        bare, at_once = [], []
        for repeat in range(repeats):
            for condition, cores in cells:
                before = bare_s(models, batches, rounds)
                simulated = simulated_s(data, condition, steps, cores)
                after = bare_s(models, batches, rounds)
                bare.append((before + after) / 2)
                overheads[condition, cores].append(simulated / bare[-1])
                print(
                    f"repeat {repeat + 1} of {repeats}, {condition}, cores {cores}: bare {bare[-1] * 1e3:.2f} ms, "
                    f"simulated {simulated * 1e3:.2f} ms a step",
                    flush=True,
                )
            at_once.append(vmap_s(models, batches, rounds) / bare[-1])
    torch.set_num_threads(threads)
    report.figures = {
        "bare_ms": spread([1e3 * seconds for seconds in bare]),
        "simulated_over_bare": {
            f"{condition}, {_cores(cores)}": spread(values) for (condition, cores), values in overheads.items()
        },
        "vmap_over_bare": spread(at_once),
    }
    for (condition, cores), values in overheads.items():
        report.add(
            Bar(
                f"{RANKS} ranks, {condition}, {_cores(cores)}: a simulated step over its bare gradient",
                statistics.median(values),
                at_most=OVERHEAD,
                among=(min(values), max(values)),
            )
        )
    return report.finish(where_to_store("gradients", arguments))


if __name__ == "__main__":
    raise SystemExit(main())
