"""torch's DistributedDataParallel: every step waits for the mean gradient, which overlaps with the backward pass.

As in PyTorch's own tutorial: wrap the model, keep the loop. Where the condition pads steps, DDP's documented
`allreduce_hook`, which is what DDP does without a hook, begins each bucket when the slower machine would.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice

import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from peers.common import Run, steps_for


@dataclass(frozen=True)
class Options:
    """DDP has nothing to choose here: one bucket or two, as its default of 25 MB makes them."""


def train(run: Run, options: Options) -> None:
    """The local steps, up to the last."""
    dist.init_process_group("gloo")
    model = DistributedDataParallel(run.model)
    if not run.padding.is_idle:
        model.register_comm_hook(None, run.padded_hook(allreduce_hook))
    optimizer = run.optimizer()
    for batch in islice(run.batches(), steps_for(run.budget, run.samples_a_step)):
        run.gradient(model, batch)
        run.update(optimizer)
        run.counts.rounds += 1
        run.stepped()
    run.stop_clock()
    if run.padding.is_idle:
        run.counts.notes.append("waited_s was not measured: DDP without a hook does not tell when a bucket is full")
    dist.destroy_process_group()
