"""What `lasgd.attach` returns: the averaging of one rank, as its training loop sees it."""

from __future__ import annotations

import atexit
import functools
import os
import sys
import time
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lasgd.algorithms.registry import Algorithm
from lasgd.algorithms.requests import (
    AllReduceMean,
    Answer,
    Begin,
    Box,
    ExchangeEnded,
    Failure,
    Gradient,
    Join,
    Mean,
    Message,
    Receive,
    Send,
    Stop,
    Update,
)
from lasgd.errors import ConfigurationError, PeerError, ProtocolError
from lasgd.group.base import Group, Lane, Mail
from lasgd.pace import End, Pace
from lasgd.replica import Replica
from lasgd.runtime.broadcast import wait_broadcast
from lasgd.runtime.communicator import Communicator, Record
from lasgd.runtime.exchanger import Exchanger
from lasgd.runtime.hooks import OptimizerHooks
from lasgd.runtime.means import KeptMean, MeanKeeper
from lasgd.runtime.parallel import ParallelModel
from lasgd.runtime.phase import Phase, PhaseTable
from lasgd.runtime.postbox import LOOK_S, Postbox
from lasgd.wire import CodedMean, Wire

STATE_VERSION = 1

CLOSE_S = 2.0
"""Longest wait of `close` for the communicator, which has been told to leave; it is a daemon and delays no exit."""


