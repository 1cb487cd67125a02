"""Does the default work untuned where nobody tuned it? A small language model, SGD and AdamW, in virtual time.

    python benchmarks/characters.py            both optimizers, three clusters, a run on each core
    python benchmarks/characters.py --quick    does it work?
    python benchmarks/characters.py --optimizers adamw --clusters "delay 10" --seeds 0

A transformer of some hundred thousand parameters reads 32 characters and foretells each next one. The text is made up
from the seed: words of two or three syllables, each of which a few others may follow. So it is known how well any
model could do, and no text need be shipped. Four ranks, each with windows of its own; a warm-up and a cosine of global
progress. Each optimizer's learning rate is the one of a few that synchronous SGD learns best with, over all seeds, and
all take it (AdamW with momentum of the mean a share of it, as far as this stretches its steps).
Clusters are as in learning.py: so many local steps for the whole vector on the wire, and perhaps a rank that is four
times slower.

Given is the loss on held-out text, over that of synchronous SGD: 1 is as good as waiting in every step.
"""

from __future__ import annotations

import copy
import math
import random
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import product, repeat
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from common import Bar, Report, arguments_for, run_card, where_to_store
from lasgd.algorithms import registry
from lasgd.lab.cores import usable_cores
from lasgd.lab.simulation import Plan, cluster_of
from lasgd.momentum import shared_out
from lasgd.pace import End
from lasgd.replica import Replica
from lasgd.tally import Tally
from lasgd.training.schedule import factor
from lasgd.virtual.compute_models import ComputeModel, Constant, Stragglers
from lasgd.virtual.network_models import Network
from lasgd.virtual.timing_replica import Vector

RANKS, BATCH, CONTEXT, STEP_S, WARMUP = 4, 16, 32, 0.1, 0.05
SAMPLES = 60_000
REFERENCE = "sync_sgd"
AT_MOST = 1.05
"""Of the default's loss over that of synchronous SGD. Chosen before anything was measured."""


# The text


@dataclass(frozen=True)
class Language:
    """Words, and with which weights which of them follow each."""

    words: tuple[str, ...]
    successors: tuple[tuple[int, ...], ...]
    weights: tuple[float, ...] = (0.4, 0.25, 0.15, 0.1, 0.06, 0.04)

    @classmethod
    def of_seed(cls, seed: int, words: int = 150) -> Language:
        """Made up; the same for the same seed."""
        draw = random.Random(seed)
        syllables = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
        found: dict[str, None] = {}
        while len(found) < words:
            found["".join(draw.choices(syllables, k=draw.choice((2, 2, 3))))] = None
        successors = tuple(tuple(draw.sample(range(words), len(cls.weights))) for _ in range(words))
        return cls(tuple(found), successors)

    @property
    def alphabet(self) -> str:
        """Every character that occurs."""
        return "".join(sorted({letter for word in self.words for letter in word} | {" "}))

    def text(self, seed: int, words: int) -> str:
        """So many words, each with a space after it."""
        draw, word, written = random.Random(seed), 0, []
        for _ in range(words):
            written.append(self.words[word])
            word = draw.choices(self.successors[word], self.weights)[0]
        return " ".join(written) + " "

    def entropy(self) -> float:
        """Nats per character: about what is left to a model that knows words, order and weights.

        Exact where every word can be told from the letters before it, as far as they go, and these are in sight.
        """
        choice = -sum(weight * math.log(weight) for weight in self.weights)
        share = [1 / len(self.words)] * len(self.words)
        for _ in range(200):  # of how often each word comes, in the long run
            after = [0.0] * len(share)
            for here, successors in enumerate(self.successors):
                for there, weight in zip(successors, self.weights, strict=True):
                    after[there] += share[here] * weight
            share = after
        return choice / sum(part * (len(word) + 1) for part, word in zip(share, self.words, strict=True))


def encoded(text: str, alphabet: str) -> Tensor:
    """Each character's place in the alphabet."""
    place = {letter: number for number, letter in enumerate(alphabet)}
    return torch.tensor([place[letter] for letter in text])


# The model and its training


