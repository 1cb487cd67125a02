"""`lasgd.attach`: from a model and its optimizer to an Averaging."""

from __future__ import annotations

import itertools
import json
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lasgd.algorithms import registry
from lasgd.errors import ConfigurationError
from lasgd.group.base import Group, GroupWithLane, GroupWithMail, GroupWithPieces, Lane, Mail
from lasgd.layout import Layout, check_no_element_twice, described, memory_key
from lasgd.merge import rule as merge_rule
from lasgd.pace import Pace
from lasgd.replica import Replica
from lasgd.runtime.averaging import Averaging
from lasgd.runtime.broadcast import wait_broadcast
from lasgd.runtime.hooks import check_optimizers
from lasgd.runtime.parallel import MeanGradients
from lasgd.tally import Tally
from lasgd.wire import wire as wire_named

LONGEST_TIMEOUT_S = 30 * 24 * 3600.0
"""Thirty days: far beyond it the system's clocks overflow."""


def attach(
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer],
    *,
    samples: int | None = None,
    seconds: float | None = None,
    batch_size: int,
    algorithm: str = "lasgd",
    merge: str = "full",
    wire: str = "fp32",
    fragments: int | Literal["auto"] = "auto",
    steps_per_round: float = 1.0,
    evaluations: int = 0,
    checkpoints: int = 0,
    keep_mean: bool = False,
    timeout_s: float = 60.0,
    start_timeout_s: float = 120.0,
    must_match: Mapping[str, Any] | None = None,
    ddp: bool = False,
    algorithm_settings: Mapping[str, Any] | None = None,
    group: Group | None = None,
) -> Averaging:
    """Averages `model` with the other ranks' in the background of an ordinary training loop.

    All ranks call it, with models of equal structure; rank 0's values are broadcast to the others. Use the result as a
    context manager around the loop, and leave the loop when `averaging.finished`:

        with lasgd.attach(model, optimizer, samples=1_000_000, batch_size=32) as averaging:
            for x, y in loader:
                loss_fn(model(x), y).backward()
                optimizer.step()
                optimizer.zero_grad()
                if averaging.finished:
                    break
        # here every replica is identical

    samples          the budget of all ranks together; the run ends for all in the round that finds it reached
    seconds          the budget in time since the start, instead of samples
    batch_size       samples of one local step of this rank (of all micro-batches, with gradient accumulation)
    algorithm        "lasgd", or another of docs/algorithms.md; "independent": no communication, the yardstick
    merge            merge rule, see lasgd.merge
    wire             how averages of "lasgd" travel: fp32, bf16 or int8, see lasgd.wire
    fragments        parts of the vector, one per round, for "lasgd"; "auto": as the network's delay asks, 1 (with outer
                     momentum 4) to 20
    steps_per_round  a round at most every so many local steps of the median rank, and one every 30 s; the H of others
    evaluations, checkpoints   how many equal parts of the budget `pace.evaluation` and `checkpoint_due` count
    keep_mean        hold the latest mean from the start, so that `mean_weights()` never waits for one
    timeout_s        seconds without a finished round after which the silent ranks are reported
    start_timeout_s  seconds to wait for all ranks to start, and for the first round
    must_match       settings of yours that have to be equal on all ranks
    ddp              "sync_sgd" by torch's DistributedDataParallel, during the backward pass: call `averaging.model(x)`
    algorithm_settings   the algorithm's own, in place of its defaults, such as {"outer_momentum": 0.8} of "lasgd",
                     with momentum 0.5 in the optimizers where it was 0.9
    group            who is in; default: the ranks that torchrun's environment names

    The optimizers keep their own state and may be any but LBFGS. Trainable parameters and persistent floating-point
    buffers are averaged, frozen parameters and integer buffers are not.

    Raises ConfigurationError for what cannot work on this rank, PeerError where ranks are missing or disagree; both
    before the first local step.
    """
    if not isinstance(model, nn.Module):
        raise ConfigurationError(f"model should be a torch.nn.Module, got {type(model).__name__}")
    optimizers = [optimizer] if isinstance(optimizer, Optimizer) else _as_list(optimizer)
    if (samples is None) == (seconds is None):
        raise ConfigurationError("give the budget as samples or as seconds: one of the two")
    _check_numbers(batch_size=batch_size, **({} if samples is None else {"samples": samples}))
    if seconds is not None:
        _check_range(1e-3, LONGEST_TIMEOUT_S, seconds=seconds)
    _check_numbers(least=0, evaluations=evaluations, checkpoints=checkpoints)
    _check_range(1e-9, 1e6, steps_per_round=steps_per_round)
    _check_range(1e-3, LONGEST_TIMEOUT_S, timeout_s=timeout_s, start_timeout_s=start_timeout_s)
    if fragments != "auto" and (not isinstance(fragments, int) or isinstance(fragments, bool) or fragments < 1):
        raise ConfigurationError(f"fragments should be 'auto' or a whole number from 1 on, got {fragments!r}")
    found = registry.find(algorithm, algorithm_settings)
    if ddp and not found.averages_gradients:
        raise ConfigurationError(
            f"ddp=True is for algorithms that average gradients, and {algorithm} averages replicas; leave it out"
        )
    wire_format = wire_named(wire)
    found.check_wire(wire)
    tally = Tally(batch_size)
    cut = fragments if found.takes_fragments else 1
    kind = MeanGradients if ddp else Replica
    first_cut = found.least_fragments if cut == "auto" else cut
    replica = kind(model, tally, first_cut, merge_rule(merge), keeps_mean=found.keeps_mean)
    check_optimizers(optimizers)
    found.check_momentum(
        max((group.get("momentum", 0.0) for one in optimizers for group in one.param_groups), default=0)
    )
    _check_parameters(model, optimizers)
    for name, tensor in unique_state(model).items():
        check_no_element_twice(name, tensor)
    if unnamed := [key for key in must_match or {} if not isinstance(key, str)]:
        raise ConfigurationError(f"must_match takes names of settings as keys, got {unnamed[0]!r}")

    if group is None:
        from lasgd.group import c10d

        group = c10d.connect(start_timeout_s)
    settings = {
        "samples": samples,
        "seconds": seconds,
        "algorithm": algorithm,
        "merge": merge,
        "wire": wire,
        "fragments": fragments,
        "steps_per_round": steps_per_round,
        "evaluations": evaluations,
        "checkpoints": checkpoints,
        "ddp": ddp,
        "algorithm_settings": {} if found.settings is None else asdict(found.settings),
        **(must_match or {}),
    }
    tally.rank = group.rank
    mail = None
    try:
        wait_equal_settings(group, settings, start_timeout_s)
        wait_equal_models(group, replica.layout.describe() + _describe_others(model, replica.layout), start_timeout_s)
        wait_broadcast(group, unique_state(model).values(), start_timeout_s)
        if wire_format is not None and not isinstance(group, GroupWithPieces):
            raise ConfigurationError(
                f"wire={wire!r} needs a group that moves pieces (lasgd.group.base), not {type(group).__name__}"
            )
        lane = _wait_lane(group, start_timeout_s) if ddp else None
        mail = _wait_mail(group, algorithm, start_timeout_s) if found.writes_messages else None
        return Averaging(
            model,
            optimizers,
            found,
            group,
            replica,
            Pace(
                *(group.world_size, samples, steps_per_round, cut, evaluations, checkpoints, seconds),
                least_fragments=found.least_fragments,
            ),
            keep_mean=keep_mean,
            timeout_s=timeout_s,
            start_timeout_s=start_timeout_s,
            lane=lane,
            mail=mail,
            wire=wire_format,
        )
    except BaseException as error:
        if mail is not None:
            mail.leave()
        group.leave(f"{type(error).__name__}: {error}")
        raise


