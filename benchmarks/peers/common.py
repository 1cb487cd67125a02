"""What all peers share: the recipe of `lasgd train`, its conditions, a clock, and the run folder it leaves.

A peer's own file says only how its users would write the loop:

    for batch in islice(run.batches(), steps):        the clock starts with the first batch, on all ranks
        run.gradient(model, batch)                    forward and backward, as long as the condition says
        run.update(optimizer)                         the learning rate of global progress, step, zero_grad
        run.stepped()                                 counts, and keeps the replica where an evaluation is due

Replicas are kept in memory during the run. When all ranks have ended, rank 0 takes their means and evaluates them:
nobody evaluates while the clock runs, and nobody trains while it stands.
"""

from __future__ import annotations

import contextlib
import math
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from lasgd.group import c10d
from lasgd.lab import conditions
from lasgd.lab.padding import StepPadding
from lasgd.layout import Layout
from lasgd.training import local_step
from lasgd.training.data import Batch, open_data, training_batches
from lasgd.training.display import print_summary
from lasgd.training.evaluation import SavedMeans
from lasgd.training.results import RankReport, Results, wait_reports
from lasgd.training.resume import Progress
from lasgd.training.run_folder import LinkEmulation, RankRecord, RunRecord, StalenessSteps
from lasgd.training.settings import Settings
from lasgd.training.setup import budget, make_model, make_optimizer, seed_of_rank
from lasgd.training.timeline import Timeline

LAST_RANK_S = 3600.0
"""Seconds that ranks wait at the end for one that is still on its way."""


def steps_for(samples: int, samples_a_step: int, *, sync_every: int = 1, first_sync: int = 1) -> int:
    """Local steps of each rank that use up `samples`, and end with a synchronisation.

    Ranks synchronise after `first_sync` steps and every `sync_every` from there on.
    """
    least = math.ceil(samples / samples_a_step)
    return first_sync + max(0, math.ceil((least - first_sync) / sync_every)) * sync_every


@dataclass(frozen=True)
class Replica:
    """One rank's replica at one moment."""

    vector: Tensor  # (D,), a copy
    samples: int  # of this rank
    at_s: float  # time.monotonic()


@dataclass(frozen=True)
class Agreed:
    """What `Results` asks of a run's pace."""

    samples: int
    sicknesses: Sequence[Any] = ()


@dataclass
class Counts:
    """What a rank counts about itself."""

    local_steps: int = 0
    rounds: int = 0
    waited_s: float = 0.0
    notes: list[str] = field(default_factory=list)
    skipped_images: dict[str, None] = field(default_factory=dict)