class Reader(nn.Module):
    """A transformer that foretells each next character of (batch, CONTEXT)."""

    def __init__(self, letters: int, width: int = 64, layers: int = 2, heads: int = 4):
        super().__init__()
        self.letter, self.place = nn.Embedding(letters, width), nn.Embedding(CONTEXT, width)
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.out = nn.Linear(width, letters)

    def forward(self, letters: Tensor) -> Tensor:
        """(batch, CONTEXT) -> (batch, CONTEXT, letters)."""
        seen = torch.nn.Transformer.generate_square_subsequent_mask(letters.shape[1])
        return self.out(self.layers(self.letter(letters) + self.place.weight[: letters.shape[1]], seen, is_causal=True))


def loss_of(model: nn.Module, windows: Tensor) -> Tensor:
    """Mean cross-entropy of (batch, CONTEXT + 1) characters, each foretold from those before it."""
    return functional.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())


class Reading:
    """One rank's work: windows of its own, its model, its optimizer."""

    def __init__(
        self, rank: int, seed: int, model: nn.Module, optimizer: torch.optim.Optimizer, lr: float, text: Tensor
    ):
        self.model, self.optimizer, self.lr, self.text = model, optimizer, lr, text
        self.draw = torch.Generator().manual_seed(1000 * seed + rank)

    def begin(self) -> None:
        """Gradients are computed when they are due."""

    def gradient(self) -> None:
        """Of the next windows."""
        begins = torch.randint(len(self.text) - CONTEXT, (BATCH,), generator=self.draw)
        loss_of(self.model, self.text[begins.unsqueeze(1) + torch.arange(CONTEXT + 1)]).backward()

    def update(self, progress: float) -> None:
        """The optimizer's step."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * factor(progress, WARMUP)
        self.optimizer.step()
        self.optimizer.zero_grad()


@dataclass(frozen=True)
class Optimizer:
    """One that is in wide use."""

    make: Callable[[nn.Module, float, float], torch.optim.Optimizer]
    """Of model, learning rate and momentum."""
    grid: tuple[float, ...]
    """Learning rates, of which synchronous SGD chooses."""
    share: Callable[[float], float] = field(default=lambda outer: 1.0)
    """By what the learning rate is multiplied where the mean has so much momentum."""


def _sgd(model: nn.Module, lr: float, momentum: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)


def _adamw(model: nn.Module, lr: float, momentum: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=lr, betas=(momentum, 0.999), weight_decay=0.01)


OPTIMIZERS = {
    "sgd": Optimizer(_sgd, (0.4, 0.8, 1.6)),
    # Its step is a mean of gradients and no sum of them: momentum does not lengthen it, that of the mean does.
    "adamw": Optimizer(_adamw, (8e-3, 1.6e-2, 3.2e-2), share=lambda outer: 1 - outer),
}
ALGORITHMS: dict[str, tuple[str, Mapping[str, Any], float]] = {
    "sync_sgd": ("sync_sgd", {}, 0.0),
    "local_sgd, H = 10": ("local_sgd", {}, 0.0),
    "momentum shared out": ("lasgd", {"outer_momentum": shared_out(0.9)[1]}, shared_out(0.9)[1]),
    "full": ("lasgd", {}, 0.0),
}
"""(algorithm, its settings, momentum of the mean) by label. The optimizers' is 0.9, or what is shared out to them."""
DEFAULTS = {"sgd": "momentum shared out", "adamw": "momentum shared out"}
"""What the documents recommend: docs/choosing.md."""
CLUSTERS = {"delay 1": (1.0, False), "delay 10": (10.0, False), "delay 10, straggler last:4x": (10.0, True)}
"""(local steps for the whole vector, whether the last rank is four times slower) by name."""


@dataclass(frozen=True)
class Run:
    """One to be done."""

    optimizer: str
    lr: float
    label: str
    cluster: str
    seed: int
    samples: int

    @property
    def done(self) -> Run:
        """Ranks that wait learn the same in every cluster: one run of theirs is done, in the first."""
        waits = registry.find(ALGORITHMS[self.label][0]).is_synchronous
        return replace(self, cluster=next(iter(CLUSTERS))) if waits else self


