"""What a run will need and how fast it will be, before anything is started: `taid-ray plan`.

Puts sizes (plan_case, plan_trace), memory (plan_memory) and time (plan_time) of a configuration into a Forecast.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from taid_ray.config import DistillConfig
from taid_ray.errors import ModelError
from taid_ray.hardware import Hardware
from taid_ray.models import check_divisible
from taid_ray.plan_case import Case, Models, check_device
from taid_ray.plan_memory import Parts, Worker, largest, teacher_memory, worker_memory
from taid_ray.plan_notes import notes
from taid_ray.plan_sizes import Activations, ModelShape, ZeroOptions
from taid_ray.plan_time import Bill, Load, Times, TokenFlops, bill, combined, student_times, teacher_time

BILLION = 1e9


@dataclass(frozen=True)
class WorkerMemory:
    """Of one ZeRO stage, with or without gradient checkpointing."""

    zero_stage: int
    checkpointing: bool
    moment: str
    """When most is needed: start, forward, backward or step."""
    parts: Parts
    bytes: float
    fits: bool


@dataclass(frozen=True)
class RankMemory:
    """Of one process of a replica of so many shards."""

    shards: int
    parts: Parts
    bytes: float
    fits: bool


@dataclass(frozen=True)
class Forecast:
    name: str
    hardware: Hardware
    utilisation: float
    mode: str
    payload: str
    zero_stage: int
    checkpointing: bool
    shards: int
    workers: int
    student: ModelShape
    teacher: ModelShape
    num_shared: int
    worker_memory: list[WorkerMemory]
    teacher_memory: list[RankMemory]
    """Empty unless the teacher has processes of its own."""
    wire_bytes_per_token: dict[str, int]
    """Of each payload, per loss position."""
    object_store_bytes: float
    """That the cluster's nodes must have together, for the answers in flight."""
    flops: TokenFlops
    load: Load
    times: Times
    processors: float
    """GPUs, or CPU cores, of students and teacher."""
    per_billion: Bill
    whole: Bill | None
    """Of --tokens, else of train.steps."""
    wire_bytes_per_s: float
    """Of all answers."""
    notes: list[str]

    def as_dict(self) -> dict[str, Any]:
        """For JSON; bytes, seconds, operations."""
        tree = asdict(self)
        for model in ("student", "teacher"):
            tree[model].pop("sizes")
        return tree | {"bottleneck": self.times.bottleneck, "tokens_per_s": self.load.tokens / self.times.step_s}

    def configured(self) -> WorkerMemory:
        """The worker's memory as the configuration has it."""
        return next(
            memory
            for memory in self.worker_memory
            if (memory.zero_stage, memory.checkpointing) == (self.zero_stage, self.checkpointing)
        )


def forecast(
    config: DistillConfig,
    models: Models,
    hardware: Hardware,
    *,
    utilisation: float,
    tokens: float | None = None,
    price_per_hour: float | None = None,
    on_wait: Callable[[str], None] = lambda message: None,
) -> Forecast:
    """on_wait: told what takes seconds. Raises ConfigError where config and hardware contradict, ModelError as `trace`."""
    check_device(config, hardware)
    case = Case(config, models, hardware)
    load, teacher_peak = case.load, 0
    if case.mode != "cache":
        on_wait("tracing the teacher's forward pass")
        teacher_peak = case.teacher_activations().forward_peak
    memories: list[WorkerMemory] = []
    for checkpointing in (False, True):
        on_wait(f"tracing the student {'with' if checkpointing else 'without'} gradient checkpointing")
        memories += worker_memories(case, checkpointing, case.student_activations(checkpointing), teacher_peak)
    times = step_times(case, utilisation)
    processors = _processors(case, times.replicas)
    pooled = case.mode == "pool"
    wanted = tokens or (config.train.steps or 0) * load.tokens
    found = Forecast(
        name=config.name,
        hardware=hardware,
        utilisation=utilisation,
        mode=case.mode,
        payload=config.teacher.payload,
        zero_stage=config.student.zero_stage,
        checkpointing=config.student.gradient_checkpointing,
        shards=config.teacher.shards,
        workers=case.workers,
        student=case.student,
        teacher=case.teacher,
        num_shared=models.num_shared,
        worker_memory=memories,
        teacher_memory=rank_memories(case, teacher_peak) if pooled else [],
        wire_bytes_per_token=case.wire_bytes,
        object_store_bytes=2 * case.in_flight_bytes * case.workers if pooled else 0.0,
        flops=case.flops,
        load=load,
        times=times,
        processors=processors,
        per_billion=bill(BILLION, load, times.step_s, processors, price_per_hour),
        whole=bill(wanted, load, times.step_s, processors, price_per_hour) if wanted else None,
        wire_bytes_per_s=load.tokens * case.wire_bytes[config.teacher.payload] / times.step_s if pooled else 0.0,
        notes=[],
    )
    found.notes.extend(notes(config, found))
    return found


