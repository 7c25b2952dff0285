"""The TAID scheduler: one named actor per run that owns t, and the workers' client to it.

The actor may be killed at any moment. Ray restarts it empty; every worker's heartbeat carries the newest result that
worker knows, and an unanswered report is sent again, so the state comes back bit for bit and no step counts twice.
"""

import asyncio
import math
import pickle
import threading
import time
from contextlib import suppress
from typing import Any, NamedTuple

import ray
from ray.actor import ActorHandle
from ray.exceptions import ActorDiedError, ActorUnavailableError, GetTimeoutError, RayError, RayTaskError

from taid_ray.aggregate import LossAggregator, LossSums, StepResult
from taid_ray.config import ScheduleConfig
from taid_ray.errors import AttemptError, ClusterError
from taid_ray.schedule import TAIDSchedule

HEARTBEAT_S = 1.0
GONE_S = 10.0
"""So long after its death an actor that Ray restarts is back, or on its way back."""
NAME_FREE_S = 60.0
"""Within this time Ray ends the actors of a driver that was killed."""
POOL_POLL_S = 10.0
NAMESPACE = "taid-ray"


class Report(NamedTuple):
    """What a rank says after a step; pickled, it is what `SchedulerActor.report` takes."""

    attempt: int
    world_size: int
    known: StepResult
    """The newest result the sender has; it brings a restarted actor back to where the run stands."""
    step: int
    rank: int
    sums: LossSums


class SchedulerActor:
    """Async, so that reports of one step wait inside it while others arrive."""

    def __init__(self, config: ScheduleConfig, total_steps: int):
        schedule = TAIDSchedule(
            config.t_start, config.t_end, config.alpha, config.beta, total_steps, config.mode, config.gain
        )
        self.aggregator = LossAggregator(schedule, config.signal)
        self._changed = asyncio.Event()
        self._failure: Exception | None = None
        self._notes: list[str] = []
        self._first_note = 0
        self._metrics: dict[str, Any] = {}
        self._validations: list[dict[str, Any]] = []
        self._packed: tuple[StepResult, bytes] | None = None
        self._pool: tuple[bool, Exception | None] = (False, None)

    async def begin(self, world_size: int) -> int:
        """Rank 0 draws a new attempt. Wall-clock based, so that it stays newer even across a restart of this actor."""
        attempt = max(self.aggregator.attempt + 1, time.time_ns())
        self.aggregator.begin(attempt, world_size, None)
        self._failure, self._metrics = None, {}
        self._wake()
        return attempt

    async def report(self, message: bytes) -> bytes:
        """A pickled Report in, a pickled StepResult out, once every rank has reported the step or somebody's `known` shows
        that it was finished already.

        Bytes, because all ranks wait while Ray handles one after another: with six objects in and one out a report costs
        half as much again (benchmarks/scheduler.py).
        """
        report: Report = pickle.loads(message)
        result = await self._result_for(report)
        if self._packed is None or self._packed[0] is not result:
            self._packed = (result, pickle.dumps(result))
        return self._packed[1]

    async def _result_for(self, report: Report) -> StepResult:
        attempt, world_size, known, step, rank, sums = report
        await self.heartbeat(attempt, world_size, known)
        try:
            result = self.aggregator.report(attempt, step, rank, sums)
        except ArithmeticError as error:
            self._failure = error
            self._wake()
            raise
        if result is not None:
            self._wake()
        while result is None:
            await self._change()
            if self._failure is not None:
                raise self._failure
            if self.aggregator.attempt != attempt or self.aggregator.result.step >= step:
                result = self.aggregator.report(attempt, step, rank, sums)
        return result

    async def heartbeat(self, attempt: int, world_size: int, result: StepResult) -> None:
        before = (self.aggregator.attempt, self.aggregator.result.step)
        self.aggregator.seed(attempt, world_size, result)
        if before != (self.aggregator.attempt, self.aggregator.result.step):
            self._wake()

    async def current(self, attempt: int, world_size: int) -> StepResult:
        """The newest result of `attempt`, which rank 0 has begun."""
        if self.aggregator.attempt < attempt:  # this actor was restarted since, and nobody has a result yet
            self.aggregator.begin(attempt, world_size, None)
            self._wake()
        return self.aggregator.result

    async def note(self, message: str) -> None:
        """A worker says what it is doing, for the driver's terminal."""
        self._notes.append(message)

    async def publish(self, metrics: dict[str, Any]) -> None:
        """Rank 0 gives the newest line of metrics, for the driver's progress bar."""
        self._metrics = metrics

    async def publish_validations(self, validations: list[dict[str, Any]]) -> None:
        """Rank 0 gives all validations so far."""
        self._validations = validations

    async def progress(self, notes_seen: int) -> tuple[list[str], dict[str, Any], list[dict[str, Any]]]:
        """New notes since the first `notes_seen`, the newest metrics, and all validations."""
        if notes_seen > self._first_note + len(self._notes):
            self._first_note = notes_seen  # this actor was restarted: its notes follow those the driver has
        return self._notes[max(0, notes_seen - self._first_note) :], self._metrics, self._validations

    async def ask(self, request: int) -> None:
        """The driver asks the workers for something after the step that is under way; see aggregate.SAVE, STOP."""
        self.aggregator.requested = request

    async def set_pool(self, error: Exception | None) -> None:
        """The driver says that the teacher pool is up, or why it is not."""
        self._pool = (True, error)
        self._wake()

    async def pool(self) -> tuple[bool, Exception | None]:
        """Whether the driver has spoken about the teacher pool, and its error if it failed; waits a while for that."""
        if not self._pool[0]:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._change(), POOL_POLL_S)
        return self._pool

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _change(self) -> None:
        await self._changed.wait()


