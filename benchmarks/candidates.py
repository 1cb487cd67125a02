"""Rules that were tried beside `lasgd` and are no part of it: each a text of its own, in virtual time only.

    python benchmarks/candidates.py simulate --algorithm adaptive_gain --ranks 4 --condition step=100ms+round=1s

Takes what `lasgd simulate` takes, and knows these names beside. What was expected of them and what was found:
docs/experiments.md; benchmarks/learning.py runs them. s_i is a rank's snapshot, m the mean, n the ranks:

    half_gain        r_i <- r_i + (m - s_i) / 2
    adaptive_gain    r_i <- r_i + g (m - s_i),  g = 1 + <T, s_i - m> / |s_i - m|^2 over all ranks and the latest rounds,
                     T what the rank's local steps have added since the snapshot; at least 1/n, at most 1
    adaptive_gain_by_fragment    the same, a gain for each fragment, of its own rounds
    dropped          what a rank has learnt since the snapshot is not kept: r_i <- r_i + (m - z_i)
    cleared          lasgd, and each correction that is shown clears the optimizer's state
    weighted_steps   lasgd, and a snapshot weighs as many local steps as its rank has taken since the one before
    by_drift         lasgd, and instead of in turn the fragment goes that has drifted most, as far as is known
    remembered_mean  lasgd, and the model that is left is e in place of the mean: e <- e + (m - e) / 10 at every mean

The two numbers of a rank that adaptive_gain adds up, and the one of by_drift, would travel in the header of the next
round. Here all ranks are in one process and share them in memory, a round late like there.
"""

from __future__ import annotations

import math
import sys
from collections import defaultdict
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from lasgd.algorithms import lasgd, registry
from lasgd.algorithms.ending import last_exact_average
from lasgd.algorithms.registry import Algorithm
from lasgd.algorithms.requests import (
    AllReduceMean,
    Answer,
    Contribution,
    Failure,
    Gradient,
    Mean,
    NextRound,
    Request,
    Stop,
    Update,
)
from lasgd.layout import Fragment
from lasgd.pace import End, Pace
from lasgd.replica import Replica

REMEMBERED = 0.9
"""Of what the headers have said so far, from round to round."""

Text = Generator[Request, Answer, None]
Correct = Callable[[Replica, Pace, Fragment, Contribution, Mean], None]


def _communicate(
    replica: Replica,
    pace: Pace,
    correct: Correct,
    choose: Callable[[Replica, Pace], Fragment] = lambda replica, pace: replica.next_fragment(pace.fragments),
    weigh: Callable[[Replica, Contribution], Contribution] = lambda replica, sent: sent,
) -> Text:
    """As lasgd's, with a correction, a choice and a weight of one's own."""
    while pace.end is None:
        if isinstance((yield NextRound(pace.due_s)), Stop):
            return
        fragment = choose(replica, pace)
        sent = weigh(replica, replica.snapshot(fragment))
        outcome = yield AllReduceMean(sent)
        assert isinstance(outcome, Mean | Failure)
        pace.agree(outcome)
        if isinstance(outcome, Failure) or outcome.values is None:
            continue
        correct(replica, pace, fragment, sent, outcome)
    if pace.end in (End.SAMPLES, End.LEFT):
        yield from last_exact_average(replica, pace)


def _full(replica: Replica, pace: Pace, fragment: Fragment, sent: Contribution, outcome: Mean) -> None:
    replica.correct(fragment, sent, outcome)


def _with_gain(gain: float, replica: Replica, fragment: Fragment, sent: Contribution, outcome: Mean) -> None:
    """r <- r + g (m - s): `correct` subtracts s from what it takes for the mean."""
    assert outcome.values is not None
    shown = sent.values + gain * (outcome.values - sent.values)
    replica.correct(fragment, sent, replace(outcome, values=shown))


# Gains


def communicate_half_gain(replica: Replica, pace: Pace) -> Text:
    """Half of every correction."""
    return _communicate(replica, pace, lambda r, _, fragment, sent, mean: _with_gain(0.5, r, fragment, sent, mean))


