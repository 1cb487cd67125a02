"""Conditions: the small language in which runs are told how slow their machines and links are.

    fast                              nothing is slowed down
    link=20mbit                       every rank's link, each way; kbit, mbit or gbit
    link=100mbit,latency=20ms         the same, and a message takes 20 ms on its way
    straggler=3:4x                    rank 3 is four times slower; `last` names the last rank
    stall=1s@1%                       each step stalls for 1 s with probability 1 %
    step=100ms                        forward and backward are padded to this length
    round=1s                          an all-reduce of the whole vector takes at least this long, of a part its share

joined with `+`, plus the named presets in PRESETS. Only `straggler=` may be given more than once.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Literal

from lasgd.errors import ConfigurationError, unknown
from lasgd.lab.quantities import BANDWIDTH_LIMITS, BITS, PERCENT, SECONDS, TIME_LIMITS, TIMES, Reader

PRESETS = {
    "slow": "link=20mbit+step=100ms",
    "straggler": "straggler=last:4x+step=100ms",
    "jitter": "stall=1s@1%+step=55ms",
    "both": "link=20mbit+straggler=last:4x+step=100ms",
}
"""The standard conditions by name; `fast`, the fifth, stands for no part at all."""

Straggler = tuple[int | Literal["last"], float]
"""Who is slow, and how many times slower."""

_FACTOR_LIMITS = (1.0, 1000.0)
_READ = Reader("condition")


@dataclass(frozen=True)
class Condition:
    """How slow machines and links are. `Condition()` is `fast`; None and 0 stand for "not slowed down"."""

    bandwidth_bytes_per_s: float | None = None
    """Of every rank's link, each way."""
    latency_s: float = 0.0
    """One way, of a message between two ranks; only together with a bandwidth."""
    step_s: float | None = None
    """Forward and backward last this long (times the straggler's factor)."""
    round_s: float | None = None
    """An all-reduce of the whole vector takes at least this long, of a part its share."""
    stall_s: float = 0.0
    stall_probability: float = 0.0
    """0 to 1, of each local step of each rank."""
    stragglers: tuple[Straggler, ...] = ()
    """Slow ranks, each at most once, in ascending order; `last` comes last."""

    def __post_init__(self) -> None:
        in_order = tuple(sorted(self.stragglers, key=lambda s: (s[0] == "last", s[0])))
        object.__setattr__(self, "stragglers", in_order)
        given: list[tuple[str, float | None, tuple[float, float]]] = [
            ("bandwidth_bytes_per_s", self.bandwidth_bytes_per_s, BANDWIDTH_LIMITS),
            ("latency_s", self.latency_s or None, TIME_LIMITS),
            ("step_s", self.step_s, TIME_LIMITS),
            ("round_s", self.round_s, TIME_LIMITS),
            ("stall_s", self.stall_s or None, TIME_LIMITS),
            ("stall_probability", self.stall_probability, (0.0, 1.0)),
            *((f"factor of straggler {who}", factor, _FACTOR_LIMITS) for who, factor in self.stragglers),
        ]
        for name, value, (least, most) in given:
            if value is not None and not least <= value <= most:
                raise ConfigurationError(f"condition: {name} is {value!r}; expected {least:g} to {most:g}.")
        if self.latency_s and self.bandwidth_bytes_per_s is None:
            raise ConfigurationError("condition: latency_s needs bandwidth_bytes_per_s (link=100mbit,latency=20ms).")
        if self.stall_probability and not self.stall_s:
            raise ConfigurationError("condition: stall_probability needs stall_s (stall=1s@1%).")
        names = [who for who, _ in self.stragglers]
        if len(set(names)) < len(names):
            raise ConfigurationError(f"condition: stragglers names a rank twice: {names}.")

    def __str__(self) -> str:
        """The canonical text: `parse(str(condition)) == condition`."""
        parts = []
        if self.bandwidth_bytes_per_s is not None:
            latency = f",latency={_duration_text(self.latency_s)}" if self.latency_s else ""
            parts.append(f"link={_bandwidth_text(self.bandwidth_bytes_per_s)}{latency}")
        parts += [f"straggler={who}:{_decimal_text(_exact(factor))}x" for who, factor in self.stragglers]
        if self.stall_s:
            percent = _decimal_text(_exact(self.stall_probability) * 100)
            parts.append(f"stall={_duration_text(self.stall_s)}@{percent}%")
        if self.step_s is not None:
            parts.append(f"step={_duration_text(self.step_s)}")
        if self.round_s is not None:
            parts.append(f"round={_duration_text(self.round_s)}")
        return "+".join(parts) or "fast"

    def factor(self, rank: int, world_size: int) -> float:
        """How many times slower `rank` computes than it would; 1.0 where it is no straggler."""
        for who, factor in self.stragglers:
            if rank == (world_size - 1 if who == "last" else who):
                return factor
        return 1.0

    def check(self, world_size: int) -> None:
        """Raises ConfigurationError if a straggler is not among the `world_size` ranks, or is named twice."""
        last = world_size - 1
        names = [who for who, _ in self.stragglers]
        for who in names:
            if isinstance(who, int) and who > last:
                raise ConfigurationError(
                    f"condition '{self}': straggler={who}: there is no rank {who} among {world_size} ranks. "
                    f"Expected 0 to {last}, or `last`, as in straggler=last:4x."
                )
        if "last" in names and last in names:
            raise ConfigurationError(
                f"condition '{self}': rank {last} is also the last of {world_size} ranks, so two factors are given for "
                f"it. Keep straggler={last}: or straggler=last:."
            )


