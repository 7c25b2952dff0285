"""What a Forecast should tell its reader beside the figures: what cannot work, what is wasted, what is less certain."""

from typing import TYPE_CHECKING

from taid_ray.config.schema import DistillConfig

if TYPE_CHECKING:
    from taid_ray.plan.forecast_type import Forecast


def plan_notes(config: DistillConfig, found: "Forecast") -> list[str]:
    return [*_memory_notes(config, found), *_time_notes(found), *_scaling_notes(found), *_assumptions(config, found)]


def _memory_notes(config: DistillConfig, found: "Forecast") -> list[str]:
    lines, room, own = [], found.hardware.memory_bytes, found.configured()
    if not own.fits:
        fitting = [memory for memory in found.worker_memory if memory.fits]
        best = min(fitting, key=lambda memory: (memory.checkpointing, memory.zero_stage), default=None)
        remedy = "use more workers, a smaller train.micro_batch_size or loss.memory_mib, or a larger GPU"
        if best is not None:
            remedy = f"it would fit with student.zero_stage: {best.zero_stage}" + (
                " and student.gradient_checkpointing: true" if best.checkpointing and not own.checkpointing else ""
            )
        lines.append(
            f"a student worker needs {gib(own.bytes)} and {found.hardware.name} has {gib(room)}: it cannot fit; {remedy}"
        )
    rank = next((rank for rank in found.teacher_memory if rank.shards == config.teacher.shards), None)
    if rank is not None and not rank.fits:
        fitting_shards = [each.shards for each in found.teacher_memory if each.fits]
        remedy = f"set teacher.shards: {fitting_shards[0]}" if fitting_shards else "use more shards, or a larger GPU"
        lines.append(
            f"a teacher process needs {gib(rank.bytes)} with teacher.shards: {rank.shards} and {found.hardware.name} has "
            f"{gib(room)}: it cannot fit; {remedy}"
        )
    return lines


def _time_notes(found: "Forecast") -> list[str]:
    times = found.times
    if found.mode == "pool" and times.balanced_replicas > times.replicas:
        return [
            f"the student will wait for its teacher {1 - times.student_s / times.step_s:.0%} of the time; "
            f"teacher.replicas: {times.balanced_replicas} would hide it"
        ]
    if found.mode == "pool" and times.balanced_replicas < times.replicas:
        return [f"{times.replicas} teacher replicas, but {times.balanced_replicas} would hide the teacher"]
    return []


def _scaling_notes(found: "Forecast") -> list[str]:
    reading = next((point for point in found.scaling if point.waits_for == "data"), None)
    if reading is None:
        return []
    return [
        f"on {reading.workers:,} workers with {found.workload.worker_rows} rows each, reading the data takes longer than "
        "training: every worker reads and encodes the whole batch"
    ]


def _assumptions(config: DistillConfig, found: "Forecast") -> list[str]:
    """What this configuration makes less certain."""
    lines, student, teacher = [], config.student, config.teacher
    zero = student.deepspeed.get("zero_optimization", {})
    if any(key in zero for key in ("offload_optimizer", "offload_param")):
        lines.append("student.deepspeed asks for offloading, which is not modelled: all is counted on the device")
    if teacher.quantization:
        lines.append("teacher.quantization is not modelled: its weights are counted unquantised")
    if not config.data.pack:
        lines.append("data.pack: false: every row is counted as full, so real steps have less work and memory")
    if config.data.format != "text" and config.data.loss_on == "response":
        lines.append("data.loss_on: response: every position is counted as carrying loss, so real answers are smaller")
    if not student.workers.fixed:
        lines.append(
            f"student.workers may change while the run lasts; this plan is for the fewest, {student.workers.min}"
        )
    if student.workers.min > 1:
        where = "in the step time" if found.calibration else "not in the step time, but in the table of workers"
        lines.append(f"the collectives are {where} ({found.hardware.collective / 1e9:g} GB/s assumed)")
    return lines


def gib(count: float) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
