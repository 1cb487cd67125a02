"""`lasgd compare`: the same training with several algorithms, under several conditions, and a report of it."""

from __future__ import annotations

import math
import os
import shlex
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Group, Parameter
from rich.console import Console
from rich.text import Text

from lasgd.cli import config as sources
from lasgd.cli.entries import parse_entries
from lasgd.cli.report import write_report
from lasgd.cli.train import DEFAULT_RANKS, check, check_data_and_model, explaining_surprises
from lasgd.errors import ConfigurationError, unknown
from lasgd.lab.compare.engine import Comparison, Outcome
from lasgd.lab.compare.entry import Entry, options
from lasgd.lab.compare.plan import FILE, TARGET_SHARE, Plan, Tune, read_stored
from lasgd.lab.compare.progress import Progress, table
from lasgd.lab.rank_process import INTERRUPTED
from lasgd.training.lasting_output import lasting_output
from lasgd.training.settings import Settings

DEFAULT_ALGORITHMS = "lasgd,sync_sgd"
DEFAULT_REFERENCE = "sync_sgd"

HELP = (
    "Run the same training with several algorithms, conditions and seeds, and write a report.\n\n"
    "Every run is a `lasgd train` of its own, one after another, in interleaved order. Takes the options of `train`, "
    "the same for all runs, but for evaluations (default 20) and checkpoints (default 0: a run is repeated, not "
    "resumed). A comparison that was interrupted goes on where it was when the same command is given again; "
    "algorithms, conditions and seeds may be added to it."
)

_WHAT = Group("What is compared", sort_key=0)
_FOLDER = Group("Folder and config file", sort_key=1)
_SETTINGS = Group("Settings of all runs", sort_key=2)
_ALGORITHMS = (
    "NAME[:setting=value]..., separated by commas, as in lasgd,local_sgd:steps-per-round=10. "
    f"Default: {DEFAULT_ALGORITHMS}."
)
_CONDITION = "A condition, as of `train`; once for each. Default: fast."
_SEEDS = "Separated by commas. Default: 0."
_GRID = (
    "Learning rates, separated by commas: each algorithm tries all of them with the first seed under each condition, "
    "and keeps the one with the lowest final loss."
)
_TUNE = "Where the grid is tried: in real runs, or by `lasgd simulate` in virtual time."
_TARGET = (
    f"Top-1 to be reached, 0 to 1. Default: {TARGET_SHARE:g} of the mean final top-1 of the reference, "
    "in each condition."
)
_REFERENCE = f"The entry that ratios are against. Default: {DEFAULT_REFERENCE} if it is among them, else the first."
_LIMIT = "Seconds after which a run is ended and counts as failed. Default: none."
_OUT = "The folder of the comparison, new, or one to go on with. Default: runs/compare-TIME."
_CONFIG = "A TOML file of settings, such as batch-size = 64. Options on the command line win over it."

_HIDDEN = Parameter(parse=False, show=False)


class SharedSettings(Settings):
    """The settings that all runs of a comparison have in common; the hidden ones differ from run to run."""

    algorithm: Annotated[str, _HIDDEN] = "lasgd"
    condition: Annotated[str, _HIDDEN] = "fast"
    seed: Annotated[int, _HIDDEN] = 0


_OF_A_RUN = {"algorithm": "--algorithms", "condition": "--condition", "seed": "--seeds"}
_OWN_DEFAULTS = {"evaluations": 20, "checkpoints": 0}


