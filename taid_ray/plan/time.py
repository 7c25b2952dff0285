"""Arithmetic of a run's operations, seconds and money, from sizes alone. No torch.

A multiplication and an addition are two operations; per token means per position of a row, padding included.
"""

import math
from dataclasses import dataclass

from taid_ray.plan.hardware import Hardware

LOSS_PASSES = 34
"""Times the loss reads or writes a float32 [tokens, vocabulary]: counted from losses.taid.mix (8) and its closed_form_kl_
(24), plus the conversion of both sides' logits."""
SFT_PASSES = 11
"""The same for the loss sft: normaliser (4), label (1), gradient (4), and the conversion of the student's logits."""
OPTIMIZER_BYTES = 48
"""Moved per trained parameter and step: AdamW reads 4 and writes 3 float32 values, norm and clipping read 2 and write 1, and
the new weight is read, rounded and written."""
BANDWIDTH_SHARE = 0.7
"""Share of the data sheet's memory bandwidth that such passes reach; an assumption."""
FLOAT32 = 4
"""Bytes of an element."""
SECONDS_PER_HOUR = 3600.0


@dataclass(frozen=True)
class TokenFlops:
    """Operations per token."""

    teacher: float
    """Forward pass, and for topk and logits its head."""
    forward: float
    """The student's body."""
    backward: float
    recompute: float
    """Forward pass again, for gradient checkpointing; else 0."""
    loss: float
    """At the student: both heads, and the gradients of the student's head."""

    @property
    def student(self) -> float:
        """All operations of the student."""
        return self.forward + self.backward + self.recompute + self.loss


def body_flops(matmul: int, layers: int, attention_width: int, length: int, packed: bool) -> float:
    """Counts the forward pass of one token: its matmuls, and attention (scores and values) over the row it lies in.

    Packed rows come with a mask, and kernels then compute the whole square; else the causal half.
    """
    seen = length if packed else length / 2
    return 2.0 * matmul + 4.0 * layers * attention_width * seen


def backward_flops(
    matmul: int, matmul_trained: int, layers: int, attention_width: int, length: int, packed: bool
) -> float:
    """Counts the gradients of all inputs and of the trained weights (not of those that adapters leave frozen), per token."""
    attention = body_flops(0, layers, attention_width, length, packed)
    return 2.0 * (matmul + matmul_trained) + 2 * attention


def loss_flops(vocabulary: int, student_hidden: int, teacher_hidden: int | None, head_trained: bool) -> float:
    """Counts the loss of one position. teacher_hidden: None where the payload carries logits or probabilities."""
    student = 2.0 * vocabulary * student_hidden * (3 if head_trained else 2)
    return student + (2.0 * vocabulary * teacher_hidden if teacher_hidden else 0.0)


@dataclass(frozen=True)
class StepWorkload:
    """Work of one optimizer step."""

    rows: int
    """Rows of the global batch."""
    worker_rows: int
    """Rows of the worker that has most."""
    requests: int
    """Micro-batches of all workers."""
    length: int
    """Tokens of a row."""
    vocabulary: int
    """Shared ids, over which the loss is formed."""
    trained_per_worker: float
    """Parameters that one worker's optimizer updates."""

    @property
    def tokens(self) -> int:
        """Positions of the global batch."""
        return self.rows * self.length


@dataclass(frozen=True)
class Times:
    """Seconds per optimizer step."""

    student_s: float
    """The slowest worker, without waiting for teacher or network."""
    loss_s: float
    """Part of student_s."""
    optimizer_s: float
    """Part of student_s."""
    teacher_s: float
    """All of the teacher's work on one replica; 0 without one."""
    replicas: int
    """Teacher replicas that the run has."""
    balanced_replicas: int
    """Fewest replicas that hide the teacher behind the student."""
    step_s: float
    limit: str = ""
    """What steps wait for in the simulation (SimulatedStep.waits_for); empty where there was none."""

    @property
    def bottleneck(self) -> str:
        """`student`, `teacher`, or another wait of the simulation."""
        return self.limit or ("teacher" if self.step_s > self.student_s else "student")


@dataclass(frozen=True)
class Speed:
    """Speed that a process reaches on its processors."""

    flops: float
    """Operations per second of matmuls."""
    bandwidth: float
    """Bytes per second between processors and memory."""

    @classmethod
    def of(cls, hardware: Hardware, processors: float, dtype_bytes: int, use: float) -> "Speed":
        """Computes the speed from a data sheet. processors: GPUs or CPU cores of the process. use: share of the peak that
        matmuls reach."""
        return cls(hardware.flops(dtype_bytes) * processors * use, hardware.bandwidth * processors * BANDWIDTH_SHARE)


def student_times(
    workload: StepWorkload, flops: TokenFlops, speed: Speed, loss_passes: int = LOSS_PASSES
) -> tuple[float, float, float]:
    """Returns one worker's seconds in one step: all, and of these loss and optimizer."""
    tokens = workload.worker_rows * workload.length
    loss = tokens * (flops.loss / speed.flops + loss_passes * FLOAT32 * workload.vocabulary / speed.bandwidth)
    optimizer = OPTIMIZER_BYTES * workload.trained_per_worker / speed.bandwidth
    body = tokens * (flops.student - flops.loss) / speed.flops
    return body + loss + optimizer, loss, optimizer


def teacher_time(
    workload: StepWorkload, flops: TokenFlops, speed: Speed, weight_bytes: float, max_tokens: int
) -> float:
    """Returns the seconds that one replica computes for a whole step. max_tokens: of one forward pass.

    A forward pass takes at least as long as reading the weights once.
    """
    request = workload.tokens / workload.requests
    passes = workload.requests * math.ceil(request / max_tokens)
    return max(workload.tokens * flops.teacher / speed.flops, passes * weight_bytes / speed.bandwidth)


def combined_times(
    student: tuple[float, float, float], teacher_s: float, mode: str, replicas: tuple[int, int], workers: int
) -> Times:
    """Returns the times of a step whose slower side hides the other one. student: as `student_times` returns it. replicas:
    fewest and most.

    A teacher in the student's process (mode local) works before it, on its worker's rows only. With modes cache and none no
    teacher works."""
    student_s, loss_s, optimizer_s = student
    if mode == "local":
        step_s = student_s + teacher_s / workers
        return Times(student_s, loss_s, optimizer_s, teacher_s / workers, 0, 0, step_s)
    if mode in ("cache", "none"):
        return Times(student_s, loss_s, optimizer_s, 0.0, 0, 0, student_s)
    balanced = max(1, math.ceil(teacher_s / student_s))
    chosen = min(max(balanced, replicas[0]), replicas[1])
    step_s = max(student_s, teacher_s / chosen)
    return Times(student_s, loss_s, optimizer_s, teacher_s, chosen, balanced, step_s)


@dataclass(frozen=True)
class CostEstimate:
    """Time and cost of training on so many tokens."""

    tokens: float
    hours: float
    processor_hours: float
    """GPU hours, or hours of CPU cores."""
    cost: float | None
    """Money, in the unit of the price; None without one."""


def estimate_cost(
    tokens: float, workload: StepWorkload, step_s: float, processors: float, price_per_hour: float | None
) -> CostEstimate:
    """Estimates time and cost of training on `tokens` positions, start-up, validation and checkpoints left out."""
    hours = tokens / workload.tokens * step_s / SECONDS_PER_HOUR
    used = hours * processors
    return CostEstimate(tokens, hours, used, None if price_per_hour is None else used * price_per_hour)
