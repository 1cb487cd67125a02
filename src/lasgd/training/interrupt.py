"""Ctrl-C and its like: the first asks for a clean end of all ranks, the second ends this process at once.

Before training there is nothing to save, and Python's own answer to SIGINT, a KeyboardInterrupt wherever the process
happens to be, is worse than none: raised within `import numpy` or `import torch` it is swallowed, or becomes an
ImportError. So a command begins with `ending_at_once`, and turns to `raising_interrupts` where something has to be
tidied away: a half unpacked archive, an emulated network.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def ending_at_once() -> Iterator[None]:
    """Within the block SIGINT ends the process, as it does in a program that knows nothing of it; a shell says 130.

    Where it is ignored, or somebody has a handler of his own, all stays as it is.
    """
    with _replacing_handler(signal.default_int_handler, signal.SIG_DFL):
        yield


@contextmanager
def raising_interrupts() -> Iterator[None]:
    """Within the block SIGINT raises KeyboardInterrupt, where outside it ends the process."""
    with _replacing_handler(signal.SIG_DFL, signal.default_int_handler):
        yield


@contextmanager
def _replacing_handler(expected: Any, handler: Any) -> Iterator[None]:
    is_expected = signal.getsignal(signal.SIGINT) is expected
    if not is_expected or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, expected)


@contextmanager
def asking_to_stop(ask: Callable[[], None], terminate_too: bool) -> Iterator[None]:
    """Within the block SIGINT calls `ask`, with `terminate_too` SIGTERM and SIGHUP too; afterwards all is as before.

    A signal that is ignored, such as SIGHUP under nohup, stays so.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may install handlers; whoever runs ranks in threads handles signals itself
        return
    was_asked = False

    def handle(signal_number: int, frame: object) -> None:
        nonlocal was_asked
        if was_asked:
            os._exit(128 + signal_number)
        was_asked = True
        ask()

    signals = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP] if terminate_too else [signal.SIGINT]
    before = {
        number: signal.signal(number, handle) for number in signals if signal.getsignal(number) is not signal.SIG_IGN
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
