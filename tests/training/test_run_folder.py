"""Files of a run: whole or not at all, and read back with clear errors."""

from __future__ import annotations

import contextlib
import json
import math
import os
import resource
import socket

import pytest

from lasgd.errors import ConfigurationError, LasgdError
from lasgd.training.run_folder import (
    Final,
    HealthEvent,
    RankRecord,
    RunRecord,
    StalenessSteps,
    append_metrics,
    environment,
    holds_nothing_to_lose,
    read_metrics,
    read_run,
    replacing,
    write_json_atomically,
    write_run,
    write_unfinished,
)
from lasgd.training.settings import Settings


def record(**changes) -> RunRecord:
    rank = RankRecord(
        rank=0,
        local_steps=10,
        samples=320,
        rounds=9,
        compute_s=1.5,
        waited_s=0.01,
        staleness_steps=StalenessSteps(mean=1.5, max=3),
        bytes_sent=4096,
    )
    values = {
        "status": "finished",
        "algorithm": "lasgd",
        "condition": "fast",
        "settings": {"lr": 0.1},
        "environment": {"python": "3.11"},
        "world_size": 1,
        "samples": 320,
        "wall_s": 2.0,
        "final": Final(top1=0.9, top5=1.0, loss=0.3),
        "replicas_identical": True,
        "ranks": [rank],
        "health": [HealthEvent(rank=0, round=3)],
        "skipped_images": ["train/cat/1.jpg"],
        "fragments": 5,
    }
    return RunRecord(**(values | changes))


