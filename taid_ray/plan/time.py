"""Operations, seconds and money of a run, from sizes alone. No torch.

A multiplication and an addition are two operations; per token means per position of a row, padding included.
"""

import math
from dataclasses import dataclass

from taid_ray.plan.hardware import Hardware

LOSS_PASSES = 34
"""Times the loss reads or writes a float32 [tokens, vocabulary]: counted from losses.taid.mix (8) and its closed_form_kl_
(24), plus the conversion of both sides' logits."""
OPTIMIZER_BYTES = 48
"""Moved per trained parameter and step: AdamW reads 4 and writes 3 float32 values, norm and clipping read 2 and write 1, and
the new weight is read, rounded and written."""
BANDWIDTH_SHARE = 0.7
"""Of the data sheet's memory bandwidth that such passes reach; an assumption."""
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
    """Gradient checkpointing."""
    loss: float
    """At the student: both heads, and the student's head's gradients."""

    @property
    def student(self) -> float:
        return self.forward + self.backward + self.recompute + self.loss


def body_flops(matmul: int, layers: int, attention_width: int, length: int, packed: bool) -> float:
    """Forward pass of one token: its matmuls, and attention (scores and values) over the row it lies in.

    Packed rows come with a mask, and kernels then compute the whole square; else the causal half.
    """
    seen = length if packed else length / 2
    return 2.0 * matmul + 4.0 * layers * attention_width * seen


def backward_flops(
    matmul: int, matmul_trained: int, layers: int, attention_width: int, length: int, packed: bool
) -> float:
    """Gradients of all inputs, and of the trained weights (not of those that adapters leave frozen)."""
    attention = body_flops(0, layers, attention_width, length, packed)
    return 2.0 * (matmul + matmul_trained) + 2 * attention


def loss_flops(vocabulary: int, student_hidden: int, teacher_hidden: int | None, head_trained: bool) -> float:
    """Per loss position. teacher_hidden: None where the payload carries logits or probabilities."""
    student = 2.0 * vocabulary * student_hidden * (3 if head_trained else 2)
    return student + (2.0 * vocabulary * teacher_hidden if teacher_hidden else 0.0)


@dataclass(frozen=True)
class StepWorkload:
    """One optimizer step."""

    rows: int
    """Of the global batch."""
    worker_rows: int
    """Of the worker that has most."""
    requests: int
    """Micro-batches of all workers."""
    length: int
    vocabulary: int
    trained_per_worker: float
    """Parameters that one worker's optimizer updates."""

    @property
    def tokens(self) -> int:
        return self.rows * self.length


@dataclass(frozen=True)
class Times:
    """Seconds per optimizer step."""

    student_s: float
    """The slowest worker, without waiting for teacher or network."""
    loss_s: float
    """Of student_s."""
    optimizer_s: float
    """Of student_s."""
    teacher_s: float
    """All of the teacher's work on one replica; 0 without one."""
    replicas: int
    """That the run has."""
    balanced_replicas: int
    """Fewest that hide the teacher behind the student."""
    step_s: float
    limit: str = ""
    """What the simulation says that steps wait for, where there is one."""

    @property
    def bottleneck(self) -> str:
        return self.limit or ("teacher" if self.step_s > self.student_s else "student")


def student_times(
    workload: StepWorkload, flops: TokenFlops, hardware: Hardware, cores: float, dtype_bytes: int, use: float
) -> tuple[float, float, float]:
    """(all, loss, optimizer) of one worker. cores: GPUs (1) or CPU cores. use: share of the peak that matmuls reach."""
    speed = hardware.flops(dtype_bytes) * cores * use
    bandwidth = hardware.bandwidth * cores * BANDWIDTH_SHARE
    tokens = workload.worker_rows * workload.length
    loss = tokens * (flops.loss / speed + LOSS_PASSES * 4 * workload.vocabulary / bandwidth)
    optimizer = OPTIMIZER_BYTES * workload.trained_per_worker / bandwidth
    body = tokens * (flops.student - flops.loss) / speed
    return body + loss + optimizer, loss, optimizer


def teacher_time(
    workload: StepWorkload,
    flops: TokenFlops,
    hardware: Hardware,
    cores: float,
    dtype_bytes: int,
    use: float,
    weight_bytes: float,
    max_tokens: int,
) -> float:
    """Seconds of one replica for a whole step. cores: GPUs or CPU cores of all its shards.

    A forward pass takes at least as long as reading the weights once.
    """
    speed = hardware.flops(dtype_bytes) * cores * use
    request = workload.tokens / workload.requests
    passes = workload.requests * math.ceil(request / max_tokens)
    reading = passes * weight_bytes / (hardware.bandwidth * cores * BANDWIDTH_SHARE)
    return max(workload.tokens * flops.teacher / speed, reading)


def combined(
    student: tuple[float, float, float], teacher_s: float, mode: str, replicas: tuple[int, int], workers: int
) -> Times:
    """replicas: fewest and most. A teacher in the student's process (local) works before it, on its worker's rows only."""
    student_s, loss_s, optimizer_s = student
    if mode == "local":
        step_s = student_s + teacher_s / workers
        return Times(student_s, loss_s, optimizer_s, teacher_s / workers, 0, 0, step_s)
    if mode == "cache":
        return Times(student_s, loss_s, optimizer_s, 0.0, 0, 0, student_s)
    balanced = max(1, math.ceil(teacher_s / student_s))
    chosen = min(max(balanced, replicas[0]), replicas[1])
    step_s = max(student_s, teacher_s / chosen)
    return Times(student_s, loss_s, optimizer_s, teacher_s, chosen, balanced, step_s)


@dataclass(frozen=True)
class CostEstimate:
    """Of so many tokens."""

    tokens: float
    hours: float
    processor_hours: float
    """GPU hours, or hours of CPU cores."""
    cost: float | None
    """In the unit of the price; None without one."""


def estimate_cost(
    tokens: float, workload: StepWorkload, step_s: float, processors: float, price_per_hour: float | None
) -> CostEstimate:
    """Time and cost of training on `tokens` positions, start-up, validation and checkpoints left out."""
    hours = tokens / workload.tokens * step_s / SECONDS_PER_HOUR
    used = hours * processors
    return CostEstimate(tokens, hours, used, None if price_per_hour is None else used * price_per_hour)
