"""What averaging must leave true on a device: each check returns its figures and whether it holds.

`holds` is None where the check says nothing: it does not apply to the device, or the job is not reproducible even
without averaging.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import lasgd
from gpu_jobs import BATCH_SIZE, Job, Make, sgd
from lasgd.algorithms.requests import Mean
from lasgd.group.c10d import C10dGroup
from lasgd.pace import Column
from lasgd.replica import Replica
from lasgd.runtime.averaging import Averaging
from lasgd.tally import Tally
from thread_ranks import run_ranks, settle

Outcome = tuple[bool | None, dict[str, Any]]
EVER = 10**12
"""A budget that is never reached: ranks end by leaving their loops, after as many steps as the check says."""

STUCK_S = 20.0


class Spinner:
    """Keeps a stream busy for a given time with a kernel that does nothing; on a CPU it does not even that."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._cycles_per_s = 0.0
        if device.type == "cuda":
            for cycles in (1_000_000, 100_000_000):  # the first loads the kernel
                begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                begin.record()
                torch.cuda._sleep(cycles)
                end.record()
                end.synchronize()
                self._cycles_per_s = cycles / (begin.elapsed_time(end) / 1e3)

    def spin(self, seconds: float) -> None:
        """Enqueues it on the current stream; returns at once."""
        if self._device.type == "cuda":
            torch.cuda._sleep(int(seconds * self._cycles_per_s))


def train(job: Job, group: C10dGroup, steps: int, device: torch.device, fragments: int = 2) -> Averaging:
    """`steps` local steps with averaging, and the agreed end. Raises RuntimeError if the ranks end unequal."""
    averaging = lasgd.attach(
        job.model, job.optimizer, samples=EVER, batch_size=BATCH_SIZE, fragments=fragments, group=group
    )
    with averaging:
        for number in range(steps):
            if number == steps - 1:
                settle(device)  # the flags of skipped steps have arrived by then
            job.step()
            if not job.runs_hooks:
                averaging.step_boundary()
            _paced(averaging, number, steps)
        averaging.wait_end()
        if not averaging.wait_identical(STUCK_S):
            raise RuntimeError("the ranks' digests differ")
    return averaging


def _paced(averaging: Averaging, number: int, steps: int) -> None:
    """Lets a tiny model's steps not run away from its rounds: half-way through there is one merge at least."""
    deadline_s = time.monotonic() + STUCK_S
    while number == steps // 2 and averaging.pace.round < 4 and time.monotonic() < deadline_s:
        time.sleep(0.001)


def one_rank_is_plain_training(make: Make, device: torch.device, steps: int) -> Outcome:
    """One rank's parameters after `steps` steps equal those of the same loop without averaging, bit for bit."""

    def plain() -> list[Tensor]:
        job = make(device, 0)

        def body(rank: int, group: C10dGroup) -> list[Tensor]:
            for _ in range(steps):
                job.step()
            settle(device)
            return _copies(job.model)

        return run_ranks(1, device, body)[0]

    job = make(device, 0)

    def averaged(rank: int, group: C10dGroup) -> tuple[list[Tensor], Averaging]:
        averaging = train(job, group, steps, device)
        settle(device)
        return _copies(job.model), averaging

    first, again = plain(), plain()
    [(values, averaging)] = run_ranks(1, device, averaged)
    counted_right = averaging.tally.samples == BATCH_SIZE * (steps - len(job.skipped_steps))
    figures = {
        "steps": averaging.tally.local_steps,
        "rounds": averaging.pace.round,
        "merges": averaging.tally.staleness.merges,
        "samples_counted_right": counted_right,
        "is_reproducible_without_averaging": _equal(first, again),
    }
    is_equal = _equal(first, values)
    figures["is_equal"] = is_equal
    if not figures["is_reproducible_without_averaging"]:
        return (None if counted_right else False), figures
    return is_equal and counted_right and averaging.tally.staleness.merges > 0, figures