def wait_equal_settings(group: Group, settings: Mapping[str, Any], timeout_s: float) -> None:
    """Raises the same ConfigurationError on all ranks if any setting differs between them."""
    all_settings = [json.loads(text) for text in group.wait_exchange("settings", _encode(settings), timeout_s)]
    for rank, theirs in zip(group.members, all_settings, strict=True):
        # The algorithm's last: they may follow from another setting, which is the one to name.
        for key in sorted(all_settings[0].keys() | theirs.keys(), key=lambda key: (key == "algorithm_settings", key)):
            ours = all_settings[0].get(key)
            if theirs.get(key) != ours:
                raise ConfigurationError(
                    f"ranks disagree on {key}: rank {group.members[0]} has {ours!r}, rank {rank} has "
                    f"{theirs.get(key)!r}. Start all ranks with the same settings"
                )


def wait_equal_models(group: Group, description: list[tuple[str, list[int], str]], timeout_s: float) -> None:
    """Raises the same ConfigurationError on all ranks if a parameter or buffer differs in name, shape or dtype."""
    models = [json.loads(text) for text in group.wait_exchange("model", _encode(description), timeout_s)]
    first, reference = group.members[0], models[0]
    for rank, model in zip(group.members, models, strict=True):
        if model == reference:
            continue
        counts = [sum(_elements(shape) for _, shape, _ in tensors) for tensors in (reference, model)]
        ours, theirs = next(pair for pair in itertools.zip_longest(reference, model) if pair[0] != pair[1])
        raise ConfigurationError(
            f"ranks disagree on the model: rank {first} has {counts[0]:,} elements, rank {rank} has "
            f"{counts[1]:,}. First difference: {_tensor(ours)} on rank {first}, {_tensor(theirs)} on rank {rank}. "
            "All replicas need the same model"
        )


