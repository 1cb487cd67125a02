"""`lasgd report`: report.html and report.md anew, from the folder of a comparison or from several."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from lasgd.errors import ConfigurationError

HELP = (
    "Write report.html and report.md from the folders of one or more comparisons.\n\n"
    "The page needs no other file and no network. Several folders become one report; runs are told apart by folder "
    "where they would be the same."
)

_FOLDERS = "Folders that `lasgd compare` wrote."
_OUT = "Where the report goes. Default: the folder itself; needed where there are several."


def report(
    *folders: Annotated[Path, Parameter(help=_FOLDERS)],
    out: Annotated[Path | None, Parameter(help=_OUT)] = None,
) -> int:
    """Writes the report; returns the exit code. Raises LasgdError."""
    given = list(folders)
    if not given:
        raise ConfigurationError("lasgd report needs a folder that `lasgd compare` wrote, as in lasgd report runs/one.")
    if out is None and len(given) > 1:
        raise ConfigurationError("a report of several folders belongs to none of them: give --out DIR.")
    for path in write_report(given, out or given[0]):
        print(f"report: {path}")
    return 0


def write_report(folders: Sequence[Path], out: Path) -> list[Path]:
    """Writes report.html and report.md into `out`; their paths. Raises LasgdError."""
    from lasgd.lab.report.write import write

    return write(folders, out)
