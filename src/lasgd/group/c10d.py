"""A static group over torch.distributed: Gloo over CPU memory, found through the environment that torchrun sets.

The group has its own process group, made from its own prefix of the store: collectives are matched by order, so the
communicator must never share one with the user's thread. A restart under torchelastic gets a new prefix, because
addresses left in the store by the dead would be taken for the living.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import Tensor

from lasgd.errors import ConfigurationError, PeerError
from lasgd.group.cost import pieces_bytes_sent, ring_bytes_sent
from lasgd.group.gloo import LOOK_S, GlooConnections, first_line, megabytes
from lasgd.group.lane import GlooLane
from lasgd.group.notices import ANSWER_S, Notices, ranks_in_words, wait_answer
from lasgd.group.zmq_mail import ZmqMail, own_address

_connections = 0  # attaches of this process: the same count on every rank, as attaches happen in the same order

_hosted: dict[tuple[str, int], dist.TCPStore] = {}
"""The stores that this process hosts, by host and port, kept as long as it lives.

With the last reference the server goes, and it must not go with the averaging that made it: another rank may have
come for the next one meanwhile, and found this server.
"""


def connect(start_timeout_s: float) -> C10dGroup:
    """Joins the ranks that the environment names (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT); alone without them.

    Raises ConfigurationError for an environment that cannot work, PeerError that names the ranks that never came.
    """
    global _connections
    _connections += 1
    rank, world_size, store, hosts_store = _rendezvous(start_timeout_s)
    generation = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    own_part = dist.PrefixStore(f"lasgd/{generation}/{_connections}", store)
    return C10dGroup(own_part, rank, world_size, start_timeout_s, hosts_store)


def _rendezvous(timeout_s: float) -> tuple[int, int, dist.Store, bool]:
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size(), dist.distributed_c10d._get_default_store(), dist.get_rank() == 0
    rank, world_size = _rank_and_world_size()
    if world_size == 1:
        return rank, world_size, dist.HashStore(), False
    host, port = os.environ.get("MASTER_ADDR", ""), _number("MASTER_PORT", 0)
    if not host or not 0 < port < 2**16:
        raise ConfigurationError(
            f"WORLD_SIZE is {world_size}, but MASTER_ADDR={host} and MASTER_PORT={os.environ.get('MASTER_PORT', '')} "
            "do not say where rank 0 is; start with torchrun"
        )
    is_launchers = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    is_host = rank == 0 and not is_launchers
    time_out = timedelta(seconds=timeout_s)
    try:
        # Torch's own time-out does not hold where somebody accepts the connection and never answers.
        store = wait_answer(
            lambda: dist.TCPStore(host, port, world_size, is_host, time_out, wait_for_workers=False, multi_tenant=True),
            timeout_s + ANSWER_S,
        )
    except (dist.DistError, RuntimeError, ValueError, TimeoutError) as error:
        if "EADDRINUSE" in str(error) or "address already in use" in str(error).lower():
            raise ConfigurationError(
                f"rank {rank} of {world_size}: port {port} on {host} is in use by another program, or by another "
                "process with RANK=0; choose another MASTER_PORT (torchrun: --master-port), or let torchrun "
                "--standalone choose"
            ) from error
        if is_host:
            raise ConfigurationError(
                f"rank 0 of {world_size}: cannot reach its own store at {host}:{port}; MASTER_ADDR should name the "
                "machine that runs rank 0, as all ranks can reach it"
            ) from error
        whose, who = ("the launcher's", "torchrun on rank 0's host") if is_launchers else ("rank 0's", "rank 0")
        raise PeerError(
            f"rank {rank} of {world_size}: no answer from {whose} store at {host}:{port} within {timeout_s:g} s. "
            f"Is {who} running, with the same WORLD_SIZE and MASTER_PORT, and is the port reachable from here?"
        ) from error
    if is_host:
        _hosted.setdefault((host, port), store)  # torch gives later stores of this host and port the same server
    return rank, world_size, store, is_host


def _rank_and_world_size() -> tuple[int, int]:
    """As the environment has it; 0 and 1 if it names neither."""
    rank, world_size = _number("RANK", 0), _number("WORLD_SIZE", 1)
    if os.environ.get("RANK") and not os.environ.get("WORLD_SIZE"):
        raise ConfigurationError(f"RANK={rank} is set, WORLD_SIZE is not; a rank needs both, one alone neither")
    if world_size > 1 and not os.environ.get("RANK"):
        raise ConfigurationError(f"WORLD_SIZE={world_size} is set, RANK is not; each rank needs its own")
    if world_size < 1:
        raise ConfigurationError(f"WORLD_SIZE={world_size} should be at least 1, the number of ranks")
    if not 0 <= rank < world_size:
        raise ConfigurationError(
            f"RANK={rank} is not one of 0 to {world_size - 1}, for WORLD_SIZE={world_size}; "
            "each rank needs its own number"
        )
    return rank, world_size


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

    def __init__(
        self, store: dist.Store, rank: int, world_size: int, start_timeout_s: float, hosts_store: bool = False
    ):
        """`hosts_store`: the store lives in this rank's process, and goes with it."""
        self.rank = rank
        self.world_size = world_size
        self.members = tuple(range(world_size))
        self._bytes_sent = 0
        self._store = store
        self._notices = Notices(store, rank, world_size, hosts_store)
        self._has_left = False
        self._connections: GlooConnections | None = None
        self._lane: GlooLane | None = None
        try:
            self._wait_place(start_timeout_s)
            self.wait_exchange("joined", b"", start_timeout_s)
            self._connections = self._wait_connected(store, start_timeout_s)
        except (PeerError, ConfigurationError) as error:
            self.leave(str(error))
            raise

    def _wait_connected(self, store: dist.Store, timeout_s: float) -> GlooConnections:
        try:
            return GlooConnections(store, self.rank, self.world_size, timeout_s, self._notices)
        except (RuntimeError, TimeoutError) as error:
            raise PeerError(
                f"rank {self.rank} of {self.world_size}: no Gloo connection to the other ranks: {first_line(error)}. "
                f"{self._notices.account()} "
                "Ranks on several hosts must reach each other; GLOO_SOCKET_IFNAME names the interface to use"
            ) from error

    def _wait_place(self, timeout_s: float) -> None:
        """Takes this rank's place. Raises ConfigurationError if it is taken, or if ranks disagree on their number.

        Whoever comes to a taken place, or to one beyond the others' number, leaves no trace: the ranks that are there
        may be complete and at work, and need not hear of it.
        """
        own = f"process {os.getpid()} on {socket.gethostname()} {os.urandom(8).hex()}"
        begin_s = time.monotonic()

        def take() -> tuple[str, str]:
            holder = self._store.compare_set(f"place/{self.rank}", "", own)
            first = self._store.compare_set("world_size", "", f"{self.world_size} {self.rank}")
            return holder.decode(), first.decode()

        try:
            holder, first = wait_answer(take, timeout_s)
        except (dist.DistError, RuntimeError, TimeoutError) as error:
            places = [f"place/{rank}" for rank in self.members]
            raise self._missing("joining", places, time.monotonic() - begin_s) from error
        if holder != own:
            self._has_left = True
            raise ConfigurationError(
                f"rank {self.rank} of {self.world_size}: RANK={self.rank} is taken by {holder.rsplit(' ', 1)[0]}. "
                "Each process needs a RANK of its own, and each run a MASTER_PORT of its own"
            )
        world_size, first_rank = map(int, first.split())
        if world_size != self.world_size:
            self._has_left = self.rank >= world_size
            raise ConfigurationError(
                f"ranks disagree on WORLD_SIZE: rank {first_rank} has {world_size}, rank {self.rank} has "
                f"{self.world_size}. Start all ranks with the same WORLD_SIZE"
            )

    def wait_all_reduce(self, header: Tensor, vector: Tensor, timeout_s: float) -> tuple[float, float]:
        """See Group."""
        options = _timed(dist.AllreduceOptions(), timeout_s)

        def both(gloo: dist.ProcessGroupGloo) -> tuple[float, float]:
            known: Any = gloo  # torch's stubs lack what is asked of it
            pending = [self._start_header(known, header, timeout_s)]
            if vector.numel():
                pending.append(known.allreduce([vector], options))
            del known, gloo  # see GlooConnections: the last reference must not die here
            self._wait_done(pending[0])
            joined_s = time.monotonic()
            self._wait_done(pending[-1])
            return joined_s, time.monotonic()

        what = megabytes(vector) if vector.numel() else "a header"
        times = self._guarded(both, f"all-reduce of {what}", timeout_s)
        self._bytes_sent += ring_bytes_sent(vector.nbytes + header.nbytes, self.world_size)
        return times

    def wait_all_to_all(
        self, header: Tensor, pieces: Tensor, received: Tensor, timeout_s: float
    ) -> tuple[float, float]:
        """See GroupWithPieces."""
        options = _timed(dist.AllToAllOptions(), timeout_s)

        def both(gloo: dist.ProcessGroupGloo) -> tuple[float, float]:
            known: Any = gloo
            told = self._start_header(known, header, timeout_s)
            exchanged = known.alltoall_base(received.view(-1), pieces.view(-1), [], [], options)
            del known, gloo  # as above
            self._wait_done(told)
            joined_s = time.monotonic()
            self._wait_done(exchanged)
            return joined_s, time.monotonic()

        times = self._guarded(both, f"all-to-all of {megabytes(pieces)}", timeout_s)
        self._bytes_sent += ring_bytes_sent(header.nbytes, self.world_size)
        self._bytes_sent += pieces_bytes_sent(pieces.nbytes, self.world_size)
        return times

    def _start_header(self, gloo: Any, header: Tensor, timeout_s: float) -> dist.Work:
        """Begins to fill in the other members' rows, which is the sum of a table that has but the own row.

        In one step, where Gloo's all-reduce takes 2(n-1), each of which has to wake threads on every rank.
        """
        if header.dim() != 2 or len(header) != self.world_size:
            return gloo.allreduce([header], _timed(dist.AllreduceOptions(), timeout_s))
        own_rows = header[self.rank].expand_as(header).contiguous()
        return gloo.alltoall_base(header, own_rows, [], [], _timed(dist.AllToAllOptions(), timeout_s))

    def wait_all_gather(self, piece: Tensor, received: Tensor, timeout_s: float) -> float:
        """See GroupWithPieces."""
        options = _timed(dist.distributed_c10d.AllgatherOptions(), timeout_s)

        def gathered(gloo: dist.ProcessGroupGloo) -> float:
            known: Any = gloo
            pending = known._allgather_base(received.view(-1), piece, options)
            del known, gloo  # as above
            self._wait_done(pending)
            return time.monotonic()

        arrived_s = self._guarded(gathered, f"all-gather of {megabytes(received)}", timeout_s)
        self._bytes_sent += pieces_bytes_sent(received.nbytes, self.world_size)
        return arrived_s

    def wait_broadcast(self, tensor: Tensor, source: int, timeout_s: float) -> None:
        """See Group."""
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor, options.timeout = source, 0, timedelta(seconds=timeout_s)
        self._guarded(
            lambda gloo: self._wait_done(gloo.broadcast([tensor], options)),
            f"broadcast of {megabytes(tensor)}",
            timeout_s,
        )

    def wait_exchange(self, topic: str, value: bytes, timeout_s: float) -> list[bytes]:
        """See Group."""
        keys = [f"{topic}/{rank}" for rank in self.members]
        begin_s = time.monotonic()
        pause_s = 0.002

        def left_s() -> float:
            return begin_s + timeout_s - time.monotonic()

        def put() -> None:
            self._store.set(keys[self.rank], value or b"-")  # pyright: ignore[reportArgumentType]  bytes are taken

        try:
            wait_answer(put, timeout_s)
            while not self._notices.holds(*keys, within_s=left_s()):
                # Asked for again and again, because torch's own wait prints a warning where it ends in a time-out.
                if left_s() < 0 or self._notices.is_there_trouble():
                    raise self._missing(topic, keys, time.monotonic() - begin_s)
                time.sleep(pause_s)
                pause_s = min(LOOK_S / 2, 1.5 * pause_s)
            values = wait_answer(lambda: [self._store.get(key) for key in keys], left_s())
        except (dist.DistError, RuntimeError, TimeoutError) as error:
            raise self._missing(topic, keys, time.monotonic() - begin_s) from error
        return [b"" if found == b"-" else found for found in values]

    def _missing(self, topic: str, keys: list[str], after_s: float) -> PeerError:
        where, after = f"rank {self.rank} of {self.world_size}: {topic}", f"after {after_s:.3g} s"
        missing = self._notices.missing(keys)
        if missing is None:
            return PeerError(
                f"{where}: the host of the store, rank 0 or its launcher, does not answer {after}; silent: 0. "
                "Is its process stopped, or its machine gone?"
            )
        if self.rank in missing:
            who = "the store is gone with its host, rank 0 or its launcher, whose own message says more,"
        else:
            who = f"nothing from {ranks_in_words(missing)}"
        return PeerError(
            f"{where}: {who} {after}.{self._notices.reasons()} "
            "Start all ranks, with the same WORLD_SIZE and MASTER_ADDR, within the time-out"
        )

    def wait_lane(self, timeout_s: float) -> GlooLane:
        """See GroupWithLane."""
        store = dist.PrefixStore("lane", self._store)
        connections = self._wait_connected(store, timeout_s)
        self._lane = GlooLane(connections, store, self.rank, self.world_size, timeout_s, self._notices)
        return self._lane

    def wait_mail(self, timeout_s: float) -> ZmqMail:
        """See GroupWithMail."""
        if self.world_size == 1:
            address = "127.0.0.1"
        else:
            address = own_address(os.environ.get("MASTER_ADDR", ""), os.environ.get("GLOO_SOCKET_IFNAME"))
        return ZmqMail(self.rank, self.world_size, address, lambda own: self.wait_exchange("mail", own, timeout_s))

    @property
    def bytes_sent(self) -> int:
        """See Group; the lane's included."""
        return self._bytes_sent + (self._lane.bytes_sent if self._lane is not None else 0)

    def leave(self, reason: str | None = None) -> None:
        """See Group. A rank that hosts the store stays up to two seconds for the others' last questions.

        Its process may end right after this, and the store with it.
        """
        if self._has_left:
            return
        self._has_left = True
        if self._lane is not None:
            self._lane.leave()
        if self._connections is not None:
            self._connections.leave()
        self._notices.leave(reason)

    def _guarded(self, collective: Callable, what: str, timeout_s: float):
        if self._connections is None:
            raise PeerError(f"{what}: this rank has left the group")
        return self._connections.wait_guarded(collective, what, timeout_s)

    def _wait_done(self, work: dist.Work) -> None:
        assert self._connections is not None
        self._connections.wait_done(work)


def _timed(options: Any, timeout_s: float) -> Any:
    options.timeout = timedelta(seconds=timeout_s)
    return options
