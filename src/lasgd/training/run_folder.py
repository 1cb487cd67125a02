"""The run folder: run.json, metrics.jsonl, and how a file is written so that a full disk destroys nothing.

run.json           one object, `RunRecord`
metrics.jsonl      a line per evaluation, `append_metrics`
timeline.json.gz   see timeline.py
settings.json      the settings as the run was started with
logs/              what ranks print, a file per rank
checkpoints/, model.safetensors
means/, replicas/  what is still to be evaluated; gone when the run has finished
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import math
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from lasgd.errors import ConfigurationError, LasgdError

Status = Literal["finished", "failed", "interrupted"]
LinkEmulation = Literal["none", "namespaces", "user space", "virtual"]


def _finite_or_none(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


Measured = Annotated[float | None, BeforeValidator(_finite_or_none)]
"""A float; None where it is NaN or infinite, which JSON cannot hold, or was not measured."""


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Final(_Record):
    """The averaged model on the validation images: shares of 1, and the mean cross-entropy."""

    top1: Measured
    top5: Measured
    loss: Measured


class StalenessSteps(_Record):
    """Local steps between snapshot and merge."""

    mean: Measured
    max: Measured
    histogram: dict[int, int] = {}
    """Steps -> merges that were so stale."""


class RankRecord(_Record):
    """What one rank did. `waited_s` lies within the run's `wall_s`.

    The run's `samples` are those that the ranks had agreed on when they agreed on the end; the ranks' own counts add up
    to a little more, by the local steps that finished while that last round was on its way.
    """

    rank: int
    local_steps: int
    samples: int
    rounds: int
    compute_s: float
    waited_s: float
    staleness_steps: StalenessSteps
    bytes_sent: int


class HealthEvent(_Record):
    """A rank that held NaN or Inf or had run away, and the round in which it took the mean instead."""

    rank: int
    round: int
    found: Literal["not_finite", "ran_away"] = "not_finite"


class RunRecord(_Record):
    """run.json. `wall_s` runs from the first local step to the agreed end; start and finish lie outside it."""

    status: Status
    algorithm: str
    condition: str
    settings: dict[str, Any]
    environment: dict[str, Any]
    world_size: int
    samples: int = 0
    wall_s: float = 0.0
    virtual_s: float | None = None
    """In a simulated run: the same on the virtual clock, which the ranks' times are of."""
    start_s: float = 0.0
    """Seconds from the start of rank 0 to the first local step."""
    finish_s: float = 0.0
    """Seconds from the agreed end until the results were written, evaluation included."""
    final: Final | None = None
    """None where the run has no averaged model to evaluate."""
    replicas_identical: bool | None = None
    """None where it was not compared."""
    link_emulation: LinkEmulation = "none"
    padding_overrun: float = 0.0
    """Share of the padded steps that outlasted their padding."""
    fragments: int | None = None
    ranks: list[RankRecord] = []
    error: str | None = None
    health: list[HealthEvent] = []
    skipped_images: list[str] = []
    """Images that could not be decoded, each named once."""
    notes: list[str] = []
    """What else went wrong and was mended or left out, such as a checkpoint on a full disk, with the rank."""
    resumed_from_samples: int | None = None
    """Samples at which this run took over from a checkpoint."""


_REACHED = frozenset(RunRecord.model_fields) - {
    *("status", "error", "algorithm", "condition", "settings", "environment", "world_size", "link_emulation")
}
"""The fields that say how far a run has come, and not how it was meant or how it ended."""


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; when the block ends well, that file takes the place of `path`.

    The file is on the disk before it gets its name, so there is always a whole one: the earlier or the new.
    Raises LasgdError, naming `path`, where the system refuses; the temporary file is removed on any error.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            kept = "the earlier file is untouched" if path.exists() else "no file was left behind"
            raise LasgdError(f"{path} could not be written: {error.strerror or error}; {kept}.") from error
        raise


def has_checkpoint(out: Path, world_size: int) -> bool:
    """Whether the folder holds a cut of which every rank has its part, so that the run can be resumed."""
    return any(
        all((cut / f"rank-{rank}.pt").exists() for rank in range(world_size))
        for cut in (out / "checkpoints").glob("[0-9]*")
    )


def holds_nothing_to_lose(out: Path) -> bool:
    """Whether the folder is empty, or all there is comes from a run that ended before it had anything to keep."""
    traces = {"settings.json", "logs"}
    found = {entry.name for entry in out.iterdir() if not entry.name.endswith(".tmp")}
    if "settings.json" in found and not _holds_settings(out / "settings.json"):
        return False
    if "run.json" in found:
        try:
            run = read_run(out)
        except LasgdError:
            return False
        return found <= traces | {"run.json"} and run.status != "finished"
    return found <= traces


