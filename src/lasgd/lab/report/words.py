"""What the report says in words: who reached the target first, and what a reader must know before believing it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from lasgd.lab.compare.entry import YARDSTICK
from lasgd.lab.report.source import Run, Source, spread
from lasgd.lab.report.tables import percent, ratio, seconds, times
from lasgd.training.display import OVERRUN_LIMIT

NEAR = 1.05
"""Times to target within this factor of the first are called level: seeds alone make such a difference."""

LATER_SHOWN = 3


def compared(source: Source) -> str:
    """What was compared, in a sentence."""
    settings = source.results[0]["settings"]
    seeds = sorted({run.seed for run in source.runs})
    budget = next(
        (f"{settings[name]:,g} {name}" for name in ("samples", "seconds", "epochs") if settings.get(name) is not None),
        "the default budget",
    )
    return (
        f"{_counted(len(source.entries), 'algorithm')} on {settings['data']}, model {settings['model']}, "
        f"{_counted(settings['ranks'], 'rank')}, batches of {settings['batch_size']}, {budget}; "
        f"{_counted(len(source.conditions), 'condition')}, {_counted(len(seeds), 'seed')}."
    )


def targets(source: Source) -> str:
    """What had to be reached."""
    reached = ", ".join(f"{percent(top1)} in {condition}" for condition, top1 in source.targets.items())
    return f"Target: {'; '.join(source.rules)}: {reached}."


def reading(source: Source, condition: str) -> str:
    """Who reached the target first under one condition."""
    if source.targets[condition] is None:
        return f"no target, for no run of {source.reference} finished."
    means, partly, never = {}, [], []
    for label in source.labels(condition):
        runs = source.finished(condition, label)
        reached = [run.figures["seconds_to_target"] for run in runs if run.figures["seconds_to_target"] is not None]
        found = spread(reached)
        if found and len(reached) == len(source.of(condition, label)):
            means[label] = found[0]
        elif found:
            partly.append(f"{label} ({len(reached)} of {len(source.of(condition, label))} seeds)")
        elif runs:
            never.append(label)
    said = []
    if means:
        first, *others = sorted(means, key=lambda label: means[label])
        level = [label for label in others if means[label] <= NEAR * means[first]]
        sentence = f"{first} reached the target first, after {seconds(means[first])}"
        if level:
            sentence += f", and {', '.join(level)} within {NEAR - 1:.0%} of it".replace("%", " %")
        found = ratio(source, condition, first)
        if first != source.reference and found is not None and source.reference in means:
            sentence += f"; {times(found.value)} sooner than {source.reference} ({seconds(means[source.reference])})"
        later = [label for label in others if label not in level and label != source.reference]
        if later:
            named = [f"{label} ({times(means[label] / means[first])} the time)" for label in later[:LATER_SHOWN]]
            more = len(later) - len(named)
            sentence += f"; then {', '.join(named)}" + (f" and {more} more" if more else "")
        said.append(sentence)
    if partly:
        said.append("with some seeds only: " + ", ".join(partly))
    if never:
        said.append(("never reached by " if means or partly else "nobody reached it: ") + ", ".join(never))
    return f"{'; '.join(said) or 'no run finished'}."


def warnings(source: Source) -> list[str]:
    """What speaks against the figures, worst first."""
    return [*_failures(source), *_doubts(source), *_grid(source), *_spread(source)]


def _failures(source: Source) -> Iterator[str]:
    for run in source.runs:
        status = run.figures["status"]
        if status in ("failed", "interrupted") or (status == "missing" and run.figures["error"]):
            word = "not run" if status == "missing" else status
            yield f"{_named(run)}: {word}: {run.figures['error'] or 'no reason given'}"
    missing = sum(run.figures["status"] == "missing" and not run.figures["error"] for run in source.runs)
    if missing:
        yield f"{_counted(missing, 'run')} of {len(source.runs):,} not run yet: the same command goes on with them."


def _doubts(source: Source) -> Iterator[str]:
    for condition in source.conditions:
        for label in source.labels(condition):
            yield from _doubts_of(source, condition, label)
    for condition, of_condition in _by_condition(source.yardstick):
        if overruns := _overruns(of_condition):
            yield (
                f"{condition}: in {_counted(len(overruns), 'run')} without communication up to "
                f"{percent(max(overruns))} of the steps outlasted their padding, so retention is too high."
            )
    emulation = {run.figures["link_emulation"] for run in source.runs if run.figures["link_emulation"]} - {"none"}
    if len(emulation) > 1:
        yield f"links were emulated in different ways: {', '.join(sorted(emulation))}."


def _doubts_of(source: Source, condition: str, label: str) -> Iterator[str]:
    runs, where = source.finished(condition, label), f"{label}, {condition}"
    if overruns := _overruns(runs):
        yield (
            f"{where}: in {len(overruns)} of {_counted(len(runs), 'run')} up to {percent(max(overruns))} of the steps "
            f"outlasted their padding (limit {percent(OVERRUN_LIMIT, 0)}): its rates and times stand for nothing."
        )
    differing = [run for run in runs if run.figures["replicas_identical"] is False]
    if differing and source.entries[label]["algorithm"] != YARDSTICK:
        yield f"{where}: in {len(differing)} of {_counted(len(runs), 'run')} the replicas differ at the end."
    sick = sum(run.figures.get("health") or 0 for run in runs)
    if sick:
        yield f"{where}: ranks held NaN or Inf, or ran away, {_counted(sick, 'time')}, and took the mean."


def _overruns(runs: Iterable[Run]) -> list[float]:
    """Shares of steps that outlasted their padding, of the runs where they are too many."""
    shares = [run.figures["padding_overrun"] or 0.0 for run in runs if run.is_finished]
    return [share for share in shares if share > OVERRUN_LIMIT]


def _by_condition(runs: Iterable[Run]) -> Iterator[tuple[str, list[Run]]]:
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(run.condition, []).append(run)
    yield from found.items()


def _grid(source: Source) -> Iterator[str]:
    at_edge: dict[str, list[str]] = {}
    for trial in source.grid:
        if trial["at_edge"]:
            at_edge.setdefault(trial["algorithm"], []).append(f"{trial['lr']:g} in {trial['condition']}")
    for label, found in at_edge.items():
        yield (
            f"{label}: the best learning rate is at the edge of the grid ({', '.join(found)}); a better one may lie "
            "beyond."
        )


def _spread(source: Source) -> Iterator[str]:
    for condition in source.conditions:
        for label in source.labels(condition):
            asked, there = len(source.of(condition, label)), len(source.finished(condition, label))
            if 0 < there < asked:
                yield f"{label}, {condition}: {there} of {asked} seeds finished; means are over those."
    if len({run.seed for run in source.runs}) == 1:
        yield "one seed only: nothing says how much of a difference is chance."


def _named(run: Run) -> str:
    return f"{run.label}, {run.condition}, seed {run.seed}"


def _counted(n: int, word: str) -> str:
    return f"{n:,} {word}{'' if n == 1 else 's'}"
