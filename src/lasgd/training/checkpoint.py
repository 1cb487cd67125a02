"""Checkpoints: a file per rank and cut, all or nothing, and the cuts that every rank has.

    checkpoints/000004/rank-0.pt, rank-1.pt, ...

Every rank writes its own part, because replicas, optimizer states and positions differ. A cut is agreed on: the
parts of one number were taken at each rank's first step boundary after the same round. Older cuts are removed only when
all ranks have said, in the header, that they have the newer one on disk and it is healthy.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch

from lasgd.errors import ConfigurationError, LasgdError
from lasgd.training.run_folder import replacing
from lasgd.training.settings import OWN_TO_A_RANK

VERSION = 2
_ATTEMPTS = 100


class Checkpoints:
    """One rank's parts in the run folder `out`."""

    def __init__(self, out: Path, rank: int):
        self.folder = out / "checkpoints"
        self.rank = rank

    def part(self, number: int) -> Path:
        """Where this rank's part of a cut lies."""
        return self.folder / f"{number:06d}" / f"rank-{self.rank}.pt"

    def write(self, number: int, state: Mapping[str, Any]) -> None:
        """Writes this rank's part, whole or not at all. Raises LasgdError, naming the file."""
        path = self.part(number)
        try:
            with replacing(path) as temporary, _created(temporary) as file:
                # Into a file of ours: torch's own says of a full disk no more than that some assertion failed.
                torch.save({"version": VERSION, "number": number, **state}, file)
        except (LasgdError, OSError, RuntimeError) as error:
            with suppress(OSError):
                path.parent.rmdir()
            if isinstance(error, LasgdError):
                raise
            raise LasgdError(f"{path} could not be written: {_reason(error)}; earlier checkpoints are kept.") from error

    def numbers(self) -> list[int]:
        """The cuts of which this rank has its part, ascending."""
        if not self.folder.is_dir():
            return []
        cuts = [int(entry.name) for entry in self.folder.iterdir() if entry.name.isdigit()]
        return sorted(number for number in cuts if self.part(number).exists())

    def read(self, number: int) -> dict[str, Any]:
        """This rank's part, on the CPU; nothing in it is executed. Raises ConfigurationError if it is damaged."""
        path = self.part(number)
        try:
            _check_sums(path)
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # damaged bytes show as any of them
            raise ConfigurationError(
                f"rank {self.rank}: the checkpoint {path} cannot be read: {_reason(error)}"
            ) from error
        if not isinstance(state, dict) or state.get("version") != VERSION:
            raise ConfigurationError(f"rank {self.rank}: {path} is no checkpoint of this version of lasgd")
        return state

    def remove_before(self, number: int) -> None:
        """Removes this rank's parts of older cuts, and folders that are empty then."""
        for older in self.numbers():
            if older < number:
                with suppress(OSError):
                    self.part(older).unlink()
                with suppress(OSError):
                    self.part(older).parent.rmdir()

    def remove_unfinished(self) -> None:
        """Removes what this rank was writing when it was killed."""
        if self.folder.is_dir():
            for temporary in self.folder.glob(f"*/.rank-{self.rank}.pt.*.tmp"):
                with suppress(OSError):
                    temporary.unlink()
                with suppress(OSError):
                    temporary.parent.rmdir()

    def remove_after(self, number: int) -> None:
        """Removes this rank's parts of cuts newer than the one that the run goes on from."""
        for newer in self.numbers():
            if newer > number:
                with suppress(OSError):
                    self.part(newer).unlink()
                with suppress(OSError):
                    self.part(newer).parent.rmdir()


def _created(path: Path) -> BinaryIO:
    """Opens a new file for writing, in a folder that another rank may be removing.

    A rank whose own part did not fit removes the cut's folder if nothing is in it, which can be just after it was made
    here. It does so once in a cut, so the attempts are as many as ranks can disturb.
    """
    for _ in range(_ATTEMPTS):
        # Gone between two looks at it, the folder makes mkdir say that it exists, and open that it does not.
        with suppress(FileExistsError, FileNotFoundError):
            return _opened(path)
    return _opened(path)


def _opened(path: Path) -> BinaryIO:
    path.parent.mkdir(parents=True, exist_ok=True)
    return open(path, "wb")


def _check_sums(path: Path) -> None:
    """Raises ValueError where bytes are missing or have changed.

    torch.save writes a zip archive with a CRC-32 of every record, which torch.load does not compare.
    """
    try:
        with zipfile.ZipFile(path) as records:
            damaged = records.testzip()
    except zipfile.BadZipFile as error:
        raise ValueError(f"truncated, damaged, or no checkpoint ({error})") from error
    if damaged is not None:
        raise ValueError(f"damaged: the bytes of its record {damaged} have changed")


def common_cuts(numbers_of_ranks: list[list[int]], folder: Path) -> list[int]:
    """The cuts that every rank has, newest first. Raises ConfigurationError where there is none."""
    common = set(numbers_of_ranks[0]).intersection(*numbers_of_ranks[1:])
    if common:
        return sorted(common, reverse=True)
    have = "; ".join(f"rank {rank}: {numbers or 'none'}" for rank, numbers in enumerate(numbers_of_ranks))
    raise ConfigurationError(
        f"no checkpoint in {folder} has a part for every rank ({have}). A run resumes with the ranks it had"
    )


def check_same_run(stored: Mapping[str, Any], now: Mapping[str, Any], world_size: int, folder: Path) -> None:
    """Raises ConfigurationError that says what differs between the checkpoint's run and this one."""
    if stored["world_size"] != world_size:
        raise ConfigurationError(
            f"the checkpoint in {folder} is of {stored['world_size']} ranks, this run has {world_size}. "
            "A run resumes with the ranks it had"
        )
    before = stored["settings"]
    for name in sorted(before.keys() | now.keys()):
        if name not in OWN_TO_A_RANK and before.get(name) != now.get(name):
            raise ConfigurationError(
                f"the checkpoint in {folder} is of a run with {name}={before.get(name)!r}, this one has "
                f"{name}={now.get(name)!r}. Resume with the settings it had"
            )


def is_healthy(state: Mapping[str, Any]) -> bool:
    """Whether a rank can go on from its part without the others' help: all of it is finite, and it did not sit out.

    Reads every tensor, so it is no work for the training thread.
    """
    averaging = dict(state.get("averaging") or {})
    latest = averaging.get("latest_mean")
    if latest is not None and bool(latest.isnan().all()):  # no mean so far, and no sickness: Replica.wait_latest_mean
        del averaging["latest_mean"]
    trained = (state.get("model"), state.get("optimizer"), averaging)
    return not averaging.get("is_sitting_out") and all(map(_is_finite, trained))


def _is_finite(state: Any) -> bool:
    if isinstance(state, torch.Tensor):
        return not (state.is_floating_point() or state.is_complex()) or bool(torch.isfinite(state).all())
    if isinstance(state, Mapping):
        return all(_is_finite(value) for value in state.values())
    if isinstance(state, list | tuple):
        return all(_is_finite(value) for value in state)
    return True


def _reason(error: BaseException) -> str:
    """What the system said, also where torch has hidden it behind an error of its own; else the first line."""
    inner: BaseException | None = error
    while inner is not None:
        if isinstance(inner, OSError) and inner.strerror:
            return inner.strerror
        inner = inner.__cause__ or inner.__context__
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__


def copied(state: Any) -> Any:
    """A deep copy of a state dict, tensors on the CPU, so that training can go on while it is written."""
    if isinstance(state, torch.Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, Mapping):
        return {key: copied(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(copied(value) for value in state)
    return state
