"""Letters between ranks over ZeroMQ: for each box a socket that all others push into.

ZeroMQ connects, queues and takes turns among the senders; whether a rank is still alive is the group's business, not
the mail's. A letter is two frames, a head and the values' bytes; nothing is unpickled. Its first bytes are the
receiver's secret, which ranks tell each other through the group's store: what does not begin with it is dropped.
"""

from __future__ import annotations

import json
import secrets
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import psutil
import torch
import zmq
from torch import Tensor

from lasgd.errors import PeerError
from lasgd.group.base import Letter

BOXES = 2
"""Of each rank."""

_HEAD = struct.Struct("<16siidqd")  # secret, source, dtype, weight, note, due_s
_DTYPES = (None, torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class _Entry:
    """How to write to a rank."""

    address: str
    ports: list[int]
    secret: str


class ZmqMail:
    """See Mail."""

    def __init__(self, rank: int, world_size: int, address: str, exchange: Callable[[bytes], Sequence[bytes]]):
        """Listens on `address`; `exchange` tells all ranks' values to all. Raises PeerError where it cannot listen."""
        self.bytes_sent = 0
        self._rank, self._secret = rank, secrets.token_bytes(16)
        self._context = zmq.Context(io_threads=1)
        self._boxes = [self._socket(zmq.PULL) for _ in range(BOXES)]
        self._waiting: list[deque[Letter]] = [deque() for _ in range(BOXES)]
        self._outgoing: dict[tuple[int, int], zmq.Socket] = {}
        self._sending = threading.Lock()
        self._has_left = False
        try:
            ports = [self._listen(box, socket, address) for box, socket in enumerate(self._boxes)]
            own = json.dumps({"address": address, "ports": ports, "secret": self._secret.hex()})
            self._directory = [_Entry(**json.loads(text)) for text in exchange(own.encode())]
        except BaseException:
            self.leave()
            raise
        if len(self._directory) != world_size:
            raise PeerError(f"rank {rank} of {world_size}: {len(self._directory)} ranks have told where they listen")

    def _socket(self, kind: int) -> zmq.Socket:
        made = self._context.socket(kind)
        made.setsockopt(zmq.LINGER, 0)
        made.setsockopt(zmq.IPV6, 1)
        made.set_hwm(0)  # algorithms wait for answers; what they send in between is a letter or two
        return made

    def _listen(self, box: int, socket: zmq.Socket, address: str) -> int:
        try:
            port = socket.bind_to_random_port(f"tcp://{_in_url(address)}")
        except zmq.ZMQError as error:
            raise PeerError(
                f"rank {self._rank}: cannot listen on {address} for other ranks' messages: {error}. "
                "GLOO_SOCKET_IFNAME names the interface to use"
            ) from error
        socket.bind(f"inproc://box-{box}")  # for letters to oneself
        return port

    def send(self, peer: int, box: int, values: Tensor | None, weight: float, note: int, due_s: float = 0.0) -> None:
        """See Mail."""
        there = self._directory[peer]
        dtype = 0 if values is None else _DTYPES.index(values.dtype)
        head = _HEAD.pack(bytes.fromhex(there.secret), self._rank, dtype, weight, note, due_s)
        frames = [head] if values is None else [head, values.contiguous().view(torch.uint8).numpy().data]
        with self._sending:
            if self._has_left:
                return
            if peer != self._rank:
                self.bytes_sent += len(head) + (0 if values is None else values.nbytes)
            self._socket_to(peer, box).send_multipart(frames, copy=True)

    def _socket_to(self, peer: int, box: int) -> zmq.Socket:
        if (peer, box) not in self._outgoing:
            made = self._outgoing[peer, box] = self._socket(zmq.PUSH)
            there = self._directory[peer]
            url = f"tcp://{_in_url(there.address)}:{there.ports[box]}"
            made.connect(f"inproc://box-{box}" if peer == self._rank else url)
        return self._outgoing[peer, box]

    def wait_receive(self, box: int, peer: int | None, timeout_s: float) -> Letter | None:
        """See Mail."""
        waiting, socket = self._waiting[box], self._boxes[box]
        for index, letter in enumerate(waiting):
            if peer in (None, letter.source):
                del waiting[index]
                return letter
        deadline_s = time.monotonic() + timeout_s
        while socket.poll(max(0, round((deadline_s - time.monotonic()) * 1000))):
            letter = self._opened(socket.recv_multipart(copy=False))
            if letter is None:
                continue
            if peer in (None, letter.source):
                return letter
            waiting.append(letter)
        return None

    def _opened(self, frames: Sequence[zmq.Frame]) -> Letter | None:
        """The letter; None for what no rank of this run has sent."""
        if len(frames[0].buffer) != _HEAD.size:
            return None
        secret, source, dtype, weight, note, due_s = _HEAD.unpack(frames[0].buffer)
        if not secrets.compare_digest(secret, self._secret) or not 0 <= source < len(self._directory):
            return None
        values = None
        if dtype:
            values = torch.frombuffer(bytearray(frames[1].buffer), dtype=_DTYPES[dtype])
        return Letter(source, values, weight, note, due_s)

    def leave(self) -> None:
        """See Mail."""
        with self._sending:
            if self._has_left:
                return
            self._has_left = True
            for made in (*self._boxes, *self._outgoing.values()):
                made.close()
        self._context.term()


def own_address(towards: str, interface: str | None) -> str:
    """The address under which other ranks reach this one: that of `interface`, else the one on the way to `towards`.

    Raises PeerError where there is none.
    """
    if interface:
        addresses = psutil.net_if_addrs().get(interface, [])
        for family in (socket.AF_INET, socket.AF_INET6):
            for address in addresses:
                if address.family == family:
                    return address.address.partition("%")[0]
        raise PeerError(f"the network interface {interface!r} (GLOO_SOCKET_IFNAME) has no address on this machine")
    try:
        family, kind, protocol, _, there = socket.getaddrinfo(towards, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(there)  # sends nothing: asks the system for the way
            return probe.getsockname()[0]
    except OSError as error:
        raise PeerError(f"no way from this machine to {towards} (MASTER_ADDR): {error.strerror or error}") from error


def _in_url(address: str) -> str:
    return f"[{address}]" if ":" in address else address
