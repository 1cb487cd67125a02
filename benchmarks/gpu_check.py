"""Is averaging on a CUDA device right, and what does it cost? One command, one process; ranks are threads over Gloo.

correctness   one rank is plain training, bit for bit; two ranks end identical: SGD, bf16, channels_last, fused AdamW
              under a GradScaler, a CUDA graph; corrections cancel with the GPU behind its host; the order of
              snapshots, merges and corrections is kept, and breaks where its fences are taken out; a rank that
              holds NaN recovers
cost          local steps with averaging over those without (ResNet-50); device memory; no device-wide synchronise

python benchmarks/gpu_check.py                        a few minutes; without a GPU it says so and ends well
python benchmarks/gpu_check.py --device cpu --quick   the checks that make sense there, to see that they work
"""

from __future__ import annotations

import gc
import json
import os
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before CUDA starts: reproducible on several streams

import torch
from torch.nn import functional

import gpu_correctness as correctness
import lasgd
from common import Bar, Report, arguments_for, retention_bars, run_card, spread, where_to_store
from gpu_jobs import JOBS, sgd
from lasgd.group.c10d import C10dGroup
from lasgd.training.models import build_model
from resnet50 import parameter_bytes, seeded_resnet50
from thread_ranks import run_ranks, settle

RETENTION = 0.90
MB = 1_000_000
ALLOWANCE_BYTES = 16 * MB


class Workload:
    """What the cost is measured on: ResNet-50 at 224x224 on a GPU, `cnn4` at 32x32 where a CPU only tries it out."""

    def __init__(self, device: torch.device, quick: bool) -> None:
        self.device = device
        self.on_gpu = device.type == "cuda"
        self.batch_size = 64 if self.on_gpu else 8
        self.image_size = 224 if self.on_gpu else 32
        self.warm_up = 10 if self.on_gpu else 2
        self.steps = (20 if quick else 60) if self.on_gpu else (5 if quick else 30)
        self.pairs = 1 if quick else 3

    def rank(self, seed: int) -> tuple[torch.nn.Module, torch.optim.Optimizer, Callable[[], None]]:
        """(model, optimizer, one local step)."""
        torch.manual_seed(0)
        model = seeded_resnet50(0) if self.on_gpu else build_model("cnn4", num_classes=10, channels=3)
        model = model.to(self.device, memory_format=torch.channels_last)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        torch.manual_seed(seed)
        images = torch.randn(self.batch_size, 3, self.image_size, self.image_size, device=self.device)
        images = images.to(memory_format=torch.channels_last)
        labels = torch.randint(0, 10, (self.batch_size,), device=self.device)

        def step() -> None:
            functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
            optimizer.zero_grad()

        return model, optimizer, step


def steps_per_s(work: Workload, world_size: int, with_averaging: bool, fragments: int | str) -> float:
    """Local steps a second of all ranks together, after a warm-up."""
    jobs = [work.rank(seed) for seed in range(world_size)]
    begin = threading.Barrier(world_size)

    def timed(step: Callable[[], None]) -> float:
        for _ in range(work.warm_up):
            step()
        settle(work.device)
        begin.wait(120.0)
        begin_s = time.perf_counter()
        for _ in range(work.steps):
            step()
        settle(work.device)
        return work.steps / (time.perf_counter() - begin_s)

    def body(rank: int, group: C10dGroup) -> float:
        model, optimizer, step = jobs[rank]
        if not with_averaging:
            return timed(step)
        averaging = lasgd.attach(
            model, optimizer, samples=correctness.EVER, batch_size=work.batch_size, fragments=fragments, group=group
        )
        with averaging:
            rate = timed(step)
        return rate

    return sum(run_ranks(world_size, work.device, body))


def retention(work: Workload, world_size: int) -> dict[str, Any]:
    """Pairs of runs, in turned order: with averaging over without."""
    pairs: list[float] = []
    rates: dict[str, list[float]] = {"plain": [], "averaging": []}
    for number in range(work.pairs):
        for with_averaging in (False, True) if number % 2 == 0 else (True, False):
            rate = steps_per_s(work, world_size, with_averaging, "auto")
            rates["averaging" if with_averaging else "plain"].append(rate)
        pairs.append(rates["averaging"][-1] / rates["plain"][-1])
    s_per_step = {name: [world_size / rate for rate in found] for name, found in rates.items()}
    return {"retention": spread(pairs), "s_per_step": s_per_step, "ranks": world_size}


def peak_bytes(work: Workload, fragments: int | None) -> int:
    """The most device memory that tensors held at a time over some steps of one rank; None: without averaging."""
    gc.collect()  # an averaging and its optimizer's hooks refer to each other
    torch.cuda.synchronize(work.device)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(work.device)
    model, optimizer, step = work.rank(0)
    torch.cuda.reset_peak_memory_stats(work.device)

    def body(rank: int, group: C10dGroup) -> None:
        if fragments is None:
            for _ in range(work.warm_up):
                step()
            return
        averaging = lasgd.attach(
            model, optimizer, samples=correctness.EVER, batch_size=1, fragments=fragments, group=group
        )
        with averaging:
            deadline_s = time.monotonic() + correctness.STUCK_S
            steps = 0
            while steps < work.warm_up or averaging.tally.staleness.merges < 2 * fragments:
                step()
                settle(work.device)
                steps += 1
                if time.monotonic() > deadline_s:
                    raise RuntimeError(f"only {averaging.tally.staleness.merges} merges in {steps} steps")

    run_ranks(1, work.device, body)
    torch.cuda.synchronize(work.device)
    return torch.cuda.max_memory_allocated(work.device) - before


