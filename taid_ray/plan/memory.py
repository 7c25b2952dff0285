"""Arithmetic of the bytes that a student worker and a teacher's process hold, as this package and DeepSpeed 0.19 allocate them.

Letters in the code: p trained parameters, w bytes per element of the student's dtype, n workers.
`tests/unit/plan/test_memory.py` compares the sums with what small students really allocate.
"""

from dataclasses import dataclass, field

from taid_ray.losses.chunked import chunk_tokens_for
from taid_ray.losses.objective import block_rows
from taid_ray.plan.sizes import Activations, LossShape, ModelShape, ZeroOptions
from taid_ray.teacher.payload import CHUNK_BYTES

ALLREDUCE_ELEMENTS = 500_000_000
"""deepspeed.runtime.engine.MEMORY_OPT_ALLREDUCE_SIZE: gradients that are reduced at a time without ZeRO's own buckets."""
BFLOAT16, FLOAT32, FLOAT64 = 2.0, 4.0, 8.0
"""Bytes of an element."""
BLOCK_TENSORS = {True: 5, False: 14}
"""Float32 tensors [rows of a block, vocabulary] that are alive at a time, in closed form and in a graph (losses.objective)."""
LOGITS_COPIES = 5
"""Float32 chunks of logits that a teacher holds while it makes `topk` or `logits` of them."""
Parts = dict[str, float]
"""Bytes by what they are for."""


@dataclass(frozen=True)
class Worker:
    """One student worker, apart from its ZeRO stage."""

    shape: ModelShape
    activations: Activations
    loss: LossShape
    dtype_bytes: int
    workers: int
    accumulation: int
    window_bytes: float
    """Answers that wait on the worker's own device, the one in use included."""
    reserved_bytes: float
    teacher: Parts = field(default_factory=dict)
    """What a teacher in the same process holds (mode local)."""

    @property
    def in_bfloat16(self) -> bool:
        """True if the student computes in bfloat16, else it does in float32."""
        return self.dtype_bytes == BFLOAT16


@dataclass(frozen=True)
class Gradients:
    """Bytes of gradients, and of the buckets they travel in, beside those that live from step to step."""

    earlier: float = 0.0
    """Sum of the earlier micro-batches, during a forward pass."""
    backward: float = 0.0
    step: float = 0.0
    """During the optimizer step."""
    backward_buckets: float = 0.0
    step_buckets: float = 0.0


def worker_memory(worker: Worker, stage: int, zero: ZeroOptions) -> dict[str, Parts]:
    """Returns what is alive at each of the four moments at which one worker may need most."""
    shape, w = worker.shape, worker.dtype_bytes
    states = _states(worker, stage, zero)
    kept = states | _around(worker)
    gradients = _gradients(worker, stage, zero)
    gathered = _gathered(worker, stage, zero)
    hidden = w * worker.loss.tokens * shape.hidden_size
    head = FLOAT32 * worker.loss.vocabulary * shape.hidden_size * shape.head_trained
    saved = worker.activations.saved + 2.0 * hidden
    # until the second micro-batch there are no gradients yet
    earlier = gradients.earlier if worker.accumulation > 1 else 0.0
    return {
        "start": {"weights": FLOAT32 * shape.parameters, "reserved": worker.reserved_bytes},
        "forward": kept
        | gathered
        | {
            "gradients": states["gradients"] + earlier,
            "activations": max(worker.activations.forward_peak, saved),
            "loss": _loss_workspace(worker) + head + hidden,
        },
        "backward": kept
        | gathered
        | _backward(worker, head, saved)
        | {
            "gradients": states["gradients"] + gradients.backward,
            "communication": states["communication"] + gradients.backward_buckets,
        },
        "step": kept
        | {
            "gradients": states["gradients"] + gradients.step,
            "communication": states["communication"] + gradients.step_buckets,
        },
    }


def _backward(worker: Worker, head: float, saved: float) -> Parts:
    """Returns the larger of the pass's begin and of what follows. head: bytes of the float32 gradient of the head's shared
    rows."""
    shape, w = worker.shape, worker.dtype_bytes
    cast = float(w * shape.head_rows * shape.hidden_size * shape.head_trained)
    if not worker.in_bfloat16 and worker.loss.vocabulary == shape.head_rows:
        head = 0.0  # both are one tensor
    # The gradient of a tied head waits for that of the embedding; another one goes into a bucket at once.
    pending = cast * shape.head_tied
    begin = {"activations": saved, "loss": head + cast}
    rest = {"activations": float(worker.activations.backward_peak), "loss": pending}
    return max(begin, rest, key=lambda parts: sum(parts.values()))


def largest(moments: dict[str, Parts]) -> tuple[str, Parts]:
    """Returns the moment with the most bytes, and what they are."""
    moment = max(moments, key=lambda name: sum(moments[name].values()))
    return moment, moments[moment]


def _states(worker: Worker, stage: int, zero: ZeroOptions) -> Parts:
    """Returns what lives from step to step."""
    shape, w, n = worker.shape, worker.dtype_bytes, worker.workers
    p, whole = shape.trained, shape.parameters
    weights, gradients, communication = float(w * whole), 0.0, 0.0
    # AdamW's two moments; above stage 0 also float32 master weights, even where the weights are float32 themselves.
    optimizer = 2 * FLOAT32 * p if stage == 0 else 3 * FLOAT32 * p / n
    if stage == 1 and worker.in_bfloat16:
        gradients = FLOAT32 * p  # deepspeed.runtime.bf16_optimizer keeps the sum of all gradients on every worker
    if stage == 3:
        small = _kept_whole(worker, zero)
        weights = w * (whole / n + (small if n > 1 else 0))
        gradients = FLOAT32 * p / n
        communication = w * zero.bucket(p)
    return {"weights": weights, "optimizer": optimizer, "gradients": gradients, "communication": communication}


