"""Trains one rank: sets everything up, runs the loop, gathers the results.

    python -m lasgd.training.rank OUT [--resume DIR] [--link-emulation X]      settings from OUT/settings.json

Rank 0 shows the display, evaluates, writes the run folder's results and prints the summary.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, cast

import safetensors.torch
import torch
from torch import nn

from lasgd.errors import ConfigurationError
from lasgd.group import c10d
from lasgd.group.base import Group
from lasgd.group.padded import PaddedGroup
from lasgd.lab import conditions
from lasgd.lab.padding import StepPadding
from lasgd.lab.rank_process import SUPERVISOR
from lasgd.layout import Layout
from lasgd.pace import End
from lasgd.runtime.attach import attach
from lasgd.runtime.averaging import Averaging
from lasgd.runtime.means import KeptMean
from lasgd.training.checkpoint import Checkpoints, check_same_run, newest_common
from lasgd.training.data import ImageData, open_data, training_batches
from lasgd.training.display import Display, print_summary
from lasgd.training.evaluation import SavedMeans, evaluate
from lasgd.training.interrupt import INTERRUPTED, asking_to_stop
from lasgd.training.loop import Notes, Trainer
from lasgd.training.models import build_model, check_model
from lasgd.training.run_folder import (
    HealthEvent,
    LinkEmulation,
    RankRecord,
    RunRecord,
    StalenessSteps,
    append_metrics,
    environment,
    read_json,
    replacing,
    write_run,
)
from lasgd.training.settings import OWN_TO_A_RANK, Settings
from lasgd.training.timeline import Timeline, write_chrome_trace
from lasgd.training.writer import BackgroundWriter

DIGITS_EPOCHS = 60.0
EPOCHS = 10.0
WRITE_TIMEOUT_S = 600.0
LAST_STEP_TIMEOUT_S = 3600.0
"""Seconds that ranks wait at the end for one that is still within a local step."""


def run_rank(settings: Settings, out: Path, resume: Path | None, link_emulation: LinkEmulation) -> int:
    """Trains this process's rank, as RANK, WORLD_SIZE, ... say; returns 0, or 130 after an early end.

    Raises LasgdError.
    """
    begin_s = time.monotonic()
    rank = int(os.environ.get("RANK", "0"))
    with ExitStack() as stack:
        display = stack.enter_context(Display(_title(settings))) if rank == 0 else None
        if display:
            display.status("opening data and model")
        run = _Run(settings, out, resume, link_emulation, begin_s, stack, display)
        run.train()
        return run.finish()


class _Run:
    """One rank's run, from set-up to results."""

    def __init__(
        self,
        settings: Settings,
        out: Path,
        resume: Path | None,
        link_emulation: LinkEmulation,
        begin_s: float,
        stack: ExitStack,
        display: Display | None,
    ):
        self.settings, self.out, self.link_emulation = settings, out, link_emulation
        self.begin_s, self.stack, self.display = begin_s, stack, display
        self.notes = Notes()
        self.condition = conditions.parse(settings.condition)
        self.device = pick_device(settings.device)
        self.data = open_data(settings.data, settings.image_size)
        self.model = make_model(settings, self.data).to(self.device)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(),
            lr=settings.lr,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
        )
        self.budget = budget(settings, self.data)
        if display:
            display.status("waiting for the other ranks")
        self.averaging = self._attach()
        self.rank, self.world_size = self.averaging.rank, self.averaging.world_size
        torch.manual_seed(settings.seed * 1_000_003 + self.rank)  # dropout and the like differ between ranks
        self.writer = BackgroundWriter(self.notes.lines.append)
        self.checkpoints = Checkpoints(out, self.rank)
        self.means = SavedMeans(out)
        self.position, self.earlier_wall_s = 0, 0.0
        self.resumed_from_samples: int | None = None
        if resume is not None:
            self._resume(resume)
        self.timeline = Timeline(self.rank)
        self.compute_s = 0.0
        self.averaging.on_record(self._record)
        if self.rank == 0:
            self.averaging.on_evaluation(self._save_mean)
        self.padding = StepPadding(
            self.condition,
            self.rank,
            self.world_size,
            settings.seed,
            local_step=self.averaging.tally.local_steps,
        )

    def train(self) -> None:
        """The local steps, up to the agreed end and the last exact average."""
        batches = training_batches(
            self.data,
            seed=self.settings.seed,
            rank=self.rank,
            batch_size=self.settings.batch_size,
            position=self.position,
            workers=self.settings.workers,
        )
        trainer = Trainer(
            self.settings,
            self.model,
            self.optimizer,
            batches,
            self.averaging,
            self.padding,
            self.checkpoints,
            self.writer,
            self.notes,
            self.display.update if self.display else lambda snapshot: None,
            self.device,
            self.earlier_wall_s,
            self.position,
        )
        ask = asking_to_stop(self.averaging.stop, terminate_too=SUPERVISOR not in os.environ)
        with closing(batches), ask:
            trainer.fetch()
            # The clock starts when all can: a rank whose workers are still starting is no straggler.
            self.averaging.group.wait_exchange("ready", b"", self.settings.start_timeout_s)
            if self.display:
                self.display.status("")
            self.averaging.start()
            self.timeline.start_s = self.averaging.first_step_s
            try:
                trainer.run()
                self.averaging.wait_end()
            except BaseException as error:
                self.averaging.close(f"{type(error).__name__}: {error}")
                raise
        if not self.writer.wait_written(WRITE_TIMEOUT_S):
            self.notes.lines.append(f"a checkpoint was not written within {WRITE_TIMEOUT_S:g} s")

    def finish(self) -> int:
        """Gathers what all ranks have to say; on rank 0 evaluates and writes. Returns the exit code."""
        interrupted = self.averaging.pace.end is End.STOP
        group = self.averaging.group
        reports = [
            json.loads(text)
            for text in group.wait_exchange("report", json.dumps(self._report()).encode(), LAST_STEP_TIMEOUT_S)
        ]
        identical = None if interrupted else self.averaging.wait_identical(self.settings.timeout_s)
        timelines = group.wait_exchange("timeline", self.timeline.to_bytes(), self.settings.timeout_s)
        self.averaging.close()
        if self.rank == 0:
            self._write_results(reports, identical, [Timeline.from_bytes(data) for data in timelines], interrupted)
        return INTERRUPTED if interrupted else 0

    # Set-up

    def _attach(self) -> Averaging:
        settings = self.settings
        group: Group = c10d.connect(settings.start_timeout_s)
        vector_bytes = _vector_bytes(self.model)
        if self.condition.round_s is not None or self.link_emulation == "user space":
            in_user_space = self.link_emulation == "user space"
            group = PaddedGroup(
                group,
                vector_bytes=vector_bytes,
                round_s=self.condition.round_s,
                bandwidth_bytes_per_s=self.condition.bandwidth_bytes_per_s if in_user_space else None,
                latency_s=self.condition.latency_s if in_user_space else 0.0,
            )
        return attach(
            self.model,
            self.optimizer,
            samples=self.budget,
            batch_size=settings.batch_size,
            algorithm=settings.algorithm,
            merge=settings.merge,
            fragments=settings.fragments,
            steps_per_round=settings.steps_per_round,
            evaluations=settings.evaluations,
            checkpoints=settings.checkpoints,
            timeout_s=settings.timeout_s,
            start_timeout_s=settings.start_timeout_s,
            must_match={k: v for k, v in settings.model_dump(mode="json").items() if k not in OWN_TO_A_RANK},
            group=group,
        )

    def _resume(self, resume: Path) -> None:
        stored = Checkpoints(resume, self.rank)
        group = self.averaging.group
        texts = group.wait_exchange("checkpoints", json.dumps(stored.numbers()).encode(), self.settings.timeout_s)
        number = newest_common([json.loads(text) for text in texts], stored.folder)
        state = stored.read(number)
        check_same_run(state, self.settings.model_dump(mode="json"), self.world_size, stored.folder)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.averaging.load_state_dict(state["averaging"])
        torch.set_rng_state(state["torch_rng"])
        self.position, self.earlier_wall_s = state["position"], state["wall_s"]
        self.resumed_from_samples = self.averaging.pace.samples
        stored.remove_after(number)
        if self.rank == 0:
            self.means.remove(above_samples=self.averaging.pace.samples)

    # During the run

    def _record(self, kind: str, begin_s: float, end_s: float) -> None:
        self.timeline.add(kind, begin_s, end_s)
        if kind == "compute":
            self.compute_s += end_s - begin_s

    def _save_mean(self, mean: KeptMean) -> None:
        wall_s = self.earlier_wall_s + mean.at_s - (self.averaging.first_step_s or mean.at_s)
        if not self.writer.submit(lambda: self.means.save(mean.vector, mean.samples, wall_s)):
            self.notes.lines.append(f"no evaluation at {mean.samples:,} samples: the disk was busy")

    # Results

    def _report(self) -> dict[str, Any]:
        averaging, tally = self.averaging, self.averaging.tally
        record = RankRecord(
            rank=self.rank,
            local_steps=tally.local_steps,
            samples=tally.samples,
            rounds=averaging.pace.round,
            compute_s=self.compute_s,
            waited_s=tally.waited_s,
            staleness_steps=StalenessSteps(mean=tally.staleness.mean_steps, max=float(tally.staleness.max_steps)),
            bytes_sent=averaging.group.bytes_sent,
        )
        return {
            "record": record.model_dump(mode="json"),
            "overruns": self.padding.overruns,
            "padded_steps": self.padding.steps,
            "skipped_images": list(self.notes.skipped_images),
            "samples": averaging.pace.samples,
        }

    def _write_results(
        self, reports: list[dict[str, Any]], identical: bool | None, timelines: list[Timeline], interrupted: bool
    ) -> None:
        averaging = self.averaging
        first_step_s = averaging.first_step_s or self.begin_s
        end_s = averaging.end_agreed_s or first_step_s
        skipped = dict.fromkeys(name for report in reports for name in report["skipped_images"])
        ranks = [RankRecord.model_validate(report["record"]) for report in reports]
        final = None
        if not interrupted:
            self._save_model()
            final, unreadable = self._evaluate(end_s - first_step_s)
            skipped.update(dict.fromkeys(unreadable))
        if self.settings.algorithm == "independent":
            samples = sum(rank.samples for rank in ranks)
        else:
            samples = averaging.pace.samples
        write_chrome_trace(self.out / "timeline.json.gz", timelines)
        padded = sum(report["padded_steps"] for report in reports)
        record = RunRecord(
            status="interrupted" if interrupted else "finished",
            algorithm=self.settings.algorithm,
            condition=str(self.condition),
            settings=self.settings.model_dump(mode="json") | {"samples": self.budget, "epochs": None},
            environment=environment(),
            world_size=self.world_size,
            samples=samples,
            wall_s=end_s - first_step_s,
            start_s=first_step_s - self.begin_s,
            finish_s=time.monotonic() - end_s,
            final=final,
            replicas_identical=identical,
            link_emulation=self.link_emulation,
            padding_overrun=sum(report["overruns"] for report in reports) / padded if padded else 0.0,
            fragments=len(averaging.replica.fragments),
            ranks=ranks,
            health=[HealthEvent(rank=event.rank, round=event.round) for event in averaging.pace.sicknesses],
            skipped_images=list(skipped),
            resumed_from_samples=self.resumed_from_samples,
        )
        write_run(self.out, record)
        if self.display:
            self.display.close()
        print_summary(record.model_dump(mode="json"), out=str(self.out))

    def _save_model(self) -> None:
        state = {name: tensor.contiguous() for name, tensor in self.model.state_dict().items()}
        with replacing(self.out / "model.safetensors") as temporary:
            safetensors.torch.save_file(_untied(state), temporary, metadata={"format": "pt"})

    def _evaluate(self, wall_s: float):
        """The saved means and the final average; all cores are this process's now."""
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1))
        layout = self.averaging.replica.layout
        judge = make_model(self.settings, self.data).to(self.device)
        evaluations = list(self.means)
        metrics = self.out / "metrics.jsonl"
        metrics.unlink(missing_ok=True)
        for index, (samples, at_s, vector) in enumerate(evaluations):
            if self.display:
                self.display.status(f"evaluating {index + 1} of {len(evaluations) + 1}")
            judge.load_state_dict(layout.state_dict(self.model, vector.to(self.device)))
            result, _ = evaluate(judge, self.data, self.device, self.settings.workers)
            append_metrics(metrics, wall_s=at_s, samples=samples, top1=_number(result.top1), loss=_number(result.loss))
        if self.display:
            self.display.status(f"evaluating {len(evaluations) + 1} of {len(evaluations) + 1}")
        final, unreadable = evaluate(self.model, self.data, self.device, self.settings.workers)
        append_metrics(
            metrics,
            wall_s=self.earlier_wall_s + wall_s,
            samples=self.averaging.pace.samples,
            top1=_number(final.top1),
            loss=_number(final.loss),
        )
        self.means.remove()
        return final, unreadable


