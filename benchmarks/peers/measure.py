"""lasgd's own algorithms beside the peers: conditions x seeds x entries, interleaved in one run.

Every run is a child process, `lasgd train` or run.py beside this file, with the same data, model, batch, budget and
seed; each seed begins with another entry, so that a machine that drifts drifts for all. Means are evaluated when a run
has ended. The target is 95 % of what `sync_sgd` reaches under the same condition, mean of the seeds, or --target.

    python benchmarks/peers/measure.py --data cifar10.tar.xz --runs kept     all of it; what `kept` holds stays as it is
    python benchmarks/peers/measure.py --entries lasgd,torch_ddp,torchft_diloco:sync-every=40 --conditions slow
    python benchmarks/peers/measure.py --quick                               does it work?
"""

from __future__ import annotations

import contextlib
import math
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parent))

from common import Bar, Report, arguments_for, run_card, where_to_store  # noqa: E402
from lasgd.algorithms import registry  # noqa: E402
from lasgd.errors import LasgdError, unknown  # noqa: E402
from lasgd.lab import conditions  # noqa: E402
from lasgd.training.run_folder import read_metrics, read_run  # noqa: E402
from peers import named  # noqa: E402

OWN = ("lasgd", "sync_sgd", "local_sgd:steps-per-round=10")
REFERENCE = "sync_sgd"
TARGET_SHARE = 0.95
CONDITIONS = ("fast", "slow", "straggler", "jitter")
PADDING_OVERRUN = 0.02
SOONER = {"slow": 4.0, "straggler": 2.5, "jitter": 1.2, "fast": 0.95}
"""How many times sooner than torch DDP `lasgd` is to reach the target."""
SOONER_THAN_OTHERS = {"slow": 1.2}
"""The same for every other peer."""
LIMIT_S = 7200.0


@dataclass(frozen=True)
class Entry:
    """One line of the comparison: an algorithm of lasgd or a peer, with options of its own."""

    label: str
    name: str
    options: tuple[str, ...] = ()
    """Of its command, beside those that all share."""

    @property
    def is_peer(self) -> bool:
        """Another library's."""
        return self.name in named.PEERS

    def command(self, shared: Mapping[str, Any], folder: Path) -> list[str]:
        """What to start for one run that is to leave `folder`."""
        words = [f"--{name}={value}" for name, value in shared.items()] + [*self.options, f"--out={folder}"]
        if self.is_peer:
            return [sys.executable, str(FOLDER / "run.py"), self.name, *words]
        own = [f"--algorithm={self.name}", "--checkpoints=0", "--device=cpu"]
        return [sys.executable, "-m", "lasgd", "train", *own, *words]


def parse_entry(text: str) -> Entry:
    """`NAME[:option=value]...`. Raises ConfigurationError where there is no such algorithm or peer."""
    name, *options = text.split(":")
    known = (*registry.names(), *named.PEERS)
    if name not in known:
        raise unknown("entry", name, known)
    return Entry(text, name, tuple(f"--{option}" for option in options))


def rotated(entries: Sequence[Entry], by: int) -> list[Entry]:
    """The same entries, beginning with another one."""
    by %= len(entries)
    return [*entries[by:], *entries[:by]]


@dataclass(frozen=True)
class Seen:
    """What one run was like, from its folder."""

    status: str
    error: str | None = None
    final_top1: float | None = None
    final_loss: float | None = None
    wall_s: float = 0.0
    steps_per_s: float = 0.0
    """Of all ranks together."""
    waited_share: float = 0.0
    """Mean over the ranks."""
    bytes_sent: int = 0
    """Of all ranks; 0 where it was not measured."""
    padding_overrun: float = 0.0
    link_emulation: str = "none"
    curve: tuple[tuple[float, int, float], ...] = ()
    """(wall_s, samples, top-1) of each evaluation."""


def seen(folder: Path) -> Seen:
    """Reads a run folder; one that is not there or cannot be read failed."""
    try:
        record, metrics = read_run(folder), read_metrics(folder / "metrics.jsonl")
    except LasgdError as error:
        return Seen("failed", str(error))
    if record.status != "finished" or record.final is None or not record.wall_s:
        return Seen(record.status, record.error)
    return Seen(
        status=record.status,
        final_top1=record.final.top1,
        final_loss=record.final.loss,
        wall_s=record.wall_s,
        steps_per_s=sum(rank.local_steps for rank in record.ranks) / record.wall_s,
        waited_share=statistics.fmean(min(rank.waited_s / record.wall_s, 1.0) for rank in record.ranks),
        bytes_sent=sum(rank.bytes_sent for rank in record.ranks),
        padding_overrun=record.padding_overrun,
        link_emulation=record.link_emulation,
        curve=tuple((line["wall_s"], line["samples"], line["top1"]) for line in metrics),
    )


def reached(curve: Sequence[tuple[float, int, float]], target: float) -> tuple[float, float] | None:
    """(seconds, samples) at which top-1 first reaches the target, on the line between two evaluations; None: never."""
    before: tuple[float, float, float] | None = None
    for wall_s, samples, top1 in curve:
        if top1 >= target:
            if before is None or top1 == before[2]:
                return wall_s, float(samples)
            share = (target - before[2]) / (top1 - before[2])
            return before[0] + share * (wall_s - before[0]), before[1] + share * (samples - before[1])
        before = wall_s, samples, top1
    return None


