"""`lasgd train`: from options to ranks. What can be found wrong before a rank starts is found here."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated

from cyclopts import Group, Parameter

from lasgd.cli import config as sources
from lasgd.errors import ConfigurationError, LasgdError, unknown
from lasgd.lab.rank_process import INTERRUPTED
from lasgd.training.claim import claimed
from lasgd.training.interrupt import raising_interrupts
from lasgd.training.lasting_output import lasting_output
from lasgd.training.run_folder import (
    LinkEmulation,
    has_checkpoint,
    holds_nothing_to_lose,
    is_finished,
    write_json_atomically,
    write_unfinished,
)
from lasgd.training.settings import BUILT_IN_MODELS, Settings, default_out

DEFAULT_RANKS = 4

HELP = (
    "Train an image classifier on several ranks, none of which waits for another.\n\n"
    f"Starts --ranks local ranks (default {DEFAULT_RANKS}) and supervises them. Under torchrun, this process is one of "
    "the ranks that torchrun started, and --out is needed, the same for all of them."
)

_FOLDER = Group("Run folder and config file", sort_key=0)
_SETTINGS = Group("Settings", sort_key=1)
_OUT = "The run folder, new or empty. Default: runs/DATA-MODEL-ALGORITHM-TIME."
_RESUME = (
    "Continue the run in this folder from its newest checkpoint, with its settings; --out is the same folder then."
)
_CONFIG = "A TOML file of settings, such as batch-size = 64. Options on the command line win over it."


def train(
    *,
    out: Annotated[Path | None, Parameter(group=_FOLDER, help=_OUT)] = None,
    resume: Annotated[Path | None, Parameter(group=_FOLDER, help=_RESUME)] = None,
    config: Annotated[Path | None, Parameter(group=_FOLDER, help=_CONFIG)] = None,
    settings: Annotated[Settings | None, Parameter(name="*", group=_SETTINGS)] = None,
) -> int:
    """Trains as `HELP` says; returns the exit code. Raises LasgdError, ConfigurationError before any rank starts."""
    given = {} if settings is None else {name: getattr(settings, name) for name in settings.model_fields_set}
    stored = None if resume is None else sources.read_stored(resume)
    merged = sources.combine(given, {} if config is None else sources.read_config(config), stored)
    world_size, rank = _world(os.environ)
    under_torchrun = rank is not None
    if world_size is None:
        world_size = merged.ranks or DEFAULT_RANKS
    ranks_were_chosen = merged.ranks is not None and (stored is None or merged.ranks != stored.ranks)
    if ranks_were_chosen and merged.ranks != world_size:
        raise ConfigurationError(
            f"--ranks {merged.ranks} disagrees with torchrun, which started {world_size} (WORLD_SIZE). "
            "Leave --ranks out."
        )
    if stored is not None and stored.ranks is not None and stored.ranks != world_size:
        raise ConfigurationError(
            f"--resume: the run in {resume} has {stored.ranks} ranks, this would have {world_size}. "
            f"Resume it with {stored.ranks}."
        )
    merged = merged.model_copy(update={"ranks": world_size})
    check(merged, world_size)
    if not under_torchrun:
        check_data_and_model(merged)  # once; under torchrun each rank does it for itself
    out = out or resume
    if under_torchrun and out is None:
        raise ConfigurationError("under torchrun all ranks need the same run folder: give --out DIR.")
    out = out or new_default(merged)

    with contextlib.ExitStack() as stack:
        if rank in (None, 0):
            stack.enter_context(prepared_folder(out, resume, world_size))
            say(
                f"training {merged.model} on {merged.data} with {merged.algorithm}: "
                f"{world_size} {ranks_word(world_size)}, condition {merged.condition}; results go to {out}"
            )
        stack.enter_context(explaining_surprises(out))
        stack.enter_context(lasting_output())
        if under_torchrun:
            return _run_one_rank(merged, out, resume, world_size, rank or 0)
        from lasgd.lab.launch import launch

        with raising_interrupts():  # until the supervisor takes over and after it, an emulated network is removed
            code = launch(merged, out, resume, world_size)
        if code == INTERRUPTED and is_finished(out):  # asked to stop when there was nothing left to stop
            return 0
        if code == INTERRUPTED:
            print(_how_to_go_on(out, world_size), file=sys.stderr)
        return code


def check(settings: Settings, world_size: int) -> None:
    """Finds options that cannot work, alone or together. Raises ConfigurationError."""
    if settings.samples is not None:
        settings.check_budget(settings.samples, f"--samples: {settings.samples:,}", world_size)
    if settings.device not in ("auto", "cpu", "cuda"):
        raise unknown("device", settings.device, ("auto", "cpu", "cuda"))
    from lasgd.lab import conditions

    conditions.parse(settings.condition).check(world_size)

    from lasgd import merge
    from lasgd.algorithms import registry

    algorithm = registry.find(settings.algorithm, settings.algorithm_settings())
    algorithm.check_wire(settings.wire)
    algorithm.check_momentum(settings.optimizer_momentum)
    merge.rule(settings.merge)


def check_data_and_model(settings: Settings) -> None:
    """Opens the data, which unpacks an archive before the ranks want it, and makes the model once.

    Raises ConfigurationError, DataError.
    """
    # What cannot be wrong is left to the ranks: torch takes seconds to import, and they all start with it anyway.
    if settings.model not in BUILT_IN_MODELS:
        from lasgd.training.models import build_model

        build_model(settings.model, num_classes=10, channels=3, norm=settings.norm)
    if settings.device == "cuda":
        from lasgd.training.setup import pick_device

        pick_device(settings.device)
    if settings.data != "digits" or settings.image_size is not None:
        from lasgd.training.data import open_data

        if Path(settings.data).is_file():
            print(f"opening {settings.data}; an archive is unpacked the first time", flush=True)
        with raising_interrupts():  # a half unpacked archive is removed
            open_data(settings.data, settings.image_size)


@contextlib.contextmanager
def prepared_folder(out: Path, resume: Path | None, world_size: int) -> Iterator[None]:
    """Creates the run folder; within the block no other run can have it.

    Raises ConfigurationError where `out` holds something that this run would write over, or another run is at work.
    """
    if resume is not None and is_finished(resume):
        raise ConfigurationError(
            f"--resume: the run in {resume} is finished, there is nothing to continue. Its model is "
            f"{resume / 'model.safetensors'}. To train longer, start a new run with a larger --samples or --epochs."
        )
    if resume is not None and not has_checkpoint(resume, world_size):
        raise ConfigurationError(
            f"--resume: {resume} holds no checkpoint of all {world_size} {ranks_word(world_size)} to continue from. "
            "Start a new run."
        )
    continues = resume is not None and out.exists() and out.samefile(resume)
    with contextlib.ExitStack() as stack:
        try:
            out.mkdir(parents=True, exist_ok=True)
            stack.enter_context(claimed(out))
            if not continues and not holds_nothing_to_lose(out):
                can_go_on = has_checkpoint(out, world_size) and not is_finished(out)
                or_go_on = f", or continue its run with lasgd train --resume {out}" if can_go_on else ""
                raise ConfigurationError(f"--out: {out} is not empty. Name another folder or remove it{or_go_on}.")
            (out / "logs").mkdir(exist_ok=True)
            with tempfile.TemporaryFile(dir=out):
                pass
        except OSError as error:
            raise ConfigurationError(f"--out: {out} cannot be used as a folder: {error.strerror or error}.") from error
        yield


def _world(environment: Mapping[str, str]) -> tuple[int | None, int | None]:
    """(world_size, rank) as torchrun sets them, (None, None) without torchrun."""
    if "RANK" not in environment or "WORLD_SIZE" not in environment:
        return None, None
    try:
        rank, world_size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    except ValueError:
        rank, world_size = -1, 0
    if not 0 <= rank < world_size:
        raise ConfigurationError(
            f"RANK={environment['RANK']} and WORLD_SIZE={environment['WORLD_SIZE']} in the environment make no sense "
            "together; expected 0 <= RANK < WORLD_SIZE, as torchrun sets them."
        )
    return world_size, rank


def _run_one_rank(settings: Settings, out: Path, resume: Path | None, world_size: int, rank: int) -> int:
    from lasgd.lab.conditions import parse
    from lasgd.lab.rank_process import record_error

    emulated = parse(settings.condition).bandwidth_bytes_per_s is not None
    emulation: LinkEmulation = "user space" if emulated else "none"
    stored = settings.model_dump(mode="json")
    try:
        if rank == 0:
            write_json_atomically(out / "settings.json", stored)
        from lasgd.training.rank import run_rank

        with raising_interrupts():  # a half unpacked archive is removed, the terminal's cursor comes back
            code = run_rank(settings, out, resume, emulation)
    except Exception as error:
        record_error(error)  # for torchrun's report
        if rank == 0:
            with contextlib.suppress(LasgdError):  # must not hide why the run failed
                write_unfinished(out, stored, world_size, emulation, "failed", str(error))
        raise
    if code == INTERRUPTED and rank == 0:
        print(_how_to_go_on(out, world_size), file=sys.stderr)
    return code


def _how_to_go_on(out: Path, world_size: int) -> str:
    if has_checkpoint(out, world_size):
        return f"interrupted; go on with: lasgd train --resume {out}"
    return "interrupted before the first checkpoint; nothing to go on with"


def new_default(settings: Settings) -> Path:
    """A run folder that does not exist yet."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    out, number = default_out(settings, stamp), 2
    while out.exists():
        out, number = default_out(settings, f"{stamp}-{number}"), number + 1
    return out