@dataclass
class Said:
    """What the headers of all rounds so far have added up to; a rank knows a round's in the next one."""

    sums: dict[int, list[float]] = field(default_factory=dict)
    """By round: the numbers of all ranks, added up."""

    def say(self, round_: int, numbers: Sequence[float]) -> None:
        """One rank's, of this round."""
        so_far = self.sums.setdefault(round_, [0.0] * len(numbers))
        for index, number in enumerate(numbers):
            so_far[index] += number
        for old in [then for then in self.sums if then <= round_ - 100]:
            del self.sums[old]

    def before(self, round_: int) -> list[float] | None:
        """Of the rounds before this one, the later the more; None of none."""
        known = [(REMEMBERED ** (round_ - then), found) for then, found in self.sums.items() if then < round_]
        if not known:
            return None
        return [sum(share * found[index] for share, found in known) for index in range(len(known[0][1]))]


_SAID: WeakKeyDictionary[Pace, Any] = WeakKeyDictionary()
"""By agreement, which all ranks of a virtual cluster share."""


def communicate_adaptive_gain(replica: Replica, pace: Pace) -> Text:
    """As much of every correction as leaves least, by what rounds have shown of it."""
    said = _SAID.setdefault(pace, Said())
    return _adaptive(replica, pace, lambda fragment: said)


def communicate_adaptive_gain_by_fragment(replica: Replica, pace: Pace) -> Text:
    """The same, for each fragment by what its own rounds have shown; for a fixed number of fragments."""
    said = _SAID.setdefault(pace, defaultdict(Said))
    return _adaptive(replica, pace, lambda fragment: said[fragment.index])


def _adaptive(replica: Replica, pace: Pace, said_of: Callable[[Fragment], Said]) -> Text:
    def correct(replica: Replica, pace: Pace, fragment: Fragment, sent: Contribution, outcome: Mean) -> None:
        assert outcome.values is not None
        since, difference = _stands_for(replica, fragment) - sent.values, sent.values - outcome.values
        said = said_of(fragment)
        known = said.before(pace.round)
        said.say(pace.round, [float(since @ difference), float(difference @ difference)])
        gain = 1.0 if known is None or not known[1] else 1 + known[0] / known[1]
        _with_gain(min(1.0, max(1 / pace.world_size, gain)), replica, fragment, sent, outcome)

    return _communicate(replica, pace, correct)


def _stands_for(replica: Replica, fragment: Fragment) -> Tensor:
    """z = x + r of a fragment without buffers, as of now."""
    whole = replica.parameters() + replica.wait_residual(1.0)
    return whole[fragment.begin : fragment.end]


# What has been learnt meanwhile


def communicate_dropped(replica: Replica, pace: Pace) -> Text:
    """The mean replaces what it finds."""

    def correct(replica: Replica, pace: Pace, fragment: Fragment, sent: Contribution, outcome: Mean) -> None:
        assert outcome.values is not None
        since = _stands_for(replica, fragment) - sent.values
        replica.correct(fragment, sent, replace(outcome, values=outcome.values - since))

    return _communicate(replica, pace, correct)


# Momentum buffers


def compute_cleared(replica: Replica, pace: Pace) -> Text:
    """Clears the optimizer's state wherever something has been shown."""
    while True:
        yield Gradient()
        yield Update()
        shown = replica.tally.staleness.merges
        replica.merge()
        if replica.tally.staleness.merges > shown:
            replica.on_recovery()


def communicate_full(replica: Replica, pace: Pace) -> Text:
    """As lasgd's."""
    return _communicate(replica, pace, _full)


# Weights


def communicate_weighted_steps(replica: Replica, pace: Pace) -> Text:
    """Who has learnt more since counts for more."""
    before: dict[int, int] = {}

    def weigh(replica: Replica, sent: Contribution) -> Contribution:
        steps = replica.tally.local_steps
        taken, before[sent.begin] = steps - before.get(sent.begin, 0), steps
        return replace(sent, weight=sent.weight * max(1, taken))

    return _communicate(replica, pace, _full, weigh=weigh)


