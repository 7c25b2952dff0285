"""Forecasts what a run will need and how fast it will be, before anything is started: the result of `taid-ray plan`.

It is put together from sizes (inputs, trace), memory (memory, process_memory) and time (time, rates, simulation).
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from taid_ray.plan.data import DataPreparation, data_preparation
from taid_ray.plan.from_run import RunFigures
from taid_ray.plan.inputs import PlanInputs, check_device
from taid_ray.plan.notes import plan_notes
from taid_ray.plan.process_memory import ShardMemory, WorkerMemory, shard_memories, worker_memories
from taid_ray.plan.rates import Rates, ScalingPoint, assumed_rates, computed_times, scaling, simulated_times
from taid_ray.plan.time import CostEstimate, Times, estimate_cost

BILLION = 1e9


@dataclass(frozen=True)
class Forecast:
    """Everything that the tables and the JSON of `taid-ray plan` show."""

    inputs: PlanInputs
    utilisation: float
    """Assumed share of the peak that matmuls reach."""
    worker_memory: list[WorkerMemory]
    shard_memory: list[ShardMemory]
    """Memory of a teacher's process; empty unless the teacher has processes of its own."""
    assumed: Rates
    rates: Rates
    """What the times are computed from: as assumed, but for what `run` knows."""
    run: RunFigures | None
    """The run that rates were taken from (--from)."""
    replayed_s: float | None
    """Seconds of a step that these rates give for that run's own layout."""
    times: Times
    processors: float
    """GPUs, or CPU cores, of students and teacher."""
    per_billion: CostEstimate
    whole: CostEstimate | None
    """Cost of --tokens, else of train.steps."""
    data: DataPreparation | None
    """Preparing a billion tokens of documents; None if nothing is prepared."""
    scaling: list[ScalingPoint]

    @property
    def object_store_bytes(self) -> float:
        """Bytes that the cluster's object stores must have together: twice the answers and images in flight."""
        inputs = self.inputs
        in_flight = inputs.in_flight_bytes + inputs.images_in_flight_bytes
        return 2 * in_flight * inputs.workers if inputs.mode == "pool" else 0.0

    @property
    def wire_bytes_per_s(self) -> float:
        """Bytes of the answers that a pool sends per second of training."""
        inputs = self.inputs
        if inputs.mode != "pool" or not inputs.asks_teacher:
            return 0.0
        return self.tokens_per_s * inputs.wire_bytes[inputs.config.given_teacher.payload]

    @property
    def tokens_per_s(self) -> float:
        """Positions of all workers' rows per second."""
        return self.inputs.workload.tokens / self.times.step_s

    @property
    def configured(self) -> WorkerMemory:
        """The worker's memory as the configuration has it."""
        student = self.inputs.config.student
        here = (student.zero_stage, student.gradient_checkpointing)
        return next(memory for memory in self.worker_memory if (memory.zero_stage, memory.checkpointing) == here)

    @cached_property
    def notes(self) -> list[str]:
        """Lines of text that the reader should know beside the figures."""
        return plan_notes(self)

    def as_dict(self) -> dict[str, Any]:
        """Returns all figures for JSON; bytes, seconds, operations."""
        inputs, config, teacher = self.inputs, self.inputs.config, self.inputs.config.teacher
        shapes = {
            name: asdict(getattr(inputs, name)) for name in ("student", "teacher") if name == "student" or teacher
        }
        for shape in shapes.values():
            for name in ("sizes", *(() if inputs.images else ("vision", "vision_trained"))):
                shape.pop(name)
        figures = (
            "times",
            "rates",
            "assumed",
            "per_billion",
            "whole",
            "data",
            "worker_memory",
            "shard_memory",
            "scaling",
        )
        return (
            shapes
            | {
                "name": config.name,
                "hardware": asdict(inputs.hardware),
                "utilisation": self.utilisation,
                "mode": inputs.mode,
                "payload": teacher and teacher.payload,
                "zero_stage": config.student.zero_stage,
                "checkpointing": config.student.gradient_checkpointing,
                "shards": teacher and teacher.shards,
                "workers": inputs.workers,
                "num_shared": inputs.models.num_shared,
                "wire_bytes_per_token": inputs.wire_bytes if teacher else {},
                "wire_bytes_per_s": self.wire_bytes_per_s,
                "object_store_bytes": self.object_store_bytes,
                "flops": asdict(inputs.flops),
                "workload": asdict(inputs.workload),
                **{name: _plain(getattr(self, name)) for name in figures},
                "run": self.run and self.run.as_dict() | {"replayed_s": self.replayed_s},
                "processors": self.processors,
                "tokens_per_s": self.tokens_per_s,
                "bottleneck": self.times.bottleneck,
                "notes": self.notes,
            }
            | self._images_as_dict()
        )

    def _images_as_dict(self) -> dict[str, Any]:
        images, inputs = self.inputs.images, self.inputs
        if images is None:
            return {}
        figures = {"request_bytes": inputs.image_bytes, "towers_traced": inputs.towers_traced}
        return {"images": images.as_dict() | figures}


