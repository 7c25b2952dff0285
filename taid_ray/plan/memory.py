"""What a student worker and a teacher's process hold in memory, in bytes, as this package and DeepSpeed 0.19 allocate it.

Letters in the comments: P trained parameters, w bytes per element of the student's dtype, N workers. Everything here is
arithmetic; `tests/unit/plan/test_memory.py` compares it with what small students really allocate.
"""

from dataclasses import dataclass, field

from taid_ray.losses.chunked import chunk_tokens_for
from taid_ray.plan.sizes import Activations, LossShape, ModelShape, ZeroOptions

ALLREDUCE_ELEMENTS = 500_000_000
"""deepspeed.runtime.engine.MEMORY_OPT_ALLREDUCE_SIZE: gradients that are reduced at a time without ZeRO's own buckets."""
LOGITS_CHUNK_BYTES = 128 * 2**20
"""teacher.payload.CHUNK_BYTES"""
CLOSED_FORM = ("taid", "forward_kl")
"""Losses whose gradient needs no graph (losses.objective)."""
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
    """Of a teacher in the same process (mode local)."""


def worker_memory(worker: Worker, stage: int, zero: ZeroOptions) -> dict[str, Parts]:
    """What is alive at each of the four moments at which one worker may need most."""
    shape, w = worker.shape, worker.dtype_bytes
    states = _states(worker, stage, zero)
    kept = states | _around(worker)
    buckets = _buckets(worker, stage, zero)
    gathered = _gathered(worker, stage, zero)
    hidden = w * worker.loss.tokens * shape.hidden_size
    head = 4.0 * worker.loss.vocabulary * shape.hidden_size * shape.head_trained
    saved = worker.activations.saved + 2.0 * hidden
    # until the second micro-batch there are no gradients yet
    earlier = buckets["earlier gradients"] if worker.accumulation > 1 else 0.0
    return {
        "start": {"weights": 4.0 * shape.parameters, "reserved": worker.reserved_bytes},
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
            "gradients": states["gradients"] + buckets["gradients"],
            "communication": states["communication"] + buckets["communication"],
        },
        "step": kept
        | {
            "gradients": states["gradients"] + buckets["gradients at the step"],
            "communication": states["communication"] + buckets["communication at the step"],
        },
    }


def _backward(worker: Worker, head: float, saved: float) -> Parts:
    """The worse of the pass's begin and of what follows. head: the float32 gradient of the head's shared rows."""
    shape, w = worker.shape, worker.dtype_bytes
    cast = float(w * shape.head_rows * shape.hidden_size * shape.head_trained)
    if w == 4 and worker.loss.vocabulary == shape.head_rows:
        head = 0.0  # both are one tensor
    # The gradient of a tied head waits for that of the embedding; another one goes into a bucket at once.
    pending = cast * shape.head_tied
    begin = {"activations": saved, "loss": head + cast}
    rest = {"activations": float(worker.activations.backward_peak), "loss": pending}
    return max(begin, rest, key=lambda parts: sum(parts.values()))


def largest(moments: dict[str, Parts]) -> tuple[str, Parts]:
    """The moment with the most bytes, and what they are."""
    moment = max(moments, key=lambda name: sum(moments[name].values()))
    return moment, moments[moment]


def _states(worker: Worker, stage: int, zero: ZeroOptions) -> Parts:
    """What lives from step to step."""
    shape, w, n = worker.shape, worker.dtype_bytes, worker.workers
    p, whole = shape.trained, shape.parameters
    weights, gradients, communication = float(w * whole), 0.0, 0.0
    # AdamW's two moments; above stage 0 also float32 master weights, even where the weights are float32 themselves.
    optimizer = 8.0 * p if stage == 0 else 12.0 * p / n
    if stage == 1 and w == 2:
        gradients = 4.0 * p  # deepspeed.runtime.bf16_optimizer keeps the sum of all gradients on every worker
    if stage == 3:
        small = _kept_whole(worker, zero)
        weights = w * (whole / n + (small if n > 1 else 0))
        gradients = 4.0 * p / n
        communication = w * zero.bucket(p)
    return {"weights": weights, "optimizer": optimizer, "gradients": gradients, "communication": communication}


