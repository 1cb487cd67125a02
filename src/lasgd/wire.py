"""Wire formats: how the elements of an average travel, and what rounding them leaves behind.

    fp32   as they are (as float64 where the model is float64): an all-reduce adds them up on the way
    bf16   the differences from the latest mean, 2 bytes each
    int8   the same, 1 byte each and a float32 scale for every BLOCK of them: the largest difference is 127

Sums of coarse numbers cannot be formed on the way without rounding again at every hop. So a vector of n ranks is cut
into n pieces: each rank sends piece k to rank k, which adds up what it has received, in full precision, and sends the
mean to all. That is two roundings, whatever n is, and as many numbers on every link as in a ring all-reduce.

What is rounded off is not lost (`CodedMean`): what counts as a rank's contribution is what it has said, so the rest
stays in its residual, and is in its next contribution. Source of the idea: Seide et al. (2014), "1-Bit Stochastic
Gradient Descent", error feedback; here the residual that carries late corrections carries this too.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from lasgd.errors import unknown

BLOCK = 256
"""Elements that share a scale."""


class Wire(Protocol):
    """A wire format other than fp32."""

    name: str

    def n_bytes(self, elements: int) -> int:
        """Bytes of the code of so many elements, a multiple of BLOCK."""
        ...

    def encode(self, values: Tensor, codes: Tensor) -> None:
        """Writes the code of `values` (d,) into `codes` (uint8), and rounds `values` in place to what it says."""
        ...

    def decode(self, codes: Tensor, out: Tensor) -> None:
        """Writes into `out` (d,) what the first d elements of the code say: the same bits on every machine."""
        ...


class BFloat16:
    """The upper half of a float32."""

    name = "bf16"

    def n_bytes(self, elements: int) -> int:
        """See Wire."""
        return 2 * elements

    def encode(self, values: Tensor, codes: Tensor) -> None:
        """See Wire."""
        coded = codes.view(torch.bfloat16)[: values.numel()].copy_(values)
        values.copy_(coded)

    def decode(self, codes: Tensor, out: Tensor) -> None:
        """See Wire."""
        out.copy_(codes.view(torch.bfloat16)[: out.numel()])


class Int8:
    """One byte an element, in units of its block's scale."""

    name = "int8"

    def n_bytes(self, elements: int) -> int:
        """See Wire."""
        return elements + 4 * (elements // BLOCK)

    def encode(self, values: Tensor, codes: Tensor) -> None:
        """See Wire."""
        scales, numbers = self._parts(codes)
        begin = 0
        for blocks in _blocks(values):
            of_blocks = scales[begin // BLOCK : begin // BLOCK + len(blocks)]
            lowest, highest = torch.aminmax(blocks, dim=1)
            of_blocks.copy_(torch.maximum(highest, -lowest).div_(127.0))
            divisors = torch.where(of_blocks > 0, of_blocks, 1.0).to(blocks.dtype).unsqueeze(1)
            # A scale of denormal size may round a quotient beyond the range.
            blocks.div_(divisors).round_().clamp_(-127.0, 127.0)
            numbers[begin : begin + blocks.numel()].copy_(blocks.view(-1))
            blocks.mul_(divisors)
            begin += blocks.numel()

    def decode(self, codes: Tensor, out: Tensor) -> None:
        """See Wire."""
        scales, numbers = self._parts(codes)
        out.copy_(numbers[: out.numel()])
        begin = 0
        for blocks in _blocks(out):
            blocks.mul_(scales[begin // BLOCK : begin // BLOCK + len(blocks)].to(out.dtype).unsqueeze(1))
            begin += blocks.numel()

    @staticmethod
    def _parts(codes: Tensor) -> tuple[Tensor, Tensor]:
        of_scales = codes.numel() // (BLOCK + 4) * 4
        return codes[:of_scales].view(torch.float32), codes[of_scales:].view(torch.int8)


def _blocks(values: Tensor) -> list[Tensor]:
    """Views (blocks, elements) of `values` (d,): the whole blocks, and the shorter one at the end."""
    whole = values.numel() // BLOCK * BLOCK
    parts = [values[:whole].view(-1, BLOCK), values[whole:].view(1, -1)]
    return [part for part in parts if part.numel()]


def piece_bytes(wire: Wire, elements: int, members: int) -> int:
    """Bytes of the code of one rank's piece, of a part of so many elements."""
    return wire.n_bytes(_piece(elements, members))


def _piece(elements: int, members: int) -> int:
    return -(-elements // (members * BLOCK)) * BLOCK


_WIRES = {wire.name: wire for wire in (BFloat16, Int8)}

NAMES = ("fp32", *_WIRES)
"""What `--wire` takes."""


def wire(name: str) -> Wire | None:
    """A format by name; None for fp32. Raises ConfigurationError with the nearest known name."""
    if name not in NAMES:
        raise unknown("wire format", name, NAMES)
    return None if name == "fp32" else _WIRES[name]()


class CodedMean:
    """One rank's part in the means of a vector of D elements that travel in a wire format; any driver moves the bytes.

        codes to send   outgoing(sent)            (n, bytes) uint8, row k for rank k
        what has come   reduce(received, weight)  (n, bytes), row j from rank j -> the code of this rank's piece
        all the pieces  finish(sent, pieces)      (n, bytes), row k from rank k -> the mean

    With weights w_j, W their sum, c the latest mean of these elements (at first what all ranks have begun with), Q the
    rounding to the format:

        q_j = Q(w_j (s_j - c))          what rank j says
        a   = (1/W) sum_j q_j           on the rank whose piece it is
        m   = c + Q(a)                  the mean, equal on all ranks bit for bit

    What has counted as rank j's contribution is c + q_j / w_j, and on the rank whose piece it is also the rest of the
    mean: less W (a - Q(a)) / w_j. So the sum of w_j times what counted is W m, and correcting by m less what counted
    moves the weighted sum of all z by rounding errors of the vector's own precision only. (A rank of weight 0, which
    sits out, has no contribution to take the rest of its piece from: while it does, that rest is lost.)

    Memory: the D elements of c, and for the largest part that is averaged at once two codes and one piece.
    """

    def __init__(self, wire: Wire, position: int, members: int, latest: Tensor):
        """`position`: this rank's among the members. `latest` (D,), CPU, becomes this object's own."""
        self.wire, self.position, self.members = wire, position, members
        self._latest = latest
        self._codes = torch.empty(0, dtype=torch.uint8)
        self._received = torch.empty(0, dtype=torch.uint8)
        self._rest = torch.empty(0, dtype=latest.dtype)

    def load(self, latest: Tensor) -> None:
        """Takes (D,) for the latest mean; equal on all ranks, before the first round only."""
        self._latest.copy_(latest)

    @property
    def latest(self) -> Tensor:
        """c, (D,): this object's own, changes with every round."""
        return self._latest

    def outgoing(self, values: Tensor, weight: float, begin: int) -> tuple[Tensor, Tensor]:
        """The codes of `values` (d,), which lie from `begin` on in the vector, and as much room for what will come.

        Leaves q in `values`. Both results are valid until the next call.
        """
        codes, received = self._room(values.numel())
        if weight:
            values.sub_(self._latest[begin : begin + values.numel()])
            if weight != 1.0:
                values.mul_(weight)
        for k in range(self.members):
            self.wire.encode(self._piece_of(values, k), codes[k])
        return codes[: self.members], received

    def reduce(self, values: Tensor, received: Tensor, weight: float) -> Tensor:
        """The code of the mean of this rank's piece; `weight` is the sum of all ranks' and not 0. Ours, as above.

        Leaves `values` as they were: their own piece, whose code is at hand, is where the others' are added up.
        """
        total = self._piece_of(values, self.position)
        rest = self._rest[: total.numel()]
        total.zero_()
        for k in range(self.members):
            self.wire.decode(received[k], rest)
            total.add_(rest)
        total.div_(weight)
        rest.copy_(total)
        codes = self._room(values.numel())[0]
        of_mean = codes[(self.position + 1) % len(codes)]  # has been sent; the own piece's is still needed
        self.wire.encode(total, of_mean)
        rest.sub_(total).mul_(weight)
        self.wire.decode(codes[self.position], total)
        return of_mean

    def finish(self, values: Tensor, weight: float, begin: int, pieces: Tensor) -> Tensor:
        """The mean, a view of the latest one; leaves in `values` what counted. `weight` is this rank's own."""
        latest = self._latest[begin : begin + values.numel()]
        if weight:
            own = self._piece_of(values, self.position)
            own.sub_(self._rest[: own.numel()])
            if weight != 1.0:
                values.div_(weight)
            values.add_(latest)
        for k in range(self.members):
            piece = self._piece_of(latest, k)
            moved = self._rest[: piece.numel()]
            self.wire.decode(pieces[k], moved)
            piece.add_(moved)
        return latest

    def _piece_of(self, values: Tensor, k: int) -> Tensor:
        piece = _piece(values.numel(), self.members)
        return values[k * piece : (k + 1) * piece]

    def _room(self, elements: int) -> tuple[Tensor, Tensor]:
        """For codes to send, of two pieces at least, and codes received, of a part of so many elements.

        Grows with the largest part.
        """
        rows, piece = max(2, self.members), _piece(elements, self.members)
        n_bytes = piece_bytes(self.wire, elements, self.members)
        if self._codes.numel() < rows * n_bytes:
            self._codes = torch.zeros(rows * n_bytes, dtype=torch.uint8)
            self._received = torch.zeros(self.members * n_bytes, dtype=torch.uint8)
        if self._rest.numel() < piece:
            self._rest = torch.empty(piece, dtype=self._latest.dtype)
        codes, received = self._codes[: rows * n_bytes], self._received[: self.members * n_bytes]
        return codes.view(rows, n_bytes), received.view(self.members, n_bytes)
