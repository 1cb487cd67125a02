"""One rank of the process tests: python rank_script.py BEHAVIOUR; RANK and so on as torchrun sets them."""

from __future__ import annotations

import os
import signal
import sys

import torch
from torch import nn

import lasgd

torch.set_num_threads(1)
behaviour = sys.argv[1]
rank = int(os.environ["RANK"])
torch.manual_seed(rank)
model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 2))
optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
averaging = lasgd.attach(
    model,
    optimizer,
    samples=6_000 if behaviour == "train" else 10**9,
    batch_size=4,
    fragments=3,
    timeout_s=3.0,
    start_timeout_s=float(os.environ.get("START_TIMEOUT_S", "60")),
)


def train() -> None:
    while not averaging.finished:
        x = torch.randn(4, 8)
        nn.functional.mse_loss(model(x), x[:, :2]).backward()
        optimizer.step()
        optimizer.zero_grad()
        if averaging.pace.round < 3:
            continue
        if rank == 1:
            if behaviour.startswith("raise"):
                raise ValueError("too many bananas")
            if behaviour == "die":
                os.kill(os.getpid(), signal.SIGKILL)
        if behaviour == f"stop {rank}":
            os.kill(os.getpid(), signal.SIGSTOP)


if behaviour == "raise unclosed":
    averaging.start()
    train()
else:
    with averaging:
        train()
line = f"digest {averaging.replica.layout.content_digest()} rounds {averaging.pace.round}\n"
os.write(1, line.encode())  # at once, so that lines of several ranks do not mix
