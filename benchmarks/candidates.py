"""Rules that were tried beside `lasgd` and are no part of it: its own text, with another answer in one place.

    python benchmarks/candidates.py simulate --algorithm adaptive_gain --ranks 4 --condition step=100ms+round=1s

Takes what `lasgd simulate` takes, in virtual time only, and knows these names beside. What was expected of them and
what was found: docs/experiments.md; benchmarks/learning.py runs them. s_i is a rank's snapshot, m the mean, n the
number of ranks:

    half_gain        r_i <- r_i + (m - s_i) / 2
    adaptive_gain    r_i <- r_i + g (m - s_i),  g = 1 + <T, s_i - m> / |s_i - m|^2 over all ranks and the latest rounds,
                     T what the rank's local steps have added since the snapshot; at least 1/n, at most 1
    adaptive_gain_by_fragment    the same, a gain for each fragment, of its own rounds; for a fixed number of them
    dropped          what a rank has learnt since the snapshot is not kept: r_i <- r_i + (m - z_i)
    cleared          lasgd, and each correction that is shown clears the optimizer's state
    momentum_averaged    lasgd, and the optimizers' momentum b is averaged as replicas are: b_i <- b_i + (mean b - its
                     snapshot). Its bytes are not sent here: give it a round of twice the length
    weighted_steps   lasgd, and a snapshot weighs as many local steps as its rank has taken since the one before
    weighted_gradient    lasgd, and a snapshot weighs 1/|g|, g its rank's latest gradient
    by_drift         lasgd, and instead of in turn the fragment goes that has drifted most, as far as is known; for a
                     fixed number of fragments
    by_layer         lasgd, and each of the model's layers is a fragment, however large
    interleaved      lasgd, and a fragment has rows of the whole model, each tenth of a hundred pieces if there are ten
                     fragments; for a fixed number of them
    waits_first      lasgd, and before it, for a fifth of the run, ranks wait after every local step for a mean of all
    remembered_mean  lasgd, and the model that is left is e in place of the mean: e <- e + (m - e) / 10 at every mean

The two numbers of a rank that adaptive_gain adds up, and the one of by_drift, would travel in the header of the next
round. Here all ranks are in one process and share them in memory, a round late like there.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections import defaultdict
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from lasgd.algorithms import lasgd, registry
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
    Update,
)
from lasgd.layout import Fragment, Layout, Piece
from lasgd.pace import Pace
from lasgd.replica import Replica

REMEMBERED = 0.9
"""Of what the headers have said so far, from round to round; of the means so far, from cycle to cycle."""

WAITING_SHARE = 0.2
"""Of the run, in the beginning."""

PIECES = 10
"""Of each fragment that is no single run of rows, about."""

Text = Generator[Request, Answer, None]

_SHARED: WeakKeyDictionary[Pace, Any] = WeakKeyDictionary()
"""By agreement, which all ranks of a virtual cluster share."""


class Candidate:
    """A replica as `lasgd.communicate` sees it. What a candidate answers in another way, it has a method for."""

    takes_momentum = True
    """Of the mean."""

    def __init__(self, replica: Replica, pace: Pace):
        self.replica, self.pace = replica, pace

    def __getattr__(self, name: str) -> Any:
        return getattr(self.replica, name)

    def correct(self, fragment: Fragment, sent: Contribution, outcome: Mean | Failure, momentum: float = 0.0) -> None:
        """As the replica's, once the candidate has seen the mean, if there is one."""
        if isinstance(outcome, Mean) and outcome.values is not None:
            outcome = self.seen(fragment, sent, outcome, outcome.values)
        self.replica.correct(fragment, sent, outcome, momentum)

    def seen(self, fragment: Fragment, sent: Contribution, outcome: Mean, mean: Tensor) -> Mean:
        """What is to be taken for the mean."""
        return outcome


# Gains


class HalfGain(Candidate):
    """Half of every correction."""

    takes_momentum = False

    def seen(self, fragment: Fragment, sent: Contribution, outcome: Mean, mean: Tensor) -> Mean:
        return _with_gain(0.5, sent, outcome, mean)


