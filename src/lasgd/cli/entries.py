"""The language of `--algorithms`: NAME[:setting=value]..., separated by commas.

lasgd,sync_sgd                                  two algorithms with the shared settings
local_sgd:steps-per-round=10:lr=0.1             one with settings of its own
lasgd,lasgd                                     the same twice, `lasgd` and `lasgd (2)`: how far do equals differ?
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from pydantic import ValidationError

from lasgd.cli.config import check_keys, problems
from lasgd.errors import ConfigurationError, unknown
from lasgd.lab.compare.entry import Entry
from lasgd.training.settings import Settings

EQUAL_FOR_ALL = frozenset(
    {
        *("data", "image_size", "model", "norm", "batch_size", "samples", "epochs", "seconds"),
        *("ranks", "device", "seed", "condition", "evaluations", "algorithm"),
    }
)
"""Settings that no entry may have of its own: a comparison holds them equal."""


def parse_entries(texts: Iterable[str], shared: Settings) -> tuple[Entry, ...]:
    """The entries that `texts` name, in their order. Raises ConfigurationError, naming the entry and its setting."""
    words = [word.strip() for text in texts for word in text.split(",")]
    if not any(words):
        raise ConfigurationError("--algorithms: no entry is given. Expected names, as in lasgd,sync_sgd.")
    seen: Counter[str] = Counter()
    return tuple(_entry(word, shared, seen) for word in words)


def _entry(word: str, shared: Settings, seen: Counter[str]) -> Entry:
    from lasgd.algorithms.registry import find  # brings torch

    name, *pairs = (part.strip() for part in word.split(":"))
    what = f"--algorithms: entry {word!r}"
    if not name:
        raise ConfigurationError(
            f"{what} names no algorithm. Expected NAME[:setting=value]..., separated by commas, as in "
            "lasgd,local_sgd:steps-per-round=10."
        )
    values: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = (part.strip() for part in pair.partition("="))
        if not equals or not value:
            raise ConfigurationError(f"{what}: {pair!r} is no setting. Expected setting=value, as in lr=0.1.")
        if key in values:
            raise ConfigurationError(f"{what}: {key!r} is given twice.")
        values[key] = value
    for key in values:
        if key.replace("-", "_") not in Settings.model_fields:
            own = (field.replace("_", "-") for field in Settings.model_fields.keys() - EQUAL_FOR_ALL)
            raise unknown(f"{what}: setting", key, own)
    values = check_keys(values, f"{what}: setting")
    for field in values:
        if field in EQUAL_FOR_ALL:
            option = field.replace("_", "-")
            raise ConfigurationError(
                f"{what}: {option} is the same for all entries of a comparison. "
                + (_PLURALS.get(field) or f"Give it once, as --{option}.")
            )
    try:
        typed = Settings.model_validate(values)
    except ValidationError as error:
        raise ConfigurationError("\n".join(f"{what}: {line}" for line in problems(error))) from error
    own = {field: getattr(typed, field) for field in values}
    label = ":".join([name, *(f"{field.replace('_', '-')}={_text(value)}" for field, value in own.items())])
    seen[label] += 1
    entry = Entry(label if seen[label] == 1 else f"{label} ({seen[label]})", name, own)
    try:
        checked = entry.settings(shared, "fast", 0)
    except ValidationError as error:
        raise ConfigurationError("\n".join(f"{what}: {line}" for line in problems(error))) from error
    # In seconds a condition decides how much is learnt, and the best rate depends on that.
    return replace(entry, is_tuned_once=checked.seconds is None and find(name).is_synchronous)


_PLURALS = {"seed": "Give --seeds.", "condition": "Give --condition, once for each.", "algorithm": "It has a name."}


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.12g}" if isinstance(value, float) else str(value)
