"""Child processes: exit codes, logs, and who hears of Ctrl-C."""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path

import pytest

from lasgd.errors import LasgdError
from lasgd.lab.compare.child import Interrupts, last_line, run_child

PATIENT = """
import signal, time
signal.signal(signal.SIGINT, lambda *_: print('heard', flush=True))
print('on', flush=True)
time.sleep(60)
"""
"""Hears of SIGINT and goes on."""
CLEAN = """
import signal, sys, time
signal.signal(signal.SIGINT, lambda *_: sys.exit(130))
print('on', flush=True)
time.sleep(60)
"""

ENDING = """
import signal, time
if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
print('on', flush=True)
time.sleep(30)
"""
"""As `lasgd train` at its start: ends at SIGINT, unless it was started with that ignored."""


def python(code: str) -> list[str]:
    return [sys.executable, "-S", "-c", code]


def interrupt_when_on(log: Path, *, times: int = 1, number: int = signal.SIGINT):
    """A `watch` that signals this process, in the main thread, once the child is on; again when it has heard."""
    sent = 0

    def watch() -> None:
        nonlocal sent
        text = log.read_text()
        if "on" in text and sent < times and text.count("heard") == sent:
            sent += 1
            os.kill(os.getpid(), number)

    return watch


@pytest.mark.processes
def test_exit_code_and_output_are_kept(tmp_path):
    log = tmp_path / "log"
    code = run_child(
        python("import sys; print('said'); print('wrong', file=sys.stderr); sys.exit(3)"), log, Interrupts()
    )
    assert code == 3
    assert sorted(log.read_text().split()) == ["said", "wrong"]


@pytest.mark.processes
def test_a_signal_is_its_number_below_zero(tmp_path):
    assert run_child(python("import os; os.kill(os.getpid(), 9)"), tmp_path / "log", Interrupts()) == -9


def test_a_command_that_is_not_there_is_an_error_of_ours(tmp_path):
    with pytest.raises(LasgdError, match="could not be started"):
        run_child([str(tmp_path / "none")], tmp_path / "log", Interrupts())


@pytest.mark.processes
@pytest.mark.timeout(40)
def test_ctrl_c_reaches_the_child_which_ends_cleanly(tmp_path):
    log, interrupts = tmp_path / "log", Interrupts()
    with interrupts.caught():
        code = run_child(python(CLEAN), log, interrupts, interrupt_when_on(log))
    assert (code, interrupts.count) == (130, 1)


@pytest.mark.processes
@pytest.mark.timeout(40)
def test_under_nohup_a_termination_still_ends_the_child_cleanly(tmp_path):
    log, interrupts = tmp_path / "log", Interrupts()
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell does for what it runs in the background
    try:
        with interrupts.caught():
            watch = interrupt_when_on(log, number=signal.SIGTERM)
            code = run_child(python(ENDING), log, interrupts, watch)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    assert (code, interrupts.count) == (-signal.SIGINT, 1)


@pytest.mark.processes
@pytest.mark.timeout(40)
def test_a_child_that_does_not_listen_is_killed_at_the_third(tmp_path):
    log, interrupts = tmp_path / "log", Interrupts()
    with interrupts.caught():
        code = run_child(python(PATIENT), log, interrupts, interrupt_when_on(log, times=3))
    assert (code, interrupts.count) == (-signal.SIGKILL, 3)


@pytest.mark.processes
@pytest.mark.timeout(40)
def test_a_run_over_its_limit_is_ended(tmp_path):
    log = tmp_path / "log"
    assert run_child(python(CLEAN), log, Interrupts(), limit_s=1.5) in (130, -signal.SIGINT)


@pytest.mark.processes
@pytest.mark.timeout(40)
def test_an_error_of_ours_leaves_no_child_behind(tmp_path):
    log = tmp_path / "log"
    seen: list[int] = []

    def watch() -> None:
        if "pid" in (text := log.read_text()) and text.endswith("\n"):
            seen.append(int(text.split()[1]))
            raise RuntimeError("ours")

    with pytest.raises(RuntimeError, match="ours"):
        run_child(
            python("import os, time; print('pid', os.getpid(), flush=True); time.sleep(60)"), log, Interrupts(), watch
        )
    with pytest.raises(ProcessLookupError):
        os.kill(seen[0], 0)


@pytest.mark.processes
def test_a_terminals_ctrl_c_does_not_reach_the_child_by_itself(tmp_path):
    run_child(python("import os; print(os.getsid(0), os.getpid())"), tmp_path / "log", Interrupts())
    session, child = (tmp_path / "log").read_text().split()
    assert session == child


@pytest.mark.processes
def test_the_child_knows_nothing_of_torchrun(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    run_child(python("import os; print(os.environ.get('RANK'))"), tmp_path / "log", Interrupts())
    assert (tmp_path / "log").read_text() == "None\n"


@pytest.mark.processes
def test_descriptors_are_kept_open(tmp_path):
    with open(tmp_path / "lock", "w") as lock:
        code = f"import os; os.fstat({lock.fileno()})"
        assert run_child(python(code), tmp_path / "log", Interrupts(), keep_open=[lock.fileno()]) == 0
        assert run_child(python(code), tmp_path / "log", Interrupts()) != 0


def test_signals_are_as_before_afterwards():
    before = signal.getsignal(signal.SIGINT)
    with Interrupts().caught():
        assert signal.getsignal(signal.SIGINT) != before
    assert signal.getsignal(signal.SIGINT) == before


def test_in_another_thread_no_handler_is_touched():
    before, seen = signal.getsignal(signal.SIGINT), []

    def run() -> None:
        with Interrupts().caught():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(10)
    assert seen == [before]


def test_the_last_line_is_the_last_that_says_something(tmp_path):
    (tmp_path / "log").write_text("x" * 10_000 + "\nfirst\n last \n\n\n")
    assert last_line(tmp_path / "log") == "last"
    assert last_line(tmp_path / "none") == ""
