"""Which algorithm to try first on given machines, links and model: all of them, simulated without gradients.

    advices = advise(ranks=8, compute=Stragglers(Constant(0.2), {7: 4.0}), network=Network(8, 12.5e6),
                     vector=Vector(11_250_000), batch_size=32)
    Console().print(advice_table(advices), crop=False)

What is predicted is time per sample. Time to an accuracy is another thing: averages that are late or rare teach less
per sample, by how much nobody can say without training. So of algorithms that are about equally fast, the one whose
ranks know most of each other comes first, and the table says what the others pay.

A simulated step may stand for several (`_Joined`), where rounds take so many steps that nobody would wait for the
simulation otherwise. Not tried are algorithms that take another one's time (`SAME_TIME`) and, on very many ranks, those
whose ranks write to each other: every message that begins or ends changes what the others have of the links.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from lasgd.algorithms import registry
from lasgd.algorithms.registry import Algorithm
from lasgd.lab.measured import Measured, read_measured
from lasgd.lab.simulation import Plan, cluster_of, outcome
from lasgd.momentum import LEAST_FRAGMENTS
from lasgd.pace import Column, Delay
from lasgd.tally import RECENT_STEPS, Tally
from lasgd.training.display import whole
from lasgd.virtual.compute_models import CHUNK, ComputeModel
from lasgd.virtual.network_models import Network
from lasgd.virtual.timing_replica import TimingReplica, Vector

__all__ = ["Advice", "Measured", "advice_table", "advise", "read_measured"]

ABOUT_EQUAL = 0.05
"""Times per sample that differ by less than this share are taken for equal."""

STEPS_PER_ROUND = (1, 4, 16, 64)
"""Tried where the number of steps between averages is the user's choice, beside the one that `ABOUT_EQUAL` asks for."""

OLD_STEPS = 5.0
"""An age from which on accuracy per sample visibly suffers: in the table of docs/algorithms.md, 0.51 falls to 0.45."""

SAME_TIME = {
    "diloco": "local_sgd",
    "post_local_sgd": "sync_sgd, then of local_sgd",
}
"""Algorithms that ask for the same as others, and so take their time per sample."""

LATE_BY_A_ROUND = frozenset({"overlap_local_sgd", "parameter_server"})
"""What these merge was known to a rank a round before, but their counts of staleness are of something else."""

MOST_WRITING_RANKS = 128
"""On more ranks algorithms whose ranks write to each other are left out."""

_MOST_STEPS_PER_ROUND = 1000
_EVENTS = 40_000  # steps of single ranks in one simulation, about: half a second
_DRAWS = 600_000  # step times of single ranks; then the first ones come again
_STEADY_ROUNDS = 12  # where all steps of a rank take the same time every round is like the first
_LASGD_ROUNDS = 200  # ... but for where in a step it falls
_MOST_ROUNDS = 3000
_LEAST_ROUNDS = 5
_WRITING_STEPS, _STEADY_WRITING_STEPS = 400, 40  # most simulated steps where ranks write to each other
_LEAST_WRITING_STEPS = 10
_WRITTEN_ROUNDS = 10  # at least so many exchanges where they do so in the background
_HEADERS = 500  # about so many agreements may pass while one rank waits for a server that serves all
_JOINED_ROUND_STEPS = 25  # a round takes at least so many simulated steps where each stands for several


@dataclass(frozen=True)
class Advice:
    """One algorithm, as it would do."""

    algorithm: str
    """Its name in the registry."""
    setting: str
    """What it was simulated with, in the words of `lasgd compare`, such as `steps-per-round=16`; empty: none."""
    samples_per_s: float
    """Of all ranks together."""
    s_per_sample: float
    """Likewise: 1 / samples_per_s."""
    share_of_limit: float
    """Samples per second, as a share of those with no communication at all."""
    staleness_steps: float
    """Local steps between snapshot and merge, mean; 0 where ranks wait for their averages."""
    waited_share: float
    """Of a rank's time, mean."""
    bytes_per_s: float
    """Sent by a rank, mean."""
    fragments: int
    """Parts that the vector is cut into."""
    reason: str
    """Why, in a sentence with figures."""
    steps_between_averages: float
    """Local steps of the median rank from one average of a fragment to the next; where a rank hears of few others at a
    time, until it has heard of all. 0 where replicas never differ."""

    @property
    def age_steps(self) -> float:
        """How old what a rank knows of the others is on average: half the way to the next average, and staleness."""
        return self.steps_between_averages / 2 + self.staleness_steps


