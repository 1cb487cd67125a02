"""What a run leaves behind: each rank's report, the averaged model, its evaluations, run.json and the timeline.

Rank 0 writes when all ranks have reported. The order matters: the model first, which is what the run was for; run.json
last, so that a folder with a `finished` run.json is complete.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from pydantic import BaseModel
from torch import nn

from lasgd.errors import LasgdError
from lasgd.group.base import Group
from lasgd.lab.conditions import Condition
from lasgd.runtime.averaging import Averaging
from lasgd.training.data import ImageData
from lasgd.training.display import Display
from lasgd.training.evaluation import SavedMeans, evaluate
from lasgd.training.resume import Progress
from lasgd.training.run_folder import (
    Final,
    HealthEvent,
    LinkEmulation,
    RankRecord,
    RunRecord,
    append_metrics,
    environment,
    replacing,
    write_run,
)
from lasgd.training.settings import Settings
from lasgd.training.setup import make_model
from lasgd.training.timeline import Timeline, write_chrome_trace


class RankReport(BaseModel):
    """What one rank has to say at the end."""

    record: RankRecord
    padded_steps: int
    overruns: int
    """Padded steps that outlasted their padding."""
    skipped_images: list[str]
    notes: list[str]


def wait_reports(group: Group, own: RankReport, timeout_s: float) -> list[RankReport]:
    """Every rank's report, on all ranks. Waits for those that are still within a local step. Raises PeerError."""
    texts = group.wait_exchange("report", own.model_dump_json().encode(), timeout_s)
    return [RankReport.model_validate_json(text) for text in texts]


@dataclass(frozen=True)
class Results:
    """Rank 0's part of the end: evaluates and writes."""

    out: Path
    settings: Settings
    condition: Condition
    link_emulation: LinkEmulation
    budget: int
    data: ImageData
    model: nn.Module
    device: torch.device
    averaging: Averaging
    means: SavedMeans
    before: Progress
    begin_s: float
    """time.monotonic() when the rank started."""
    display: Display | None
    asked_to_stop: Callable[[], bool]

    def write(
        self,
        reports: Sequence[RankReport],
        timelines: Sequence[Timeline],
        identical: bool | None,
        was_interrupted: bool,
    ) -> RunRecord:
        """Writes everything, and returns what is in run.json. Raises LasgdError, naming the file.

        A run that was interrupted in its local steps has no averaged model: nothing is evaluated, and its saved means
        wait for the resumed run. One that was interrupted in its evaluations is `interrupted` too, but has its model.
        """
        first_step_s = self.averaging.first_step_s or self.begin_s
        end_s = self.averaging.end_agreed_s or first_step_s
        skipped = dict.fromkeys(name for report in reports for name in report.skipped_images)
        notes = [f"rank {report.record.rank}: {note}" for report in reports for note in report.notes]
        samples, final = self._samples(reports), None
        if not was_interrupted:
            try:
                self._save_model()
            except LasgdError:
                if not len(self.means):
                    raise
                self.means.remove()  # what the run was for comes first
                self._save_model()
                notes.insert(0, "the saved means gave way to model.safetensors on a full disk, and were not evaluated")
            final, unreadable = self._evaluate(samples, end_s - first_step_s)
            skipped.update(dict.fromkeys(unreadable))
            was_interrupted = self.asked_to_stop()
        try:
            write_chrome_trace(self.out / "timeline.json.gz", timelines)
        except LasgdError as error:  # not worth the run's results
            notes.append(str(error))
        padded = sum(report.padded_steps for report in reports)
        record = RunRecord(
            status="interrupted" if was_interrupted else "finished",
            algorithm=self.settings.algorithm,
            condition=str(self.condition),
            settings=self.settings.model_dump(mode="json") | {"samples": self.budget, "epochs": None},
            environment=environment(),
            world_size=self.averaging.world_size,
            samples=samples,
            wall_s=end_s - first_step_s,
            start_s=first_step_s - self.begin_s,
            finish_s=time.monotonic() - end_s,
            final=final,
            replicas_identical=identical,
            link_emulation=self.link_emulation,
            padding_overrun=sum(report.overruns for report in reports) / padded if padded else 0.0,
            fragments=len(self.averaging.replica.fragments),
            ranks=[report.record for report in reports],
            health=[HealthEvent(rank=event.rank, round=event.round) for event in self.averaging.pace.sicknesses],
            skipped_images=list(skipped),
            notes=notes,
            resumed_from_samples=self.before.samples,
        )
        write_run(self.out, record)
        return record

    def _samples(self, reports: Sequence[RankReport]) -> int:
        if self.settings.algorithm == "independent":  # agrees on nothing, so each rank knows only its own
            return sum(report.record.samples for report in reports)
        return self.averaging.pace.samples

    def _save_model(self) -> None:
        state = {name: tensor.contiguous() for name, tensor in self.model.state_dict().items()}
        with replacing(self.out / "model.safetensors") as temporary:
            # Not save_file, which makes a file that nobody else may read, whatever the umask says.
            temporary.write_bytes(safetensors.torch.save(_untied(state), metadata={"format": "pt"}))

    def _evaluate(self, end_samples: int, wall_s: float) -> tuple[Final | None, tuple[str, ...]]:
        """The final average, then the means saved on the way; all cores are this process's now.

        The final one comes first, so that it is there if the user loses patience with the others.
        """
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1))
        total = len(self.means) + 1
        self._say(f"1 of {total}")
        final, unreadable = evaluate(self.model, self.data, self.device, self.settings.workers, self.asked_to_stop)
        if final is None:
            return None, unreadable
        metrics = self.out / "metrics.jsonl"
        metrics.unlink(missing_ok=True)
        layout = self.averaging.replica.layout
        judge = make_model(self.settings, self.data).to(self.device)
        for number, (samples, at_s, vector) in enumerate(self.means, start=2):
            self._say(f"{number} of {total}")
            judge.load_state_dict(layout.state_dict(self.model, vector.to(self.device)))
            result, _ = evaluate(judge, self.data, self.device, self.settings.workers, self.asked_to_stop)
            if result is None:
                break
            append_metrics(metrics, wall_s=at_s, samples=samples, top1=_number(result.top1), loss=_number(result.loss))
        else:
            self.means.remove()
        append_metrics(
            metrics,
            wall_s=self.before.wall_s + wall_s,
            samples=end_samples,
            top1=_number(final.top1),
            loss=_number(final.loss),
        )
        return final, unreadable

    def _say(self, which: str) -> None:
        if self.display:
            self.display.status("evaluating the averaged models", which)


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