def plan_of(run: Run, parameters: int) -> Plan:
    """The cluster, for a model with so many."""
    name, settings, _ = ALGORITHMS[run.label]
    delay, is_held = CLUSTERS[run.cluster]
    compute: ComputeModel = Constant(STEP_S)
    return Plan(
        registry.find(name, settings),
        RANKS,
        Stragglers(compute, {RANKS - 1: 4.0}) if is_held else compute,
        Network(RANKS, math.inf, round_s=delay * STEP_S),
        Vector(parameters),
        run.samples,
        BATCH,
        steps_per_round=10.0 if name == "local_sgd" else 1.0,
    )


def trained(language: Language, run: Run) -> float | None:
    """Held-out loss of one run's final mean, in nats per character; None where it has diverged."""
    seed = run.seed
    torch.manual_seed(seed)
    recipe, outer = OPTIMIZERS[run.optimizer], ALGORITHMS[run.label][2]
    momentum = shared_out(0.9)[0] if outer else 0.9
    text = encoded(language.text(2 * seed, 60_000), language.alphabet)
    models = [Reader(len(language.alphabet))]
    models += [copy.deepcopy(models[0]) for _ in range(1, RANKS)]
    lr = run.lr * recipe.share(outer)
    works = [
        Reading(rank, seed, model, recipe.make(model, lr, momentum), lr, text) for rank, model in enumerate(models)
    ]
    plan = plan_of(run, sum(parameter.numel() for parameter in models[0].parameters()))
    replicas = [
        Replica(model, Tally(BATCH, rank), plan.first_cut, keeps_mean=plan.algorithm.keeps_mean)
        for rank, model in enumerate(models)
    ]
    for replica, work in zip(replicas, works, strict=True):
        replica.on_recovery = work.optimizer.state.clear  # as lasgd.attach does
    virtual, paces = cluster_of(plan, replicas, works)
    virtual.run()
    return None if paces[0].end is End.DIVERGED else held_out_loss(models[0], language, seed)