@contextlib.contextmanager
def full_disk(limit_bytes: int):
    """No file may grow beyond the limit: the write that would fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_run_record_is_read_back_as_it_was_written(tmp_path):
    write_run(tmp_path, record())
    assert read_run(tmp_path) == record()
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_run_json_has_the_fields_that_others_rely_on(tmp_path):
    write_run(tmp_path, record())
    run = json.loads((tmp_path / "run.json").read_text())
    promised = "status algorithm condition settings environment world_size samples wall_s start_s finish_s final "
    promised += "replicas_identical link_emulation padding_overrun ranks"
    assert set(promised.split()) <= set(run)
    assert set(run["final"]) == {"top1", "top5", "loss"}
    rank = "rank local_steps samples rounds compute_s waited_s staleness_steps bytes_sent"
    assert set(run["ranks"][0]) == set(rank.split())
    assert set(run["ranks"][0]["staleness_steps"]) == {"mean", "max", "histogram"}


def test_a_loss_that_is_not_a_number_becomes_null(tmp_path):
    write_run(tmp_path, record(final=Final(top1=0.1, top5=0.5, loss=math.nan)))
    assert json.loads((tmp_path / "run.json").read_text())["final"]["loss"] is None
    write_json_atomically(tmp_path / "any.json", {"a": [math.inf, 1.0]})
    assert json.loads((tmp_path / "any.json").read_text()) == {"a": [None, 1.0]}


def test_a_full_disk_is_named_and_keeps_the_earlier_file(tmp_path):
    path = tmp_path / "run.json"
    write_json_atomically(path, {"samples": 1})
    with (
        full_disk(1000),
        pytest.raises(LasgdError, match=r"run\.json could not be written: .*earlier file is untouched"),
    ):
        write_json_atomically(path, {"settings": "x" * 5000})
    assert json.loads(path.read_text()) == {"samples": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["run.json"]


def test_a_crash_between_writing_and_renaming_keeps_the_earlier_file(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_json_atomically(path, 1)

    def crash(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", crash)
    with pytest.raises(LasgdError, match="No space left on device"):
        write_json_atomically(path, 2)
    assert path.read_text() == "1\n"


def test_any_error_while_replacing_leaves_no_temporary_file(tmp_path):
    with pytest.raises(ValueError, match="stop"), replacing(tmp_path / "model.safetensors") as temporary:
        temporary.write_bytes(b"half")
        raise ValueError("stop")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(LasgdError, match=r"missing/a\.json could not be written: No such file or directory; no file"):
        write_json_atomically(tmp_path / "missing" / "a.json", {})


def test_metrics_are_appended_line_by_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    append_metrics(path, wall_s=1.0, samples=100, top1=0.5, loss=1.5)
    append_metrics(path, wall_s=2.0, samples=200, top1=0.6, loss=math.nan)
    assert read_metrics(path) == [
        {"wall_s": 1.0, "samples": 100, "top1": 0.5, "loss": 1.5},
        {"wall_s": 2.0, "samples": 200, "top1": 0.6, "loss": None},
    ]
    assert read_metrics(tmp_path / "none.jsonl") == []


def test_a_full_disk_takes_back_the_half_line_and_names_the_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    append_metrics(path, wall_s=1.0, samples=100, top1=0.5, loss=1.5)
    before = path.read_bytes()
    with full_disk(len(before) + 10), pytest.raises(LasgdError, match=r"metrics\.jsonl could not be appended to"):
        append_metrics(path, wall_s=2.0, samples=200, top1=0.6, loss=1.0)
    assert path.read_bytes() == before


def test_reading_what_is_no_run_says_so(tmp_path):
    with pytest.raises(ConfigurationError, match="is not a run folder"):
        read_run(tmp_path)
    (tmp_path / "run.json").write_text('{\n"status": }')
    with pytest.raises(ConfigurationError, match=r"run\.json, line 2: not JSON"):
        read_run(tmp_path)
    (tmp_path / "run.json").write_text('{"status": "finished"}')
    with pytest.raises(ConfigurationError, match=r"run\.json is not the run\.json of this version .* Field required"):
        read_run(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{}\n{"wall')
    with pytest.raises(ConfigurationError, match=r"metrics\.jsonl, line 2: not JSON"):
        read_metrics(tmp_path / "metrics.jsonl")


@pytest.mark.parametrize("content", ['{"theme": "dark"}', "[]", "// comments\n{}"])
def test_a_settings_file_of_somebody_elses_is_something_to_lose(tmp_path, content):
    (tmp_path / "logs").mkdir()
    assert holds_nothing_to_lose(tmp_path)
    (tmp_path / "settings.json").write_text(Settings().model_dump_json())
    assert holds_nothing_to_lose(tmp_path)
    (tmp_path / "settings.json").write_text(content)
    assert not holds_nothing_to_lose(tmp_path)


def unfinished(out, error: str) -> RunRecord:
    settings = {"algorithm": "lasgd", "condition": "fast", "lr": 0.2}
    write_unfinished(out, settings, 1, "none", "failed", error)
    return read_run(out)


def test_an_attempt_that_fails_tells_why_and_keeps_what_the_earlier_one_had_reached(tmp_path):
    assert unfinished(tmp_path, "no GPU").samples == 0
    reached = record(status="interrupted", error=None)
    write_run(tmp_path, reached)
    after = unfinished(tmp_path, "rank 1 was killed")
    assert (after.status, after.error, after.settings["lr"]) == ("failed", "rank 1 was killed", 0.2)
    for name in ("samples", "wall_s", "final", "ranks", "health", "skipped_images", "fragments", "replicas_identical"):
        assert getattr(after, name) == getattr(reached, name)
    (tmp_path / "run.json").write_text("half a fi")
    assert unfinished(tmp_path, "again").samples == 0


def test_the_record_of_a_finished_run_stays_as_it_is(tmp_path):
    write_run(tmp_path, record())
    assert unfinished(tmp_path, "rank 1 was killed") == record()


def test_the_environment_names_versions_but_neither_host_nor_paths():
    found = environment()
    assert set(found) == {"lasgd", "torch", "python", "platform", "cpu_count", "cpu"}
    text = json.dumps(found)
    assert socket.gethostname() not in text
    assert os.path.expanduser("~") + "/" not in text
