"""One flat vector for all that is averaged, and its cut into fragments.

The vector holds, in this order: the trainable parameters that have the vector's own precision, those of a coarser one
(bf16 in a float32 vector), and the floating-point buffers. Offsets follow the tensors' logical order, whatever their
memory format, so that ranks agree on every element's place. Fragments are cut between rows of a tensor's first
dimension: a row range is a view whatever the strides.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lasgd.errors import ConfigurationError


class Section(IntEnum):
    """The vector's three parts, in their order."""

    EXACT = 0  # parameters of the vector's precision
    COARSE = 1  # parameters of a lower precision: what rounding leaves over stays in the residual
    BUFFER = 2  # floating-point buffers: they take the mean


@dataclass(frozen=True, eq=False)
class Entry:
    """One tensor of the model and its place in the vector."""

    name: str
    owner: nn.Module
    key: str
    section: Section
    begin: int
    end: int

    def tensor(self) -> Tensor:
        """The live tensor; looked up anew, because others may replace a buffer or a parameter's data.

        Raises ConfigurationError if it is gone.
        """
        found = self.owner._parameters.get(self.key)
        if found is None:
            found = self.owner._buffers.get(self.key)
        if found is None:
            raise ConfigurationError(
                f"{self.name!r} has been renamed or removed since lasgd.attach was called (pruning and other "
                "reparametrisations do that), and cannot be averaged any more. Attach after changing the model"
            )
        return found


@dataclass(frozen=True, eq=False)
class Piece:
    """A row range of one tensor, as it lies within a fragment."""

    entry: Entry
    first_row: int
    rows: int
    is_whole: bool
    begin: int  # offsets in the whole vector
    end: int

    def live(self) -> Tensor:
        """A view of the model's own elements."""
        tensor = self.entry.tensor()
        return tensor if self.is_whole else tensor.narrow(0, self.first_row, self.rows)


