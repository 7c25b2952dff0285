"""Seconds of the parts of a step, and what the simulation makes of them for any number of workers."""

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

from taid_ray.plan.data import row_s, step_read_s
from taid_ray.plan.inputs import PlanInputs
from taid_ray.plan.pipeline import Pipeline, collective_s
from taid_ray.plan.simulation import simulate
from taid_ray.plan.time import LOSS_PASSES, SFT_PASSES, Speed, Times, combined_times, student_times, teacher_time
from taid_ray.scheduler.aggregate import BEATS_PER_S, HEARTBEAT_S
from taid_ray.student.prefetch import READ_AHEAD_STEPS

# Assumptions; those from REQUEST_S on are from benchmarks/results (scheduler, payload) on 2 CPU cores.
DATA_S = 1e-3
NOISE = 0.03
REQUEST_S, COPIED_BYTES_PER_S = 5e-3, 1e9
REPORT_S, BEAT_S = 0.6e-3, 1e-3
"""CPU time of the scheduler actor's process for one report, of 512 that arrive together, and for one heartbeat, which comes
alone (benchmarks/control_plane.py)."""
POLLS_SHARE = 0.01
"""Share of the scheduler actor's time for what does not depend on the number of workers: the driver's polls, rank 0's metrics,
Ray's own."""
REQUESTS_SIMULATED, REQUESTS_OF_MANY_STEPS = 60_000, 6_000
"""Most requests that one simulation follows, so that it takes seconds; and those it may spend on more steps than MIN_STEPS, for
a better mean."""
MIN_STEPS, MAX_STEPS = 10, 100
WORKERS = (1, 4, 16, 64, 256, 1024, 4096)


@dataclass(frozen=True)
class Rates:
    """Seconds, of one processor (GPU, or cores of one process) that does nothing else."""

    teacher_s: float
    """The teacher's pass over one request, that is one micro-batch, on one replica."""
    forward_s: float
    """Forward pass of one micro-batch through the student's body."""
    loss_s: float
    """The loss of one micro-batch."""
    backward_s: float
    """Backward pass of one micro-batch, recomputation included."""
    optimizer_s: float
    """Update of one worker's share of the parameters."""
    read_s: float
    """Reading one row, in a thread of its own; with `data.order: blocks` encoding it, too."""
    data_s: float
    """Making and sending one request."""
    request_s: float
    """Time of a request beside the teacher's computation: packing, routing, copying, checking."""
    noise: float
    """Standard deviation of the logarithm of a worker's time from step to step."""


class Collectives(NamedTuple):
    """Seconds of what student workers send each other; None: there is none."""

    gather_s: float | None
    """Before every forward pass."""
    reduce_s: float | None
    """With every backward pass."""
    update_s: float | None
    """With the optimizer step."""


@dataclass(frozen=True)
class ScalingPoint:
    """The simulation of so many workers."""

    workers: int
    replicas: int
    tokens_per_s: float
    efficiency: float
    """Share of the time that a worker computes, mean over all."""
    scheduler_share: float
    """Share of its time that the scheduler actor's process is busy, at most: shorter steps need no heartbeats."""
    waits_for: str
    """See SimulatedStep.waits_for."""


def assumed_rates(inputs: PlanInputs, utilisation: float) -> Rates:
    """Computes rates from sizes and data sheets. utilisation: share of the peak that matmuls reach."""
    flops, asks = inputs.flops, inputs.asks_teacher
    speed = Speed.of(inputs.hardware, _worker_processors(inputs), inputs.student_bytes, utilisation)
    passes = LOSS_PASSES if asks else SFT_PASSES
    whole, loss_s, optimizer_s = student_times(inputs.workload, flops, speed, passes)
    body = (whole - loss_s - optimizer_s) / inputs.accumulation
    forward = flops.forward / (flops.student - flops.loss)
    return Rates(
        teacher_s=_assumed_teacher_s(inputs, utilisation) if asks and inputs.mode != "cache" else 0.0,
        forward_s=body * forward,
        loss_s=loss_s / inputs.accumulation,
        backward_s=body * (1 - forward),
        optimizer_s=optimizer_s,
        read_s=row_s(inputs.config) + images_s(inputs),
        data_s=DATA_S,
        request_s=0.0 if inputs.mode == "local" or not asks else REQUEST_S + inputs.answer_bytes / COPIED_BYTES_PER_S,
        noise=NOISE,
    )


def _worker_processors(inputs: PlanInputs) -> float:
    """Counts the GPUs, or CPU cores, of a student worker."""
    return inputs.config.student.cpus_per_worker if inputs.hardware.is_cpu else 1


def _assumed_teacher_s(inputs: PlanInputs, utilisation: float) -> float:
    """Computes the seconds of one request on one replica, or in a student worker."""
    teacher, hardware = inputs.config.given_teacher, inputs.hardware
    processors = teacher.shards * (teacher.cpus_per_shard if hardware.is_cpu else 1)
    if inputs.mode == "local":
        processors = _worker_processors(inputs)
    speed = Speed.of(hardware, processors, inputs.teacher_bytes, utilisation)
    weights = float(inputs.teacher_bytes * inputs.teacher.parameters)
    whole = teacher_time(inputs.workload, inputs.flops, speed, weights, teacher.max_tokens) / inputs.workload.requests
    images = inputs.images
    if images is None or images.teacher is None:
        return whole
    return max(whole, inputs.micro_rows * images.per_row * images.teacher.seconds)  # in a thread beside the model


def images_s(inputs: PlanInputs) -> float:
    """Computes the seconds in which a thread of a student worker processes the images of one row."""
    return inputs.images.per_row * inputs.images.student.seconds if inputs.images else 0.0


