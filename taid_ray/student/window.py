"""The window of a student worker's requests to the teacher: how many may be under way at a time."""

from collections import deque
from typing import Any

from taid_ray.data.batch import Batch
from taid_ray.teacher.payload import TeacherOutput
from taid_ray.teacher.protocol import TeacherClient


class RequestWindow:
    """Requests that are at the teacher or whose answers wait here, in their order; one always finds room.

    Without a teacher nothing is asked: batches pass through, and have no answers.
    """

    def __init__(self, teacher: TeacherClient | None, most: int, most_bytes: int):
        """most, most_bytes: limits for the requests, and for the bytes of their answers together."""
        self._teacher, self._most = teacher, most
        self._most_tokens = most_bytes // teacher.info().bytes_per_token if teacher else 0
        self._requests: deque[tuple[Batch, Any]] = deque()
        self._tokens = 0

    @property
    def is_full(self) -> bool:
        """True if no further request finds room, however small."""
        return len(self._requests) >= self._most

    @property
    def next_batch(self) -> Batch | None:
        """The batch of the oldest request, which is collected next; None if there is none."""
        return self._requests[0][0] if self._requests else None

    def has_room(self, batch: Batch) -> bool:
        """Tests whether the request for `batch` finds room now."""
        fits = not self._requests or self._tokens + batch.num_loss_tokens <= self._most_tokens
        return fits and not self.is_full

    def submit(self, batch: Batch) -> None:
        """Sends the request for `batch`."""
        self._requests.append((batch, self._teacher.submit(batch) if self._teacher else None))
        self._tokens += batch.num_loss_tokens

    def collect(self) -> tuple[Batch, TeacherOutput | None]:
        """Waits for the oldest request. Returns its batch and the teacher's output for it; None without a teacher."""
        batch, request = self._requests.popleft()
        output = self._teacher.collect(request) if self._teacher else None
        self._tokens -= batch.num_loss_tokens
        return batch, output
