"""Reporting of a run while it works: its files of figures, Prometheus, and lines for the driver's terminal."""

from collections.abc import Callable

from taid_ray.run.bottleneck import Usage, verdict
from taid_ray.run.layout import METRICS_FILE, VALIDATION_FILE
from taid_ray.run.metrics import StepMetrics, metrics_log, validation_log
from taid_ray.student.spec import WorkerSpec
from taid_ray.student.totals import Evaluation, RunTotals, validation_line
from taid_ray.tracking.prometheus import StudentGauges

USAGE_STEPS = 100
"""Steps after which a line says what holds the run back."""


class Telemetry:
    """Reporting of a rank. This one stays silent, for every rank but 0; rank 0 has MainTelemetry."""

    def validating(self, step: int, rows: int) -> None:
        """Reports that a validation on so many rows begins after `step`."""

    def step(self, metrics: StepMetrics, checkpoint: int) -> None:
        """Reports a step. checkpoint: step of the newest checkpoint."""

    def validation(self, step: int, evaluation: Evaluation) -> None:
        """Reports a validation after `step`."""

    def note(self, message: str) -> None:
        """Says something on the driver's terminal."""

    def sync(self) -> None:
        """Makes sure that all lines survive a crash of the machine."""

    def close(self) -> None:
        """Closes the files."""


class MainTelemetry(Telemetry):
    """Rank 0's reporting. What it writes to RUN, the driver and the trackers follow there."""

    def __init__(
        self,
        worker: WorkerSpec,
        run: str,
        last_step: int,
        totals: RunTotals,
        notify: Callable[[str], None],
        num_replicas: Callable[[], int] | None,
    ):
        """run: its id. last_step, totals: where the attempt starts. num_replicas: of the teacher pool, if training asks one.

        Raises RunError if lines up to `last_step` are missing in metrics.jsonl.
        """
        run_dir, self._total_steps = worker.config.run_dir, worker.spec.total_steps
        # In this order: whoever finds a new file of metrics finds the validations that belong to it.
        self._validations = validation_log(run_dir / VALIDATION_FILE, totals.validation_lines())
        self._metrics = metrics_log(run_dir / METRICS_FILE, last_step)
        self._gauges = StudentGauges(run, self._total_steps, worker.attempt - 1)
        self._notify, self._num_replicas, self._usage = notify, num_replicas, Usage()
        self._learns_from_teacher = worker.config.learns_from_teacher

    def validating(self, step: int, rows: int) -> None:
        self._notify(f"validating on {rows} rows after step {step}")

    def step(self, metrics: StepMetrics, checkpoint: int) -> None:
        line = metrics.line(self._learns_from_teacher)
        self._metrics.write(line)
        self._gauges.step(line, checkpoint)
        self._note_bottleneck(metrics)

    def validation(self, step: int, evaluation: Evaluation) -> None:
        self._validations.write(validation_line(step, evaluation))
        self._gauges.validation(evaluation.cross_entropy, evaluation.kl)
        for name, found in {"": evaluation, **evaluation.sources}.items():
            of = f" of {name}" if name else ""
            compared = "" if found.kl is None else f", KL to the teacher {found.kl:.4f}"
            self._notify(f"validation{of}: cross-entropy {found.cross_entropy:.4f}{compared}")

    def note(self, message: str) -> None:
        self._notify(message)

    def sync(self) -> None:
        self._metrics.sync()
        self._validations.sync()

    def close(self) -> None:
        self._metrics.close()
        self._validations.close()

    def _note_bottleneck(self, metrics: StepMetrics) -> None:
        """One line every USAGE_STEPS steps and after the last one: student, teacher or wire, and the replicas to have."""
        if metrics.step == 1 or self._num_replicas is None:
            return  # the first step waits for the first answers, which nothing could have asked for earlier
        usage = self._usage
        usage.add(metrics.step_s, metrics.teacher_wait_s, metrics.teacher_compute_s, metrics.payload_bytes)
        if usage.steps == USAGE_STEPS or metrics.step == self._total_steps:
            steps = f"steps {metrics.step - usage.steps + 1} to {metrics.step}"
            self._notify(f"{steps}: {verdict(usage, self._num_replicas())}")
            self._usage = Usage()
