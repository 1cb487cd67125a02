"""Where settings come from: the resumed run, the config file, the command line; the later wins."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from lasgd.errors import ConfigurationError, unknown
from lasgd.training.run_folder import read_json
from lasgd.training.settings import OWN_TO_A_RANK, Settings

Kind = TypeVar("Kind", bound=Settings)

_BUDGETS = ("samples", "epochs", "seconds")


def read_config(path: Path, kind: type[Settings] = Settings) -> dict[str, Any]:
    """The settings of `kind` in a TOML file, keys as the options without their dashes in front.

    Raises ConfigurationError: no such file, not TOML (with the line), a key that is no setting (with the nearest).
    """
    try:
        with open(path, "rb") as file:
            values = tomllib.load(file)
    except OSError as error:
        raise ConfigurationError(f"--config: {path} cannot be read: {error.strerror or error}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"--config: {path} is not a TOML file: {error}.") from error
    return check_keys(values, f"{path}: config key", kind)


def check_keys(values: Mapping[str, Any], what: str, kind: type[Settings] = Settings) -> dict[str, Any]:
    """`values` by field name, which may be spelt with dashes.

    Raises ConfigurationError for a key that is no setting, with the nearest known one, and for one given twice.
    """
    settings = {}
    for key, value in values.items():
        field = key.replace("-", "_")
        if field not in kind.model_fields:
            raise unknown(what, key, (name.replace("_", "-") for name in kind.model_fields))
        if field in settings:
            raise ConfigurationError(f"{what} {field.replace('_', '-')!r} is given twice, with - and with _. Keep one.")
        settings[field] = value
    return settings


def combine(
    given: Mapping[str, Any], config: Mapping[str, Any], stored: Kind | None = None, kind: type[Kind] = Settings
) -> Kind:
    """The settings of a run, from the command line's, the config file's, and the resumed run's.

    A budget on the command line (`samples`, `epochs` or `seconds`) takes the place of the config file's. A resumed run
    keeps its settings: another value is refused, but for what is a rank's own business. Raises ConfigurationError.
    """
    values = dict(config)
    if any(name in given for name in _BUDGETS):
        for name in _BUDGETS:
            values.pop(name, None)
    values |= given
    wanted = validated(values, kind)
    if stored is None:
        return wanted
    for name in values:
        before, now = getattr(stored, name), getattr(wanted, name)
        if before != now and name not in OWN_TO_A_RANK:
            raise ConfigurationError(
                f"{option(name)}: {now} differs from the resumed run's {before}. A resumed run keeps its settings: "
                "leave the option out, or start a new run."
            )
    return stored.model_copy(update={name: getattr(wanted, name) for name in values if name in OWN_TO_A_RANK})


def read_stored(folder: Path) -> Settings:
    """The settings that the run in `folder` was started with. Raises ConfigurationError where it holds no run."""
    if not folder.is_dir():
        raise ConfigurationError(f"--resume: {folder} is not a folder.")
    path = folder / "settings.json"
    try:
        values = read_json(path)
        if not isinstance(values, dict):
            raise ConfigurationError(f"{path} does not hold settings.")
        if {"network", "compute"} <= values.keys():
            raise ConfigurationError(
                f"the run in {folder} was simulated, and those cannot be resumed. Start it anew with lasgd simulate."
            )
        return validated(check_keys(values, f"{path}: setting"))
    except ConfigurationError as error:
        raise ConfigurationError(f"--resume: {error}") from error


def validated(values: Mapping[str, Any], kind: type[Kind] = Settings) -> Kind:
    """Settings of `kind` from `values`, each of its setting's own type: neither "32" nor true is a number.

    Raises ConfigurationError with one line per problem.
    """
    try:
        return kind.model_validate(dict(values), strict=True)
    except ValidationError as error:
        raise ConfigurationError("\n".join(problems(error))) from error


def problems(error: ValidationError) -> list[str]:
    """One plain line per problem: `--lr: must be greater than 0, got -0.1`."""
    by_option: dict[str, tuple[list[str], Any]] = {}
    for problem in error.errors():
        name = option(str(problem["loc"][0])) if problem["loc"] else ""
        requirements, _ = by_option.setdefault(name, ([], problem["input"]))
        requirement = problem["msg"].removeprefix("Value error, ").replace("Input should be", "must be", 1)
        requirement = requirement.split(", unable to parse")[0]
        if requirement not in requirements:
            requirements.append(requirement)
    return [
        f"{name}: {_alternatives(requirements)}, got {value}" if name else _alternatives(requirements)
        for name, (requirements, value) in by_option.items()
    ]


def option(name: str) -> str:
    """The option of a setting: `batch_size` is `--batch-size`."""
    return "--" + name.replace("_", "-")


def _alternatives(requirements: Iterable[str]) -> str:
    """Joins what the members of a union would have accepted."""
    first, *others = requirements
    return " or ".join([first, *(other.removeprefix("must be ") for other in others)])