class Averaging:
    """The averaging of one rank. Made by `lasgd.attach`; used by one thread, the one that trains.

    Errors of the background (a lost rank, divergence) are raised by the optimizer's step, at the next step boundary,
    or when the `with` block ends.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: list[Optimizer],
        algorithm: Algorithm,
        group: Group,
        replica: Replica,
        pace: Pace,
        keep_mean: bool,
        timeout_s: float,
        start_timeout_s: float,
        lane: Lane | None = None,
        mail: Mail | None = None,
        wire: Wire | None = None,
    ):
        self.pace = pace
        """What the ranks agree on. Read only."""
        self.tally = replica.tally
        """What this rank counts about itself. Read only."""
        self.replica = replica
        self.group = group
        self.first_step_s: float | None = None
        """time.monotonic() when the loop began: entering the `with` block."""
        self._model, self._optimizers, self._algorithm = model, optimizers, algorithm
        self._timeout_s, self._start_timeout_s = timeout_s, start_timeout_s
        self._phase = PhaseTable(f"rank {group.rank} of {group.world_size}")
        self._means = MeanKeeper(replica.layout.size, replica.layout.dtype)
        if keep_mean:
            self._means.keep()
        self._recorders: list[Record] = []
        self._coded: CodedMean | None = None
        if wire is not None:
            position = group.members.index(group.rank)
            self._coded = CodedMean(wire, position, len(group.members), replica.parameters())
            if replica.keeps_mean and replica.layout.device.type == "cpu":
                replica.share_mean(self._coded.latest)
        self._communicator = Communicator(
            algorithm.communicate(replica, pace) if algorithm.communicate else None,
            group,
            replica,
            pace,
            self._phase,
            self._means,
            timeout_s,
            start_timeout_s,
            self._record,
            lane,
            serves_after=algorithm.writes_messages,
            coded=self._coded,
        )
        self._mail, self._postbox, self._exchanger = mail, None, None
        if mail is not None:
            self._postbox = self._opened(mail, Box.COMPUTE)
        if mail is not None and algorithm.exchange is not None:
            self._exchanger = Exchanger(
                algorithm.exchange(replica, pace),
                self._opened(mail, Box.EXCHANGE),
                pace,
                self._communicator,
                self._record,
                group.rank,
            )
        self._parallel: ParallelModel | None = None
        if lane is not None:
            self._parallel = ParallelModel(
                model, lane, self._communicator, self._record, group.world_size, timeout_s, start_timeout_s
            )
        self.model: nn.Module = self._parallel.module if self._parallel else model
        """What the loop calls: the model itself, or DistributedDataParallel around it where `ddp=True` asks for it."""
        self._compute = algorithm.compute(replica, pace)
        self._request: Any = None
        self._since_s = 0.0  # when the training thread began what it is computing now
        self._has_waited = False  # within the present local step
        self._is_mean = False  # the replica is the mean of all, until the next update
        self._late: AllReduceMean | None = None  # with DDP: the request that goes out after the update
        self._pid = os.getpid()
        self._is_averaged = False
        self._digests = 0
        self._replicas_delivered = 0
        self._deliver_replica: Callable[[KeptMean], None] | None = None
        self._hooks = OptimizerHooks(optimizers, self._gradient_is_there, self._step_is_done)
        replica.on_recovery = self._forget_optimizer_state
        # Whoever never closes is closed at exit: before the interpreter is torn down, for a thread that comes back
        # from native code into one that is may end the process by SIGABRT; and so that the others hear of it.
        self._at_exit = functools.partial(_close_at_exit, weakref.ref(self))
        atexit.register(self._at_exit)

    # How far the run is

    @property
    def finished(self) -> bool:
        """The end is agreed: leave the loop. The last exact average is taken when the `with` block ends."""
        return self.pace.end is not None

    @property
    def progress(self) -> float:
        """Share of the budget that all ranks together have processed, 0 to 1, as of the latest round."""
        return self.pace.progress

    @property
    def checkpoint_due(self) -> int:
        """Number of the newest checkpoint that all ranks have agreed to cut; 0: none yet."""
        return self.pace.checkpoint

    @property
    def rank(self) -> int:
        """This rank."""
        return self.group.rank

    @property
    def writes_messages(self) -> bool:
        """The ranks write to each other, and no round brings the mean of the replicas before the end."""
        return self._algorithm.writes_messages

    @property
    def world_size(self) -> int:
        """How many ranks there are."""
        return self.group.world_size

    # The loop

    def start(self) -> None:
        """Begins; entering the `with` block does it. Rounds begin with the first complete gradient.

        Whoever begins by hand calls `wait_end` and `close`; a process that ends without is closed, as after an error.
        """
        self._phase.move("start", 0)
        self._request = next(self._compute)
        self.first_step_s = self._since_s = time.monotonic()
        self.tally.start_clock(self.first_step_s)
        self._communicator.start()
        if self._exchanger is not None:
            self._exchanger.start()

    def step_boundary(self) -> None:
        """Marks a step boundary by hand, where no hook does: a CUDA-graphed step, a hand-written update.

        Like the hooks, does nothing once closed.
        """
        if self._phase.now is Phase.CLOSED:
            return
        self._hooks.boundary()

    def stop(self) -> None:
        """Asks all ranks to end early, in the same round. `finished` becomes true when they have agreed."""
        self.tally.wants_stop = True
        self._communicator.begin()

    def on_record(self, record: Record) -> None:
        """Calls record(kind, begin_s, end_s) for each `round` (communicator's thread) and `compute` step (this one)."""
        self._recorders.append(record)

    def on_bucket(self, wait: Callable[[], None]) -> None:
        """With DDP: calls `wait()` when a bucket of gradients is full, before its all-reduce begins; else nothing."""
        if self._parallel is not None:
            self._parallel.before_bucket = wait

    @property
    def waited_within_passes_s(self) -> float:
        """Seconds in which forward and backward passes have stood still for the network; only with DDP above 0."""
        return self._parallel.waited_s if self._parallel is not None else 0.0

    def on_replica(self, deliver: Callable[[KeptMean], None]) -> None:
        """Calls deliver(own) at the step boundary after each of `evaluations` parts of the budget, on the training
        thread: this rank's own replica then, a copy."""
        self._deliver_replica = deliver

    def on_evaluation(self, deliver: Callable[..., None]) -> None:
        """Calls deliver(KeptMean) on the communicator's thread after each of `evaluations` parts of the budget."""
        self._means.deliver_evaluations(deliver)

    def _gradient_is_there(self) -> None:
        if os.getpid() != self._pid:
            return  # a forked worker inherits the hooks, not the averaging
        if self._phase.now is Phase.READY:
            raise ConfigurationError("a step before the averaging has started: put the loop into `with averaging:`")
        if self._request is None and not self.replica.is_frozen:
            raise ConfigurationError(
                f"rank {self.rank}: a local step after the agreed end, which {self._algorithm.name} cannot take back. "
                "Leave the loop when averaging.finished"
            )
        if isinstance(self._request, Gradient):
            self._begin()
            if self._parallel is not None:
                self._raise_failure()  # the gradients mean nothing then
                *earlier, last = self._parallel.take_waits()  # the last is that of the backward pass
                for begin_s, end_s in earlier:
                    self._count_wait("update", begin_s, end_s)
                self._count_wait("compute", *last)
            self._advance()  # to the Update, or past the end, if it is agreed meanwhile: then x will be replaced
        if not isinstance(self._request, Update | None):
            raise ProtocolError(
                f"rank {self.rank}: the algorithm asked for {self._request!r} between gradient and update"
            )

    def _step_is_done(self, skipped: int) -> None:
        if os.getpid() != self._pid:
            return
        self._raise_failure()
        now_s = time.monotonic()
        self.tally.count_step(now_s)
        self.tally.samples -= skipped * self.tally.batch_size
        self._record("update" if self._has_waited else "compute", self._since_s, now_s)
        self._since_s, self._has_waited = now_s, False
        if self._request is not None:
            self._advance()
        if self._late is not None and self._request is not None:
            self._communicator.ask(self._late)  # travels while the next step computes
        if self._deliver_replica is not None and self.pace.evaluation > self._replicas_delivered:
            self._replicas_delivered = self.pace.evaluation
            own = KeptMean(self.replica.parameters(), self.pace.samples, time.monotonic(), self.pace.evaluation)
            self._deliver_replica(own)

    def _begin(self) -> None:
        self._communicator.begin()
        if self._exchanger is not None:
            self._exchanger.begin()

    def _advance(self) -> None:
        """Drives `compute` on to a Gradient or an Update; what it asks for in between may make this rank wait."""
        try:
            request = self._compute.send(None)
            while not isinstance(request, Gradient | Update):
                request = self._compute.send(self._answer(request))
        except StopIteration:
            request = None
            self._communicator.finish()
            if self._parallel is not None:
                self._parallel.finish()
        if self._is_mean and isinstance(request, Gradient):
            self._is_mean = False
            if self._means.is_wanted(self.pace):
                self._means.take(0, self.replica.parameters(), self.pace)
        self._request = request

    def _answer(self, request: Any) -> Answer:
        if isinstance(request, AllReduceMean):
            return self._wait_mean(request)
        if isinstance(request, Begin):
            return self._communicator.ask(request.request, keeps_mean=True)
        if isinstance(request, Join):
            return self._wait_arrival()
        if isinstance(request, Send) and self._postbox is not None:
            return self._postbox.send(request)
        if isinstance(request, Receive) and self._postbox is not None:
            return self._wait_message(request, self._postbox)
        if isinstance(request, ExchangeEnded):
            return self._wait_exchange_ended()
        raise ProtocolError(f"rank {self.rank}: the training thread cannot answer {type(request).__name__}")

    def _wait_mean(self, request: AllReduceMean) -> Mean | Failure:
        if self._parallel is None or self._late is None:
            self._communicator.ask(request)
        outcome = self._wait_arrival(is_after_the_end=request.exact)
        if self._parallel is not None:
            # The mean is there; only what the ranks say of themselves travels. It is said after the update, and heard
            # at the next gradient, so that nobody waits for it. All ranks do so, and hear in the same step what they
            # would have heard, had they said it at that gradient: the counts are of complete steps either way.
            self._late = request
        self._is_mean = not request.exact
        return outcome

    def _wait_arrival(self, is_after_the_end: bool = False) -> Mean | Failure:
        begin_s = time.monotonic()
        was_there = self._communicator.has_answer
        outcome = self._communicator.wait_answer()
        self._raise_failure()
        if not was_there and not is_after_the_end:
            self._has_stood_still(begin_s)
        return outcome

    def _wait_message(self, request: Receive, postbox: Postbox) -> Message | Stop:
        begin_s = time.monotonic()
        try:
            answer = postbox.wait_receive(request)
        except PeerError as error:
            self._communicator.fail(error)
            raise
        self._raise_failure()
        self._has_stood_still(begin_s)
        return answer

    def _wait_exchange_ended(self) -> None:
        """Ends because the end is agreed, at which exchanges end, each within its time-out."""
        while self._exchanger is not None and not self._exchanger.ended.wait(LOOK_S):
            self._raise_failure()
        self._raise_failure()

    def _has_stood_still(self, begin_s: float) -> None:
        """Counts the time since `begin_s` as waiting, within a local step or between two."""
        if self.end_agreed_s is not None and begin_s >= self.end_agreed_s:
            return
        now_s = time.monotonic()
        if isinstance(self._request, Gradient):  # within a local step, whose first part ends here
            self._count_wait("update" if self._has_waited else "compute", begin_s, now_s)
            return
        self.tally.start_clock(now_s)
        self.tally.waited_s += now_s - begin_s
        self._record("wait", begin_s, now_s)
        self._since_s = now_s

    def _count_wait(self, before: str, begin_s: float, end_s: float) -> None:
        """A time of standing still within a local step, and `before`: the kind of what this rank did until then."""
        self.tally.waited_s += end_s - begin_s
        self._record(before, self._since_s, begin_s)
        self._record("wait", begin_s, end_s)
        self._since_s, self._has_waited = end_s, True

    # The end

    def __enter__(self) -> Averaging:
        """Starts, unless `start` has been called. Raises ConfigurationError once closed."""
        if self._phase.now is Phase.CLOSED:
            raise ConfigurationError("this averaging is closed; call lasgd.attach again for another run")
        if self._phase.now is Phase.READY:
            self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """Waits for the agreed end and shows the last exact average; after an error, or `close`, leaves at once."""
        try:
            if error is None and self._phase.now is not Phase.CLOSED:
                self.wait_end()
        except BaseException as failure:
            self.close(f"{type(failure).__name__}: {failure}")
            raise
        self.close(None if error is None else f"{type(error).__name__}: {error}")

    def wait_end(self) -> None:
        """Takes no more local steps, answers the others until the agreed end, and shows the last exact average.

        Ends because rounds do: a round that is not finished within timeout_s becomes the PeerError raised here.
        Afterwards every replica is identical, if the end was not an early one (`stop`) and the algorithm averages.
        """
        if self._is_averaged:
            return
        if self._phase.now in (Phase.READY, Phase.CLOSED):
            now = self._phase.now.value
            raise ConfigurationError(f"wait_end comes between start and close; this averaging is {now}")
        begin_s = time.monotonic()
        self.tally.has_left = True
        if not self._algorithm.agrees and self.pace.end is None:
            self.pace.count_alone(self.tally)
        self._begin()
        if self._algorithm.communicate is None or self._algorithm.writes_messages:
            self._answer_without_steps()
            begin_s = time.monotonic()
        while not self._communicator.ended.wait(1.0):
            if not self._communicator.is_alive() and not self._communicator.ended.is_set():
                raise ProtocolError(f"rank {self.rank}: the communicator's thread is gone")
        self._raise_failure()
        if self.pace.end in (End.SAMPLES, End.LEFT):
            self.replica.show_average()
            if self._parallel is not None:  # which leaves each rank what its last forward pass did to its buffers
                wait_broadcast(self.group, self._model.buffers(), self._timeout_s)
        self._is_averaged = True
        # Before the agreed end this was waiting; after it there is nothing left to do.
        self.tally.waited_s += max(0.0, (self._communicator.end_agreed_s or begin_s) - begin_s)

    def _answer_without_steps(self) -> None:
        """For a rank that takes no more steps: does what others wait for until the agreed end, and takes part in it."""
        if self._request is not None and not self._algorithm.lets_ranks_leave:
            raise ConfigurationError(
                f"rank {self.rank} of {self.world_size}: its loop has ended after {self.tally.samples:,} samples, but "
                f"{self._algorithm.name} needs every rank in every step until the agreed end. Loop over the data until "
                "averaging.finished"
            )
        if not self._algorithm.goes_on_without_steps:
            while self.pace.end is None and not self._communicator.ended.wait(LOOK_S):
                self._raise_failure()
        while self._request is not None:
            self._raise_failure()
            self._advance()

    def wait_identical(self, timeout_s: float) -> bool:
        """Compares the SHA-256 of what is averaged over all ranks; after `wait_end`, on all ranks."""
        digest = self.replica.layout.content_digest().encode()
        self._digests += 1
        return len(set(self.group.wait_exchange(f"digest/{self._digests}", digest, timeout_s))) == 1

    def close(self, reason: str | None = None) -> None:
        """Leaves at once and gives everything back; may be called twice. The others are told the `reason`."""
        if self._phase.now is Phase.CLOSED or os.getpid() != self._pid:
            return
        was_started = self._phase.now is not Phase.READY
        if reason is None and was_started and not self._communicator.ended.is_set():
            reason = "its averaging was closed before the agreed end"
        atexit.unregister(self._at_exit)
        self._hooks.remove()
        if self._parallel is not None:
            self._parallel.close()
        self._communicator.close()
        if self._exchanger is not None:
            self._exchanger.close()
        self._phase.move("close", self.pace.round)
        self._compute.close()
        self.group.leave(reason)  # a collective on its way fails by it, so that the communicator ends soon
        if was_started:
            self._communicator.join(CLOSE_S)
        if self._parallel is not None:
            self._parallel.wait_ended(CLOSE_S)
        if self._exchanger is not None and was_started:
            self._exchanger.join(CLOSE_S)
        if self._mail is not None and not (self._exchanger is not None and self._exchanger.is_alive()):
            self._mail.leave()

    def _opened(self, mail: Mail, box: Box) -> Postbox:
        def is_over() -> bool:
            return self._communicator.failure is not None or self._phase.now is Phase.CLOSED

        return Postbox(mail, box, self.pace, is_over, self._timeout_s, self._communicator.where)

    @property
    def bytes_sent(self) -> int:
        """Payload bytes that this rank has put on the wire, in all-reduces and messages."""
        return self.group.bytes_sent + (self._mail.bytes_sent if self._mail is not None else 0)

    @property
    def end_agreed_s(self) -> float | None:
        """time.monotonic() of the round in which the end was agreed."""
        return self._communicator.end_agreed_s

    # Weights and state

    def mean_weights(self) -> dict[str, Tensor]:
        """A state dict of the mean of the replicas, a copy, for evaluation; what is not averaged is this rank's.

        The mean is that of the latest cycle of rounds. The first call, unless `keep_mean=True`, waits for one cycle,
        at most timeout_s, and counts as waiting; none after it does.
        """
        if self._is_averaged and self.pace.end is not End.STOP:
            return self._state_with(None)
        if self._algorithm.writes_messages:
            raise ConfigurationError(
                f"{self._algorithm.name} has no mean of all replicas before the agreed end; evaluate this rank's model"
            )
        begin_s = time.monotonic()
        vector = self._means.wait_vector(self._timeout_s, self._communicator.ended.is_set)
        self.tally.waited_s += time.monotonic() - begin_s
        if vector is None:
            self._raise_failure()
            if self._communicator.ended.is_set():
                raise ConfigurationError(
                    f"rank {self.rank} of {self.world_size}: the run has ended, and no mean was kept. "
                    "Attach with keep_mean=True, or ask for mean_weights() earlier"
                )
            raise PeerError(
                f"rank {self.rank} of {self.world_size}: no whole mean has arrived within {self._timeout_s:g} s "
                f"({self.pace.round} rounds finished). Rounds begin when every rank has its first gradient"
            )
        return self._state_with(vector)

    @torch.no_grad()
    def _state_with(self, vector: Tensor | None) -> dict[str, Tensor]:
        return self.replica.layout.state_dict(self._model, vector)

    def state_dict(self) -> dict[str, Any]:
        """This rank's averaging, to be stored beside its model's and optimizers' state, at a step boundary.

        Every rank stores its own: replicas differ. The tensor is a copy.
        """
        residual = self.replica.wait_residual(self._timeout_s)
        if self._coded is not None:
            latest = self._coded.latest.clone()
        else:
            latest = self.replica.wait_latest_mean(self._timeout_s)
        return {
            "version": STATE_VERSION,
            "rank": self.rank,
            "world_size": self.world_size,
            "local_steps": self.tally.local_steps,
            "samples": self.tally.samples,
            "agreed_samples": self.pace.samples,
            "elapsed_s": self.pace.elapsed_s,
            "round": self.pace.round,
            "checkpoint": self.pace.checkpoint,
            "evaluation": self.pace.evaluation,
            "layout": self.replica.layout.digest(),
            "residual": residual,
            "is_sitting_out": self.replica.is_sitting_out,
            **({} if latest is None else {"latest_mean": latest}),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state_dict` was taken; on all ranks, each with its own, before the first local step.

        Load the model's and the optimizers' state yourself, after `attach`, which has broadcast rank 0's values.
        Raises ConfigurationError if the state is of another world size, rank, model or version.
        """
        if self.tally.local_steps or self._phase.now not in (Phase.READY, Phase.RUNNING):
            raise ConfigurationError("load_state_dict comes before the first local step")
        for key, now in (
            ("version", STATE_VERSION),
            ("world_size", self.world_size),
            ("rank", self.rank),
            ("layout", self.replica.layout.digest()),
        ):
            if state.get(key) != now:
                raise ConfigurationError(
                    f"rank {self.rank}: this state cannot be resumed: its {key} is {state.get(key)!r}, "
                    f"here it is {now!r}"
                )
        self.replica.load_residual(state["residual"])
        if "latest_mean" in state:
            # Rank 0's on all ranks: each has stored its own at a moment of its own, between other rounds.
            latest = state["latest_mean"].clone()
            wait_broadcast(self.group, [latest], self._start_timeout_s)
            if self._coded is not None:
                self._coded.load(latest)
            if self.replica.keeps_mean:
                self.replica.load_latest_mean(latest)
        if state.get("is_sitting_out"):
            self.replica.sit_out()
        elapsed_s = state.get("elapsed_s", 0.0)
        self.tally.resume(state["local_steps"], state["samples"], state["checkpoint"], elapsed_s)
        self._replicas_delivered = state["evaluation"]
        self.pace.resume(state["round"], state["agreed_samples"], state["checkpoint"], state["evaluation"], elapsed_s)

    # Small things

    def _record(self, kind: str, begin_s: float, end_s: float) -> None:
        for record in self._recorders:
            record(kind, begin_s, end_s)

    def _raise_failure(self) -> None:
        failure = self._communicator.failure
        if failure is not None:
            raise failure

    def _forget_optimizer_state(self) -> None:
        for optimizer in self._optimizers:
            if isinstance(optimizer, torch.optim.Adagrad):  # makes its state once, at birth; the others when they step
                _restart_adagrad(optimizer)
            else:
                optimizer.state.clear()


def _close_at_exit(reference: weakref.ref[Averaging]) -> None:
    averaging = reference()
    if averaging is None:
        return
    # Set where an error that nobody caught is printed, so in an interactive session too, which then goes on.
    error = None if hasattr(sys, "ps1") else getattr(sys, "last_value", None)
    reason = "its process ended without closing the averaging"
    if error is not None:
        averaging.close(f"{reason}, after {type(error).__name__}: {error}")
    else:
        averaging.close(None if averaging.end_agreed_s is not None else reason)


def _restart_adagrad(optimizer: torch.optim.Adagrad) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter]["step"].zero_()
            optimizer.state[parameter]["sum"].fill_(group["initial_accumulator_value"])