def row(runs: Sequence[Seen], target: float | None) -> dict[str, Any]:
    """The figures of one entry under one condition, over the seeds. Seconds are None unless every seed got there."""
    done = [run for run in runs if run.status == "finished"]
    when = [reached(run.curve, target) if target is not None else None for run in done]
    got_there = bool(done) and len(done) == len(runs) and all(when)
    pairs = [pair for pair in when if pair is not None]

    def middle(values: Sequence[float]) -> float | None:
        return statistics.median(values) if values else None

    return {
        "runs": len(runs),
        "finished": len(done),
        "errors": [run.error for run in runs if run.error],
        "final_top1": [run.final_top1 for run in done],
        "final_loss": [run.final_loss for run in done],
        "wall_s": [run.wall_s for run in done],
        "steps_per_s": middle([run.steps_per_s for run in done]),
        "waited_share": middle([run.waited_share for run in done]),
        "bytes_sent": middle([run.bytes_sent for run in done]),
        "padding_overrun": max((run.padding_overrun for run in done), default=None),
        "link_emulation": sorted({run.link_emulation for run in done}),
        "seconds_to_target": middle([seconds for seconds, _ in pairs]) if got_there else None,
        "seconds_to_target_of_seed": [pair[0] if pair else None for pair in when],
        "samples_to_target": middle([samples for _, samples in pairs]) if got_there else None,
        "curves": [run.curve for run in done],
    }


def target_from(runs: Sequence[Seen]) -> float | None:
    """95 % of the mean final top-1; None without a finished run."""
    final = [run.final_top1 for run in runs if run.final_top1 is not None]
    return TARGET_SHARE * statistics.fmean(final) if final else None


def bars(condition: str, rows: Mapping[str, Mapping[str, Any]], entries: Sequence[Entry]) -> list[Bar]:
    """How much sooner lasgd reaches the target than each peer, and whether rates stand for anything."""
    found = []
    own = rows.get("lasgd", {}).get("seconds_to_target")
    for entry in entries:
        least = (SOONER if entry.name == "torch_ddp" else SOONER_THAN_OTHERS).get(condition)
        if least is not None and entry.is_peer and "lasgd" in rows:
            theirs = rows[entry.label]["seconds_to_target"]
            # A peer that never gets there is infinitely late, if it ran at all.
            late = math.inf if theirs is None and rows[entry.label]["finished"] else theirs
            ratio = late / own if own and late is not None else (0.0 if late is not None else None)
            found.append(Bar(f"{condition}: lasgd sooner than {entry.label}", ratio, at_least=least, unit="x"))
    overruns = [of_entry["padding_overrun"] for of_entry in rows.values() if of_entry["padding_overrun"] is not None]
    if conditions.parse(condition).step_s is not None:
        found.append(
            Bar(f"{condition}: steps that outlast their padding", max(overruns, default=None), at_most=PADDING_OVERRUN)
        )
    return found


def table(condition: str, rows: Mapping[str, Mapping[str, Any]], target: float | None) -> str:
    """The rows, for a reader."""
    lines = [
        f"\n{condition}, target top-1 {'-' if target is None else f'{target:.4f}'}",
        f"  {'':38} {'top-1':>16} {'to target':>10} {'steps/s':>8} {'waited':>7} {'sent':>9}",
    ]
    for label, of_entry in rows.items():
        top1 = [value for value in of_entry["final_top1"] if value is not None]
        words = [
            f"{min(top1):.4f} to {max(top1):.4f}" if top1 else f"{of_entry['finished']} of {of_entry['runs']} runs",
            _text(of_entry["seconds_to_target"], "{:.1f} s"),
            _text(of_entry["steps_per_s"], "{:.2f}"),
            _text(of_entry["waited_share"], "{:.1%}"),
            _text(of_entry["bytes_sent"] and of_entry["bytes_sent"] / 1e6, "{:.0f} MB"),
        ]
        lines.append("  {:38} {:>16} {:>10} {:>8} {:>7} {:>9}".format(label, *words))
    return "\n".join(lines)


