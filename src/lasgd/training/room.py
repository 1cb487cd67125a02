"""How much room a run's rounds left its learning rate: what theory says of rounds as late as these.

In a direction of curvature h, averages that come late make the ranks' differences, or their mean, grow without end from
some c = lr h on (lasgd.lab.drift, docs/theory.md); synchronous SGD does from c = 2 (1 + momentum) on. A run's room is
the first over the second: with a tenth of it, the learning rates that are stable are ten times smaller. Nothing is
known of a network's curvatures here, so this tells no failure; it tells where one learning rate does not fit both.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from lasgd.training.settings import Settings

LEAST_ROOM = 0.1
"""Below which a run is told of it: `full` with a whole vector ten steps late, which learns clearly less than
with fragments in docs/experiments.md, has a sixtieth, with ten fragments a third."""


class Room(NamedTuple):
    """Limits of c over that of synchronous SGD with all of the momentum, each at most 1."""

    of_ranks: float
    """From where on the ranks swing apart."""
    of_mean: float
    """From where on their mean runs away; 1 without momentum of the mean."""


def room(momentum: float, outer_momentum: float, fragments: int, staleness: int, steps_per_round: float) -> Room:
    """With rounds that begin every `steps_per_round` local steps; `staleness` is in local steps too, at least 1."""
    from lasgd.lab.drift import Cycle, MeanCycle  # here, because it loads torch, and the command line shows summaries

    flight = max(1, staleness - 1)  # the boundary at which a mean is shown is the next one after it has come
    steps = max(flight, round(fragments * steps_per_round))
    alone = 2 * (2 - (1 - momentum) * (1 - outer_momentum))
    of_ranks = Cycle(steps, flight, momentum).limit()
    of_mean = MeanCycle(steps, flight, momentum, outer_momentum).limit() if outer_momentum else alone
    return Room(min(1.0, of_ranks / alone), min(1.0, of_mean / alone))


def room_of(run: Mapping[str, Any]) -> Room | None:
    """Of the rank whose means came latest, from run.json; None where it is no run of late averages."""
    asked = {name: value for name, value in (run.get("settings") or {}).items() if name in _NEEDED}
    if run["algorithm"] != "lasgd" or len(run["ranks"]) < 2 or not asked or not run.get("fragments"):
        return None
    settings = Settings.model_validate(asked | {"algorithm": "lasgd"})
    ranks = [rank for rank in run["ranks"] if rank["rounds"] and rank["local_steps"]]
    if not ranks:
        return None
    latest = max(ranks, key=lambda rank: rank["staleness_steps"]["mean"] or 0.0)
    return room(
        settings.optimizer_momentum,
        settings.algorithm_settings().get("outer_momentum", 0.0),
        run["fragments"],
        round(latest["staleness_steps"]["mean"] or 0.0),
        latest["local_steps"] / latest["rounds"],
    )


_NEEDED = frozenset({"momentum", "outer_momentum", "fragments"})