def compare(
    *,
    algorithms: Annotated[list[str] | None, Parameter(group=_WHAT, help=_ALGORITHMS)] = None,
    condition: Annotated[list[str] | None, Parameter(group=_WHAT, help=_CONDITION)] = None,
    seeds: Annotated[list[str] | None, Parameter(group=_WHAT, help=_SEEDS)] = None,
    lr_grid: Annotated[list[str] | None, Parameter(group=_WHAT, help=_GRID)] = None,
    tune: Annotated[Tune, Parameter(group=_WHAT, help=_TUNE)] = "real",
    target: Annotated[float | None, Parameter(group=_WHAT, help=_TARGET)] = None,
    reference: Annotated[str | None, Parameter(group=_WHAT, help=_REFERENCE)] = None,
    run_limit_s: Annotated[float | None, Parameter(group=_WHAT, help=_LIMIT)] = None,
    out: Annotated[Path | None, Parameter(group=_FOLDER, help=_OUT)] = None,
    config: Annotated[Path | None, Parameter(group=_FOLDER, help=_CONFIG)] = None,
    settings: Annotated[SharedSettings | None, Parameter(name="*", group=_SETTINGS)] = None,
) -> int:
    """Compares as `HELP` says; returns the exit code. Raises LasgdError, ConfigurationError before any run starts."""
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        raise ConfigurationError("lasgd compare starts its own local ranks; it does not run under torchrun.")
    if run_limit_s is not None and not run_limit_s > 0:
        raise ConfigurationError(f"--run-limit-s: must be greater than 0, got {run_limit_s:g}")
    out = out or _new_default()
    plan = planned(
        out,
        algorithms=algorithms,
        condition=condition,
        seeds=seeds,
        lr_grid=lr_grid,
        tune=tune,
        target=target,
        reference=reference,
        config=config,
        settings=settings,
    )
    console = Console()
    with explaining_surprises(out), lasting_output():
        check_data_and_model(plan.shared)  # once, before any run: it unpacks an archive
        comparison = Comparison(plan, out, Progress(console), run_limit_s)
        console.print(Text(_announced(comparison.plan, out)), soft_wrap=True)
        outcome = comparison.run()
        return _conclude(outcome, comparison.plan, out, console)


def planned(
    out: Path,
    *,
    algorithms: Sequence[str] | None = None,
    condition: Sequence[str] | None = None,
    seeds: Sequence[str] | None = None,
    lr_grid: Sequence[str] | None = None,
    tune: Tune = "real",
    target: float | None = None,
    reference: str | None = None,
    config: Path | None = None,
    settings: Settings | None = None,
) -> Plan:
    """The plan that the options ask for, checked as far as can be before anything runs. Raises ConfigurationError."""
    shared = shared_settings(settings, config)
    entries = parse_entries(algorithms or [DEFAULT_ALGORITHMS], shared)
    in_order = parse_seeds(seeds or ["0"])
    if tune == "virtual" and not lr_grid:
        raise ConfigurationError("--tune virtual goes with --lr-grid, which says what to try.")
    plan = Plan(
        shared=shared,
        entries=entries,
        conditions=parse_conditions(condition or ["fast"]),
        seeds=in_order,
        reference=_reference(reference, entries, out),
        target=_share(target),
        lr_grid=parse_grid(lr_grid or []),
        tune=tune,
        tuning_seed=in_order[0],
    )
    check_plan(plan)
    return plan.typed_as(_command(plan, out))


def shared_settings(given: Settings | None, config: Path | None) -> Settings:
    """What all runs share, from command line and config file. Raises ConfigurationError."""
    options = {} if given is None else {name: getattr(given, name) for name in given.model_fields_set}
    in_file = {} if config is None else sources.read_config(config)
    for name, option in _OF_A_RUN.items():
        if name in in_file:
            raise ConfigurationError(
                f"{config}: config key {name!r} differs from run to run in a comparison. Remove it, and give {option}."
            )
    merged = sources.combine(options, in_file)
    values = _OWN_DEFAULTS | merged.model_dump(exclude_unset=True)
    return Settings.model_validate(values | {"ranks": merged.ranks or DEFAULT_RANKS})


def check_plan(plan: Plan) -> None:
    """Finds what cannot work before anything runs. Raises ConfigurationError."""
    for condition in plan.conditions:
        for entry in plan.entries:
            settings = entry.settings(plan.shared, condition, plan.seeds[0])
            check(settings, settings.ranks or DEFAULT_RANKS)


def parse_conditions(texts: Sequence[str]) -> tuple[str, ...]:
    """Conditions as they are called in the results. Raises ConfigurationError for two that mean the same."""
    from lasgd.lab.conditions import parse

    found: dict[Any, str] = {}
    for text in texts:
        name = "+".join(word.strip() for word in text.casefold().split("+"))
        meaning = parse(name)
        if meaning in found:
            raise ConfigurationError(f"--condition: {found[meaning]} and {name} are the same. Give it once.")
        found[meaning] = name
    return tuple(found.values())


def parse_seeds(texts: Sequence[str]) -> tuple[int, ...]:
    """`0,1,2`. Raises ConfigurationError."""
    seeds = []
    for word in _words(texts):
        if not (word.isascii() and word.isdecimal()) or int(word) >= 2**32:
            raise ConfigurationError(f"--seeds: {word!r} is no seed. Expected whole numbers from 0, as in 0,1,2.")
        seeds.append(int(word))
    return _each_once(seeds, "--seeds")