@torch.no_grad()
def held_out_loss(model: nn.Module, language: Language, seed: int) -> float:
    """Of text that no rank has read."""
    text = encoded(language.text(2 * seed + 1, 3000), language.alphabet)
    windows = text[: len(text) // (CONTEXT + 1) * (CONTEXT + 1)].view(-1, CONTEXT + 1)
    return statistics.fmean(loss_of(model.eval(), part).item() for part in windows.split(64))


def tuned(
    losses_of: Callable[[Sequence[Run]], list[float | None]],
    optimizers: Sequence[str],
    seeds: Sequence[int],
    samples: int,
) -> dict[str, dict[float, float | None]]:
    """Synchronous SGD's mean loss with each learning rate, by optimizer; None where it has diverged with any seed."""
    tries = [(optimizer, lr) for optimizer in optimizers for lr in OPTIMIZERS[optimizer].grid]
    found = iter(
        losses_of([Run(*each, REFERENCE, next(iter(CLUSTERS)), seed, samples) for each, seed in product(tries, seeds)])
    )
    grids: dict[str, dict[float, float | None]] = {optimizer: {} for optimizer in optimizers}
    for optimizer, lr in tries:
        losses = [next(found) for _ in seeds]
        grids[optimizer][lr] = mean_of(losses)
        print(
            f"    {optimizer}: {REFERENCE} with a learning rate of {lr:g}: {', '.join(map(said, losses))}", flush=True
        )
    return grids


def mean_of(losses: Sequence[float | None]) -> float | None:
    """None where any is missing or no number."""
    known = [loss for loss in losses if loss is not None and math.isfinite(loss)]
    return statistics.fmean(known) if known and len(known) == len(losses) else None


def best(grid: Mapping[float, float | None]) -> float:
    """The learning rate with the lowest loss; the first one if all have diverged."""
    return min(grid, key=lambda lr: math.inf if (loss := grid[lr]) is None else loss)


def said(loss: float | None) -> str:
    """In words."""
    return "diverged" if loss is None or math.isnan(loss) else f"{loss:.4f}"


def bars(records: Sequence[Mapping[str, Any]]) -> list[Bar]:
    """What is recommended against synchronous SGD, mean over the seeds, for whatever was asked for."""
    asked, made = {(found["optimizer"], found["cluster"]) for found in records}, []
    for optimizer, default in DEFAULTS.items():
        for cluster in (cluster for cluster in CLUSTERS if (optimizer, cluster) in asked):
            ours, theirs = (loss_in(records, optimizer, cluster, label) for label in (default, REFERENCE))
            value = None if ours is None or theirs is None else ours / theirs
            made.append(Bar(f"{optimizer}, {cluster}: loss of {default} over {REFERENCE}", value, at_most=AT_MOST))
    return made


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """Optimizers and algorithms down, clusters across: the losses, in Markdown."""
    clusters = list(dict.fromkeys(found["cluster"] for found in records))
    lines = [f"| optimizer | algorithm | {' | '.join(clusters)} |", "|---" * (len(clusters) + 2) + "|"]
    for optimizer, label in dict.fromkeys((found["optimizer"], found["algorithm"]) for found in records):
        cells = []
        for cluster in clusters:
            loss = loss_in(records, optimizer, cluster, label)
            cells.append("" if loss is None else said(None if math.isinf(loss) else loss))
        lines.append(f"| {optimizer} | {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def loss_in(records: Sequence[Mapping[str, Any]], optimizer: str, cluster: str, label: str) -> float | None:
    """Mean over the seeds, infinite where one has diverged; None where it was not measured."""
    for found in records:
        if (found["optimizer"], found["cluster"], found["algorithm"]) == (optimizer, cluster, label):
            mean = mean_of(found["loss"])
            return math.inf if mean is None else mean
    return None


def main(argv: Sequence[str] | None = None) -> int:
    """Trains all of them and stores the losses."""
    parser = arguments_for("characters", __doc__)
    parser.add_argument("--optimizers", default=",".join(OPTIMIZERS), help="separated by commas; default all")
    parser.add_argument("--clusters", default=";".join(CLUSTERS), help="separated by semicolons; default all")
    parser.add_argument("--algorithms", default=";".join(ALGORITHMS), help="separated by semicolons; default all")
    parser.add_argument("--seeds", default="0,1,2", help="separated by commas; default %(default)s")
    arguments = parser.parse_args(argv)
    optimizers, clusters = arguments.optimizers.split(","), arguments.clusters.split(";")
    labels, seeds = arguments.algorithms.split(";"), [int(seed) for seed in arguments.seeds.split(",")]
    for option, asked, known in (
        ("optimizers", optimizers, OPTIMIZERS),
        ("clusters", clusters, CLUSTERS),
        ("algorithms", labels, ALGORITHMS),
    ):
        if unknown := [word for word in asked if word not in known]:
            parser.error(f"--{option}: {unknown[0]!r} is none of {'; '.join(known)}")
    samples, seeds = (2000, seeds[:1]) if arguments.quick else (SAMPLES, seeds)
    language = Language.of_seed(arguments.seed)
    with ProcessPoolExecutor(usable_cores(), get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        known: dict[Run, float | None] = {}

        def losses_of(runs: Sequence[Run]) -> list[float | None]:
            missing = [run for run in dict.fromkeys(run.done for run in runs) if run not in known]
            known.update(zip(missing, pool.map(trained, repeat(language), missing), strict=True))
            return [known[run.done] for run in runs]

        grids = tuned(losses_of, optimizers, seeds, samples)
        chosen = {name: best(grid) for name, grid in grids.items()}
        settings = {"quick": arguments.quick, "ranks": RANKS, "batch_size": BATCH, "samples": samples}
        report = Report("characters", run_card(settings | {"lr": chosen, "warmup": WARMUP}, seeds))
        cells = list(product(optimizers, clusters, labels))
        losses = losses_of(
            [
                Run(optimizer, chosen[optimizer], label, cluster, seed, samples)
                for optimizer, cluster, label in cells
                for seed in seeds
            ]
        )
    records = []
    for index, (optimizer, cluster, label) in enumerate(cells):
        found = losses[index * len(seeds) : (index + 1) * len(seeds)]
        print(f"    {optimizer}, {cluster}: {label}: {', '.join(map(said, found))}", flush=True)
        record = {"optimizer": optimizer, "cluster": cluster, "algorithm": label}
        records.append(record | {"loss": found, "seeds": seeds})
    report.figures = {"entropy": language.entropy(), "grids": grids, "records": records}
    for bar in bars(records):
        report.add(bar)
    report.notes = [table(records)]
    return report.finish(where_to_store("characters", arguments))


if __name__ == "__main__":
    sys.exit(main())
