"""torchft's LocalSGD: `sync_every` local steps, then every rank waits for a quorum and for the mean of the parameters.

As its docstring and tests show it: the context manager around the loop, which hooks itself into the optimizer.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice

from peers.common import Run, steps_for
from peers.torchft_manager import started_manager, timed


@dataclass(frozen=True)
class Options:
    """What its users choose."""

    sync_every: int = 10
    """Local steps between two averages."""


def train(run: Run, options: Options) -> None:
    """The local steps, up to the last average."""
    optimizer = run.optimizer()
    steps = steps_for(run.budget, run.samples_a_step, sync_every=options.sync_every, first_sync=options.sync_every)
    with started_manager(run, run.model, {"optimizer": optimizer}) as manager:
        from torchft.local_sgd import LocalSGD

        local_sgd = LocalSGD(manager, run.model, optimizer, sync_every=options.sync_every)
        with timed(run, optimizer, local_sgd):
            for batch in islice(run.batches(), steps):
                run.gradient(run.model, batch)
                run.update(optimizer)
                run.stepped(may_keep=(run.counts.local_steps + 1) % options.sync_every == 0)
        run.stop_clock()
        run.counts.rounds = manager.current_step()
    lost = steps // options.sync_every - run.counts.rounds
    if lost:
        run.counts.notes.append(f"{lost} of torchft's synchronisations were not committed")