def two_ranks_end_identical(make: Make, device: torch.device, steps: int) -> Outcome:
    """Two ranks with different data and numbers of steps end with the same finite values, and have averaged."""
    jobs = [make(device, rank) for rank in range(2)]  # before any thread: a CUDA graph is recorded alone
    start = _copies(jobs[0].model)

    def body(rank: int, group: C10dGroup) -> Averaging:
        return train(jobs[rank], group, steps + 10 * rank, device)

    runs = run_ranks(2, device, body)
    values = [_copies(job.model) for job in jobs]
    counted = [
        run.tally.samples == BATCH_SIZE * (steps + 10 * r - len(jobs[r].skipped_steps)) for r, run in enumerate(runs)
    ]
    figures = {
        "rounds": runs[0].pace.round,
        "merges": [run.tally.staleness.merges for run in runs],
        "staleness_steps": [run.tally.staleness.mean_steps for run in runs],
        "identical": _equal(*values)
        and runs[0].replica.layout.content_digest() == runs[1].replica.layout.content_digest(),
        "finite": all(bool(torch.isfinite(tensor).all()) for tensor in values[0]),
        "has_trained": not _equal(values[0], start),
        "samples_counted_right": all(counted),
    }
    sound = all(figures[key] for key in ("identical", "finite", "has_trained", "samples_counted_right"))
    return sound and all(run.tally.staleness.merges > 0 for run in runs), figures


