"""Post-local SGD: synchronous SGD first, local SGD after it.

Source: T. Lin, S. U. Stich, K. K. Patel, M. Jaggi, "Don't Use Large Mini-Batches, Use Local SGD" (2020), arXiv
1808.07217, section 3.

    first        g   = (1/n) sum_j g_j            every step, while progress < t' (see sync_sgd.py)
                 x_i <- optimizer(x_i, g)
    then         x_i <- optimizer(x_i, g_i)       H times
                 x_i <- (1/n) sum_j x_j           (see local_sgd.py)

t' is `synchronous_share`, H `pace.local_steps_between_rounds`. The paper switches where the learning rate falls for the
first time, half way. Difference with the paper: momentum that all ranks share after the first part goes on as each
rank's own. Difference with torch's PostLocalSGDOptimizer over DistributedDataParallel: in the first part the gradients
travel when the backward pass has ended, not during it.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

from lasgd.algorithms.requests import AllReduceMean, Answer, Gradient, Request, Update
from lasgd.errors import ConfigurationError
from lasgd.pace import Pace
from lasgd.replica import Replica


@dataclass(frozen=True)
class Settings:
    """Of post-local SGD."""

    synchronous_share: float = 0.5  # of the budget, 0 to 1

    def __post_init__(self) -> None:
        if not 0 <= self.synchronous_share <= 1:
            raise ConfigurationError(f"synchronous_share should be from 0 to 1, got {self.synchronous_share!r}")


def compute(replica: Replica, pace: Pace, settings: Settings) -> Generator[Request, Answer, None]:
    """The training thread's part."""
    while pace.end is None and pace.progress < settings.synchronous_share:
        yield Gradient()
        sent = replica.gradient()
        outcome = yield AllReduceMean(sent)
        pace.agree(outcome)
        replica.set_gradient(outcome)
        yield Update()
    while pace.end is None:
        for _ in range(pace.local_steps_between_rounds):
            yield Gradient()
            yield Update()
        fragment = replica.next_fragment(1)
        sent = replica.snapshot(fragment)
        outcome = yield AllReduceMean(sent)
        pace.agree(outcome)
        replica.adopt(fragment, outcome)
        replica.show_average()