def _gradients(worker: Worker, stage: int, zero: ZeroOptions) -> Gradients:
    """Returns gradients and buckets beside what `_states` counts."""
    shape, n = worker.shape, worker.workers
    p, several = shape.trained, worker.accumulation > 1
    bucket = worker.dtype_bytes * zero.bucket(p) * (2 if zero.overlap_comm else 1)
    whole, reduced = FLOAT32 * p, FLOAT32 * min(p, ALLREDUCE_ELEMENTS)
    norm = FLOAT64 * shape.largest  # formed of one parameter at a time
    if stage == 0:
        return Gradients(earlier=whole, backward=whole, step=whole, step_buckets=reduced)
    if stage == 1 and worker.in_bfloat16:
        half = BFLOAT16 * p
        # Larger models than one bucket are reduced in place, but for the copy in the type they travel in.
        copies = reduced + half if p <= ALLREDUCE_ELEMENTS else half
        return Gradients(earlier=half, backward=half, step=half, step_buckets=copies)
    if stage == 1:
        return Gradients(
            earlier=whole + bucket, backward=whole, step=whole, backward_buckets=bucket, step_buckets=bucket
        )
    if stage == 2:
        part = whole / n
        # float32 gradients are added as a second set, and flattened as another copy
        twice = 0.0 if worker.in_bfloat16 else part
        backward = part + (twice if several else 0.0)
        return Gradients(earlier=part, backward=backward, step=part + max(twice, norm), backward_buckets=bucket)
    # A reduce-scatter of a full bucket has a copy of it; one at the end of the pass meets no activations any more.
    scatter = worker.dtype_bytes * zero.reduce_bucket_size if n > 1 and p > zero.reduce_bucket_size else 0.0
    return Gradients(step=max(FLOAT32 * min(p / n, zero.sub_group_size), norm / n), backward_buckets=scatter)


def _kept_whole(worker: Worker, zero: ZeroOptions) -> int:
    """Counts the elements of the parameters that ZeRO-3 leaves on every worker."""
    return sum(size for size in worker.shape.sizes if size <= zero.persistence_threshold)


def _gathered(worker: Worker, stage: int, zero: ZeroOptions) -> Parts:
    """Returns the weights that ZeRO-3 has gathered: up to max_live_parameters, not only those of one layer."""
    if stage < 3 or worker.workers == 1:
        return {}
    large = worker.shape.parameters - _kept_whole(worker, zero)
    return {"gathered weights": worker.dtype_bytes * min(large, zero.max_live_parameters)}


def _around(worker: Worker) -> Parts:
    """Returns what no ZeRO stage changes."""
    loss = worker.loss
    head = loss.vocabulary * loss.teacher_hidden * loss.teacher_dtype_bytes if loss.needs_head else 0
    if worker.teacher:
        head = 0  # a view of the teacher's own
    parts = {"teacher head": float(head), "prefetch window": worker.window_bytes, "reserved": worker.reserved_bytes}
    return parts | worker.teacher


def _loss_workspace(worker: Worker) -> float:
    """Returns the bytes of a chunk's logits, and of what is alive of a block of it."""
    loss, w = worker.loss, worker.dtype_bytes
    half_precision_sides = worker.in_bfloat16 + (loss.needs_head and loss.teacher_dtype_bytes == BFLOAT16)
    rows = min(chunk_tokens_for(loss.vocabulary, int(loss.memory_bytes)), loss.tokens)
    block = block_rows(rows, not loss.closed_form)
    tensors = BLOCK_TENSORS[loss.closed_form] + half_precision_sides  # whose logits are converted to float32
    logits = rows * loss.vocabulary * (w + (loss.teacher_dtype_bytes if loss.needs_head else 0))
    hidden = 0
    if loss.payload in ("hidden_int8", "hidden_fp8"):
        hidden = loss.tokens * loss.teacher_hidden * loss.teacher_dtype_bytes
    return float(logits + FLOAT32 * tensors * block * loss.vocabulary + hidden)


@dataclass(frozen=True)
class TeacherProcess:
    """One process of a teacher's replica, the leader; the others need less."""

    shape: ModelShape
    forward_peak: int
    """Bytes of the activations of one forward pass of the whole model. A shard's are smaller, but by how much depends on the
    architecture, so all of them are counted."""
    dtype_bytes: int
    payload: str
    answer_bytes: float
    logits_bytes: float
    """Logits of all positions of one request in float32; some payloads are made from them, in chunks."""
    reserved_bytes: float


def teacher_memory(teacher: TeacherProcess, shards: int) -> Parts:
    """Returns what the process holds of a replica of so many shards."""
    shape, w = teacher.shape, teacher.dtype_bytes
    parts = {
        "weights": w * (shape.parameters - shape.sharded + shape.sharded / shards),
        "activations": float(teacher.forward_peak),
        "answer": teacher.answer_bytes,
        "reserved": teacher.reserved_bytes,
    }
    if shards > 1:  # gathered by every shard when it starts, to test it; kept on the device for topk and logits
        parts["whole head"] = float(w * shape.head_rows * shape.hidden_size)
    if teacher.payload in ("topk", "logits"):
        parts["answer"] += LOGITS_COPIES * min(CHUNK_BYTES, teacher.logits_bytes)
    return parts