def pick_device(name: str) -> torch.device:
    """`auto`: this local rank's GPU where there is one, else the CPU. Raises ConfigurationError."""
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigurationError(f"--device {name}: PyTorch finds no usable GPU here. Use --device cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def make_model(settings: Settings, data: ImageData) -> nn.Module:
    """The model that the settings name, checked with one blank image. Raises ConfigurationError."""
    torch.manual_seed(settings.seed)
    model = build_model(settings.model, num_classes=len(data.classes), channels=data.channels, norm=settings.norm)
    check_model(model, channels=data.channels, image_size=data.image_size, num_classes=len(data.classes))
    return model


def budget(settings: Settings, data: ImageData) -> int:
    """Samples of all ranks together: --samples, or --epochs times the training images."""
    if settings.samples is not None:
        return settings.samples
    epochs = settings.epochs or (DIGITS_EPOCHS if data.name == "digits" else EPOCHS)
    return math.ceil(epochs * len(data.train))


def _vector_bytes(model: nn.Module) -> int:
    layout = Layout(model)
    return layout.size * torch.finfo(layout.dtype).bits // 8


def _untied(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """safetensors refuses tensors that share memory; tied ones are stored twice."""
    seen: set[int] = set()
    for name, tensor in state.items():
        if tensor.data_ptr() in seen:
            state[name] = tensor.clone()
        seen.add(tensor.data_ptr())
    return state


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _title(settings: Settings) -> str:
    return f"{settings.algorithm}: {settings.model} on {Path(settings.data).name}, condition {settings.condition}"


def main(argv: list[str]) -> int:
    """The entry of a launched rank."""
    parser = argparse.ArgumentParser(prog="lasgd.training.rank")
    parser.add_argument("out", type=Path)
    parser.add_argument("--resume", type=Path)
    parser.add_argument("--link-emulation", default="none")
    arguments = parser.parse_args(argv)
    settings = Settings.model_validate(read_json(arguments.out / "settings.json"))
    return run_rank(settings, arguments.out, arguments.resume, cast(LinkEmulation, arguments.link_emulation))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
