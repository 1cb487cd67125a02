"""What a run leaves behind: each rank's report, the averaged model, its evaluations, run.json and the timeline.

Rank 0 writes when all ranks have reported. The order matters: the model first, which is what the run was for; run.json
last, so that a folder with a `finished` run.json is complete.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from pydantic import BaseModel
from torch import nn

from lasgd.errors import LasgdError
from lasgd.group.base import Group
from lasgd.lab.conditions import Condition
from lasgd.lab.cores import usable_cores
from lasgd.layout import Layout
from lasgd.pace import Pace
from lasgd.tally import Tally
from lasgd.training.data import ImageData
from lasgd.training.display import Display
from lasgd.training.evaluation import SavedMeans, evaluate, evaluate_together
from lasgd.training.resume import Progress
from lasgd.training.run_folder import (
    Final,
    HealthEvent,
    LinkEmulation,
    RankRecord,
    RunRecord,
    StalenessSteps,
    append_metrics,
    environment,
    replacing,
    write_run,
)
from lasgd.training.settings import Settings
from lasgd.training.setup import make_model
from lasgd.training.timeline import Timeline, write_chrome_trace

MEANS_AT_ONCE = 5
MEANS_BYTES_AT_ONCE = 64 * 2**20
"""Saved means are evaluated together, each image being read once for them, up to so many and so many bytes."""


class RankReport(BaseModel):
    """What one rank has to say at the end."""

    record: RankRecord
    padded_steps: int
    overruns: int
    """Padded steps that outlasted their padding."""
    skipped_images: list[str]
    notes: list[str]


def rank_record(rank: int, tally: Tally, rounds: int, compute_s: float, bytes_sent: int) -> RankRecord:
    """What one rank did, by its own counts."""
    return RankRecord(
        rank=rank,
        local_steps=tally.local_steps,
        samples=tally.samples,
        rounds=rounds,
        compute_s=compute_s,
        waited_s=tally.waited_s,
        staleness_steps=StalenessSteps(
            mean=tally.staleness.mean_steps,
            max=float(tally.staleness.max_steps),
            histogram=dict(sorted(tally.staleness.histogram.items())),
        ),
        bytes_sent=bytes_sent,
    )


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
    budget: int | None
    """Samples; None where it is in seconds."""
    data: ImageData | None
    model: nn.Module | None
    """None, as data and layout, where nothing was trained: a simulation without gradients."""
    device: torch.device
    layout: Layout | None
    pace: Pace
    fragments: int
    means: SavedMeans
    before: Progress
    start_s: float
    """Seconds from the start of this process to the first local step."""
    wall_s: float
    """Seconds from there to the agreed end."""
    end_s: float
    """time.monotonic() of the agreed end."""
    display: Display | None
    asked_to_stop: Callable[[], bool]
    virtual_s: float | None = None
    """What `wall_s` is on the virtual clock, in a simulated run."""
    consensus: float | None = None
    """How far the replicas are apart at the end, where it was measured."""
    settings_beside: Mapping[str, Any] = field(default_factory=dict)
    """What run.json tells among the settings, beside them and instead of them."""

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
        skipped = dict.fromkeys(name for report in reports for name in report.skipped_images)
        notes = [f"rank {report.record.rank}: {note}" for report in reports for note in report.notes]
        samples, final = self._samples(reports), None
        if not was_interrupted and self.model is not None:
            try:
                self._save_model(self.model)
            except LasgdError:
                if not len(self.means):
                    raise
                self.means.remove()  # what the run was for comes first
                self._save_model(self.model)
                notes.insert(0, "the saved means gave way to model.safetensors on a full disk, and were not evaluated")
            final, unreadable = self._evaluate(self.model, samples)
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
            settings=self.settings.model_dump(mode="json")
            | {"samples": self.budget, "epochs": None}
            | dict(self.settings_beside),
            environment=environment(),
            world_size=len(reports),
            samples=samples,
            wall_s=self.wall_s,
            virtual_s=self.virtual_s,
            start_s=self.start_s,
            finish_s=time.monotonic() - self.end_s,
            final=final,
            replicas_identical=identical,
            link_emulation=self.link_emulation,
            padding_overrun=sum(report.overruns for report in reports) / padded if padded else 0.0,
            fragments=self.fragments,
            ranks=[report.record for report in reports],
            health=[
                HealthEvent.model_validate(
                    {"rank": event.rank, "round": event.round, "found": event.found.name.lower()}
                )
                for event in self.pace.sicknesses
            ],
            skipped_images=list(skipped),
            notes=notes,
            resumed_from_samples=self.before.samples,
        )
        write_run(self.out, record)
        return record

    def _samples(self, reports: Sequence[RankReport]) -> int:
        if self.settings.algorithm == "independent":  # agrees on nothing, so each rank knows only its own
            return sum(report.record.samples for report in reports)
        return self.pace.samples

    def _save_model(self, model: nn.Module) -> None:
        state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
        with replacing(self.out / "model.safetensors") as temporary:
            # Not save_file, which makes a file that nobody else may read, whatever the umask says.
            temporary.write_bytes(safetensors.torch.save(_untied(state), metadata={"format": "pt"}))

    def _evaluate(self, model: nn.Module, end_samples: int) -> tuple[Final | None, tuple[str, ...]]:
        """The final average, then the means saved on the way; all cores are this process's now.

        The final one comes first, so that it is there if the user loses patience with the others.
        """
        torch.set_num_threads(usable_cores())
        total = len(self.means) + 1
        self._say(f"1 of {total}")
        assert self.data is not None and self.layout is not None
        final, unreadable = evaluate(model, self.data, self.device, self.settings.workers, self.asked_to_stop)
        if final is None:
            return None, unreadable
        metrics = self.out / "metrics.jsonl"
        metrics.unlink(missing_ok=True)
        judges = [make_model(self.settings, self.data).to(self.device) for _ in range(self._at_once(total - 1))]
        means, number = iter(self.means), 2
        while some := list(islice(means, len(judges))):
            self._say(f"{number} to {number + len(some) - 1} of {total}" if len(some) > 1 else f"{number} of {total}")
            number += len(some)
            for judge, mean in zip(judges, some, strict=False):
                judge.load_state_dict(self.layout.state_dict(model, mean.vector.to(self.device)))
            of_some = judges[: len(some)]
            found, _ = evaluate_together(of_some, self.data, self.device, self.settings.workers, self.asked_to_stop)
            if not found:
                break
            for mean, result in zip(some, found, strict=True):
                _append(metrics, mean.samples, mean.wall_s, mean.virtual_s, mean.consensus, result)
        else:
            self.means.remove()
        _append(metrics, end_samples, self.before.wall_s + self.wall_s, self.virtual_s, self.consensus, final)
        return final, unreadable

    def _at_once(self, means: int) -> int:
        """How many of the saved means are evaluated in one pass over the images."""
        assert self.layout is not None
        bytes_each = self.layout.size * self.layout.dtype.itemsize
        return min(means, MEANS_AT_ONCE, max(1, MEANS_BYTES_AT_ONCE // bytes_each))

    def _say(self, which: str) -> None:
        if self.display:
            self.display.status("evaluating the averaged models", which)


def _append(
    path: Path, samples: int, wall_s: float, virtual_s: float | None, consensus: float | None, result: Final
) -> None:
    top1, loss = _number(result.top1), _number(result.loss)
    append_metrics(path, wall_s=wall_s, virtual_s=virtual_s, consensus=consensus, samples=samples, top1=top1, loss=loss)


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