def forecast(
    inputs: PlanInputs,
    *,
    utilisation: float,
    tokens: float | None = None,
    price_per_hour: float | None = None,
    run: RunFigures | None = None,
    on_wait: Callable[[str], None] = lambda message: None,
) -> Forecast:
    """Computes memory, time and cost. tokens: to train on, instead of train.steps. run: whose rates take the place of the
    assumed ones. on_wait: told what takes seconds.

    Raises ConfigError where configuration and hardware contradict, ModelError as `trace`.
    """
    check_device(inputs.config, inputs.hardware)
    worker_memory, shard_memory = _memory(inputs, on_wait)
    assumed = rates = assumed_rates(inputs, utilisation)
    on_wait("simulating 1 to 4,096 workers")
    if run is None:
        times, replayed_s = computed_times(inputs, rates), None
    else:
        rates = run.applied(assumed, inputs)
        times, replayed_s = simulated_times(inputs, rates), run.replayed_s(assumed_rates(run.inputs, utilisation))
    processors = _processors(inputs, times.replicas)
    wanted = tokens or (inputs.config.train.steps or 0) * inputs.workload.tokens

    def cost(count: float) -> CostEstimate:
        return estimate_cost(count, inputs.workload, times.step_s, processors, price_per_hour)

    return Forecast(
        inputs=inputs,
        utilisation=utilisation,
        worker_memory=worker_memory,
        shard_memory=shard_memory,
        assumed=assumed,
        rates=rates,
        run=run,
        replayed_s=replayed_s,
        times=times,
        processors=processors,
        per_billion=cost(BILLION),
        whole=cost(wanted) if wanted else None,
        data=data_preparation(inputs.config, inputs.workers, BILLION),
        scaling=scaling(inputs, rates, times.replicas),
    )


def _memory(inputs: PlanInputs, on_wait: Callable[[str], None]) -> tuple[list[WorkerMemory], list[ShardMemory]]:
    """Returns the memory of a worker without and with gradient checkpointing, and of a teacher's process."""
    teacher_peak = 0
    if inputs.mode not in ("cache", "none"):
        on_wait("tracing the teacher's forward pass")
        teacher_peak = inputs.teacher_activations().forward_peak
    on_wait("tracing the student without and with gradient checkpointing")
    workers = [
        memory
        for checkpointing in (False, True)
        for memory in worker_memories(inputs, checkpointing, inputs.student_activations(checkpointing), teacher_peak)
    ]
    return workers, shard_memories(inputs, teacher_peak)


def _processors(inputs: PlanInputs, replicas: int) -> float:
    """Counts the GPUs, or CPU cores, of students and teacher. replicas: those that training asks."""
    teacher, on_cpu = inputs.config.teacher, inputs.hardware.is_cpu
    students = inputs.workers * (inputs.config.student.cpus_per_worker if on_cpu else 1)
    if teacher is None:
        return students
    if teacher.mode == "pool" and not inputs.asks_teacher:  # it is there for validations
        replicas = teacher.replicas.min
    return students + replicas * teacher.shards * (teacher.cpus_per_shard if on_cpu else 1)


def _plain(value: Any) -> Any:
    """Returns a dataclass, or a list of them, as JSON has them."""
    if isinstance(value, list):
        return [asdict(item) for item in value]
    return None if value is None else asdict(value)
