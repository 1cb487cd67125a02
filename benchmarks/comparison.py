"""The comparison that the paper makes: all algorithms, and other libraries, under the standard conditions.

    python benchmarks/comparison.py digits                          all algorithms, five conditions, three seeds
    python benchmarks/comparison.py cifar10 --data cifar10.tar.xz   the main ones and the peers
    python benchmarks/comparison.py tiny-imagenet --data tiny-imagenet-20.tar.xz
    python benchmarks/comparison.py quality                         the same entered twice: how far do equals differ?
    python benchmarks/comparison.py digits --conditions slow --entries lasgd,sync_sgd --seeds 0 --runs kept

All entries have the same budget: as many seconds as the study gives a condition, or samples (`--budget samples`).

Each budget is a `lasgd compare` (same engine, same report, in its folder within `--runs`), and may be made in parts:
what is stored in benchmarks/results/comparison_STUDY.json from earlier calls stays there, and runs of the same entry,
condition, budget and seed take the place of earlier ones. Learning rates are chosen from a grid in virtual time. Peers
that are not installed are left out, and the output says so.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from common import RESULTS, Bar, Report, arguments_for, run_card, where_to_store
from lasgd.cli.entries import parse_entries
from lasgd.errors import ConfigurationError
from lasgd.lab.compare.engine import Comparison
from lasgd.lab.compare.entry import Entry, options
from lasgd.lab.compare.figures import crossing, read_folder
from lasgd.lab.compare.plan import TARGET_SHARE, Plan, condition_slug
from lasgd.lab.compare.progress import Progress
from lasgd.lab.report.write import write
from lasgd.training.settings import Settings
from peers import named

FOLDER = Path(__file__).resolve().parent
REFERENCE = "sync_sgd"
DDP = "peer:torch_ddp"
"""The same algorithm in a script that torch's users would write."""
ALL_CONDITIONS = ("fast", "slow", "straggler", "jitter", "both")
GRID = (0.003125, 0.00625, 0.0125, 0.025, 0.05, 0.1)  # down to a quarter, as a server takes four updates for one
BLOCKING = ("sync_sgd", "local_sgd", "post_local_sgd", "diloco", "overlap_local_sgd", "cocod_sgd", "d_psgd", "sgp")
LEAST = {"slow": 4.0, "straggler": 2.5, "jitter": 1.2, "fast": 0.95}
"""How many times sooner than DDP `lasgd` is to be at the target."""
GOSSIP = ("d_psgd", "sgp", "osgp", "ad_psgd")
EVERY = (
    "lasgd,lasgd:outer-momentum=0,sync_sgd,local_sgd:steps-per-round=10,post_local_sgd:steps-per-round=10,"
    "diloco:steps-per-round=10:outer-momentum=0.5,"  # 0.9 with outer_lr 0.7 moves up to seven times as far
    "overlap_local_sgd:steps-per-round=10,cocod_sgd:steps-per-round=10,d_psgd,sgp,osgp,ad_psgd,parameter_server,"
    "easgd:steps-per-round=10"
)
MAIN = (
    "lasgd,lasgd:outer-momentum=0,sync_sgd,local_sgd:steps-per-round=10,local_sgd:steps-per-round=40,"
    "diloco:steps-per-round=10:outer-momentum=0.5,ad_psgd,osgp,parameter_server"
)


@dataclass(frozen=True)
class Study:
    """One comparison."""

    data: str
    entries: str
    samples: int
    seeds: tuple[int, ...]
    conditions: tuple[str, ...]
    peers: tuple[str, ...] = ()
    grid: tuple[float, ...] = GRID
    batch_size: int = 16
    """Of each rank: small enough for the step that it takes to be within the padding of `step=100ms`."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Of the conditions whose budget is in seconds: where steps cost many times more, few would reach `samples`."""

    def budget(self, condition: str, kind: str | None) -> dict[str, float]:
        """As settings of `lasgd train`; `kind` is seconds, samples, or None for the study's own."""
        if kind == "samples" or (kind is None and condition not in self.seconds):
            return {"samples": self.samples}
        if condition not in self.seconds:
            known = ", ".join(self.seconds) or "no condition"
            raise ConfigurationError(f"--budget seconds: the study has none for {condition!r}, only for {known}.")
        return {"seconds": self.seconds[condition]}


