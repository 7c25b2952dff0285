"""Validations of a run: when one is due, and where its result goes."""

from collections.abc import Mapping

from taid_ray.student.engine import Student
from taid_ray.student.telemetry import Telemetry
from taid_ray.student.totals import RunTotals, together
from taid_ray.student.validation import ValidationBatches, evaluate


class Validator:
    """Scores the student on the held-out rows."""

    def __init__(
        self, student: Student, batches: Mapping[str, ValidationBatches], totals: RunTotals, telemetry: Telemetry
    ):
        """batches: the held-out rows, by the names of their sources."""
        self._student, self._batches, self._totals, self._telemetry = student, batches, totals, telemetry

    def is_due(self, step: int) -> bool:
        """Tests whether `train.eval_every` asks for a validation after `step`."""
        every = self._student.config.train.eval_every
        return bool(every) and step % every == 0

    def validate(self, step: int) -> None:
        """Evaluates after `step` and keeps the result in the totals and in RUN/validation.jsonl. Collective."""
        self._telemetry.validating(step, sum(part.num_rows for part in self._batches.values()))
        evaluation = together({name: evaluate(self._student, part) for name, part in self._batches.items()})
        self._totals.validations[step] = evaluation
        self._telemetry.validation(step, evaluation)