def parse(text: str) -> Condition:
    """The condition that `text` describes; upper and lower case are alike.

    Raises ConfigurationError that shows the part that cannot be understood and what was expected in its place.
    """
    words = [word.strip() for word in text.casefold().split("+")]
    if words == ["fast"]:
        return Condition()
    if "fast" in words:
        _READ.refuse(text, "`fast` slows nothing down, so it stands alone", "`fast`, or the other parts without it")
    fields: dict[str, Any] = {}
    names: set[str] = set()
    stragglers: dict[int | Literal["last"], float] = {}
    for part in (part for word in words for part in PRESETS.get(word, word).split("+")):
        name, value = _name_and_value(text, part)
        found = _READERS[name](part, value)
        if name == "straggler":
            who, factor = found["straggler"]
            if who in stragglers:
                _READ.refuse(part, f"straggler {who} is given twice in {text!r}", "one factor for each rank")
            stragglers[who] = factor
            continue
        if name in names:
            _READ.refuse(part, f"`{name}=` is given twice in {text!r} (presets count)", f"one `{name}=`")
        names.add(name)
        fields.update(found)
    return Condition(**fields, stragglers=tuple(stragglers.items()))


def _name_and_value(text: str, part: str) -> tuple[str, str]:
    """`step=100ms` -> step, 100ms; refuses what is no part of the language."""
    if not part:
        _READ.refuse(text, "a part is empty", "`fast`, or parts joined with `+` as in link=20mbit+step=100ms")
    name, equals, value = (piece.strip() for piece in part.partition("="))
    if name == "latency":
        _READ.refuse(part, "latency is said of a link", "link=100mbit,latency=20ms")
    if name not in _READERS and name not in PRESETS:
        raise unknown(f"condition {text!r}: part", name, {*_READERS, *PRESETS, "fast"})
    if not equals:
        _READ.refuse(part, f"`{name}` needs a value", _EXAMPLES[name])
    if name not in _READERS:
        _READ.refuse(part, f"`{name}` is a preset and takes no value", f"`{name}`")
    return name, value


_EXAMPLES = {
    "link": "link=20mbit or link=100mbit,latency=20ms",
    "straggler": "straggler=3:4x or straggler=last:4x",
    "stall": "stall=1s@1%",
    "step": "step=100ms",
    "round": "round=1s",
}


def _link(part: str, value: str) -> dict[str, Any]:
    bandwidth, *options = (piece.strip() for piece in value.split(","))
    example = _EXAMPLES["link"]
    fields = {"bandwidth_bytes_per_s": _READ.bandwidth_bytes_per_s(part, bandwidth, example)}
    for option in options:
        name, _, latency = (piece.strip() for piece in option.partition("="))
        if name != "latency":
            raise unknown(f"condition part {part!r}: option", name, ["latency"])
        if "latency_s" in fields:
            _READ.refuse(part, "latency is given twice", example)
        fields["latency_s"] = _READ.duration_s(part, latency, example)
    return fields


def _straggler(part: str, value: str) -> dict[str, Any]:
    who, colon, factor = (piece.strip() for piece in value.partition(":"))
    example = _EXAMPLES["straggler"]
    if not colon:
        _READ.refuse(part, f"{value!r} is not a rank and a factor", example)
    if who != "last" and not re.fullmatch(r"\d{1,9}", who, re.ASCII):
        _READ.refuse(part, f"{who!r} is not a rank", example)
    times = _READ.within(part, _READ.quantity(part, factor, "a factor", TIMES, example), _FACTOR_LIMITS, "1x to 1000x")
    return {"straggler": (who if who == "last" else int(who), times)}


def _stall(part: str, value: str) -> dict[str, Any]:
    duration, at, chance = (piece.strip() for piece in value.partition("@"))
    example = _EXAMPLES["stall"]
    if not at:
        _READ.refuse(part, f"{value!r} is not a duration and a probability", example)
    percent = _READ.quantity(part, chance, "a percentage", PERCENT, example)
    return {
        "stall_s": _READ.duration_s(part, duration, example),
        "stall_probability": _READ.within(part, percent / 100, (0.0, 1.0), "0% to 100%"),
    }


_READERS: dict[str, Callable[[str, str], dict[str, Any]]] = {
    "link": _link,
    "straggler": _straggler,
    "stall": _stall,
    "step": lambda part, value: {"step_s": _READ.duration_s(part, value, _EXAMPLES["step"])},
    "round": lambda part, value: {"round_s": _READ.duration_s(part, value, _EXAMPLES["round"])},
}


# Canonical texts go through Decimal(repr(value)), the shortest decimal that reads back as the same float; scaling it by
# powers of ten and by 8 is exact, so parsing restores the float bit for bit.


def _exact(value: float) -> Decimal:
    return Decimal(repr(float(value)))


def _decimal_text(value: Decimal) -> str:
    return format(value.normalize(), "f")


def _duration_text(seconds: float) -> str:
    unit = "s" if seconds >= 1 else "ms" if seconds >= 1e-3 else "us"
    return _decimal_text(_exact(seconds) / SECONDS[unit]) + unit


def _bandwidth_text(bytes_per_s: float) -> str:
    bits_per_s = _exact(bytes_per_s) * 8
    unit = next((unit for unit, size in BITS.items() if bits_per_s >= size), "kbit")
    return _decimal_text(bits_per_s / BITS[unit]) + unit
