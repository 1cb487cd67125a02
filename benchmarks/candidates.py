"""Rules that were tried beside `lasgd` and are no part of it: its own text, with another answer in one place.

    python benchmarks/candidates.py simulate --algorithm adaptive_gain --ranks 4 --condition step=100ms+round=1s

Takes what `lasgd simulate` takes, in virtual time only, and knows these names beside. What was expected of them and
what was found: docs/experiments.md; benchmarks/learning.py runs them. s_i is a rank's snapshot, m the mean, n the
number of ranks:

    half_gain        r_i <- r_i + (m - s_i) / 2
    adaptive_gain    r_i <- r_i + g (m - s_i),  g = 1 + <T, s_i - m> / |s_i - m|^2 over all ranks and the latest rounds,
                     T what the rank's local steps have added since the snapshot; at least 1/n, at most 1
    adaptive_gain_of_latest      the same, T and s_i - m of the latest round only
    adaptive_gain_by_fragment    the same, a gain for each fragment, of its own rounds; for a fixed number of them
    adaptive_gain_by_tensor      the same, a gain for each of the model's tensors
    dropped          what a rank has learnt since the snapshot is not kept: r_i <- r_i + (m - z_i)
    cleared          lasgd, and each correction that is shown clears the optimizer's state
    momentum_averaged    lasgd, and the optimizers' momentum b is averaged as replicas are: b_i <- b_i + (mean b - its
                     snapshot). Its bytes are not sent here: give it a round of twice the length
    momentum_scaled  adaptive_gain, and at a correction b_i <- g b_i
    momentum_projected   lasgd, and where a correction c = m - s_i meets momentum that leads away from it, b_i c > 0,
                     b_i <- b_i - c (b_i c) / |c|^2
    weighted_steps   lasgd, and a snapshot weighs as many local steps as its rank has taken since the one before
    weighted_gradient    lasgd, and a snapshot weighs 1/|g|, g its rank's latest gradient
    by_drift         lasgd, and instead of in turn the fragment goes that has drifted most, as far as is known; for a
                     fixed number of fragments
    by_layer         lasgd, and each of the model's layers is a fragment, however large
    interleaved      lasgd, and a fragment has rows of the whole model, each tenth of a hundred pieces if there are ten
                     fragments; for a fixed number of them
    waits_first      lasgd, and before it, for a fifth of the run, ranks wait after every local step for a mean of all
    remembered_mean  lasgd, and the model that is left is e in place of the mean: e <- e + (m - e) / 10 at every mean

The two numbers of a rank that adaptive_gain adds up (by tensor two for each), and the one of by_drift, would travel in
the header of the next round. Here all ranks are in one process and share them in memory, a round late like there.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import cast

from candidate_fragments import ByDrift, ByLayer, Interleaved
from candidate_gains import AdaptiveGain, AdaptiveGainByFragment, AdaptiveGainByTensor, AdaptiveGainOfLatest, HalfGain
from candidate_means import Dropped, RememberedMean, WeightedGradient, WeightedSteps, compute_measuring
from candidate_momentum import MomentumAveraged, MomentumProjected, MomentumScaled, compute_cleared
from candidate_replica import Candidate, Text
from candidate_waiting import communicate_after_waiting, compute_waiting_first
from lasgd.algorithms import lasgd, registry
from lasgd.algorithms.registry import Algorithm
from lasgd.pace import Pace
from lasgd.replica import Replica


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
    _algorithm("adaptive_gain_of_latest", AdaptiveGainOfLatest, lasgd.compute),
    _algorithm("adaptive_gain_by_fragment", AdaptiveGainByFragment, lasgd.compute),
    _algorithm("adaptive_gain_by_tensor", AdaptiveGainByTensor, lasgd.compute),
    _algorithm("dropped", Dropped, lasgd.compute),
    _algorithm("cleared", Candidate, compute_cleared),
    _algorithm("momentum_averaged", MomentumAveraged, lasgd.compute),
    _algorithm("momentum_scaled", MomentumScaled, lasgd.compute),
    _algorithm("momentum_projected", MomentumProjected, lasgd.compute),
    _algorithm("weighted_steps", WeightedSteps, lasgd.compute),
    _algorithm("weighted_gradient", WeightedGradient, compute_measuring),
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
