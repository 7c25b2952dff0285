"""Validation: the student's and the teacher's cross-entropy on held-out rows, and the KL between them."""

from collections.abc import Sequence
from dataclasses import dataclass

from taid_ray.data.batch import Row, collate
from taid_ray.data.batching import num_micro_batches, split_evenly
from taid_ray.distributed.world import World
from taid_ray.models.loading import Head
from taid_ray.student.engine import Student
from taid_ray.teacher.protocol import TeacherClient


@dataclass(frozen=True)
class Evaluation:
    """Means over the loss positions of the validation rows, in nats."""

    cross_entropy: float
    teacher_cross_entropy: float
    kl: float
    """KL(teacher || student)."""
    tokens: int


def evaluate(
    student: Student,
    teacher: TeacherClient,
    teacher_head: Head | None,
    rows: Sequence[Row],
    world: World,
    micro_batch_size: int,
) -> Evaluation:
    """Every rank scores its contiguous share; all get the same result. Collective. Touches neither t nor any RNG."""
    parts = num_micro_batches(len(rows), micro_batch_size, world.size)
    batches = [collate(part) for part in split_evenly(split_evenly(rows, world.size)[world.rank], parts)]
    sums = [0.0, 0.0, 0.0, 0.0]
    request = teacher.submit(batches[0])
    for batch, following in zip(batches, [*batches[1:], None], strict=True):
        output = teacher.collect(request)
        if following is not None:
            request = teacher.submit(following)
        scores = student.score(batch, output, teacher_head)
        found = (float(scores.student_ce), float(scores.teacher_ce), float(scores.kl), batch.num_loss_tokens)
        sums = [total + value for total, value in zip(sums, found, strict=True)]
    student_ce, teacher_ce, kl, tokens = world.sum(sums)
    return Evaluation(student_ce / tokens, teacher_ce / tokens, kl / tokens, int(tokens))
