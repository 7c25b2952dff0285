"""The TAID scheduler actor: one per run, it sums up what all ranks report of a step, and answers with the next t.

The actor keeps nothing on disk and may be killed at any moment: Ray restarts it empty, and every report and heartbeat
carries the newest result that its sender knows, from which the actor goes on bit for bit.
"""

import asyncio
import pickle
import time
from contextlib import suppress
from typing import Any, NamedTuple

from taid_ray.config.schema import ScheduleConfig
from taid_ray.scheduler.aggregate import LossAggregator, LossSums, StepResult
from taid_ray.scheduler.schedule import TAIDSchedule

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