def _with_gain(gain: float, sent: Contribution, outcome: Mean, mean: Tensor) -> Mean:
    """g (m - s): what is taken for the mean has s subtracted from it."""
    return replace(outcome, values=sent.values + gain * (mean - sent.values))


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


class AdaptiveGain(Candidate):
    """As much of every correction as leaves least, by what rounds have shown of it."""

    takes_momentum = False

    def said(self, fragment: Fragment) -> Said:
        """What rounds have shown: all of them."""
        return _SHARED.setdefault(self.pace, Said())

    def seen(self, fragment: Fragment, sent: Contribution, outcome: Mean, mean: Tensor) -> Mean:
        since, difference = _stands_for(self.replica, fragment) - sent.values, sent.values - mean
        said = self.said(fragment)
        known = said.before(self.pace.round)
        said.say(self.pace.round, [float(since @ difference), float(difference @ difference)])
        gain = 1.0 if known is None or not known[1] else 1 + known[0] / known[1]
        return _with_gain(min(1.0, max(1 / self.pace.world_size, gain)), sent, outcome, mean)


class AdaptiveGainByFragment(AdaptiveGain):
    """The same, for each fragment by what its own rounds have shown."""

    def said(self, fragment: Fragment) -> Said:
        return _SHARED.setdefault(self.pace, defaultdict(Said))[fragment.index]


def _stands_for(replica: Replica, fragment: Fragment) -> Tensor:
    """z = x + r of a fragment without buffers, as of now."""
    whole = replica.parameters() + replica.wait_residual(1.0)
    return whole[fragment.begin : fragment.end]


# What has been learnt meanwhile


class Dropped(Candidate):
    """The mean replaces what it finds."""

    takes_momentum = False

    def seen(self, fragment: Fragment, sent: Contribution, outcome: Mean, mean: Tensor) -> Mean:
        return replace(outcome, values=mean - (_stands_for(self.replica, fragment) - sent.values))


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


class MomentumAveraged(Candidate):
    """The optimizers' momentum goes with the replicas, and what it became meanwhile is kept as well."""

    takes_momentum = False

    def __init__(self, replica: Replica, pace: Pace):
        super().__init__(replica, pace)
        self.rounds = 0
        self.sent: list[Tensor] = []

    def snapshot(self, fragment: Fragment) -> Contribution:
        """With one of the momentum, which all ranks find under the same number."""
        self.rounds += 1
        self.sent = [buffer.clone() for buffer in self.buffers(fragment)]
        sent = _SHARED.setdefault(self.pace, {})
        sent.setdefault(self.rounds, []).append(self.sent)
        sent.pop(self.rounds - 2, None)
        return self.replica.snapshot(fragment)

    def seen(self, fragment: Fragment, sent: Contribution, outcome: Mean, mean: Tensor) -> Mean:
        of_all, buffers = _SHARED[self.pace][self.rounds], self.buffers(fragment)
        if all(len(each) == len(buffers) for each in of_all):
            for buffer, mine, *of_ranks in zip(buffers, self.sent, *of_all, strict=True):
                buffer.add_(sum(of_ranks) / len(of_ranks) - mine)
        return outcome

    def buffers(self, fragment: Fragment) -> list[Tensor]:
        """The live momentum of a fragment; none before the first local step."""
        state = cast(Any, self.replica.on_recovery).__self__  # what clears the optimizer's state is a method of it
        found = []
        for piece in fragment.pieces:
            tensor = piece.entry.tensor()
            if tensor in state:
                buffer = state[tensor]["momentum_buffer"]
                found.append(buffer if piece.is_whole else buffer.narrow(0, piece.first_row, piece.rows))
        return found


# Weights


class WeightedSteps(Candidate):
    """Who has learnt more since counts for more."""

    def __init__(self, replica: Replica, pace: Pace):
        super().__init__(replica, pace)
        self.before: dict[int, int] = {}

    def snapshot(self, fragment: Fragment) -> Contribution:
        """With the weight of its local steps."""
        sent, steps = self.replica.snapshot(fragment), self.replica.tally.local_steps
        taken, self.before[sent.begin] = steps - self.before.get(sent.begin, 0), steps
        return replace(sent, weight=sent.weight * max(1, taken))


