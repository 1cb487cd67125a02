"""Train one PyTorch model on many unequal machines without any of them ever waiting."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lasgd.errors import ConfigurationError, DataError, DivergenceError, LasgdError, PeerError, ProtocolError

if TYPE_CHECKING:
    from lasgd.runtime.attach import attach
    from lasgd.runtime.averaging import Averaging

__version__ = "0.1.0"

__all__ = [
    "Averaging",
    "ConfigurationError",
    "DataError",
    "DivergenceError",
    "LasgdError",
    "PeerError",
    "ProtocolError",
    "__version__",
    "attach",
]


def __getattr__(name: str) -> Any:
    # torch is loaded when it is needed, so that `lasgd --help` answers at once (PEP 562)
    if name == "attach":
        from lasgd.runtime.attach import attach

        return attach
    if name == "Averaging":
        from lasgd.runtime.averaging import Averaging

        return Averaging
    raise AttributeError(f"module 'lasgd' has no attribute {name!r}")
