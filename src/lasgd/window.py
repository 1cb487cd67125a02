"""One fragment as a replica works on it: views of the model's tensors, the residual and the buffer, by section."""

from __future__ import annotations

import torch
from torch import Tensor

from lasgd.layout import Fragment, Section


class Window:
    """A fragment of the model, of the residual and of the round's buffer. Owns no memory: all are views."""

    def __init__(self, fragment: Fragment, residual: Tensor, buffer: Tensor):
        self.fragment = fragment
        self.residual = residual[fragment.begin : fragment.end]
        self.sent = buffer[: fragment.size]
        self.pieces = {s: [p for p in fragment.pieces if p.entry.section is s] for s in Section}
        self.parameter_end = sum(p.end - p.begin for s in (Section.EXACT, Section.COARSE) for p in self.pieces[s])
        self.exact_end = sum(p.end - p.begin for p in self.pieces[Section.EXACT])
        self.has_buffers = self.parameter_end < fragment.size
        self.residual_parameters, self.residual_buffers = self._split(self.residual)
        self.sent_parameters, self.sent_buffers = self._split(self.sent)
        self.residual_views = {s: self._views(residual, 0, s) for s in Section}
        self.sent_views = {s: self._views(buffer, fragment.begin, s) for s in Section}

    def _views(self, flat: Tensor, shift: int, section: Section) -> list[Tensor]:
        return [flat[p.begin - shift : p.end - shift].view(p.live().shape) for p in self.pieces[section]]

    def _split(self, values: Tensor) -> tuple[Tensor, Tensor]:
        return values[: self.parameter_end], values[self.parameter_end :]

    def live(self, section: Section) -> list[Tensor]:
        """Views of the model's own tensors."""
        return [piece.live() for piece in self.pieces[section]]

    def copy_parts(self, into: dict[Section, list[Tensor]], sections=tuple(Section)) -> None:
        """Copies the model's tensors into views of the buffer or the residual."""
        for section in sections:
            if self.pieces[section]:
                torch._foreach_copy_(into[section], self.live(section))

    def show_parts(self, out_of: dict[Section, list[Tensor]], sections=tuple(Section)) -> None:
        """Copies views of the residual into the model's tensors, in place."""
        for section in sections:
            if self.pieces[section]:
                torch._foreach_copy_(self.live(section), out_of[section])