class SchedulerOwner:
    """The driver's side: starts the actor, hears from it what the workers say, and ends it."""

    def __init__(self, name: str, config: ScheduleConfig, total_steps: int):
        """Restarted by Ray without limit if its process dies.

        Raises ClusterError if another driver keeps an actor of that name, and therefore the run.
        """
        actor = ray.remote(SchedulerActor)
        options = actor.options(name=name, namespace=NAMESPACE, num_cpus=0, max_restarts=-1, max_concurrency=10_000)
        deadline = time.monotonic() + NAME_FREE_S
        while True:
            try:
                self.actor: ActorHandle = options.remote(config, total_steps)
                return
            except ValueError as error:  # taken; by a driver that was killed just now, if the name becomes free soon
                if time.monotonic() > deadline:
                    raise ClusterError(
                        f"this run is under way on this cluster: the actor {name} is another driver's; wait for that one, "
                        "or end it"
                    ) from error
                time.sleep(1.0)

    def ask(self, request: int) -> None:
        """Asks the workers for something after the step that is under way. Must be repeated until it has happened."""
        self.actor.ask.remote(request)

    def set_pool(self, error: Exception | None) -> None:
        """Tells the workers that the teacher pool is up, or why it is not. A restarted actor must be told again."""
        self.actor.set_pool.remote(error)

    def progress(self, notes_seen: int) -> tuple[list[str], dict[str, Any], list[dict[str, Any]]]:
        """Notes after the first `notes_seen`, the newest metrics, and all validations that this actor was told of.

        Nothing while it is being restarted.
        """
        try:
            return ray.get(self.actor.progress.remote(notes_seen), timeout=10)
        except RayError:
            return [], {}, []

    def close(self) -> None:
        ray.kill(self.actor, no_restart=True)


