"""What averaging costs a rank in memory, and its training thread at the step boundaries; 25 million parameters.

Two fresh processes average over Gloo. They run no forward or backward pass, only the optimizer on constant gradients,
which differ between the ranks: activations would blur the memory, and corrections are as real as in training.

    extra bytes      resident set, stepping with averaging minus alone          <= (1 + 2/F) parameter bytes + 16 MB
                     the same with momentum of the mean, which keeps a mean      <= (2 + 2/F) parameter bytes + 16 MB
                     and with averages in int8                                   <= 3 parameter bytes + 16 MB
    step boundaries  all time in lasgd's optimizer hooks per cycle of fragments  <= 2 plain copies of the parameters
    allocation       tensors made per round after the first cycle; growth of the resident set

    python benchmarks/memory.py              F = 1 and 5, and 4 with momentum of the mean, about 10 minutes
    python benchmarks/memory.py --quick      does it work?
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lasgd
from common import Bar, Report, arguments_for, run_card, where_to_store
from lasgd.group.c10d import C10dGroup
from lasgd.runtime.averaging import Averaging
from resnet50 import parameter_bytes, seeded_resnet50

MB = 1_000_000
RANKS = 2
ALLOWANCE_BYTES = 16 * MB
COPIES = 2.0
COARSE_COPIES = 3.0
"""Of extra memory with averages in a coarse format, whose codes and pieces come on top."""
SMALL_BYTES = 1024
"""Scalars, such as the result of a test for NaN, are no burden; a tensor above this size counts as an allocation."""
GROWTH_BYTES = 10 * MB
"""Half of the smallest fragment measured here, so less than one leaked buffer. Gloo holds some MB within a round."""
RANK_TIMEOUT_S = 1800


@dataclass(frozen=True)
class Cell:
    """What is measured in one pair of processes."""

    fragments: int
    outer_momentum: float = 0.0
    wire: str = "fp32"

    @classmethod
    def parse(cls, text: str) -> Cell:
        """`F`, `F:outer momentum`, or `F:outer momentum:wire format`."""
        fragments, *more = text.split(":")
        return cls(int(fragments), *(convert(word) for convert, word in zip((float, str), more, strict=False)))

    @property
    def name(self) -> str:
        """In words."""
        momentum = f", momentum of the mean {self.outer_momentum:g}" if self.outer_momentum else ""
        return f"F = {self.fragments}{momentum}" + (f", {self.wire}" if self.is_coarse else "")

    @property
    def is_coarse(self) -> bool:
        """Averages travel in fewer bytes."""
        return self.wire != "fp32"

    @property
    def allowed_copies(self) -> float:
        """Of extra memory, in copies of the parameters, without the allowance."""
        if self.is_coarse:
            return COARSE_COPIES
        return (2 if self.outer_momentum else 1) + 2 / self.fragments


class BoundaryClock:
    """Times what stands between its own two hooks on an optimizer's step, before and after."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        """Call it before whatever is to be timed registers its hooks, and `close_bracket` after."""
        self._optimizer = optimizer
        self._begin_s = 0.0
        self._elapsed_s = 0.0
        optimizer.register_step_pre_hook(self._begin)
        optimizer.register_step_post_hook(self._begin)
        self.around: TorchDispatchMode | None = None
        """Entered and left with every bracket."""

    def close_bracket(self) -> None:
        """Registers the closing hooks."""
        self._optimizer.register_step_pre_hook(self._end)
        self._optimizer.register_step_post_hook(self._end)

    def take_s(self) -> float:
        """Seconds in brackets since the last call."""
        elapsed_s, self._elapsed_s = self._elapsed_s, 0.0
        return elapsed_s

    def _begin(self, *_: Any) -> None:
        if self.around is not None:
            self.around.__enter__()
        self._begin_s = time.perf_counter()

    def _end(self, *_: Any) -> None:
        self._elapsed_s += time.perf_counter() - self._begin_s
        if self.around is not None:
            self.around.__exit__(None, None, None)


class AllocationCounter(TorchDispatchMode):
    """Counts the tensors that operations make, in the thread that has entered it: new memory, not views."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors = 0
        self.bytes = 0
        self.largest_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        known = {_address(tensor) for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().nbytes() and _address(tensor) not in known:
                size = tensor.untyped_storage().nbytes()
                self.tensors += 1
                self.bytes += size
                self.largest_bytes = max(self.largest_bytes, size)
        return result


class CountRounds:
    """Enters a counter in the communicator's thread, at the end of a round, and leaves it at the end of a later one."""

    def __init__(self) -> None:
        self.wanted = False
        self.counter = AllocationCounter()
        self.rounds = 0
        self._is_entered = False

    def __call__(self, kind: str, begin_s: float, end_s: float) -> None:
        if kind != "round":
            return
        self.rounds += self._is_entered
        if self.wanted and not self._is_entered:
            self.counter.__enter__()
            self._is_entered = True
        elif not self.wanted and self._is_entered:
            self.counter.__exit__(None, None, None)
            self._is_entered = False


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def resident_bytes() -> dict[str, int]:
    """This process's resident set, its proportional share of it, and the anonymous part. Linux only."""
    found = {}
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]:
        key, _, rest = line.partition(":")
        if key in ("Rss", "Pss", "Anonymous"):
            found[key.lower()] = int(rest.split()[0]) * 1024
    return found