class Run:
    """One rank of one run of a peer. Used by the training thread."""

    def __init__(self, settings: Settings, out: Path, link_emulation: LinkEmulation):
        """Finds the other ranks; raises LasgdError."""
        self.process_s = time.monotonic()
        self.settings, self.out, self.link_emulation = settings, out, link_emulation
        self.condition = conditions.parse(settings.condition)
        self.group = c10d.connect(settings.start_timeout_s)
        self.rank, self.world_size = self.group.rank, self.group.world_size
        self.data = open_data(settings.data, settings.image_size)
        self.model: nn.Module = make_model(settings, self.data)
        self.budget = budget(settings, self.data, self.world_size)
        """Samples of all ranks together."""
        self.layout = Layout(self.model)
        self.counts = Counts()
        self.timeline = Timeline(self.rank)
        self.padding = StepPadding(
            self.condition, self.rank, self.world_size, settings.seed, waited_s=lambda: self._waited_in_passes_s
        )
        self.kept: dict[int, Replica] = {}
        """By the number of the evaluation that they are for."""
        self.begin_s = self.end_s = 0.0
        self._waited_in_passes_s = 0.0
        self._last_bucket_s: float | None = None
        self._bytes_before = self._bytes_sent = 0

    # Before the first step

    @property
    def address(self) -> str:
        """This rank's own IPv4 address, as the other ranks reach it."""
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # sends nothing
            probe.connect((os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])))
            return probe.getsockname()[0]

    def wait_from(self, rank: int, topic: str, text: str = "") -> str:
        """What `rank` says on the topic, on all ranks; what others say is lost."""
        return self.group.wait_exchange(topic, text.encode(), self.settings.start_timeout_s)[rank].decode()

    @property
    def samples_a_step(self) -> int:
        """Samples of one local step of every rank."""
        return self.world_size * self.settings.batch_size

    def optimizer(self) -> torch.optim.Optimizer:
        """The recipe's."""
        return make_optimizer(self.settings, self.model)

    # The loop

    def batches(self) -> Iterator[Batch]:
        """This rank's batches, without end. The clock starts when every rank has its first."""
        torch.manual_seed(seed_of_rank(self.settings, self.rank))
        source = training_batches(
            self.data,
            seed=self.settings.seed,
            rank=self.rank,
            batch_size=self.settings.batch_size,
            position=0,
            workers=self.settings.workers,
        )
        with contextlib.closing(source):
            batch = next(source)
            self.group.wait_exchange("ready", b"", self.settings.start_timeout_s)
            self._bytes_before = _link_bytes_sent()
            self.begin_s = self.end_s = time.monotonic()
            while True:
                self.counts.skipped_images.update(dict.fromkeys(batch.skipped))
                yield batch
                batch = next(source)

    def gradient(self, model: nn.Module, batch: Batch) -> None:
        """Forward and backward, of the length that the condition gives them."""
        begin_s = time.monotonic()
        self._last_bucket_s = None
        self.padding.begin()
        local_step.gradient(model, batch.images, batch.labels)
        passes_s = time.monotonic()
        waits_from_s = self._last_bucket_s
        if waits_from_s is not None:  # DDP: the rest of the backward pass is the network's
            self._waited_in_passes_s += passes_s - waits_from_s
            self._note_wait(waits_from_s, passes_s)
        self.padding.wait_rest()
        self.timeline.add("compute", begin_s, time.monotonic() if waits_from_s is None else waits_from_s)

    def update(self, optimizer: torch.optim.Optimizer) -> None:
        """The optimizer's step at the learning rate of global progress, for ranks that take equally many steps."""
        local_step.update(optimizer, self.settings, self.progress)

    @property
    def progress(self) -> float:
        """Share of the budget that all ranks have processed before the latest of their equally many steps.

        One step behind, as with `sync_sgd`, where ranks agree in a step on what was processed before it: with the same
        learning rates, DDP here and DDP there end with the same weights.
        """
        return min(1.0, max(0, self.counts.local_steps - 1) * self.samples_a_step / self.budget)

    def stepped(self, progress: float | None = None, may_keep: bool = True) -> None:
        """One more local step has ended, and `progress` of the budget is processed; by default as many steps on all.

        `may_keep`: the replica is fit to be shown, as after a synchronisation.
        """
        self.counts.local_steps += 1
        self.end_s = time.monotonic()
        if progress is None:
            progress = min(1.0, self.counts.local_steps * self.samples_a_step / self.budget)
        due = math.floor(progress * self.settings.evaluations + 1e-9)
        if may_keep and 0 < due < self.settings.evaluations and due not in self.kept:
            self.kept[due] = self._replica()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """The training thread stands still for the network or for other ranks within."""
        begin_s = time.monotonic()
        try:
            yield
        finally:
            self._note_wait(begin_s, time.monotonic())

    def padded_hook(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        """The communication hook of DistributedDataParallel, on machines as slow as the condition says.

        A bucket's all-reduce begins no sooner than the slow machine would have computed its gradients.
        """

        def padded(state, bucket):  # DDP compares annotations with classes; here they would be strings
            self.padding.wait_moment()
            if bucket.is_last():
                self._last_bucket_s = time.monotonic()
            return hook(state, bucket)

        return padded

    def _note_wait(self, begin_s: float, end_s: float) -> None:
        self.counts.waited_s += end_s - begin_s
        self.timeline.add("wait", begin_s, end_s)

    def _replica(self) -> Replica:
        parts = [entry.tensor().detach().reshape(-1) for entry in self.layout.entries]
        vector = torch.cat([part.to("cpu", self.layout.dtype) for part in parts])
        return Replica(vector, self.counts.local_steps * self.settings.batch_size, self.end_s)

    # After the last step

    def stop_clock(self) -> None:
        """The last local step and the last synchronisation are over."""
        self.end_s = time.monotonic()
        self._bytes_sent = _link_bytes_sent() - self._bytes_before

    def finish(self, options: Mapping[str, Any]) -> RunRecord | None:
        """Gathers all ranks' replicas and reports; rank 0 evaluates, writes the run folder and returns its record."""
        replicas = self.kept | {self.settings.evaluations: self._replica()}
        _write_replicas(self.out, self.rank, self.begin_s, replicas)
        reports = wait_reports(self.group, self._report(), LAST_RANK_S)
        timelines = self.group.wait_exchange("timeline", self.timeline.to_bytes(), self.settings.timeout_s)
        self.group.leave()
        if self.rank != 0:
            return None
        begin_s, by_evaluation = _read_replicas(self.out, self.world_size)
        final = by_evaluation.pop(self.settings.evaluations)
        means = SavedMeans(self.out)
        for same in by_evaluation.values():
            means.save(mean_of(same), sum(r.samples for r in same), max(r.at_s for r in same) - begin_s)
        self.model.load_state_dict(self.layout.state_dict(self.model, mean_of(final)))
        end_s = max(replica.at_s for replica in final)
        record = Results(
            out=self.out,
            settings=self.settings,
            condition=self.condition,
            link_emulation=self.link_emulation,
            budget=self.budget,
            data=self.data,
            model=self.model,
            device=torch.device("cpu"),
            layout=self.layout,
            pace=Agreed(sum(replica.samples for replica in final)),
            fragments=None,
            means=means,
            before=Progress(),
            start_s=begin_s - self.process_s,
            wall_s=end_s - begin_s,
            end_s=end_s,
            display=None,
            asked_to_stop=lambda: False,
            settings_beside={"peer": dict(options)},
        ).write(
            reports,
            [Timeline.from_bytes(timeline) for timeline in timelines],
            identical=all(torch.equal(replica.vector, final[0].vector) for replica in final),
            was_interrupted=False,
        )
        # Some peers end with replicas that differ, as they say they do; the summary would call that a mistake.
        print_summary(record.model_dump(mode="json") | {"replicas_identical": None}, out=str(self.out))
        return record

    def _report(self) -> RankReport:
        counts = self.counts
        record = RankRecord(
            rank=self.rank,
            local_steps=counts.local_steps,
            samples=counts.local_steps * self.settings.batch_size,
            rounds=counts.rounds,
            compute_s=self.end_s - self.begin_s - counts.waited_s,
            waited_s=counts.waited_s,
            staleness_steps=StalenessSteps(mean=None, max=None),
            bytes_sent=self._bytes_sent,
        )
        return RankReport(
            record=record,
            padded_steps=self.padding.steps,
            overruns=self.padding.overruns,
            skipped_images=list(counts.skipped_images),
            notes=counts.notes,
        )


def mean_of(replicas: Sequence[Replica]) -> Tensor:
    """The exact mean of the replicas, (D,), in their own precision."""
    total = torch.stack([replica.vector for replica in replicas]).double().mean(dim=0)
    return total.to(replicas[0].vector.dtype)


def _link_bytes_sent() -> int:
    """Bytes that have left over this rank's emulated link, headers included; 0 where it has none of its own."""
    device = os.environ.get("GLOO_SOCKET_IFNAME", "")
    counters = psutil.net_io_counters(pernic=True).get(device)
    return 0 if counters is None or device.startswith("lo") else counters.bytes_sent


def _folder(out: Path) -> Path:
    return out / "replicas"


def _write_replicas(out: Path, rank: int, begin_s: float, replicas: Mapping[int, Replica]) -> None:
    _folder(out).mkdir(exist_ok=True)
    metadata = {"begin_s": repr(begin_s)}
    for number, replica in replicas.items():
        metadata |= {f"samples {number}": str(replica.samples), f"at_s {number}": repr(replica.at_s)}
    tensors = {str(number): replica.vector for number, replica in replicas.items()}
    safetensors.torch.save_file(tensors, _folder(out) / f"rank-{rank}.safetensors", metadata=metadata)


def _read_replicas(out: Path, world_size: int) -> tuple[float, dict[int, list[Replica]]]:
    """When the first rank began, and by evaluation all ranks' replicas, where all have one. Removes the files."""
    begin_s, found = math.inf, []
    for rank in range(world_size):
        path = _folder(out) / f"rank-{rank}.safetensors"
        with safetensors.safe_open(path, framework="pt") as file:
            says = file.metadata()
            begin_s = min(begin_s, float(says["begin_s"]))
            found.append(
                {
                    int(number): Replica(
                        file.get_tensor(number), int(says[f"samples {number}"]), float(says[f"at_s {number}"])
                    )
                    for number in file.keys()  # noqa: SIM118 not a dict
                }
            )
        path.unlink()
    _folder(out).rmdir()
    everywhere = set.intersection(*(set(of_rank) for of_rank in found))
    return begin_s, {number: [of_rank[number] for of_rank in found] for number in sorted(everywhere)}
