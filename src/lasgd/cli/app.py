"""The command `lasgd`: finds the subcommand, and turns every error into a line on stderr and an exit code.

Exit codes: 0 done, 1 an error during the run, 2 something in the set-up, 130 interrupted. Nothing heavy is imported
until a subcommand runs, so that --help is quick.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence

from cyclopts import App, CycloptsError, Parameter, UnusedCliTokensError
from pydantic import ValidationError
from rich.console import Console

from lasgd import __version__
from lasgd.cli import compare as comparing
from lasgd.cli import report as reporting
from lasgd.cli import simulate as simulating
from lasgd.cli.config import problems
from lasgd.cli.train import HELP, keep_traceback, surprise, train
from lasgd.errors import ConfigurationError, LasgdError
from lasgd.training.interrupt import ending_at_once

app = App(
    name="lasgd",
    help="Train one PyTorch model on many unequal machines without any of them ever waiting.",
    version=__version__,
    help_format="plaintext",
    default_parameter=Parameter(negative=()),
)
app.command(train, help=HELP)
app.command(simulating.simulate, help=simulating.HELP)
app.command(comparing.compare, help=comparing.HELP)
app.command(reporting.report, help=reporting.HELP)


def main(tokens: Sequence[str] | None = None) -> int:
    """Runs `lasgd` with these arguments (default: the process's own) and returns its exit code."""
    _open_standard_streams()
    with ending_at_once():
        return _run(sys.argv[1:] if tokens is None else list(tokens))


def _run(tokens: list[str]) -> int:
    try:
        command, bound, _ = app.parse_args(tokens, exit_on_error=False, print_error=False)
        return command(*bound.args, **bound.kwargs) or 0
    except CycloptsError as error:
        return _complain(_misuse(error), 2)
    except ConfigurationError as error:
        return _complain(str(error).splitlines(), 2)
    except LasgdError as error:
        return _complain(str(error).splitlines(), 1)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `lasgd --help | head`
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except Exception as error:
        return _complain([surprise(error, keep_traceback(error))], 1)


def _misuse(error: CycloptsError) -> list[str]:
    if isinstance(error.__cause__, ValidationError):
        return problems(error.__cause__)
    if isinstance(error, UnusedCliTokensError):
        return [f"unexpected: {' '.join(error.unused_tokens or [])}; see --help."]
    return [" ".join(str(error).split())]


def _complain(lines: list[str], code: int) -> int:
    console = Console(stderr=True, highlight=False)
    rank = os.environ.get("RANK", "0")
    who = "lasgd:" if rank == "0" else f"lasgd: rank {rank}:"
    for line in lines:
        if console.is_terminal:
            console.print(f"[bold red]{who}[/]", end=" ")
            console.print(line, markup=False)
        else:
            print(f"{who} {line}", file=sys.stderr)
    return code


def _open_standard_streams() -> None:
    """Puts /dev/null where the shell closed one, so that no socket or file takes its number."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # takes the lowest free number, this one; for the
            # ranks too, whose first socket would be their standard output otherwise
