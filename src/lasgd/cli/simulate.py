"""`lasgd simulate`: the run that `lasgd train` would be, on a cluster that there is none of, in virtual time."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Group, Parameter
from rich.console import Console

from lasgd.cli import config as sources
from lasgd.cli.advise import check_is_read, described, print_advice
from lasgd.cli.train import (
    check,
    check_data_and_model,
    explaining_surprises,
    new_default,
    prepared_folder,
    ranks_word,
    say,
)
from lasgd.errors import ConfigurationError
from lasgd.lab.rank_process import INTERRUPTED
from lasgd.training.interrupt import raising_interrupts
from lasgd.training.lasting_output import lasting_output
from lasgd.training.settings import SimulationSettings

DEFAULT_RANKS = 4

HELP = (
    "Run an algorithm on a virtual cluster, in one process and on a clock of its own.\n\n"
    "Takes the options of `train`, and --network and --compute for the cluster. With real gradients it says what would "
    "be learnt and when; with --no-gradients only how fast and how stale, for thousands of ranks in seconds. "
    "--workers are for all ranks together here; checkpoints and time-outs have no meaning and are ignored."
)

_FOLDER = Group("Run folder and config file", sort_key=0)
_ADVICE = Group("Advice", sort_key=1)
_SETTINGS = Group("Settings", sort_key=2)
_OUT = "The run folder, new or empty. Default: runs/DATA-MODEL-ALGORITHM-virtual-TIME."
_ADVISE = "Simulate every algorithm on this cluster and print which to try first. Trains nothing, writes nothing."
_RUN = "With --advise: a finished run folder to read step times, links, model size and batch size from."
_CONFIG = "A TOML file of settings, such as batch-size = 64. Options on the command line win over it."


def simulate(
    *,
    out: Annotated[Path | None, Parameter(group=_FOLDER, help=_OUT)] = None,
    advise: Annotated[bool, Parameter(group=_ADVICE, help=_ADVISE)] = False,
    run: Annotated[Path | None, Parameter(group=_ADVICE, help=_RUN)] = None,
    config: Annotated[Path | None, Parameter(group=_FOLDER, help=_CONFIG)] = None,
    settings: Annotated[SimulationSettings | None, Parameter(name="*", group=_SETTINGS)] = None,
) -> int:
    """Simulates as `HELP` says; returns the exit code. Raises LasgdError."""
    given = {} if settings is None else {name: getattr(settings, name) for name in settings.model_fields_set}
    in_file = {} if config is None else sources.read_config(config, SimulationSettings)
    merged = sources.combine(given, in_file, kind=SimulationSettings)
    ranks = merged.ranks or DEFAULT_RANKS
    merged = merged.model_copy(update={"ranks": ranks})
    if advise:
        if out is not None:
            raise ConfigurationError("--out beside --advise, which writes nothing. Leave one of them out.")
        check_is_read(given)
        check(merged, ranks)
        print_advice(merged, {*given, *in_file}, run, Console())
        return 0
    if run is not None:
        raise ConfigurationError("--run goes with --advise, which reads a run's figures.")
    check_simulation(merged, ranks)
    out = out or new_default(merged)
    with prepared_folder(out, None, ranks):
        say(
            f"simulating {merged.algorithm} on {ranks:,} virtual {ranks_word(ranks)}: {described(merged)}; "
            f"results go to {out}"
        )
        return _run(merged, out)


def _run(settings: SimulationSettings, out: Path) -> int:
    with explaining_surprises(out), lasting_output():
        from lasgd.training.virtual_run import run_simulation

        with raising_interrupts():
            code = run_simulation(settings, out)
    if code == INTERRUPTED:
        print(f"interrupted; {out} tells how far it came, and nothing can go on from there", file=sys.stderr)
    return code


def check_simulation(settings: SimulationSettings, world_size: int) -> None:
    """Finds options that cannot work, alone or together, before anything is computed. Raises LasgdError."""
    check(settings, world_size)
    from lasgd.training.virtual_setup import (
        DEFAULT_STEP_S,
        budget_without_data,
        check_memory,
        cluster,
        step_time,
        vector_of_bytes,
    )

    check_memory(None, world_size)
    cluster(settings, world_size, DEFAULT_STEP_S)
    if settings.model_bytes is None:
        check_data_and_model(settings)
        return
    vector_of_bytes(settings.model_bytes)
    if not settings.no_gradients:
        raise ConfigurationError("--model-bytes goes with --no-gradients: gradients need a model.")
    budget_without_data(settings, world_size)
    step_time(settings, None, None)
