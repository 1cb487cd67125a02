"""How ranks without a launcher find each other: through a store that rank 0's process hosts."""

from __future__ import annotations

import gc
import os
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta

import psutil
import pytest
import torch.distributed as dist

from helpers import raise_any, wait_all
from lasgd.errors import ConfigurationError, PeerError
from lasgd.group import c10d, notices
from lasgd.group.c10d import C10dGroup

LIMIT_S = 20.0


@pytest.fixture
def port(monkeypatch) -> int:
    """A free port, which the environment names as that of rank 0's store; of two ranks this process is rank 0."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    for name in ("TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, str(value))
    return port


def client(port: int) -> dist.TCPStore:
    return dist.TCPStore("127.0.0.1", port, 2, False, timedelta(seconds=LIMIT_S), wait_for_workers=False)


def test_the_store_outlives_the_averaging_that_made_it_for_whoever_has_come_for_the_next(port):
    # 1. rank 0 attaches and is done; 2. rank 1 is early and meets the old server; 3. rank 0 drops its first
    # averaging, and the server would go with it; 4. rank 0 attaches again.
    *_, store, hosts_store = c10d._rendezvous(LIMIT_S)
    assert hosts_store
    early = client(port)
    del store
    gc.collect()
    early.set("rank 1", "is here")
    *_, store, hosts_store = c10d._rendezvous(LIMIT_S)
    assert hosts_store
    assert store.get("rank 1") == b"is here"


def test_a_listener_that_never_answers_is_no_store(port, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(c10d, "ANSWER_S", 0.5)
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", port))
        mute.listen()
        with pytest.raises(
            PeerError, match=f"rank 1 of 2: no answer from rank 0's store at 127.0.0.1:{port} within 0.5"
        ):
            c10d._rendezvous(0.5)


def test_a_store_of_the_launcher_that_nobody_hosts_is_called_so(port, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    with pytest.raises(PeerError, match=r"rank 0 of 2: no answer from the launcher's store .* Is torchrun on"):
        c10d._rendezvous(0.5)


def test_rank_0_that_cannot_reach_its_own_store_is_told_so(port, monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "no-such-host.invalid")
    with pytest.raises(ConfigurationError, match=r"rank 0 of 2: cannot reach its own store at no-such-host\.invalid"):
        c10d._rendezvous(0.5)


HOST = """
import sys, time
from datetime import timedelta
import torch.distributed as dist
store = dist.TCPStore("127.0.0.1", int(sys.argv[1]), 2, True, timedelta(seconds=20), wait_for_workers=False)
time.sleep(100)
"""


class StopsItsHost:
    """A store whose host stands still, as in SIGSTOP, from just before the first call of `operation` on."""

    def __init__(self, store: dist.Store, operation: str, host: int):
        self._store, self._operation, self._host = store, operation, host

    def __getattr__(self, name: str):
        if name == self._operation:
            os.kill(self._host, signal.SIGSTOP)
            while psutil.Process(self._host).status() != psutil.STATUS_STOPPED:
                time.sleep(0.001)  # it may go on, and answer, for a moment
        return getattr(self._store, name)


@pytest.mark.processes
def test_an_exchange_ends_in_time_when_the_host_of_the_store_stands_still(port):
    host = subprocess.Popen([sys.executable, "-c", HOST, str(port)])
    try:
        joins = [
            lambda rank=rank: C10dGroup(dist.PrefixStore("run", client(port)), rank, 2, LIMIT_S) for rank in range(2)
        ]
        groups = raise_any(wait_all(joins))
        for operation in ("get", "set"):
            for group in groups:
                group._store = StopsItsHost(group._store, operation, host.pid)
            begin_s = time.monotonic()
            errors = wait_all(
                [lambda group=group, topic=operation: group.wait_exchange(topic, b"", 1.0) for group in groups]
            )
            assert time.monotonic() - begin_s < 1.0 + notices.ANSWER_S + 1.0  # one more question: who is missing
            for rank, error in enumerate(errors):
                assert isinstance(error, PeerError)
                words = f"rank {rank} of 2: {operation}: the host of the store, rank 0 or its launcher, does not answer"
                assert words in str(error)
            os.kill(host.pid, signal.SIGCONT)
        for group in groups:
            group.leave()
    finally:
        host.kill()
        host.communicate()
