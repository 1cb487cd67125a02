"""One run at a time in a run folder: two would write over each other's checkpoints and results."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from lasgd.errors import ConfigurationError

_HELD_BY_ANOTHER = (errno.EWOULDBLOCK, errno.EACCES)


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Within the block the existing `folder` is this process's, as far as others ask as well.

    It is the folder itself that is locked, so nothing is left behind, and the lock ends with the process, however that
    ends. Raises ConfigurationError where another process has it. Where a file system knows no such locks, as over some
    networks, nobody is kept out.
    """
    descriptor = os.open(folder, os.O_RDONLY)  # not inherited: ranks that outlive their supervisor hold no lock
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _HELD_BY_ANOTHER:
                raise ConfigurationError(
                    f"another lasgd process is at work in {folder}. Wait for it to end, or name another folder."
                ) from error
        yield
    finally:
        os.close(descriptor)
