"""The README's figure: what four ranks, one of them slow, do at the same time over a slow link.

Runs `lasgd train` under `link=20mbit+step=100ms+straggler=last:4x`, stores a few seconds of its timeline with the run
card in benchmarks/results/timeline.json, and draws docs/images/timeline.svg from that file.

    python benchmarks/timeline.py              measure and draw, about half a minute
    python benchmarks/timeline.py --draw       draw again from the stored result
"""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from common import FOLDER, Bar, Report, arguments_for, run_card, where_to_store
from lasgd.training.run_folder import read_run

CONDITION = "link=20mbit+step=100ms+straggler=last:4x"
RANKS, SECONDS, BEGIN_S = 4, 3.0, 5.0
SAMPLES = 6400
FIGURE = FOLDER.parent / "docs" / "images" / "timeline.svg"


def measure(folder: Path, seed: int) -> tuple[dict, Path]:
    """One real run; returns what the figure needs of it."""
    out = folder / "run"
    command = [sys.executable, "-m", "lasgd", "train", "--model=cnn4", f"--ranks={RANKS}", f"--samples={SAMPLES}"]
    command += [f"--condition={CONDITION}", f"--seed={seed}", "--batch-size=16", "--evaluations=0", "--checkpoints=0"]
    subprocess.run([*command, f"--out={out}"], check=True, timeout=300, stdout=subprocess.DEVNULL)
    return read_run(out).model_dump(mode="json"), out


def intervals(out: Path) -> list[list]:
    """[rank, kind, begin_s, end_s] within the figure's window."""
    events = json.loads(gzip.decompress((out / "timeline.json.gz").read_bytes()))["traceEvents"]
    found = []
    for event in events:
        if event["ph"] == "X":
            begin_s = event["ts"] / 1e6 - BEGIN_S
            end_s = begin_s + event["dur"] / 1e6
            if end_s > 0 and begin_s < SECONDS:
                found.append([event["pid"], event["name"], round(begin_s, 4), round(end_s, 4)])
    return sorted(found)


def draw(result: dict, path: Path) -> None:
    """Writes the figure as SVG, in greys and blues that read on white and on black."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "lasgd"  # the same bytes every time
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 3.0))
    height = 0.36
    for rank, kind, begin_s, end_s in result["figures"]["intervals"]:
        first, last = max(0.0, begin_s), min(SECONDS, end_s)
        top = kind == "compute"
        if kind in ("compute", "round"):
            axes.broken_barh(
                [(first, max(0.0, last - first))],
                (-rank + (0.02 if top else -height - 0.02), height),
                facecolor="#4c78a8" if top else "#e0862e",
                edgecolor="white",
                linewidth=0.8,
            )
    axes.set_yticks([-rank for rank in range(RANKS)], [f"rank {rank}" for rank in range(RANKS)])
    axes.tick_params(colors="#777777")
    axes.set_xlim(0, SECONDS)
    axes.set_xlabel("seconds", color="#777777")
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.text(0, 1.04, "local steps", color="#4c78a8", transform=axes.transAxes, weight="bold")
    axes.text(
        0.17, 1.04, "rounds: one fragment of the vector on the wire", color="#e0862e",
        transform=axes.transAxes, weight="bold",
    )  # fmt: skip
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, transparent=True, metadata={"Date": None})


def main() -> int:
    """Measures, stores and draws; returns the exit code."""
    parser = arguments_for("timeline", __doc__)
    parser.add_argument("--draw", action="store_true", help="draw again from the stored result")
    arguments = parser.parse_args()
    store = where_to_store("timeline", arguments)
    if arguments.draw:
        draw(json.loads((FOLDER / "results" / "timeline.json").read_text(encoding="utf-8")), FIGURE)
        return 0
    settings = {"condition": CONDITION, "ranks": RANKS, "model": "cnn4", "samples": SAMPLES, "window_s": SECONDS}
    report = Report("timeline", run_card(settings, [arguments.seed]))
    with tempfile.TemporaryDirectory(prefix="lasgd-timeline-") as name:
        run, out = measure(Path(name), arguments.seed)
        report.figures = {
            "link_emulation": run["link_emulation"],
            "fragments": run["fragments"],
            "steps": [rank["local_steps"] for rank in run["ranks"]],
            "waited_share": max(rank["waited_s"] for rank in run["ranks"]) / run["wall_s"],
            "intervals": intervals(out),
        }
    report.add(Bar("waited_s / wall_s, worst rank", report.figures["waited_share"], at_most=0.005))
    report.add(Bar("replicas identical at the end", run["replicas_identical"]))
    code = report.finish(store)
    if store is not None and not arguments.quick:
        draw(report.as_json(), FIGURE)
    return code


if __name__ == "__main__":
    sys.exit(main())
