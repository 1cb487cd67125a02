"""Algorithms by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from typing import Any

from lasgd.algorithms import (
    ad_psgd,
    agreement,
    cocod_sgd,
    d_psgd,
    diloco,
    easgd,
    independent,
    lasgd,
    local_sgd,
    osgp,
    overlap_local_sgd,
    parameter_server,
    post_local_sgd,
    sgp,
    sync_sgd,
)
from lasgd.algorithms.requests import Answer, Request
from lasgd.errors import ConfigurationError, unknown
from lasgd.momentum import MOST_OF_RANKS

Part = Callable[..., Generator[Request, Answer, None]]
"""(replica, pace) -> generator; in an algorithm with settings of its own, once they are bound."""


MOST_TIMES = 40.0
"""As far as momentum may stretch a gradient: 0.9 in one place is 10, with 0.8 in the other 50, which nobody means."""


@dataclass(frozen=True)
class Algorithm:
    """The activities of a rank, and what they promise.

    They never wait for each other. What `compute` asks for beside its local steps makes the rank wait.
    """

    name: str
    compute: Part
    communicate: Part | None
    exchange: Part | None = None
    """What a rank does with messages of other ranks beside its local steps."""
    settings: Any = None
    """The algorithm's own, a frozen dataclass of its module; None where it has none."""
    agrees: bool = True
    """The ranks agree on progress and the end, through the header; else each goes by itself."""
    ends_identical: bool = True
    """All replicas are equal, bit for bit, at the agreed end."""
    takes_fragments: bool = False
    """The vector may be cut; else it is averaged whole."""
    takes_wire: bool = False
    """Averages may travel in a coarse wire format: what is rounded off stays in the residual."""
    lets_ranks_leave: bool = True
    """A rank may take fewer local steps than the others and still end with them."""
    goes_on_without_steps: bool = True
    """A rank that takes no more local steps must go on with `compute`, for others wait for it; else it may rest."""
    averages_gradients: bool = False
    """Every local step waits for the mean of all gradients, which a driver may also form during the backward pass."""
    writes_messages: bool = False
    """Ranks write to each other; all-reduces carry the header, and the exact average at the end."""

    def check_wire(self, wire: str) -> None:
        """Raises ConfigurationError where its averages cannot travel in that wire format."""
        if wire != "fp32" and not self.takes_wire:
            takers = ", ".join(algorithm.name for algorithm in _ALGORITHMS.values() if algorithm.takes_wire)
            raise ConfigurationError(
                f"wire format {wire}: {self.name} would lose for good what it rounds off. It is for {takers}; "
                f"leave it out, or in a comparison give it to that entry alone, as in {takers}:wire={wire}"
            )

    def check_momentum(self, momentum: float) -> None:
        """Raises ConfigurationError where that of the optimizers and that of the mean together would run away.

        What the optimizers keep of momentum that was shared out (momentum.py) is no second one.
        """
        outer = self.settings.outer_momentum if self.keeps_mean else 0.0
        if not MOST_OF_RANKS < momentum < 1 or outer == 0:
            return
        times = 1 / ((1 - momentum) * (1 - outer))
        if times > MOST_TIMES:
            raise ConfigurationError(
                f"momentum {momentum:g} of the optimizer and outer momentum {outer:g} of the mean multiply: a gradient "
                f"would move the mean {times:.0f} times as far as without (limit {MOST_TIMES:g}). Leave the optimizer "
                "without momentum, with the same learning rate, or lower one of the two; lasgd.momentum.shared_out "
                "says what goes as far as one momentum alone"
            )

    @property
    def keeps_mean(self) -> bool:
        """Its replicas keep the latest mean, as its corrections have momentum."""
        return getattr(self.settings, "keeps_mean", False)

    @property
    def least_fragments(self) -> int:
        """What `fragments="auto"` begins with and does not go below."""
        return getattr(self.settings, "least_fragments", 1)

    @property
    def is_synchronous(self) -> bool:
        """Nothing reaches a replica in the background, so time decides when something is learnt, and not what."""
        return self.exchange is None and (self.communicate is None or self.writes_messages)


