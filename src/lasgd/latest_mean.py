"""The latest mean of every element: what the mean's momentum reckons from, and a rank's drift.

m' is the mean of a fragment's parameters before the one that arrives, m. Where m' is not known yet, as in the first
cycle, there is neither momentum nor drift.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lasgd.window import Window

SCRATCH = 1 << 16
"""Elements at a time that a fragment's drift is computed from."""


class LatestMean:
    """(D,), of which the parameters' elements count. For the communicator; others only under the replica's lock."""

    def __init__(self, values: Tensor):
        """Takes over `values`, (D,), whatever is in them."""
        self._values = values
        self._known: set[int] = set()
        """Fragments of whose parameters `_values` holds the mean."""
        self._fragments = 0
        self._before: Tensor | None = None
        """m' of the fragment on its way, where whoever makes the means overwrites it: see `share`."""

    def cut(self, fragments: int, largest: int) -> None:
        """So many fragments from now on; they are known if all were."""
        is_whole = self._is_whole()
        self._fragments = fragments
        self._known = set(range(fragments)) if is_whole else set()
        self._before = None if self._before is None else self._values.new_empty(largest)
        self._scratch = self._values.new_empty(min(largest, SCRATCH))

    def share(self, values: Tensor, largest: int) -> None:
        """Takes (D,) that whoever makes the means keeps and changes, between `note` and `add_momentum` only."""
        assert values.device == self._values.device
        self._values = values
        self._before = self._values.new_empty(largest)

    def note(self, window: Window) -> None:
        """A round begins: keeps m' of this fragment, if its maker will overwrite it."""
        if self._before is not None:
            self._before[: window.parameter_end].copy_(self._of(window))

    def add_momentum(self, window: Window, mean: Tensor, momentum: float) -> None:
        """r <- r + momentum (m - m') ; m' <- m, of the parameters."""
        latest = self._of(window)
        before = latest if self._before is None else self._before[: window.parameter_end]
        if window.fragment.index in self._known:
            window.residual_parameters.add_(mean, alpha=momentum).sub_(before, alpha=momentum)
        if self._before is None:
            latest.copy_(mean)
        self._known.add(window.fragment.index)

    def drift(self, window: Window) -> float:
        """|s - m'| of what the window holds to be sent; NaN where m' is not known."""
        if window.fragment.index not in self._known:
            return math.nan
        latest, length = self._of(window), self._scratch.numel()
        squares = 0.0
        for at in range(0, window.parameter_end, length):
            end = min(at + length, window.parameter_end)
            part = torch.sub(window.sent[at:end], latest[at:end], out=self._scratch[: end - at])
            squares = squares + torch.dot(part, part)
        return math.sqrt(squares)

    def copy(self) -> Tensor:
        """(D,) on the CPU; NaN until every element has a mean."""
        return self._values.to("cpu", copy=True) if self._is_whole() else torch.full(self._values.shape, math.nan)

    def load(self, latest: Tensor) -> None:
        """Copies what `copy` has given. Before the first round only."""
        self._values.copy_(latest)
        # Buffers have no momentum, and whatever was there in their place.
        self._known = set() if bool(latest.isnan().all()) else set(range(self._fragments))

    def _is_whole(self) -> bool:
        return 0 < len(self._known) == self._fragments

    def _of(self, window: Window) -> Tensor:
        begin = window.fragment.begin
        return self._values[begin : begin + window.parameter_end]
