"""What a run will need and how fast it will be, before anything is started: `taid-ray plan`.

Puts sizes (inputs, trace), memory (memory) and time (time) of a configuration into a Forecast.
"""

from collections.abc import Callable
from dataclasses import replace

from taid_ray.config.schema import DistillConfig
from taid_ray.errors import ModelError
from taid_ray.models.loading import check_divisible
from taid_ray.plan.calibration import Measured, calibrated
from taid_ray.plan.forecast_type import Forecast, RankMemory
from taid_ray.plan.hardware import Hardware
from taid_ray.plan.inputs import Models, PlanInputs, check_device
from taid_ray.plan.memory import teacher_memory
from taid_ray.plan.notes import plan_notes
from taid_ray.plan.rates import Rates, assumed_rates, scaling, simulated, times_of
from taid_ray.plan.time import Times, estimate_cost
from taid_ray.plan.worker_memory import WorkerMemory, worker_memories

BILLION = 1e9
FULL = 0.9
"""Share of the cores' time from which it is they that limit a run on one host."""


def forecast(
    config: DistillConfig,
    models: Models,
    hardware: Hardware,
    *,
    utilisation: float,
    tokens: float | None = None,
    price_per_hour: float | None = None,
    measured: Measured | None = None,
    on_wait: Callable[[str], None] = lambda message: None,
) -> Forecast:
    """measured: rates and memory of real steps, which then take the place of the assumed ones. on_wait: told what takes
    seconds. Raises ConfigError where config and hardware contradict, ModelError as `trace`."""
    check_device(config, hardware)
    inputs = PlanInputs(config, models, hardware)
    workload, teacher_peak = inputs.workload, 0
    if inputs.mode != "cache":
        on_wait("tracing the teacher's forward pass")
        teacher_peak = inputs.teacher_activations().forward_peak
    on_wait("tracing the student without and with gradient checkpointing")
    activations = {checkpointing: inputs.student_activations(checkpointing) for checkpointing in (False, True)}
    rates, found_here = assumed_rates(inputs, utilisation), None
    if measured is not None:
        found_here = calibrated(
            inputs, measured, rates, activations[config.student.gradient_checkpointing], teacher_peak
        )
        rates = found_here.rates
    own_reserve, rank_reserve = hardware.reserved_bytes, hardware.teacher_reserved_bytes
    if found_here is not None:
        own_reserve, rank_reserve = found_here.reserves(hardware)
    memories: list[WorkerMemory] = []
    for checkpointing in (False, True):
        memories += worker_memories(inputs, checkpointing, activations[checkpointing], teacher_peak, own_reserve)
    times = times_of(inputs, rates)
    on_wait("simulating 1 to 4,096 workers")
    if measured is not None:
        times = with_simulation(inputs, rates, times, measured.cores)
    processors = _processors(inputs, times.replicas)
    pooled = inputs.mode == "pool"
    wanted = tokens or (config.train.steps or 0) * workload.tokens
    found = Forecast(
        name=config.name,
        hardware=hardware,
        utilisation=utilisation,
        mode=inputs.mode,
        payload=config.teacher.payload,
        zero_stage=config.student.zero_stage,
        checkpointing=config.student.gradient_checkpointing,
        shards=config.teacher.shards,
        workers=inputs.workers,
        student=inputs.student,
        teacher=inputs.teacher,
        num_shared=models.num_shared,
        worker_memory=memories,
        teacher_memory=rank_memories(inputs, teacher_peak, rank_reserve) if pooled else [],
        wire_bytes_per_token=inputs.wire_bytes,
        object_store_bytes=2 * inputs.in_flight_bytes * inputs.workers if pooled else 0.0,
        flops=inputs.flops,
        workload=workload,
        times=times,
        processors=processors,
        per_billion=estimate_cost(BILLION, workload, times.step_s, processors, price_per_hour),
        whole=estimate_cost(wanted, workload, times.step_s, processors, price_per_hour) if wanted else None,
        wire_bytes_per_s=workload.tokens * inputs.wire_bytes[config.teacher.payload] / times.step_s if pooled else 0.0,
        rates=rates,
        calibration=found_here,
        scaling=scaling(inputs, rates, times.replicas),
        notes=[],
    )
    found.notes.extend(plan_notes(config, found))
    return found


def rank_memories(inputs: PlanInputs, teacher_peak: int, reserved_bytes: float) -> list[RankMemory]:
    """For 1, 2, 4 and 8 shards, where they are possible, and the configured number."""
    found = []
    for shards in sorted({*_possible_shards(inputs.models), inputs.config.teacher.shards}):
        parts = teacher_memory(
            inputs.teacher,
            teacher_peak,
            inputs.teacher_bytes,
            shards,
            inputs.config.teacher.payload,
            inputs.answer_bytes,
            inputs.logits_bytes,
            reserved_bytes,
        )
        total = sum(parts.values())
        found.append(RankMemory(shards, parts, total, total <= inputs.hardware.memory_bytes))
    return found


def with_simulation(inputs: PlanInputs, rates: Rates, times: Times, cores: float | None) -> Times:
    """The step as the simulation has it. cores: of the one host that everything shares, if there is only one."""
    found = simulated(inputs, rates, times.replicas, cores)
    busy = inputs.workers * times.student_s + times.teacher_s * (inputs.workers if inputs.mode == "local" else 1)
    full = cores is not None and found.waits_for != "teacher" and busy > FULL * cores * found.step_s
    return replace(times, step_s=found.step_s, limit="cores" if full else found.waits_for)


def _possible_shards(models: Models) -> list[int]:
    found = []
    for shards in (1, 2, 4, 8):
        try:
            check_divisible(models.teacher, shards, "teacher.model")
        except ModelError:
            continue
        found.append(shards)
    return found


def _processors(inputs: PlanInputs, replicas: int) -> float:
    """GPUs, or CPU cores, of students and teacher."""
    config = inputs.config
    own, shard = (config.student.cpus_per_worker, config.teacher.cpus_per_shard) if inputs.hardware.is_cpu else (1, 1)
    return inputs.workers * own + replicas * config.teacher.shards * shard
