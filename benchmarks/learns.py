"""Whether `lasgd train` learns: top-1 of the averaged model with default settings, against its bar.

digits     4 ranks, default settings                                    top-1 >= 0.95
cifar10    4 ranks, resnet20, 400,000 samples; needs --cifar10 ARCHIVE  top-1 >= 0.70

python benchmarks/learns.py                           digits, a minute
python benchmarks/learns.py --cifar10 cifar10.tar.xz  both, about a quarter of an hour on two cores
python benchmarks/learns.py --reuse cifar10=RUN       takes that finished run instead of training again
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from common import Bar, Report, arguments_for, run_card, where_to_store
from lasgd.errors import LasgdError
from lasgd.training.run_folder import RunRecord, read_run

TOP1 = {"digits": 0.95, "cifar10": 0.70}
RANKS = 4
CIFAR10 = {"model": "resnet20", "samples": 400_000}


def train(name: str, out: Path, options: dict) -> RunRecord:
    """One run of the command line, as a user would start it. Raises SystemExit with its output if it fails."""
    words = [f"--{key}={value}" for key, value in options.items()]
    command = [sys.executable, "-m", "lasgd", "train", f"--ranks={RANKS}", f"--out={out}", *words]
    ended = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=7200)
    if ended.returncode != 0:
        raise SystemExit(f"{name} ended with {ended.returncode}:\n{ended.stdout[-4000:]}")
    return read_run(out)


def add(report: Report, name: str, run: RunRecord) -> None:
    """Figures and bars of one run."""
    top1 = run.final.top1 if run.final else None
    report.figures[name] = {
        "top1": top1,
        "loss": run.final.loss if run.final else None,
        "samples": run.samples,
        "wall_s": run.wall_s,
        "model": run.settings["model"],
        "batch_size": run.settings["batch_size"],
        "lr": run.settings["lr"],
        "seed": run.settings["seed"],
        "local_steps": [rank.local_steps for rank in run.ranks],
        "staleness_steps": [rank.staleness_steps.mean for rank in run.ranks],
        "rounds": run.ranks[0].rounds,
        "fragments": run.fragments,
    }
    waited = max(rank.waited_s for rank in run.ranks) / run.wall_s
    report.add(Bar(f"{name}: top-1 of the final average", top1, at_least=TOP1[name]))
    report.add(Bar(f"{name}: replicas identical at the end", run.replicas_identical))
    report.add(Bar(f"{name}: waited_s / wall_s, worst rank", waited, at_most=0.005))


def main() -> int:
    """Trains, judges, stores; returns the exit code."""
    parser = arguments_for("learns", __doc__)
    parser.add_argument("--cifar10", type=Path, help="the data set, a folder or an archive in ImageNet layout")
    parser.add_argument("--reuse", action="append", default=[], metavar="NAME=RUN", help="a finished run to judge")
    arguments = parser.parse_args()
    finished = dict(entry.split("=", 1) for entry in arguments.reuse)
    wanted: dict[str, dict] = {"digits": {"samples": 4000} if arguments.quick else {}}
    if arguments.cifar10 or "cifar10" in finished:
        wanted["cifar10"] = CIFAR10 | {"data": arguments.cifar10}
    report = Report("learns", run_card({"ranks": RANKS, "otherwise": "default settings"}, [arguments.seed]))
    with tempfile.TemporaryDirectory(prefix="lasgd-learns-") as folder:
        for name, options in wanted.items():
            try:
                if name in finished:
                    run = read_run(Path(finished[name]))
                else:
                    run = train(name, Path(folder) / name, options | {"seed": arguments.seed})
            except LasgdError as error:
                raise SystemExit(f"{name}: {error}") from error
            add(report, name, run)
    return report.finish(where_to_store("learns", arguments, len(wanted) == len(TOP1)))


if __name__ == "__main__":
    sys.exit(main())
