"""The sizes that `taid-ray plan` computes with: of a model, of its activations, of the loss, of ZeRO's buffers. No torch."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ModelShape:
    """Numbers of elements of a model's parameters, each counted once."""

    parameters: int
    trained: int
    """The rest is frozen (LoRA)."""
    largest: int
    """The largest trained parameter."""
    matmul: int
    """Weights of the body's matmuls that one token meets (of mixture-of-experts layers only the chosen experts)."""
    matmul_trained: int
    layers: int
    attention_width: int
    """Heads x their size."""
    hidden_size: int
    head_rows: int
    head_tied: bool
    """The head is the embedding."""
    head_trained: bool
    sizes: tuple[int, ...]
    """Of all parameters."""
    sharded: int
    """Elements that tensor parallelism splits; every rank holds the others."""


@dataclass(frozen=True)
class Activations:
    """Bytes beside parameters and their gradients, of one micro-batch through the body."""

    saved: int
    """Kept for the backward pass."""
    forward_peak: int
    backward_peak: int


@dataclass(frozen=True)
class ZeroOptions:
    """Those of DeepSpeed's zero_optimization that decide about memory, with its defaults; numbers of elements."""

    reduce_bucket_size: float = 5e8
    persistence_threshold: float = 1e5
    max_live_parameters: float = 1e9
    sub_group_size: float = 1e9
    overlap_comm: bool = False
    """A second bucket at stage 2."""
    lazy: bool = False
    """Memory counts once it is written to, as on a CPU: of a bucket, what the gradients fill."""

    @classmethod
    def of(cls, passed: dict[str, Any], stage: int, lazy: bool) -> "ZeroOptions":
        """passed: student.deepspeed of the configuration."""
        zero = passed.get("zero_optimization", {})
        stage3 = {"persistence_threshold": "param_persistence_threshold", "max_live_parameters": "max_live_parameters"}
        found = {name: zero[f"stage3_{key}"] for name, key in stage3.items() if f"stage3_{key}" in zero}
        found |= {name: zero[key] for name, key in stage3.items() if key in zero}
        found |= {key: zero[key] for key in ("reduce_bucket_size", "sub_group_size") if key in zero}
        return cls(**found, overlap_comm=bool(stage == 2 and zero.get("overlap_comm")), lazy=lazy)

    def bucket(self, trained: int) -> float:
        """Elements of a bucket that count."""
        return min(self.reduce_bucket_size, trained) if self.lazy else self.reduce_bucket_size


@dataclass(frozen=True)
class LossShape:
    """What decides about the memory of the chunked loss of one micro-batch."""

    tokens: int
    """Loss positions."""
    vocabulary: int
    """Shared ids."""
    memory_bytes: float
    """loss.memory_mib"""
    payload: str
    teacher_hidden: int
    teacher_dtype_bytes: int
    closed_form: bool
    """The loss needs no graph: taid and forward_kl, and everything on buckets."""

    @property
    def needs_head(self) -> bool:
        return self.payload not in ("topk", "logits")