def tensor_bytes() -> int:
    """Bytes of all tensors that Python can reach, memory shared between them counted once."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if type(thing) in (Tensor, torch.nn.Parameter) and thing.device.type == "cpu":
            storages[_address(thing)] = thing.untyped_storage().nbytes()
    return sum(storages.values())


def rank_main(rank: int, cell: Cell, rounds: int, cycles: int, seed: int, folder: str) -> None:
    """One rank's process; rank 0 leaves its figures in the folder."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // RANKS))
    model = seeded_resnet50(seed)
    parameters = list(model.parameters())
    momentum = 0.5 if cell.outer_momentum else 0.9  # both multiply; its buffer has the same size
    optimizer = torch.optim.SGD(parameters, lr=1e-3, momentum=momentum)
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    copies = [torch.empty_like(parameter) for parameter in parameters]
    plain_copy_s(copies, parameters)
    clock = BoundaryClock(optimizer)
    for _ in range(10):
        optimizer.step()
    alone_tensors, alone = tensor_bytes(), resident_bytes()

    group = C10dGroup(dist.FileStore(f"{folder}/store", RANKS), rank, RANKS, 120.0)
    averaging = lasgd.attach(
        *(model, optimizer),
        samples=10**12,
        batch_size=1,
        fragments=cell.fragments,
        wire=cell.wire,
        algorithm_settings={"outer_momentum": cell.outer_momentum},
        timeout_s=300.0,
        group=group,
    )
    clock.close_bracket()
    on_round = CountRounds()
    averaging.on_record(on_round)
    with averaging:
        if rank == 0:
            figures = measure(averaging, optimizer.step, clock, on_round, copies, parameters, rounds, cycles, alone)
            extra_tensors = figures.pop("tensor_bytes") - alone_tensors
            figures |= {"parameter_bytes": parameter_bytes(model), "extra_tensor_bytes": extra_tensors}
            figures |= {"parameter_tensors": len(parameters), "threads": torch.get_num_threads()}
            Path(folder, "figures.json").write_text(json.dumps(figures))
            averaging.stop()
        while not averaging.finished:
            optimizer.step()


def measure(
    averaging: Averaging,
    step: Callable[[], object],
    clock: BoundaryClock,
    on_round: CountRounds,
    copies: list[Tensor],
    parameters: Sequence[Tensor],
    rounds: int,
    cycles: int,
    alone: dict[str, int],
) -> dict[str, Any]:
    """Rank 0's figures; takes as many steps as it needs."""
    fragments = len(averaging.replica.fragments)
    for _ in range(3):
        next(cycle_times_s(averaging, step, clock))
    settled_tensors, settled = tensor_bytes(), resident_bytes()
    begin_round, boundary_s, copy_s = averaging.pace.round, [], []
    timed = cycle_times_s(averaging, step, clock)
    while averaging.pace.round < begin_round + rounds or len(boundary_s) < cycles:
        boundary_s.append(next(timed))
        copy_s.append(plain_copy_s(copies, parameters))
    later = resident_bytes()

    # Counting slows every operation down, so it comes last.
    on_round.wanted, clock.around = True, AllocationCounter()
    while on_round.rounds < 2 * fragments + 1:
        step()
    on_round.wanted = False
    boundary_counter, clock.around = clock.around, None
    return {
        "fragments": fragments,
        "extra_bytes": {key: settled[key] - alone[key] for key in alone},
        "tensor_bytes": settled_tensors,
        "rounds": averaging.pace.round - begin_round,
        "growth_bytes": {key: later[key] - settled[key] for key in later},
        "boundary_s_per_cycle": quantiles(boundary_s),
        "plain_copy_s": quantiles(copy_s),
        "boundary_in_copies": statistics.median(boundary_s) / statistics.median(copy_s),
        "deferred_merges": averaging.replica.deferred_merges,
        "waited_s": averaging.tally.waited_s,
        "allocated_per_round": {
            "rounds": on_round.rounds,
            "tensors": (on_round.counter.tensors + boundary_counter.tensors) / on_round.rounds,
            "bytes": (on_round.counter.bytes + boundary_counter.bytes) / on_round.rounds,
            "largest_bytes": max(on_round.counter.largest_bytes, boundary_counter.largest_bytes),
        },
    }


