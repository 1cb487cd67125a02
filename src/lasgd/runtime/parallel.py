"""Gradients that are averaged during the backward pass, by torch's DistributedDataParallel (DDP).

DDP puts the gradients into buckets and hands each over as soon as it is full, while the backward pass goes on:

    training thread   forward | backward ...  bucket 0 ....  bucket 1 |  waits  | gradients = mean | optimizer
                                              starts         starts             ^
    reducer                                     ~~~ all-reduce ~~~  ~~~~~~~~~~~~~ settles the last

 1. The hook, on the thread of the backward pass, starts the bucket's all-reduce over the group's lane and returns a
    future. Hooks run in the order of the buckets, the same on all ranks.
 2. The reducer, a thread, waits for the all-reduces in that order and settles the futures. It is not the communicator,
    whose headers may take longer than a bucket where they queue behind one.
 3. DDP ends the backward pass when all are settled, so what the reducer wrote before is there to be read.
 4. What goes wrong is the communicator's failure, noted before the future is settled. It is settled all the same: the
    backward pass ends, with gradients that mean nothing, and the failure is raised by the optimizer's hook, before
    anybody uses them.
"""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lasgd.algorithms.requests import Contribution, Failure, Mean
from lasgd.errors import ConfigurationError, PeerError, ProtocolError
from lasgd.group.base import Lane
from lasgd.group.gloo import give_up
from lasgd.layout import Section
from lasgd.replica import Replica
from lasgd.runtime.communicator import Communicator, Record


class MeanGradients(Replica):
    """A replica whose gradients already are the mean of all ranks' when its backward pass has ended."""

    @torch.no_grad()
    def gradient(self) -> Contribution:
        """Nothing but the weight, 0 where something is NaN or Inf: then it is on every rank."""
        (window,) = self._windows
        parameters = [*window.live(Section.EXACT), *window.live(Section.COARSE)]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None and parameter.numel()]
        return Contribution(_NOTHING, weight=float(_is_finite(gradients)), is_gradient=True)

    def set_gradient(self, outcome: Mean | Failure) -> None:
        """Nothing: the mean is there, and buffers are rank 0's, which DDP broadcasts at the next forward pass."""


_NOTHING = torch.empty(0)


def _is_finite(tensors: list[Tensor]) -> bool:
    """Neither NaN nor Inf, within one pass over the memory: plain DDP does not ask, and must not win by that."""
    if all(tensor.is_cuda for tensor in tensors):
        extremes = torch._foreach_norm(tensors, math.inf)  # few kernels; on a CPU it is slow
    else:
        extremes = [extreme for tensor in tensors for extreme in torch.aminmax(tensor)]  # NaN where anything is
    return bool(torch.stack([extreme.double() for extreme in extremes]).isfinite().all())


@dataclass
class Bucket:
    """One bucket of gradients on its way."""

    tensor: Tensor  # flat, DDP's own; the sum when settled
    future: torch.futures.Future[Tensor]
    started: Any  # what the lane waits for, or the PeerError for which it could not start
    ready_s: float
    on_settled: Callable[[Bucket], None]

    def settle(self) -> None:
        """Reducer: the backward pass may go on. Once only."""
        self.on_settled(self)
        self.future.set_result(self.tensor)


