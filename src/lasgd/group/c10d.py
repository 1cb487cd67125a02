"""A static group over torch.distributed: Gloo over CPU memory, found through the environment that torchrun sets.

The group has its own process group, made from its own prefix of the store: collectives are matched by order, so the
communicator must never share one with the user's thread. A restart under torchelastic gets a new prefix, because
addresses left in the store by the dead would be taken for the living.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist
from torch import Tensor

from lasgd.errors import ConfigurationError, PeerError
from lasgd.group.cost import ring_bytes_sent

T = TypeVar("T")

ABORT_S = 1.0
"""Longest wait for connections to close."""

STORE_IS_SILENT = "The host of the store does not answer: rank 0's process, or the launcher on its machine; silent: 0."

_connections = 0  # attaches of this process: the same count on every rank, as attaches happen in the same order


def connect(start_timeout_s: float) -> C10dGroup:
    """Joins the ranks that the environment names (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT); alone without them.

    Raises ConfigurationError for an environment that cannot work, PeerError that names the ranks that never came.
    """
    global _connections
    _connections += 1
    rank, world_size, store = _rendezvous(start_timeout_s)
    generation = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return C10dGroup(dist.PrefixStore(f"lasgd/{generation}/{_connections}", store), rank, world_size, start_timeout_s)


def _rendezvous(timeout_s: float) -> tuple[int, int, dist.Store]:
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size(), dist.distributed_c10d._get_default_store()
    rank, world_size = _number("RANK", 0), _number("WORLD_SIZE", 1)
    if not 0 <= rank < world_size:
        raise ConfigurationError(f"RANK={rank} is not below WORLD_SIZE={world_size}; each rank needs its own number")
    if world_size == 1:
        return rank, world_size, dist.HashStore()
    host, port = os.environ.get("MASTER_ADDR", ""), _number("MASTER_PORT", -1)
    if not host or port < 0:
        raise ConfigurationError(
            f"WORLD_SIZE is {world_size}, but MASTER_ADDR and MASTER_PORT do not say where rank 0 is; "
            "start with torchrun"
        )
    is_host = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        store = dist.TCPStore(
            host, port, world_size, is_host, timedelta(seconds=timeout_s), wait_for_workers=False, multi_tenant=True
        )
    except (dist.DistError, RuntimeError, ValueError) as error:
        if "EADDRINUSE" in str(error) or "address already in use" in str(error).lower():
            raise ConfigurationError(
                f"rank {rank} of {world_size}: port {port} on {host} is in use by another program; "
                "choose another MASTER_PORT (torchrun: --master-port), or let torchrun --standalone choose"
            ) from error
        raise PeerError(
            f"rank {rank} of {world_size}: no answer from rank 0's store at {host}:{port} within {timeout_s:g} s. "
            "Is rank 0 running, and is the port reachable from here?"
        ) from error
    return rank, world_size, store


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    if not text:
        return default
    try:
        return int(text)
    except ValueError:
        raise ConfigurationError(f"the environment variable {name} should be a whole number, got {text!r}") from None


class C10dGroup:
    """All ranks from the start to the end; one that is lost ends the group."""

    epoch = 0

    def __init__(self, store: dist.Store, rank: int, world_size: int, start_timeout_s: float):
        self.rank = rank
        self.world_size = world_size
        self.members = tuple(range(world_size))
        self.bytes_sent = 0
        self._store = store
        self.wait_exchange("joined", b"", start_timeout_s)
        try:
            self._gloo = dist.ProcessGroupGloo(store, rank, world_size, timedelta(seconds=start_timeout_s))
        except RuntimeError as error:
            raise PeerError(
                f"rank {rank} of {world_size}: no Gloo connection to the other ranks: {_first_line(error)}. "
                "Ranks on several hosts must reach each other; GLOO_SOCKET_IFNAME names the interface to use"
            ) from error

    def wait_all_reduce(self, header: Tensor, vector: Tensor, timeout_s: float) -> tuple[float, float]:
        """See Group."""
        options = dist.AllreduceOptions()
        options.timeout = timedelta(seconds=timeout_s)

        def both() -> tuple[float, float]:
            pending = self._gloo.allreduce([header], options), self._gloo.allreduce([vector], options)
            pending[0].wait()
            joined_s = time.monotonic()
            pending[1].wait()
            return joined_s, time.monotonic()

        times = self._guarded(both, f"all-reduce of {_megabytes(vector)}", timeout_s)
        self.bytes_sent += ring_bytes_sent(vector.nbytes + header.nbytes, self.world_size)
        return times

    def wait_broadcast(self, tensor: Tensor, source: int, timeout_s: float) -> None:
        """See Group."""
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor, options.timeout = source, 0, timedelta(seconds=timeout_s)
        self._guarded(
            lambda: self._gloo.broadcast([tensor], options).wait(), f"broadcast of {_megabytes(tensor)}", timeout_s
        )

    def wait_exchange(self, topic: str, value: bytes, timeout_s: float) -> list[bytes]:
        """See Group."""
        keys = [f"{topic}/{rank}" for rank in self.members]
        try:
            self._store.set(keys[self.rank], value or b"-")
            self._store.wait(keys, timedelta(seconds=timeout_s))
            return [b"" if found == b"-" else found for found in map(self._store.get, keys)]
        except (dist.DistError, RuntimeError) as error:
            missing = [rank for rank, key in enumerate(keys) if not self._holds(key)]
            who = f"nothing from {_ranks(missing)}" if missing else _first_line(error)
            raise PeerError(
                f"rank {self.rank} of {self.world_size}: {topic}: {who} after {timeout_s:g} s.{self._reasons()} "
                "Start all ranks, with the same WORLD_SIZE and MASTER_ADDR, within the time-out"
            ) from error

    def leave(self, reason: str | None = None) -> None:
        """See Group."""
        if self._gloo is None:
            return
        if reason:
            self._asked(lambda: self._try_set(f"reason/{self.rank}", reason), None)
        self._abort()

    def _abort(self) -> None:
        gloo, self._gloo = self._gloo, None
        if gloo is None:
            return
        # Closes the connections, so that whoever waits for this rank hears of it. Where the training thread leaves in
        # the middle of the communicator's collective, torch waits for that to end, in abort or in the destructor; so
        # the thread takes over the last reference.
        thread = threading.Thread(target=_close, args=(gloo,), name="lasgd-abort", daemon=True)
        del gloo
        thread.start()
        thread.join(ABORT_S)

    def _guarded(self, collective: Callable, what: str, timeout_s: float):
        if self._gloo is None:
            raise PeerError(f"{what}: this rank has left the group")
        begin_s = time.monotonic()
        try:
            return collective()
        except RuntimeError as error:
            after_s = time.monotonic() - begin_s
            if self._gloo is None:  # the training thread has left meanwhile: this rank's own doing
                raise PeerError(f"{what}: this rank has left the group") from error
            self._abort()  # poisoned: its pairs are out of step
            raise PeerError(
                f"{what} not finished after {after_s:.1f} s ({_first_line(error)}). "
                f"{self._asked(self._who_is_silent, STORE_IS_SILENT)} "
                f"Raise timeout_s (now {timeout_s:g}) if the link is slow; see docs/footguns.md#silent-rank"
            ) from error

    def _asked(self, question: Callable[[], T], otherwise: T, patience_s: float = 4.0) -> T:
        """What the store says; `otherwise` where its host does not answer. A stopped process keeps connections open,
        and torch's client waits for its answer without limit, hence the thread."""
        answers: list[T] = []
        thread = threading.Thread(target=lambda: answers.append(question()), name="lasgd-ask-store", daemon=True)
        thread.start()
        thread.join(patience_s)
        return answers[0] if answers else otherwise

    def _who_is_silent(self, patience_s: float = 2.0) -> str:
        """Asks, through the store, who else has noticed."""
        self._try_set(f"noticed/{self.rank}", "1")
        deadline_s = time.monotonic() + patience_s
        silent = list(self.members)
        while silent and not self._reasons() and time.monotonic() < deadline_s:
            silent = [rank for rank in silent if not self._holds(f"noticed/{rank}")]
            time.sleep(0.05)
        if reasons := self._reasons():
            return reasons.strip()
        heard = [rank for rank in self.members if rank not in silent]
        return f"Last heard from {_ranks(heard)}; silent: {_ranks(silent)}."

    def _reasons(self) -> str:
        reasons = [(r, self._store.get(f"reason/{r}").decode()) for r in self.members if self._holds(f"reason/{r}")]
        return "".join(f" Rank {rank} left: {reason}." for rank, reason in reasons)

    def _holds(self, key: str) -> bool:
        try:
            return self._store.check([key])
        except (dist.DistError, RuntimeError):
            return False  # the store itself is gone, and with it whatever it held

    def _try_set(self, key: str, value: str) -> None:
        # If the store's host is gone, nobody is left to read the message.
        with contextlib.suppress(dist.DistError, RuntimeError):
            self._store.set(key, value)


def _close(gloo: dist.ProcessGroupGloo) -> None:
    gloo.abort()


def _ranks(ranks: list[int]) -> str:
    if not ranks:
        return "nobody"
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))


def _megabytes(tensor: Tensor) -> str:
    return f"{tensor.nbytes / 1e6:.3g} MB"


def _first_line(error: Exception) -> str:
    """Gloo's message without source positions, addresses and advice."""
    text = str(error).strip().splitlines()[0].split(" This is typically")[0]
    return re.sub(r"\[[^\]]*\](:\d+)?:?\s*", "", text).strip(" .")[:160] or type(error).__name__
