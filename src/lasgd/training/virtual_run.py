"""A run in virtual time, from settings to a run folder: the recipe's own gradients on every rank, or none.

Reading order: virtual_setup.py says what cluster; `SimulatedRun` puts ranks on it, runs it, and hands what came of it
to results.py, as real ranks do.
"""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import torch
from torch import Tensor, nn

from lasgd.algorithms import registry
from lasgd.errors import DivergenceError, LasgdError
from lasgd.lab import conditions
from lasgd.lab.cores import usable_cores
from lasgd.lab.rank_process import INTERRUPTED
from lasgd.lab.simulation import Simulated, cluster_of, outcome
from lasgd.layout import Layout
from lasgd.merge import rule as merge_rule
from lasgd.pace import End
from lasgd.replica import Replica
from lasgd.runtime.means import KeptMean, MeanKeeper
from lasgd.tally import Tally
from lasgd.training import local_step
from lasgd.training.data import Batch, ImageData, open_data
from lasgd.training.display import Display, Snapshot, print_summary
from lasgd.training.evaluation import SavedMeans
from lasgd.training.interrupt import asking_to_stop
from lasgd.training.loop import Notes
from lasgd.training.results import RankReport, Results, rank_record
from lasgd.training.resume import Progress
from lasgd.training.run_folder import write_json_atomically, write_unfinished
from lasgd.training.settings import SimulationSettings
from lasgd.training.setup import make_model, make_optimizer, pick_device, seed_of_rank
from lasgd.training.timeline import Timeline
from lasgd.training.virtual_data import SharedBatches
from lasgd.training.virtual_setup import (
    StepTime,
    check_memory,
    plan,
    says_no_step,
    step_time,
    vector_of,
    vector_of_bytes,
)
from lasgd.virtual.spread import consensus_distance
from lasgd.virtual.timing_replica import TimingReplica

SHOW_EVERY_S = 0.25
LONGEST_GRADIENT_S = 3600.0
RANKS_IN_TIMELINE = 64
INTERVALS_IN_TIMELINE = 1_000_000
"""Of all ranks together."""


class RecipeWork:
    """One rank's own gradients: its model, its optimizer, its batches. The `Work` of a virtual rank."""

    def __init__(
        self,
        rank: int,
        settings: SimulationSettings,
        model: nn.Module,
        batches: SharedBatches,
        notes: Notes,
        pool: Executor | None,
    ):
        """`pool` computes gradients from when they are asked for; None: this thread does, when they are due."""
        self.model = model
        self.optimizer = make_optimizer(settings, model)
        self.loss: Tensor | None = None
        """Of the latest batch."""
        self._rank, self._settings, self._batches, self._notes = rank, settings, batches, notes
        self._device = next(model.parameters()).device
        self._pool = pool
        self._computing: Future[Tensor] | None = None
        self._randomness = torch.Generator().manual_seed(seed_of_rank(settings, rank)).get_state()

    def begin(self) -> None:
        """Lets the pool compute the next gradient, if there is one."""
        if self._pool is not None:
            self._computing = self._pool.submit(self._compute, self._next_batch())

    def gradient(self) -> None:
        """Forward and backward on the rank's next batch."""
        if self._computing is not None:
            self.loss = self._computing.result(LONGEST_GRADIENT_S)
            return
        torch.set_rng_state(self._randomness)
        self.loss = self._compute(self._next_batch())
        self._randomness = torch.get_rng_state()

    def update(self, progress: float) -> None:
        """The optimizer's step."""
        local_step.update(self.optimizer, self._settings, progress)

    def _next_batch(self) -> Batch:
        batch = self._batches.take(self._rank)
        self._notes.skipped(batch.skipped)
        return batch

    def _compute(self, batch: Batch) -> Tensor:
        return local_step.gradient(self.model, batch.images.to(self._device), batch.labels.to(self._device))


def may_compute_ahead(model: nn.Module, data: ImageData) -> bool:
    """Whether it makes no difference when a gradient is computed between its request and its time.

    Not on a GPU, which has no idle cores; not where the forward pass changes what is averaged (BatchNorm) or draws
    random numbers (dropout), of which all threads share the generator.
    """
    if next(model.parameters()).device.type != "cpu" or any(True for _ in model.buffers()):
        return False
    before = torch.get_rng_state()
    copy.deepcopy(model).train()(torch.zeros(2, data.channels, data.image_size, data.image_size))
    draws = not torch.equal(before, torch.get_rng_state())
    torch.set_rng_state(before)
    return not draws


