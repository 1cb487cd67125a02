"""torchft's DiLoCo: `sync_every` local steps, whose sum an outer Nesterov step takes as its gradient.

As its train_diloco.py shows it. With `fragments` and `delay` it is Streaming DiLoCo: one fragment of the model at a
time, whose all-reduce overlaps with `delay` local steps before it is waited for.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice

import torch
from torch import nn

from lasgd.errors import ConfigurationError
from peers.common import Run, steps_for
from peers.torchft_manager import started_manager, timed


@dataclass(frozen=True)
class Options:
    """What its users choose. Outer learning rate and momentum are the DiLoCo paper's, and train_diloco.py's."""

    sync_every: int = 20
    """Local steps in which every fragment is synchronised once."""
    fragments: int = 2
    """Parts of the model, synchronised in turn."""
    delay: int = 5
    """Local steps during which a fragment's all-reduce is under way (`fragment_sync_delay`); 0: it is waited for."""
    alpha: float = 0.5
    """Share of a rank's own parameters that stays when a fragment's result comes in (`fragment_update_alpha`)."""
    outer_lr: float = 0.7
    outer_momentum: float = 0.9


def train(run: Run, options: Options) -> None:
    """The local steps, up to the last outer step."""
    optimizer = run.optimizer()
    parts = cut(run.model, options.fragments)
    every = options.sync_every // len(parts)
    if options.sync_every % len(parts) or not 0 <= options.delay < every:
        raise ConfigurationError(
            f"--sync-every {options.sync_every} --delay {options.delay} with {len(parts)} fragments: torchft wants "
            "sync-every to be a multiple of the fragments' number, and delay to be less than sync-every divided by it."
        )
    outer = [
        torch.optim.SGD(part.parameters(), lr=options.outer_lr, momentum=options.outer_momentum, nesterov=True)
        for part in parts
    ]
    steps = steps_for(run.budget, run.samples_a_step, sync_every=options.sync_every, first_sync=options.sync_every)
    with started_manager(run, run.model, {"inner": optimizer}) as manager:
        from torchft.local_sgd import DiLoCo

        diloco = DiLoCo(
            manager,
            parts,
            optimizer,
            outer,
            sync_every=options.sync_every,
            fragment_sync_delay=options.delay,
            fragment_update_alpha=options.alpha,
        )
        with timed(run, optimizer, diloco):
            for batch in islice(run.batches(), steps):
                run.gradient(run.model, batch)
                run.update(optimizer)
                run.stepped(may_keep=(run.counts.local_steps + 1) % every == 0)
        run.stop_clock()
        run.counts.rounds = manager.current_step()
    lost = steps // every - run.counts.rounds
    if lost:
        run.counts.notes.append(f"{lost} of torchft's synchronisations were not committed")


def cut(model: nn.Module, fragments: int) -> list[nn.Module]:
    """The model's layers, in order, in `fragments` parts of about equally many parameters; fewer if layers are few."""
    total = sum(parameter.numel() for parameter in model.parameters())
    parts: list[list[nn.Module]] = [[]]
    so_far = 0
    for layer in _layers(model):
        elements = sum(parameter.numel() for parameter in layer.parameters())
        left = len(parts) * total / fragments - so_far
        if parts[-1] and len(parts) < fragments and abs(left) <= abs(left - elements):
            parts.append([])
        parts[-1].append(layer)
        so_far += elements
    return [nn.ModuleList(part) for part in parts]


def _layers(module: nn.Module) -> list[nn.Module]:
    """The smallest modules that hold all parameters between them, in order."""
    if not any(True for _ in module.parameters()):
        return []
    if any(True for _ in module.parameters(recurse=False)):
        return [module]
    return [layer for child in module.children() for layer in _layers(child)]
