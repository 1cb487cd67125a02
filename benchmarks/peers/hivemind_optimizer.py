"""hivemind's Optimizer: local steps, parameters averaged in the background by whoever has met in time.

As its quick start shows it for a swarm that averages weights: `use_local_updates=True`, with `delay_state_averaging`,
which is its default. Ranks find each other in a distributed hash table; every `target_batch_size` samples of the swarm
an epoch ends, and they look for a group to average with. Its guide is written for epochs of minutes; for epochs of a
few seconds the periods in which a rank looks at the swarm's progress must be shorter, or ranks fall an epoch behind
and wait for a group nearly all the time. The learning rate follows the swarm's samples, within an epoch too.
"""

from __future__ import annotations

import logging
import math
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch

from lasgd.training import schedule
from peers.common import Run


@dataclass(frozen=True)
class Options:
    """What its users choose."""

    sync_every: int = 20
    """Local steps of an epoch (`target_batch_size`, in steps of all ranks)."""
    local_updates: bool = True
    """Every rank updates by its own gradients; else gradients are averaged, one step an epoch, delayed by one, which
    is for batches of many thousands."""
    matchmaking_s: float = 3.0
    """`matchmaking_time`: how long a group of fewer than all is looked for; 3 to 5 s for small local runs."""
    averaging_timeout_s: float = 30.0
    """`averaging_timeout`."""
    float16: bool = True
    """Averages travel in 16 bits, which its guide calls usually fine."""
    refresh_s: float = 0.25
    """How often a rank looks at the swarm's progress at most; `max_refresh_period` is twice that."""


def train(run: Run, options: Options) -> None:
    """The local steps, until the swarm has processed the budget."""
    import hivemind
    from hivemind.compression import Float16Compression, NoCompression

    met = _Met()
    settings = run.settings
    dht = _joined(run)

    compression = Float16Compression() if options.float16 else NoCompression()
    target = options.sync_every * run.samples_a_step
    epochs = math.ceil(run.budget / target)
    optimizer = hivemind.Optimizer(
        dht=dht,
        run_id="lasgd_peers",
        batch_size_per_step=settings.batch_size,
        target_batch_size=target,
        params=list(run.model.parameters()),
        optimizer=lambda params: torch.optim.SGD(
            params, lr=settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay, fused=True
        ),
        use_local_updates=options.local_updates,
        delay_state_averaging=True,
        delay_grad_averaging=not options.local_updates,
        delay_optimizer_step=not options.local_updates,
        matchmaking_time=options.matchmaking_s,
        averaging_timeout=options.averaging_timeout_s,
        next_chunk_timeout=options.averaging_timeout_s,  # its default, matchmaking_time, is for faster links
        grad_compression=compression,
        state_averaging_compression=compression,
        averager_opts={"target_group_size": run.world_size, "request_timeout": options.matchmaking_s / 2},
        tracker_opts={
            "min_refresh_period": options.refresh_s,
            "default_refresh_period": options.refresh_s,
            "max_refresh_period": 2 * options.refresh_s,
        },
        verbose=True,
    )

    def progress() -> float:
        in_epoch = min(target, optimizer.tracker.global_progress.samples_accumulated)
        return min(1.0, (optimizer.local_epoch * target + in_epoch) / run.budget)

    for batch in run.batches():
        run.gradient(run.model, batch)
        for group in optimizer.opt.param_groups:
            group["lr"] = settings.lr * schedule.factor(progress(), settings.warmup)
        with run.waiting():
            optimizer.step()
        optimizer.zero_grad()
        run.stepped(progress())
        if optimizer.local_epoch >= epochs:
            break
    with run.waiting():
        optimizer.state_averager.step(wait_for_delayed_updates=True)  # the last average
    run.stop_clock()
    run.counts.rounds = len(met.groups)
    run.counts.notes += [
        "waited_s is the time within optimizer.step(), the local update included",
        f"{optimizer.local_epoch} epochs, {met}",
    ]
    run.wait_from(0, "hivemind is done")
    optimizer.shutdown()
    dht.shutdown()


def _joined(run: Run) -> Any:
    """This rank's part of the hash table, when every rank has joined it.

    Each is told the addresses of all before it, not of the first alone: libp2p passes no addresses on that it takes for
    unroutable, as those of emulated links are.
    """
    import hivemind

    dht, known = None, []
    for rank in range(run.world_size):
        if rank == run.rank:
            dht = hivemind.DHT(host_maddrs=[f"/ip4/{run.address}/tcp/0"], initial_peers=known, start=True)
        addresses = map(str, dht.get_visible_maddrs()) if dht else ()
        known += run.wait_from(rank, f"addresses of rank {rank}", " ".join(addresses)).split()
    return dht


class _Met(logging.Handler):
    """Counts the groups that this rank has averaged with: hivemind tells of them in its log only (`verbose=True`)."""

    def __init__(self) -> None:
        super().__init__()
        self.groups: list[int] = []
        self.failures = 0
        logger = logging.getLogger("hivemind")
        for handler in logger.handlers:
            handler.setLevel(logging.WARNING)  # what is left of its output
        logger.addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if found := re.match(r"Averaged (?:parameters|gradients) with (\d+) peers", text):
            self.groups.append(int(found[1]))
        self.failures += "failed" in text

    def __str__(self) -> str:
        sizes = ", ".join(f"{times} in a group of {size}" for size, times in sorted(Counter(self.groups).items()))
        return f"averages: {sizes or 'none'}; {self.failures} failed"