def advise(
    *,
    ranks: int,
    compute: ComputeModel,
    network: Network,
    vector: Vector,
    batch_size: int,
    all_reduce: str = "ring",
    algorithms: Sequence[str] | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> list[Advice]:
    """Of `algorithms` (None: all) those whose ranks agree, best first: by time per sample, where about equal by age.

    Of local SGD every number of steps tried, to show what it does; of others the best. See SAME_TIME and
    MOST_WRITING_RANKS for those that are left out.

    `progress` is told what is simulated, a line each. Raises ConfigurationError as the network does.
    """
    lab = _Lab.of(ranks, compute, network, vector, batch_size, all_reduce)
    found: list[Advice] = []
    for name in registry.names() if algorithms is None else algorithms:
        algorithm = registry.find(name)
        if not algorithm.agrees:
            continue  # no communication at all: the limit itself
        if name in SAME_TIME or (algorithm.writes_messages and ranks > MOST_WRITING_RANKS):
            continue
        progress(f"simulating {name}")
        if algorithm.writes_messages:
            found.append(lab.best_of_writing(algorithm))
            continue
        if algorithm.communicate is not None or algorithm.averages_gradients:
            found.append(lab.tried(algorithm))
            continue
        trials = {steps: lab.trial(algorithm, steps) for steps in STEPS_PER_ROUND}
        enough = trials[STEPS_PER_ROUND[-1]].steps_that_hide_the_network()
        if enough is not None and enough not in trials:
            progress(f"simulating {name}, {enough} steps per round")
            trials[enough] = lab.trial(algorithm, enough)
        tried = [lab.advice(trials[steps], steps, is_enough=steps == enough) for steps in sorted(trials)]
        found += tried if name == "local_sgd" else ranked(tried)[:1]
    return ranked(found)


def ranked(advices: Sequence[Advice]) -> list[Advice]:
    """By time per sample; those within `ABOUT_EQUAL` of the fastest that is left are ordered by age."""
    left = sorted(advices, key=lambda advice: advice.s_per_sample)
    order: list[Advice] = []
    while left:
        within = left[0].s_per_sample * (1 + ABOUT_EQUAL)
        equal = [advice for advice in left if advice.s_per_sample <= within]
        left = left[len(equal) :]
        order += sorted(equal, key=lambda advice: (round(advice.age_steps, 2), advice.s_per_sample))
    return order


def advice_table(advices: Sequence[Advice], ranks: int = 1) -> Group:
    """The table, why each is where it is, what to try first, and what the figures do not say; fits 80 columns.

    To be printed with crop=False: where there are fewer, its lines wrap and keep their figures.

    On so many `ranks` that algorithms were left out it says which.
    """
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="dim", pad_edge=False)
    table.add_column("", justify="right", no_wrap=True)
    table.add_column("algorithm", no_wrap=True)
    table.add_column("setting", no_wrap=True)
    for name in ("samples/s", "limit", "waits", "late", "age", "sent/s"):
        table.add_column(name, justify="right", no_wrap=True)
    for place, advice in enumerate(advices, start=1):
        table.add_row(
            str(place),
            advice.algorithm,
            advice.setting,
            _number(advice.samples_per_s),
            f"{advice.share_of_limit:.0%}" if advice.share_of_limit >= 0.01 else "< 1%",
            f"{advice.waited_share:.0%}",
            _plain(advice.staleness_steps),
            _plain(advice.age_steps),
            _bytes(advice.bytes_per_s),
        )
    reasons = Table.grid(padding=(0, 2, 0, 0))
    reasons.add_column(justify="right", no_wrap=True, style="dim")
    reasons.add_column()
    for place, advice in enumerate(advices, start=1):
        reasons.add_row(str(place), Text(f"{advice.algorithm}: {advice.reason}"))
    closing = [Text(line) for line in _closing(advices, ranks)]
    return Group(whole(table), Text(), reasons, Text(), *closing)