def runtime_calls(device: torch.device, with_averaging: bool, steps: int) -> dict[str, int]:
    """How often a profiler trace over `steps` local steps names calls that wait."""
    job = sgd(device, 0)

    def profiled() -> dict[str, int]:
        for _ in range(20):
            job.step()
        settle(device)
        activities = [torch.profiler.ProfilerActivity.CPU]
        if device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        with torch.profiler.profile(activities=activities) as profile:
            for _ in range(steps):
                job.step()
                settle(device)
        with tempfile.TemporaryDirectory(prefix="lasgd-trace-") as folder:
            path = Path(folder, "trace.json")
            profile.export_chrome_trace(str(path))
            events = json.loads(path.read_text(encoding="utf-8", errors="replace"))["traceEvents"]
        names = [event.get("name", "") for event in events if event.get("ph") == "X"]
        return {
            name: names.count(name)
            for name in ("cudaDeviceSynchronize", "cudaStreamSynchronize", "cudaEventSynchronize")
        }

    def body(rank: int, group: C10dGroup) -> dict[str, int]:
        if not with_averaging:
            return profiled()
        averaging = lasgd.attach(
            job.model, job.optimizer, samples=correctness.EVER, batch_size=1, fragments=2, group=group
        )
        with averaging:
            before = averaging.pace.round
            counts = profiled()
            counts["rounds"] = averaging.pace.round - before
        return counts

    return run_ranks(1, device, body)[0]


def check_correctness(report: Report, device: torch.device, quick: bool) -> None:
    """All checks that hold or do not; an error in one is a miss, and the others go on."""
    steps = 40 if quick else 200
    spinner = correctness.Spinner(device)
    checks: dict[str, Callable[[], correctness.Outcome]] = {}
    for name, make in JOBS.items():
        checks[f"one rank is plain training: {name}"] = lambda make=make: correctness.one_rank_is_plain_training(
            make, device, steps
        )
        checks[f"two ranks end identical: {name}"] = lambda make=make: correctness.two_ranks_end_identical(
            make, device, steps
        )
    checks["corrections cancel while the device lags behind"] = lambda: correctness.corrections_cancel(
        device, spinner, steps
    )
    checks["fences keep the order"] = lambda: correctness.fences_keep_the_order(device, spinner)
    checks["a rank that holds NaN recovers"] = lambda: correctness.a_sick_rank_recovers(device, steps)
    checks["nothing waits for the whole device"] = lambda: correctness.no_wait_for_the_whole_device(device, spinner)
    for name, check in checks.items():
        try:
            holds, figures = check()
        except Exception as error:
            traceback.print_exc()
            holds, figures = False, {"error": f"{type(error).__name__}: {error}"}
        report.figures[name] = figures
        report.add(Bar(name, holds))


def check_cost(report: Report, device: torch.device, quick: bool) -> None:
    """Retention, device memory, and calls in a trace."""
    work = Workload(device, quick)
    for world_size in (1, 2):
        figures = retention(work, world_size)
        report.figures[f"retention, {world_size} rank(s)"] = figures
        for bar in retention_bars(f"retention, {world_size} rank(s) on the device", figures["retention"], RETENTION):
            report.add(bar)
    if device.type != "cuda":
        report.notes.append("device memory and calls that wait are measured on a CUDA device only")
        return
    alone, model_bytes = peak_bytes(work, None), parameter_bytes(seeded_resnet50(0))
    for fragments in (1, 5):
        extra = peak_bytes(work, fragments) - alone
        report.figures[f"device memory, F = {fragments}"] = {"extra_bytes": extra, "parameter_bytes": model_bytes}
        allowed = (1 + 2 / fragments) * model_bytes + ALLOWANCE_BYTES
        report.add(
            Bar(f"device memory, F = {fragments}", round(extra / MB, 1), at_most=round(allowed / MB, 1), unit=" MB")
        )
    # The profiler itself synchronises the device when it starts and stops, hence the comparison.
    calls = {name: runtime_calls(device, name == "averaging", 200) for name in ("plain", "averaging")}
    report.figures["runtime calls in a trace"] = calls
    more = calls["averaging"]["cudaDeviceSynchronize"] - calls["plain"]["cudaDeviceSynchronize"]
    has_averaged = calls["averaging"]["rounds"] >= 5
    what = "device-wide synchronises that averaging adds to a trace"
    report.add(Bar(what, more if has_averaged else None, at_most=0))


def main(argv: Sequence[str] | None = None) -> int:
    """Checks one device; returns the exit code."""
    parser = arguments_for("gpu_check", __doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    arguments = parser.parse_args(argv)
    settings = {"quick": arguments.quick, "device": arguments.device}
    report = Report("gpu_check", run_card(settings, [arguments.seed]))
    if arguments.device == "cuda" and not torch.cuda.is_available():
        note = (
            "PyTorch finds no CUDA device here, so nothing was checked. On one, this command would compare averaged "
            "with plain training bit for bit, force the overlaps of snapshot, merge and correction, and measure "
            "retention, device memory and synchronises. `--device cpu` tries the checks that a CPU allows."
        )
        print(note)
        report.notes.append(note)
        return report.finish(arguments.out)
    device = torch.device("cpu") if arguments.device == "cpu" else torch.device("cuda", torch.cuda.current_device())
    if device.type == "cuda":
        report.card["device"] = torch.cuda.get_device_name(device)
        report.card["cuda"] = torch.version.cuda
        torch.backends.cudnn.benchmark = False
    else:
        torch.set_num_threads(1)
    torch.backends.cudnn.deterministic = True
    check_correctness(report, device, arguments.quick)
    torch.backends.cudnn.deterministic = False
    check_cost(report, device, arguments.quick)
    return report.finish(where_to_store("gpu_check", arguments, device.type == "cuda"))


if __name__ == "__main__":
    sys.exit(main())
