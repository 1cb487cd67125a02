"""How much of a correction a rank takes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from candidate_replica import REMEMBERED, SHARED, Candidate, stands_for
from lasgd.algorithms.requests import Contribution, Mean
from lasgd.layout import Fragment


class HalfGain(Candidate):
    """Half of every correction."""

    takes_momentum = False

    def seen(self, fragment: Fragment, sent: Contribution, outcome: Mean, mean: Tensor) -> Mean:
        return replace(outcome, values=sent.values + 0.5 * (mean - sent.values))


@dataclass
class Said:
    """What the headers of all rounds so far have added up to; a rank knows a round's in the next one."""

    remembers: float = REMEMBERED
    """Of a round, in the one after."""
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
        known = [(self.remembers ** (round_ - then - 1), found) for then, found in self.sums.items() if then < round_]
        if not known:
            return None
        return [sum(share * found[index] for share, found in known) for index in range(len(known[0][1]))]


class AdaptiveGain(Candidate):
    """As much of every correction as leaves least, by what rounds have shown of it."""

    takes_momentum = False
    gain = 1.0
    """The latest."""

    def parts(self, fragment: Fragment) -> list[tuple[Said, slice]]:
        """What has a gain of its own, and what rounds have shown of it: all in one."""
        return [(SHARED.setdefault(self.pace, Said()), slice(None))]

    def seen(self, fragment: Fragment, sent: Contribution, outcome: Mean, mean: Tensor) -> Mean:
        since, difference = stands_for(self.replica, fragment) - sent.values, sent.values - mean
        taken = mean.clone()
        for said, part in self.parts(fragment):
            known = said.before(self.pace.round)
            said.say(self.pace.round, [float(since[part] @ difference[part]), float(difference[part].square().sum())])
            gain = 1.0 if known is None or not known[1] else 1 + known[0] / known[1]
            self.gain = min(1.0, max(1 / self.pace.world_size, gain))
            taken[part] = sent.values[part] - self.gain * difference[part]
        return replace(outcome, values=taken)


class AdaptiveGainOfLatest(AdaptiveGain):
    """The same, by what the latest round has shown and none before it."""

    def parts(self, fragment: Fragment) -> list[tuple[Said, slice]]:
        return [(SHARED.setdefault(self.pace, Said(remembers=0.0)), slice(None))]


class AdaptiveGainByFragment(AdaptiveGain):
    """The same, for each fragment by what its own rounds have shown."""

    def parts(self, fragment: Fragment) -> list[tuple[Said, slice]]:
        return [(SHARED.setdefault(self.pace, defaultdict(Said))[fragment.index], slice(None))]


class AdaptiveGainByTensor(AdaptiveGain):
    """The same, for each tensor of the model by its own elements."""

    def parts(self, fragment: Fragment) -> list[tuple[Said, slice]]:
        of_all = SHARED.setdefault(self.pace, defaultdict(Said))
        return [
            (of_all[piece.entry.begin], slice(piece.begin - fragment.begin, piece.end - fragment.begin))
            for piece in fragment.pieces
        ]