def _closing(advices: Sequence[Advice], ranks: int) -> list[str]:
    if not advices:
        return []
    first = advices[0]
    lines = [f"Try first: {_named(first)}."]
    fresher = [advice for advice in advices[1:] if advice.age_steps < 0.8 * first.age_steps]
    if first.age_steps >= 1 and fresher:
        then = fresher[0]
        times = then.s_per_sample / first.s_per_sample
        taken = "about the same time" if times < 1 + ABOUT_EQUAL else f"{_number(times)} times the time"
        lines.append(f"If it learns too little: {_named(then)}, with fresher averages and {taken} per sample.")
    if first.age_steps >= OLD_STEPS:
        lines.append(
            f"With {first.algorithm} what a rank knows of the others is {_plain(first.age_steps)} steps old: expect "
            "to pay in accuracy per sample. A quicker link, a smaller model or a larger batch makes it fresher."
        )
    if ranks > MOST_WRITING_RANKS:
        left_out = ", ".join(name for name in registry.names() if registry.find(name).writes_messages)
        lines.append(
            f"Left out, since on more than {MOST_WRITING_RANKS} ranks messages take long to simulate: {left_out}."
        )
    lines.append(" ".join(f"{name} takes the time of {whose}." for name, whose in SAME_TIME.items()))
    lines.append(
        "Predicted is time per sample, not time to an accuracy: late or rare averages teach less per sample. "
        "limit: share of the samples/s without any communication. late: local steps from snapshot to merge. age: how "
        "old, in local steps, what a rank knows of the others is on average."
    )
    return lines


def _named(advice: Advice) -> str:
    return f"{advice.algorithm}:{advice.setting}" if advice.setting else advice.algorithm


def rounds_to_hear_of_all(algorithm: Algorithm, ranks: int) -> float:
    """Exchanges after which a rank has heard, at second hand too, of all others; 1 where every average is over all."""
    if not algorithm.writes_messages or ranks == 1:
        return 1.0
    settings: Any = algorithm.settings
    if hasattr(settings, "alpha"):  # elastic: at every exchange the centre takes a share of the distance
        return 1 / settings.alpha(ranks)
    name = getattr(settings, "topology", "complete")
    if name == "ring":
        return ranks / 2
    if name == "exponential" or (algorithm.exchange is not None and hasattr(settings, "topology")):
        return math.log2(ranks)  # with one other at a time
    return 1.0


# Simulations


