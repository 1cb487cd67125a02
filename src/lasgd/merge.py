"""Merge rules: how much of a correction the replica shows at the step boundary.

A rule works on one fragment, on the training thread, in place, and allocates nothing. x are the replica's parameters,
r the residual:

    full        x <- x + r ;  r <- 0

Source: arXiv 2203.13085 describes averaging whole replicas; `full` is that, shown as soon as a step boundary comes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor

from lasgd.errors import unknown


class MergeRule(Protocol):
    """What a rule must offer."""

    name: str

    def show(self, parameters: list[Tensor], residuals: list[Tensor]) -> None:
        """Parameters of the residual's precision. The caller holds the residual to be zero afterwards."""
        ...

    def show_coarse(self, parameters: list[Tensor], residuals: list[Tensor]) -> None:
        """Parameters of a lower precision: leaves in the residual what their rounding did not show."""
        ...


class Full:
    """x <- x + r ; r <- 0. Shows everything at once."""

    name = "full"

    def show(self, parameters: list[Tensor], residuals: list[Tensor]) -> None:
        """x <- x + r."""
        torch._foreach_add_(parameters, residuals)

    def show_coarse(self, parameters: list[Tensor], residuals: list[Tensor]) -> None:
        """x <- round(x + r) ; r <- (x + r) - round(x + r), computed in r itself."""
        torch._foreach_add_(residuals, parameters)
        torch._foreach_copy_(parameters, residuals)
        torch._foreach_sub_(residuals, parameters)


_RULES = {rule.name: rule for rule in (Full,)}


def names() -> Iterable[str]:
    """The names that `--merge` takes."""
    return tuple(_RULES)


def rule(name: str) -> MergeRule:
    """A new rule by name. Raises ConfigurationError with the nearest known name."""
    if not isinstance(name, str) or name not in _RULES:
        raise unknown("merge rule", name, _RULES)
    return _RULES[name]()