@dataclass(frozen=True, eq=False)
class Fragment:
    """One part of the vector: elements begin to end, averaged in one round."""

    index: int
    begin: int
    end: int
    pieces: tuple[Piece, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.end - self.begin


class Layout:
    """Where each averaged tensor of `model` lies in the vector. Reads the model, changes nothing."""

    def __init__(self, model: nn.Module):
        parameters, buffers, frozen = _averaged_tensors(model)
        if not parameters:
            raise ConfigurationError("the model has no trainable floating-point parameter; there is nothing to average")
        _check_separate(parameters + buffers)
        self.device = _one_device(parameters + buffers)
        if self.device.type not in ("cpu", "cuda"):
            raise ConfigurationError(f"the model lies on device {self.device}; lasgd averages models on cpu or cuda")
        self.dtype = torch.float64 if any(p[3].dtype == torch.float64 for p in parameters) else torch.float32
        self.frozen: tuple[nn.Parameter, ...] = tuple(frozen)

        exact = [p for p in parameters if p[3].dtype == self.dtype]
        coarse = [p for p in parameters if p[3].dtype != self.dtype]
        entries, offset = [], 0
        for section, members in ((Section.EXACT, exact), (Section.COARSE, coarse), (Section.BUFFER, buffers)):
            for name, owner, key, tensor in members:
                entries.append(Entry(name, owner, key, section, offset, offset + tensor.numel()))
                offset += tensor.numel()
        self.entries: tuple[Entry, ...] = tuple(entries)
        self.size = offset
        """Elements of the vector."""
        self.parameter_bytes = sum(t.numel() * t.element_size() for _, _, _, t in parameters)

    def cut(self, fragments: int) -> list[Fragment]:
        """Cuts the vector into about `fragments` parts of about equal size; fewer where rows are too long for that."""
        if fragments < 1:
            raise ConfigurationError(f"fragments must be at least 1, got {fragments}")
        cuts = [0]
        for k in range(1, fragments):
            at = self._nearest_row(round(k * self.size / fragments))
            if cuts[-1] < at < self.size:
                cuts.append(at)
        cuts.append(self.size)
        return [
            Fragment(index, begin, end, tuple(self._pieces(begin, end)))
            for index, (begin, end) in enumerate(itertools.pairwise(cuts))
        ]

    def _nearest_row(self, at: int) -> int:
        entry = next((entry for entry in self.entries if at < entry.end), self.entries[-1])
        row = _row_size(entry.tensor())
        return entry.begin + round((at - entry.begin) / row) * row

    def _pieces(self, begin: int, end: int) -> Iterator[Piece]:
        for entry in self.entries:
            first, last = max(begin, entry.begin), min(end, entry.end)
            if first >= last:
                continue
            row = _row_size(entry.tensor())
            yield Piece(
                entry,
                first_row=(first - entry.begin) // row,
                rows=(last - first) // row,
                is_whole=(first, last) == (entry.begin, entry.end),
                begin=first,
                end=last,
            )

    def state_dict(self, model: nn.Module, vector: Tensor | None) -> dict[str, Tensor]:
        """A copy of the model's state dict, with the averaged tensors' values from `vector`, (D,), where given."""
        averaged = {memory_key(entry.tensor()): entry for entry in self.entries}
        copies: dict[Hashable, Tensor] = {}  # tied tensors stay tied
        state = {}
        for name, tensor in model.state_dict(keep_vars=True).items():
            if not isinstance(tensor, Tensor):
                continue
            key = memory_key(tensor)
            if key not in copies:
                copy, entry = tensor.detach().clone(), averaged.get(key)
                if vector is not None and entry is not None:
                    copy.copy_(vector[entry.begin : entry.end].view(tensor.shape))
                copies[key] = copy
            state[name] = copies[key]
        return state

    def describe(self) -> list[tuple[str, list[int], str]]:
        """Name, shape and dtype of every averaged tensor, in the vector's order; equal on all ranks or no run."""
        return [described(entry.name, entry.tensor()) for entry in self.entries]

    def digest(self) -> str:
        """SHA-256 of `describe()`."""
        return hashlib.sha256(json.dumps(self.describe()).encode()).hexdigest()

    def content_digest(self) -> str:
        """SHA-256 of the averaged values themselves, each in its own dtype and logical order."""
        sha = hashlib.sha256()
        for entry in self.entries:
            values = entry.tensor().detach().contiguous().cpu()
            sha.update(values.view(-1).view(torch.uint8).numpy().tobytes())
        return sha.hexdigest()


def _averaged_tensors(model: nn.Module):
    """(name, owner, key, tensor) of trainable parameters and of persistent float buffers, tied once; the frozen."""
    parameters, buffers, frozen, seen = [], [], [], set()
    for prefix, owner in model.named_modules():
        where = f"{prefix}." if prefix else ""
        for key, parameter in owner._parameters.items():
            if parameter is None:
                continue
            if is_lazy(parameter):
                raise ConfigurationError(f"parameter {where + key!r} is lazy; run one forward pass before attach")
            if memory_key(parameter) in seen:
                continue
            seen.add(memory_key(parameter))
            if not parameter.requires_grad:
                frozen.append(parameter)
            elif not parameter.is_floating_point():
                raise ConfigurationError(
                    f"parameter {where + key!r} is {parameter.dtype}; only real floating-point parameters are averaged"
                )
            elif type(parameter.data) is not Tensor:
                raise ConfigurationError(
                    f"parameter {where + key!r} is a {type(parameter.data).__name__}; lasgd averages plain tensors, "
                    "so every rank must hold the whole model (no FSDP, no tensor parallelism)"
                )
            else:
                parameters.append((where + key, owner, key, parameter))
        for key, buffer in owner._buffers.items():
            if buffer is None or key in owner._non_persistent_buffers_set:
                continue
            if is_lazy(buffer):
                raise ConfigurationError(f"buffer {where + key!r} is lazy; run one forward pass before attach")
            if memory_key(buffer) in seen:
                continue
            seen.add(memory_key(buffer))
            if buffer.is_floating_point() and buffer.numel():
                buffers.append((where + key, owner, key, buffer))
    return [p for p in parameters if p[3].numel()], buffers, frozen


def described(name: str, tensor: Tensor) -> tuple[str, list[int], str]:
    """A tensor in words that ranks can compare."""
    return name, list(tensor.shape), str(tensor.dtype).removeprefix("torch.")


def memory_key(tensor: Tensor) -> Hashable:
    """Equal for tensors that are the same elements, whatever objects hold them: tied ones."""
    if type(tensor.data) is not Tensor or tensor.data_ptr() == 0:
        return id(tensor)
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def check_no_element_twice(name: str, tensor: Tensor) -> None:
    """Raises ConfigurationError for an expanded tensor: one element of memory stands for several of the tensor."""
    if any(size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)):
        raise ConfigurationError(
            f"{name!r} {tuple(tensor.shape)} is expanded: several of its elements are the same memory, and cannot be "
            "written one by one. Store a copy (.clone()), or register it with persistent=False"
        )


def _check_separate(tensors) -> None:
    """Refuses averaged tensors of which parts are the same memory: that part would be corrected twice."""
    end, before = 0, ""
    for name, _, _, tensor in sorted(tensors, key=lambda entry: entry[3].data_ptr()):
        check_no_element_twice(name, tensor)
        begin = tensor.data_ptr()
        if begin < end:
            raise ConfigurationError(
                f"{before!r} and {name!r} share a part of their memory; it would be averaged twice. Tie whole tensors, "
                "or give each its own"
            )
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        if begin:
            end, before = begin + (last + 1) * tensor.element_size(), name


def _one_device(tensors) -> torch.device:
    devices = {tensor.device for _, _, _, tensor in tensors}
    if len(devices) > 1:
        raise ConfigurationError(
            f"the model's tensors lie on {len(devices)} devices ({', '.join(sorted(map(str, devices)))}); "
            "lasgd needs one device per rank"
        )
    return devices.pop()


def _row_size(tensor: Tensor) -> int:
    return tensor.numel() if tensor.dim() == 0 else tensor.numel() // tensor.shape[0]
