"""What cannot work is refused before the first local step, with words that help."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lasgd
from helpers import alone, raise_any, small_model, wait_all
from lasgd.errors import ConfigurationError, PeerError
from lasgd.group.scripted import Network
from scripted_driver import vector


def attach_all(models, **options):
    """attach on one thread per model; `options` may be callables of the rank. Results or exceptions."""
    network = Network(len(models), deliver_at_once=True)

    def rank(r):
        chosen = {name: value(r) if callable(value) else value for name, value in options.items()}
        chosen = {"samples": 100, "batch_size": 4, "start_timeout_s": 1.0, **chosen}
        optimizer = torch.optim.SGD(models[r].parameters(), lr=0.1)
        return lasgd.attach(models[r], optimizer, group=network.group(r), **chosen)

    return wait_all([lambda r=r: rank(r) for r in range(len(models))])


@pytest.mark.parametrize(
    "option, value, words",
    [
        ("samples", 0, "samples should be a whole number from 1 on, got 0"),
        ("samples", 1.5, "samples .* got 1.5"),
        ("samples", True, "samples .* got True"),
        ("batch_size", -1, "batch_size .* got -1"),
        ("fragments", 0, "fragments should be 'auto' or a whole number from 1 on, got 0"),
        ("fragments", "many", "got 'many'"),
        ("fragments", 2.0, "got 2.0"),
        ("fragments", True, "got True"),
        ("steps_per_round", 0, "steps_per_round should be a number from 1e-09 to 1,000,000, got 0"),
        ("steps_per_round", float("nan"), "got nan"),
        ("steps_per_round", 1e300, "got 1e\\+300"),
        ("timeout_s", float("inf"), "timeout_s .* got inf"),
        ("timeout_s", 1e15, "timeout_s should be a number from 0.001 to 2,592,000"),
        ("start_timeout_s", 1e-6, "start_timeout_s .* got 1e-06"),
        ("evaluations", -1, "evaluations should be a whole number from 0 on, got -1"),
        ("checkpoints", 0.5, "checkpoints .* got 0.5"),
        ("algorithm", "lasdg", "Did you mean 'lasgd'"),
        ("algorithm", None, "algorithm None is not known"),
        ("merge", "ful", "Did you mean 'full'"),
        ("merge", ["full"], "merge rule .* is not known"),
        ("wire", "int7", "Did you mean 'int8'"),
        ("wire", None, "wire format None is not known"),
        ("must_match", {("a", 1): 2}, "names of settings as keys"),
    ],
)
def test_nonsense_options_are_refused(option, value, words):
    model = small_model()
    with pytest.raises(ConfigurationError, match=words):
        alone(model, torch.optim.SGD(model.parameters(), lr=0.1), **{option: value})


def with_extra(name, tensor):
    model = nn.Linear(3, 2, bias=False)
    if isinstance(tensor, nn.Parameter):
        model.register_parameter(name, tensor)
    else:
        model.register_buffer(name, tensor)
    return model


@pytest.mark.parametrize(
    "ours, theirs, words",
    [
        (
            nn.Parameter(torch.ones(3), False),
            nn.Parameter(torch.ones(4), False),
            r"'x' float32 \(3,\) .*\(4,\) on rank 1",
        ),
        (
            torch.ones(4, dtype=torch.int64),
            torch.ones(8, dtype=torch.int32),
            r"'x' int64 \(4,\) on rank 0, 'x' int32 \(8,\)",
        ),
        (torch.ones(2, dtype=torch.int64), None, r"'x' int64 \(2,\) on rank 0, nothing more on rank 1"),
    ],
    ids=["frozen", "reinterpreted", "missing"],
)
def test_what_is_only_broadcast_must_be_alike_too(ours, theirs, words):
    models = [with_extra("x", ours), nn.Linear(3, 2, bias=False) if theirs is None else with_extra("x", theirs)]
    for error in attach_all(models):
        assert isinstance(error, ConfigurationError)
        with pytest.raises(ConfigurationError, match=words):
            raise error


class Untouched:
    """A group that nobody may use."""

    def __getattr__(self, name):
        raise AssertionError(f"the group was asked for {name}")


def test_an_optimizer_that_cannot_work_is_refused_before_any_other_rank_hears_of_it():
    model = small_model()
    with pytest.raises(ConfigurationError, match="LBFGS"):
        lasgd.attach(model, torch.optim.LBFGS(model.parameters()), samples=9, batch_size=1, group=Untouched())


@pytest.mark.parametrize(
    "other, words",
    [
        (lambda: nn.Linear(3, 3), r"rank 0 has 9 elements, rank 2 has 12.* First difference"),
        (lambda: nn.Linear(1, 6), r"'weight' float32 \(2, 3\) on rank 0, 'weight' float32 \(6, 1\) on rank 2"),
        (lambda: nn.Linear(3, 2).bfloat16(), r"weight' float32 \(2, 3\) on rank 0, 'weight' bfloat16 \(2, 3\)"),
        (lambda: nn.Sequential(nn.Linear(3, 3)), r"'0.weight' float32 \(3, 3\) on rank 2"),
    ],
    ids=["count", "shape", "dtype", "name"],
)
def test_models_that_differ_are_refused_on_all_ranks_with_rank_and_parameter(other, words):
    models = [nn.Linear(3, 2, bias=False), nn.Linear(3, 2, bias=False), other()]
    if "9 elements" in words:
        models[:2] = [nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)]
    before = [vector(m) for m in models]
    for error in attach_all(models):
        assert isinstance(error, ConfigurationError)
        with pytest.raises(ConfigurationError, match=words):
            raise error
    assert all(torch.equal(vector(m), old) for m, old in zip(models, before, strict=True))


def test_a_model_with_one_tensor_less_is_told_so():
    errors = attach_all([nn.Linear(3, 2), nn.Linear(3, 2, bias=False)])
    assert "nothing more on rank 1" in str(errors[0])


@pytest.mark.parametrize("option", ["samples", "steps_per_round", "fragments", "evaluations", "checkpoints"])
def test_settings_that_differ_are_refused_on_all_ranks(option):
    errors = attach_all([nn.Linear(1, 1) for _ in range(3)], **{option: lambda r: 7 if r == 1 else 5})
    for error in errors:
        assert isinstance(error, ConfigurationError)
        assert f"ranks disagree on {option}: rank 0 has 5, rank 1 has 7" in str(error)


def test_settings_of_the_caller_can_be_made_to_match():
    errors = attach_all([nn.Linear(1, 1) for _ in range(2)], must_match=lambda r: {"augment": "flip" if r else None})
    assert all("ranks disagree on augment: rank 0 has None, rank 1 has 'flip'" in str(error) for error in errors)


def test_batch_sizes_may_differ():
    raise_any(attach_all([nn.Linear(1, 1) for _ in range(2)], batch_size=lambda r: 4 + r))


def test_rank_0s_parameters_and_buffers_reach_all_bit_for_bit_frozen_ones_too():
    def model(value):
        module = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Linear(2, 1).bfloat16(), nn.Conv2d(2, 2, 2))
        module[3].to(memory_format=torch.channels_last) if value else None
        module[0].weight.requires_grad_(False)
        with torch.no_grad():
            for tensor in module.state_dict().values():
                tensor.copy_(torch.randn(tensor.shape) + value) if tensor.is_floating_point() else tensor.fill_(value)
        return module

    torch.manual_seed(0)
    models = [model(v) for v in (0, 1, 2)]
    expected = {name: t.clone() for name, t in models[0].state_dict().items()}
    raise_any(attach_all(models))
    for m in models:
        assert all(torch.equal(t, expected[name]) for name, t in m.state_dict().items())


def test_a_rank_that_never_comes_is_a_peer_error():
    network = Network(2, deliver_at_once=True)
    model = nn.Linear(1, 1)
    with pytest.raises(PeerError, match=r"Silent: \[1\]"):
        lasgd.attach(
            model,
            torch.optim.SGD(model.parameters(), lr=0.1),
            samples=1,
            batch_size=1,
            start_timeout_s=0.2,
            group=network.group(0),
        )
    assert "PeerError" in network.reasons[0]  # and whoever comes late is told


def test_a_wire_format_is_refused_where_what_it_rounds_off_would_be_lost():
    model = small_model()
    with pytest.raises(ConfigurationError, match=r"local_sgd would lose .* It is for lasgd"):
        alone(model, torch.optim.SGD(model.parameters(), lr=0.1), wire="int8", algorithm="local_sgd")


def test_what_is_no_module_is_refused():
    optimizer = torch.optim.SGD(small_model().parameters(), lr=0.1)
    with pytest.raises(ConfigurationError, match=r"model should be a torch\.nn\.Module, got str"):
        lasgd.attach("model", optimizer, samples=100, batch_size=4)  # type: ignore[arg-type]
