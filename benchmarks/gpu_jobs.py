"""Small training jobs, each with something that averaging on a GPU must survive. Deterministic in (seed, rank)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

BATCH_SIZE = 8
SKIPPED_STEPS = (3, 7, 8)
"""The local steps in which the AMP job's gradient overflows, from 0 on."""


@dataclass
class Job:
    """A model and one local step of its training, to be taken on the stream that is current."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    step: Callable[[], None]
    runs_hooks: bool = True
    """False: step() replays a recording, and whoever averages must call step_boundary() after it."""
    skipped_steps: tuple[int, ...] = field(default=())


Make = Callable[[torch.device, int], Job]
"""(device, rank) -> a new job; the same model on every rank, other data."""


def sgd(device: torch.device, rank: int) -> Job:
    """SGD with momentum on a convolutional model with GroupNorm, float32."""
    model = _conv_net().to(device)
    return _plain(model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), device, rank)


def bf16(device: torch.device, rank: int) -> Job:
    """AdamW on bf16 parameters: averaged in float32, what rounding leaves over stays in the residual."""
    model = _perceptron().to(device, torch.bfloat16)
    images, labels = _batch(device, rank)
    return _plain(model, torch.optim.AdamW(model.parameters(), lr=1e-3), device, rank, (images.bfloat16(), labels))


def channels_last(device: torch.device, rank: int) -> Job:
    """Rank 0 in channels_last memory format, the others contiguous: places in the vector do not depend on it."""
    memory_format = torch.channels_last if rank == 0 else torch.contiguous_format
    model = _conv_net().to(device, memory_format=memory_format)
    images, labels = _batch(device, rank)
    batch = images.to(memory_format=memory_format), labels
    return _plain(model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), device, rank, batch)


def amp(device: torch.device, rank: int) -> Job:
    """Fused AdamW under a GradScaler that has it skip SKIPPED_STEPS."""
    model = _perceptron().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**10, growth_interval=10**6)
    images, labels = _batch(device, rank)
    first = next(model.parameters())
    steps = 0

    def step() -> None:
        nonlocal steps
        optimizer.zero_grad(set_to_none=False)
        loss = functional.cross_entropy(model(images), labels)
        scaler.scale(loss).backward()
        if steps in SKIPPED_STEPS and first.grad is not None:
            first.grad.fill_(torch.inf)
        scaler.step(optimizer)
        scaler.update()
        steps += 1

    return Job(model, optimizer, step, skipped_steps=SKIPPED_STEPS)


def graphed(device: torch.device, rank: int) -> Job:
    """Forward, backward and update in one CUDA graph. On a CPU the same step by hand: no optimizer runs either."""
    model = _perceptron().to(device)
    parameters = list(model.parameters())
    images, labels = _batch(device, rank)

    def by_hand() -> None:
        loss = functional.cross_entropy(model(images), labels)
        gradients = torch.autograd.grad(loss, parameters)
        with torch.no_grad():
            torch._foreach_add_(parameters, gradients, alpha=-0.05)

    step = by_hand if device.type != "cuda" else _recorded(by_hand, parameters, device)
    return Job(model, torch.optim.SGD(parameters, lr=0.05), step, runs_hooks=False)


def _recorded(step: Callable[[], None], parameters: list[nn.Parameter], device: torch.device) -> Callable[[], None]:
    """`step` as a CUDA graph; the parameters are as before. To be called while no other thread uses the device."""
    before = [parameter.detach().clone() for parameter in parameters]
    aside = torch.cuda.Stream(device)
    aside.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(aside):
        for _ in range(3):
            step()
    torch.cuda.current_stream(device).wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    with torch.no_grad():
        torch._foreach_copy_(parameters, before)
    torch.cuda.synchronize(device)

    def replay(reads: Callable[[], None] = step) -> None:  # a graph keeps addresses, not tensors: `step` keeps those
        graph.replay()

    return replay


JOBS: dict[str, Make] = {
    "SGD": sgd,
    "bf16 parameters": bf16,
    "channels_last": channels_last,
    "fused AdamW, GradScaler": amp,
    "CUDA graph, step_boundary()": graphed,
}


def _plain(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
    rank: int,
    batch: tuple[Tensor, Tensor] | None = None,
) -> Job:
    images, labels = batch or _batch(device, rank)

    def step() -> None:
        functional.cross_entropy(model(images).float(), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return Job(model, optimizer, step)


class _Mean(nn.Module):
    """Global average pooling whose backward pass adds nothing up in a changing order."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=(2, 3))


def _conv_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1, bias=False),
        nn.GroupNorm(8, 32),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1),
        nn.ReLU(),
        _Mean(),
        nn.Linear(64, 10),
    )


def _perceptron() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 256), nn.ReLU(), nn.Linear(256, 10))


def _batch(device: torch.device, rank: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1 + rank)
    images = torch.randn(BATCH_SIZE, 3, 16, 16, generator=generator)
    labels = torch.randint(0, 10, (BATCH_SIZE,), generator=generator)
    return images.to(device), labels.to(device)
