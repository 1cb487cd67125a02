"""The peers by name, and where each comes from."""

from __future__ import annotations

import importlib
import importlib.metadata
from dataclasses import dataclass
from types import ModuleType

from lasgd.errors import ConfigurationError, unknown


@dataclass(frozen=True)
class Peer:
    """One library's way to train on several machines."""

    module: str
    package: str
    """What must be installed."""
    version: str | None = None
    """The one that is measured; None: whatever PyTorch there is."""


PEERS = {
    peer.module: peer
    for peer in (
        Peer("torch_ddp", "torch"),
        Peer("torch_post_local_sgd", "torch"),
        Peer("torchft_local_sgd", "torchft", "0.2.0"),
        Peer("torchft_diloco", "torchft", "0.2.0"),
        Peer("hivemind_optimizer", "hivemind", "1.1.12"),
    )
}


def installed_version(package: str) -> str | None:
    """None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def why_not(name: str) -> str | None:
    """Why the peer cannot run here, in words for the user; None where it can. Raises ConfigurationError: unknown."""
    if name not in PEERS:
        raise unknown("peer", name, PEERS)
    peer = PEERS[name]
    found = installed_version(peer.package)
    if peer.version is None or found == peer.version:
        return None
    what = "which is not installed here" if found is None else f"and {found} is installed here"
    return (
        f"peer {name} is {peer.package} {peer.version}, {what}. Install it: "
        "pip install -c constraints.txt -r benchmarks/peers/requirements.txt"
    )


def load(name: str) -> ModuleType:
    """The peer's module: `Options` and `train`. Raises ConfigurationError where it cannot run here."""
    if (reason := why_not(name)) is not None:
        raise ConfigurationError(reason)
    return importlib.import_module(f"peers.{name}")
