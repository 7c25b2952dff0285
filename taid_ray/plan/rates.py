"""How long the parts of a step take, assumed or measured, and what the simulation makes of them for any number of workers."""

import math
from dataclasses import dataclass, replace

from taid_ray.plan.inputs import PlanInputs
from taid_ray.plan.pipeline import Pipeline, SimulatedStep, collective_s
from taid_ray.plan.simulation import simulate
from taid_ray.plan.time import Times, combined, student_times, teacher_time

# Assumptions of a plan without measurement; the last ones are from benchmarks/results (scheduler, payload) on 2 CPU cores.
READ_TOKENS_PER_S = 1e6
DATA_S = 1e-3
REQUEST_S, COPIED_BYTES_PER_S = 5e-3, 1e9
NOISE = 0.03
REPORT_S = 0.57e-3
"""The scheduler actor's work for one report: 290 ms for 512."""
REQUESTS_SIMULATED = 60_000
"""More would take longer than some seconds."""
WORKERS = (1, 4, 16, 64, 256, 1024, 4096)


@dataclass(frozen=True)
class Rates:
    """Seconds, of one processor (GPU, or cores of one process) that does nothing else."""

    measured: bool
    teacher_s: float
    """One request, that is one micro-batch, on one replica."""
    forward_s: float
    """One micro-batch through the student's body."""
    loss_s: float
    """One micro-batch."""
    backward_s: float
    """One micro-batch, recomputation included."""
    optimizer_s: float
    """One worker's share of the parameters."""
    read_s: float
    """Reading and encoding one row; every worker reads all rows of a step, in a thread of its own."""
    data_s: float
    """Making and sending one request."""
    request_s: float
    """What a request takes beside the teacher's computation: packing, routing, copying, checking."""
    noise: float
    """Standard deviation of the logarithm of a worker's time from step to step."""


@dataclass(frozen=True)
class ScalingPoint:
    """The simulation of so many workers."""

    workers: int
    replicas: int
    tokens_per_s: float
    efficiency: float
    """Share of the time that a worker computes, mean over all."""
    waits_for: str
    """See simulation.SimulatedStep."""


def assumed_rates(inputs: PlanInputs, utilisation: float) -> Rates:
    """From sizes and data sheets. utilisation: share of the peak that matmuls reach."""
    teacher, hardware, flops, workload = inputs.config.teacher, inputs.hardware, inputs.flops, inputs.workload
    own = inputs.config.student.cpus_per_worker if hardware.is_cpu else 1.0
    shards = teacher.shards * (teacher.cpus_per_shard if hardware.is_cpu else 1.0)
    whole, loss_s, optimizer_s = student_times(workload, flops, hardware, own, inputs.student_bytes, utilisation)
    body = (whole - loss_s - optimizer_s) / inputs.accumulation
    forward = flops.forward / (flops.student - flops.loss)
    teacher_s = teacher_time(
        workload,
        flops,
        hardware,
        own if inputs.mode == "local" else shards,
        inputs.teacher_bytes,
        utilisation,
        float(inputs.teacher_bytes * inputs.teacher.parameters),
        teacher.max_tokens,
    )
    return Rates(
        measured=False,
        teacher_s=0.0 if inputs.mode == "cache" else teacher_s / workload.requests,
        forward_s=body * forward,
        loss_s=loss_s / inputs.accumulation,
        backward_s=body * (1 - forward),
        optimizer_s=optimizer_s,
        read_s=workload.length / READ_TOKENS_PER_S,
        data_s=DATA_S,
        request_s=0.0 if inputs.mode == "local" else REQUEST_S + inputs.answer_bytes / COPIED_BYTES_PER_S,
        noise=NOISE,
    )


def adapted(rates: Rates, measured_at: PlanInputs, inputs: PlanInputs) -> Rates:
    """Measured rates in another layout: micro-batches of another size, another share of the parameters."""
    rows = inputs.micro_rows / measured_at.micro_rows
    share = inputs.workload.trained_per_worker / measured_at.workload.trained_per_worker
    names = ("teacher_s", "forward_s", "loss_s", "backward_s")
    scaled = {name: getattr(rates, name) * rows for name in names}
    return replace(rates, **scaled, optimizer_s=rates.optimizer_s * share)


