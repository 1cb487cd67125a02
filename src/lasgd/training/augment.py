"""Augmentation: what a worker does to the pixels of a training batch, with kornia, on the CPU.

    shift             a random shift, by cutting out of the zero-padded image     (small drawings: digits)
    shift and flip    the same, and a left-right flip                             (small photographs)
    crop and flip     a random part of 8 to 100 % of the area, scaled, and a flip (large photographs)

The first two work on whole batches (about 1.4 ms for 32 images of 32x32), the third image by image, because the files
differ in shape. kornia draws from torch's global generator; `drawing_from` lends it one of the batch's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor

Augmentation = Literal["shift", "shift and flip", "crop and flip"]


@lru_cache
def augmenter(kind: Augmentation, size: int) -> Callable[[Sequence[np.ndarray]], Tensor]:
    """A function from images (H, W, C) uint8 to a batch (B, C, size, size) float32 in the same units.

    Imports kornia: call it once before worker processes are forked, and they inherit modules and function.
    """
    from kornia import augmentation as kornia

    flip = kornia.RandomHorizontalFlip(p=0.5)
    if kind == "crop and flip":
        part = kornia.RandomResizedCrop((size, size), scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3))
        return lambda images: flip(torch.cat([part(stacked([image])) for image in images]))
    shift = kornia.RandomCrop((size, size), padding=max(1, size // 8))
    if kind == "shift":
        return lambda images: shift(stacked(images))
    return lambda images: flip(shift(stacked(images)))


def stacked(images: Sequence[np.ndarray]) -> Tensor:
    """Images of one shape (H, W, C) uint8 as a batch (B, C, H, W) float32, a copy."""
    return (
        torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    )


def normalised(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(images - mean) / std per channel; changes `images` (B, C, H, W) in place and returns it."""
    return images.sub_(torch.tensor(mean).view(-1, 1, 1)).div_(torch.tensor(std).view(-1, 1, 1))


@contextmanager
def drawing_from(seed: int) -> Iterator[None]:
    """Inside, torch's CPU generator starts at `seed`; afterwards it is as before."""
    before = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(before)
