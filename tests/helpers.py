"""Ranks as threads over a scripted network, with a hard limit on how long a test may wait."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import lasgd
from lasgd.group.scripted import Network

LIMIT_S = 20.0


def wait_all(targets: list[Callable[[], Any]], timeout_s: float = LIMIT_S) -> list[Any]:
    """Runs all targets in threads of their own; their results, or the exceptions they ended with."""
    results: list[Any] = [TimeoutError("never ended")] * len(targets)

    def run(index: int) -> None:
        try:
            results[index] = targets[index]()
        except BaseException as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(len(targets))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout_s)
    return results


def raise_any(results: list[Any]) -> list[Any]:
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def alone(model: nn.Module, optimizer, **options) -> lasgd.Averaging:
    """attach as the only rank of a network that delivers at once."""
    options = {"samples": 10**9, "batch_size": 1, "fragments": 1, "timeout_s": LIMIT_S, **options}
    return lasgd.attach(model, optimizer, group=Network(1, deliver_at_once=True).group(0), **options)


def small_model(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))


def batch(seed: int, size: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 4, generator=generator), torch.randn(size, 2, generator=generator)


def train_step(model: nn.Module, optimizer, seed: int) -> None:
    x, y = batch(seed)
    nn.functional.mse_loss(model(x), y).backward()
    optimizer.step()
    optimizer.zero_grad()


def run_attached(
    n: int, algorithm: str, loop: Callable[..., None], network: Network | None = None, **options
) -> list[Any]:
    """loop(rank, model, averaging, optimizer) on every rank, each in a thread, from attach to the end.

    (model, averaging) of each, or what it raised.
    """
    network = network or Network(n, deliver_at_once=True)
    models = [small_model(seed=r) for r in range(n)]  # not in the threads, which share torch's generator
    options = {"samples": 24, "batch_size": 1, "timeout_s": LIMIT_S, "algorithm": algorithm, **options}

    def rank(r: int) -> tuple[nn.Module, lasgd.Averaging]:
        model = models[r]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        averaging = lasgd.attach(model, optimizer, group=network.group(r), **options)
        try:
            with averaging:
                loop(r, model, averaging, optimizer)
        finally:
            averaging.close()
        return model, averaging

    return wait_all([lambda r=r: rank(r) for r in range(n)])


def until_finished(r: int, model: nn.Module, averaging: lasgd.Averaging, optimizer) -> None:
    """A loop that trains on batches of its own."""
    while not averaging.finished:
        train_step(model, optimizer, seed=100 * r + averaging.tally.local_steps)


def values(model: nn.Module) -> torch.Tensor:
    """All parameters, one after the other."""
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])
