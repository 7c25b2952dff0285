"""The memory of a student worker of a planned run, for each ZeRO stage."""

from dataclasses import dataclass

from taid_ray.plan.inputs import PlanInputs
from taid_ray.plan.memory import Parts, Worker, largest, worker_memory
from taid_ray.plan.sizes import Activations, ZeroOptions


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


def worker_memories(
    inputs: PlanInputs, checkpointing: bool, activations: Activations, teacher_peak: int, reserved_bytes: float
) -> list[WorkerMemory]:
    """One for each ZeRO stage that the student's dtype allows. teacher_peak: of a local teacher's activations."""
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
        reserved_bytes=reserved_bytes,
        teacher=beside,
    )
    found = []
    for stage in (1, 2, 3) if inputs.student_bytes == 2 else (0, 1, 2, 3):
        options = ZeroOptions.of(student.deepspeed, stage, inputs.hardware.is_cpu)
        moment, parts = largest(worker_memory(worker, stage, options))
        total = sum(parts.values())
        found.append(WorkerMemory(stage, checkpointing, moment, parts, total, total <= inputs.hardware.memory_bytes))
    return found