PEERS = (
    "torch_ddp",
    "torch_post_local_sgd:sync-every=10",
    "torchft_local_sgd:sync-every=10",
    "torchft_diloco:outer-momentum=0.5",
    "hivemind_optimizer",
)
STUDIES = {
    "digits": Study(
        *("digits", EVERY, 20_000, (0, 1, 2), ALL_CONDITIONS),
        seconds={"slow": 20.0, "straggler": 20.0, "jitter": 20.0, "both": 20.0},
    ),
    "cifar10": Study(
        *("cifar10.tar.xz", MAIN, 60_000, (0, 1, 2), ALL_CONDITIONS, PEERS),
        seconds={"slow": 200.0, "straggler": 100.0, "jitter": 60.0, "both": 100.0},
    ),
    "tiny-imagenet": Study(  # images of 64x64: a sample takes four times as long
        *("tiny-imagenet-20.tar.xz", "lasgd,sync_sgd,ad_psgd", 20_000, (0,), ("fast", "slow", "straggler", "both")),
        batch_size=8,
        seconds={"slow": 100.0, "straggler": 60.0, "both": 60.0},
    ),
    "quality": Study(  # twins apart from each other: each runs after the other algorithm
        *("digits", "lasgd,sync_sgd,lasgd,sync_sgd", 20_000, (0, 1, 2, 3, 4), ("fast",)),
        grid=(),
        seconds={"fast": 30.0},
    ),
}


# Entries


TUNED_AS = {
    "torch_ddp": "sync_sgd",
    "torch_post_local_sgd:sync-every=10": "local_sgd:steps-per-round=10",
    "torchft_local_sgd:sync-every=10": "local_sgd:steps-per-round=10",
    "torchft_diloco:outer-momentum=0.5": "diloco:steps-per-round=10:outer-momentum=0.5",
    "hivemind_optimizer": "local_sgd:steps-per-round=10",
}
"""Whose learning rate a peer takes, where that entry is in the comparison: the grid in real runs would cost hours.

The first three take the same local steps as the entry. torchft's DiLoCo has fragments and a delay beside, and hivemind
averages every 20 steps, one step late: for these two it is the nearest that there is.
"""


def peer_entry(text: str) -> Entry:
    """`NAME[:option=value]...` of a peer, whose run is run.py's."""
    name, *words = text.split(":")

    def command(settings: Settings, folder: Path) -> list[str]:
        from peers.run import SHARED

        given = settings.model_fields_set & set(SHARED)
        asked = settings.model_dump(include=given)
        shared = options(Settings.model_validate(asked))
        return [
            *(sys.executable, str(FOLDER / "peers" / "run.py"), name, *shared),
            *(f"--{word}" for word in words),
            *("--out", str(folder)),
        ]

    return Entry(
        f"peer:{text}", name, command=command, can_be_simulated=False, is_tuned_once=True, tuned_as=TUNED_AS.get(text)
    )


def entries_of(study: Study, asked: str | None, shared: Settings, notes: list[str]) -> tuple[Entry, ...]:
    """Those that can run here; `asked` names some of them, or others."""
    texts = [*study.entries.split(","), *study.peers] if asked is None else asked.split(",")
    own = [text for text in texts if text.split(":")[0] not in named.PEERS]
    found = list(parse_entries(own, shared)) if own else []
    for text in texts:
        if text.split(":")[0] in named.PEERS:
            why_not = named.why_not(text.split(":")[0])
            if why_not is not None:
                notes.append(f"left out: {why_not}")
            else:
                found.append(peer_entry(text))
    return tuple(found)


# What is stored of a run


_BUDGETS = ("samples", "epochs", "seconds")


def said(budget: Mapping[str, float]) -> str:
    """A budget in words."""
    return " and ".join(f"{value:,.12g} {name}" for name, value in budget.items())


def stored_runs(results: Mapping[str, Any], folder: Path, card: Mapping[str, Any], budget: str) -> list[dict[str, Any]]:
    """The runs that have been made, each with its curve, and without what only its folder is good for."""
    found = []
    for run in results["runs"]:
        if run["status"] == "missing":
            continue
        kept = {key: value for key, value in run.items() if key not in ("folder", "took_s")}
        metrics = read_folder(folder / run["folder"]).metrics
        kept["curve"] = [[round(m["wall_s"], 3), m["samples"], m["top1"], m.get("consensus")] for m in metrics]
        found.append(kept | {"budget": budget} | {key: card[key] for key in ("commit", "date", "command")})
    return found


