"""What ordinary training loops do, through the real attach, on one rank: the weights are those of the loop alone."""

from __future__ import annotations

import multiprocessing

import pytest
import torch
from torch import nn

import lasgd
from helpers import alone, batch, raise_any, small_model, train_step, wait_all
from lasgd.errors import ConfigurationError
from lasgd.group.scripted import Network
from scripted_driver import vector


def both(train, make_optimizer, steps: int = 6):
    """Trains one model attached and an equal one alone with the same code; returns the Averaging (closed)."""
    ours, plain = small_model(), small_model()
    optimizer, reference = make_optimizer(ours.parameters()), make_optimizer(plain.parameters())
    with alone(ours, optimizer, samples=10**6) as averaging:
        train(ours, optimizer, steps)
        averaging.stop()
    train(plain, reference, steps)
    assert torch.equal(vector(ours), vector(plain))
    return averaging


def loop(model, optimizer, steps):
    for step in range(steps):
        train_step(model, optimizer, step)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.AdamW(p, lr=1e-2),
        lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, foreach=True),
        lambda p: torch.optim.Adagrad(p, lr=0.1),
        lambda p: torch.optim.RMSprop(p, lr=0.01),
    ],
    ids=["adamw", "fused adamw", "fused sgd", "foreach sgd", "adagrad", "rmsprop"],
)
def test_any_first_order_optimizer_counts_one_boundary_a_step(make):
    assert both(loop, make).tally.local_steps == 6


def test_a_closure_runs_inside_the_step():
    def train(model, optimizer, steps):
        for step in range(steps):
            x, y = batch(step)

            def closure(x=x, y=y):
                optimizer.zero_grad()
                loss = nn.functional.mse_loss(model(x), y)
                loss.backward()
                return loss

            assert optimizer.step(closure).item() > 0

    assert both(train, lambda p: torch.optim.SGD(p, lr=0.1)).tally.local_steps == 6


def test_lbfgs_is_refused():
    model = small_model()
    with pytest.raises(ConfigurationError, match="LBFGS"):
        alone(model, torch.optim.LBFGS(model.parameters()))


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_a_gradscaler_skips_counts_no_samples(fused):
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    with alone(model, optimizer, batch_size=8) as averaging:
        for step in range(5):
            x, y = batch(step)
            scaler.scale(nn.functional.mse_loss(model(x), y)).backward()
            if step == 2:
                model[0].weight.grad.fill_(float("inf"))
            before = vector(model)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            assert torch.equal(vector(model), before) == (step == 2)
        assert averaging.tally.samples == 4 * 8
        averaging.stop()


def test_a_turn_of_two_fused_optimizers_that_are_both_skipped_is_one_skipped_turn():
    model = small_model()
    optimizers = [torch.optim.SGD(model[i].parameters(), lr=0.1, fused=True) for i in (0, 2)]
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    with alone(model, optimizers) as averaging:
        for spoilt in ((), (0,), (0, 2), ()):
            x, y = batch(0)
            scaler.scale(nn.functional.mse_loss(model(x), y)).backward()
            for layer in spoilt:
                model[layer].weight.grad.fill_(float("inf"))
            for optimizer in optimizers:
                scaler.step(optimizer)
                optimizer.zero_grad()
            scaler.update()
        assert (averaging.tally.local_steps, averaging.tally.samples) == (4, 3)
        averaging.stop()


class Moody(torch.optim.SGD):
    """Raises in the middle of its second step."""

    calls = 0

    def step(self, closure=None):
        self.calls += 1
        if self.calls == 2:
            raise RuntimeError("out of memory")
        return super().step(closure)


def test_a_step_that_raises_and_is_retried_is_one_local_step():
    def train(model, optimizer, steps):
        for step in range(steps):
            x, y = batch(step)
            nn.functional.mse_loss(model(x), y).backward()
            try:
                optimizer.step()
            except RuntimeError:
                optimizer.step()
            optimizer.zero_grad()

    assert both(train, lambda p: Moody(p, lr=0.1)).tally.local_steps == 6