def computed_times(inputs: PlanInputs, rates: Rates) -> Times:
    """Computes the times of a step by arithmetic: the slower of student and teacher, nothing else waits for anything."""
    micro, mode = inputs.accumulation, inputs.mode if inputs.asks_teacher else "none"
    loss_s = micro * rates.loss_s
    student_s = micro * (rates.data_s + rates.forward_s + rates.backward_s) + loss_s + rates.optimizer_s
    teacher_s = inputs.workload.requests * rates.teacher_s
    teacher = inputs.config.teacher
    limits = (teacher.replicas.min, teacher.replicas.max) if teacher else (0, 0)
    return combined_times((student_s, loss_s, rates.optimizer_s), teacher_s, mode, limits, inputs.workers)


def simulated_times(inputs: PlanInputs, rates: Rates) -> Times:
    """Computes the times of a step as the simulation of the configured layout has them."""
    times = computed_times(inputs, rates)
    shorter, share = _shortened(_pipeline(inputs, rates, inputs.workers, times.replicas))
    step = simulate(shorter)
    return replace(times, step_s=step.step_s * share, limit=step.waits_for)


def scaling(inputs: PlanInputs, rates: Rates, replicas: int) -> list[ScalingPoint]:
    """Simulates 1 to 4,096 workers, each with the rows of a configured one, so that the batch grows with them; and the
    teacher's replicas in the proportion of `replicas` to the configured workers."""
    points: list[ScalingPoint] = []
    for workers in WORKERS:
        beside = math.ceil(replicas * workers / inputs.workers) if replicas else 0
        pipeline = _pipeline(inputs, rates, workers, beside)
        shorter, share = _shortened(pipeline)
        step = simulate(shorter)
        step_s = step.step_s * share
        points.append(
            ScalingPoint(
                workers=workers,
                replicas=beside,
                tokens_per_s=workers * inputs.workload.worker_rows * inputs.workload.length / step_s,
                efficiency=min(1.0, step.worker_busy_s / workers / (shorter.warm_up + shorter.steps) / step.step_s),
                scheduler_share=min(1.0, workers * REPORT_S / step_s + pipeline.background_share),
                waits_for=step.waits_for,
            )
        )
    return points


def collectives(inputs: PlanInputs, workers: int) -> Collectives:
    """Returns the assumed seconds of the collectives among so many workers."""
    stage, hardware = inputs.config.student.zero_stage, inputs.hardware
    gradients = float(inputs.student.trained * inputs.student_bytes)
    weights = float(inputs.student.parameters * inputs.student_bytes)

    def seconds(count: float, passes: int) -> float:
        return collective_s(count, workers, hardware.collective, hardware.latency_s, passes)

    if stage == 3:
        return Collectives(seconds(weights, 1), seconds(weights, 1) + seconds(gradients, 1), None)
    if stage == 2:
        return Collectives(None, seconds(gradients, 1), seconds(gradients, 1))
    return Collectives(None, None, seconds(gradients, 2 if stage == 0 else 3))


def _shortened(pipeline: Pipeline) -> tuple[Pipeline, float]:
    """Returns a pipeline that is simulated within seconds, and how many times as long the real one's steps are.

    It has few steps, and if that is not enough a part of each step only, everything in proportion.
    """
    room = REQUESTS_SIMULATED / pipeline.workers
    warm_up, steps = 4, MIN_STEPS
    if (warm_up + steps) * pipeline.micro_batches > room:
        warm_up, steps = 2, 2
    else:
        many = REQUESTS_OF_MANY_STEPS // (pipeline.workers * pipeline.micro_batches)
        steps = min(max(many, MIN_STEPS), MAX_STEPS)
    micro = max(1, min(pipeline.micro_batches, int(room / (warm_up + steps))))
    share = micro / pipeline.micro_batches
    update_s = None if pipeline.update_s is None else pipeline.update_s * share
    return replace(
        pipeline,
        warm_up=warm_up,
        steps=steps,
        micro_batches=micro,
        optimizer_s=pipeline.optimizer_s * share,
        read_s=pipeline.read_s * share,
        report_s=pipeline.report_s * share,
        update_s=update_s,
    ), 1 / share


def _pipeline(inputs: PlanInputs, rates: Rates, workers: int, replicas: int) -> Pipeline:
    """Returns the pipeline of so many workers and replicas; everybody has a processor of its own."""
    between, pooled = collectives(inputs, workers), inputs.mode == "pool" and inputs.asks_teacher
    return Pipeline(
        workers=workers,
        replicas=replicas if pooled else 0,
        micro_batches=inputs.accumulation,
        forward_s=rates.forward_s + rates.loss_s,
        backward_s=rates.backward_s,
        optimizer_s=rates.optimizer_s * (inputs.workers / workers if inputs.config.student.zero_stage else 1),
        teacher_s=rates.teacher_s,
        read_ahead_steps=READ_AHEAD_STEPS,
        window=inputs.window,
        read_s=step_read_s(inputs.config, rates.read_s, inputs.workload.worker_rows, workers),
        data_s=rates.data_s,
        request_s=rates.request_s / 2,
        answer_s=rates.request_s / 2,
        answer_bytes=inputs.answer_bytes if pooled else 0.0,
        link_bytes_per_s=inputs.hardware.link,
        latency_s=inputs.hardware.latency_s,
        gather_s=between.gather_s,
        reduce_s=between.reduce_s,
        update_s=between.update_s,
        report_s=REPORT_S,
        background_share=min(workers / HEARTBEAT_S, BEATS_PER_S) * BEAT_S + POLLS_SHARE,
        noise=rates.noise,
    )
