"""The training loop. Every student worker runs `train_loop`, top to bottom; nothing in it knows about Ray."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch

from taid_ray.data.batch import Batch
from taid_ray.data.cursor import Cursor
from taid_ray.errors import AttemptError
from taid_ray.losses.chunked import LossParts
from taid_ray.run.metrics import PHASES, StepMetrics
from taid_ray.scheduler.aggregate import STOP, LossSums, SourceLoss, StepResult
from taid_ray.student.engine import Student
from taid_ray.student.learning_rate import learning_rate
from taid_ray.student.objective import denominator
from taid_ray.student.prefetch import Prefetcher, StepBatches
from taid_ray.teacher.payload import TeacherOutput


class Scheduler(Protocol):
    """The TAID scheduler as a worker sees it."""

    def submit(self, step: int, sums: LossSums) -> None:
        """Reports this rank's sums of `step` (1-based) without waiting."""

    def collect(self, step: int) -> StepResult:
        """The result of `step`, once every rank has reported it."""


class Hooks(Protocol):
    """The work around a step that is not training, such as validation and checkpoints."""

    def request(self, step: int) -> int:
        """This rank's request for after `step`: GO_ON, SAVE or STOP. All ranks find the strongest one in its result."""

    def after_step(self, metrics: StepMetrics, result: StepResult, cursor: Cursor) -> None:
        """Runs on every rank after each step, with global figures and what a checkpoint needs."""


def train_loop(
    student: Student, scheduler: Scheduler, stream: Prefetcher, hooks: Hooks, last: StepResult, total_steps: int
) -> StepResult:
    """Trains from `last.step` to `total_steps`, or to the step after which somebody wants to STOP.

    Raises AttemptError if the ranks counted other loss tokens than this rank's global batch has: their data differ.
    """
    clock = student.clock
    while last.step < total_steps and last.request != STOP:
        clock.lap()  # what lies between the steps, validation for example, is not part of any
        step, waited_before = last.step + 1, stream.wait_s
        work = stream.next_step()
        student.begin_step(step, total_steps)

        sums = StepSums(student.device)
        for number in range(len(work.batches)):
            batch, teacher_output = stream.collect()
            with clock.phase("forward"):
                loss_sum, parts = student.forward(batch, teacher_output, last.schedule.t)
            sums.add(parts, batch, teacher_output)
            if number == len(work.batches) - 1:
                # This travels while the last backward pass computes, so nobody waits for the scheduler.
                scheduler.submit(step, sums.report(stream.wait_s - waited_before, hooks.request(step)))
            with clock.phase("backward"):
                # One denominator, the global batch's: the gradient is the same however the batch is split.
                student.backward(loss_sum / denominator(student.config, work.num_loss_tokens))
        lr = learning_rate(step - 1, student.config.train, total_steps)
        with clock.phase("optimizer"):
            grad_norm = student.step(lr)
        with clock.phase("schedule_wait"):
            result = scheduler.collect(step)
        check_same_batch(result, work)

        metrics = step_metrics(last, result, work.cursor, lr, grad_norm, clock.lap())
        figures = source_figures(student.source_names, result)
        metrics = replace(metrics, sources=figures, temperature=student.temperature)
        if student.images is not None:
            metrics = replace(metrics, images=result.images, image_bytes=result.image_bytes)
        hooks.after_step(metrics, result, work.cursor)
        last = result
    return last


class StepSums:
    """Sums of one rank over the micro-batches of a step; those of the loss stay on the device until they are reported."""

    def __init__(self, device: torch.device):
        self._kl = self._entropy = self._sft = torch.zeros((), dtype=torch.float64, device=device)
        # Of one source, or of none where there is only one; adding the first micro-batch makes room.
        self._by_source = torch.zeros(3, 1, dtype=torch.float64, device=device)
        self._source_tokens = torch.zeros(1, dtype=torch.int64)
        self._tokens = self._payload_bytes = self._images = self._image_bytes = 0
        self._compute_s = 0.0

    def add(self, parts: LossParts, batch: Batch, teacher_output: TeacherOutput | None) -> None:
        """Adds a micro-batch. teacher_output: None if no teacher was asked."""
        self._kl, self._entropy = self._kl + parts.kl, self._entropy + parts.entropy
        self._sft = self._sft + parts.sft
        self._by_source = self._by_source + parts.by_group
        sources = parts.by_group.shape[1]
        self._source_tokens = self._source_tokens + batch.sources.bincount(minlength=sources)[:sources]
        self._tokens += batch.num_loss_tokens
        self._images += sum(map(len, batch.images))
        if teacher_output is not None:
            self._payload_bytes += teacher_output.num_bytes
            self._compute_s += teacher_output.compute_s
            self._image_bytes += teacher_output.image_bytes

    def report(self, teacher_wait_s: float, request: int) -> LossSums:
        """The rank's report of the step. Waits for the device."""
        losses = torch.cat((torch.stack((self._kl, self._entropy, self._sft))[:, None], self._by_source), dim=1)
        (kl, entropy, sft), *by_source = losses.T.tolist()
        pairs = zip(by_source, self._source_tokens.tolist(), strict=True)
        sources = tuple(SourceLoss(own[0], own[1], own[2], tokens) for own, tokens in pairs)
        measured = (teacher_wait_s, self._payload_bytes, self._compute_s)
        images = (self._images, self._image_bytes)
        return LossSums(kl, entropy, sft, self._tokens, *measured, request, sources, *images)


def check_same_batch(result: StepResult, work: StepBatches) -> None:
    """Raises AttemptError if the ranks together counted other loss tokens than the global batch of this rank has."""
    if result.tokens != work.num_loss_tokens:
        raise AttemptError(
            f"step {result.step}: the ranks did not read the same global batch: they counted {result.tokens} loss tokens "
            f"together, and this batch has {work.num_loss_tokens}; are all nodes given the same data?"
        )


def source_figures(names: Sequence[str], result: StepResult) -> dict[str, dict[str, float]] | None:
    """The figures of each source that had loss positions in the step, by its name; None if there is only one."""
    if not result.sources:
        return None
    return {
        name: {"loss": found.kl + found.entropy, "kl": found.kl, "sft": found.sft, "tokens": found.tokens}
        for name, found in zip(names, result.sources, strict=True)
        if found.tokens
    }


def step_metrics(
    before: StepResult, result: StepResult, cursor: Cursor, lr: float, grad_norm: float, seconds: dict[str, float]
) -> StepMetrics:
    """The line of metrics.jsonl for a step. before: the result whose t the step used. seconds: see PhaseClock.lap."""
    phases: dict[str, Any] = {f"{phase}_s": seconds.get(phase, 0.0) for phase in PHASES if phase != "teacher_wait"}
    return StepMetrics(
        step=result.step,
        epoch=cursor.epoch,
        t=before.schedule.t,
        momentum=before.schedule.momentum,
        loss=result.kl + result.entropy,
        kl=result.kl,
        entropy_pt=result.entropy,
        sft=result.sft,
        floor_active=before.schedule.floor_active,
        lr=lr,
        grad_norm=grad_norm,
        tokens=result.tokens,
        tokens_per_s=result.tokens / seconds["step"],
        step_s=seconds["step"],
        teacher_wait_s=result.teacher_wait_s,
        **phases,
        teacher_compute_s=result.teacher_compute_s,
        payload_bytes=result.payload_bytes,
        samples_seen=cursor.samples,
    )
