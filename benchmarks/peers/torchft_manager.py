"""torchft's part that both of its peers share: a lighthouse, and a manager for each rank.

Every rank is a replica group of its own, as a machine that may come and go. Its users start `torchft_lighthouse` once
and torchrun on each machine; here rank 0 does the first, and each rank hosts the store that its torchrun would.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from peers.common import Run

JOIN_MS, TICK_MS = 10_000, 10
"""A quorum without all ranks waits for so long for the others; how often the lighthouse looks."""


@contextlib.contextmanager
def started_manager(run: Run, model: nn.Module, optimizers: dict[str, torch.optim.Optimizer]) -> Iterator[Any]:
    """The manager of this rank; it can hand `model` and `optimizers` to a rank that comes back."""
    os.environ.setdefault("RUST_LOG", "warn")  # read when torchft is imported; else many lines a quorum
    from torchft import Manager, ProcessGroupGloo
    from torchft.coordination import LighthouseServer

    lighthouse = None
    if run.rank == 0:
        lighthouse = LighthouseServer(
            bind="[::]:0", min_replicas=run.world_size, join_timeout_ms=JOIN_MS, quorum_tick_ms=TICK_MS
        )
    port = lighthouse.address().rpartition(":")[2] if lighthouse else ""
    where = run.wait_from(0, "lighthouse", f"http://{run.address}:{port}")

    def state_dict() -> dict[str, Any]:
        return {"model": model.state_dict()} | {name: optimizer.state_dict() for name, optimizer in optimizers.items()}

    def load_state_dict(state: dict[str, Any]) -> None:
        model.load_state_dict(state["model"])
        for name, optimizer in optimizers.items():
            optimizer.load_state_dict(state[name])

    timeout = timedelta(seconds=run.settings.timeout_s)
    store = dist.TCPStore(run.address, 0, is_master=True, wait_for_workers=False)
    manager = Manager(
        pg=ProcessGroupGloo(timeout=timeout),
        load_state_dict=load_state_dict,
        state_dict=state_dict,
        min_replica_size=run.world_size,
        use_async_quorum=False,  # DiLoCo demands it; LocalSGD needs the quorum in the same call anyway
        init_sync=False,  # all ranks begin with the same weights, from the same seed
        timeout=timeout,
        quorum_timeout=timeout,
        rank=0,
        world_size=1,
        store_addr=run.address,
        store_port=store.port,
        lighthouse_addr=where,
        replica_id=f"rank_{run.rank}",
        hostname=run.address,
    )
    try:
        yield manager
    finally:
        # Nobody leaves while another rank may still ask for a quorum.
        run.group.wait_exchange("torchft is done", b"", run.settings.timeout_s)
        manager.shutdown(wait=False)
        if lighthouse is not None:
            lighthouse.shutdown()


@contextlib.contextmanager
def timed(run: Run, optimizer: torch.optim.Optimizer, inner: contextlib.AbstractContextManager[Any]) -> Iterator[None]:
    """`inner`, which works in a hook after the optimizer's step, with the time that this hook takes."""
    begun: list[contextlib.AbstractContextManager[None]] = []

    def begin(*_: Any) -> None:
        begun.append(run.waiting())
        begun[-1].__enter__()

    def end(*_: Any) -> None:
        begun.pop().__exit__(None, None, None)

    # Hooks run in the order of their registration.
    with contextlib.ExitStack() as stack:
        stack.callback(optimizer.register_step_post_hook(begin).remove)
        stack.enter_context(inner)
        stack.callback(optimizer.register_step_post_hook(end).remove)
        yield
