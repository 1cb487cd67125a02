"""Rank 0's values on every rank: of the model at the start, of buffers at an end that leaves them unequal."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from lasgd.group.base import Group

_SMALL_BYTES = 2**20


def wait_broadcast(group: Group, tensors: Iterable[Tensor], timeout_s: float) -> None:
    """Gives every rank rank 0's values of `tensors`, bit for bit, in place. Large ones travel without a copy."""
    small: list[Tensor] = []
    for tensor in tensors:
        if tensor.nbytes < _SMALL_BYTES:
            small.append(tensor)
        else:
            _wait_broadcast_large(group, tensor.detach(), timeout_s)
        if sum(t.nbytes for t in small) >= _SMALL_BYTES:
            _wait_broadcast_small(group, small, timeout_s)
            small = []
    _wait_broadcast_small(group, small, timeout_s)


def _wait_broadcast_large(group: Group, tensor: Tensor, timeout_s: float) -> None:
    travels_itself = tensor.device.type == "cpu" and tensor.is_contiguous()
    whole = tensor if travels_itself else tensor.contiguous().cpu()
    group.wait_broadcast(whole.view(-1).view(torch.uint8), group.members[0], timeout_s)
    if not travels_itself:
        tensor.copy_(whole)


@torch.no_grad()
def _wait_broadcast_small(group: Group, tensors: list[Tensor], timeout_s: float) -> None:
    tensors = [t.detach() for t in tensors if t.numel()]
    if not tensors:
        return
    flat = torch.cat([t.contiguous().view(-1).view(torch.uint8).cpu() for t in tensors])
    group.wait_broadcast(flat, group.members[0], timeout_s)
    for tensor, received in zip(tensors, flat.split([t.nbytes for t in tensors]), strict=True):
        # clone: a view of another dtype needs its memory aligned, and a piece of `flat` may begin anywhere
        tensor.copy_(received.clone().view(tensor.dtype).view(tensor.shape))
