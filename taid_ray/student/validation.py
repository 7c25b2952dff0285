"""Validation on held-out rows: the student's cross-entropy and, with a teacher, the teacher's and the KL between them."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from taid_ray.data.batch import Batch, Row, collate
from taid_ray.data.batching import num_micro_batches, split_evenly
from taid_ray.distributed.world import World
from taid_ray.student.engine import Student
from taid_ray.student.totals import Evaluation
from taid_ray.student.window import RequestWindow
from taid_ray.teacher.payload import TeacherOutput
from taid_ray.teacher.protocol import TeacherClient

KEPT_BYTES = 2**30
"""Limit for the teacher's outputs that a worker keeps, in memory of the CPU."""


class ValidationBatches:
    """Share of one rank in the validation rows, contiguous, with the teacher's outputs.

    The teacher is frozen and the rows stay the same, so outputs are kept up to KEPT_BYTES; the teacher is asked for the others
    in every validation. Without a teacher there are no outputs.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        world: World,
        micro_batch_size: int,
        teacher: TeacherClient | None,
        limits: tuple[int, int],
        sources: int = 1,
    ):
        """limits: requests and bytes of answers that may be under way, as for the Prefetcher; one always may. sources: number of
        those that share KEPT_BYTES."""
        parts = num_micro_batches(len(rows), micro_batch_size, world.size)
        self._batches = [collate(part) for part in split_evenly(split_evenly(rows, world.size)[world.rank], parts)]
        self._teacher, self._limits = teacher, limits
        self._kept: dict[int, TeacherOutput] = {}
        self._room = KEPT_BYTES // sources
        self.num_rows = len(rows)
        """Of all ranks."""

    @property
    def has_teacher(self) -> bool:
        """True if there are outputs of a teacher."""
        return self._teacher is not None

    def each(self, prepare: Callable[[Batch], None]) -> Iterator[tuple[Batch, TeacherOutput | None]]:
        """Yields batches, the same number on every rank, and the teacher's outputs for them.

        prepare: is told of each batch before the one in front of it is handed out.
        """
        to_ask = deque(number for number in range(len(self._batches)) if number not in self._kept)
        window = RequestWindow(self._teacher, *self._limits)
        for number, batch in enumerate(self._batches):
            while to_ask and window.has_room(self._batches[to_ask[0]]):
                window.submit(self._batches[to_ask.popleft()])
            output = self._kept.get(number)
            if output is None:
                _, output = window.collect()
            if output is not None and number not in self._kept:
                self._keep(number, output)
            for following in self._batches[number + 1 : number + 2]:
                prepare(following)
            yield batch, output

    def _keep(self, number: int, output: TeacherOutput) -> None:
        if output.num_bytes <= self._room:
            self._room -= output.num_bytes
            # Copies, because what came through the object store would stay there for as long as it is used.
            tensors = {name: tensor.to("cpu", copy=True) for name, tensor in output.tensors.items()}
            self._kept[number] = replace(output, tensors=tensors, compute_s=0.0)


def evaluate(student: Student, batches: ValidationBatches) -> Evaluation:
    """The means over all ranks' held-out rows; every rank scores its share. Collective. Touches neither t nor any RNG."""
    sums = [0.0, 0.0, 0.0, 0.0]
    for batch, output in batches.each(student.prepare):
        scores = student.score(batch, output)
        values = (scores.student_ce, scores.teacher_ce, scores.kl, batch.num_loss_tokens)
        sums = [total + (0.0 if value is None else float(value)) for total, value in zip(sums, values, strict=True)]
    student_ce, teacher_ce, kl, tokens = student.world.sum(sums)
    if not batches.has_teacher:
        return Evaluation(student_ce / tokens, int(tokens))
    return Evaluation(student_ce / tokens, int(tokens), teacher_ce / tokens, kl / tokens)
