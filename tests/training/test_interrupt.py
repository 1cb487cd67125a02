"""Ctrl-C: asked once, a clean end; asked twice, the end."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from lasgd.training.interrupt import asking_to_stop, ending_at_once, raising_interrupts


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_first_signal_asks_and_interrupts_nothing(number):
    before, asked = signal.getsignal(number), []
    with asking_to_stop(lambda: asked.append(True), terminate_too=True):
        signal.raise_signal(number)
        assert asked == [True]
    assert signal.getsignal(number) is before


def test_the_second_signal_ends_the_process_at_once(monkeypatch):
    codes = []
    monkeypatch.setattr(os, "_exit", codes.append)
    with asking_to_stop(lambda: None, terminate_too=True):
        signal.raise_signal(signal.SIGINT)
        assert codes == []
        signal.raise_signal(signal.SIGTERM)
        assert codes == [128 + signal.SIGTERM]


def test_under_a_supervisor_sigterm_is_left_to_end_the_rank():
    before = signal.getsignal(signal.SIGTERM)
    with asking_to_stop(lambda: None, terminate_too=False):
        assert signal.getsignal(signal.SIGTERM) is before
        assert callable(signal.getsignal(signal.SIGINT))


def test_a_signal_that_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with asking_to_stop(lambda: None, terminate_too=True):
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_thread_leaves_the_signals_alone():
    before, seen = signal.getsignal(signal.SIGINT), []

    def block() -> None:
        with asking_to_stop(lambda: None, terminate_too=True):
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=block)
    thread.start()
    thread.join(10)
    assert seen == [before]


@pytest.fixture
def sigint():
    """Sets the handler of SIGINT for a test."""
    before = signal.getsignal(signal.SIGINT)
    yield lambda handler: signal.signal(signal.SIGINT, handler)
    signal.signal(signal.SIGINT, before)


def test_a_command_ends_at_once_but_for_the_parts_that_tidy_up(sigint):
    sigint(signal.default_int_handler)
    with ending_at_once():
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
        with pytest.raises(KeyboardInterrupt), raising_interrupts():
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("handler", [signal.SIG_IGN, lambda *_: None])
def test_a_handler_of_somebody_elses_stays(sigint, handler):
    sigint(handler)
    with ending_at_once(), raising_interrupts():
        assert signal.getsignal(signal.SIGINT) is handler
