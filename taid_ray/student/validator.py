"""Validations of a run: when one is due, and where its result goes."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import median

from taid_ray.data.batch import Batch
from taid_ray.student.engine import Student
from taid_ray.student.seeing import seeing_note
from taid_ray.student.telemetry import Telemetry
from taid_ray.student.totals import RunTotals, together
from taid_ray.student.validation import ValidationBatches, evaluate


class Validator:
    """Scores the student on the held-out rows."""

    def __init__(
        self,
        student: Student,
        batches: Mapping[str, ValidationBatches],
        totals: RunTotals,
        telemetry: Telemetry,
        seeing: Sequence[tuple[Batch, Batch]] = (),
    ):
        """batches: the held-out rows, by the names of their sources. seeing: of `own_seeing_batches`, in a run with images."""
        self._seeing = seeing
        self._student, self._batches, self._totals, self._telemetry = student, batches, totals, telemetry

    def is_due(self, step: int) -> bool:
        """Tests whether `train.eval_every` asks for a validation after `step`."""
        every = self._student.config.train.eval_every
        return bool(every) and step % every == 0

    def validate(self, step: int) -> None:
        """Evaluates after `step` and keeps the result in the totals and in RUN/validation.jsonl. Collective."""
        self._telemetry.validating(step, sum(part.num_rows for part in self._batches.values()))
        evaluation = together({name: evaluate(self._student, part) for name, part in self._batches.items()})
        seen = self._seen()
        if seen:
            evaluation = replace(evaluation, seeing=median(seen))
        self._totals.validations[step] = evaluation
        self._telemetry.validation(step, evaluation)
        if seen:
            self._telemetry.note(seeing_note("student", seen, self._student.config.data.sees_at_least))

    def _seen(self) -> list[float]:
        """Measures how far grey images change what the student predicts, in each row of all ranks; [] without images."""
        own = [value for batch, without in self._seeing for value in self._student.seeing(batch, without)]
        return [value for part in self._student.world.gather(own) for value in part] if self._seeing else []
