"""The training loop. Every student worker runs `train_loop`, top to bottom; nothing in it knows about Ray."""

from collections.abc import Callable
from typing import Protocol

import torch

from taid_ray.config.schema import TrainConfig
from taid_ray.data.dataset import Cursor
from taid_ray.errors import AttemptError
from taid_ray.models.head import Head
from taid_ray.run.metrics import StepMetrics
from taid_ray.scheduler.aggregate import STOP, LossSums, StepResult
from taid_ray.student.clock import PhaseClock
from taid_ray.student.engine import Student
from taid_ray.student.learning_rate import learning_rate
from taid_ray.student.prefetch import Prefetcher

PHASES = ("data", "forward", "loss", "backward", "optimizer", "schedule_wait")


class Scheduler(Protocol):
    """The TAID scheduler as a worker sees it."""

    def submit(self, step: int, sums: LossSums) -> None:
        """Reports this rank's sums of `step` (1-based) without waiting."""

    def collect(self, step: int) -> StepResult:
        """The result of `step`, once every rank has reported it."""


def train_loop(
    config: TrainConfig,
    total_steps: int,
    student: Student,
    teacher_head: Head | None,
    scheduler: Scheduler,
    stream: Prefetcher,
    last: StepResult,
    clock: PhaseClock,
    request: Callable[[int], int],
    on_step: Callable[[StepMetrics, StepResult, Cursor], None],
) -> StepResult:
    """Trains from `last.step` to `total_steps`, or to the step after which somebody wants to STOP.

    clock: the one that student and stream use too, so that it knows where each step's time goes. request: what this rank
    wants to follow a step, see scheduler.aggregate.SAVE; all ranks then find the same word in its result. on_step: runs on
    every rank after each step, with global figures and what a checkpoint needs.

    Raises AttemptError if the ranks counted other loss tokens than this rank's global batch has: their data differ.
    """
    while last.step < total_steps and last.request != STOP:
        clock.lap()  # what lies between the steps, validation for example, is not part of any
        waited_before = stream.wait_s
        step, t = last.step + 1, last.t
        work = stream.next_step()
        student.reseed(step)

        kl = entropy = sft = torch.zeros((), dtype=torch.float64, device=student.device)
        payload_bytes = tokens = 0
        computed_s = 0.0
        for i in range(len(work.batches)):
            batch, teacher_output = stream.collect()
            with clock.phase("forward"):
                loss_sum, parts = student.forward(batch, teacher_output, teacher_head, t)
            kl, entropy, sft = kl + parts.kl, entropy + parts.entropy, sft + parts.sft
            tokens += batch.num_loss_tokens
            payload_bytes += teacher_output.num_bytes
            computed_s += teacher_output.compute_s
            if i == len(work.batches) - 1:
                # This travels while the last backward pass computes, so nobody waits for the scheduler.
                waited = stream.wait_s - waited_before
                kl_sum, entropy_sum, sft_sum = torch.stack((kl, entropy, sft)).tolist()
                sums = LossSums(kl_sum, entropy_sum, sft_sum, tokens, waited, payload_bytes, computed_s, request(step))
                scheduler.submit(step, sums)
            with clock.phase("backward"):
                # One denominator, the global batch's: the gradient is the same however the batch is split.
                student.backward(loss_sum / work.num_loss_tokens)
        lr = learning_rate(step - 1, config, total_steps)
        with clock.phase("optimizer"):
            grad_norm = student.step(lr)
        with clock.phase("schedule_wait"):
            result = scheduler.collect(step)
        if result.tokens != work.num_loss_tokens:
            raise AttemptError(
                f"step {step}: the ranks did not read the same global batch: they counted {result.tokens} loss tokens "
                f"together, and this batch has {work.num_loss_tokens}; are all nodes given the same data?"
            )

        seconds = clock.lap()
        on_step(
            StepMetrics(
                step=step,
                epoch=work.cursor.epoch,
                t=t,
                momentum=last.schedule["momentum"],
                loss=result.kl + result.entropy,
                kl=result.kl,
                entropy_pt=result.entropy,
                sft=result.sft,
                floor_active=last.schedule["floor_active"],
                lr=lr,
                grad_norm=grad_norm,
                tokens=result.tokens,
                tokens_per_s=result.tokens / seconds["step"],
                step_s=seconds["step"],
                teacher_wait_s=result.teacher_wait_s,
                **{f"{phase}_s": seconds.get(phase, 0.0) for phase in PHASES},
                teacher_compute_s=result.teacher_compute_s,
                payload_bytes=result.payload_bytes,
                samples_seen=work.cursor.samples,
            ),
            result,
            work.cursor,
        )
        last = result
    return last
