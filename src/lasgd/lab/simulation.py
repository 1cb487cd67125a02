"""Runs of the virtual cluster without gradients: how fast an algorithm would be, and how stale, before anyone tries.

    plan = Plan(registry.find("lasgd"), ranks=64, compute=Constant(0.1), network=Network(64, 2.5e6),
                vector=Vector(391_466), samples=64 * 32 * 200)
    simulated(plan).samples_per_s

`cluster_of` is for runs with gradients too, which bring replicas and work of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lasgd.algorithms.registry import Algorithm
from lasgd.pace import Pace
from lasgd.tally import Tally
from lasgd.virtual.buckets import Buckets
from lasgd.virtual.cluster import Cluster, Means, Rank, Record, Work
from lasgd.virtual.compute_models import ComputeModel
from lasgd.virtual.network_models import Network
from lasgd.virtual.timing_replica import TimingReplica, Vector
from lasgd.wire import wire as wire_named


@dataclass(frozen=True)
class Plan:
    """What is to run on which cluster."""

    algorithm: Algorithm
    ranks: int
    compute: ComputeModel
    network: Network
    vector: Vector
    """What is averaged, or as many gradients."""
    samples: int | None
    """Budget of all ranks together; None where it is in `seconds`."""
    batch_size: int = 32
    steps_per_round: float = 1.0
    fragments: int | Literal["auto"] = "auto"
    evaluations: int = 0
    seconds: float | None = None
    """Budget in virtual time, instead of samples."""
    wire: str = "fp32"
    """How the averages travel."""
    all_reduce: str = "ring"
    """How the network all-reduces: one of network_models.METHODS."""

    @property
    def cut(self) -> int | Literal["auto"]:
        """The fragments that the algorithm takes."""
        return self.fragments if self.algorithm.takes_fragments else 1

    @property
    def first_cut(self) -> int:
        """The fragments that a run begins with."""
        return self.algorithm.least_fragments if self.cut == "auto" else self.cut


@dataclass(frozen=True)
class Simulated:
    """What came of a run."""

    virtual_s: float
    """From the first local step to the agreed end."""
    samples: int
    rounds: int
    fragments: int
    ranks: Sequence[Rank]

    @property
    def samples_per_s(self) -> float:
        """Of all ranks together; ranks that agree on nothing end at different times, so each counts at its own pace."""
        return sum(rank.tally.samples / (rank.left_s or self.virtual_s) for rank in self.ranks)

    @property
    def steps_per_s(self) -> float:
        """Local steps of all ranks together."""
        return sum(rank.tally.local_steps / (rank.left_s or self.virtual_s) for rank in self.ranks)

    @property
    def waited_share(self) -> float:
        """Mean over the ranks of the time that they stood still."""
        return sum(rank.tally.waited_s / (rank.left_s or self.virtual_s) for rank in self.ranks) / len(self.ranks)

    @property
    def staleness_steps(self) -> float:
        """Local steps between snapshot and merge, mean over all merges of all ranks; 0 where none was stale."""
        merges = sum(rank.tally.staleness.merges for rank in self.ranks)
        return sum(rank.tally.staleness.total_steps for rank in self.ranks) / merges if merges else 0.0


def simulated(plan: Plan, record: Record | None = None) -> Simulated:
    """Runs `plan` without gradients. Raises ConfigurationError, and ProtocolError for ranks that wait for ever."""
    replicas = [TimingReplica(plan.vector, Tally(plan.batch_size, rank), plan.first_cut) for rank in range(plan.ranks)]
    cluster, paces = cluster_of(plan, replicas, record=record)
    cluster.run()
    return outcome(cluster, paces)


def cluster_of(
    plan: Plan,
    replicas: Sequence[Any],
    works: Sequence[Work | None] | None = None,
    record: Record | None = None,
    recorded_ranks: int | None = None,
    means: Means | None = None,
) -> tuple[Cluster, list[Pace]]:
    """The cluster that will run `plan` on `replicas`, and its agreements: one, or one of each rank."""
    algorithm, members = plan.algorithm, tuple(range(plan.ranks))
    agreements = 1 if algorithm.agrees else plan.ranks
    paces = [
        Pace(
            *(plan.ranks, plan.samples, plan.steps_per_round, plan.cut, plan.evaluations),
            seconds=plan.seconds,
            least_fragments=algorithm.least_fragments,
        )
        for _ in range(agreements)
    ]
    ranks = [
        Rank(replica, plan.compute.durations(rank), works[rank] if works else None)
        for rank, replica in enumerate(replicas)
    ]
    algorithm.check_wire(plan.wire)
    cluster = Cluster(
        algorithm.compute,
        algorithm.communicate,
        ranks,
        paces,
        lambda n_bytes, share: plan.network.all_reduce_s(n_bytes, members, plan.all_reduce, share=share),
        plan.vector.nbytes,
        record,
        recorded_ranks,
        means,
        Buckets(),
        algorithm.exchange,
        plan.network if algorithm.writes_messages else None,
        wire_named(plan.wire),
    )
    return cluster, paces


def outcome(cluster: Cluster, paces: Sequence[Pace]) -> Simulated:
    """Of a cluster that has run."""
    own = sum(rank.tally.samples for rank in cluster.ranks)  # where ranks agree on nothing, nobody knows the sum
    return Simulated(
        virtual_s=max(rank.left_s or 0.0 for rank in cluster.ranks) if len(paces) > 1 else cluster.ended_s or 0.0,
        samples=own if len(paces) > 1 else paces[0].samples,
        rounds=cluster.rounds,
        fragments=len(cluster.ranks[0].replica.fragments),
        ranks=cluster.ranks,
    )
