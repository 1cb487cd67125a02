"""What a condition means in virtual time: the same slow ranks, stalls and links as in real runs."""

from __future__ import annotations

import dataclasses
import math

from lasgd.errors import ConfigurationError
from lasgd.lab.conditions import Condition
from lasgd.lab.frames import ORDINARY_BYTES, mtu_bytes, payload_share
from lasgd.virtual.compute_models import ComputeModel, Constant, Stalls, Stragglers
from lasgd.virtual.network_models import Network

SHARE_SPREAD = 0.2
"""How unevenly messages share a link that begin together. It is there so that ranks do not march in step for ever.

Chosen with measured runs of a server's workers in view: with much more they do not keep their turns in virtual time.
"""
FIRST_FRAMES = 10
"""What TCP lets out before the first word comes back. Source: RFC 6928, Chu et al. (2013)."""


def from_condition(
    condition: Condition,
    world_size: int,
    seed: int,
    own_step_s: float | None = None,
    own_network: Network | None = None,
) -> tuple[ComputeModel, Network]:
    """The compute model and the network of `world_size` ranks under `condition`; stalls are those of `seed`.

    `link=` is the speed of the wire, of which the ranks have `payload_share` for what they send.
    `own_step_s` is what a step takes where the condition says no `step=`, and `own_network` the network where it says
    no `link=` (None: one that costs nothing). A `step=` shorter than what a machine can do is taken at its word.

    Raises ConfigurationError if the condition names a rank that is not among `world_size`, or own_step_s is missing.
    """
    condition.check(world_size)
    step_s = condition.step_s if condition.step_s is not None else own_step_s
    if step_s is None:
        raise ConfigurationError(
            f"condition '{condition}' does not say how long a step takes. Expected step=, as in step=100ms, or "
            "a measured step time."
        )
    if condition.bandwidth_bytes_per_s is not None:
        link = condition.bandwidth_bytes_per_s
        network = Network(world_size, link * payload_share(link), latency_s=condition.latency_s)
        frame_bytes = mtu_bytes(link)
    else:
        network = own_network or Network(world_size, math.inf)
        frame_bytes = ORDINARY_BYTES
    network = dataclasses.replace(
        network,
        round_s=condition.round_s or network.round_s,
        share_spread=SHARE_SPREAD,
        first_window_bytes=FIRST_FRAMES * frame_bytes,
    )
    return slowed(Constant(step_s), condition, world_size, seed), network


def slowed(model: ComputeModel, condition: Condition, world_size: int, seed: int) -> ComputeModel:
    """`model` with the stragglers and stalls of `condition`; a stall comes on top of a straggler's longer step."""
    condition.check(world_size)
    factors = {rank: condition.factor(rank, world_size) for rank in range(world_size)}
    if slow := {rank: factor for rank, factor in factors.items() if factor != 1.0}:
        model = Stragglers(model, slow)
    if condition.stall_probability:
        model = Stalls(model, condition.stall_s, condition.stall_probability, seed)
    return model
