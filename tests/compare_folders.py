"""Folders of comparisons as `lasgd compare` leaves them, without running anything."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lasgd.lab.compare.entry import Entry
from lasgd.lab.compare.figures import ENDED, LOG
from lasgd.lab.compare.plan import Cell, Plan, store
from lasgd.lab.compare.results import FILE, Folders, results
from lasgd.training.run_folder import append_metrics, write_json_atomically
from lasgd.training.settings import Settings
from lasgd.training.timeline import Timeline, write_chrome_trace

SHARED = Settings(data="digits", model="cnn4", ranks=2, samples=1000, batch_size=10, evaluations=4)


def plan(labels: str = "lasgd,sync_sgd", **changes: Any) -> Plan:
    entries = tuple(Entry(label, label.partition(":")[0]) for label in labels.split(","))
    values: dict[str, Any] = {
        "shared": SHARED,
        "entries": entries,
        "conditions": ("fast",),
        "seeds": (0,),
        "reference": entries[-1].label,
        "command": "lasgd compare --algorithms " + labels,
    }
    return Plan(**values | changes)


def write_run_folder(
    folder: Path,
    cell: Cell,
    *,
    status: str = "finished",
    wall_s: float = 10.0,
    top1: Sequence[float] = (0.2, 0.5, 0.7, 0.8),
    loss: float | None = 0.5,
    waited_s: float = 0.0,
    error: str | None = None,
    consensus: bool = False,
    histogram: Mapping[str, int] | None = None,
    timeline: bool = False,
    **changes: Any,
) -> None:
    """A run folder whose evaluations lie at equal distances in seconds and in samples."""
    (folder / LOG).parent.mkdir(parents=True, exist_ok=True)
    (folder / LOG).write_text("training\n")
    write_json_atomically(folder / ENDED, {"code": 0 if status == "finished" else 1, "took_s": wall_s + 3})
    settings = cell.entry.settings(SHARED, cell.condition, cell.seed, cell.lr)
    staleness: dict[str, Any] = {"mean": 1.5, "max": 4.0}
    if histogram is not None:
        staleness["histogram"] = dict(histogram)
    rank = {"local_steps": 50, "samples": 500, "rounds": 40, "compute_s": wall_s, "waited_s": waited_s}
    run = {
        "status": status,
        "algorithm": cell.entry.algorithm,
        "condition": cell.condition,
        "settings": settings.model_dump(mode="json"),
        "environment": {},
        "world_size": 2,
        "samples": 1000,
        "wall_s": wall_s,
        "final": {"top1": top1[-1], "top5": 1.0, "loss": loss},
        "replicas_identical": True,
        "link_emulation": "none",
        "padding_overrun": 0.0,
        "fragments": 1,
        "ranks": [{"rank": n, **rank, "staleness_steps": staleness, "bytes_sent": 4_000_000} for n in range(2)],
        "error": error,
    }
    write_json_atomically(folder / "run.json", run | changes)
    if status != "finished":
        return
    for number, value in enumerate(top1, start=1):
        share = number / len(top1)
        append_metrics(
            folder / "metrics.jsonl",
            wall_s=wall_s * share,
            samples=int(1000 * share),
            top1=value,
            loss=loss or math.nan,
        )
    if consensus:
        path = folder / "metrics.jsonl"
        lines = [json.loads(line) | {"consensus": 0.5 / number} for number, line in _numbered(path)]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    if timeline:
        write_chrome_trace(folder / "timeline.json.gz", [_timeline(rank, wall_s, waited_s) for rank in range(2)])


def _numbered(path: Path) -> list[tuple[int, str]]:
    return list(enumerate(path.read_text().splitlines(), start=1))


def _timeline(rank: int, wall_s: float, waited_s: float) -> Timeline:
    found, now_s = Timeline(rank), 0.0
    found.start_s = 0.0
    step_s, wait_s = (wall_s - waited_s) / 50, waited_s / 50
    for _ in range(50):
        found.add("compute", now_s, now_s + step_s)
        if wait_s:
            found.add("wait", now_s + step_s, now_s + step_s + wait_s)
        found.add("round", now_s + 0.2 * step_s, now_s + 0.9 * step_s)
        now_s += step_s + wait_s
    return found


def write_comparison(out: Path, asked: Plan, runs: Mapping[Cell, Mapping[str, Any] | None]) -> Mapping[str, Any]:
    """Writes the folder of a comparison; `runs` says how each cell ended, None: not run. Returns results.json."""
    out.mkdir(parents=True, exist_ok=True)
    for cell, how in runs.items():
        if how is not None:
            write_run_folder(out / cell.folder, cell, **how)
    store(asked, out)
    found = results(asked, Folders(out))
    write_json_atomically(out / FILE, found)
    return json.loads((out / FILE).read_text())