def times_of(inputs: PlanInputs, rates: Rates) -> Times:
    """Arithmetic: the slower of student and teacher, nothing else waits for anything."""
    micro, replicas = inputs.accumulation, inputs.config.teacher.replicas
    loss_s = micro * rates.loss_s
    student_s = micro * (rates.data_s + rates.forward_s + rates.backward_s) + loss_s + rates.optimizer_s
    teacher_s = inputs.workload.requests * rates.teacher_s
    limits = (replicas.min, replicas.max)
    return combined((student_s, loss_s, rates.optimizer_s), teacher_s, inputs.mode, limits, inputs.workers)


def simulated(inputs: PlanInputs, rates: Rates, replicas: int, cores: float | None) -> SimulatedStep:
    """The configured layout. cores: of the one host that everything shares, None: everybody has its own."""
    return simulate(_pipeline(inputs, rates, inputs.workers, replicas, cores))


def scaling(inputs: PlanInputs, rates: Rates, replicas: int) -> list[ScalingPoint]:
    """1 to 4,096 workers, each with the rows of a configured one, so that the batch grows with them; and the teacher's
    replicas in the proportion of `replicas` to the configured workers."""
    points: list[ScalingPoint] = []
    for workers in WORKERS:
        beside = math.ceil(replicas * workers / inputs.workers) if replicas else 0
        pipeline = _pipeline(inputs, rates, workers, beside, None)
        shorter, share = _shortened(pipeline)
        found = simulate(shorter)
        tokens = workers * inputs.workload.worker_rows * inputs.workload.length / (found.step_s * share)
        busy = found.worker_busy_s / workers / (shorter.warm_up + shorter.steps)
        points.append(ScalingPoint(workers, beside, tokens, min(1.0, busy / found.step_s), found.waits_for))
    return points


def _shortened(pipeline: Pipeline) -> tuple[Pipeline, float]:
    """A pipeline that is simulated within seconds, and how many times as long the real one's steps are.

    Fewer steps; if that is not enough a part of the step only, everything in proportion.
    """
    room = REQUESTS_SIMULATED / pipeline.workers
    warm_up, steps = (4, 10) if 14 * pipeline.micro_batches <= room else (2, 2)
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


def _pipeline(inputs: PlanInputs, rates: Rates, workers: int, replicas: int, cores: float | None) -> Pipeline:
    teacher, zero = inputs.config.teacher, inputs.config.student.zero_stage
    window = min(teacher.window, max(1, int(teacher.window_mib * 2**20 / inputs.answer_bytes)))
    pooled = inputs.mode == "pool"
    gather_s, reduce_s, update_s = _collectives(inputs, workers)
    return Pipeline(
        workers=workers,
        replicas=replicas if pooled else 0,
        micro_batches=inputs.accumulation,
        forward_s=rates.forward_s + rates.loss_s,
        backward_s=rates.backward_s,
        optimizer_s=rates.optimizer_s * (inputs.workers / workers if zero else 1),
        teacher_s=rates.teacher_s,
        window=window,
        read_s=rates.read_s * inputs.workload.worker_rows * workers,
        data_s=rates.data_s,
        request_s=rates.request_s / 2,
        answer_s=rates.request_s / 2,
        answer_bytes=inputs.answer_bytes if cores is None and pooled else 0.0,  # within a host it is in request_s
        link_bytes_per_s=inputs.hardware.link,
        latency_s=inputs.hardware.latency_s,
        gather_s=gather_s,
        reduce_s=reduce_s,
        update_s=update_s,
        report_s=REPORT_S,
        noise=rates.noise,
        cores=cores,
    )


def _collectives(inputs: PlanInputs, workers: int) -> tuple[float | None, float | None, float | None]:
    """Seconds of those before a forward pass, with a backward pass, and with the optimizer step; None: there is none."""
    stage, hardware = inputs.config.student.zero_stage, inputs.hardware
    gradients = float(inputs.student.trained * inputs.student_bytes)
    weights = float(inputs.student.parameters * inputs.student_bytes)

    def seconds(count: float, passes: int) -> float:
        return collective_s(count, workers, hardware.collective, hardware.latency_s, passes)

    if stage == 3:
        return seconds(weights, 1), seconds(weights, 1) + seconds(gradients, 1), None
    if stage == 2:
        return None, seconds(gradients, 1), seconds(gradients, 1)
    return None, None, seconds(gradients, 2 if stage == 0 else 3)
