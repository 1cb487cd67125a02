"""One rank's replica x and its residual r: what the rank stands for is z = x + r.

Two threads meet here, and nowhere else:

    thing                        written by                                    hands over
    model's tensors (x)          training thread                               never; the communicator only reads
    residual (r), `_holding`     communicator corrects, training thread shows  under `_lock`
    latest mean                  communicator                                  copied under `_lock`, for checkpoints
    flat buffers of a round      communicator                                  never

Why an unlocked, torn snapshot of x is harmless (design, section 1):
 1. s is some vector; element by element it was x at some moment of the snapshot.
 2. The correction adds m - s to r, never s itself, so z moves by exactly m - s whatever s was.
 3. With equal weights sum_i (m - s_i) = 0, so the sum of all z is moved by local steps only; one that fell into the
    snapshot, half or whole, stays in x.

Why r needs the lock: s = x + r is read in two passes. If the training thread moved r into x between them, r would be
counted twice or not at all. The lock is held for one pass over a fragment. The training thread only *tries* it: if the
communicator is in that pass, the correction is shown at the next step boundary instead, and nobody waits.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from enum import Enum

import torch
from torch import Tensor, nn

from lasgd.algorithms.requests import Contribution, Failure, Mean
from lasgd.errors import ConfigurationError, PeerError
from lasgd.fences import fences_for
from lasgd.health import DriftWatch, Health
from lasgd.latest_mean import LatestMean
from lasgd.layout import Fragment, Layout, Section
from lasgd.merge import Full, MergeRule
from lasgd.tally import Tally
from lasgd.window import Window


class Holding(Enum):
    """What a fragment of the residual holds."""

    EMPTY = "r = 0, whatever the memory says"
    CORRECTION = "z = x + r, with something new to show"
    REST = "z = x + r, shown already as far as x can show it"
    REPLACEMENT = "z = r, and x is to become r"


_UNSEEN = (Holding.CORRECTION, Holding.REPLACEMENT)


class Replica:
    """A model as the algorithms see it. Keeps references to the model's tensors.

    Changes them only where it shows something: in `merge`, `show_average` and `set_gradient`.
    """

    def __init__(
        self,
        model: nn.Module,
        tally: Tally,
        fragments: int = 1,
        rule: MergeRule | None = None,
        *,
        keeps_mean: bool = False,
    ):
        """`keeps_mean`: corrections may have momentum, which takes one more vector, the latest mean."""
        self.layout = Layout(model)
        self.tally = tally
        self.fences = fences_for(self.layout.device)
        self.on_recovery: Callable[[], None] = lambda: None
        """Called by the training thread when it has adopted the others' mean after it was sick."""
        self.deferred_merges = 0
        self._rule = rule or Full()
        self._lock = threading.Lock()
        self._residual = torch.zeros(self.layout.size, dtype=self.layout.dtype, device=self.layout.device)
        self._latest = LatestMean(torch.zeros_like(self._residual)) if keeps_mean else None
        self._extremes = tuple(torch.zeros((), dtype=self.layout.dtype, device=self.layout.device) for _ in range(2))
        self._arrived: list[int] = []
        self._to_adopt: set[int] = set()  # fragments that a sick rank has yet to take from the others
        self._health = Health.WELL
        self._watch = DriftWatch()
        self._is_recovering = False
        self._is_frozen = False
        self._sent_step = 0  # local steps at the latest snapshot: there is one round at a time
        self._cut(fragments)
        self.fences.merged()  # the communicator's first reading comes after all that has been set up here

    # The communicator's side

    def next_fragment(self, fragments: int) -> Fragment:
        """The fragment whose turn it is; a changed number of `fragments` takes effect when a cycle is complete."""
        self._turn = (self._turn + 1) % len(self.fragments)
        if self._turn == 0 and fragments != self._asked_fragments:
            self._recut(fragments)
        return self.fragments[self._turn]

    @torch.no_grad()
    def snapshot(self, fragment: Fragment) -> Contribution:
        """s = z of one fragment, a copy; zeros of weight 0 where this rank holds NaN or Inf or has run away.

        Never waits for the training thread's step: see the module's proof.
        """
        window = self._windows[fragment.index]
        with self.fences.communicating():
            with self._lock:
                self.fences.before_reading()
                holding = self._holding[fragment.index]
                if holding is Holding.REPLACEMENT:
                    window.sent.copy_(window.residual)
                elif holding is not Holding.EMPTY:
                    parameters, buffers = (Section.EXACT, Section.COARSE), (Section.BUFFER,)
                    window.copy_parts(window.sent_views, parameters)
                    window.sent_parameters.add_(window.residual_parameters)
                    if holding is Holding.CORRECTION:
                        window.sent_buffers.copy_(window.residual_buffers)
                    else:
                        window.copy_parts(window.sent_views, buffers)
                self._sent_step = self.tally.local_steps
            if holding is Holding.EMPTY:
                window.copy_parts(window.sent_views)
            if not self._to_adopt:
                self._examine(window)
            if self._to_adopt:
                window.sent.zero_()
            if self._latest is not None:
                self._latest.note(window)
            values = self._to_host(window)
        return Contribution(values, weight=0.0 if self._to_adopt else 1.0, begin=fragment.begin)

    @torch.no_grad()
    def correct(self, fragment: Fragment, sent: Contribution, outcome: Mean | Failure, momentum: float = 0.0) -> None:
        """r <- r + (m - s) + momentum (m - m'), m' the mean before; a rank of weight 0 takes m in place of r + (m - s).

        Where m' is not known yet, as in the first round, there is no momentum; buffers have none. A Failure changes
        nothing. Where no rank had a weight, one that has run away goes on after all: all have alike.
        """
        if isinstance(outcome, Failure):
            return
        if outcome.values is None:
            self._take_back()
            return
        window, index = self._windows[fragment.index], fragment.index
        with self.fences.communicating():
            mean = self._on_device(outcome.values)
            with self._lock:
                self.fences.before_reading()
                if self._holding[index] not in _UNSEEN:
                    self._snapshot_step[index] = self._sent_step
                if sent.weight == 0:
                    window.residual.copy_(mean)
                    self._holding[index] = Holding.REPLACEMENT
                    self._to_adopt.discard(index)
                    if not self._to_adopt:
                        self._is_recovering = True
                        self._arrived = list(range(len(self.fragments)))
                else:
                    if outcome.is_coded and self._host is not None:
                        window.sent.copy_(sent.values, non_blocking=True)
                    of_parameters = mean[: window.parameter_end] if window.has_buffers else mean
                    if self._holding[index] is Holding.EMPTY:
                        torch.sub(of_parameters, window.sent_parameters, out=window.residual_parameters)
                    else:
                        window.residual_parameters.add_(of_parameters).sub_(window.sent_parameters)
                    if window.has_buffers:
                        window.residual_buffers.copy_(mean[window.parameter_end :])
                    if self._holding[index] is not Holding.REPLACEMENT:
                        self._holding[index] = Holding.CORRECTION
                    if index not in self._arrived:
                        self._arrived.append(index)
                if momentum:
                    assert self._latest is not None, "made without keeps_mean"
                    self._latest.add_momentum(window, mean[: window.parameter_end], momentum)
                self.fences.corrected()
            self.fences.wait_copied()

    def _examine(self, window: Window) -> None:
        """Sits out from here on if what is to be sent is not finite, or too far from where it was."""
        if not self._is_finite(window.sent):
            self._health = Health.NOT_FINITE
        elif self._latest is None or self._is_frozen:  # of the end there may be no way back for all alike
            return
        elif self._watch.grew_too_much(window.fragment.index, self._latest.drift(window), self._sent_step):
            self._health = Health.RAN_AWAY
        else:
            return
        self._watch.forget()
        self._to_adopt = set(range(len(self.fragments)))

    def _take_back(self) -> None:
        if self._health is not Health.RAN_AWAY:
            return
        with self._lock:
            self._to_adopt.clear()
            self._arrived = [index for index, holding in enumerate(self._holding) if holding in _UNSEEN]

    def presence(self) -> Contribution:
        """Nothing but this rank's weight: 0 while it sits out. For rounds of the header alone."""
        return Contribution(self._buffer[:0], weight=float(not self._to_adopt))

    @torch.no_grad()
    def gradient(self) -> Contribution:
        """All gradients and, behind them, the buffers, a copy, (D,); a missing gradient counts as zeros.

        Zeros of weight 0 where something is NaN or Inf. Needs a vector in one fragment; by the thread that trains.
        """
        (window,) = self._windows
        with self.fences.communicating():
            self.fences.before_reading()
            for section in (Section.EXACT, Section.COARSE):
                for view, parameter in zip(window.sent_views[section], window.live(section), strict=True):
                    view.zero_() if parameter.grad is None else view.copy_(parameter.grad)
            window.copy_parts(window.sent_views, (Section.BUFFER,))
            is_finite = self._is_finite(window.sent)
            if not is_finite:
                window.sent.zero_()
            values = self._to_host(window)
        return Contribution(values, weight=float(is_finite), is_gradient=True)

    @torch.no_grad()
    def set_gradient(self, outcome: Mean | Failure) -> None:
        """g_i <- g, and the buffers' mean, in place; makes gradients that are missing. A Failure changes nothing."""
        if isinstance(outcome, Failure) or outcome.values is None:
            return
        (window,) = self._windows
        with self.fences.communicating():
            window.residual.copy_(self._on_device(outcome.values))
            self.fences.corrected()
            self.fences.wait_copied()
        self.fences.before_merge()
        for section in (Section.EXACT, Section.COARSE):
            for mean, parameter in zip(window.residual_views[section], window.live(section), strict=True):
                if parameter.grad is None:
                    parameter.grad = torch.empty_like(parameter)
                parameter.grad.copy_(mean)
        window.show_parts(window.residual_views, (Section.BUFFER,))
        self.fences.merged()

    def freeze(self) -> None:
        """From now on merges show nothing: the end is agreed, and x will become the last exact average."""
        with self._lock:
            self._is_frozen = True

    @torch.no_grad()
    def adopt(self, fragment: Fragment, outcome: Mean | Failure) -> None:
        """r <- m, to be shown by `show_average`; all elements of all ranks are then equal. A Failure changes nothing.

        For rounds that no local step overlaps: the agreed end, and algorithms that wait.
        """
        if isinstance(outcome, Failure) or outcome.values is None:
            return
        with self.fences.communicating(), self._lock:
            self._windows[fragment.index].residual.copy_(outcome.values)
            self._holding[fragment.index] = Holding.REPLACEMENT
            self._is_recovering |= fragment.index in self._to_adopt
            self._to_adopt.discard(fragment.index)
            self.fences.corrected()
            self.fences.wait_copied()

    # The training thread's side

    @torch.no_grad()
    def merge(self) -> None:
        """The step boundary: shows what has arrived since the last one. No network, no allocation, no waiting."""
        if not self._arrived:
            return
        if not self._lock.acquire(blocking=False):
            self.deferred_merges += 1
            return
        try:
            if self._is_frozen or self._to_adopt:
                return
            self.fences.before_merge()
            for index in self._arrived:
                self._show(index)
            self._arrived.clear()
            self.fences.merged()
            recovered, self._is_recovering = self._is_recovering, False
        finally:
            self._lock.release()
        if recovered:
            self.on_recovery()

    @torch.no_grad()
    def show_average(self) -> None:
        """x <- r, r <- 0, where an exact average has been adopted; then x is that average, bit for bit."""
        with self._lock:
            self.fences.before_merge()
            for window in self._windows:
                if self._holding[window.fragment.index] is Holding.REPLACEMENT:
                    window.show_parts(window.residual_views)
                    self._holding[window.fragment.index] = Holding.EMPTY
            self._arrived.clear()
            self.fences.merged()
            recovered, self._is_recovering = self._is_recovering, False
        if recovered:
            self.on_recovery()

    @torch.no_grad()
    def parameters(self) -> Tensor:
        """x as it is now, a new vector (D,) on the CPU, for evaluation. By the thread that trains."""
        flat = torch.empty(self.layout.size, dtype=self.layout.dtype)
        for entry in self.layout.entries:
            tensor = entry.tensor()
            flat[entry.begin : entry.end].view(tensor.shape).copy_(tensor)
        return flat

    def _show(self, index: int) -> None:
        window, holding = self._windows[index], self._holding[index]
        self.tally.staleness.add(self.tally.local_steps - self._snapshot_step[index])
        self._holding[index] = Holding.EMPTY
        if holding is Holding.REPLACEMENT:
            window.show_parts(window.residual_views)
            return
        if window.pieces[Section.EXACT]:
            self._rule.show(window.live(Section.EXACT), window.residual_views[Section.EXACT])
        if window.pieces[Section.COARSE]:
            self._rule.show_coarse(window.live(Section.COARSE), window.residual_views[Section.COARSE])
            window.residual[: window.exact_end].zero_()
            self._holding[index] = Holding.REST
        window.show_parts(window.residual_views, (Section.BUFFER,))

    # Before the first round, and for checkpoints

    @torch.no_grad()
    def wait_residual(self, timeout_s: float) -> Tensor:
        """A copy of z - x, (D,) on the CPU, as of now; zeros where x is about to be replaced. For checkpoints."""
        begin_s = time.monotonic()
        if not self._lock.acquire(timeout=timeout_s):
            raise PeerError(f"the communicator held the residual for more than {timeout_s:g} s")
        self.tally.waited_s += time.monotonic() - begin_s
        try:
            self.fences.before_merge()
            residual = self._residual.to("cpu", copy=True)
            for window, holding in zip(self._windows, self._holding, strict=True):
                begin, end = window.fragment.begin, window.fragment.end
                if holding in (Holding.EMPTY, Holding.REPLACEMENT):
                    residual[begin:end].zero_()
                else:
                    residual[begin + window.parameter_end : end].zero_()
        finally:
            self._lock.release()
        return residual

    @torch.no_grad()
    def load_residual(self, residual: Tensor) -> None:
        """Takes over the contents of a residual that `wait_residual` has given; before the first round only."""
        if residual.shape != self._residual.shape:
            raise ConfigurationError(
                f"the checkpoint's residual has {residual.numel()} elements, "
                f"this model's has {self._residual.numel()}; "
                "resume needs the model that the checkpoint was written with"
            )
        with self._lock:
            self._residual.copy_(residual)
            self._holding = [Holding.REST] * len(self.fragments)
            self._arrived = []
            self.fences.merged()

    def wait_latest_mean(self, timeout_s: float) -> Tensor | None:
        """A copy of the latest mean that momentum reckons from, (D,) on the CPU; NaN until every element has one.

        None where there is no momentum. For checkpoints.
        """
        if self._latest is None:
            return None
        begin_s = time.monotonic()
        if not self._lock.acquire(timeout=timeout_s):
            raise PeerError(f"the communicator held the latest mean for more than {timeout_s:g} s")
        self.tally.waited_s += time.monotonic() - begin_s
        try:
            self.fences.before_merge()
            return self._latest.copy()
        finally:
            self._lock.release()

    def share_mean(self, latest: Tensor) -> None:
        """Takes (D,) for the latest mean, which whoever makes the means keeps and changes: one copy serves both.

        It may be changed between `snapshot` and `correct` of a fragment, and there only. On the CPU; before the first
        round.
        """
        assert self._latest is not None, "made without keeps_mean"
        self._latest.share(latest, self._buffer.numel())

    def load_latest_mean(self, latest: Tensor) -> None:
        """Takes over what `wait_latest_mean` has given, the same on all ranks; before the first round only."""
        assert self._latest is not None, "made without keeps_mean"
        with self._lock:
            self._latest.load(latest)
            self.fences.merged()

    def sit_out(self) -> None:
        """Takes the others' mean for a cycle, as when it was stored; before the first round only."""
        self._health = Health.RAN_AWAY
        self._to_adopt = set(range(len(self.fragments)))

    @property
    def keeps_mean(self) -> bool:
        """Corrections may have momentum."""
        return self._latest is not None

    @property
    def is_frozen(self) -> bool:
        """The last exact average is being taken or has been: x will be replaced by it."""
        return self._is_frozen

    @property
    def is_sitting_out(self) -> bool:
        """This rank takes the others' mean, one cycle of fragments long."""
        return bool(self._to_adopt)

    @property
    def health(self) -> Health:
        """Why it is sitting out, if it is."""
        return self._health if self._to_adopt else Health.WELL

    # Cutting

    def _cut(self, fragments: int) -> None:
        self._asked_fragments = fragments
        self.fragments = self.layout.cut(fragments)
        largest = max(fragment.size for fragment in self.fragments)
        on_host = self.layout.device.type == "cpu"
        self._buffer = torch.empty(largest, dtype=self.layout.dtype, device=self.layout.device)
        self._host = None if on_host else self.fences.host_buffer(largest, self.layout.dtype)
        self._arriving = None if on_host else torch.empty_like(self._buffer)
        self._windows = [Window(fragment, self._residual, self._buffer) for fragment in self.fragments]
        if self._latest is not None:
            self._latest.cut(len(self.fragments), largest)
        self._holding = [Holding.EMPTY] * len(self.fragments)
        self._snapshot_step = [0] * len(self.fragments)
        self._turn = len(self.fragments) - 1

    @torch.no_grad()
    def _recut(self, fragments: int) -> None:
        """Cuts anew between two cycles; what the residual holds stays, and is shown at the next step boundary."""
        with self.fences.communicating(), self._lock:
            self.fences.before_reading()
            before = list(zip(self.fragments, self._holding, self._snapshot_step, strict=True))
            for window, holding in zip(self._windows, self._holding, strict=True):
                if holding is Holding.EMPTY:
                    window.residual[: window.parameter_end].zero_()
                if holding in (Holding.EMPTY, Holding.REST):  # z of a buffer is x, and a new fragment may mix the two
                    window.copy_parts(window.residual_views, (Section.BUFFER,))
            self._cut(fragments)
            self._watch.cut_anew([old for old, _, _ in before], self.fragments)
            self._turn = 0
            self._arrived = []
            for index, fragment in enumerate(self.fragments):
                within = [(h, step) for old, h, step in before if old.begin < fragment.end and fragment.begin < old.end]
                self._holding[index] = _joined({holding for holding, _ in within})
                unseen = [step for holding, step in within if holding in _UNSEEN]
                if unseen:
                    self._snapshot_step[index] = min(unseen)
                    self._arrived.append(index)
            if self._to_adopt:  # one cycle to sit out, from its beginning
                self._to_adopt = set(range(len(self.fragments)))
            self.fences.corrected()

    def _is_finite(self, values: Tensor) -> bool:
        # Both are NaN where anything is; far quicker than the largest absolute value, and allocates nothing.
        torch.aminmax(values, out=self._extremes)
        return all(math.isfinite(extreme.item()) for extreme in self._extremes)

    def _to_host(self, window: Window) -> Tensor:
        """What the window holds to be sent, in CPU memory."""
        if self._host is None:
            return window.sent
        values = self._host[: window.fragment.size].copy_(window.sent, non_blocking=True)
        self.fences.wait_copied()
        return values

    def _on_device(self, values: Tensor) -> Tensor:
        if self._arriving is None:
            return values
        return self._arriving[: values.numel()].copy_(values, non_blocking=True)


def _joined(holdings: set[Holding]) -> Holding:
    """What a fragment holds that was cut out of fragments that hold these; zeros in r stand for EMPTY."""
    if holdings == {Holding.EMPTY}:
        return Holding.EMPTY
    if Holding.REPLACEMENT in holdings:
        # Only where all are: a rank that has adopted a whole cycle shows all of it at one step boundary. While it is
        # still adopting, it contributes nothing and shows nothing, and takes every fragment anew.
        return Holding.REPLACEMENT
    return Holding.CORRECTION if Holding.CORRECTION in holdings else Holding.REST
