"""The result of `taid-ray plan`: everything that its tables and its JSON show."""

from dataclasses import asdict, dataclass
from typing import Any

from taid_ray.plan.calibration import Calibration
from taid_ray.plan.hardware import Hardware
from taid_ray.plan.memory import Parts
from taid_ray.plan.rates import Rates, ScalingPoint
from taid_ray.plan.sizes import ModelShape
from taid_ray.plan.time import CostEstimate, StepWorkload, Times, TokenFlops
from taid_ray.plan.worker_memory import WorkerMemory


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
    workload: StepWorkload
    times: Times
    processors: float
    """GPUs, or CPU cores, of students and teacher."""
    per_billion: CostEstimate
    whole: CostEstimate | None
    """Of --tokens, else of train.steps."""
    wire_bytes_per_s: float
    """Of all answers."""
    rates: Rates
    """What the times are computed from."""
    calibration: Calibration | None
    """What was measured beside what was assumed; None without --measure."""
    scaling: list[ScalingPoint]
    notes: list[str]

    def as_dict(self) -> dict[str, Any]:
        """For JSON; bytes, seconds, operations."""
        tree = asdict(self)
        for model in ("student", "teacher"):
            tree[model].pop("sizes")
        return tree | {"bottleneck": self.times.bottleneck, "tokens_per_s": self.workload.tokens / self.times.step_s}

    def configured(self) -> WorkerMemory:
        """The worker's memory as the configuration has it."""
        return next(
            memory
            for memory in self.worker_memory
            if (memory.zero_stage, memory.checkpointing) == (self.zero_stage, self.checkpointing)
        )
