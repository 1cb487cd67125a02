"""What a run does when nobody takes its standard output any more."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys

import pytest
from rich.console import Console

from lasgd.cli.train import say
from lasgd.errors import LasgdError
from lasgd.training.lasting_output import LastingOutput, lasting_output


def without_reader():
    reading, writing = os.pipe()
    os.close(reading)
    return os.fdopen(writing, "w")


def test_a_reader_that_has_gone_fails_nobody_and_is_remembered():
    output = LastingOutput(without_reader())
    assert output.lost is None
    output.write("one\n")
    output.flush()
    assert output.lost == "Broken pipe"
    output.write("two\n")
    output.flush()
    output.close()


def test_a_console_on_it_goes_on_too():
    with without_reader() as stream:
        output = LastingOutput(stream)
        console = Console(file=output)
        console.print("one")
        console.print("two")
        assert output.lost == "Broken pipe"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_fails_nobody_either():
    with open("/dev/full", "w") as stream:
        output = LastingOutput(stream)
        print("one", file=output, flush=True)
        assert output.lost == "No space left on device"


def test_it_is_the_stream_in_all_else(capsys):
    with lasting_output() as output:
        assert output is not None and sys.stdout is output
        print("heard")
        assert output.isatty() is False and output.lost is None
    assert sys.stdout is not output
    assert capsys.readouterr().out == "heard\n"


def test_a_process_whose_reader_has_gone_ends_with_its_own_exit_code():
    """The interpreter flushes standard output when it ends, and makes it 120 if that fails."""
    program = (
        "from lasgd.training.lasting_output import lasting_output\n"
        "with lasting_output() as output:\n"
        "    print('x' * 100_000)\n"
        "assert output.lost == 'Broken pipe'\n"
    )
    with without_reader() as stream:
        ended = subprocess.run([sys.executable, "-c", program], stdout=stream, stderr=subprocess.PIPE, timeout=60)
    assert (ended.returncode, ended.stderr) == (0, b"")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_command_that_cannot_say_where_its_results_go_says_so(monkeypatch):
    stream = open("/dev/full", "w")  # noqa: SIM115 closing it would fail once more
    monkeypatch.setattr(sys, "stdout", stream)
    with pytest.raises(LasgdError, match="standard output cannot be written: No space left on device"):
        say("results go to runs/one")
    with contextlib.suppress(OSError):
        stream.close()


def test_within_one_another_they_are_one(capsys):
    with lasting_output() as outer, lasting_output() as inner:
        assert inner is outer


def test_standard_error_outlasts_its_reader_too(monkeypatch):
    with without_reader() as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        with lasting_output() as output:
            print("nobody hears this", file=sys.stderr, flush=True)
            assert output is not None and output.lost is None
        assert sys.stderr is stream


def test_without_standard_output_there_is_nothing_to_outlast(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    with lasting_output() as output:
        assert output is None and sys.stdout is None