def test_two_optimizers_share_a_boundary_so_that_a_graph_may_live_between_their_steps():
    # GAN-like: both backwards hang on one forward; a merge between the steps would change what the second one needs.
    network = Network(2, deliver_at_once=True)

    def rank(r):
        model = nn.ModuleDict({"g": nn.Linear(3, 3), "d": nn.Linear(3, 1)})
        optimizers = [torch.optim.SGD(model[k].parameters(), lr=0.01) for k in ("d", "g")]
        with lasgd.attach(
            model, optimizers, samples=60, batch_size=1, fragments=1, group=network.group(r), timeout_s=10
        ) as averaging:
            step = 0
            while not averaging.finished:
                step += 1
                fake = model["g"](torch.randn(4, 3))
                d_loss = model["d"](fake.detach()).square().mean()
                g_loss = fake.square().mean()  # its graph outlives the discriminator's step
                d_loss.backward()
                optimizers[0].step()
                g_loss.backward()
                optimizers[1].step()
                for optimizer in optimizers:
                    optimizer.zero_grad()
        assert averaging.tally.local_steps == step
        return vector(model)

    first, second = raise_any(wait_all([lambda: rank(0), lambda: rank(1)]))
    assert torch.equal(first, second)


def test_an_optimizer_that_never_steps_is_reported():
    model = small_model()
    active, idle = (torch.optim.SGD(model[i].parameters(), lr=0.1) for i in (0, 2))
    with alone(model, [active, idle]) as averaging:
        with pytest.warns(UserWarning, match=r"optimizer \[1\] .* does not step"):
            for _ in range(100):
                active.step()
        averaging.stop()
    assert averaging.tally.local_steps == 0


def test_gradient_accumulation_counts_optimizer_steps_not_micro_batches():
    def train(model, optimizer, steps):
        for step in range(steps):
            for micro in range(3):
                x, y = batch(10 * step + micro)
                (nn.functional.mse_loss(model(x), y) / 3).backward()
            optimizer.step()
            optimizer.zero_grad()

    assert both(train, lambda p: torch.optim.SGD(p, lr=0.1)).tally.local_steps == 6


def test_clipping_a_scheduler_and_bf16_autocast_work_as_ever():
    def train(model, optimizer, steps):
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for step in range(steps):
            x, y = batch(step)
            with torch.autocast("cpu", torch.bfloat16):
                loss = nn.functional.mse_loss(model(x), y)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()

    both(train, lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9))


@pytest.mark.filterwarnings("ignore")  # torch's own, of its compiler
def test_a_compiled_model_sees_merges_and_is_not_compiled_anew():
    network = Network(2, deliver_at_once=True)
    torch._dynamo.reset()
    models = [small_model(seed) for seed in (0, 1)]
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.0) for model in models]
    compiles = []

    def backend(graph, _):  # the tracing and its guards are the real ones, the code it makes is plain Python
        compiles.append(graph)
        return graph.forward

    def make(r):
        options = {"samples": 10**6, "batch_size": 1, "fragments": 1, "timeout_s": 60.0, "steps_per_round": 1e-9}
        return lasgd.attach(models[r], optimizers[r], group=network.group(r), **options)

    attached = raise_any(wait_all([lambda: make(0), lambda: make(1)]))
    with torch.no_grad():
        for p in models[1].parameters():
            p.add_(1.0)  # unequal, after the broadcast
    x, y = batch(0)
    compiled = torch.compile(models[0], backend=backend)
    first = compiled(x).detach().clone()

    def step(r, model):
        nn.functional.mse_loss(model(x), y).backward()
        optimizers[r].step()
        optimizers[r].zero_grad()

    with attached[1], attached[0] as averaging:
        step(1, models[1])  # its communicator answers from now on
        step(0, compiled)
        count = len(compiles)
        while averaging.pace.round < 4 or averaging.tally.staleness.merges < 2:
            step(0, compiled)
        assert len(compiles) == count
        assert not torch.equal(compiled(x), first)
        torch.testing.assert_close(compiled(x), models[0](x))
        averaging.stop()


@pytest.mark.filterwarnings("ignore")  # torch's own, of its compiler
def test_a_compiled_optimizer_step_still_marks_the_boundary():
    torch._dynamo.reset()
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=torch.tensor(0.1))
    with alone(model, optimizer) as averaging:
        step = torch.compile(optimizer.step, backend="eager")
        for index in range(3):
            x, y = batch(index)
            nn.functional.mse_loss(model(x), y).backward()
            step()
            optimizer.zero_grad()
        assert averaging.tally.local_steps == 3
        averaging.stop()


