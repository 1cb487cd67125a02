"""The step boundary of an ordinary training loop, found through its optimizers' hooks."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lasgd.errors import ConfigurationError

WARN_AFTER_STEPS = 100


class OptimizerHooks:
    """Calls `before()` when a gradient is complete and `after(skipped)` at the step boundary.

    With several optimizers both come once per turn, a turn being complete when each of them has stepped: between two
    of them the graph of a forward pass may be alive, and changing parameters would break its backward.

    A step that raises has no post hook; the turn then goes on with the retry. `skipped` counts the turns up to now
    that a GradScaler had all of the (fused) optimizers skip, and that have not been reported yet.
    """

    def __init__(self, optimizers: Sequence[Optimizer], before: Callable[[], None], after: Callable[[int], None]):
        check_optimizers(optimizers)
        self._before, self._after = before, after
        self._has_stepped = dict.fromkeys(map(id, optimizers), False)
        self._is_turn_open = False
        self._stepping: set[int] = set()
        self._steps_without_boundary = 0
        self._skipped = SkippedTurns()
        self._found_inf: list[Tensor | None] = []
        self._handles = []
        # Where `optimizer.step` is compiled its hooks would be too, clocks and locks within them.
        pre: Any = torch.compiler.disable(self._on_pre)
        post: Any = torch.compiler.disable(self._on_post)
        for optimizer in optimizers:
            self._handles.append(optimizer.register_step_pre_hook(pre))
            self._handles.append(optimizer.register_step_post_hook(post))

    def boundary(self) -> None:
        """Ends the turn now, whoever has stepped: for loops whose steps run no hooks (CUDA graphs)."""
        self._open_turn()
        self._close_turn()

    def remove(self) -> None:
        """Leaves the optimizers as they were. May be called twice."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _on_pre(self, optimizer: Optimizer, args, kwargs) -> None:
        self._stepping.add(id(optimizer))
        self._open_turn()

    def _on_post(self, optimizer: Optimizer, args, kwargs) -> None:
        if id(optimizer) not in self._stepping:
            return  # a subclass whose step calls its parent's: torch runs the hooks for both, pre, pre, post, post
        self._stepping.discard(id(optimizer))
        self._found_inf.append(getattr(optimizer, "found_inf", None))
        self._has_stepped[id(optimizer)] = True
        if all(self._has_stepped.values()):
            self._close_turn()
            return
        self._steps_without_boundary += 1
        if self._steps_without_boundary == WARN_AFTER_STEPS:
            idle = [i for i, stepped in enumerate(self._has_stepped.values()) if not stepped]
            warnings.warn(
                f"no step boundary in {WARN_AFTER_STEPS} optimizer steps: optimizer {idle} of those given to "
                "lasgd.attach does not step. Attach only what steps, or call averaging.step_boundary() yourself",
                stacklevel=2,
            )

    def _open_turn(self) -> None:
        if not self._is_turn_open:
            self._is_turn_open = True
            self._before()

    def _close_turn(self) -> None:
        self._is_turn_open = False
        self._steps_without_boundary = 0
        self._has_stepped = dict.fromkeys(self._has_stepped, False)
        self._skipped.note(self._found_inf)
        self._found_inf.clear()
        self._after(self._skipped.take())


class SkippedTurns:
    """How many turns a GradScaler skipped inside fused optimizers: it leaves `found_inf` on each of them.

    On a GPU the flag is copied to pinned memory and read when it has arrived, at a later step: nothing waits.
    """

    def __init__(self) -> None:
        self._count = 0
        self._travelling: deque[tuple[torch.cuda.Event, Tensor]] = deque()

    def note(self, flags: Sequence[Tensor | None]) -> None:
        """Takes in the flags of one turn's steps; None where no GradScaler is at work."""
        given = [flag for flag in flags if flag is not None]
        if not given or len(given) < len(flags):
            return
        found_inf = given[0] if len(given) == 1 else torch.stack([flag.reshape(()) for flag in given]).amin()
        if not found_inf.is_cuda:
            self._count += bool(found_inf.item())
            return
        host = torch.empty((), dtype=found_inf.dtype, pin_memory=True)
        host.copy_(found_inf.reshape(()), non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._travelling.append((event, host))

    def take(self) -> int:
        """Skipped turns that have become known since the last call."""
        while self._travelling and self._travelling[0][0].query():
            self._count += bool(self._travelling.popleft()[1].item())
        count, self._count = self._count, 0
        return count


def check_optimizers(optimizers: Sequence[Optimizer]) -> None:
    """Raises ConfigurationError for what has no step boundary that hooks could find."""
    for optimizer in optimizers:
        _check(optimizer)
    if len(set(map(id, optimizers))) < len(optimizers):
        raise ConfigurationError("an optimizer is given twice; its step would count as two step boundaries")


def _check(optimizer: Optimizer) -> None:
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ConfigurationError(
            "LBFGS evaluates its closure many times within one step and keeps a history of differences that averaging "
            "would falsify; use a first-order optimizer"
        )
    if not isinstance(optimizer, Optimizer):
        raise ConfigurationError(
            f"expected a torch.optim.Optimizer, got {type(optimizer).__name__}; a wrapper's inner optimizer will do"
        )