class WeightedGradient(Candidate):
    """Who has come down further counts for more."""

    def snapshot(self, fragment: Fragment) -> Contribution:
        """With the weight of the rank's gradient; 1 before there is one."""
        sent, gradients = self.replica.snapshot(fragment), self.gradients()
        length = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients))
        return replace(sent, weight=sent.weight / length) if 0 < length < math.inf else sent

    def gradients(self) -> list[Tensor]:
        """Of all parameters that have one."""
        found = (entry.tensor().grad for entry in self.replica.layout.entries)
        return [gradient for gradient in found if gradient is not None]


# Cuts


class ByLayer(Candidate):
    """A layer goes at a time."""

    def __init__(self, replica: Replica, pace: Pace):
        super().__init__(replica, pace)
        layout = self.replica.layout
        layout.cut = lambda fragments: layers(layout)  # whatever the number asked for

    def next_fragment(self, fragments: int) -> Fragment:
        """In turn, as the replica's."""
        return self.replica.next_fragment(len(layers(self.replica.layout)))


def layers(layout: Layout) -> list[Fragment]:
    """A fragment for each module that has averaged tensors of its own."""
    found = []
    for index, (_, of_layer) in enumerate(itertools.groupby(layout.entries, key=lambda entry: id(entry.owner))):
        entries = list(of_layer)
        pieces = (
            Piece(entry, 0, len(entry.tensor()) if entry.tensor().dim() else 1, True, entry.begin, entry.end)
            for entry in entries
        )
        found.append(Fragment(index, entries[0].begin, entries[-1].end, tuple(pieces)))
    return found


@dataclass(frozen=True)
class Scattered:
    """A fragment that is several of the replica's."""

    parts: tuple[Fragment, ...]


class Interleaved(Candidate):
    """A fragment has rows of the whole model."""

    takes_momentum = False

    def __init__(self, replica: Replica, pace: Pace):
        super().__init__(replica, pace)
        self.turn = -1
        self.sent: list[tuple[Contribution, Tensor]] = []

    def next_fragment(self, fragments: int) -> Any:
        """In turn, each with a part of the whole model's length at equal distances."""
        if self.turn < 0:
            self.replica.next_fragment(fragments * PIECES)
        self.turn = (self.turn + 1) % fragments
        return Scattered(tuple(self.replica.fragments[self.turn :: fragments]))

    def snapshot(self, fragment: Any) -> Contribution:
        """Its parts one behind the other."""
        if not isinstance(fragment, Scattered):
            return self.replica.snapshot(fragment)
        self.sent = []
        for part in fragment.parts:
            sent = self.replica.snapshot(part)
            self.sent.append((sent, sent.values.clone()))  # the replica's buffer is one for all its fragments
        weight = min(sent.weight for sent, _ in self.sent)
        return Contribution(torch.cat([values for _, values in self.sent]), weight)

    def correct(self, fragment: Any, sent: Contribution, outcome: Mean | Failure, momentum: float = 0.0) -> None:
        """Part by part."""
        if isinstance(outcome, Failure) or outcome.values is None:
            return
        begin = 0
        for part, (of_part, values) in zip(fragment.parts, self.sent, strict=True):
            of_part.values.copy_(values)
            mean = replace(outcome, values=outcome.values[begin : begin + part.size])
            self.replica.correct(part, replace(of_part, weight=sent.weight), mean)
            begin += part.size


# Waiting


def compute_waiting_first(replica: Replica, pace: Pace, settings: lasgd.Settings) -> Text:
    """In the beginning a whole cycle of rounds after every local step."""
    while pace.end is None and pace.progress < WAITING_SHARE:
        yield Gradient()
        yield Update()
        for _ in replica.fragments:
            fragment = replica.next_fragment(pace.fragments)
            sent = replica.snapshot(fragment)
            outcome = yield AllReduceMean(sent)
            pace.agree(outcome)
            replica.correct(fragment, sent, outcome, settings.outer_momentum)
        replica.merge()
    yield from lasgd.compute(replica, pace)