class _Kept:
    """`model`, each step time drawn once: all algorithms meet the same steps, at the cost of one."""

    def __init__(self, model: ComputeModel, ranks: int):
        self._drawing = [model.durations(rank) for rank in range(ranks)]
        self._drawn: list[list[float]] = [[] for _ in range(ranks)]
        self._most = max(_MOST_STEPS_PER_ROUND, _DRAWS // ranks)

    def first(self, rank: int, steps: int) -> list[float]:
        """The first step times of `rank`."""
        drawn = self._drawn[rank]
        drawn += islice(self._drawing[rank], max(0, steps - len(drawn)))
        return drawn[:steps]

    def durations(self, rank: int) -> Iterator[float]:
        """As the model's, for as long as it is looked at here."""
        drawn, drawing = self._drawn[rank], self._drawing[rank]
        for step in count():
            place = step % self._most
            if place == len(drawn):
                drawn += islice(drawing, CHUNK)
            yield drawn[place]


@dataclass(frozen=True)
class _Joined:
    """`model`, with `steps` of its steps in a row for one."""

    model: ComputeModel
    steps: int

    def durations(self, rank: int) -> Iterator[float]:
        """Sums over the model's."""
        durations = self.model.durations(rank)
        if self.steps == 1:
            return durations
        return iter(lambda: math.fsum(islice(durations, self.steps)), None)


class _Waits:
    """Of each all-reduce that ranks stand still for: who joined last, and what they waited from then on."""

    def __init__(self, ranks: int):
        self.rounds = 0
        self.network_s = 0.0
        """After the last rank had joined, summed over the rounds."""
        self.rank_s = [0.0] * ranks
        """Of each rank, before and after that."""
        self._end_s = self._last_s = -1.0

    def __call__(self, rank: int, kind: str, begin_s: float, end_s: float) -> None:
        if kind != "wait":
            return
        if end_s != self._end_s:
            self.close()
            self._end_s, self._last_s = end_s, begin_s
        self._last_s = max(self._last_s, begin_s)
        self.rank_s[rank] += end_s - begin_s

    def close(self) -> None:
        """No more ranks wait for the latest round."""
        if self._end_s >= 0:
            self.rounds += 1
            self.network_s += self._end_s - self._last_s
        self._end_s = -1.0

    @property
    def for_network_s(self) -> float:
        """In a round."""
        return self.network_s / self.rounds if self.rounds else 0.0

    @property
    def for_others_s(self) -> list[float]:
        """In a round, each rank."""
        return [max(0.0, waited_s - self.network_s) / max(1, self.rounds) for waited_s in self.rank_s]


@dataclass(frozen=True)
class _Trial:
    """What one simulation has shown."""

    algorithm: Algorithm
    share_of_limit: float
    staleness_steps: float
    waited_share: float
    bytes_per_s: float
    fragments: int
    round_s: float
    """From one round to the next."""
    steps_per_round: float
    """Of the median rank."""
    waits: _Waits

    def steps_that_hide_the_network(self) -> int | None:
        """The least number of steps per round that loses less than `ABOUT_EQUAL` to the network; None: too many.

        A round takes a H + w with w for the network, so w / (a H + w) is lost.
        """
        lost_s = self.waits.for_network_s
        step_s = (self.round_s - lost_s) / self.steps_per_round
        steps = max(1, math.ceil(lost_s * (1 / ABOUT_EQUAL - 1) / step_s * (1 - 1e-9)))
        return steps if steps <= _MOST_STEPS_PER_ROUND else None


@dataclass(frozen=True)
class _Lab:
    """The cluster on which all algorithms are tried."""

    ranks: int
    compute: ComputeModel
    network: Network
    vector: Vector
    batch_size: int
    all_reduce: str
    step_s: float
    """Of the median rank, median."""
    limit_samples_per_s: float
    """Without any communication."""
    is_steady: bool
    """All steps of a rank take the same time."""

    @classmethod
    def of(
        cls, ranks: int, compute: ComputeModel, network: Network, vector: Vector, batch_size: int, all_reduce: str
    ) -> _Lab:
        kept, n_steps = _Kept(compute, ranks), max(CHUNK, min(4096, 4 * _EVENTS // ranks))
        drawn = [kept.first(rank, n_steps) for rank in range(ranks)]
        return cls(
            ranks,
            kept,
            network,
            vector,
            batch_size,
            all_reduce,
            step_s=statistics.median_low(statistics.median_low(durations) for durations in drawn),
            limit_samples_per_s=sum(batch_size * n_steps / math.fsum(durations) for durations in drawn),
            is_steady=all(len(set(durations)) == 1 for durations in drawn),
        )

    def round_steps(self, fragments: int) -> float:
        """What averaging one of `fragments` parts takes, in steps of the median rank."""
        return self._all_reduce_s(fragments) / self.step_s

    def tried(self, algorithm: Algorithm) -> Advice:
        """With its defaults."""
        return self.advice(self.trial(algorithm, 1), None)

    def trial(self, algorithm: Algorithm, steps_per_round: int) -> _Trial:
        """One simulation."""
        fragments = self._settled_fragments() if algorithm.takes_fragments else 1
        never_waits = algorithm.communicate is not None
        round_steps = max(1.0, self.round_steps(fragments)) if never_waits else steps_per_round
        rounds = (_LASGD_ROUNDS if never_waits else _STEADY_ROUNDS) if self.is_steady else _MOST_ROUNDS
        affordable = _EVENTS / (self.ranks * round_steps)
        joined = 1
        if affordable < min(rounds, 2 * _LEAST_ROUNDS):
            joined = max(1, int(round_steps / _JOINED_ROUND_STEPS)) if never_waits else steps_per_round
            affordable *= joined
        rounds = max(_LEAST_ROUNDS, min(rounds, int(affordable)))
        steps = max(1, round(rounds * round_steps / joined))
        return self._simulated(algorithm, steps_per_round, fragments, joined, steps)

    def best_of_writing(self, algorithm: Algorithm) -> Advice:
        """Of an algorithm whose ranks write to each other: with fewer exchanges where it waits for them."""
        round_steps = self.round_steps(1)
        affordable = [steps for steps in STEPS_PER_ROUND if round_steps * self.ranks <= _HEADERS * steps]
        tried: list[Advice] = []
        for steps_per_round in affordable or STEPS_PER_ROUND[-1:]:
            passing = max(1.0, round_steps / steps_per_round)
            most = _STEADY_WRITING_STEPS if self.is_steady else _WRITING_STEPS
            steps = max(_LEAST_WRITING_STEPS, min(most, int(_EVENTS / 4 / (self.ranks**2 * passing))))
            trial = self._simulated(algorithm, steps_per_round, 1, steps_per_round, steps)
            waits = trial.waited_share > 0.001
            if not waits:
                steps = max(steps, round(_WRITTEN_ROUNDS * passing))
                trial = self._simulated(algorithm, steps_per_round, 1, steps_per_round, steps)
            tried.append(self.advice(trial, steps_per_round if waits or steps_per_round > 1 else None))
            if not waits:
                break
        return ranked(tried)[0]

    def _simulated(self, algorithm: Algorithm, steps_per_round: int, fragments: int, joined: int, steps: int) -> _Trial:
        plan = Plan(
            algorithm,
            self.ranks,
            _Joined(self.compute, joined),
            self.network,
            self.vector,
            samples=self.ranks * self.batch_size * joined * steps,
            batch_size=self.batch_size * joined,
            steps_per_round=max(1, steps_per_round // joined),
            fragments=fragments,
            all_reduce=self.all_reduce,
        )
        waits = _Waits(self.ranks)
        replicas = [TimingReplica(self.vector, Tally(plan.batch_size, rank), fragments) for rank in range(self.ranks)]
        cluster, paces = cluster_of(plan, replicas, record=waits)
        cluster.run()
        waits.close()
        run = outcome(cluster, paces)
        # Of the very steps that were taken, whose time is known, so that chance cancels.
        alone_per_s = sum(rank.tally.samples / rank.compute_s for rank in run.ranks)
        agreed = paces[0].round or run.rounds  # without the last exact average
        bytes_sent = statistics.fmean(rank.bytes_sent for rank in run.ranks) * (agreed / run.rounds if agreed else 1)
        median_steps = statistics.median_low(rank.tally.local_steps for rank in run.ranks)
        if algorithm.writes_messages:
            agreed = statistics.fmean(rank.tally.exchanges for rank in run.ranks)
        between = median_steps * joined / agreed if agreed else math.inf
        return _Trial(
            algorithm,
            share_of_limit=min(1.0, run.samples_per_s / alone_per_s),
            staleness_steps=between if algorithm.name in LATE_BY_A_ROUND else run.staleness_steps * joined,
            waited_share=run.waited_share,
            bytes_per_s=bytes_sent / run.virtual_s,
            fragments=run.fragments,
            round_s=run.virtual_s / max(1, agreed),
            steps_per_round=between,
            waits=waits,
        )

    def advice(self, trial: _Trial, steps_per_round: int | None, is_enough: bool = False) -> Advice:
        """The trial in the user's words. `is_enough`: no lower steps_per_round hides the network."""
        samples_per_s = trial.share_of_limit * self.limit_samples_per_s
        apart = trial.steps_per_round * trial.fragments * rounds_to_hear_of_all(trial.algorithm, self.ranks)
        if trial.algorithm.averages_gradients or math.isnan(apart):
            apart = 0.0
        reason = self._reason(trial, apart)
        if is_enough and steps_per_round != 1:
            reason += f"; fewer steps than {steps_per_round} lose more than {ABOUT_EQUAL:.0%} to the network"
        return Advice(
            algorithm=trial.algorithm.name,
            setting="" if steps_per_round is None else f"steps-per-round={steps_per_round}",
            samples_per_s=samples_per_s,
            s_per_sample=1 / samples_per_s,
            share_of_limit=trial.share_of_limit,
            staleness_steps=trial.staleness_steps,
            waited_share=trial.waited_share,
            bytes_per_s=trial.bytes_per_s,
            fragments=trial.fragments,
            reason=reason,
            steps_between_averages=apart,
        )

    def _reason(self, trial: _Trial, apart: float) -> str:
        if trial.algorithm.writes_messages:
            return self._reason_of_writing(trial, apart)
        if trial.waits.rounds:
            steps = round(trial.steps_per_round)
            when = "every step" if steps <= 1 else f"every {steps} steps it"
            return f"{when} {self._waiting(trial.waits, trial.round_s)}"
        late = _steps(trial.staleness_steps)
        if trial.waited_share > 0.001:
            return f"waits {trial.waited_share:.0%} of the time; means are {late} late"
        if math.isinf(apart):
            return f"never waits, nor averages over all ranks; means are {late} late"
        whole = f"averaging the whole vector takes {_steps(self.round_steps(1))}"
        if trial.fragments == 1:
            return f"never waits; {whole}, so means are {late} late"
        return (
            f"never waits; {whole}, one of {trial.fragments} parts {_steps(self.round_steps(trial.fragments))}, "
            f"so means are {late} late, and each part is averaged every {_steps(apart)}"
        )

    def _reason_of_writing(self, trial: _Trial, apart: float) -> str:
        heard = f"a rank has heard of all in {_steps(apart)}" if apart else "there is nobody to hear of"
        if trial.waited_share <= 0.001:
            return f"never waits; messages are {_steps(trial.staleness_steps)} late, and {heard}"
        steps = round(trial.steps_per_round)
        when = "every step" if steps <= 1 else f"every {steps} steps it"
        return f"{when} waits {_seconds(trial.waited_share * trial.round_s)} for messages; {heard}"

    def _waiting(self, waits: _Waits, round_s: float) -> str:
        network_s, others_s = waits.for_network_s, waits.for_others_s
        most_s, mean_s = max(others_s), statistics.fmean(others_s)
        parts = []
        if network_s > 0.001 * round_s:
            parts.append(f"{_seconds(network_s)} for the network")
        if most_s > 0.01 * round_s:
            slow = [rank for rank, seconds in enumerate(others_s) if seconds < 0.1 * most_s]
            if not slow:
                parts.append(f"{_seconds(mean_s)} for whichever rank is last")
            elif len(slow) <= 3:
                who = ", ".join(map(str, slow))
                parts.append(f"up to {_seconds(most_s)} for {'rank' if len(slow) == 1 else 'ranks'} {who}")
            else:
                parts.append(f"up to {_seconds(most_s)} for the {len(slow)} slowest ranks")
        return "waits " + " and ".join(parts) if parts else "averages, and waits for next to nothing"

    def _all_reduce_s(self, fragments: int) -> float:
        header_bytes = self.ranks * len(Column) * 8
        return self.network.all_reduce_s(
            self.vector.nbytes / fragments + header_bytes, range(self.ranks), self.all_reduce, share=1 / fragments
        )

    def _settled_fragments(self) -> int:
        """What `auto` comes to in `lasgd train`: the rule of real runs, told of one round after the other."""
        delay, fragments = Delay(LEAST_FRAGMENTS), 1
        if not self._all_reduce_s(1):
            return min(LEAST_FRAGMENTS, self.vector.elements)
        for _ in range(20 * RECENT_STEPS):
            fragments = delay.fragments(fragments, fragments, self.round_steps(fragments))
        return min(fragments, self.vector.elements)


# Words


def _number(value: float) -> str:
    """Three digits or so: 0.123, 12.3, 1,234."""
    if value >= 100 or value == 0:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 1 else f"{value:.2g}"


def _plain(value: float) -> str:
    """Local steps in a table: 0, 0.5, 12.3, 1,234."""
    return f"{value:,.0f}" if value >= 100 or value == 0 else f"{value:.1f}"


def _steps(value: float) -> str:
    shown = f"{value:,.0f}" if value >= 100 else f"{value:.1f}".removesuffix(".0") if value >= 0.1 else f"{value:.1g}"
    return f"{shown} step" if shown == "1" else f"{shown} steps"


def _seconds(value: float) -> str:
    return f"{_number(value)} s" if value >= 0.1 else f"{_number(value * 1000)} ms"


def _bytes(n: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000:
            return f"{_number(n)} {unit}"
        n /= 1000
    return f"{_number(n)} TB"
