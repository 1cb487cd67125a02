"""Train one PyTorch model on many unequal machines without any of them ever waiting."""

from lasgd.errors import ConfigurationError, DataError, DivergenceError, LasgdError, PeerError, ProtocolError
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
