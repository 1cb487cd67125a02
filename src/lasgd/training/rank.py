"""Trains one rank, from set-up to results.

    python -m lasgd.training.rank OUT [--resume DIR] [--link-emulation X]      settings from OUT/settings.json

Reading order: setup.py makes what a rank needs, resume.py gives it an earlier state, loop.py trains, results.py writes.
Rank 0 shows the display, evaluates, writes the results and prints the summary.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import time
from contextlib import ExitStack, closing
from pathlib import Path
from typing import cast

import torch

from lasgd.lab import conditions
from lasgd.lab.padding import StepPadding
from lasgd.lab.rank_process import INTERRUPTED, SUPERVISOR
from lasgd.pace import End
from lasgd.runtime.means import KeptMean
from lasgd.training.checkpoint import Checkpoints
from lasgd.training.data import open_data, training_batches
from lasgd.training.display import Display, print_summary
from lasgd.training.evaluation import SavedMeans
from lasgd.training.interrupt import asking_to_stop
from lasgd.training.lasting_output import LastingOutput, lasting_output
from lasgd.training.loop import Notes, Trainer
from lasgd.training.replicas import SavedReplicas
from lasgd.training.results import RankReport, Results, rank_record, wait_reports
from lasgd.training.resume import Progress, wait_resumed
from lasgd.training.run_folder import LinkEmulation, read_json
from lasgd.training.settings import Settings
from lasgd.training.setup import budget, make_model, make_optimizer, pick_device, seed_of_rank, wait_attached
from lasgd.training.timeline import Timeline
from lasgd.training.writer import BackgroundWriter

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
        output = stack.enter_context(lasting_output())
        display = stack.enter_context(Display(_title(settings))) if rank == 0 else None
        if display:
            display.status("opening data and model")
        run = _Run(settings, out, resume, link_emulation, begin_s, display, output)
        with asking_to_stop(run.stop, terminate_too=SUPERVISOR not in os.environ):
            run.train()
            return run.finish()


class _Run:
    """One rank's run."""

    def __init__(
        self,
        settings: Settings,
        out: Path,
        resume: Path | None,
        link_emulation: LinkEmulation,
        begin_s: float,
        display: Display | None,
        output: LastingOutput | None,
    ):
        self.settings, self.out = settings, out
        self.output = output
        self.link_emulation: LinkEmulation = link_emulation
        self.begin_s, self.display = begin_s, display
        self.condition = conditions.parse(settings.condition)
        self.device = pick_device(settings.device)
        self.data = open_data(settings.data, settings.image_size)
        self.model = make_model(settings, self.data).to(self.device)
        self.optimizer = make_optimizer(settings, self.model)
        self.budget = budget(settings, self.data, int(os.environ.get("WORLD_SIZE", "1")))
        if display:
            display.status("waiting for the other ranks")
        self.averaging = wait_attached(
            settings, self.condition, link_emulation, self.budget, self.model, self.optimizer
        )
        self.rank = self.averaging.rank
        self.notes = Notes(say=None if display else self._print_note)
        torch.manual_seed(seed_of_rank(settings, self.rank))
        self.means, self.replicas = SavedMeans(out), SavedReplicas(out)
        self.samples_at: dict[int, int] = {}
        """Evaluation -> samples of the mean that was saved for it."""
        self.before = Progress()
        if resume is not None:
            self.before = wait_resumed(resume, out, settings, self.averaging, self.model, self.optimizer)
            if self.rank == 0:
                for skipped in self.before.skipped:
                    self.notes.add(skipped)
                self.means.remove(above_samples=self.averaging.pace.samples)
                self.replicas.remove(above_evaluation=self.averaging.pace.evaluation)
        self.writer = BackgroundWriter(self.notes.add)
        self.timeline = Timeline(self.rank)
        self.compute_s = 0.0
        self.asked_to_stop = False
        self.averaging.on_record(self._record)
        self.averaging.on_replica(self._save_replica)
        if self.rank == 0 and not self.averaging.writes_messages:
            self.averaging.on_evaluation(self._save_mean)
        self.padding = StepPadding(
            self.condition,
            self.rank,
            self.averaging.world_size,
            settings.seed,
            local_step=self.averaging.tally.local_steps,
            waited_s=lambda: self.averaging.waited_within_passes_s,
        )

    def stop(self) -> None:
        """Asks for an early end: of the local steps on all ranks, or of the evaluations after them."""
        self.asked_to_stop = True
        self.averaging.stop()

    def train(self) -> None:
        """The local steps, up to the agreed end and the last exact average."""
        batches = training_batches(
            self.data,
            seed=self.settings.seed,
            rank=self.rank,
            batch_size=self.settings.batch_size,
            position=self.before.position,
            workers=self.settings.workers,
        )
        trainer = Trainer(
            self.settings,
            self.model,
            self.optimizer,
            batches,
            self.averaging,
            self.padding,
            Checkpoints(self.out, self.rank),
            self.writer,
            self.notes,
            self.display.update if self.display else lambda snapshot: None,
            self.device,
            self.before.wall_s,
            self.before.position,
        )
        with closing(batches):
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
        trainer.show()
        if not self.writer.wait_written(WRITE_TIMEOUT_S):
            self.notes.add(f"a checkpoint was not written within {WRITE_TIMEOUT_S:g} s")

    def finish(self) -> int:
        """Gathers what all ranks have to say; rank 0 evaluates and writes. Returns the exit code."""
        was_interrupted = self.averaging.pace.end is End.STOP
        group = self.averaging.group
        reports = wait_reports(group, self._report(), LAST_STEP_TIMEOUT_S)
        identical = None if was_interrupted else self.averaging.wait_identical(self.settings.timeout_s)
        timelines = group.wait_exchange("timeline", self.timeline.to_bytes(), self.settings.timeout_s)
        self.averaging.close()
        if self.rank == 0:
            if not was_interrupted:
                self._compare_replicas()
            first_step_s = self.averaging.first_step_s or self.begin_s
            end_s = self.averaging.end_agreed_s or first_step_s
            results = Results(
                out=self.out,
                settings=self.settings,
                condition=self.condition,
                link_emulation=self.link_emulation,
                budget=self.budget,
                data=self.data,
                model=self.model,
                device=self.device,
                layout=self.averaging.replica.layout,
                pace=self.averaging.pace,
                fragments=len(self.averaging.replica.fragments),
                means=self.means,
                before=self.before,
                start_s=first_step_s - self.begin_s,
                wall_s=end_s - first_step_s,
                end_s=end_s,
                display=self.display,
                asked_to_stop=lambda: self.asked_to_stop,
            )
            record = results.write(reports, [Timeline.from_bytes(t) for t in timelines], identical, was_interrupted)
            if self.display:
                self.display.status("")
                self.display.close()
            print_summary(record.model_dump(mode="json"), out=str(self.out))
            was_interrupted = record.status == "interrupted"
        return INTERRUPTED if was_interrupted else 0

    def _record(self, kind: str, begin_s: float, end_s: float) -> None:
        self.timeline.add(kind, begin_s, end_s)
        if kind in ("compute", "update"):
            self.compute_s += end_s - begin_s

    def _save_mean(self, mean: KeptMean) -> None:
        wall_s = self._wall_s(mean)
        if not self.writer.submit(lambda: self.means.save(mean.vector, mean.samples, wall_s)):
            self.notes.add(f"no evaluation at {mean.samples:,} samples: the disk was busy")
        self.samples_at[mean.evaluation] = mean.samples

    def _save_replica(self, own: KeptMean) -> None:
        wall_s = self._wall_s(own)
        save = functools.partial(self.replicas.save, self.rank, own.evaluation, own.vector, own.samples, wall_s)
        if not self.writer.submit(save):
            self.notes.add(f"replica of evaluation {own.evaluation} left out: the disk was busy")

    def _wall_s(self, kept: KeptMean) -> float:
        return self.before.wall_s + kept.at_s - (self.averaging.first_step_s or kept.at_s)

    def _compare_replicas(self) -> None:
        """Notes how far the replicas were apart, and saves their means where no round has brought any."""
        consensus: dict[int, float] = {}
        for compared in self.replicas.compared(self.averaging.world_size):
            if self.averaging.writes_messages:
                self.means.save(compared.mean, compared.samples, compared.wall_s, consensus=compared.consensus)
            elif compared.evaluation in self.samples_at:
                consensus[self.samples_at[compared.evaluation]] = compared.consensus
        self.means.note_consensus(consensus)
        self.replicas.remove()

    def _print_note(self, note: str) -> None:
        print(f"rank {self.rank}: {note}", flush=True)  # under `--ranks N` into the rank's own log

    def _report(self) -> RankReport:
        averaging = self.averaging
        if self.output is not None and self.output.lost:
            self.notes.add(f"standard output could not be written ({self.output.lost}); the run went on without it")
        rounds = averaging.tally.exchanges if averaging.writes_messages else averaging.pace.round
        record = rank_record(self.rank, averaging.tally, rounds, self.compute_s, averaging.bytes_sent)
        return RankReport(
            record=record,
            padded_steps=self.padding.steps,
            overruns=self.padding.overruns,
            skipped_images=list(self.notes.skipped_images),
            notes=self.notes.troubles,
        )


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
