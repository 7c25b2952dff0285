"""Checkpoints of a student: when one is due, and what of the run goes into it."""

from dataclasses import replace

from taid_ray.checkpoint.save import CheckpointWriter
from taid_ray.checkpoint.store import TrainingState
from taid_ray.data.cursor import Cursor
from taid_ray.data.fingerprint import Fingerprint
from taid_ray.scheduler.aggregate import GO_ON, SAVE, StepResult
from taid_ray.student.engine import Student
from taid_ray.student.totals import RunTotals
from taid_ray.teacher.protocol import TeacherClient


class StudentCheckpoints:
    """Saves the student with the run's totals, and marks the checkpoint of the best validation as one to keep."""

    def __init__(
        self,
        writer: CheckpointWriter,
        student: Student,
        teacher: TeacherClient | None,
        totals: RunTotals,
        data: Fingerprint | None,
    ):
        """data: what the run is trained on; a resumed run must find the same."""
        self.writer, self._data = writer, data
        self._student, self._teacher, self._totals = student, teacher, totals
        self._best_by = student.config.checkpoint.best

    def request(self, step: int, validated: bool) -> int:
        """SAVE if a checkpoint is due after `step`, else GO_ON. validated: whether there is a validation after it."""
        return SAVE if (validated and self._best_by) or self.writer.due(step) else GO_ON

    def save(self, result: StepResult, cursor: Cursor) -> None:
        """Saves the state after `result.step`. Collective. Raises CheckpointError after too many failures."""
        totals, step = self._totals, result.step
        if self._best_by and step in totals.validations and totals.is_best(step, self._best_by):
            totals.best = self.writer.name(step)
        (teacher_tokens,) = self._student.world.sum([self._teacher.tokens if self._teacher else 0])
        state = TrainingState(replace(result, request=GO_ON), cursor, totals.state(int(teacher_tokens)), self._data)
        self.writer.save(step, state, self._student.state(), totals.best)