class Reducer(threading.Thread):
    """Waits for the buckets' all-reduces, in their order. Begins with the first one."""

    def __init__(self, lane: Lane, communicator: Communicator, record: Record):
        super().__init__(name="lasgd-reducer", daemon=True)
        self._lane, self._communicator, self._record = lane, communicator, record
        self._handed: queue.SimpleQueue[Bucket | None] = queue.SimpleQueue()
        self._ended = threading.Event()

    def hand_over(self, bucket: Bucket) -> None:
        """Training thread, within the backward pass: the bucket is settled in any case."""
        self._handed.put(bucket)
        if self.ident is None:
            self.start()
        if self._ended.is_set():  # either `run` has seen the bucket, or this does
            self._settle_rest()

    def finish(self) -> None:
        """Training thread: nothing is averaged any more. May be called twice."""
        self._handed.put(None)

    def run(self) -> None:
        """The thread's body."""
        while (bucket := self._handed.get()) is not None:
            begin_s = time.monotonic()
            if self._communicator.failure is None:
                self._guard(lambda bucket=bucket: self._wait_reduced(bucket))
            bucket.settle()
            self._guard(lambda begin_s=begin_s: self._record("round", begin_s, time.monotonic()))
        self._ended.set()
        self._settle_rest()

    def _guard(self, action: Callable[[], None]) -> None:
        """The action; what it raises becomes the failure, and the buckets to come are settled all the same."""
        try:
            action()
        except PeerError as error:
            self._communicator.fail(PeerError(f"{self._communicator.where()}: {error}"))
        except BaseException as error:  # whatever it is, the training thread must hear of it
            wrapped = ProtocolError(f"{self._communicator.where()}: the reducer: {type(error).__name__}: {error}")
            wrapped.__cause__ = error
            self._communicator.fail(wrapped)

    def _wait_reduced(self, bucket: Bucket) -> None:
        if isinstance(bucket.started, PeerError):
            raise bucket.started
        self._lane.wait_all_reduce(bucket.started)

    def _settle_rest(self) -> None:
        while True:
            try:
                bucket = self._handed.get_nowait()
            except queue.Empty:
                return
            if bucket is not None:
                bucket.settle()


