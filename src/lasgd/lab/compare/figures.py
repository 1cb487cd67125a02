"""What one run folder says, as the figures of results.json.

The files are read as JSON and not as `RunRecord`: a run of another runner, or of a later version, may say more.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lasgd.errors import LasgdError
from lasgd.lab.compare.child import last_line
from lasgd.lab.compare.entry import YARDSTICK
from lasgd.training.run_folder import read_json, read_metrics

LOG = Path("logs") / "command.log"
"""What the command of a run printed, below its run folder."""
ENDED = Path("logs") / "ended.json"
"""How its process ended: exit code, and seconds from start to end."""


@dataclass(frozen=True)
class Folder:
    """A run folder as it is found, whatever state it is in."""

    run: Mapping[str, Any] | None
    """run.json; None where it is missing or cannot be read."""
    metrics: Sequence[Mapping[str, Any]]
    """In the order of samples."""
    status: str
    """`finished`, `failed`, `interrupted`, or `missing` where nothing was ever started."""
    error: str | None
    took_s: float | None
    """From the start of its process to the end; None where nobody noted it."""


def read_folder(folder: Path) -> Folder:
    """Reads one run folder. Never raises: what cannot be read is a failed run, with the reason."""
    try:
        ended = read_json(folder / ENDED)
        code, took_s, reason = ended.get("code"), ended.get("took_s"), ended.get("reason")
    except (LasgdError, AttributeError):
        code, took_s, reason = None, None, None
    try:
        run = read_json(folder / "run.json")
        if not isinstance(run, dict) or "status" not in run:
            raise LasgdError(f"{folder / 'run.json'} is no run.json of lasgd.")
        metrics = sorted(map(_by_its_clock, read_metrics(folder / "metrics.jsonl")), key=lambda line: line["samples"])
    except (LasgdError, KeyError, TypeError, OSError, UnicodeDecodeError) as error:
        if not (folder / "logs").exists():
            return Folder(None, (), "missing", None, took_s)
        if reason:
            return Folder(None, (), "failed", reason, took_s)
        if code in (130, -2):
            return Folder(None, (), "interrupted", "interrupted before anything was written", took_s)
        if code is None and not (folder / "run.json").exists():
            return Folder(None, (), "interrupted", "whatever ran it was ended before it", took_s)
        said = last_line(folder / LOG) or (str(error) if (folder / "run.json").exists() else "and said nothing")
        return Folder(None, (), "failed", f"exit code {code}: {said}", took_s)
    if reason and run["status"] != "finished":
        return Folder(run, metrics, "failed", reason, took_s)
    return Folder(run, metrics, run["status"], run.get("error"), took_s)


def crossing(metrics: Sequence[Mapping[str, Any]], target: float, over: str) -> float | None:
    """Where top-1 reaches `target` for the first time, in `over` (wall_s or samples); None: it never does.

    Linear between two evaluations. A first evaluation that is there already counts as it is: nothing is known before.
    """
    before: Mapping[str, Any] | None = None
    for line in metrics:
        top1 = line.get("top1")
        if top1 is None:
            continue
        if top1 >= target:
            if before is None or top1 == before["top1"]:
                return float(line[over])
            share = (target - before["top1"]) / (top1 - before["top1"])
            return before[over] + share * (line[over] - before[over])
        before = line
    return None


def steps_per_s(run: Mapping[str, Any]) -> float | None:
    """Local steps per second, of all ranks together, each over the time in which it was stepping.

    Ranks that agree on the end step until then, so that is `wall_s`, or their own count where it is longer. Independent
    ranks stop each at its own share of the budget, and their `compute_s` has no gaps.
    """
    total = 0.0
    for rank in run.get("ranks") or ():
        alone = run["algorithm"] == YARDSTICK
        stepping_s = rank["compute_s"] if alone else max(rank["compute_s"], _clock_s(run))
        if stepping_s > 0:
            total += rank["local_steps"] / stepping_s
    return total or None


def figures(found: Folder) -> dict[str, Any]:
    """The part of a run's entry in results.json that needs no other run."""
    run: Mapping[str, Any] = found.run or {}
    ranks, final = run.get("ranks") or (), run.get("final") or {}
    done = found.status == "finished"
    return {
        "status": found.status,
        "error": found.error,
        "steps_per_s": steps_per_s(run) if done else None,
        "final_top1": final.get("top1") if done else None,
        "final_loss": final.get("loss") if done else None,
        "wall_s": _clock_s(run) if done else None,
        "samples": run.get("samples") if done else None,
        "waited_s": mean(rank["waited_s"] for rank in ranks) if done else None,
        "staleness_steps": {
            "mean": mean(rank["staleness_steps"]["mean"] for rank in ranks),
            "max": max((rank["staleness_steps"]["max"] or 0 for rank in ranks), default=None),
        },
        "bytes_sent": mean(rank["bytes_sent"] for rank in ranks),
        "replicas_identical": run.get("replicas_identical"),
        "padding_overrun": run.get("padding_overrun"),
        "link_emulation": run.get("link_emulation"),
        "fragments": run.get("fragments"),
        "health": len(run.get("health") or ()),
        "took_s": found.took_s,
    }


def mean(values: Any) -> float | None:
    """Of those that are there and finite; None where there are none."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    return statistics.fmean(known) if known else None


def _by_its_clock(line: Mapping[str, Any]) -> Mapping[str, Any]:
    return line if line.get("virtual_s") is None else {**line, "wall_s": line["virtual_s"]}


def _clock_s(run: Mapping[str, Any]) -> float:
    virtual_s = run.get("virtual_s")
    return (run.get("wall_s") or 0.0) if virtual_s is None else virtual_s
