"""Order between the training thread's stream and the communicator's, and copies to the host.

On a CPU program order and the replica's lock are enough, so every fence is empty. On a GPU both threads only enqueue:
the communicator works on a side stream, and events, never a device-wide synchronise, carry the order across.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor


class HostFences:
    """For models in CPU memory: nothing to order, nothing to copy."""

    def communicating(self) -> contextlib.AbstractContextManager[None]:
        """Where the communicator's tensor work runs."""
        return contextlib.nullcontext()

    def corrected(self) -> None:
        """Communicator, under the lock: a correction has been written to the residual."""

    def before_merge(self) -> None:
        """Training thread, under the lock: the merge must come after the latest correction."""

    def merged(self) -> None:
        """Training thread, under the lock: the residual has been shown."""

    def before_reading(self) -> None:
        """Communicator, under the lock: what follows must come after the latest merge."""

    def host_buffer(self, size: int, dtype: torch.dtype) -> Tensor:
        """An uninitialised flat CPU tensor that copies to and from the device fast."""
        return torch.empty(size, dtype=dtype)

    def wait_copied(self) -> None:
        """Communicator: returns when all copies it has asked for have arrived. Bounded by the copies themselves."""


class CudaFences(HostFences):
    """For models on one CUDA device."""

    def __init__(self, device: torch.device):
        self.device = device
        self._stream = torch.cuda.Stream(device)
        self._corrected = torch.cuda.Event()
        self._merged = torch.cuda.Event()
        self._copied = torch.cuda.Event(blocking=True)  # blocking: the waiting communicator leaves its core to others
        self._stream.wait_stream(torch.cuda.current_stream(device))

    @contextlib.contextmanager
    def communicating(self) -> Iterator[None]:
        """The side stream is current within."""
        with torch.cuda.device(self.device), torch.cuda.stream(self._stream):
            yield

    def corrected(self) -> None:
        """Marks the side stream's latest correction."""
        self._corrected.record(self._stream)

    def before_merge(self) -> None:
        """The training stream waits, on the GPU, for the latest correction."""
        torch.cuda.current_stream(self.device).wait_event(self._corrected)

    def merged(self) -> None:
        """Marks the training stream's latest merge."""
        self._merged.record(torch.cuda.current_stream(self.device))

    def before_reading(self) -> None:
        """The side stream waits, on the GPU, for the latest merge."""
        self._stream.wait_event(self._merged)

    def host_buffer(self, size: int, dtype: torch.dtype) -> Tensor:
        """Pinned memory."""
        return torch.empty(size, dtype=dtype, pin_memory=True)

    def wait_copied(self) -> None:
        """Waits for the side stream alone."""
        self._copied.record(self._stream)
        self._copied.synchronize()


def fences_for(device: torch.device) -> HostFences:
    """The fences that a device needs."""
    return CudaFences(device) if device.type == "cuda" else HostFences()
