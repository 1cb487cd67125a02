"""Drives the algorithms' own generators in one thread: the test decides what happens next on which rank.

ranks = Ranks([model_0, model_1], samples=100)
ranks.step(0, gradient)          one local step of rank 0: Gradient, Update, step boundary
ranks.begin_round()              every rank takes its snapshot
ranks.deliver() / ranks.fail(e)  the round ends on every rank, one way or the other
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lasgd.algorithms import registry
from lasgd.algorithms.requests import AllReduceMean, Failure, Gradient, Mean, NextRound, Stop, Update
from lasgd.group.scripted import sum_in_order
from lasgd.pace import Column, Pace
from lasgd.replica import Replica
from lasgd.tally import Tally


class Ranks:
    """n replicas of one algorithm and the network between them."""

    def __init__(
        self,
        models: list[nn.Module],
        samples: int = 10**9,
        batch_size: int = 1,
        fragments: int | str = 1,
        algorithm: str = "lasgd",
        lr: float = 0.1,
        settings: dict | None = None,
        **pace_options,
    ):
        n = len(models)
        self.models, self.lr = models, lr
        self.tallies = [Tally(batch_size) for _ in models]
        first = 1 if fragments == "auto" else fragments
        text = registry.find(algorithm, settings)
        self.replicas = [
            Replica(model, tally, first, keeps_mean=text.keeps_mean)
            for model, tally in zip(models, self.tallies, strict=True)
        ]
        self.paces = [Pace(n, samples, fragments=fragments, **pace_options) for _ in models]
        self._compute = [text.compute(r, p) for r, p in zip(self.replicas, self.paces, strict=True)]
        self._communicate = [text.communicate(r, p) for r, p in zip(self.replicas, self.paces, strict=True)]
        for part in self._compute:
            assert isinstance(next(part), Gradient)
        self.pending = [next(part) for part in self._communicate]
        """What each communicator asks for; None where it has finished."""
        self.sent: list[Tensor] = []
        """Copies of the contributions of the round on its way."""
        self.round_parts = 0
        self.faults: list[tuple[int, Exception]] = []
        self.trace: list[tuple] = []

    @property
    def n(self) -> int:
        return len(self.models)

    def step(self, rank: int, gradient: Callable[[list[Tensor]], list[Tensor]] | None = None, step_s: float = 1.0):
        """One local step of plain SGD; without `gradient`, a step that changes nothing."""
        self.start_step(rank, gradient)()
        self.trace.append(("step", rank, vector(self.models[rank]).tolist()))

    def start_step(self, rank: int, gradient=None, step_s: float = 1.0) -> Callable[[], None]:
        """Takes the gradient now; the update and the step boundary when the result is called."""
        parameters = list(self.models[rank].parameters())
        grads = gradient([p.detach().clone() for p in parameters]) if gradient else None
        assert isinstance(self._compute[rank].send(None), Update)

        def finish() -> None:
            if grads is not None:
                with torch.no_grad():
                    for p, g in zip(parameters, grads, strict=True):
                        p.add_(g, alpha=-self.lr)
            tally = self.tallies[rank]
            tally.count_step(tally.boundary_s + step_s)
            assert isinstance(self._compute[rank].send(None), Gradient)

        return finish

    def begin_round(self) -> None:
        """Answers NextRound on every rank; each then asks for its mean."""
        for rank in range(self.n):
            if isinstance(self.pending[rank], NextRound):
                self._answer(rank, None)
        assert all(isinstance(asked, AllReduceMean) for asked in self.pending), self.pending
        self.round_parts = len(self.replicas[0].fragments)
        self.sent = [asked.sent.values.clone() for asked in self.pending]
        self.trace.append(("begin", [s.tolist() for s in self.sent]))

    def deliver(self, round_s: float = 0.0) -> None:
        """The mean arrives on every rank."""
        contributions = [asked.sent for asked in self.pending]
        weight = sum(c.weight for c in contributions)
        total = sum_in_order([c.values * c.weight if c.weight else c.values for c in contributions])
        headers = [
            self.paces[rank].header(
                rank, self.tallies[rank], c.weight, self.replicas[rank].health, round_s, self.round_parts
            )
            for rank, c in enumerate(contributions)
        ]
        header = sum_in_order(headers)
        assert header[:, Column.WEIGHT].sum() == weight
        self.trace.append(("mean", (total / max(weight, 1)).tolist()))
        for rank in range(self.n):
            self._answer(rank, Mean(total / weight if weight else None, header.clone()))

    def fail(self, error: Exception) -> None:
        """The round fails on every rank."""
        self.faults.append((self.paces[0].round + 1, error))
        for rank in range(self.n):
            self._answer(rank, Failure(error))

    def round(self, round_s: float = 0.0) -> None:
        """A round that nothing interrupts."""
        self.begin_round()
        self.deliver(round_s)

    def cycle(self) -> None:
        """One round of every fragment."""
        for _ in range(len(self.replicas[0].fragments)):
            self.round()

    def boundary(self) -> None:
        """A step that changes nothing on every rank, so that all that has arrived is shown."""
        for rank in range(self.n):
            self.step(rank)

    def end(self) -> None:
        """Delivers rounds until every communicator has finished, then shows the last exact average."""
        while any(asked is not None for asked in self.pending):
            self.round()
        for replica in self.replicas:
            replica.show_average()

    def close(self) -> None:
        for rank, asked in enumerate(self.pending):
            if isinstance(asked, NextRound):
                self._answer(rank, Stop())

    def z(self, rank: int) -> Tensor:
        """What the rank stands for: x + r of the parameters, float64, (d,)."""
        replica = self.replicas[rank]
        x = torch.cat([e.tensor().detach().double().reshape(-1) for e in replica.layout.entries])
        return x + replica.wait_residual(1.0).double()

    def sum_of_z(self) -> Tensor:
        return sum_in_order([self.z(rank) for rank in range(self.n)])

    def _answer(self, rank: int, answer) -> None:
        try:
            self.pending[rank] = self._communicate[rank].send(answer)
        except StopIteration:
            self.pending[rank] = None


class Point(nn.Module):
    """A model that is one parameter vector; rows of one element, so that it can be cut anywhere."""

    def __init__(self, values, dtype=torch.float32):
        super().__init__()
        self.x = nn.Parameter(torch.as_tensor(values, dtype=dtype).clone())

    def forward(self, target: Tensor) -> Tensor:
        return 0.5 * (self.x - target).square().sum()


def vector(model: nn.Module) -> Tensor:
    """All parameters, a flat copy."""
    return torch.cat([p.detach().reshape(-1).clone() for p in model.parameters()])


def towards(target) -> Callable[[list[Tensor]], list[Tensor]]:
    """The gradient of 0.5 |x - target|^2."""
    return lambda parameters: [p - torch.as_tensor(target, dtype=p.dtype) for p in parameters]
