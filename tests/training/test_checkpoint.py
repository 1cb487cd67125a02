"""Checkpoints: whole or not at all, the newest common one, and what may differ on resume."""

from __future__ import annotations

import errno
import os
import resource
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from lasgd.errors import ConfigurationError, LasgdError
from lasgd.training.checkpoint import Checkpoints, check_same_run, common_cuts, copied, is_healthy
from lasgd.training.run_folder import has_checkpoint, holds_nothing_to_lose

STATE = {"model": {"weight": torch.arange(100_000.0)}}


@contextmanager
def files_of_at_most(n_bytes: int):
    """Writing beyond fails, as on a full disk; needs no root."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_what_is_written_is_read_back(tmp_path):
    checkpoints = Checkpoints(tmp_path, rank=1)
    checkpoints.write(4, STATE)
    state = checkpoints.read(4)
    assert torch.equal(state["model"]["weight"], STATE["model"]["weight"])
    assert state["number"] == 4
    assert checkpoints.numbers() == [4]
    assert Checkpoints(tmp_path, rank=0).numbers() == []


def test_a_full_disk_leaves_the_earlier_checkpoint_and_no_trace_of_the_new_one(tmp_path):
    checkpoints = Checkpoints(tmp_path, rank=0)
    checkpoints.write(1, STATE)
    with files_of_at_most(50_000), pytest.raises(LasgdError) as caught:
        checkpoints.write(2, STATE)
    assert "checkpoints/000002/rank-0.pt could not be written: File too large" in str(caught.value)
    assert "earlier checkpoints are kept" in str(caught.value)
    assert [path.name for path in checkpoints.folder.iterdir()] == ["000001"]
    assert torch.equal(checkpoints.read(1)["model"]["weight"], STATE["model"]["weight"])


def test_a_rank_that_removes_the_folder_it_could_not_fill_costs_no_other_rank_its_part(tmp_path, monkeypatch):
    full, other = Checkpoints(tmp_path, rank=1), Checkpoints(tmp_path, rank=0)
    mkdir, disturbed = Path.mkdir, []

    def mkdir_just_before_the_other_gives_up(path, *arguments, **keywords):
        mkdir(path, *arguments, **keywords)
        if path.name == "000002" and len(disturbed) < 2:
            disturbed.append(path)
            with files_of_at_most(50_000), pytest.raises(LasgdError, match="File too large"):
                full.write(2, STATE)
            assert not path.exists()

    monkeypatch.setattr(Path, "mkdir", mkdir_just_before_the_other_gives_up)
    other.write(2, STATE)
    assert len(disturbed) == 2
    assert torch.equal(other.read(2)["model"]["weight"], STATE["model"]["weight"])


def test_a_folder_that_is_gone_between_two_looks_at_it_is_made_again(tmp_path, monkeypatch):
    checkpoints, is_dir, asked = Checkpoints(tmp_path, rank=0), Path.is_dir, []
    checkpoints.part(2).parent.mkdir(parents=True)

    def gone_by_now(path):  # mkdir asks where the folder exists
        if path.name == "000002" and not asked:
            asked.append(path)
            path.rmdir()
        return is_dir(path)

    monkeypatch.setattr(Path, "is_dir", gone_by_now)
    checkpoints.write(2, STATE)
    assert asked
    assert torch.equal(checkpoints.read(2)["model"]["weight"], STATE["model"]["weight"])


def test_a_file_where_the_folder_should_be_is_named_as_that(tmp_path):
    checkpoints = Checkpoints(tmp_path, rank=0)
    checkpoints.part(2).parent.parent.mkdir(parents=True)
    checkpoints.part(2).parent.write_text("in the way")
    with pytest.raises(LasgdError, match="File exists"):
        checkpoints.write(2, STATE)


@pytest.mark.parametrize("refused", ["fsync", "replace"])
def test_a_disk_that_refuses_at_the_last_moment_leaves_no_half_file(tmp_path, monkeypatch, refused):
    checkpoints = Checkpoints(tmp_path, rank=0)
    checkpoints.write(1, STATE)

    def refuse(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, refused, refuse)
    for number in (1, 2):  # over an earlier file, and beside it
        with pytest.raises(LasgdError, match="No space left on device"):
            checkpoints.write(number, STATE)
    monkeypatch.undo()
    assert [path.name for path in checkpoints.folder.rglob("*")] == ["000001", "rank-0.pt"]
    assert checkpoints.read(1)["number"] == 1


def test_a_checkpoint_of_another_version_is_named(tmp_path):
    checkpoints = Checkpoints(tmp_path, rank=2)
    checkpoints.part(3).parent.mkdir(parents=True)
    torch.save({"version": 99}, checkpoints.part(3))
    with pytest.raises(ConfigurationError, match="no checkpoint of this version"):
        checkpoints.read(3)


def flipped(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 0xFF]) + content[at + 1 :]


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:1000],
        lambda content: content[:-1],
        lambda content: b"",
        lambda content: b"(dp0",
        lambda content: b"no checkpoint at all\n",
        lambda content: b"cposix\nsystem\n.",
        lambda content: flipped(content, 200),  # in the pickle
        lambda content: flipped(content, 200_000),  # in the weights, where torch.load sees nothing
        lambda content: flipped(content, 0),
    ],
)
def test_whatever_is_in_a_damaged_checkpoint_the_error_names_the_file(tmp_path, damage):
    checkpoints = Checkpoints(tmp_path, rank=2)
    checkpoints.write(3, STATE)
    path = checkpoints.part(3)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ConfigurationError, match=r"rank 2: the checkpoint .*000003/rank-2\.pt cannot be read: "):
        checkpoints.read(3)


def test_nothing_in_a_checkpoint_is_executed(tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    checkpoints = Checkpoints(tmp_path, rank=0)
    checkpoints.write(1, {"trap": Trap()})
    with pytest.raises(ConfigurationError, match="cannot be read"):
        checkpoints.read(1)
    assert not (tmp_path / "sprung").exists()


def test_old_new_and_unfinished_parts_of_one_rank_are_removed_and_the_others_stay(tmp_path):
    mine, theirs = Checkpoints(tmp_path, 0), Checkpoints(tmp_path, 1)
    for number in (1, 2, 3):
        mine.write(number, {})
    theirs.write(3, {})
    mine.remove_before(2)
    assert mine.numbers() == [2, 3]
    mine.remove_after(2)
    assert mine.numbers() == [2]
    assert theirs.numbers() == [3]
    unfinished = [mine.folder / "000004" / f".rank-{rank}.pt.77.tmp" for rank in (0, 1)]
    unfinished[0].parent.mkdir()
    for path in unfinished:
        path.touch()
    mine.remove_unfinished()
    assert [path.exists() for path in unfinished] == [False, True]


def test_the_cuts_that_all_ranks_have_come_newest_first(tmp_path):
    assert common_cuts([[1, 2, 3], [1, 2, 3, 4], [1, 2]], tmp_path) == [2, 1]
    with pytest.raises(ConfigurationError, match=r"rank 0: \[1\]; rank 1: none"):
        common_cuts([[1], []], tmp_path)


def test_only_a_cut_of_all_ranks_counts_as_a_checkpoint(tmp_path):
    assert not has_checkpoint(tmp_path, 2)
    Checkpoints(tmp_path, 0).write(1, {})
    assert not has_checkpoint(tmp_path, 2)
    Checkpoints(tmp_path, 1).write(2, {})
    assert not has_checkpoint(tmp_path, 2)
    Checkpoints(tmp_path, 1).write(1, {})
    assert has_checkpoint(tmp_path, 2)
    assert not has_checkpoint(tmp_path, 3)
    assert not holds_nothing_to_lose(tmp_path)


def test_a_resumed_run_may_differ_in_what_is_a_rank_s_own_and_in_nothing_else(tmp_path):
    stored = {"world_size": 4, "settings": {"lr": 0.1, "workers": 1}}
    check_same_run(stored, {"lr": 0.1, "workers": 8}, 4, tmp_path)
    with pytest.raises(ConfigurationError, match=r"is of 4 ranks, this run has 3"):
        check_same_run(stored, stored["settings"], 3, tmp_path)
    with pytest.raises(ConfigurationError, match=r"lr=0\.1, this one has lr=0\.2"):
        check_same_run(stored, {"lr": 0.2, "workers": 1}, 4, tmp_path)


def test_training_may_go_on_while_the_copy_is_written():
    weight = torch.zeros(3)
    state = copied({"a": [weight, (weight, 1)], "b": None})
    weight.fill_(1.0)
    assert state["a"][0].tolist() == state["a"][1][0].tolist() == [0.0, 0.0, 0.0]
    assert state["a"][1][1] == 1
    assert state["b"] is None


def test_a_part_is_healthy_where_all_that_training_goes_on_with_is_finite():
    momentum = {"state": {0: {"momentum_buffer": torch.ones(2)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    state = {"model": {"w": torch.ones(2), "n": torch.tensor(3)}, "optimizer": momentum, "averaging": {}}
    assert is_healthy(state)
    assert not is_healthy(state | {"averaging": {"is_sitting_out": True}})
    assert not is_healthy(state | {"model": {"w": torch.tensor([1.0, torch.nan])}})
    assert not is_healthy(state | {"averaging": {"residual": torch.tensor(torch.inf, dtype=torch.bfloat16)}})
    assert is_healthy(state | {"averaging": {"latest_mean": torch.full((2,), torch.nan)}}), "no mean so far"
    assert not is_healthy(state | {"averaging": {"latest_mean": torch.tensor([1.0, torch.nan])}})
    momentum["state"][0]["momentum_buffer"][1] = -torch.inf
    assert not is_healthy(state)
