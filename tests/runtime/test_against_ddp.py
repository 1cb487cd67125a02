"""Our synchronous SGD and torch's DistributedDataParallel, two real ranks each: the same replicas."""

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


def made() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 32), nn.GroupNorm(4, 32), nn.ReLU(), nn.Linear(32, 2))
    return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)


def rank_main(rank: int, port: int, results) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    model, optimizer = made()
    parallel = nn.parallel.DistributedDataParallel(model)
    theirs = trained(model, optimizer, parallel, rank, lambda step: step == STEPS)
    model, optimizer = made()
    try:
        # the step that finds the budget reached is taken too
        with lasgd.attach(model, optimizer, samples=16 * (STEPS - 1), batch_size=8, algorithm="sync_sgd") as averaging:
            ours = trained(model, optimizer, model, rank, lambda _: averaging.finished)
        results.put((rank, averaging.tally.local_steps, torch.equal(ours, theirs), ours.tolist()))
    except LasgdError as error:
        results.put((rank, 0, str(error), []))
    dist.destroy_process_group()


@pytest.mark.processes
def test_synchronous_sgd_gives_the_replicas_of_distributed_data_parallel_bit_for_bit():
    # Two ranks: a sum of two is the same in either order, and halving it before or after adding rounds nothing.
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    context = mp.get_context("spawn")
    results = context.Queue()
    ranks = [context.Process(target=rank_main, args=(rank, port, results), daemon=True) for rank in range(2)]
    for process in ranks:
        process.start()
    try:
        ended = sorted(results.get(timeout=90) for _ in ranks)
    finally:
        for process in ranks:
            process.join(10)
            process.kill()
    assert [(rank, steps, equal) for rank, steps, equal, _ in ended] == [(0, STEPS, True), (1, STEPS, True)]
    assert ended[0][3] == ended[1][3]
