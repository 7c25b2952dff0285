"""Notes to a Forecast: what cannot work, what is wasted, what is less certain, and where its rates come from."""

from typing import TYPE_CHECKING

from taid_ray.plan.from_run import replicas_of
from taid_ray.plan.process_memory import ShardMemory, WorkerMemory

if TYPE_CHECKING:
    from taid_ray.plan.forecast import Forecast

RATE_NAMES = {
    "teacher_s": "teacher, one request",
    "forward_s": "student's forward, one micro-batch",
    "loss_s": "loss",
    "backward_s": "backward",
    "optimizer_s": "optimizer, one step",
    "data_s": "making and sending a request",
    "request_s": "a request's way, there and back",
    "read_s": "reading one row of data",
}
"""Fields of Rates that are seconds, in words."""


def planned_rates(found: "Forecast") -> list[str]:
    """Lists those names in RATE_NAMES that the planned teacher.mode has; the others are 0."""
    return [name for name in RATE_NAMES if getattr(found.assumed, name) or getattr(found.rates, name)]


def plan_notes(found: "Forecast") -> list[str]:
    """Returns all notes, one line of text each."""
    return [
        *_memory_notes(found),
        *_image_notes(found),
        *_time_notes(found),
        *_scaling_notes(found),
        *_assumptions(found),
        *_run_notes(found),
    ]


def _memory_notes(found: "Forecast") -> list[str]:
    lines, hardware = [], found.inputs.hardware
    room = f"{hardware.name} has {gib(hardware.memory_bytes)}: it cannot fit"
    own = found.configured
    if not own.fits:
        lines.append(f"a student worker needs {gib(own.bytes)} and {room}; {_worker_remedy(found.worker_memory, own)}")
    teacher = found.inputs.config.teacher
    shard = next((memory for memory in found.shard_memory if teacher and memory.shards == teacher.shards), None)
    if shard is not None and not shard.fits:
        needed = f"a teacher process needs {gib(shard.bytes)} with teacher.shards: {shard.shards}"
        lines.append(f"{needed} and {room}; {_shards_remedy(found.shard_memory)}")
    return lines


def _image_notes(found: "Forecast") -> list[str]:
    """Says what of the images is not counted, and whether processing them holds the student back."""
    inputs, images = found.inputs, found.inputs.images
    if images is None:
        return []
    lines = [
        f"the activations of the {name}'s vision tower are NOT counted, because its code cannot be traced without running it; "
        "leave room for them"
        for name, traced in inputs.towers_traced.items()
        if not traced
    ]
    lines.append(
        "operations of a vision tower are counted as two for each of its weights and patches, without its attention"
    )
    processing = inputs.micro_rows * images.per_row * images.student.seconds
    computing = found.rates.forward_s + found.rates.loss_s + found.rates.backward_s
    if processing > computing:
        lines.append(
            f"processing the images of a micro-batch takes {processing:.2g} s in one thread here, computing it "
            f"{computing:.2g} s: workers will wait for their images; lower data.image_processor, or give workers faster cores"
        )
    return lines


def _worker_remedy(memories: list[WorkerMemory], own: WorkerMemory) -> str:
    fitting = [memory for memory in memories if memory.fits]
    best = min(fitting, key=lambda memory: (memory.checkpointing, memory.zero_stage), default=None)
    if best is None:
        return "use more workers, a smaller train.micro_batch_size or loss.memory_mib, or a larger GPU"
    also = " and student.gradient_checkpointing: true" if best.checkpointing and not own.checkpointing else ""
    return f"it would fit with student.zero_stage: {best.zero_stage}{also}"


def _shards_remedy(memories: list[ShardMemory]) -> str:
    fitting = [memory.shards for memory in memories if memory.fits]
    return f"set teacher.shards: {fitting[0]}" if fitting else "use more shards, or a larger GPU"


def _time_notes(found: "Forecast") -> list[str]:
    times = found.times
    if found.inputs.mode != "pool" or not found.inputs.asks_teacher:
        return []
    if times.balanced_replicas > times.replicas:
        return [
            f"the student will wait for its teacher {1 - times.student_s / times.step_s:.0%} of the time; "
            f"teacher.replicas: {times.balanced_replicas} would hide it"
        ]
    if times.balanced_replicas < times.replicas:
        return [f"{times.replicas} teacher replicas, but {times.balanced_replicas} would hide the teacher"]
    return []


def _scaling_notes(found: "Forecast") -> list[str]:
    """Says from how many workers on something that is common to all of them holds the run back."""
    first = {point.waits_for: point for point in reversed(found.scaling)}
    rows, lines = found.inputs.workload.worker_rows, []
    if reading := first.get("data"):
        blocks = found.inputs.config.data.order == "blocks"
        why = ": every worker reads and encodes the whole batch; with data.order: global it reads its own rows only"
        lines.append(
            f"on {reading.workers:,} workers with {rows} rows each, reading the data"
            f"{' and processing its images' if found.inputs.images else ''} takes longer than training{why if blocks else ''}"
        )
    if scheduler := first.get("schedule"):
        lines.append(
            f"on {scheduler.workers:,} workers with {rows} rows each, steps wait for the scheduler actor, one process that "
            f"is busy {scheduler.scheduler_share:.0%} of the time with reports, heartbeats and polls; longer steps hide it"
        )
    return lines


def _assumptions(found: "Forecast") -> list[str]:
    """Says what this configuration makes less certain."""
    lines, config, hardware = [], found.inputs.config, found.inputs.hardware
    student, teacher = config.student, config.teacher
    zero = student.deepspeed.get("zero_optimization", {})
    if any(key in zero for key in ("offload_optimizer", "offload_param")):
        lines.append("student.deepspeed asks for offloading, which is not modelled: all is counted on the device")
    if teacher and teacher.quantization:
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
        where = "in the step time" if found.run else "not in the step time, but in the table of workers"
        lines.append(f"the collectives are {where} ({hardware.collective / 1e9:g} GB/s assumed)")
    return lines


def _run_notes(found: "Forecast") -> list[str]:
    """Says which rates are a run's, what it ran on, and which are still assumed."""
    if found.run is None:
        return []
    run, hardware = found.run, found.inputs.hardware
    known, unknown = ([name for name in planned_rates(found) if (name in run.rates) == side] for side in (True, False))
    lines = [
        f"from {run.path} ({run.inputs.workers} worker(s), teacher: {replicas_of(run.inputs)}, means of {run.steps} steps): "
        f"{_named(known)}",
        f"still assumed: {_named(unknown)}; memory, links and collectives",
        f"a run does not record its hardware: that of {run.path.name} is taken to be {hardware.name}",
    ]
    if run.mixed_starts:
        lines.append(
            f"the workers of {run.path.name} were started {run.mixed_starts} times, and an older version did not record at "
            "which steps: if settings changed in between, these rates are mixed"
        )
    if hardware.is_cpu:
        lines.append(
            "on CPU cores, rates of processes that had to share cores contain that: more processes on the same cores will be "
            "slower than planned"
        )
    return lines


def _named(rates: list[str]) -> str:
    return "; ".join(RATE_NAMES[name] for name in rates) or "nothing"


def gib(count: float) -> str:
    """Returns bytes as text, in GiB or MiB."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