def _gossip(module: Any, *, exchanges: bool) -> Algorithm:
    """An algorithm whose ranks write to each other; `exchanges`: in the background, else after every local step."""
    return Algorithm(
        module.__name__.rpartition(".")[2],
        module.compute,
        agreement.communicate,
        module.exchange if exchanges else None,
        module.Settings(),
        goes_on_without_steps=not exchanges,
        writes_messages=True,
    )


_ALGORITHMS = {
    algorithm.name: algorithm
    for algorithm in (
        Algorithm(
            "lasgd",
            lasgd.compute,
            lasgd.communicate,
            settings=lasgd.Settings(),
            takes_fragments=True,
            takes_wire=True,
            goes_on_without_steps=False,
        ),
        Algorithm("local_sgd", local_sgd.compute, None),
        Algorithm(
            "sync_sgd",
            sync_sgd.compute,
            None,
            lets_ranks_leave=False,
            averages_gradients=True,
        ),
        Algorithm(
            "post_local_sgd",
            post_local_sgd.compute,
            None,
            settings=post_local_sgd.Settings(),
            lets_ranks_leave=False,
        ),
        Algorithm("diloco", diloco.compute, None, settings=diloco.Settings()),
        Algorithm(
            "overlap_local_sgd",
            overlap_local_sgd.compute,
            None,
            settings=overlap_local_sgd.Settings(),
        ),
        Algorithm("cocod_sgd", cocod_sgd.compute, None),
        _gossip(d_psgd, exchanges=False),
        _gossip(sgp, exchanges=False),
        _gossip(osgp, exchanges=True),
        _gossip(ad_psgd, exchanges=True),
        _gossip(parameter_server, exchanges=True),
        _gossip(easgd, exchanges=True),
        Algorithm(
            "independent",
            independent.compute,
            independent.communicate,
            agrees=False,
            ends_identical=False,
            goes_on_without_steps=False,
        ),
    )
}


def add(algorithm: Algorithm) -> None:
    """Lets `--algorithm` and `attach` know one more, in this process. Raises ConfigurationError for a name in use."""
    if algorithm.name in _ALGORITHMS:
        raise ConfigurationError(f"there is an algorithm {algorithm.name!r} already; give yours another name")
    _ALGORITHMS[algorithm.name] = algorithm


def names() -> tuple[str, ...]:
    """The names that `--algorithm` takes."""
    return tuple(_ALGORITHMS)


def find(name: str, settings: Mapping[str, Any] | None = None) -> Algorithm:
    """The algorithm `name` with `settings` of its own in place of its defaults.

    Raises ConfigurationError with the nearest known name, and for settings that it does not have.
    """
    if not isinstance(name, str) or name not in _ALGORITHMS:
        raise unknown("algorithm", name, _ALGORITHMS)
    algorithm, given = _ALGORITHMS[name], dict(settings or {})
    known = settings_of(name)
    for setting in given:
        if setting not in known:
            takers = [other for other in _ALGORITHMS if setting in settings_of(other)]
            if not takers:
                raise unknown(f"setting of {name}", setting, all_settings())
            raise ConfigurationError(f"{setting} is no setting of {name}, but of {', '.join(takers)}; leave it out")
    if algorithm.settings is None:
        return algorithm
    own = replace(algorithm.settings, **given)
    parts = {name: _bound(getattr(algorithm, name), own) for name in ("compute", "communicate", "exchange")}
    return replace(algorithm, **parts, settings=own)


def _bound(part: Part | None, settings: Any) -> Part | None:
    """With the algorithm's own settings, where this part of it has any use for them."""
    if part is None or "settings" not in inspect.signature(part).parameters:
        return part
    return partial(part, settings=settings)


def settings_of(name: str) -> dict[str, Any]:
    """The algorithm's own settings with their defaults."""
    settings: Any = _ALGORITHMS[name].settings
    return {} if settings is None else asdict(settings)


def all_settings() -> tuple[str, ...]:
    """Every setting that some algorithm has."""
    return tuple(dict.fromkeys(f.name for a in _ALGORITHMS.values() if a.settings for f in fields(a.settings)))
