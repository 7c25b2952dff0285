"""What happens between two optimizer steps, on every rank: the line of metrics, validations, checkpoints."""

from dataclasses import asdict, replace

from taid_ray.checkpoint.save import CheckpointWriter
from taid_ray.checkpoint.store import TrainingState
from taid_ray.config.schema import DistillConfig
from taid_ray.data.dataset import Cursor
from taid_ray.distributed.world import World
from taid_ray.files import write_lines
from taid_ray.models.head import Head
from taid_ray.run.bottleneck import Usage, verdict
from taid_ray.run.layout import VALIDATION_FILE
from taid_ray.run.metrics import MetricLog, StepMetrics
from taid_ray.scheduler.aggregate import GO_ON, SAVE, STOP, StepResult
from taid_ray.scheduler.client import SchedulerClient
from taid_ray.student.engine import Student
from taid_ray.student.preemption import PreemptionWatch
from taid_ray.student.spec import RunSpec
from taid_ray.student.totals import RunTotals
from taid_ray.student.validation import HeldOut, evaluate
from taid_ray.teacher.cache.cached import CachedTeacher
from taid_ray.teacher.pool.client import PoolTeacher
from taid_ray.teacher.protocol import TeacherClient
from taid_ray.tracking.prometheus import StudentGauges

USAGE_STEPS = 100
"""Steps over which is judged what holds the run back."""


class StepHooks:
    """The `on_step` of the training loop, and its `request`."""

    def __init__(
        self,
        config: DistillConfig,
        spec: RunSpec,
        world: World,
        student: Student,
        teacher: TeacherClient,
        teacher_head: Head | None,
        held_out: HeldOut,
        record: RunTotals,
        saver: CheckpointWriter,
        log: MetricLog | None,
        scheduler: SchedulerClient,
        gauges: StudentGauges | None,
    ):
        """log, gauges: rank 0's."""
        self._config, self._total_steps, self._world = config, spec.total_steps, world
        self._student, self._teacher, self._teacher_head, self._held_out = student, teacher, teacher_head, held_out
        self._record, self._saver, self._log, self._scheduler = record, saver, log, scheduler
        self._gauges, self._leaving = gauges, PreemptionWatch()
        self._leave_validations()  # those of earlier attempts

    def request(self, step: int) -> int:
        """What this rank wants to follow the step that is under way."""
        if self._leaving.given:
            return STOP
        if self._config.checkpoint.best and self._is_validated(step):
            return SAVE
        return self._saver.wanted(step)

    def __call__(self, metrics: StepMetrics, result: StepResult, cursor: Cursor) -> None:
        """After a step; `result` says what all ranks do now."""
        self._record.add(metrics)
        if self._log is not None:
            self._log.write(metrics)
            self._scheduler.publish(asdict(metrics))
            self._say_what_holds_back(metrics)
        if self._gauges is not None:
            self._gauges.step(metrics, self._saver.newest)
        if self._is_validated(metrics.step):
            self.validate(metrics.step)
        if result.request != GO_ON and metrics.step < self._total_steps:
            self._save(result, cursor)

    def validate(self, step: int) -> None:
        """Collective."""
        self._note(f"validating on {self._held_out.num_rows} rows after step {step}")
        found = evaluate(self._student, self._teacher_head, self._held_out, self._world)
        self._note(f"validation: cross-entropy {found.cross_entropy:.4f}, KL to the teacher {found.kl:.4f}")
        self._record.validations[step] = found
        if self._gauges is not None:
            self._gauges.validation(found.cross_entropy, found.kl)
        self._leave_validations()

    def _leave_validations(self) -> None:
        """In RUN/validation.jsonl, and with the driver."""
        if self._world.is_main:
            lines = self._record.validation_lines()
            write_lines(self._config.run_dir / VALIDATION_FILE, lines)
            self._scheduler.publish_validations(lines)

    def _is_validated(self, step: int) -> bool:
        every = self._config.train.eval_every
        return bool(every) and step % every == 0 and step < self._total_steps

    def _save(self, result: StepResult, cursor: Cursor) -> None:
        step, figure = result.step, self._config.checkpoint.best
        if figure and step in self._record.validations and self._record.is_best(step, figure):
            self._record.best = self._saver.name(step)
        if self._log is not None:
            self._log.sync()
        (teacher_tokens,) = self._world.sum([self._teacher.tokens])
        state = TrainingState(replace(result, request=GO_ON), cursor, self._record.state(int(teacher_tokens)))
        self._saver.save(step, state, self._student.state(), self._record.best)

    def _say_what_holds_back(self, metrics: StepMetrics) -> None:
        """One line every USAGE_STEPS steps and after the last one: student, teacher or wire, and the replicas to have."""
        pool = self._teacher.inner if isinstance(self._teacher, CachedTeacher) else self._teacher
        if metrics.step == 1 or not isinstance(pool, PoolTeacher):
            return  # the first step waits for the first answers, which nothing could have asked for earlier
        usage = self._record.usage
        usage.add(metrics.step_s, metrics.teacher_wait_s, metrics.teacher_compute_s, metrics.payload_bytes)
        if usage.steps == USAGE_STEPS or metrics.step == self._total_steps:
            steps = f"steps {metrics.step - usage.steps + 1} to {metrics.step}"
            self._note(f"{steps}: {verdict(usage, pool.num_replicas())}")
            self._record.usage = Usage()

    def _note(self, message: str) -> None:
        if self._world.is_main:
            self._scheduler.note(message)
