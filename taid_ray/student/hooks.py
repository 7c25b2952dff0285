"""The work between two optimizer steps, on every rank: the line of metrics, validations, checkpoints."""

from contextlib import nullcontext, suppress

from taid_ray.data.cursor import Cursor
from taid_ray.errors import CheckpointError
from taid_ray.run.metrics import StepMetrics
from taid_ray.scheduler.aggregate import GO_ON, STOP, StepResult
from taid_ray.student.checkpoints import StudentCheckpoints
from taid_ray.student.preemption import PreemptionWatch
from taid_ray.student.telemetry import Telemetry
from taid_ray.student.totals import RunTotals
from taid_ray.student.validator import Validator


class StepHooks:
    """The `Hooks` of the training loop: they report, validate and save, in this order."""

    def __init__(
        self,
        validator: Validator,
        telemetry: Telemetry,
        checkpoints: StudentCheckpoints,
        totals: RunTotals,
        preemption: PreemptionWatch | None,
        total_steps: int,
    ):
        """totals: count every step. preemption: that of this worker's node, on the one worker that keeps it."""
        self._validator, self._telemetry, self._checkpoints = validator, telemetry, checkpoints
        self._totals, self._preemption, self._total_steps = totals, preemption, total_steps

    def request(self, step: int) -> int:
        """This rank's request for after the step that is under way."""
        if self._preemption is not None and self._preemption.draining:
            return STOP
        return self._checkpoints.request(step, self._is_validated(step))

    def after_step(self, metrics: StepMetrics, result: StepResult, cursor: Cursor) -> None:
        """Reports the step, validates if it is time, and obeys the request in `result`. Collective."""
        self._totals.add(metrics)
        self._telemetry.step(metrics, self._checkpoints.writer.newest)
        if self._is_validated(metrics.step):
            self._validator.validate(metrics.step)
        last = metrics.step == self._total_steps
        if last or result.request != GO_ON:
            self._telemetry.sync()
            # With the last step's checkpoint a run that cannot save its model saves it later, without training again. Where
            # checkpoints have failed before, which was said, the model itself may still be saved.
            with suppress(CheckpointError) if last else nullcontext():
                self._checkpoints.save(result, cursor)

    def _is_validated(self, step: int) -> bool:
        return self._validator.is_due(step) or step == self._total_steps
