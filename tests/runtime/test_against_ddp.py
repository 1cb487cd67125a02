"""Synchronous SGD three ways, two real ranks each: DistributedDataParallel, ours over it, and our text alone."""

from __future__ import annotations

import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import lasgd
from lasgd.errors import LasgdError
from lasgd.pace import Column

STEPS = 7


def trained(model: nn.Module, optimizer, call, rank: int, is_finished) -> torch.Tensor:
    step = 0
    while not is_finished(step):
        generator = torch.Generator().manual_seed(1000 * rank + step)
        x = torch.randn(8, 6, generator=generator)
        nn.functional.mse_loss(call(x), x[:, :2]).backward()
        optimizer.step()
        optimizer.zero_grad()
        step += 1
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def made(norm: str = "group") -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    between = nn.GroupNorm(4, 32) if norm == "group" else nn.BatchNorm1d(32)
    model = nn.Sequential(nn.Linear(6, 32), between, nn.ReLU(), nn.Linear(32, 2))
    return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)


def ours(rank: int, ddp: bool, norm: str = "group") -> tuple[torch.Tensor, lasgd.Averaging]:
    model, optimizer = made(norm)
    samples = 16 * (STEPS - 1)  # the step that finds the budget reached is taken too
    with lasgd.attach(model, optimizer, samples=samples, batch_size=8, algorithm="sync_sgd", ddp=ddp) as averaging:
        assert (averaging.model is model) is not ddp
        values = trained(model, optimizer, averaging.model, rank, lambda _: averaging.finished)
        averaging.wait_end()
        assert averaging.wait_identical(30.0)
    averaging.model.eval()
    assert torch.equal(averaging.model(torch.ones(1, 6)), model(torch.ones(1, 6)))  # once closed, the model alone
    return values, averaging


def rank_main(rank: int, port: int, results) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    found: dict = {}
    try:
        for norm in ("group", "batch"):
            model, optimizer = made(norm)
            parallel = nn.parallel.DistributedDataParallel(model)
            theirs = trained(model, optimizer, parallel, rank, lambda step: step == STEPS)
            overlapped, averaging = ours(rank, True, norm)
            found |= {f"{norm}: steps": averaging.tally.local_steps, f"{norm}: ddp": torch.equal(overlapped, theirs)}
        alone, averaging_alone = ours(rank, False)
        overlapped, averaging = ours(rank, True)
        found["text"] = torch.equal(overlapped, alone)
        found["agreed"] = averaging.pace.samples == averaging_alone.pace.samples
        found["rounds"] = averaging.pace.round == averaging_alone.pace.round == STEPS
        # Between two ranks the ring sends each once: the gradients in float32, and per step a header of two rows.
        sent = (4 * overlapped.numel() + 8 * 2 * len(Column)) * STEPS
        found["bytes"] = averaging.group.bytes_sent == averaging_alone.group.bytes_sent == sent
        found["values"] = overlapped.tolist()
    except LasgdError as error:
        found["error"] = str(error)
    results.put((rank, found))
    dist.destroy_process_group()


@pytest.mark.processes
def test_synchronous_sgd_gives_the_replicas_of_distributed_data_parallel_bit_for_bit():
    # Two ranks: a sum of two is the same in either order, and halving it before or after adding rounds nothing.
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = mp.get_context("spawn")
    results = context.Queue()
    ranks = [context.Process(target=rank_main, args=(rank, port, results), daemon=True) for rank in range(2)]
    for process in ranks:
        process.start()
    try:
        ended = dict(results.get(timeout=90) for _ in ranks)
    finally:
        for process in ranks:
            process.join(10)
            process.kill()
    values = [ended[rank].pop("values", None) for rank in range(2)]
    expected = {"group: steps": STEPS, "group: ddp": True, "batch: steps": STEPS, "batch: ddp": True}
    expected |= {"text": True, "agreed": True, "rounds": True, "bytes": True}
    assert ended == {0: expected, 1: expected}
    assert values[0] == values[1] is not None
