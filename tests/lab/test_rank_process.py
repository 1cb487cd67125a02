"""What a rank leaves behind when it fails."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from lasgd.errors import DataError
from lasgd.lab.rank_process import ERROR_FILE, read_error, record_error
from lasgd.lab.supervisor import RankCommand, Supervisor


def fail(error: Exception) -> Exception:
    try:
        raise error
    except Exception as caught:
        return caught


def test_a_recorded_error_is_read_back_with_its_class_words_and_traceback(tmp_path, monkeypatch):
    path = tmp_path / "error.json"
    monkeypatch.setenv(ERROR_FILE, str(path))
    record_error(fail(DataError("no images in train/cat")))
    error = read_error(path)
    assert error is not None
    assert (error.kind, error.text) == ("DataError", "no images in train/cat")
    assert "in fail" in error.traceback
    assert [p.name for p in tmp_path.iterdir()] == ["error.json"]


def test_torchrun_understands_a_recorded_error(tmp_path, monkeypatch):
    path = tmp_path / "error.json"
    monkeypatch.setenv(ERROR_FILE, str(path))
    record_error(fail(ValueError("boom")))
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=1, error_file=str(path))
    assert failure.message["message"] == "ValueError: boom"


def test_recording_without_an_error_file_or_into_a_missing_folder_is_harmless(tmp_path, monkeypatch):
    monkeypatch.delenv(ERROR_FILE, raising=False)
    record_error(ValueError("boom"))
    monkeypatch.setenv(ERROR_FILE, str(tmp_path / "missing" / "error.json"))
    record_error(ValueError("boom"))


def test_half_an_error_file_is_no_error(tmp_path):
    path = tmp_path / "error.json"
    assert read_error(path) is None
    path.write_text('{"message"')
    assert read_error(path) is None


@pytest.mark.processes
@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent-death signal is Linux's")
def test_a_rank_whose_supervisor_is_gone_already_does_not_run():
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "LASGD_SUPERVISOR_PID": "1"}
    command = [sys.executable, "-m", "lasgd.lab.rank_process", "this"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stdout) == (1, "")


@pytest.mark.processes
def test_ctrl_c_while_a_rank_s_python_starts_ends_it_without_a_traceback(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    command = RankCommand(
        argv=(sys.executable, "-m", "lasgd.lab.rank_process", "this"),
        environment={"PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, sys.path)])},
        error_file=tmp_path / "error.json",
        log=tmp_path / "log.txt",
    )
    with Supervisor([command]) as ranks:
        outcome = ranks.wait_ended(60)
    assert outcome.ended[0].code == -signal.SIGINT
    assert (tmp_path / "log.txt").read_text() == ""
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