def corrections_cancel(device: torch.device, spinner: Spinner, steps: int) -> Outcome:
    """The last average is the start plus the mean of all local updates, with the GPU always some steps behind its host.

    Constant gradients c_i make the updates known: x = x_0 - lr/2 (k_0 c_0 + k_1 c_1), in every element. A correction
    that is lost, or shown twice, on one rank leaves the others' counterpart alone and moves x by lr |c_0 - c_1| / 4 at
    least, for a staleness of one step. Rounding moves it by half an ulp for each of the few operations of a round or
    step.
    """
    lr, sizes, behind = 2.0**-6, (200, 150), 4
    counts = [max(20, steps * size // 200) for size in sizes]
    models = [nn.Linear(512, 512, bias=False).to(device) for _ in range(2)]
    start = models[0].weight.detach().clone().double()
    gradients = [torch.full_like(models[0].weight, value) for value in (1.0, -0.5)]

    def body(rank: int, group: C10dGroup) -> Averaging:
        optimizer = torch.optim.SGD(models[rank].parameters(), lr=lr)
        models[rank].weight.grad = gradients[rank]
        averaging = lasgd.attach(models[rank], optimizer, samples=EVER, batch_size=1, fragments=2, group=group)
        marks: list[torch.cuda.Event] = []
        with averaging:
            for number in range(counts[rank]):
                spinner.spin(0.002)
                if device.type == "cpu":
                    time.sleep(0.002)
                optimizer.step()  # its boundary's merge is enqueued behind the spinning
                if device.type == "cuda":
                    marks.append(torch.cuda.Event(blocking=True))
                    marks[-1].record()
                    if number >= behind:
                        marks[number - behind].synchronize()  # the host runs ahead by so many steps, no more
                _paced(averaging, number, counts[rank])
            averaging.wait_end()
        return averaging

    runs = run_ranks(2, device, body)
    expected = start - lr / 2 * sum(
        count * gradient.double() for count, gradient in zip(counts, gradients, strict=True)
    )
    error = max((model.weight.double() - expected).abs().max().item() for model in models)
    operations = 4 * runs[0].pace.round + 2 * sum(counts)
    largest = float(start.abs().max()) + lr * max(counts)
    allowed = operations * largest * torch.finfo(torch.float32).eps / 2
    one_lost = lr * 1.5 / 4
    figures = {
        "rounds": runs[0].pace.round,
        "merges": [run.tally.staleness.merges for run in runs],
        "staleness_steps": [run.tally.staleness.mean_steps for run in runs],
        "largest_error": error,
        "allowed_by_rounding": allowed,
        "one_lost_correction_would_be": one_lost,
    }
    return error <= allowed < one_lost and all(run.tally.staleness.merges >= 4 for run in runs), figures


def fences_keep_the_order(device: torch.device, spinner: Spinner) -> Outcome:
    """The three orders that only events keep on a GPU, each forced by a spinning kernel.

    1. snapshot after merge      the merge is enqueued, not done, when the snapshot is taken: it must show in it
    2. correction after merge    likewise, and the correction must not overwrite the residual that the merge will read
    3. merge after correction    the correction is enqueued, not done, when the step boundary comes

    Each is tried with the fence, where it must hold, and on a GPU with that fence taken out, where it must fail: else
    nothing was forced and the check has shown nothing.
    """
    figures: dict[str, Any] = {}
    holds = True
    for name, attempt in (
        ("snapshot_after_merge", _snapshot_after_merge),
        ("correction_after_merge", _correction_after_merge),
        ("merge_after_correction", _merge_after_correction),
    ):
        figures[name] = attempt(device, spinner, True)
        holds = holds and figures[name]
        if device.type == "cuda":
            figures[f"{name}_fails_without_fence"] = not attempt(device, spinner, False)
            holds = holds and figures[f"{name}_fails_without_fence"]
            torch.cuda.synchronize(device)
    return holds, figures


class _Scene:
    """A replica whose two sides the check plays itself; every kernel has run once, so that none is loaded later."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.model = nn.Linear(256, 256, bias=False).to(device)
        self.tally = Tally(1)
        self.replica = Replica(self.model, self.tally)
        self.fragment = self.replica.next_fragment(1)
        for shift in (1.0, 2.0):
            sent = self.replica.snapshot(self.fragment)
            mean = self.mean_above(sent.values, shift)
            self.replica.correct(self.fragment, sent, mean)
            self.replica.snapshot(self.fragment)
            self.replica.merge()
            self.replica.snapshot(self.fragment)
        settle(device)

    def mean_above(self, values: Tensor, shift: float) -> Mean:
        """A mean that is `shift` above the values, in pinned memory: only from there are copies asynchronous."""
        mean = self.replica.fences.host_buffer(values.numel(), values.dtype)
        mean.copy_(values).add_(shift)
        return Mean(mean, torch.zeros(1, len(Column), dtype=torch.float64))

    def shows(self, expected: Tensor) -> bool:
        """Whether the model now holds the expected values, but for rounding."""
        settle(self.device)
        return _close(self.model.weight.detach().flatten().cpu(), expected)


def _snapshot_after_merge(device: torch.device, spinner: Spinner, with_fence: bool) -> bool:
    scene = _Scene(device)
    replica, fragment = scene.replica, scene.fragment
    sent = replica.snapshot(fragment)
    mean = scene.mean_above(sent.values, 5.0)
    replica.correct(fragment, sent, mean)
    if not with_fence:
        replica.fences.before_reading = lambda: None
    spinner.spin(0.3)
    replica.merge()
    assert mean.values is not None
    return _close(replica.snapshot(fragment).values.clone(), mean.values)


def _correction_after_merge(device: torch.device, spinner: Spinner, with_fence: bool) -> bool:
    scene = _Scene(device)
    replica, fragment = scene.replica, scene.fragment
    sent = replica.snapshot(fragment)
    replica.correct(fragment, sent, scene.mean_above(sent.values, 5.0))
    sent = replica.snapshot(fragment)  # x + r, so 5 above x
    mean = scene.mean_above(sent.values, 7.0)
    if not with_fence:
        replica.fences.before_reading = lambda: None
    spinner.spin(0.3)
    replica.merge()  # will read the first correction
    replica.correct(fragment, sent, mean)  # writes the second where the first was
    replica.merge()
    assert mean.values is not None
    return scene.shows(mean.values)


def _merge_after_correction(device: torch.device, spinner: Spinner, with_fence: bool) -> bool:
    scene = _Scene(device)
    replica, fragment = scene.replica, scene.fragment
    sent = replica.snapshot(fragment)
    mean = scene.mean_above(sent.values, 5.0)
    if not with_fence:
        replica.fences.before_merge = lambda: None
    merges = scene.tally.staleness.merges

    def communicator() -> None:
        with replica.fences.communicating():
            spinner.spin(0.3)
        replica.correct(fragment, sent, mean)

    thread = threading.Thread(target=communicator, daemon=True)
    thread.start()
    deadline_s = time.monotonic() + STUCK_S
    while scene.tally.staleness.merges == merges and time.monotonic() < deadline_s:
        replica.merge()  # a step boundary after the other, until the correction is there to be shown
    settle(device)
    right = scene.shows(mean.values) if mean.values is not None else False
    thread.join(STUCK_S)
    return right and not thread.is_alive()


def a_sick_rank_recovers(device: torch.device, steps: int) -> Outcome:
    """Rank 1's parameters turn NaN half-way: it takes the mean, is reported, and both end finite and identical."""
    jobs = [sgd(device, rank) for rank in range(2)]

    def body(rank: int, group: C10dGroup) -> Averaging:
        job = jobs[rank]
        averaging = lasgd.attach(
            job.model, job.optimizer, samples=EVER, batch_size=BATCH_SIZE, fragments=2, group=group
        )
        with averaging:
            for number in range(steps):
                if rank == 1 and number == steps // 2:
                    with torch.no_grad():
                        next(job.model.parameters()).view(-1)[0] = torch.nan
                job.step()
                _paced(averaging, number, steps)
            _wait(lambda: bool(averaging.pace.sicknesses) and not averaging.replica.is_sitting_out)
            job.step()
            averaging.wait_end()
        return averaging

    runs = run_ranks(2, device, body)
    values = [_copies(job.model) for job in jobs]
    sick = sorted({sickness.rank for sickness in runs[0].pace.sicknesses})
    figures = {
        "reported_ranks": sick,
        "identical": _equal(*values),
        "finite": all(bool(torch.isfinite(tensor).all()) for tensor in values[0]),
        "rounds": runs[0].pace.round,
    }
    return sick == [1] and figures["identical"] and figures["finite"], figures


def no_wait_for_the_whole_device(device: torch.device, spinner: Spinner) -> Outcome:
    """While a kernel spins on a stream of nobody's, local steps, rounds and merges go on: none waits for the device."""
    if device.type != "cuda":
        return None, {"why": "there is no device to wait for"}
    job = sgd(device, 0)

    def body(rank: int, group: C10dGroup) -> dict[str, Any]:
        averaging = lasgd.attach(
            job.model, job.optimizer, samples=EVER, batch_size=BATCH_SIZE, fragments=2, group=group
        )
        with averaging:
            deadline_s = time.monotonic() + STUCK_S
            while averaging.tally.staleness.merges < 10 and time.monotonic() < deadline_s:
                job.step()  # every kernel is loaded, every buffer made
                settle(device)
            aside, spun = torch.cuda.Stream(device), torch.cuda.Event()
            with torch.cuda.stream(aside):
                spinner.spin(1.0)
                spun.record()
            before = averaging.pace.round, averaging.tally.staleness.merges
            steps = 0
            while not spun.query():
                job.step()
                settle(device)
                if not spun.query():
                    steps += 1
                    after = averaging.pace.round, averaging.tally.staleness.merges
            counted = (after[0] - before[0], after[1] - before[1]) if steps else (0, 0)
            averaging.wait_end()
        return {"local_steps": steps, "rounds": counted[0], "merges": counted[1]}

    [figures] = run_ranks(1, device, body)
    return all(count >= 5 for count in figures.values()), figures


def _wait(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + STUCK_S
    while not condition() and time.monotonic() < deadline_s:
        time.sleep(0.002)


def _copies(model: nn.Module) -> list[Tensor]:
    """The parameters' values, on the CPU."""
    return [parameter.detach().to("cpu", copy=True) for parameter in model.parameters()]


def _equal(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def _close(values: Tensor, expected: Tensor) -> bool:
    # Shifts are whole numbers, of which a wrong order is off by one at least; rounding here is far below 1e-3.
    return bool((values - expected).abs().max() < 1e-3)
