"""Which checkpoint the ranks go on from, when not all of them can be used."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from lasgd.errors import ConfigurationError
from lasgd.group.scripted import Network
from lasgd.training.checkpoint import Checkpoints
from lasgd.training.resume import Cut, wait_usable_cut

WORLD_SIZE = 2


def write_part(out: Path, number: int, rank: int, weight: float = 1.0, sits_out: bool = False) -> None:
    averaging = {"samples": 100 * number + rank, "round": 10 * number + rank, "evaluation": number, "checkpoint": 99}
    averaging["elapsed_s"] = 10.0 * number + rank
    averaging["is_sitting_out"] = sits_out
    Checkpoints(out, rank).write(number, {"model": {"w": torch.tensor([weight, 1.0])}, "averaging": averaging})


@pytest.fixture
def out(tmp_path):
    for number in (1, 2, 3):
        for rank in range(WORLD_SIZE):
            write_part(tmp_path, number, rank)
    return tmp_path


def spoil(out: Path, number: int, rank: int) -> None:
    path = Checkpoints(out, rank).part(number)
    path.write_bytes(path.read_bytes()[:100])


def chosen(out: Path) -> list[Cut]:
    """What each rank goes on from."""
    network = Network(WORLD_SIZE, deliver_at_once=True)
    with ThreadPoolExecutor(WORLD_SIZE) as ranks:
        futures = [
            ranks.submit(wait_usable_cut, Checkpoints(out, rank), [3, 2, 1], network.group(rank), 10.0)
            for rank in range(WORLD_SIZE)
        ]
        return [future.result() for future in futures]


def test_where_all_can_be_read_the_newest_is_taken_and_the_ranks_agree(out):
    cuts = chosen(out)
    assert [cut.number for cut in cuts] == [3, 3]
    assert [cut.state["averaging"]["samples"] for cut in cuts] == [300, 301]
    agreed = {"agreed_samples": 601, "round": 31, "checkpoint": 3, "evaluation": 3, "elapsed_s": 31.0}
    assert cuts[0].agreed == cuts[1].agreed == agreed
    assert cuts[0].skipped == ()


def test_one_that_any_rank_cannot_read_is_skipped_by_all_with_the_reason(out):
    spoil(out, 3, rank=1)
    spoil(out, 2, rank=0)
    cuts = chosen(out)
    assert [cut.number for cut in cuts] == [1, 1]
    for cut in cuts:
        newest, older = cut.skipped
        assert newest.startswith("checkpoint 3 was skipped: rank 1: ")
        assert "000003/rank-1.pt cannot be read: truncated" in newest
        assert older.startswith("checkpoint 2 was skipped: rank 0: ")


def test_where_none_can_be_read_every_rank_says_which_and_why(out):
    for number in (1, 2, 3):
        spoil(out, number, rank=1)
    with pytest.raises(ConfigurationError) as caught:
        chosen(out)
    said = str(caught.value)
    assert "can be used by every rank" in said
    assert said.count("rank-1.pt cannot be read: truncated") == 3
    assert said.endswith("Start a new run")


def test_one_in_which_a_rank_held_nan_or_sat_out_is_skipped_by_all(out):
    write_part(out, 3, rank=0, weight=torch.nan)
    write_part(out, 2, rank=1, sits_out=True)
    cuts = chosen(out)
    assert [cut.number for cut in cuts] == [1, 1]
    assert cuts[0].skipped == (
        "checkpoint 3 was skipped: rank 0 held NaN or Inf",
        "checkpoint 2 was skipped: rank 1 sat out",
    )


def test_where_a_rank_was_sick_in_all_the_newest_with_a_healthy_rank_is_taken(out):
    for number in (1, 2, 3):
        write_part(out, number, rank=0, weight=torch.inf)
    write_part(out, 3, rank=1, weight=torch.nan)
    cuts = chosen(out)
    assert [cut.number for cut in cuts] == [2, 2]
    assert cuts[0].skipped == (
        "checkpoint 3 was skipped: rank 0 held NaN or Inf; rank 1 held NaN or Inf",
        "checkpoint 2 was the best to go on from, although rank 0 held NaN or Inf",
    )


def test_where_all_ranks_were_sick_in_all_there_is_nothing_to_go_on_from(out):
    for number in (1, 2, 3):
        for rank in range(WORLD_SIZE):
            write_part(out, number, rank, weight=torch.nan)
    with pytest.raises(ConfigurationError, match=r"no checkpoint in .* can be used by every rank: .*Start a new run"):
        chosen(out)
