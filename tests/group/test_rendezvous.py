"""How ranks without a launcher find each other: through a store that rank 0's process hosts."""

from __future__ import annotations

import gc
import socket
from datetime import timedelta

import pytest
import torch.distributed as dist

from lasgd.group import c10d

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
