"""Memory of the processes of a planned run: of a student worker by ZeRO stage, of a teacher's process by shards."""

from dataclasses import dataclass

from taid_ray.errors import ModelError
from taid_ray.models.loading import check_divisible
from taid_ray.plan.inputs import PlanInputs
from taid_ray.plan.memory import Parts, TeacherProcess, Worker, largest, teacher_memory, worker_memory
from taid_ray.plan.sizes import Activations, ZeroOptions

SHARDS = (1, 2, 4, 8)


@dataclass(frozen=True)
class WorkerMemory:
    """Memory of a student worker with one ZeRO stage, with or without gradient checkpointing."""

    zero_stage: int
    checkpointing: bool
    moment: str
    """When most is needed: start, forward, backward or step."""
    parts: Parts
    bytes: float
    fits: bool


@dataclass(frozen=True)
class ShardMemory:
    """Memory of one process of a teacher's replica of so many shards."""

    shards: int
    parts: Parts
    bytes: float
    fits: bool


def worker_memories(
    inputs: PlanInputs, checkpointing: bool, activations: Activations, teacher_peak: int
) -> list[WorkerMemory]:
    """Returns one for each ZeRO stage that the student's dtype allows. teacher_peak: bytes of a local teacher's
    activations."""
    student, beside = inputs.config.student, {}
    if inputs.mode == "local":
        beside = {"teacher": float(inputs.teacher_bytes * inputs.teacher.parameters + teacher_peak)}
    worker = Worker(
        shape=inputs.student,
        activations=activations,
        loss=inputs.loss,
        dtype_bytes=inputs.student_bytes,
        workers=inputs.workers,
        accumulation=inputs.accumulation,
        window_bytes=inputs.on_device_bytes,
        reserved_bytes=inputs.hardware.reserved_bytes,
        teacher=beside,
    )
    memories = []
    for stage in (1, 2, 3) if inputs.student_bytes == 2 else (0, 1, 2, 3):
        options = ZeroOptions.of(student.deepspeed, stage, inputs.hardware.is_cpu)
        moment, parts = largest(worker_memory(worker, stage, options))
        total = sum(parts.values())
        memories.append(WorkerMemory(stage, checkpointing, moment, parts, total, total <= inputs.hardware.memory_bytes))
    return memories


def shard_memories(inputs: PlanInputs, teacher_peak: int) -> list[ShardMemory]:
    """Returns one for each number of SHARDS that the architecture allows, and for the configured number; none unless the
    teacher has processes of its own."""
    if inputs.mode != "pool":
        return []
    teacher = TeacherProcess(
        shape=inputs.teacher,
        forward_peak=teacher_peak,
        dtype_bytes=inputs.teacher_bytes,
        payload=inputs.config.given_teacher.payload,
        answer_bytes=inputs.answer_bytes,
        logits_bytes=inputs.logits_bytes,
        reserved_bytes=inputs.hardware.teacher_reserved_bytes,
    )
    memories = []
    for shards in sorted(
        {*filter(lambda number: _divides(inputs, number), SHARDS), inputs.config.given_teacher.shards}
    ):
        parts = teacher_memory(teacher, shards)
        total = sum(parts.values())
        memories.append(ShardMemory(shards, parts, total, total <= inputs.hardware.memory_bytes))
    return memories


def _divides(inputs: PlanInputs, shards: int) -> bool:
    """Tells whether the teacher's architecture can be split into so many shards."""
    try:
        check_divisible(inputs.models.teacher, shards)
    except ModelError:
        return False
    return True
