"""The TAID scheduler actor: one per run, it sums up what all ranks report of a step, and answers with the next t.

The actor keeps nothing on disk and may be killed at any moment: Ray restarts it empty, and every report and heartbeat
carries the newest result that its sender knows, from which the actor goes on bit for bit.
"""

import asyncio
import pickle
from contextlib import suppress
from typing import NamedTuple

from taid_ray.config.objective import ScheduleConfig
from taid_ray.scheduler.aggregate import LossAggregator, LossSums, StepResult
from taid_ray.scheduler.board import Board
from taid_ray.scheduler.schedule import TAIDSchedule

POOL_POLL_S = 10.0


class Report(NamedTuple):
    """A rank's report of a step; pickled, it is what `SchedulerActor.report` takes."""

    attempt: int
    world_size: int
    known: StepResult
    """The newest result the sender has; it brings a restarted actor back to where the run stands."""
    step: int
    rank: int
    sums: LossSums


class News(NamedTuple):
    """Answer to the driver each time it asks for news. Figures are not in it: those are in RUN/metrics.jsonl."""

    notes: list[str]
    """Of the workers, those that the driver has not seen."""
    step: int
    """Finished optimizer steps of the run."""
    reporting: int
    """The attempt whose workers reported a step last; 0 if none did since the actor was started."""


class SchedulerActor:
    """Aggregates the loss and broadcasts t. Async, so that reports of one step wait inside it while others arrive."""

    def __init__(self, config: ScheduleConfig, total_steps: int):
        self.aggregator = LossAggregator(TAIDSchedule(config, total_steps), config.signal)
        self.board = Board()
        self._reporting = 0
        self._changed = asyncio.Event()
        self._failure: Exception | None = None
        self._packed: tuple[StepResult, bytes] | None = None

    async def begin(self, attempt: int, world_size: int) -> None:
        """Opens an attempt, which ends all earlier ones. Raises StaleReportError if a newer one is open."""
        if attempt == self.aggregator.attempt:
            return  # the answer was lost, and the request sent again
        self.aggregator.begin(attempt, world_size, None)
        self._failure = None
        self._wake()

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
        self._reporting = attempt
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
        """Takes over the newest result that a rank knows, if this actor knows less."""
        before = (self.aggregator.attempt, self.aggregator.result.step)
        self.aggregator.seed(attempt, world_size, result)
        if before != (self.aggregator.attempt, self.aggregator.result.step):
            self._wake()

    async def current(self, attempt: int, world_size: int) -> StepResult:
        """The newest result of `attempt`, which rank 0 has begun."""
        if self.aggregator.attempt < attempt:  # this actor was restarted since, and nobody has a result yet
            await self.begin(attempt, world_size)
        return self.aggregator.result

    async def ask(self, request: int) -> None:
        """The driver's request to the workers for after the step that is under way; see aggregate.SAVE, STOP."""
        self.aggregator.requested = request

    async def note(self, message: str) -> None:
        """A worker's line for the driver's terminal."""
        self.board.note(message)

    async def news(self, notes_seen: int) -> News:
        """News for a driver that has read `notes_seen` notes."""
        return News(self.board.notes_after(notes_seen), self.aggregator.result.step, self._reporting)

    async def set_pool(self, error: Exception | None) -> None:
        """The driver's word that the teacher pool is up (None), or why it is not."""
        self.board.set_pool(error)
        self._wake()

    async def pool(self) -> tuple[bool, Exception | None]:
        """Waits a while for the driver's word about the teacher pool. Returns whether it is known, and its error if it failed."""
        if not self.board.pool_known:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._change(), POOL_POLL_S)
        return self.board.pool_known, self.board.pool_error

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _change(self) -> None:
        await self._changed.wait()
