"""The rules of benchmarks/candidates.py are what they say they are, on models that can be worked out."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from lasgd.algorithms import registry
from lasgd.algorithms.requests import Mean
from lasgd.errors import ConfigurationError
from lasgd.pace import Pace
from lasgd.replica import Replica
from lasgd.tally import Tally
from lasgd.virtual.cluster import Cluster, Rank
from scripted_driver import Point

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def known(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(registry, "_ALGORITHMS", dict(registry._ALGORITHMS))
    import candidates

    candidates.register()
    yield candidates
    for name in [name for name in sys.modules if name.startswith("candidate")]:
        sys.modules.pop(name)


class Steps:
    """Each local step multiplies x by `keeps`; or adds `adds`."""

    def __init__(self, model: Point, keeps: float = 1.0, adds: float = 0.0):
        self.model, self.keeps, self.adds = model, keeps, adds
        self.seen: list[float] = []

    def begin(self) -> None:
        pass

    def gradient(self) -> None:
        self.seen.append(self.model.x.detach().view(-1)[0].item())

    def update(self, progress: float) -> None:
        with torch.no_grad():
            self.model.x.mul_(self.keeps).add_(self.adds)


def run(
    name: str,
    works_of,
    delay: int = 5,
    samples: int = 200,
    values=(0.0, 8.0),
    fragments: int = 1,
    step_s=None,
    of_optimizer=None,
    model_of=lambda value: Point([value] * 4, torch.float64),
):
    models = [model_of(value) for value in values]
    replicas = [Replica(model, Tally(1, rank), fragments) for rank, model in enumerate(models)]
    works = [works_of(rank, model) for rank, model in enumerate(models)]
    if of_optimizer:
        for replica, work in zip(replicas, works, strict=True):
            replica.on_recovery = of_optimizer(work)
    text, pace = registry.find(name), Pace(len(values), samples)
    durations = step_s or [1.0] * len(values)
    ranks = [
        Rank(replica, iter([seconds] * 10_000), work)
        for replica, work, seconds in zip(replicas, works, durations, strict=True)
    ]
    begins = iter([delay + 0.25])
    Cluster(text.compute, text.communicate, ranks, [pace], lambda *_: next(begins, float(delay)), 32).run()
    return works


def gap(works: list[Steps], step: int) -> float:
    return works[1].seen[step] - works[0].seen[step]


def test_half_a_gain_leaves_half_of_the_difference_and_full_none():
    assert gap(run("lasgd", lambda _, model: Steps(model)), 15) == pytest.approx(0.0)
    halved = run("half_gain", lambda _, model: Steps(model))
    gaps = sorted({round(gap(halved, step), 9) for step in range(60)}, reverse=True)
    assert gaps[:4] == [8.0, 4.0, 2.0, 1.0]


def test_the_adaptive_gain_becomes_what_the_local_steps_leave_of_a_difference():
    # Steps keep 0.7, a round takes five: 0.7^5 of a difference is left when its mean comes, and `full` takes all of it.
    # The gain is known from the second correction on. By then both are small, so they are compared.
    keeps, delay = 0.7, 5
    full = run("lasgd", lambda _, model: Steps(model, keeps), delay)
    adaptive = run("adaptive_gain", lambda _, model: Steps(model, keeps), delay)
    of_full = [abs(gap(full, step)) / keeps**step for step in range(60)]
    of_adaptive = [abs(gap(adaptive, step)) / keeps**step for step in range(60)]
    assert of_full[30] > 100  # in units of what ranks would have that never average: grown
    assert of_adaptive[30] < of_full[30] / 10


def test_the_adaptive_gain_is_one_where_local_steps_forget_nothing():
    works = run("adaptive_gain", lambda rank, model: Steps(model, adds=float(rank)), values=(0.0, 0.0))
    plain = run("lasgd", lambda rank, model: Steps(model, adds=float(rank)), values=(0.0, 0.0))
    assert works[0].seen == pytest.approx(plain[0].seen)


def test_gains_move_the_mean_by_nothing():
    alike = ("by_drift", "by_layer", "interleaved", "remembered_mean")
    gains = ("adaptive_gain", "adaptive_gain_of_latest", "adaptive_gain_by_fragment", "adaptive_gain_by_tensor")
    for name in ("half_gain", *gains, *alike):
        works = run(name, lambda _, model: Steps(model), values=(0.0, 2.0, 10.0), samples=300, fragments=2)
        assert sum(work.seen[90] for work in works) == pytest.approx(12.0), name


def test_the_adaptive_gain_by_fragment_is_that_of_all_where_fragments_are_alike():
    one, own = (
        run(name, lambda _, model: Steps(model, 0.9), fragments=1)
        for name in ("adaptive_gain", "adaptive_gain_by_fragment")
    )
    assert own[0].seen == pytest.approx(one[0].seen)


def test_the_gain_of_the_latest_round_knows_no_round_before(known):
    from candidate_gains import Said

    latest, all_ = Said(remembers=0.0), Said()
    for said in (latest, all_):
        said.say(1, [8.0]), said.say(2, [1.0]), said.say(2, [2.0]), said.say(3, [100.0])
    assert latest.before(3) == [3.0]
    assert all_.before(3) == pytest.approx([3.0 + 0.9 * 8.0])
    assert latest.before(1) is None


def test_by_tensor_each_takes_what_its_own_elements_have_shown():
    # Steps keep 0.7 of x, as above, and drive the ranks' y apart. One gain for all is that of y, whose differences are
    # by far the larger: all of the correction, which x would rather not have.
    class Two(torch.nn.Module):
        def __init__(self, value: float):
            super().__init__()
            self.x = torch.nn.Parameter(torch.full((4,), value, dtype=torch.float64))
            self.y = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))

    class Apart(Steps):
        def update(self, progress: float) -> None:
            super().update(progress)
            with torch.no_grad():
                self.model.y.add_(self.adds_to_y)

    def works_of(rank: int, model: Two) -> Apart:
        work = Apart(model, keeps=0.7)
        work.adds_to_y = 1000.0 * rank
        return work

    def gaps(name: str) -> tuple[float, float]:
        works = run(name, works_of, model_of=Two)
        y_apart = (works[1].model.y - works[0].model.y).abs().max().item()
        return abs(gap(works, 30)) / 0.7**30, y_apart

    of_all, by_tensor = gaps("adaptive_gain"), gaps("adaptive_gain_by_tensor")
    assert of_all[0] > 100
    assert by_tensor[0] < of_all[0] / 10
    assert by_tensor[1] == pytest.approx(of_all[1])


def test_dropping_leaves_all_at_the_mean_of_what_they_were():
    # Both add one in every local step. What was sent comes back, and what was added meanwhile is gone.
    dropped = run("dropped", lambda _, model: Steps(model, adds=1.0), values=(0.0, 8.0))
    kept = run("lasgd", lambda _, model: Steps(model, adds=1.0), values=(0.0, 8.0))
    assert gap(dropped, 15) == pytest.approx(0.0)
    assert kept[0].seen[30] > 30 > 2 * dropped[0].seen[30]


def test_the_remembered_mean_is_behind_the_mean_by_some_ten_cycles(known):
    def left(name: str) -> float:
        works = run(name, lambda _, model: Steps(model, adds=1.0), values=(0.0, 0.0), delay=2, samples=400)
        return works[0].model.x.detach()[0].item()

    assert left("lasgd") == pytest.approx(200, abs=4)
    assert 200 - left("remembered_mean") == pytest.approx(2 * 10, abs=6)


def test_a_rank_that_takes_more_steps_weighs_more():
    # Rank 0 takes four times as many steps and adds one with each; rank 1 adds nothing. With equal weights the mean
    # goes half as far as rank 0, with four to one four fifths.
    def far(name: str) -> float:
        works = run(
            name,
            lambda rank, model: Steps(model, adds=float(rank == 0)),
            values=(0.0, 0.0),
            step_s=[1.0, 4.0],
            samples=250,
            delay=4,
        )
        return works[0].seen[190]

    assert far("weighted_steps") > 1.3 * far("lasgd")


def test_clearing_clears_where_something_was_shown(known):
    cleared = []
    model = Point([0.0] * 4, torch.float64)
    replica = Replica(model, Tally(1))
    replica.on_recovery = lambda: cleared.append(True)
    text = known.compute_cleared(replica, Pace(1, 100))
    next(text), text.send(None), text.send(None)
    assert not cleared
    fragment = replica.next_fragment(1)
    sent = replica.snapshot(fragment)
    replica.correct(fragment, sent, Mean(torch.ones(4, dtype=torch.float64)))
    text.send(None), text.send(None)
    assert cleared == [True]


def test_momentum_is_averaged_and_what_it_became_meanwhile_kept():
    # Two ranks with opposite gradients: alone, momentum grows to +-10; averaged every five steps it stays near the
    # momentum of the ten that a round and the waiting for it take.
    class Pulls:
        def __init__(self, rank: int, model: Point):
            self.model, self.pull = model, 1.0 - 2 * rank
            self.optimizer = torch.optim.SGD([model.x], lr=0.0, momentum=0.9)
            self.seen: list[float] = []

        def begin(self) -> None:
            pass

        def gradient(self) -> None:
            self.model.x.grad = torch.full_like(self.model.x, self.pull)

        def update(self, progress: float) -> None:
            self.optimizer.step()
            self.seen.append(self.optimizer.state[self.model.x]["momentum_buffer"].view(-1)[0].item())

    def largest(name: str) -> float:
        works = run(name, Pulls, fragments=1, of_optimizer=lambda work: work.optimizer.state.clear)
        assert all(a == pytest.approx(-b) for a, b in zip(works[0].seen, works[1].seen, strict=False))
        return max(map(abs, works[0].seen[20:90]))

    assert largest("lasgd") > 8.5
    assert largest("momentum_averaged") < 7.0


def with_momentum(values: list[float], momentum: list[float]) -> tuple[Replica, torch.Tensor]:
    """A rank alone, after a local step."""
    model = Point(values, torch.float64)
    optimizer = torch.optim.SGD([model.x], lr=0.0, momentum=0.9)
    model.x.grad = torch.tensor(momentum, dtype=torch.float64)
    optimizer.step()
    replica = Replica(model, Tally(1))
    replica.on_recovery = optimizer.state.clear
    return replica, optimizer.state[model.x]["momentum_buffer"]


def test_projected_momentum_loses_what_leads_away_from_the_mean_and_nothing_else(known):
    from candidate_momentum import MomentumProjected

    # A local step goes against its momentum: 3 along the first axis leads away from a mean that lies up it.
    replica, momentum = with_momentum([0.0, 0.0], [3.0, 5.0])
    candidate = MomentumProjected(replica, Pace(1, 100))
    fragment = candidate.next_fragment(1)
    for mean, left in (([-2.0, 0.0], [3.0, 5.0]), ([2.0, 0.0], [0.0, 5.0])):
        sent = candidate.snapshot(fragment)
        candidate.correct(fragment, sent, Mean(torch.tensor(mean, dtype=torch.float64)))
        assert momentum.tolist() == pytest.approx(left)


def test_scaled_momentum_is_left_by_as_much_as_of_the_correction_is_taken(known):
    from candidate_momentum import MomentumScaled

    replica, momentum = with_momentum([0.0, 0.0], [3.0, 5.0])
    candidate = MomentumScaled(replica, Pace(4, 100))
    candidate.parts(fragment := candidate.next_fragment(1))[0][0].say(-1, [-0.6, 1.0])  # g = 1 - 0.6
    sent = candidate.snapshot(fragment)
    candidate.correct(fragment, sent, Mean(torch.tensor([10.0, 0.0], dtype=torch.float64)))
    replica.merge()
    assert momentum.tolist() == pytest.approx([1.2, 2.0])
    assert replica.parameters().tolist() == pytest.approx([4.0, 0.0])


def test_by_drift_lets_all_go_once_and_then_the_one_that_drifts_most(known):
    from candidate_fragments import Drifts

    drifts = Drifts()
    order = []
    for round_ in range(12):
        order.append(drifts.next(round_, 3))
        assert drifts.next(round_, 3) == order[-1], "all ranks take the same"
        drifts.say(round_ + 1, order[-1], 1.0 if order[-1] else 10.0 * max(1, round_))
    assert order[:3] == [0, 1, 2]
    assert order[3:].count(0) > order[3:].count(1)
    assert set(order[3:]) == {0, 1, 2}, "none is forgotten"


def test_a_gentle_gradient_weighs_more():
    class Pulls(Steps):
        def begin(self) -> None:
            self.model.x.grad = torch.full_like(self.model.x, 100.0 * self.pull**2)  # half done

        def gradient(self) -> None:
            super().gradient()
            self.model.x.grad = torch.full_like(self.model.x, self.pull)

        def update(self, progress: float) -> None:
            super().update(progress)
            self.model.x.grad = None

    def works(rank: int, model: Point) -> Pulls:
        work = Pulls(model)
        work.pull = 1.0 + 3.0 * rank  # rank 1 at 10 pulls four times as much: 4 * 0 + 1 * 10 of five
        return work

    assert run("weighted_gradient", works, values=(0.0, 10.0))[0].seen[30] == pytest.approx(2.0)


def test_by_layer_a_layer_goes_at_a_time(known):
    from candidate_fragments import ByLayer

    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2, bias=False))
    replica = Replica(model, Tally(1), 5)
    candidate = ByLayer(replica, Pace(1, 100))
    went = [candidate.next_fragment(5) for _ in range(4)]
    assert [(fragment.begin, fragment.end) for fragment in went] == [(0, 16), (16, 24)] * 2
    assert [len(fragment.pieces) for fragment in went[:2]] == [2, 1]
    assert torch.equal(replica.snapshot(went[1]).values, model[2].weight.detach().flatten())


def test_interleaved_each_fragment_has_rows_of_the_whole_model(known):
    from candidate_fragments import Interleaved

    model = Point([float(row) for row in range(8)], torch.float64)
    replica = Replica(model, Tally(1), 2)
    candidate = Interleaved(replica, Pace(1, 100))
    for turn in (0, 1):
        fragment = candidate.next_fragment(2)
        sent = candidate.snapshot(fragment)
        assert sent.values.tolist() == [turn, turn + 2, turn + 4, turn + 6]
        candidate.correct(fragment, sent, Mean(sent.values + 100))
        replica.merge()
    assert model.x.tolist() == [100.0 + row for row in range(8)]
    assert candidate.next_fragment(2).parts[0].begin == 0


def test_waiting_first_keeps_all_alike_for_a_fifth_of_the_run_and_then_no_longer():
    works = run("waits_first", lambda rank, model: Steps(model, adds=float(rank)), values=(0.0, 0.0), samples=200)
    gaps = [gap(works, step) for step in range(80)]
    assert gaps[:20] == [0.0] * 20
    assert max(gaps[25:]) > 3.0


def test_a_name_that_is_in_use_is_refused(known):
    with pytest.raises(ConfigurationError, match="half_gain"):
        registry.add(known.CANDIDATES[0])