def _text(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def is_of(folder: Path, shared: Mapping[str, Any]) -> bool:
    """Whether the run in the folder had these settings."""
    try:
        had = read_run(folder).settings
    except LasgdError:
        return False
    return all(had.get(name.replace("-", "_")) == value for name, value in shared.items())


def run_once(entry: Entry, shared: Mapping[str, Any], folder: Path) -> Seen:
    """One run, unless `folder` holds it already."""
    before = seen(folder)
    if before.status == "finished" and is_of(folder, shared):
        return before
    if folder.exists():
        shutil.rmtree(folder)  # of an attempt that did not come to its end
    folder.parent.mkdir(parents=True, exist_ok=True)
    log = folder.with_suffix(".log")
    with open(log, "wb") as output:
        child = subprocess.Popen(entry.command(shared, folder), stdout=output, stderr=subprocess.STDOUT)
        _wait_ended(child)
    after = seen(folder)
    if after.status == "finished":
        return after
    said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return Seen(after.status, after.error if folder.exists() and after.error else (said or ["no word"])[-1])


def _wait_ended(child: subprocess.Popen[bytes]) -> None:
    """Until it has ended; one that takes too long is asked to, so that it can end its ranks."""
    try:
        child.wait(LIMIT_S)
    except subprocess.TimeoutExpired:
        child.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(30)
    finally:
        child.kill()  # nothing, where it has ended


@contextlib.contextmanager
def _kept(runs: Path | None) -> Iterator[Path]:
    if runs is not None:
        yield runs
        return
    with tempfile.TemporaryDirectory(prefix="lasgd-peers-") as name:
        yield Path(name)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs what is asked for; returns the exit code."""
    parser = arguments_for("peers", __doc__)
    parser.prog = "benchmarks/peers/measure.py"
    parser.add_argument("--entries", help=f"NAME[:option=value]..., by commas; default {','.join(OWN)} and all peers")
    parser.add_argument("--conditions", help=f"by commas; default {','.join(CONDITIONS)}")
    parser.add_argument("--seeds", type=int, help="how many, from --seed on; default 3")
    parser.add_argument("--data", default="digits")
    parser.add_argument("--model", default="cnn4")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--samples", type=int, help="default 60,000")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=0.05, help="where an entry has no lr= of its own")
    parser.add_argument("--evaluations", type=int, default=20)
    parser.add_argument("--target", type=float, help=f"top-1; default {TARGET_SHARE:g} of {REFERENCE}'s final one")
    parser.add_argument("--runs", type=Path, help="keeps the run folders there; finished ones are not run again")
    arguments = parser.parse_args(argv)
    quick = ("lasgd", "sync_sgd", "torch_ddp", "torch_post_local_sgd")
    texts = arguments.entries.split(",") if arguments.entries else quick if arguments.quick else (*OWN, *named.PEERS)
    try:
        entries = [parse_entry(text) for text in texts]
        names = arguments.conditions or ("fast" if arguments.quick else ",".join(CONDITIONS))
        asked = _split_conditions(names)
        for condition in asked:
            conditions.parse(condition).check(arguments.ranks)
    except LasgdError as error:
        parser.error(str(error))
    reasons = {entry.label: why for entry in entries if entry.is_peer and (why := named.why_not(entry.name))}
    able = [entry for entry in entries if entry.label not in reasons]
    if not able:
        parser.error("; ".join(reasons.values()))
    samples = arguments.samples or (2_000 if arguments.quick else 60_000)
    seeds = [arguments.seed + number for number in range(arguments.seeds or (1 if arguments.quick else 3))]
    shared = {
        "data": arguments.data,
        "model": arguments.model,
        "ranks": arguments.ranks,
        "samples": samples,
        "batch-size": arguments.batch_size,
        "evaluations": arguments.evaluations,
    }
    settings = shared | {"data": Path(arguments.data).name, "lr": arguments.lr, "entries": [e.label for e in able]}
    versions = {peer.package: named.installed_version(peer.package) for peer in named.PEERS.values()}
    card = run_card(settings | {"conditions": asked, "target": arguments.target}, seeds) | {"peers": versions}
    card["command"] = card["command"].replace("benchmarks/measure.py", parser.prog)
    report = Report("peers", card)
    report.notes += reasons.values()
    for note in report.notes:
        print(f"left out: {note}", flush=True)

    with _kept(arguments.runs) as kept:
        found: dict[tuple[str, str], list[Seen]] = {}
        for number, seed in enumerate(seeds):
            for condition in asked:
                for entry in rotated(able, number):
                    own_lr = any(option.startswith("--lr=") for option in entry.options)
                    one = shared | {"condition": condition, "seed": seed} | ({} if own_lr else {"lr": arguments.lr})
                    run = run_once(entry, one, kept / condition / entry.label / f"seed-{seed}")
                    found.setdefault((condition, entry.label), []).append(run)
                    said = f"top-1 {run.final_top1:.4f} in {run.wall_s:.1f} s" if run.final_top1 else run.error
                    print(f"{condition}, seed {seed}: {entry.label}: {run.status}, {said}", flush=True)
    for condition in asked:
        target = arguments.target or target_from(found.get((condition, REFERENCE), []))
        rows = {entry.label: row(found[condition, entry.label], target) for entry in able}
        report.figures[condition] = {"target": target, "entries": rows}
        print(table(condition, rows, target), flush=True)
        report.add(Bar(f"{condition}: every run finished", all(r["finished"] == r["runs"] for r in rows.values())))
        for bar in bars(condition, rows, able):
            report.add(bar)
    return report.finish(where_to_store("peers", arguments, set(asked) == set(CONDITIONS) and not reasons))


def _split_conditions(text: str) -> list[str]:
    """At the commas that do not belong to a link's latency."""
    parts: list[str] = []
    for part in text.split(","):
        if parts and part.strip().startswith("latency="):
            parts[-1] += f",{part}"
        else:
            parts.append(part)
    return parts


if __name__ == "__main__":
    sys.exit(main())
