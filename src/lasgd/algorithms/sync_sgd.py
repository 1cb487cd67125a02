"""Synchronous SGD: every step waits for the mean of all ranks' gradients.

Source: J. Chen, X. Pan, R. Monga, S. Bengio, R. Jozefowicz, "Revisiting Distributed Synchronous SGD" (2016), arXiv
1604.00981, without backup workers; the all-reduce of P. Goyal et al. (2017), arXiv 1706.02677.

    gradient     g_i of the own batch
    average      g   = (1/n) sum_j g_j            all-reduce; nobody goes on before it is there
    update       x_i <- optimizer(x_i, g)         the same on every rank, so the replicas never differ

n is `world_size`. Difference with the sources: buffers (BatchNorm's statistics) take the mean with the gradients.

Real runs may form the mean during the backward pass, by torch's DistributedDataParallel (runtime/parallel.py, and what
`lasgd train` does): when Gradient is answered the gradients already are the mean, `replica.gradient()` brings nothing
but its weight into the average, and `set_gradient` has nothing to do. The replicas are the same; buffers are then rank
0's, and NaN on one rank spreads to all.
"""

from __future__ import annotations

from collections.abc import Generator

from lasgd.algorithms.requests import AllReduceMean, Answer, Gradient, Request, Update
from lasgd.pace import Pace
from lasgd.replica import Replica


def compute(replica: Replica, pace: Pace) -> Generator[Request, Answer, None]:
    """The training thread's part."""
    while pace.end is None:
        yield Gradient()
        sent = replica.gradient()
        outcome = yield AllReduceMean(sent)
        pace.agree(outcome)
        replica.set_gradient(outcome)
        yield Update()