@contextlib.contextmanager
def explaining_surprises(out: Path) -> Iterator[None]:
    """Turns what nobody foresaw into a LasgdError that says where its traceback is."""
    try:
        yield
    except LasgdError:
        raise
    except Exception as error:
        path = keep_traceback(error, out / "logs")
        raise LasgdError(surprise(error, path)) from error


def keep_traceback(error: BaseException, *folders: Path) -> Path | None:
    """Writes the traceback to a new file in the first folder that takes it, at last where temporary files go."""
    for where in (*folders, Path(tempfile.gettempdir())):
        with contextlib.suppress(OSError):
            handle, name = tempfile.mkstemp(prefix="lasgd-traceback-", suffix=".log", dir=where, text=True)
            with open(handle, "w", encoding="utf-8") as file:
                file.writelines(traceback.format_exception(error))
            return Path(name)
    return None


def surprise(error: BaseException, path: Path | None) -> str:
    """What to say of an exception that nothing in lasgd raises on purpose."""
    if isinstance(error, OSError):  # a full disk, a limit: somebody's to mend, though not foreseen here
        return f"the system refused: {error}." + ("" if path is None else f" Details in {path}")
    where = "" if path is None else f" Please report it with the traceback in {path}"
    return f"unexpected {type(error).__name__}: {error}. This is a bug, in lasgd or in a model it was given.{where}"


def say(line: str) -> None:
    """Prints to standard output. Raises LasgdError where that is refused; nobody listening is BrokenPipeError."""
    try:
        print(line, flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise LasgdError(f"standard output cannot be written: {error.strerror or error}") from error


def ranks_word(n: int) -> str:
    """`rank` or `ranks`."""
    return "rank" if n == 1 else "ranks"
