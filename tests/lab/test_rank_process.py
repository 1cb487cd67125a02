"""What a rank leaves behind when it fails."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from lasgd.errors import DataError
from lasgd.lab.rank_process import ERROR_FILE, read_error, record_error


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