# Order


@dataclass
class Drifts:
    """How much each fragment drifts in a round, and when it went last; the same for all ranks."""

    rate: dict[int, float] = field(default_factory=dict)
    went: dict[int, int] = field(default_factory=dict)
    chosen: tuple[int, int] = (-1, 0)
    """(round, index), so that all ranks take the same."""
    since: int = 1
    """Rounds between the latest two turns of the fragment that went last."""

    def next(self, round_: int, fragments: int) -> int:
        """Those that never went first, then the one that has most to gain."""
        if self.chosen[0] != round_:
            new = [index for index in range(fragments) if index not in self.rate]
            waiting = {index: self.rate.get(index, 0.0) * (round_ - self.went[index]) for index in self.went}
            self.chosen = (round_, new[0] if new else max(waiting, key=waiting.__getitem__))
        return self.chosen[1]

    def say(self, round_: int, index: int, drift: float) -> None:
        """One rank's squared difference from the mean; the ranks' are added up."""
        if self.went.get(index) != round_:
            self.since = max(1, round_ - self.went.get(index, 0))
            self.went[index], self.rate[index] = round_, 0.0
        self.rate[index] += drift / self.since


def communicate_by_drift(replica: Replica, pace: Pace) -> Text:
    """The fragment goes that has drifted most; for a fixed number of fragments."""
    drifts = _SAID.setdefault(pace, Drifts())

    def choose(replica: Replica, pace: Pace) -> Fragment:
        return replica.fragments[drifts.next(pace.round, len(replica.fragments))]

    def correct(replica: Replica, pace: Pace, fragment: Fragment, sent: Contribution, outcome: Mean) -> None:
        assert outcome.values is not None
        difference = sent.values - outcome.values
        drifts.say(pace.round, fragment.index, float(difference @ difference))
        replica.correct(fragment, sent, outcome)

    return _communicate(replica, pace, correct, choose=choose)


# What is left in the end


def communicate_remembered_mean(replica: Replica, pace: Pace, settings: lasgd.Settings) -> Text:
    """A mean over the means of some ten cycles; momentum of the mean as in lasgd."""
    remembered = torch.full((replica.layout.size,), math.nan, dtype=replica.layout.dtype)  # NaN: no mean so far

    def correct(replica: Replica, pace: Pace, fragment: Fragment, sent: Contribution, outcome: Mean) -> None:
        assert outcome.values is not None
        part = remembered[fragment.begin : fragment.end]
        part.copy_(torch.where(part.isnan(), outcome.values, part.lerp(outcome.values, 1 - REMEMBERED)))
        replica.correct(fragment, sent, outcome, settings.outer_momentum)

    yield from _communicate(replica, pace, correct)
    if pace.end in (End.SAMPLES, End.LEFT):
        for fragment in replica.fragments:
            part = remembered[fragment.begin : fragment.end]
            if not part.isnan().any():
                replica.adopt(fragment, Mean(part))


CANDIDATES = tuple(
    Algorithm(name, compute, communicate, settings=settings, takes_fragments=True, goes_on_without_steps=False)
    for name, compute, communicate, settings in (
        ("half_gain", lasgd.compute, communicate_half_gain, None),
        ("adaptive_gain", lasgd.compute, communicate_adaptive_gain, None),
        ("adaptive_gain_by_fragment", lasgd.compute, communicate_adaptive_gain_by_fragment, None),
        ("dropped", lasgd.compute, communicate_dropped, None),
        ("cleared", compute_cleared, communicate_full, None),
        ("weighted_steps", lasgd.compute, communicate_weighted_steps, None),
        ("by_drift", lasgd.compute, communicate_by_drift, None),
        ("remembered_mean", lasgd.compute, communicate_remembered_mean, lasgd.Settings()),
    )
)


def register() -> None:
    """Lets `--algorithm` know them, in this process."""
    for candidate in CANDIDATES:
        if candidate.name not in registry.names():
            registry.add(candidate)


if __name__ == "__main__":
    from lasgd.cli.app import main

    register()
    sys.exit(main())
