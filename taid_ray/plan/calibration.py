"""What real steps say about a plan: measured rates and memory in the place of assumed ones."""

from dataclasses import dataclass

from taid_ray.config.schema import DistillConfig
from taid_ray.plan.hardware import Hardware
from taid_ray.plan.inputs import PlanInputs
from taid_ray.plan.memory import teacher_memory
from taid_ray.plan.rates import Rates, adapted
from taid_ray.plan.sizes import Activations
from taid_ray.plan.worker_memory import worker_memories


@dataclass(frozen=True)
class Measured:
    """Of a few real steps."""

    config: DistillConfig
    """As they were made: fewer steps, perhaps fewer workers and replicas."""
    on_gpus: bool
    rates: Rates
    step_s: float
    cores: float | None
    """Of the host, if there was only one and nothing but cores in it."""
    worker_bytes: float | None
    """The most that a worker's process held, resident; None where it was not seen."""
    replica_bytes: float | None
    """Likewise a process of a teacher's replica."""


@dataclass(frozen=True)
class Calibration:
    """Figures of one configuration, assumed and measured, in the layout of the plan unless said otherwise."""

    assumed: Rates
    rates: Rates
    """As measured, for the plan's layout."""
    workers: int
    """That were measured."""
    replicas: int
    step_s: float
    """As measured."""
    worker_planned: float
    """Bytes of a worker in the measured layout, the assumed reserve included."""
    worker_bytes: float | None
    replica_planned: float
    replica_bytes: float | None

    def reserves(self, hardware: Hardware) -> tuple[float, float]:
        """Bytes beside what the plan counts, of a worker and of a teacher's process: as measured where that is known."""
        worker, replica = (
            reserved if found is None else max(0.0, reserved + found - planned)
            for reserved, found, planned in (
                (hardware.reserved_bytes, self.worker_bytes, self.worker_planned),
                (hardware.teacher_reserved_bytes, self.replica_bytes, self.replica_planned),
            )
        )
        return worker, replica


def calibrated(
    inputs: PlanInputs, measured: Measured, assumed: Rates, activations: Activations, teacher_peak: int
) -> Calibration:
    """activations: of the student as configured, teacher_peak: of a teacher's forward pass; both of a micro-batch."""
    here = PlanInputs(measured.config, inputs.models, inputs.hardware)
    student, teacher, hardware = inputs.config.student, inputs.config.teacher, inputs.hardware
    memories = worker_memories(here, student.gradient_checkpointing, activations, teacher_peak, hardware.reserved_bytes)
    replica = teacher_memory(
        here.teacher,
        teacher_peak,
        here.teacher_bytes,
        teacher.shards,
        teacher.payload,
        here.answer_bytes,
        here.logits_bytes,
        hardware.teacher_reserved_bytes,
    )
    return Calibration(
        assumed=assumed,
        rates=adapted(measured.rates, here, inputs),
        workers=here.workers,
        replicas=measured.config.teacher.replicas.min if here.mode == "pool" else 0,
        step_s=measured.step_s,
        worker_planned=next(memory.bytes for memory in memories if memory.zero_stage == student.zero_stage),
        worker_bytes=measured.worker_bytes,
        replica_planned=sum(replica.values()) if here.mode == "pool" else 0.0,
        replica_bytes=measured.replica_bytes,
    )
