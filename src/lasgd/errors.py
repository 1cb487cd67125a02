"""Every error that lasgd raises on purpose, split by who can mend it.

    LasgdError
    ├── ConfigurationError      you, before the run: an option, a folder, a model, a condition
    │   └── DataError           you: images that cannot be used
    ├── DivergenceError         you, during the run: every rank holds NaN or Inf
    ├── PeerError               another rank: lost, late, or of another opinion
    └── ProtocolError           nobody but us: a bug in lasgd

A message says what happened, where (rank, round), what was expected and what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LasgdError(Exception):
    """The root of the tree; catching it catches all of lasgd's own errors."""


class ConfigurationError(LasgdError):
    """Something in the set-up cannot work; found before the first local step."""


class DataError(ConfigurationError):
    """Images or their folders cannot be used."""


class DivergenceError(LasgdError):
    """Every rank holds NaN or Inf, so no mean is left to recover from."""


class PeerError(LasgdError):
    """Another rank is lost, late, or disagrees."""


class ProtocolError(LasgdError):
    """An event that the state table does not allow: a bug in lasgd, please report it."""


def unknown(kind: str, name: object, known: Iterable[str], error: type[LasgdError] = ConfigurationError) -> LasgdError:
    """Returns (does not raise) the error for a `name` that is none of `known`, with the nearest known name."""
    known = sorted(known)
    nearest = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
    return error(f"{kind} {name!r} is not known. Known: {', '.join(known)}.{hint}")