def parse_grid(texts: Sequence[str]) -> tuple[float, ...]:
    """`0.05,0.1`, in ascending order. Raises ConfigurationError."""
    grid = []
    for word in _words(texts):
        try:
            lr = float(word)
        except ValueError:
            lr = math.nan
        if not 0 < lr < math.inf:
            raise ConfigurationError(
                f"--lr-grid: {word!r} is no learning rate. Expected numbers above 0, as in 0.05,0.1,0.2."
            )
        grid.append(lr)
    return tuple(sorted(_each_once(grid, "--lr-grid")))


def _words(texts: Iterable[str]) -> list[str]:
    return [word.strip() for text in texts for word in text.split(",")]


def _each_once(values: list[Any], what: str) -> tuple[Any, ...]:
    for value in values:
        if values.count(value) > 1:
            raise ConfigurationError(f"{what}: {value:g} is given twice.")
    return tuple(values)


def _share(target: float | None) -> float | None:
    if target is not None and not 0 < target <= 1:
        hint = f" Did you mean {target / 100:g}?" if 1 < target <= 100 else ""
        raise ConfigurationError(f"--target: must be above 0 and at most 1, got {target:g}.{hint}")
    return target


def _reference(asked: str | None, entries: Sequence[Entry], out: Path) -> str:
    """The label that ratios are against: of this call's entries, or of those that are in the folder already."""
    labels = [entry.label for entry in entries]
    stored: Mapping[str, Any] = read_stored(out) if (out / FILE).exists() else {}
    known = labels + [entry["label"] for call in stored.get("asked", ()) for entry in call["entries"]]
    if asked is not None and asked not in known:
        raise unknown("--reference: entry", asked, known)
    if asked is None and stored.get("reference") in known:
        return stored["reference"]
    return asked or (DEFAULT_REFERENCE if DEFAULT_REFERENCE in known else labels[0])


def _new_default() -> Path:
    stamp = time.strftime("%Y%m%d-%H%M%S")
    out, number = Path("runs") / f"compare-{stamp}", 2
    while out.exists():
        out, number = Path("runs") / f"compare-{stamp}-{number}", number + 1
    return out


def _command(plan: Plan, out: Path) -> str:
    """The command line that asks for this plan."""
    words = ["lasgd", "compare", "--algorithms", ",".join(entry.label.partition(" (")[0] for entry in plan.entries)]
    for condition in plan.conditions:
        words += ["--condition", condition]
    words += ["--seeds", ",".join(map(str, plan.seeds))]
    if plan.lr_grid:
        words += ["--lr-grid", ",".join(f"{lr:.12g}" for lr in plan.lr_grid), "--tune", plan.tune]
    if plan.target is not None:
        words += ["--target", f"{plan.target:g}"]
    return shlex.join([*words, "--reference", plan.reference, *options(plan.shared), "--out", str(out)])


def _announced(plan: Plan, out: Path) -> str:
    lines = [
        f"comparing {', '.join(entry.label for entry in plan.entries)}: {plan.shared.model} on {plan.shared.data}, "
        f"{plan.shared.ranks} ranks, conditions {', '.join(plan.conditions)}, seeds "
        f"{', '.join(map(str, plan.seeds))}; results go to {out}"
    ]
    untuned = [entry.label for entry in plan.entries if plan.lr_grid and "lr" in entry.own]
    if untuned:
        lines.append(f"not tuned, for their learning rate is given: {', '.join(untuned)}")
    return "\n".join(lines)


def _conclude(outcome: Outcome, plan: Plan, out: Path, console: Console) -> int:
    """Writes the report, prints the table, and says how it ended; returns the exit code."""
    runs = outcome.results["runs"]
    if any(run["status"] == "finished" for run in runs):
        console.print()
        console.print(table([run for run in runs if run["status"] != "missing"]))
    paths = write_report([out], out)
    console.print(Text(f"report: {', '.join(map(str, paths))}"), soft_wrap=True)
    if outcome.interrupted:
        print(f"interrupted; go on with: {plan.command}", file=sys.stderr)
        return INTERRUPTED
    if failed := outcome.failed:
        first = failed[0]
        print(
            f"lasgd: {len(failed)} of {len(runs)} runs did not finish, the first is {first['algorithm']}, "
            f"{first['condition']}, seed {first['seed']}: {first['error'] or first['status']}. The same command "
            "tries them again.",
            file=sys.stderr,
        )
        return 1
    return 0