class Numbers(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        return batch(index, 1)


def test_loader_workers_forked_after_the_thread_has_started_neither_hang_nor_step():
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = torch.utils.data.DataLoader(
        Numbers(), num_workers=2, multiprocessing_context=multiprocessing.get_context("fork"), timeout=20
    )
    with alone(model, optimizer) as averaging:
        train_step(model, optimizer, 0)
        averaging.mean_weights()  # rounds are running
        for x, y in loader:
            nn.functional.mse_loss(model(x[0]), y[0]).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert averaging.tally.local_steps == 9
        averaging.stop()


def _step_in_child(averaging, model, optimizer, answers):
    train_step(model, optimizer, 1)
    averaging.close()
    answers.put((averaging.tally.local_steps, averaging._phase.now.value))


def test_a_forked_child_that_steps_counts_nothing_and_closes_nothing():
    context = multiprocessing.get_context("fork")
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a forked child must not enter the parent's OpenMP pool
    try:
        with alone(model, optimizer) as averaging:
            train_step(model, optimizer, 0)
            answers = context.Queue()
            child = context.Process(target=_step_in_child, args=(averaging, model, optimizer, answers))
            child.start()
            assert answers.get(timeout=20) == (1, "running")
            child.join(20)
            train_step(model, optimizer, 2)
            assert averaging.tally.local_steps == 2
            averaging.stop()
    finally:
        torch.set_num_threads(threads)


def test_the_step_boundary_can_be_marked_by_hand():
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    averaging = alone(model, optimizer, samples=5)
    with averaging:
        while not averaging.finished:
            with torch.no_grad():
                for p in model.parameters():
                    p.mul_(0.9)
            averaging.step_boundary()
    assert averaging.tally.local_steps >= 5
    averaging.step_boundary()  # closed: nothing
    assert averaging.pace.samples >= 5


def test_parameters_outside_the_model_are_refused():
    model, stranger = small_model(), nn.Parameter(torch.zeros(3, 2))
    with pytest.raises(ConfigurationError, match=r"optimizer 0 updates 1 parameters .* shape \(3, 2\)"):
        alone(model, torch.optim.SGD([*model.parameters(), stranger], lr=0.1))


@pytest.mark.parametrize("wrong", [[], None, "sgd", [object()]])
def test_what_is_no_optimizer_is_refused(wrong):
    with pytest.raises(ConfigurationError, match=r"torch\.optim\.Optimizer"):
        alone(small_model(), wrong)


def test_an_optimizer_given_twice_is_refused():
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ConfigurationError, match="given twice"):
        alone(model, [optimizer, optimizer])


@pytest.mark.parametrize("name", ["SGD", "Adam", "Adagrad", "RMSprop", "Adamax", "NAdam", "RAdam", "Rprop", "ASGD"])
def test_a_rank_that_has_recovered_from_nan_starts_its_optimizer_afresh_and_goes_on(name):
    network = Network(2, deliver_at_once=True)

    def rank(r):
        model = small_model()
        options = {"lr": 1e-3, **({"momentum": 0.9} if name == "SGD" else {})}
        optimizer = getattr(torch.optim, name)(model.parameters(), **options)
        with lasgd.attach(
            model, optimizer, samples=10**6, batch_size=1, fragments=1, group=network.group(r), timeout_s=10
        ) as averaging:
            step = 0
            while averaging.pace.round < 12 or (r == 0 and not averaging.pace.sicknesses):
                train_step(model, optimizer, step)
                step += 1
                if r == 1 and step == 2:
                    with torch.no_grad():
                        model[0].weight.fill_(float("nan"))
                    for state in optimizer.state.values():
                        for value in state.values():
                            if isinstance(value, torch.Tensor) and value.is_floating_point():
                                value.fill_(float("nan"))
            while r == 1 and averaging.replica.is_sitting_out:
                train_step(model, optimizer, step)
            for _ in range(3):
                train_step(model, optimizer, step)
            averaging.stop()
        return averaging.pace.sicknesses, torch.isfinite(vector(model)).all().item()

    (sick, healthy), (_, recovered) = raise_any(wait_all([lambda: rank(0), lambda: rank(1)]))
    assert {s.rank for s in sick} == {1}
    assert healthy and recovered
