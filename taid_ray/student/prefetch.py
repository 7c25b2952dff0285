"""Prefetching: cuts global batches into this rank's micro-batches, and keeps the teacher at work on the next ones."""

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import TypeVar

from taid_ray.data.batch import Batch, Row, collate
from taid_ray.data.batching import split_evenly
from taid_ray.data.cursor import Cursor
from taid_ray.distributed.world import World
from taid_ray.errors import DataError
from taid_ray.student.clock import PhaseClock
from taid_ray.student.window import RequestWindow
from taid_ray.teacher.payload import TeacherOutput
from taid_ray.teacher.protocol import TeacherClient

T = TypeVar("T")
READ_AHEAD_STEPS = 8
"""Global batches that a worker's thread reads and encodes ahead of those that are sent to the teacher."""
DATA_S = 1800.0
"""How long the next rows may take to be read and encoded."""


@dataclass(frozen=True)
class StepBatches:
    """This rank's part of one optimizer step."""

    batches: list[Batch]
    num_loss_tokens: int
    """Loss positions of the GLOBAL batch: the one denominator. Every rank has it from the index, or from reading all rows, so it
    needs no collective."""
    cursor: Cursor
    """Where the data stand after this step; what a checkpoint stores (prefetch has read further)."""
    documents: list[int] = field(default_factory=list)
    """The documents in this rank's rows, ascending and each once, by their numbers from 1 in the dataset."""

    @classmethod
    def of(cls, rows: Sequence[Row], accumulation: int, num_loss_tokens: int, cursor: Cursor) -> "StepBatches":
        """Cuts this rank's rows of a global batch into `accumulation` micro-batches."""
        batches = [collate(part) for part in split_evenly(rows, accumulation)]
        documents = sorted({document for row in rows for document in row.documents})
        return cls(batches, num_loss_tokens, cursor, documents)


def step_batches(
    global_batches: Iterator[tuple[list[Row], Cursor]], world: World, accumulation: int
) -> Iterator[StepBatches]:
    """Cuts each global batch into this rank's contiguous share, and that into `accumulation` micro-batches."""
    for rows, cursor in global_batches:
        own = split_evenly(rows, world.size)[world.rank]
        yield StepBatches.of(own, accumulation, sum(row.num_loss_tokens for row in rows), cursor)


def read_ahead(items: Iterator[T], depth: int) -> Iterator[T]:
    """The same items in the same order, made by a thread up to `depth` ahead of their use. Errors arrive in their place."""
    made: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(maxsize=depth)

    def make() -> None:
        try:
            for item in items:
                made.put((item, None))
        except BaseException as error:  # handed over, to be raised where the item is missed
            made.put((None, error))
        else:
            made.put((None, StopIteration()))

    threading.Thread(target=make, name="taid-read-ahead", daemon=True).start()
    while True:
        try:
            item, error = made.get(timeout=DATA_S)
        except queue.Empty:
            raise DataError(
                f"no training data came for {DATA_S:.0f} s; check the network or the disk that data.train is read from"
            ) from None
        if isinstance(error, StopIteration):
            return
        if error is not None:
            raise error
        yield item  # type: ignore[misc]


class Prefetcher:
    """Hands out steps, and their micro-batches with the teacher's outputs (None without a teacher), in order.

    Up to `window` requests, with answers of `window_bytes` together at most, are at the teacher or wait here, across step
    boundaries; one always is. They depend on neither t nor the student, so asking early changes nothing.
    """

    def __init__(
        self,
        steps: Iterator[StepBatches],
        teacher: TeacherClient | None,
        window: int,
        window_bytes: int,
        clock: PhaseClock,
        prepare: Callable[[Batch], None] | None = None,
    ):
        """prepare: is told of each micro-batch one before it is collected."""
        self._steps, self._clock, self._prepare = steps, clock, prepare
        self._window = RequestWindow(teacher, window, window_bytes)
        self._announced: deque[StepBatches] = deque()
        self._unsent: deque[Batch] = deque()
        self.documents: list[int] = []
        """Documents of this rank's rows in the step handed out last."""
        self.wait_s = 0.0
        """Seconds that `collect` has stood still for the teacher, in all."""
        self._fill()

    def next_step(self) -> StepBatches:
        """Raises StopIteration after the last step."""
        if not self._announced:
            with self._clock.phase("data"):
                self._read()
        step = self._announced.popleft()
        self.documents = step.documents
        return step

    def collect(self) -> tuple[Batch, TeacherOutput | None]:
        """The next micro-batch of the step handed out last. Sends the requests that now find room before it returns."""
        start = perf_counter()
        with self._clock.phase("teacher_wait"):
            batch, output = self._window.collect()
        self.wait_s += perf_counter() - start
        self._fill()
        return batch, output

    def _read(self) -> None:
        step = next(self._steps)
        self._announced.append(step)
        self._unsent.extend(step.batches)

    def _fill(self) -> None:
        with self._clock.phase("data"):
            self._send()
            if self._prepare is not None and (batch := self._window.next_batch) is not None:
                self._prepare(batch)

    def _send(self) -> None:
        while not self._window.is_full:
            if not self._unsent:
                try:
                    self._read()
                except StopIteration:
                    return
            if not self._window.has_room(self._unsent[0]):
                return
            self._window.submit(self._unsent.popleft())