def worker_memories(case: Case, checkpointing: bool, activations: Activations, teacher_peak: int) -> list[WorkerMemory]:
    """One for each ZeRO stage that the student's dtype allows. teacher_peak: of a local teacher's activations."""
    student, beside = case.config.student, {}
    if case.mode == "local":
        beside = {"teacher": float(case.teacher_bytes * case.teacher.parameters + teacher_peak)}
    worker = Worker(
        shape=case.student,
        activations=activations,
        loss=case.loss,
        dtype_bytes=case.student_bytes,
        workers=case.workers,
        accumulation=case.accumulation,
        window_bytes=case.on_device_bytes,
        reserved_bytes=case.hardware.reserved_bytes,
        teacher=beside,
    )
    found = []
    for stage in (1, 2, 3) if case.student_bytes == 2 else (0, 1, 2, 3):
        options = ZeroOptions.of(student.deepspeed, stage, case.hardware.is_cpu)
        moment, parts = largest(worker_memory(worker, stage, options))
        total = sum(parts.values())
        found.append(WorkerMemory(stage, checkpointing, moment, parts, total, total <= case.hardware.memory_bytes))
    return found


def rank_memories(case: Case, teacher_peak: int) -> list[RankMemory]:
    """For 1, 2, 4 and 8 shards, where they are possible, and the configured number."""
    found = []
    for shards in sorted({*_possible_shards(case.models), case.config.teacher.shards}):
        parts = teacher_memory(
            case.teacher,
            teacher_peak,
            case.teacher_bytes,
            shards,
            case.config.teacher.payload,
            case.answer_bytes,
            case.hardware.reserved_bytes,
        )
        total = sum(parts.values())
        found.append(RankMemory(shards, parts, total, total <= case.hardware.memory_bytes))
    return found


def step_times(case: Case, utilisation: float) -> Times:
    """Of one optimizer step. utilisation: share of the peak that matmuls reach."""
    teacher, hardware, flops = case.config.teacher, case.hardware, case.flops
    own = case.config.student.cpus_per_worker if hardware.is_cpu else 1.0
    shards = teacher.shards * (teacher.cpus_per_shard if hardware.is_cpu else 1.0)
    student = student_times(case.load, flops, hardware, own, case.student_bytes, utilisation)
    teacher_s = teacher_time(
        case.load,
        flops,
        hardware,
        own if case.mode == "local" else shards,
        case.teacher_bytes,
        utilisation,
        float(case.teacher_bytes * case.teacher.parameters),
        teacher.max_tokens,
    )
    return combined(student, teacher_s, case.mode, (teacher.replicas.min, teacher.replicas.max), case.workers)


def _possible_shards(models: Models) -> list[int]:
    found = []
    for shards in (1, 2, 4, 8):
        try:
            check_divisible(models.teacher, shards, "teacher.model")
        except ModelError:
            continue
        found.append(shards)
    return found


def _processors(case: Case, replicas: int) -> float:
    """GPUs, or CPU cores, of students and teacher."""
    config = case.config
    own, shard = (config.student.cpus_per_worker, config.teacher.cpus_per_shard) if case.hardware.is_cpu else (1, 1)
    return case.workers * own + replicas * config.teacher.shards * shard