class ParallelModel:
    """A model within DDP, and what its driver has to know of each backward pass.

    Used by the training thread, but for `Bucket.settle`.
    """

    def __init__(
        self,
        model: nn.Module,
        lane: Lane,
        communicator: Communicator,
        record: Record,
        world_size: int,
        timeout_s: float,
        start_timeout_s: float,
    ):
        """On all ranks, with equal models. `start_timeout_s` holds for the first step."""
        self.before_bucket: Callable[[], None] = lambda: None
        """Called when a bucket is full, before its all-reduce starts; may sleep."""
        self.waited_s = 0.0
        """Seconds in which the training thread has stood still for the network, within forward and backward passes."""
        self._model, self._lane, self._communicator = model, lane, communicator
        self._reducer = Reducer(lane, communicator, record)
        self._world_size, self._timeout_s, self._present_timeout_s = world_size, timeout_s, start_timeout_s
        self._waits: list[tuple[float, float]] = []  # since the latest local step
        self._is_reduced = False
        self._forward_begin_s: float | None = None  # while DDP is at work before the model's own forward pass
        self._is_closed = False
        self.module = _Ddp(model, lane, self._forward)
        # The method carries no annotations because DDP compares them with classes, and here they would be strings.
        self.module.register_comm_hook(None, self._reduce)
        first = next(parameter for parameter in model.parameters() if parameter.requires_grad)
        self._handles = [
            # Ahead of the model's own hooks, whose errors would be taken for those of DDP.
            model.register_forward_pre_hook(_Hook(self._model_begins), prepend=True),
            # One parameter stands for all, for a hook on each would cost time; DDP's comes after this one. So what a
            # rank adds by itself is missed where its loss leaves out just this parameter.
            first.register_post_accumulate_grad_hook(_Hook(self._gradient_grows)),
        ]

    def take_waits(self) -> list[tuple[float, float]]:
        """(begin_s, end_s) of each time of standing still since the latest call, at a complete gradient.

        Raises ConfigurationError if the gradient is not the ranks' mean.
        """
        if not self._is_reduced:
            raise ConfigurationError(
                "this local step's gradients have not been averaged. With ddp=True call averaging.model(x) instead of "
                "model(x), outside of no_sync() for the last micro-batch, and let every trainable parameter take part "
                "in the loss (requires_grad_(False) before lasgd.attach takes the others out)"
            )
        if self._present_timeout_s != self._timeout_s:
            self._present_timeout_s = self._timeout_s
            self._lane.set_timeout(self._timeout_s)
        waits, self._waits, self._is_reduced = self._waits, [], False
        return waits

    def finish(self) -> None:
        """From now on gradients are this rank's own: there is no local step left to take. May be called twice."""
        self._reducer.finish()

    def close(self) -> None:
        """From now on the module is the model alone. May be called twice."""
        if self._is_closed:
            return
        self._is_closed = True
        self.finish()
        for handle in self._handles:
            handle.remove()
        # Gloo's connections close, and the other ranks hear of it, with the last reference to the process group. To
        # give it up may take until a collective has ended that is on its way; so a thread does.
        give_up(self.module.given_up())

    def wait_ended(self, timeout_s: float) -> None:
        """After `close`, and after the group has been left: until no bucket is waited for any more."""
        if self._reducer.ident is not None:
            self._reducer.join(timeout_s)

    def _forward(self, ddp_forward: Callable[..., Any], *inputs: Any, **kwargs: Any) -> Any:
        if self._is_closed:
            return self._model(*inputs, **kwargs)
        begin_s = self._forward_begin_s = time.monotonic()
        try:
            return ddp_forward(*inputs, **kwargs)
        except RuntimeError as error:
            if self._forward_begin_s is None or "Expected to have finished reduction" in str(error):
                raise  # the model's own, or DDP's about the model
            if self._communicator.failure is not None:
                raise self._communicator.failure from error
            failure = self._lane.failure(error, "DDP's broadcast", time.monotonic() - begin_s)
            raise PeerError(f"{self._communicator.where()}: {failure}") from error

    def _model_begins(self, *_: Any) -> None:
        begin_s, self._forward_begin_s = self._forward_begin_s, None
        if begin_s is None or not self.module.will_sync_module_buffers():
            return
        self._lane.wait_broadcast_rest(sum(buffer.nbytes for buffer in self.module.modules_buffers))
        self._note_wait(begin_s, time.monotonic())

    def _gradient_grows(self, _: Tensor) -> None:
        self._is_reduced = False

    def _reduce(self, state, bucket):
        self.before_bucket()
        tensor = bucket.buffer().div_(self._world_size)
        future = torch.futures.Future(devices=[tensor.device] if tensor.is_cuda else [])
        ready_s = time.monotonic()
        try:
            started = self._lane.start_all_reduce(tensor, self._present_timeout_s)
        except PeerError as error:
            started = error
        is_last = bucket.is_last()
        self._is_reduced = is_last
        on_settled = self._note_settled if is_last else lambda bucket: None
        self._reducer.hand_over(Bucket(tensor, future, started, ready_s, on_settled))
        return future

    def _note_settled(self, last: Bucket) -> None:
        self._note_wait(last.ready_s, time.monotonic())

    def _note_wait(self, begin_s: float, end_s: float) -> None:
        self._waits.append((begin_s, end_s))
        self.waited_s += end_s - begin_s


class _Hook:
    """A hook on a model that its copies, deep and stored, are rid of: copying ours would copy threads and sockets."""

    def __init__(self, action: Callable[..., None]):
        self._action = action

    def __call__(self, *inputs: Any) -> None:
        self._action(*inputs)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Hook, (_nothing,)


def _nothing(*_: Any) -> None:
    pass


class _Ddp(DistributedDataParallel):
    """DDP as it comes, over a lane, with somebody who looks after its forward pass."""

    def __init__(self, model: nn.Module, lane: Lane, forward: Callable[..., Any]):
        super().__init__(model, process_group=lane.process_group, init_sync=False)  # attach has broadcast the model
        self._look_after, self._backend = forward, lane.backend

    def given_up(self) -> list[Any]:
        """All that refers to the process group, for `give_up`; what is left is a wrapper that never calls DDP again."""
        return [vars(self).pop(name, None) for name in ("_backend", "process_group", "logger", "reducer")]

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        return self._look_after(super().forward, *inputs, **kwargs)
