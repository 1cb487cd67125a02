"""`lasgd simulate --advise`: which algorithm to try first, from given figures or from a run that has measured them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from lasgd.cli.config import option
from lasgd.cli.train import ranks_word
from lasgd.errors import ConfigurationError
from lasgd.lab import conditions
from lasgd.training.interrupt import raising_interrupts
from lasgd.training.settings import SimulationSettings

if TYPE_CHECKING:
    from lasgd.lab.measured import Measured


_READ = frozenset(
    {"ranks", "condition", "network", "compute", "all_reduce", "model_bytes", "data", "model", "norm", "image_size"}
    | {"batch_size", "seed", "no_gradients"}
)
"""Settings that advice depends on, or that say what it does anyway."""


def check_is_read(given: Iterable[str]) -> None:
    """Raises ConfigurationError for an option that would change nothing."""
    if unread := [option(name) for name in given if name not in _READ]:
        raise ConfigurationError(
            f"{', '.join(unread)} beside --advise, which simulates every algorithm with its usual settings: it would "
            "change nothing. Leave it out, or simulate one algorithm without --advise."
        )


def print_advice(settings: SimulationSettings, given: set[str], run: Path | None, console: Console) -> None:
    """Prints where each figure is from, and the table. `given` are the names of settings that the user has chosen.

    Raises LasgdError.
    """
    from lasgd.lab.advise import advice_table, advise

    with raising_interrupts():
        measured = _from_settings(settings, given) if run is None else _from_run(settings, given, run)
        for line in measured.said:
            console.print(Text(line, style="dim"), soft_wrap=True)
        with console.status("simulating") as status:
            advices = advise(
                ranks=measured.ranks,
                compute=measured.compute,
                network=measured.network,
                vector=measured.vector,
                batch_size=measured.batch_size,
                all_reduce=settings.all_reduce,
                progress=status.update,
            )
    console.print()
    console.print(advice_table(advices, measured.ranks), crop=False)


def _from_settings(settings: SimulationSettings, given: set[str]) -> Measured:
    from lasgd.lab.advise import Measured
    from lasgd.training.data import open_data
    from lasgd.training.setup import make_model
    from lasgd.training.virtual_setup import cluster, says_no_step, step_time, vector_of, vector_of_bytes

    ranks, model, data = settings.ranks or 1, None, None
    if settings.model_bytes is not None:
        vector, whose = vector_of_bytes(settings.model_bytes), "as given"
    else:
        from lasgd.layout import Layout

        data = open_data(settings.data, settings.image_size)
        model = make_model(settings, data)
        vector, whose = vector_of(Layout(model)), f"{settings.model} on {Path(settings.data).name}"
    own = step_time(settings, model, data)
    compute, network = cluster(settings, ranks, own.seconds)
    said = [
        f"{ranks:,} {ranks_word(ranks)}, batch size {settings.batch_size} a rank",
        f"model: {vector.nbytes / 1e6:.3g} MB, {whose}",
        f"cluster: {described(settings)}",
    ]
    if says_no_step(settings):
        said.append(f"a local step: {own.seconds * 1e3:.4g} ms, {own.said}")
    if says_no_link(settings):
        said.append("links: none are given, so they cost nothing; say --network or link= in --condition")
    return Measured(ranks, compute, network, vector, settings.batch_size, said)


def _from_run(settings: SimulationSettings, given: set[str], run: Path) -> Measured:
    from lasgd.lab.advise import read_measured
    from lasgd.training.virtual_setup import DEFAULT_STEP_S, cluster, says_no_step

    for name in ("model_bytes", "data", "model"):
        if name in given:
            raise ConfigurationError(
                f"--{name.replace('_', '-')} beside --run: the run tells what its model is. Keep one of them."
            )
    measured = read_measured(run, settings.ranks if "ranks" in given else None)
    said = list(measured.said)
    compute, network = measured.compute, measured.network
    if given & {"compute", "network", "condition"}:
        own_compute, own_network = cluster(settings, measured.ranks, DEFAULT_STEP_S)
        if not says_no_step(settings):
            compute = own_compute
        elif "condition" in given and says_no_link(settings):
            raise ConfigurationError(
                f"--condition {settings.condition} beside --run: the run tells how long its steps took. Say all of it, "
                "as in step=100ms+straggler=last:4x, or leave it out."
            )
        if not says_no_link(settings):
            network = own_network
        said.append(f"instead of what the run had: {described(settings)}")
    if "batch_size" in given:
        said.append(f"batch size: {settings.batch_size}, as given")
        return replace(measured, compute=compute, network=network, said=said, batch_size=settings.batch_size)
    return replace(measured, compute=compute, network=network, said=said)


def described(settings: SimulationSettings) -> str:
    """The cluster, in the words of the options."""
    said = [f"condition {settings.condition}"] if settings.condition != "fast" else []
    said += [f"network {settings.network}"] if settings.network else []
    said += [f"compute {settings.compute}"] if settings.compute else []
    return ", ".join(said) or "condition fast"


def says_no_link(settings: SimulationSettings) -> bool:
    """Neither --network nor the condition describes the links."""
    parsed = conditions.parse(settings.condition)
    return settings.network is None and parsed.bandwidth_bytes_per_s is None and parsed.round_s is None
