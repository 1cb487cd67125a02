"""All-reduces beside the communicator's, over a Gloo process group of their own, as torch's DDP needs them."""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from lasgd.errors import PeerError
from lasgd.group.cost import ring_bytes_sent
from lasgd.group.gloo import GlooConnections, give_up, megabytes
from lasgd.group.notices import Notices


@dataclass(frozen=True)
class Started:
    """One all-reduce on its way."""

    work: dist.Work
    tensor: Tensor
    begin_s: float
    timeout_s: float
    is_payload: bool


class GlooLane:
    """See Lane."""

    def __init__(
        self,
        connections: GlooConnections,
        store: dist.Store,
        rank: int,
        world_size: int,
        timeout_s: float,
        notices: Notices,
    ):
        self.bytes_sent = 0
        """As the group's, of what is payload. Written by the thread that waits."""
        self._connections, self._notices = connections, notices
        self._world_size, self._timeout_s = world_size, timeout_s
        self._where = f"rank {rank} of {world_size}"
        self._backend = connections.gloo
        self._group: dist.ProcessGroup | None = dist.ProcessGroup(store, rank, world_size)
        kind = dist.ProcessGroup.BackendType.GLOO
        for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
            self._group._register_backend(torch.device(device), kind, self._backend)
        self._group._set_default_backend(kind)

    @property
    def process_group(self) -> dist.ProcessGroup:
        """See Lane."""
        if self._group is None:
            raise PeerError(f"{self._where}: this rank has left the group")
        return self._group

    @property
    def backend(self) -> dist.ProcessGroupGloo:
        """See Lane."""
        if self._backend is None:
            raise PeerError(f"{self._where}: this rank has left the group")
        return self._backend

    def set_timeout(self, timeout_s: float) -> None:
        """See Lane."""
        self._timeout_s = timeout_s
        if (gloo := self._connections.gloo) is not None:
            gloo.set_timeout(timedelta(seconds=timeout_s))

    def start_all_reduce(self, tensor: Tensor, timeout_s: float, is_payload: bool = True) -> Started:
        """See Lane."""
        options = dist.AllreduceOptions()
        options.timeout = timedelta(seconds=timeout_s)
        begin_s = time.monotonic()
        work = self._connections.wait_guarded(
            lambda gloo: gloo.allreduce([tensor], options), f"all-reduce of {megabytes(tensor)}", timeout_s
        )
        return Started(work, tensor, begin_s, timeout_s, is_payload)

    def wait_all_reduce(self, started: Started) -> None:
        """See Lane."""
        try:
            self._connections.wait_done(started.work)
        except RuntimeError as error:
            after_s = time.monotonic() - started.begin_s
            what = f"all-reduce of {megabytes(started.tensor)} of gradients"
            raise self._connections.failure(error, what, after_s, started.timeout_s) from error
        if started.is_payload:
            self.bytes_sent += ring_bytes_sent(started.tensor.nbytes, self._world_size)

    def wait_broadcast_rest(self, n_bytes: int) -> None:
        """See Lane. Nothing: the link is real."""

    def failure(self, error: Exception, what: str, after_s: float) -> PeerError:
        """See Lane."""
        return self._connections.failure(error, what, after_s, self._timeout_s)

    def check_peers(self) -> None:
        """See Lane."""
        if self._notices.is_there_trouble():
            self.leave()
            raise PeerError(f"another rank is in trouble. {self._notices.account()}")

    def leave(self) -> None:
        """See Lane. DDP has a reference too, and the connections close with the last."""
        held = [self._backend, self._group]
        self._backend = self._group = None
        if held[0] is not None:
            give_up(held)
        self._connections.leave()