def _describe_others(model: nn.Module, layout: Layout) -> list[tuple[str, list[int], str]]:
    """As `Layout.describe`, of what is broadcast at the start and not averaged: frozen parameters, integer buffers."""
    averaged = {memory_key(entry.tensor()) for entry in layout.entries}
    return [described(name, t) for name, t in unique_state(model).items() if memory_key(t) not in averaged]


def _wait_lane(group: Group, timeout_s: float) -> Lane:
    if not isinstance(group, GroupWithLane):
        raise ConfigurationError(f"ddp=True needs a group with a lane (lasgd.group.base), not {type(group).__name__}")
    return group.wait_lane(timeout_s)


def _wait_mail(group: Group, algorithm: str, timeout_s: float) -> Mail:
    if not isinstance(group, GroupWithMail):
        raise ConfigurationError(f"{algorithm} needs a group with mail (lasgd.group.base), not {type(group).__name__}")
    return group.wait_mail(timeout_s)


def unique_state(model: nn.Module) -> dict[str, Tensor]:
    """The model's live parameters and persistent buffers, tied ones once, under their first name."""
    state: dict[Hashable, tuple[str, Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor):
            state.setdefault(memory_key(tensor), (name, tensor))
    return dict(state.values())


def _as_list(optimizers: Any) -> list[Optimizer]:
    if not isinstance(optimizers, Sequence) or not optimizers:
        raise ConfigurationError(
            f"expected a torch.optim.Optimizer or several of them, got {type(optimizers).__name__}; "
            "a wrapper's inner optimizer will do"
        )
    return list(optimizers)


def _check_numbers(least: int = 1, **numbers: int) -> None:
    for name, value in numbers.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ConfigurationError(f"{name} should be a whole number from {least} on, got {value!r}")


def _check_range(least: float, most: float, **numbers: float) -> None:
    for name, value in numbers.items():
        if not isinstance(value, int | float) or isinstance(value, bool) or not least <= value <= most:
            raise ConfigurationError(f"{name} should be a number from {least:g} to {most:,.0f}, got {value!r}")


def _check_parameters(model: nn.Module, optimizers: list[Optimizer]) -> None:
    own = {id(p) for p in model.parameters()}
    for index, optimizer in enumerate(optimizers):
        strangers = [p for g in optimizer.param_groups for p in g["params"] if id(p) not in own]
        if strangers:
            raise ConfigurationError(
                f"optimizer {index} updates {len(strangers)} parameters that are not in the model, the first of shape "
                f"{tuple(strangers[0].shape)}: they would not be averaged. Attach a module that holds them all, "
                "for example nn.ModuleList([model, loss])"
            )


def _encode(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, default=str).encode()


def _elements(shape: list[int]) -> int:
    return torch.Size(shape).numel()


def _tensor(described: Sequence[Any] | None) -> str:
    if described is None:
        return "nothing more"
    name, shape, dtype = described
    return f"{name!r} {dtype} {tuple(shape)}"
