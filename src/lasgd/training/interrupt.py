"""Ctrl-C and its like: the first asks for a clean end of all ranks, the second ends this process at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


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
