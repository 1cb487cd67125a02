"""Standard streams whose end does not end the run: `lasgd train | head`, a full disk under a log."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO


class LastingOutput:
    """A text stream that drops everything once it has been refused, and remembers why. All else is the stream's own."""

    def __init__(self, stream: TextIO):
        self._stream = stream
        self.lost: str | None = None
        """Why it could not be written any more; None as long as it can."""

    def write(self, text: str) -> int:
        """As the stream's own, but never fails for the system's sake."""
        try:
            return self._stream.write(text)
        except OSError as error:
            self._lose(error)
            return len(text)

    def flush(self) -> None:
        """As the stream's own, but never fails for the system's sake."""
        try:
            self._stream.flush()
        except OSError as error:
            self._lose(error)

    def _lose(self, error: OSError) -> None:
        self.lost = self.lost or error.strerror or str(error)
        # What the stream still holds in its buffer would make the interpreter fail at exit, with exit code 120.
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def lasting_output() -> Iterator[LastingOutput | None]:
    """Within the block `sys.stdout`, which is given, and `sys.stderr` outlast whoever reads them.

    None where this process has no standard output, as whoever started it has closed that.
    """
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (_lasting(stream) for stream in before)
    try:
        yield sys.stdout
    finally:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
        sys.stdout, sys.stderr = before


def _lasting(stream: TextIO | None) -> Any:
    return stream if stream is None or isinstance(stream, LastingOutput) else LastingOutput(stream)