def _holds_settings(path: Path) -> bool:
    """Whether the file is of a run of lasgd, also of another version of it, and not somebody's own of that name."""
    try:
        values = read_json(path)
    except ConfigurationError:
        return False
    return isinstance(values, dict) and {"data", "model", "algorithm", "condition"} <= values.keys()


def write_json_atomically(path: Path, obj: Any) -> None:
    """Writes `obj` as JSON, all or nothing; NaN and infinities become null. Raises LasgdError, naming the file."""
    text = json.dumps(_jsonable(obj), indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_run(out: Path, record: RunRecord) -> None:
    """Writes run.json into the run folder `out`. Raises LasgdError."""
    write_json_atomically(out / "run.json", record.model_dump(mode="json"))


def write_unfinished(
    out: Path,
    settings: dict[str, Any],
    world_size: int,
    link_emulation: LinkEmulation,
    status: Literal["failed", "interrupted"],
    error: str,
) -> None:
    """Writes the run.json of an attempt that did not come to its results. Raises LasgdError.

    What an earlier attempt had reached stays in it, and that of a finished run stays as it is: an attempt to resume
    that fails takes nothing away.
    """
    if is_finished(out):
        return
    record = RunRecord(
        status=status,
        algorithm=settings["algorithm"],
        condition=settings["condition"],
        settings=settings,
        environment=environment(),
        world_size=world_size,
        link_emulation=link_emulation,
        error=error,
    )
    with contextlib.suppress(ConfigurationError):  # no earlier attempt, or one that nobody can read
        earlier = read_run(out)
        record = record.model_copy(update={name: getattr(earlier, name) for name in _REACHED})
    write_run(out, record)


def is_finished(out: Path) -> bool:
    """Whether the folder holds a run that has come to its end."""
    try:
        return read_run(out).status == "finished"
    except ConfigurationError:
        return False


def read_run(out: Path) -> RunRecord:
    """Reads run.json of the run folder `out`. Raises ConfigurationError where it is missing or is something else."""
    path = out / "run.json"
    try:
        return RunRecord.model_validate(read_json(path))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ConfigurationError(
            f"{path} is not the run.json of this version of lasgd: {where}: {first['msg']}."
        ) from error


def read_json(path: Path) -> Any:
    """Reads a JSON file. Raises ConfigurationError, naming the file and the line."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigurationError(f"{path} does not exist: {path.parent} is not a run folder.") from error
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read: {error.strerror or error}.") from error
    except json.JSONDecodeError as error:
        raise ConfigurationError(f"{path}, line {error.lineno}: not JSON: {error.msg}.") from error
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{path} is not a text file.") from error


def append_metrics(
    path: Path,
    *,
    wall_s: float,
    samples: int,
    top1: float,
    loss: float,
    virtual_s: float | None = None,
    consensus: float | None = None,
) -> None:
    """Appends one evaluation to metrics.jsonl: the whole line or, with a LasgdError that names the file, nothing.

    `virtual_s` is told of simulated runs only, `consensus` (how far the replicas were apart) where it was measured.
    """
    line = {"wall_s": wall_s, "samples": samples, "top1": top1, "loss": loss}
    if virtual_s is not None:
        line["virtual_s"] = virtual_s
    if consensus is not None:
        line["consensus"] = consensus
    data = (json.dumps(_jsonable(line), allow_nan=False) + "\n").encode()
    try:
        with open(path, "ab", buffering=0) as file:
            size = file.tell()
            try:
                while data:
                    data = data[file.write(data) :]
                os.fsync(file.fileno())
            except OSError:
                with contextlib.suppress(OSError):
                    file.truncate(size)
                raise
    except OSError as error:
        raise LasgdError(
            f"{path} could not be appended to: {error.strerror or error}; the lines in it are kept."
        ) from error


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Reads metrics.jsonl; an absent file has no lines. Raises ConfigurationError, naming the line."""
    if not path.exists():
        return []
    lines = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ConfigurationError(f"{path}, line {number}: not JSON: {error.msg}.") from error
    return lines


def environment() -> dict[str, Any]:
    """What the numbers of a run depend on beside its settings; neither host name nor path."""
    return {
        "lasgd": _version("lasgd"),
        "torch": _version("torch"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "cpu": _cpu_name(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
        for line in lines:
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def _jsonable(obj: Any) -> Any:
    if isinstance(obj, dict):
        return {str(key): _jsonable(value) for key, value in obj.items()}
    if isinstance(obj, list | tuple):
        return [_jsonable(value) for value in obj]
    return _finite_or_none(obj)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