def _buckets(worker: Worker, stage: int, zero: ZeroOptions) -> Parts:
    """Gradients and their buckets beside `_states`: before, during and after a backward pass, and in the optimizer step."""
    shape, w, n, several = worker.shape, worker.dtype_bytes, worker.workers, worker.accumulation > 1
    p = shape.trained
    bucket = w * zero.bucket(p) * (2 if zero.overlap_comm else 1)
    norm = 8.0 * shape.largest  # the norm is formed in float64, one parameter at a time
    reduced = 4.0 * min(p, ALLREDUCE_ELEMENTS)
    if stage == 0:
        return _row(earlier=4.0 * p, during=4.0 * p, at_step=4.0 * p, step_communication=reduced)
    if stage == 1 and w == 4:
        return _row(
            earlier=4.0 * p + bucket, during=4.0 * p, at_step=4.0 * p, communication=bucket, step_communication=bucket
        )
    if stage == 1:
        # Larger models than one bucket are reduced in place, but for the copy in the type they travel in.
        copies = reduced + 2.0 * p if p <= ALLREDUCE_ELEMENTS else 2.0 * p
        return _row(earlier=2.0 * p, during=2.0 * p, at_step=2.0 * p, step_communication=copies)
    if stage == 2:
        part = 4.0 * p / n
        twice = part if w == 4 else 0.0  # float32 gradients are added as a second set, and flattened as another copy
        return _row(
            earlier=part,
            during=part + (twice if several else 0.0),
            at_step=part + max(twice, norm),
            communication=bucket,
        )
    # A reduce-scatter of a full bucket has a copy of it; one at the end of the pass meets no activations any more.
    scatter = w * zero.reduce_bucket_size if n > 1 and p > zero.reduce_bucket_size else 0.0
    return _row(at_step=max(4.0 * min(p / n, zero.sub_group_size), norm / n), communication=scatter)


def _row(
    earlier: float = 0.0,
    during: float = 0.0,
    at_step: float = 0.0,
    communication: float = 0.0,
    step_communication: float = 0.0,
) -> Parts:
    return {
        "earlier gradients": earlier,
        "gradients": during,
        "gradients at the step": at_step,
        "communication": communication,
        "communication at the step": step_communication,
    }


def _kept_whole(worker: Worker, zero: ZeroOptions) -> int:
    """Elements of the parameters that ZeRO-3 leaves on every worker."""
    return sum(size for size in worker.shape.sizes if size <= zero.persistence_threshold)


def _gathered(worker: Worker, stage: int, zero: ZeroOptions) -> Parts:
    """Weights that ZeRO-3 has gathered. It keeps them up to max_live_parameters, not only those of one layer."""
    if stage < 3 or worker.workers == 1:
        return {}
    large = worker.shape.parameters - _kept_whole(worker, zero)
    return {"gathered weights": worker.dtype_bytes * min(large, zero.max_live_parameters)}


def _around(worker: Worker) -> Parts:
    """What no ZeRO stage changes."""
    loss = worker.loss
    head = loss.vocabulary * loss.teacher_hidden * loss.teacher_dtype_bytes if loss.needs_head else 0
    if worker.teacher:
        head = 0  # a view of the teacher's own
    parts = {"teacher head": float(head), "prefetch window": worker.window_bytes, "reserved": worker.reserved_bytes}
    return parts | worker.teacher


def _loss_workspace(worker: Worker) -> float:
    """The logits of a chunk, and what is alive of a block of it (see losses.objective.Objective.block_rows)."""
    loss, w = worker.loss, worker.dtype_bytes
    rows = min(chunk_tokens_for(loss.vocabulary, int(loss.memory_bytes)), loss.tokens)
    block = max(1, rows // (8 if loss.closed_form else 32))
    tensors = (5 if loss.closed_form else 14) + (w == 2) + (loss.needs_head and loss.teacher_dtype_bytes == 2)
    logits = rows * loss.vocabulary * (w + (loss.teacher_dtype_bytes if loss.needs_head else 0))
    hidden = 0
    if loss.payload in ("hidden_int8", "hidden_fp8"):
        hidden = loss.tokens * loss.teacher_hidden * loss.teacher_dtype_bytes
    return float(logits + 4 * tensors * block * loss.vocabulary + hidden)


def window_bytes(answer_bytes: float, window: int, window_mib: int) -> float:
    """The most that answers in flight take for one worker.

    As `distributed.capacity.check_object_store` and the prefetcher count.
    """
    return min(window * answer_bytes, max(window_mib * 2**20, answer_bytes))


def teacher_memory(
    shape: ModelShape,
    forward_peak: int,
    dtype_bytes: int,
    shards: int,
    payload: str,
    answer_bytes: float,
    logits_bytes: float,
    reserved_bytes: float,
) -> Parts:
    """One process of a replica of so many shards, the leader; the others need less.

    logits_bytes: of all positions of one request in float32; some payloads are made from them, in chunks.

    forward_peak: of the activations of one forward pass of the whole model. A shard's are smaller, but by how much depends
    on the architecture, so all of them are counted.
    """
    weights = dtype_bytes * (shape.parameters - shape.sharded + shape.sharded / shards)
    parts = {"weights": weights, "activations": float(forward_peak), "answer": answer_bytes, "reserved": reserved_bytes}
    if shards > 1:  # gathered by every shard when it starts, to test it; kept on the device for topk and logits
        parts["whole head"] = float(dtype_bytes * shape.head_rows * shape.hidden_size)
    if payload in ("topk", "logits"):
        parts["answer"] += 5 * min(LOGITS_CHUNK_BYTES, logits_bytes)  # and their copies
    return parts
