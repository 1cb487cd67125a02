"""Small quadratics on a virtual cluster: runs whose end can be reckoned by hand.

    run = Run("ad_psgd", targets=[[0.0], [4.0]], steps=200, lr=0.1)
    run.x(0), run.ranks[0].tally, run.of(0, "compute")

Rank i descends 0.5 |x - target_i|^2; the optimum of the mean is the mean of the targets.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from lasgd.algorithms import registry
from lasgd.pace import Pace
from lasgd.replica import Replica
from lasgd.tally import Tally
from lasgd.virtual.cluster import Cluster, Rank
from lasgd.virtual.network_models import Network
from lasgd.virtual.process import Moment
from lasgd.wire import wire as wire_named
from scripted_driver import Point

Rate = float | Callable[[float], float]
"""A learning rate, or one of progress, 0 to 1."""


class Descent:
    """SGD of torch on one rank's quadratic. The `Work` of a virtual rank."""

    def __init__(self, model: Point, target: Tensor, lr: Rate, momentum: float = 0.0, poison_at: int = -1):
        self.model, self.target, self.poison_at = model, target, poison_at
        self.rate = lr if callable(lr) else lambda progress: lr
        self.optimizer = torch.optim.SGD(model.parameters(), lr=self.rate(0.0), momentum=momentum)
        self.gradients = self.updates = 0
        self.progress: list[float] = []
        self.points: list[Tensor] = []
        """Where the gradients were taken."""

    def begin(self) -> None:
        pass

    def gradient(self) -> None:
        self.gradients += 1
        self.points.append(self.model.x.detach().clone())
        self.optimizer.zero_grad()
        self.model(self.target).backward()

    def update(self, progress: float) -> None:
        self.updates += 1
        self.progress.append(progress)
        self.optimizer.param_groups[0]["lr"] = self.rate(progress)
        self.optimizer.step()
        if self.updates == self.poison_at:
            with torch.no_grad():
                self.model.x[0] = math.nan


def decaying(lr: float) -> Callable[[float], float]:
    """To nothing in a straight line."""
    return lambda progress: lr * (1 - progress)


class Run:
    """A cluster that has run, its replicas and its trace."""

    def __init__(
        self,
        algorithm: str,
        targets: Sequence[Sequence[float]],
        *,
        steps: int,
        lr: Rate = 0.1,
        start: Sequence[Sequence[float]] | None = None,
        step_s: float | Sequence[float] | Sequence[Iterator[float]] = 1.0,
        network: Network | None = None,
        round_s: float = 0.1,
        settings: dict[str, Any] | None = None,
        steps_per_round: float = 1.0,
        momentum: float = 0.0,
        poison: tuple[int, int] | None = None,
        dtype: torch.dtype = torch.float64,
        means: Any = None,
        evaluations: int = 0,
        stop_at_s: float | None = None,
        wire: str = "fp32",
    ):
        """`steps`: of each rank, were all equally fast. `poison`: (rank, update after which it holds NaN).

        `stop_at_s` cuts the run off at that moment, without a last exact average.
        """
        text, n = registry.find(algorithm, settings), len(targets)
        begin = start or [[0.0] * len(targets[0])] * n
        self.models = [Point(values, dtype) for values in begin]
        self.replicas = [
            Replica(model, Tally(1, rank), keeps_mean=text.keeps_mean) for rank, model in enumerate(self.models)
        ]
        self.works = [
            Descent(
                model, torch.tensor(target, dtype=dtype), lr, momentum, poison[1] if poison and poison[0] == r else -1
            )
            for r, (model, target) in enumerate(zip(self.models, targets, strict=True))
        ]
        for replica, work in zip(self.replicas, self.works, strict=True):
            replica.on_recovery = work.optimizer.state.clear
        each = [step_s] * n if isinstance(step_s, int | float) else step_s
        self.ranks = [
            Rank(replica, repeat(duration) if isinstance(duration, int | float) else duration, work)
            for replica, work, duration in zip(self.replicas, self.works, each, strict=True)
        ]
        self.paces = [
            Pace(n, n * steps, steps_per_round, evaluations=evaluations) for _ in range(1 if text.agrees else n)
        ]
        self.trace: list[tuple[int, str, float, float]] = []
        self.cluster = Cluster(
            text.compute,
            text.communicate,
            self.ranks,
            self.paces,
            lambda n_bytes, share: round_s * share,
            self.models[0].x.nbytes,
            lambda *event: self.trace.append(event),
            means=means,
            exchange=text.exchange,
            messages_over=(network or Network(n, math.inf)) if text.writes_messages else None,
            wire=wire_named(wire),
        )
        if stop_at_s is not None:
            self.cluster.clock.at(stop_at_s, Moment(lambda moment: self.cluster.stop()))
        self.cluster.run()

    def x(self, rank: int) -> Tensor:
        """The rank's parameters, (d,)."""
        return self.models[rank].x.detach()

    @property
    def xs(self) -> Tensor:
        """All ranks', (n, d)."""
        return torch.stack([model.x.detach() for model in self.models])

    def of(self, rank: int, kind: str) -> list[tuple[float, float]]:
        """The rank's intervals of one kind, to a nanosecond."""
        return [(round(b, 9), round(e, 9)) for r, k, b, e in self.trace if (r, k) == (rank, kind)]

    @property
    def steps(self) -> list[int]:
        """Local steps by rank."""
        return [rank.tally.local_steps for rank in self.ranks]
