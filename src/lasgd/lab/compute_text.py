"""The small language of --compute: how long the local steps of a simulated run take.

100ms                            every step
lognormal=100ms,sigma=0.2        median and spread: 68 % of the steps within exp(sigma) times the median, up or down
trace=FILE                       as measured: a run's timeline.json.gz, or CSV with the columns rank, step_s
...+straggler=last:4x+stall=1s@1%     as in --condition, on top of any of these
"""

from __future__ import annotations

import os.path
import re

from lasgd.errors import unknown
from lasgd.lab import conditions
from lasgd.lab.quantities import Reader
from lasgd.lab.virtual_conditions import slowed
from lasgd.virtual.compute_models import ComputeModel, Constant, LogNormal, Trace
from lasgd.virtual.step_times import read_step_times

_READ = Reader("compute")
_EXAMPLE = "100ms, lognormal=100ms,sigma=0.2 or trace=FILE"
_LOG_NORMAL_EXAMPLE = "lognormal=100ms,sigma=0.2"
_TRACE_EXAMPLE = "trace=runs/first/timeline.json.gz"
_SLOWING = ("straggler", "stall")
_TIMES = ("lognormal", "trace")


def parse_compute(text: str, world_size: int, seed: int) -> ComputeModel:
    """The compute model that `text` describes; `seed` is that of the run. Reads the file that a `trace=` names.

    Upper and lower case are alike, but for the file's name.

    Raises ConfigurationError that shows the part that cannot be understood and what was expected in its place, and
    DataError for what the file holds.
    """
    times, slowing = _split(text)
    for part in slowing:
        name = part.partition("=")[0].strip()
        if name in _TIMES:
            _READ.refuse(part, f"step times are given twice in {text!r}", "one of " + _EXAMPLE)
        if name not in _SLOWING:
            raise unknown(f"compute {text!r}: part", name, _SLOWING)
    model = _model(text, times, seed)
    return slowed(model, conditions.parse("+".join(slowing)), world_size, seed) if slowing else model


def _split(text: str) -> tuple[str, list[str]]:
    """Step times, and the parts that slow them down. A file's name may hold `+` too, as conditions do."""
    words = text.split("+")
    if not words[0].strip().casefold().startswith("trace"):
        words = text.casefold().split("+")
        return words[0].strip(), [word.strip() for word in words[1:]]
    names = ["+".join(words[: n + 1]) for n in range(len(words))]
    n = next((n for n in reversed(range(len(words))) if os.path.isfile(_file(names[n]))), 0)
    return names[n].strip(), [word.strip().casefold() for word in words[n + 1 :]]


def _file(part: str) -> str:
    return part.partition("=")[2].strip()


def _model(text: str, part: str, seed: int) -> ComputeModel:
    name, equals, value = (piece.strip() for piece in part.partition("="))
    if not equals:
        if name in _TIMES:
            _READ.refuse(part, f"`{name}` needs a value", _TRACE_EXAMPLE if name == "trace" else _LOG_NORMAL_EXAMPLE)
        return Constant(_READ.duration_s(part or text, name, _EXAMPLE))
    if name.casefold() == "trace":
        if not value:
            _READ.refuse(part, "no file is named", _TRACE_EXAMPLE)
        return Trace(read_step_times(value))
    if name in _SLOWING:
        _READ.refuse(part, "the time of a step comes first", f"100ms+{part}")
    if name != "lognormal":
        raise unknown(f"compute {text!r}: part", name, (*_TIMES, *_SLOWING))
    median, *options = (piece.strip() for piece in value.split(","))
    given: dict[str, str] = {}
    for option in options:
        key, _, number = (piece.strip() for piece in option.partition("="))
        if key != "sigma":
            raise unknown(f"compute part {part!r}: option", key, ["sigma"])
        if key in given:
            _READ.refuse(part, "sigma is given twice", _LOG_NORMAL_EXAMPLE)
        given[key] = number
    sigma = given.get("sigma", "")
    if not re.fullmatch(r"\d{1,9}\.?\d*|\.\d+", sigma, re.ASCII):
        _READ.refuse(part, f"sigma is {sigma!r}, not a positive decimal number", _LOG_NORMAL_EXAMPLE)
    return LogNormal(_READ.duration_s(part, median, _LOG_NORMAL_EXAMPLE), float(sigma), seed)
