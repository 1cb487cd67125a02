"""The text of benchmarks/characters.py is as hard as it says, and its runs train what they say."""

from __future__ import annotations

import math
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def benchmarks_importable(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield
    for name in ("characters", "common"):
        sys.modules.pop(name, None)


def test_the_entropy_is_what_one_who_knows_the_language_needs_for_its_text():
    from characters import Language

    language = Language.of_seed(3, words=40)
    words = language.text(7, 40_000).split()
    place = {word: index for index, word in enumerate(language.words)}
    needed = 0.0
    for here, there in pairwise(words):
        needed -= math.log(language.weights[language.successors[place[here]].index(place[there])])
    assert language.entropy() == pytest.approx(needed / sum(len(word) + 1 for word in words[1:]), rel=0.02)


def test_a_language_and_its_texts_are_functions_of_their_seeds():
    from characters import Language, encoded

    one, same, other = Language.of_seed(1), Language.of_seed(1), Language.of_seed(2)
    assert one == same != other
    assert one.text(5, 100) == same.text(5, 100) != one.text(6, 100)
    letters = encoded(one.text(5, 100), one.alphabet)
    assert "".join(one.alphabet[letter] for letter in letters.tolist()) == one.text(5, 100)


def test_no_character_is_foretold_from_those_after_it():
    from characters import CONTEXT, Reader

    torch.manual_seed(0)
    model, letters = Reader(12).eval(), torch.randint(12, (1, CONTEXT))
    changed = letters.clone()
    changed[0, 20:] = (changed[0, 20:] + 1) % 12
    with torch.no_grad():
        before, after = model(letters), model(changed)
    assert torch.allclose(before[0, :20], after[0, :20], atol=1e-6)
    assert not torch.allclose(before[0, 20:], after[0, 20:], atol=1e-3)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("label", ["sync_sgd", "momentum shared out", "full"])
def test_a_short_run_learns_more_than_how_often_letters_come(optimizer, label):
    from characters import OPTIMIZERS, Language, Run, encoded, trained

    torch.set_num_threads(1)
    language = Language.of_seed(0)
    letters = encoded(language.text(1, 3000), language.alphabet)
    shares = letters.bincount().double() / len(letters)
    alone = -(shares * shares.log()).sum().item()
    loss = trained(language, Run(optimizer, OPTIMIZERS[optimizer].grid[0], label, "delay 1", seed=0, samples=3000))
    assert loss is not None and language.entropy() < loss < 0.9 * alone


def test_the_bars_compare_what_is_recommended_with_synchronous_sgd():
    from characters import CLUSTERS, bars

    def record(algorithm: str, loss: list[float | None]) -> dict:
        return {"optimizer": "sgd", "cluster": next(iter(CLUSTERS)), "algorithm": algorithm, "loss": loss}

    first = bars([record("sync_sgd", [1.0, 1.0]), record("momentum shared out", [1.1, 1.2])])[0]
    assert first.value == pytest.approx(1.15) and first.holds is False
    assert bars([record("sync_sgd", [1.0]), record("momentum shared out", [None])])[0].holds is False
    (alone,) = bars([record("sync_sgd", [1.0])])
    assert alone.holds is None, "one optimizer in one cluster was asked for, and there is nothing to compare"


@pytest.mark.parametrize("cluster", ["delay 1", "delay 10", "delay 10, straggler last:4x"])
def test_the_vector_is_on_the_wire_for_as_many_local_steps_as_the_cluster_says(cluster):
    from characters import CLUSTERS, RANKS, STEP_S, Run, plan_of

    plan = plan_of(Run("sgd", 0.1, "full", cluster, seed=0, samples=1000), parameters=100_000)
    whole = plan.network.all_reduce_s(plan.vector.nbytes, range(RANKS))
    assert whole == pytest.approx(CLUSTERS[cluster][0] * STEP_S)


def test_a_rank_that_sat_out_forgets_its_optimizer_s_state_as_in_real_runs(monkeypatch):
    import characters

    seen = []

    def caught(plan, replicas, works):
        seen.extend(zip(replicas, works, strict=True))
        raise InterruptedError

    monkeypatch.setattr(characters, "cluster_of", caught)
    with pytest.raises(InterruptedError):
        characters.trained(
            characters.Language.of_seed(0, words=10), characters.Run("sgd", 0.1, "full", "delay 1", 0, 64)
        )
    for replica, work in seen:
        (parameter, *_) = work.model.parameters()
        work.optimizer.state[parameter] = {"momentum_buffer": torch.ones(())}
        replica.on_recovery()
        assert not work.optimizer.state


def test_synchronous_sgd_chooses_the_learning_rate_that_all_take():
    from characters import OPTIMIZERS, REFERENCE, best, tuned

    least, middle, most = OPTIMIZERS["sgd"].grid

    def losses_of(runs):
        assert {run.label for run in runs} == {REFERENCE}
        return [None if (run.lr, run.seed) == (most, 1) else abs(run.lr - 1.1 * most) for run in runs]

    grids = tuned(losses_of, ["sgd"], seeds=[0, 1], samples=1)
    assert list(grids) == ["sgd"] and list(grids["sgd"]) == [least, middle, most]
    assert grids["sgd"][most] is None, "diverges with a seed"
    assert best(grids["sgd"]) == middle
    assert best({1.0: None, 2.0: None}) == 1.0


def test_one_run_of_those_who_wait_stands_for_every_cluster():
    from characters import CLUSTERS, Run

    def done(label):
        return {Run("sgd", 0.1, label, cluster, 0, 1000).done for cluster in CLUSTERS}

    assert len(done("sync_sgd")) == len(done("local_sgd, H = 10")) == 1
    assert len(done("full")) == len(CLUSTERS)


@pytest.mark.parametrize(
    "losses, mean", [([0.5, 0.7], 0.6), ([0.5, None], None), ([0.5, float("nan")], None), ([], None)]
)
def test_a_loss_that_is_none_leaves_no_mean(losses, mean):
    from characters import mean_of

    assert mean_of(losses) == (None if mean is None else pytest.approx(mean))


def test_the_table_shows_losses_by_algorithm_and_cluster():
    from characters import CLUSTERS, table

    first, second = list(CLUSTERS)[:2]
    found = {"optimizer": "sgd", "algorithm": "full", "seeds": [0, 1]}
    lines = table(
        [found | {"cluster": first, "loss": [0.5, 0.7]}, found | {"cluster": second, "loss": [0.5, None]}]
    ).splitlines()
    assert lines == [
        f"| optimizer | algorithm | {first} | {second} |",
        "|---|---|---|---|",
        "| sgd | full | 0.6000 | diverged |",
    ]
