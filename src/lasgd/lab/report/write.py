"""Puts the report together: report.html from its template, and report.md."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lasgd.errors import ConfigurationError, LasgdError
from lasgd.lab.report import charts, tables, words
from lasgd.lab.report.looks import DARK, LIGHT, Look, css_variables, looks
from lasgd.lab.report.source import Source, read_source
from lasgd.lab.report.strips import strip
from lasgd.training.run_folder import replacing

HTML, MARKDOWN = "report.html", "report.md"

PACE = (
    "Retention is local steps per second with the algorithm, over the same of `independent` ranks, which never "
    "communicate, under the same condition and seed. Waiting is time in which a rank's training stood still for the "
    "network, a lock or another rank."
)
TRAFFIC = "Staleness is the local steps that a rank takes between the snapshot for an average and its merge."


def write(folders: Sequence[Path], out: Path) -> list[Path]:
    """Writes the report of the comparisons in `folders` into `out`; the paths. Raises LasgdError."""
    source = read_source(folders)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(f"--out: {out} cannot be used as a folder: {error.strerror or error}.") from error
    paths = []
    for name, text in ((HTML, html(source)), (MARKDOWN, markdown(source))):
        with replacing(out / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
        paths.append(out / name)
    return paths


def html(source: Source) -> str:
    """The page. Raises LasgdError where matplotlib or Jinja2 are not there."""
    try:
        import jinja2
        import markupsafe
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise LasgdError(f"a report needs {error.name}, which is not installed: pip install {error.name}.") from error

    of_entry = looks(list(source.entries))
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("lasgd.lab.report", ""),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template("report.html.j2").render(
        raw=lambda text: markupsafe.Markup(text) if text else "",
        title=title(source),
        light=css_variables(LIGHT),
        dark=css_variables(DARK),
        compared=words.compared(source),
        targets=words.targets(source),
        readings=[(condition, words.reading(source, condition)) for condition in source.conditions],
        warnings=words.warnings(source),
        machine=_machine_line(source),
        looks=of_entry,
        conditions=[_condition(source, condition, of_entry) for condition in source.conditions],
        pace=tables.pace(source),
        pace_says=PACE,
        bars=[charts.retention_bars(source, of_entry), charts.waiting_bars(source, of_entry)],
        traffic=tables.traffic(source),
        traffic_says=TRAFFIC,
        grid=tables.grid(source),
        grid_says=grid_says(source),
        entries=tables.own_settings(source),
        settings=tables.settings(source),
        environment=tables.machine(source),
        commands=[found["command"] for found in source.results if found.get("command")],
        runs=tables.all_runs(source),
    )


def _condition(source: Source, condition: str, of_entry: dict[str, Look]) -> dict[str, Any]:
    """What the page shows of one condition."""
    labels = source.labels(condition)
    found = [(label, next(iter(source.finished(condition, label)), None)) for label in labels]
    return {
        "name": condition,
        "meaning": meaning(condition),
        "labels": labels,
        "target": source.targets[condition],
        "table": tables.to_target(source, condition),
        "curves": [charts.curves(source, condition, of_entry, over) for over in ("wall_s", "samples")],
        "strips": [(label, strip(run)) for label, run in found if run is not None],
        "histogram": charts.histogram(source, condition, of_entry),
        "consensus": charts.consensus(source, condition, of_entry),
    }


def markdown(source: Source) -> str:
    """report.md."""
    parts = [f"# {title(source)}", words.compared(source) + "\n" + words.targets(source)]
    parts.append("\n".join(f"- **{condition}**: {words.reading(source, condition)}" for condition in source.conditions))
    if found := words.warnings(source):
        parts += ["**To know before believing it:**", "\n".join(f"- {warning}" for warning in found)]
    for condition in source.conditions:
        parts += [f"## {condition}", meaning(condition), tables.to_target(source, condition).markdown()]
    parts += ["## Pace and waiting", PACE, tables.pace(source).markdown()]
    parts += ["## Staleness and bytes", TRAFFIC, tables.traffic(source).markdown()]
    if source.grid:
        parts += ["## Learning rates", grid_says(source), tables.grid(source).markdown()]
    parts += ["## Settings and machine", tables.own_settings(source).markdown(), tables.settings(source).markdown()]
    parts.append(tables.machine(source).markdown())
    commands = [found["command"] for found in source.results if found.get("command")]
    if commands:
        parts.append("```sh\n" + "\n".join(commands) + "\n```")
    parts += ["## All runs", tables.all_runs(source).markdown()]
    return "\n\n".join(part for part in parts if part) + "\n"


def title(source: Source) -> str:
    """Of the page."""
    settings = source.results[0]["settings"]
    return f"{settings['model']} on {Path(settings['data']).name}: {len(source.entries)} algorithms compared"


def meaning(condition: str) -> str:
    """What a preset stands for; empty where the name says it."""
    from lasgd.lab.conditions import parse

    try:
        spelt = str(parse(condition))
    except ConfigurationError:
        return ""
    return "" if set(spelt.split("+")) == set(condition.split("+")) else f"`{spelt}`"


def grid_says(source: Source) -> str:
    """How learning rates were chosen."""
    found = source.results[0]["grid"]
    where = "in virtual time" if found["tune"] == "virtual" else "in real runs"
    return (
        f"Final loss by learning rate, tried {where} with seed {found['seed']}; the best one, in brackets, was used "
        "for all seeds."
    )


def _machine_line(source: Source) -> str:
    found = source.results[0]["environment"]
    return f"{found.get('cpu_count')} cores, {found.get('cpu')}; torch {found.get('torch')}, lasgd {found.get('lasgd')}"