class SimulatedRun:
    """One run. Raises LasgdError; ConfigurationError before anything large is allocated."""

    def __init__(self, settings: SimulationSettings, out: Path, display: Display):
        self.begin_s = time.monotonic()
        self.settings, self.out, self.display = settings, out, display
        self.ranks = settings.ranks or 1
        self.condition = conditions.parse(settings.condition)
        self.device = pick_device(settings.device)
        self.notes = Notes()
        self.data: ImageData | None = None
        self.model: nn.Module | None = None
        if settings.model_bytes is None:
            display.status("opening data and model")
            self.data = open_data(settings.data, settings.image_size)
            self.model = make_model(settings, self.data).to(self.device)
            layout = Layout(self.model)
            self.vector = vector_of(layout)
        else:
            self.vector, layout = vector_of_bytes(settings.model_bytes), None
        keeps_mean = registry.find(settings.algorithm, settings.algorithm_settings()).keeps_mean
        check_memory(None if settings.no_gradients else layout, self.ranks, settings.wire, keeps_mean)
        self.step_time: StepTime = step_time(settings, self.model, self.data)
        self.plan = plan(settings, self.ranks, self.vector, self.data, self.step_time.seconds)
        self.timelines = [
            Timeline(rank, INTERVALS_IN_TIMELINE // min(self.ranks, RANKS_IN_TIMELINE))
            for rank in range(min(self.ranks, RANKS_IN_TIMELINE))
        ]
        self.saved_means = SavedMeans(out)
        self.asked_to_stop = False
        self._works: list[RecipeWork] = []
        self._pool: ThreadPoolExecutor | None = None
        self._first_step_s = self._end_s = self.begin_s
        if settings.no_gradients:
            self._start_without_gradients()
        else:
            self._start_with_gradients()

    def _start_without_gradients(self) -> None:
        first_cut, size = self.plan.first_cut, self.plan.batch_size
        replicas = [TimingReplica(self.vector, Tally(size, rank), first_cut) for rank in range(self.ranks)]
        self.cluster, self.paces = cluster_of(self.plan, replicas, None, self._record, len(self.timelines))

    def _start_with_gradients(self) -> None:
        assert self.model is not None and self.data is not None
        settings, models = self.settings, [self.model]
        self.display.status(f"making {self.ranks:,} replicas")
        models += [copy.deepcopy(self.model) for _ in range(1, self.ranks)]
        self._batches = SharedBatches(
            self.data,
            seed=settings.seed,
            ranks=self.ranks,
            batch_size=settings.batch_size,
            workers=settings.workers,
        )
        threads = min(usable_cores(), self.ranks) if may_compute_ahead(self.model, self.data) else 1
        self._pool = ThreadPoolExecutor(threads, "lasgd-gradient", torch.set_num_threads, (1,)) if threads > 1 else None
        self._works = [
            RecipeWork(rank, settings, model, self._batches, self.notes, self._pool)
            for rank, model in enumerate(models)
        ]
        keeps_mean = self.plan.algorithm.keeps_mean
        replicas = [
            Replica(
                *(model, Tally(settings.batch_size, rank), self.plan.first_cut, merge_rule(settings.merge)),
                keeps_mean=keeps_mean,
            )
            for rank, model in enumerate(models)
        ]
        for replica, work in zip(replicas, self._works, strict=True):
            replica.on_recovery = work.optimizer.state.clear
        means = MeanKeeper(replicas[0].layout.size, replicas[0].layout.dtype)
        means.deliver_evaluations(self._save_mean)
        self.cluster, self.paces = cluster_of(
            self.plan, replicas, self._works, self._record, len(self.timelines), means
        )

    # The run

    def stop(self) -> None:
        """Asks for an early end, of the virtual ranks at this moment, or of the evaluations after them."""
        self.asked_to_stop = True
        self.cluster.stop()

    def run(self) -> Simulated:
        """Up to the agreed end and the last exact average, or to `stop`."""
        self.display.status("")
        self._first_step_s = time.monotonic()
        try:
            with self._shown_meanwhile(), nullcontext() if self.settings.no_gradients else _computing_as_ranks():
                self.cluster.run()
        finally:
            if self._works:
                self._batches.close()
            if self._pool is not None:
                self._pool.shutdown(cancel_futures=True)
        self._end_s = time.monotonic()
        self.display.update(self._snapshot())
        if self.paces[0].end is End.DIVERGED:
            raise DivergenceError(
                f"virtual time {self.cluster.ended_s or 0:.6g} s, round {self.paces[0].round}: every rank holds NaN or "
                "Inf, so no mean is left to recover from. Lower the learning rate or lengthen the warm-up"
            )
        return outcome(self.cluster, self.paces)

    def finish(self, simulated: Simulated) -> int:
        """Evaluates and writes. Returns the exit code."""
        was_interrupted = self.cluster.was_stopped
        identical = consensus = None
        if self._works and not was_interrupted:
            consensus = self._consensus()
            digests = {rank.replica.layout.content_digest() for rank in self.cluster.ranks}
            identical = len(digests) == 1
        results = Results(
            out=self.out,
            settings=self.settings,
            condition=self.condition,
            link_emulation="virtual",
            budget=self.plan.samples,
            data=self.data,
            model=self.model if self._works else None,
            device=self.device,
            layout=self.cluster.ranks[0].replica.layout if self._works else None,
            pace=self.paces[0],
            fragments=simulated.fragments,
            means=self.saved_means,
            before=Progress(),
            start_s=self._first_step_s - self.begin_s,
            wall_s=self._end_s - self._first_step_s,
            end_s=self._end_s,
            display=self.display,
            asked_to_stop=lambda: self.asked_to_stop,
            virtual_s=simulated.virtual_s,
            consensus=consensus,
            settings_beside=self._settings_as_run(),
        )
        record = results.write(self._reports(), self.timelines, identical, was_interrupted)
        self.display.status("")
        self.display.close()
        print_summary(record.model_dump(mode="json"), out=str(self.out))
        return INTERRUPTED if record.status == "interrupted" else 0

    def _settings_as_run(self) -> dict[str, object]:
        """Such that they give the same run again: a measured step time is named."""
        if says_no_step(self.settings):
            return {"compute": f"{self.step_time.seconds * 1e3:.6g}ms"}
        return {}

    def _reports(self) -> list[RankReport]:
        reports = []
        for index, rank in enumerate(self.cluster.ranks):
            pace = self.paces[index % len(self.paces)]
            rounds = rank.tally.exchanges if self.plan.algorithm.writes_messages else pace.round
            record = rank_record(index, rank.tally, rounds, rank.compute_s, rank.bytes_sent)
            notes = self.notes.troubles if index == 0 else []
            skipped = list(self.notes.skipped_images) if index == 0 else []
            reports.append(RankReport(record=record, padded_steps=0, overruns=0, skipped_images=skipped, notes=notes))
        return reports

    def _record(self, rank: int, kind: str, begin_s: float, end_s: float) -> None:
        self.timelines[rank].add(kind, begin_s, end_s)

    def _save_mean(self, mean: KeptMean) -> None:
        try:
            wall_s = mean.at_s - self._first_step_s
            self.saved_means.save(mean.vector, mean.samples, wall_s, self.cluster.now_s, self._consensus())
        except LasgdError as error:
            self.notes.add(str(error))

    def _consensus(self) -> float:
        return consensus_distance([rank.replica for rank in self.cluster.ranks])

    # What is shown

    @contextmanager
    def _shown_meanwhile(self) -> Iterator[None]:
        """Hands the state to the display now and then, from a thread of its own: the run has no time for it."""
        is_over = threading.Event()

        def show() -> None:
            while not is_over.wait(SHOW_EVERY_S):
                self.display.update(self._snapshot())

        watching = threading.Thread(target=show, name="lasgd-watch", daemon=True)
        watching.start()
        try:
            yield
        finally:
            is_over.set()
            watching.join()

    def _snapshot(self) -> Snapshot:
        pace, first = self.paces[0], self.cluster.ranks[0]
        virtual_s = self.cluster.now_s if self.cluster.ended_s is None else self.cluster.ended_s
        wall_s = (self._end_s if self._end_s > self._first_step_s else time.monotonic()) - self._first_step_s
        loss = self._works[0].loss if self._works else None
        # Before the first round the ranks have agreed on nothing, and yet a reader wants to know that they are at work.
        samples = pace.samples or sum(rank.tally.samples for rank in self.cluster.ranks)
        return Snapshot(
            samples=samples,
            budget=pace.expected_samples,
            samples_per_s=samples / virtual_s if virtual_s and samples else None,
            loss=None if loss is None else loss.item(),
            rounds=pace.round,
            staleness_steps=first.tally.staleness.mean_steps if first.tally.staleness.merges else None,
            waited_s=first.tally.waited_s,
            wall_s=wall_s,
            virtual_s=virtual_s,
            left_s=wall_s * max(0, pace.expected_samples - samples) / samples if samples else None,
            world_size=self.ranks,
            fragments=len(first.replica.fragments),
            notes=tuple(self.notes.lines),
        )


@contextmanager
def _computing_as_ranks() -> Iterator[None]:
    """Each gradient is one thread's, as on a rank of many on a machine: small steps lose more by threads that meet than
    they win, and other ranks' gradients are there for the other cores.

    The ranks' random numbers come from generators of their own. Afterwards both are as before.
    """
    randomness, threads = torch.get_rng_state(), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_rng_state(randomness)
        torch.set_num_threads(threads)


def run_simulation(settings: SimulationSettings, out: Path) -> int:
    """Simulates one run into the folder `out`; returns 0, or 130 after an early end. Raises LasgdError."""
    stored = settings.model_dump(mode="json")
    write_json_atomically(out / "settings.json", stored)
    ranks = settings.ranks or 1
    try:
        with Display(_title(settings)) as display:
            run = SimulatedRun(settings, out, display)
            with asking_to_stop(run.stop, terminate_too=True):
                return run.finish(run.run())
    except KeyboardInterrupt:
        write_unfinished(out, stored, ranks, "virtual", "interrupted", "interrupted before the first local step")
        raise
    except Exception as error:
        with suppress(LasgdError):  # must not hide why the run failed
            write_unfinished(out, stored, ranks, "virtual", "failed", str(error))
        raise


def _title(settings: SimulationSettings) -> str:
    what = f"{settings.model} on {Path(settings.data).name}" if settings.model_bytes is None else settings.model_bytes
    gradients = ", no gradients" if settings.no_gradients else ""
    return f"virtual {settings.algorithm}: {what}, {settings.ranks:,} ranks{gradients}"
