"""Numbers with units, as the small languages of the command line write them: 20mbit, 100ms, 1%, 4x.

Each language (`condition`, `network`, `compute`) has one `Reader`, so that all of them refuse in the same words: the
part that cannot be understood, why, and what was expected in its place.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal
from typing import NoReturn

from lasgd.errors import ConfigurationError

BITS = {"gbit": Decimal(10**9), "mbit": Decimal(10**6), "kbit": Decimal(10**3)}
SECONDS = {"s": Decimal(1), "ms": Decimal("1e-3"), "us": Decimal("1e-6")}
BYTES = {"gb": Decimal(10**9), "mb": Decimal(10**6), "kb": Decimal(10**3), "b": Decimal(1)}
PERCENT = {"%": Decimal(1)}
TIMES = {"x": Decimal(1)}

BANDWIDTH_LIMITS = (125.0, 1.25e11)  # 1 kbit/s to 1000 gbit/s, in bytes
TIME_LIMITS = (1e-6, 3600.0)

_NUMBER = re.compile(r"(\d+\.?\d*|\.\d+)([a-z%]+)", re.ASCII)


@dataclass(frozen=True)
class Reader:
    """Reads the quantities of one language; `part` is what an error shows, `example` what it expects instead."""

    language: str
    """`condition`, `network` or `compute`."""

    def refuse(self, part: str, why: str, expected: str) -> NoReturn:
        """Raises the ConfigurationError."""
        raise ConfigurationError(f"{self.language} part {part!r}: {why}. Expected {expected}.")

    def quantity(self, part: str, text: str, what: str, units: dict[str, Decimal], example: str) -> Decimal:
        """`text` in the unit that has size 1."""
        match = _NUMBER.fullmatch(text)
        if match is None or match[2] not in units:
            known = " or ".join(units)
            self.refuse(part, f"{text!r} is not {what} (a positive decimal number and {known})", example)
        return Decimal(match[1]) * units[match[2]]

    def duration_s(self, part: str, text: str, example: str) -> float:
        """`100ms` -> 0.1."""
        return self.within(part, self.quantity(part, text, "a duration", SECONDS, example), TIME_LIMITS, "1us to 3600s")

    def bandwidth_bytes_per_s(self, part: str, text: str, example: str) -> float:
        """`20mbit` -> 2.5e6."""
        bits_per_s = self.quantity(part, text, "a bandwidth", BITS, example)
        return self.within(part, bits_per_s / 8, BANDWIDTH_LIMITS, "1kbit to 1000gbit")

    def within(self, part: str, value: Decimal, limits: tuple[float, float], expected: str) -> float:
        """`value`, refused where it is out of the limits."""
        if not limits[0] <= float(value) <= limits[1]:
            self.refuse(part, "the value is out of range", expected)
        return float(value)