def cycle_times_s(averaging: Averaging, step: Callable[[], object], clock: BoundaryClock) -> Iterator[float]:
    """Seconds at step boundaries for each cycle: until as many corrections as there are fragments have been shown.

    Steps as often as that takes; boundaries with nothing to show are counted in.
    """
    staleness, fragments = averaging.tally.staleness, len(averaging.replica.fragments)
    while True:
        before = staleness.merges
        clock.take_s()
        while staleness.merges < before + fragments:
            step()
        yield clock.take_s() * fragments / (staleness.merges - before)


@torch.no_grad()
def plain_copy_s(copies: list[Tensor], parameters: Sequence[Tensor]) -> float:
    """Seconds for one copy of all parameters into tensors that are there already."""
    begin_s = time.perf_counter()
    torch._foreach_copy_(copies, list(parameters))
    return time.perf_counter() - begin_s


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles, and how many values they stand for."""
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else [values[0]] * 3
    return {"median": middle, "lower_quartile": low, "upper_quartile": high, "count": len(values)}


def judge(cell: Cell, figures: dict[str, Any]) -> list[Bar]:
    """The bars of one cell."""
    name = cell.name
    allowed = cell.allowed_copies * figures["parameter_bytes"] + ALLOWANCE_BYTES
    extra = max(figures["extra_bytes"]["rss"], figures["extra_tensor_bytes"])
    growth = figures["growth_bytes"]["rss"]
    made = figures["allocated_per_round"]["largest_bytes"]
    # Encoding makes scales, one for a thousand elements.
    without_allocation = Bar(f"{name}: largest tensor made per round", made, at_most=SMALL_BYTES, unit=" bytes")
    return [
        Bar(f"{name}: extra memory", round(extra / MB, 1), at_most=round(allowed / MB, 1), unit=" MB"),
        Bar(f"{name}: step boundaries per cycle", figures["boundary_in_copies"], at_most=COPIES, unit=" copies"),
        *(() if cell.is_coarse else (without_allocation,)),
        Bar(
            f"{name}: growth over {figures['rounds']} rounds",
            round(growth / MB, 2),
            at_most=GROWTH_BYTES / MB,
            unit=" MB",
        ),
    ]


def run_ranks(cell: Cell, rounds: int, cycles: int, seed: int) -> dict[str, Any]:
    """Starts the ranks as fresh processes; returns rank 0's figures. Raises SystemExit if one of them fails."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="lasgd-memory-") as folder:
        ranks = [
            context.Process(target=rank_main, args=(rank, cell, rounds, cycles, seed, folder), daemon=True)
            for rank in range(RANKS)
        ]
        for process in ranks:
            process.start()
        deadline_s = time.monotonic() + RANK_TIMEOUT_S
        while any(process.is_alive() for process in ranks) and not any(process.exitcode for process in ranks):
            ranks[0].join(0.2)
            if time.monotonic() > deadline_s:
                break
        for process in ranks:
            process.join(10.0)
            if process.exitcode != 0:
                for other in ranks:
                    other.kill()
                raise SystemExit(f"memory: a rank ended with {process.exitcode} (None: not within the time allowed)")
        return json.loads(Path(folder, "figures.json").read_text())


def main(argv: Sequence[str] | None = None) -> int:
    """Measures each cell; returns the exit code."""
    parser = arguments_for("memory", __doc__)
    parser.add_argument(
        "--fragments",
        default="1,5,4:0.8,4:0.8:int8",
        help="numbers of fragments, each with the momentum of the mean after a colon or without, and after another one "
        "the wire format; default %(default)s",
    )
    parser.add_argument("--rounds", type=int, help="rounds over which growth is measured; default 200")
    arguments = parser.parse_args(argv)
    if not Path("/proc/self/smaps_rollup").exists():
        raise SystemExit("memory: reads /proc/self/smaps_rollup, which this system does not have; run it on Linux")
    try:
        cells = [Cell.parse(text) for text in arguments.fragments.split(",")]
    except ValueError:
        parser.error(f"--fragments: expected such as 1,5,4:0.8, got {arguments.fragments!r}")
    rounds = arguments.rounds or (10 if arguments.quick else 200)
    cycles = 3 if arguments.quick else 25
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    settings = {
        "quick": arguments.quick,
        "ranks": RANKS,
        "rounds": rounds,
        "fragments": arguments.fragments,
        "model": "ResNet50",
    }
    report = Report("memory", run_card(settings, [arguments.seed]))
    for cell in cells:
        figures = run_ranks(cell, rounds, cycles, arguments.seed)
        report.figures[cell.name] = figures
        for bar in judge(cell, figures):
            report.add(bar)
    return report.finish(where_to_store("memory", arguments))


if __name__ == "__main__":
    sys.exit(main())