def merged(earlier: Iterable[Mapping[str, Any]], now: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Earlier runs, but for those that have been made again; none that was cut short, for it says nothing.

    A run that was only found again in its folder keeps the commit, the date and the command it was made with.
    """
    by_key: dict[tuple[Any, ...], dict[str, Any]] = {}
    for run in [*earlier, *now]:
        key = (run["condition"], run["budget"], run["algorithm"], run["seed"])
        if key not in by_key or by_key[key]["curve"] != run["curve"]:
            by_key[key] = dict(run)
    return [run for run in by_key.values() if run["status"] in ("finished", "failed")]


def merged_trials(
    earlier: Iterable[Mapping[str, Any]], now: Iterable[Mapping[str, Any]], budget: str
) -> list[dict[str, Any]]:
    """The learning rates that were tried, earlier ones unless they have been tried again."""
    kept = ("algorithm", "condition", "lr", "final_loss", "final_top1", "chosen", "at_edge", "virtual")
    by_key: dict[tuple[Any, ...], dict[str, Any]] = {}
    for trial in [*earlier, *({key: trial[key] for key in kept} | {"budget": budget} for trial in now)]:
        by_key[trial["condition"], trial["budget"], trial["algorithm"], trial["lr"]] = dict(trial)
    return list(by_key.values())


# What is said of them


@dataclass(frozen=True)
class Cell:
    """The runs of one entry under one condition."""

    runs: Sequence[Mapping[str, Any]]

    @property
    def finished(self) -> list[Mapping[str, Any]]:
        """Those that came to their end."""
        return [run for run in self.runs if run["status"] == "finished"]

    def top1(self) -> float | None:
        """Final, mean over the seeds."""
        values = [run["final_top1"] for run in self.finished if run["final_top1"] is not None]
        return statistics.fmean(values) if values else None

    def loss(self) -> float:
        """Final, mean over the seeds; infinite where a run has failed."""
        values = [run.get("final_loss") for run in self.runs if run["status"] == "finished"]
        known = [value for value in values if value is not None]
        return statistics.fmean(known) if known and len(known) == len(self.runs) else math.inf

    def seconds_to(self, target: float) -> float | None:
        """Mean over the seeds; None unless every one reached it."""
        return self._mean_at(target, "wall_s")

    def samples_to(self, target: float) -> float | None:
        """The same, in samples of all ranks."""
        return self._mean_at(target, "samples")

    def _mean_at(self, target: float, over: str) -> float | None:
        names = ("wall_s", "samples", "top1")
        curves = [[dict(zip(names, point, strict=False)) for point in run["curve"]] for run in self.finished]
        known = [value for curve in curves if (value := crossing(curve, target, over)) is not None]
        return statistics.fmean(known) if known and len(known) == len(self.runs) else None


def contests(runs: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], dict[str, Cell]]:
    """What can be compared: by condition and budget the runs of each entry, in the order in which they are stored."""
    found: dict[tuple[str, str], dict[str, list[Mapping[str, Any]]]] = {}
    for run in runs:
        found.setdefault((run["condition"], run["budget"]), {}).setdefault(run["algorithm"], []).append(run)
    return {
        contest: {label: Cell(of_label) for label, of_label in by_label.items()} for contest, by_label in found.items()
    }


def target_of(found: Mapping[str, Cell]) -> float | None:
    """TARGET_SHARE of what the reference reaches under the same condition."""
    reached = found[REFERENCE].top1() if REFERENCE in found else None
    return None if reached is None else TARGET_SHARE * reached


def kind(label: str) -> str:
    """The algorithm or peer of an entry."""
    return label.removeprefix("peer:").split(":")[0].split(" ")[0]


def ours_of(found: Mapping[str, Cell]) -> str:
    """The entry of `lasgd` that is at its best settings: by final loss, as learning rates are chosen."""
    return min((label for label in found if is_ours(label)), key=lambda label: found[label].loss())


def is_ours(label: str) -> bool:
    """An entry of `lasgd`, with whatever settings."""
    return kind(label) == "lasgd"


def sooner(found: Mapping[str, Cell], ours_label: str, label: str, target: float) -> float | None:
    """How many times sooner `ours_label` is there than `label`, which is infinitely late where it never gets there.

    0 where ours does not get there itself; None where a run of the other is missing or has failed.
    """
    ours, theirs = found[ours_label].seconds_to(target), found[label].seconds_to(target)
    if ours is None:
        return 0.0
    if theirs is None:
        return math.inf if len(found[label].finished) == len(found[label].runs) else None
    return theirs / ours


def bars(study: str, runs: Sequence[Mapping[str, Any]]) -> list[Bar]:
    """What the study is held to, as far as its runs have been made."""
    made: list[Bar] = []
    for (condition, budget), found in contests(runs).items():
        target = target_of(found)
        if study == "cifar10" and (target is None or not any(map(is_ours, found))):
            if condition in LEAST:
                what = f"{condition}, {budget}: sooner than {REFERENCE} (DDP)"
                made.append(Bar(what, None, at_least=LEAST[condition], unit="x"))
        elif study == "cifar10" and target is not None:
            made += time_bars(condition, budget, found, target)
        elif study == "quality" and target is not None:
            made += quality_bars(f"{condition}, {budget}", found, target)
    if study == "digits":
        equal_samples = [
            found for (condition, budget), found in contests(runs).items() if is_at_equal_samples(condition, budget)
        ]
        made += [bar for found in equal_samples or [{}] for bar in honest_bars(found)]
    return made


def is_at_equal_samples(condition: str, budget: str) -> bool:
    """Where gossip and server are held to synchronous SGD: at equal samples, with nobody slowed down."""
    return condition == "fast" and budget.endswith("samples")


def time_bars(condition: str, budget: str, found: Mapping[str, Cell], target: float) -> list[Bar]:
    """Of `lasgd`'s time to the target against the others', all of them at their best settings."""
    ours = ours_of(found)
    times = {label: sooner(found, ours, label, target) for label in found if not is_ours(label)}
    least, where = LEAST.get(condition), f"{condition}, {budget}"
    made: list[Bar] = []
    if ours != "lasgd":
        where += f", {ours}"
        if "lasgd" in found and least is not None:
            what = f"{condition}, {budget}, lasgd at its defaults: sooner than {REFERENCE} (DDP)"
            made.append(Bar(what, sooner(found, "lasgd", REFERENCE, target), at_least=least, unit="x"))
    if least is not None:
        made.append(Bar(f"{where}: sooner than {REFERENCE} (DDP)", times.pop(REFERENCE), at_least=least, unit="x"))
        if DDP in times:
            made.append(Bar(f"{where}: sooner than {DDP}", times.pop(DDP), at_least=least, unit="x"))
    for label, value in times.items():
        if condition == "slow" and (kind(label) in BLOCKING or label.startswith("peer:")):
            made.append(Bar(f"{where}: sooner than {label}", value, at_least=1.2, unit="x"))
        elif condition == "slow" or (condition in ("straggler", "jitter") and kind(label) in GOSSIP):
            made.append(Bar(f"{where}: not 10 % later than {label}", value, at_least=1 / 1.1, unit="x"))
    return made


def quality_bars(where: str, found: Mapping[str, Cell], target: float) -> list[Bar]:
    """Of the same algorithm entered twice."""
    made = []
    for label in found:
        twin = f"{label} (2)"
        if twin not in found:
            continue
        rates = [statistics.fmean(run["steps_per_s"] for run in found[each].finished) for each in (label, twin)]
        made.append(Bar(f"{where}: {label} twice, steps/s apart", _apart(*rates), at_most=0.05))
        times = [found[each].seconds_to(target) for each in (label, twin)]
        apart = _apart(*times) if all(times) else None
        made.append(Bar(f"{where}: {label} twice, time to target apart", apart, at_most=0.15))
    return made


def honest_bars(found: Mapping[str, Cell]) -> list[Bar]:
    """Gossip and server at equal samples, in points behind synchronous SGD."""
    reference = found[REFERENCE].top1() if REFERENCE in found else None
    made = []
    for name in ("ad_psgd", "sgp", "parameter_server"):
        own = found[name].top1() if name in found else None
        behind = None if reference is None or own is None else 100 * (reference - own)
        seeds = len(found[name].finished) if name in found else 0
        made.append(Bar(f"fast: {name} behind {REFERENCE}, {seeds} seeds", behind, at_most=2.0, unit=" points"))
    return made


def _apart(one: Any, other: Any) -> float:
    return abs(one - other) / ((one + other) / 2)


# The command


def main() -> int:
    """Runs what is missing, stores, and prints the JSON."""
    parser = arguments_for("comparison", __doc__)
    parser.add_argument("study", choices=tuple(STUDIES), metavar="STUDY", help=", ".join(STUDIES))
    parser.add_argument("--data", help="the data set, where it is not bundled")
    parser.add_argument("--runs", type=Path, help="where run folders and report go, and are found again")
    parser.add_argument("--conditions", help="separated by commas; default: the study's")
    parser.add_argument("--entries", help="separated by commas; default: the study's")
    parser.add_argument("--seeds", help="separated by commas; default: the study's")
    parser.add_argument("--grid", help="learning rates, separated by commas; default: the study's")
    parser.add_argument("--budget", choices=("seconds", "samples"), help="default: as the study gives each condition")
    parser.add_argument("--samples", type=int, help="budget in samples, where it is not in seconds")
    arguments = parser.parse_args()
    study = STUDIES[arguments.study]
    if arguments.samples is not None:
        study = dataclasses.replace(study, samples=arguments.samples)
    if arguments.quick:
        study = dataclasses.replace(
            study, samples=1500, seconds={}, seeds=(0,), conditions=("fast",), grid=(), peers=()
        )
    with tempfile.TemporaryDirectory() as temporary:
        try:
            return _measured(arguments, study, arguments.runs or Path(temporary) / "runs")
        except ConfigurationError as error:
            parser.error(str(error))


def _measured(arguments: argparse.Namespace, study: Study, folder: Path) -> int:
    seeds = _numbers(arguments.seeds, int) or study.seeds
    grid = _numbers(arguments.grid, float) or study.grid
    conditions = tuple(arguments.conditions.split(",")) if arguments.conditions else study.conditions
    name = f"comparison_{arguments.study.replace('-', '_')}"
    budgets: dict[str, dict[str, float]] = {}
    under: dict[str, list[str]] = {}
    for condition in conditions:
        budget = study.budget(condition, arguments.budget)
        budgets[said(budget)] = budget
        under.setdefault(said(budget), []).append(condition)
    settings = shared_settings(study, arguments.data, {}).model_dump(mode="json", exclude={"data", *_BUDGETS})
    report = Report(name, run_card(settings | {"budget": " / ".join(budgets)}, seeds))
    where = where_to_store(name, arguments)
    place = where or RESULTS / f"{name}.json"
    earlier = json.loads(place.read_text(encoding="utf-8"))["figures"] if where and place.exists() else {}
    runs, tried = earlier.get("runs", []), earlier.get("grid", [])
    for text, budget in budgets.items():
        shared = shared_settings(study, arguments.data, budget)
        plan = Plan(
            shared=shared,
            entries=entries_of(study, arguments.entries, shared, report.notes),
            conditions=tuple(under[text]),
            seeds=seeds,
            reference=REFERENCE,
            lr_grid=grid,
            tune="virtual" if grid else "real",
            tuning_seed=seeds[0],
            command=report.card["command"],
        )
        of_budget = folder / condition_slug(text)
        of_budget.mkdir(parents=True, exist_ok=True)
        outcome = Comparison(plan, of_budget, Progress(Console())).run()
        write([of_budget], of_budget)
        runs = merged(runs, stored_runs(outcome.results, of_budget, report.card, text))
        tried = merged_trials(tried, outcome.results["grid"]["tried"], text)
        if outcome.interrupted:
            break
    report.figures = {"runs": runs, "grid": tried}
    report.notes[:] = dict.fromkeys(report.notes)
    for bar in bars(arguments.study, runs):
        report.add(bar)
    failed = [run for run in runs if run["status"] != "finished"]
    report.notes += [f"{run['status']}: {run['algorithm']}, {run['condition']}, seed {run['seed']}" for run in failed]
    return report.finish(where)


def shared_settings(study: Study, data: str | None, budget: Mapping[str, float]) -> Settings:
    """What all runs of one budget share."""
    return Settings.model_validate(
        {
            "data": data or study.data,
            "model": "cnn4",
            "batch_size": study.batch_size,
            "ranks": 4,
            "lr": 0.05,
            "evaluations": 20,
            "checkpoints": 0,
            "device": "cpu",
        }
        | dict(budget)
    )


def _numbers(text: str | None, kind: type) -> tuple[Any, ...]:
    return tuple(kind(word) for word in text.split(",")) if text else ()


if __name__ == "__main__":
    sys.exit(main())