def communicate_after_waiting(replica: Replica, pace: Pace, settings: lasgd.Settings) -> Text:
    """Looks every now and then whether the beginning is over."""
    while pace.end is None and pace.progress < WAITING_SHARE:
        yield NextRound(1.0)
    yield from lasgd.communicate(replica, pace, settings)


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


class ByDrift(Candidate):
    """The fragment goes that has drifted most."""

    @property
    def drifts(self) -> Drifts:
        """Of all ranks."""
        return _SHARED.setdefault(self.pace, Drifts())

    def next_fragment(self, fragments: int) -> Fragment:
        """Whatever the number asked for: that of the replica."""
        return self.replica.fragments[self.drifts.next(self.pace.round, len(self.replica.fragments))]

    def seen(self, fragment: Fragment, sent: Contribution, outcome: Mean, mean: Tensor) -> Mean:
        difference = sent.values - mean
        self.drifts.say(self.pace.round, fragment.index, float(difference @ difference))
        return outcome


# What is left in the end


class RememberedMean(Candidate):
    """A mean over the means of some ten cycles."""

    def __init__(self, replica: Replica, pace: Pace):
        super().__init__(replica, pace)
        size, dtype = replica.layout.size, replica.layout.dtype
        self.remembered = torch.full((size,), math.nan, dtype=dtype)  # NaN: no mean so far

    def seen(self, fragment: Fragment, sent: Contribution, outcome: Mean, mean: Tensor) -> Mean:
        part = self.remembered[fragment.begin : fragment.end]
        part.copy_(torch.where(part.isnan(), mean, part.lerp(mean, 1 - REMEMBERED)))
        return outcome

    def adopt(self, fragment: Fragment, outcome: Mean | Failure) -> None:
        """In place of the last exact average."""
        part = self.remembered[fragment.begin : fragment.end]
        if isinstance(outcome, Mean) and not part.isnan().any():
            outcome = replace(outcome, values=part)
        self.replica.adopt(fragment, outcome)


# By name


def _algorithm(name: str, candidate: type[Candidate], compute: Callable[[Replica, Pace], Text]) -> Algorithm:
    def communicate(replica: Replica, pace: Pace, settings: lasgd.Settings) -> Text:
        return lasgd.communicate(cast(Replica, candidate(replica, pace)), pace, settings)

    def communicate_without_momentum(replica: Replica, pace: Pace) -> Text:
        return communicate(replica, pace, lasgd.Settings())

    text, settings = (
        (communicate, lasgd.Settings()) if candidate.takes_momentum else (communicate_without_momentum, None)
    )
    return Algorithm(name, compute, text, settings=settings, takes_fragments=True, goes_on_without_steps=False)


CANDIDATES = (
    _algorithm("half_gain", HalfGain, lasgd.compute),
    _algorithm("adaptive_gain", AdaptiveGain, lasgd.compute),
    _algorithm("adaptive_gain_by_fragment", AdaptiveGainByFragment, lasgd.compute),
    _algorithm("dropped", Dropped, lasgd.compute),
    _algorithm("cleared", Candidate, compute_cleared),
    _algorithm("momentum_averaged", MomentumAveraged, lasgd.compute),
    _algorithm("weighted_steps", WeightedSteps, lasgd.compute),
    _algorithm("weighted_gradient", WeightedGradient, lasgd.compute),
    _algorithm("by_drift", ByDrift, lasgd.compute),
    _algorithm("by_layer", ByLayer, lasgd.compute),
    _algorithm("interleaved", Interleaved, lasgd.compute),
    Algorithm(
        "waits_first",
        compute_waiting_first,
        communicate_after_waiting,
        settings=lasgd.Settings(),
        takes_fragments=True,
        goes_on_without_steps=False,
    ),
    _algorithm("remembered_mean", RememberedMean, lasgd.compute),
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
