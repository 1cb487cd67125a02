"""One run at a time in a run folder."""

from __future__ import annotations

import errno
import fcntl
import subprocess
import sys

import pytest

from lasgd.cli.train import prepared_folder
from lasgd.errors import ConfigurationError
from lasgd.training.claim import claimed


def test_a_folder_that_is_claimed_is_refused_to_others_until_it_is_given_back(tmp_path):
    at_work = pytest.raises(ConfigurationError, match="another lasgd process is at work in")
    with claimed(tmp_path), at_work, claimed(tmp_path):
        pass
    with claimed(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_a_claim_ends_with_its_process_and_its_children_do_not_keep_it(tmp_path):
    program = (
        "import subprocess, sys\n"
        "from pathlib import Path\n"
        "from lasgd.training.claim import claimed\n"
        "claim = claimed(Path(sys.argv[1]))\n"
        "claim.__enter__()\n"
        "child = subprocess.Popen(['sleep', '30'], stdout=subprocess.DEVNULL)\n"
        "print(child.pid, flush=True)\n"
        "sys.stdin.read()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    child = int(process.stdout.readline())
    try:
        with pytest.raises(ConfigurationError), claimed(tmp_path):
            pass
        process.kill()
        process.wait(30)
        with claimed(tmp_path):
            pass
    finally:
        subprocess.run(["kill", str(child)], check=False)
        process.communicate()


def test_two_runs_that_start_together_do_not_both_take_an_empty_folder(tmp_path):
    at_work = pytest.raises(ConfigurationError, match="at work")
    with prepared_folder(tmp_path / "run", None, 2), at_work, prepared_folder(tmp_path / "run", None, 2):
        pass
    with prepared_folder(tmp_path / "run", None, 2):
        pass


def test_where_a_file_system_has_no_locks_nobody_is_kept_out(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOTSUP, "not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with claimed(tmp_path), claimed(tmp_path):
        pass