class SchedulerClient:
    """One worker's side. `submit` and `collect` are what the training loop sees."""

    def __init__(self, actor: ActorHandle, rank: int, timeout_s: float):
        """timeout_s: how long an answer may take, which depends on the slowest of the other workers."""
        self._actor, self._rank, self._timeout_s = actor, rank, timeout_s
        self._attempt = self._world_size = 0
        self._result: StepResult | None = None
        self._pending: tuple[int, LossSums, ray.ObjectRef] | None = None
        self._closed = threading.Event()

    def begin(self, world_size: int) -> int:
        """Rank 0 only: opens a new attempt, and thereby ends all earlier ones. It goes on from what `join` is given."""
        return self._call(lambda: self._actor.begin.remote(world_size), "begin")

    def join(self, attempt: int, world_size: int, result: StepResult | None) -> StepResult:
        """Every rank, with the attempt that rank 0 drew and, if there is one, a checkpoint's result: starts the heartbeat.

        Returns where the attempt starts.
        """
        self._attempt, self._world_size = attempt, world_size
        self._result = result or self._call(lambda: self._actor.current.remote(attempt, world_size), "the start")
        threading.Thread(target=self._beat, name="taid-scheduler-heartbeat", daemon=True).start()
        return self._result

    def submit(self, step: int, sums: LossSums) -> None:
        self._pending = (step, sums, self._send(step, sums))

    def collect(self, step: int) -> StepResult:
        """Raises AttemptError when the actor gives no answer in time; NonFiniteLossError, StaleReportError from it."""
        assert self._pending is not None and self._pending[0] == step, "collect without submit"
        _, sums, reference = self._pending
        sent = iter([reference])
        self._result = pickle.loads(self._call(lambda: next(sent, None) or self._send(step, sums), f"step {step}"))
        self._pending = None
        return self._result

    @property
    def step(self) -> int:
        """The step that was submitted last, and has no result yet; 0 if there is none."""
        return self._pending[0] if self._pending else 0

    @property
    def sums_are_finite(self) -> bool:
        """Whether this rank's part of the step that was submitted last is."""
        sums = self._pending[1] if self._pending else None
        return sums is None or all(map(math.isfinite, (sums.kl, sums.entropy, sums.sft)))

    def wait_for_pool(self) -> None:
        """Blocks until the driver has the teacher pool up; raises its error if it failed.

        Has no deadline of its own: loading may take as long as `teacher.timeout_s` says, and the driver watches that.
        """
        known, error = False, None
        while not known:
            known, error = self._call(lambda: self._actor.pool.remote(), "the teacher pool")
        if error is not None:
            raise error

    def note(self, message: str) -> None:
        self._actor.note.remote(message)

    def publish(self, metrics: dict[str, Any]) -> None:
        self._actor.publish.remote(metrics)

    def publish_validations(self, validations: list[dict[str, Any]]) -> None:
        self._actor.publish_validations.remote(validations)

    def close(self) -> None:
        self._closed.set()

    def _send(self, step: int, sums: LossSums) -> ray.ObjectRef:
        assert self._result is not None, "submit before join"
        report = Report(self._attempt, self._world_size, self._result, step, self._rank, sums)
        return self._actor.report.remote(pickle.dumps(report))

    def _call(self, send: Any, what: str) -> Any:
        """Sends until there is an answer: a dead actor is restarted by Ray, and the request goes to the new one."""
        deadline, died = time.monotonic() + self._timeout_s, None
        while True:
            try:
                return ray.get(send(), timeout=max(0.0, deadline - time.monotonic()))
            except (ActorDiedError, ActorUnavailableError) as error:
                now = time.monotonic()
                died = (died or now) if isinstance(error, ActorDiedError) else None
                if now > deadline or (died is not None and now - died > GONE_S):
                    raise AttemptError(
                        f"the TAID scheduler actor is gone, and with it perhaps the driver: {error}"
                    ) from error
                time.sleep(0.2)
            except GetTimeoutError as error:
                raise AttemptError(
                    f"the TAID scheduler gave no answer for {what} within {self._timeout_s:.0f} s (student.timeout_s); "
                    "another student worker is probably stuck or gone"
                ) from error
            except RayTaskError as error:
                raise error.cause if isinstance(error.cause, Exception) else error from None

    def _beat(self) -> None:
        """Keeps the newest result known to the actor, also while this rank is blocked in a collective."""
        while not self._closed.wait(HEARTBEAT_S):
            try:
                ray.get(self._actor.heartbeat.remote(self._attempt, self._world_size, self._result), timeout=10)
            except RayError:
                continue  # being restarted; the next beat re-seeds it
