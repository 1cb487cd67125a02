"""torch's post-local SGD: DDP at first, then `sync_every` local steps between two averages of the parameters.

As the docstring of `torch.distributed.optim.PostLocalSGDOptimizer` shows it, with every rank a machine of its own:
after the warm-up no gradients are averaged at all (`post_local_gradient_allreduce=False`). The averager blocks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import islice

import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook import PostLocalSGDState, post_localSGD_hook
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.distributed.optim import PostLocalSGDOptimizer
from torch.nn.parallel import DistributedDataParallel

from peers.common import Run, steps_for


@dataclass(frozen=True)
class Options:
    """What its users choose."""

    sync_every: int = 10
    """Local steps between two averages (`period`)."""
    ddp_share: float = 0.05
    """Share of the budget in which DDP averages every gradient: the learning rate's warm-up by default."""


def train(run: Run, options: Options) -> None:
    """The local steps, up to the last average."""
    dist.init_process_group("gloo")
    ddp_steps = math.ceil(options.ddp_share * run.budget / run.samples_a_step)
    # The averager counts from 0 and averages in step ddp_steps, so after ddp_steps + 1 of them.
    steps = steps_for(run.budget, run.samples_a_step, sync_every=options.sync_every, first_sync=ddp_steps + 1)

    model = DistributedDataParallel(run.model)
    state = PostLocalSGDState(
        process_group=None,
        subgroup=dist.new_subgroups(group_size=1)[0],
        start_localSGD_iter=ddp_steps,
        post_local_gradient_allreduce=False,
    )
    model.register_comm_hook(state, run.padded_hook(post_localSGD_hook))
    averager = _Timed(run, period=options.sync_every, warmup_steps=ddp_steps)
    optimizer = PostLocalSGDOptimizer(optim=run.optimizer(), averager=averager)
    for batch in islice(run.batches(), steps):
        run.gradient(model, batch)
        run.update(optimizer)
        run.stepped(may_keep=averager.has_averaged or run.counts.local_steps < ddp_steps)
    run.stop_clock()
    run.counts.rounds = ddp_steps + averager.averages
    dist.destroy_process_group()


class _Timed(PeriodicModelAverager):
    """The averager, with a count and the time that it takes."""

    def __init__(self, run: Run, period: int, warmup_steps: int):
        super().__init__(period=period, warmup_steps=warmup_steps)
        self.averages = 0
        self.has_averaged = False
        self._run = run

    def average_parameters(self, params):
        """Averages where it is due."""
        local_steps = self.step - self.warmup_steps
        self.has_averaged = local_steps >= 0 and local_steps % self.period == 0
        if not self.has_averaged:
            return super().average_parameters(params)
        self.averages += 1
        with self._run.waiting():
            return super().average_parameters(params)
