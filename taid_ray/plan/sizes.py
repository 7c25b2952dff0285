"""Sizes that `taid-ray plan` computes with: of a model, its activations, the loss, and ZeRO's buffers. No torch."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ModelShape:
    """Numbers of elements of a model's parameters, each counted once."""

    parameters: int
    """All of them."""
    trained: int
    """Those that learn; the others are frozen (LoRA)."""
    largest: int
    """Elements of the largest trained parameter."""
    matmul: int
    """Weights of the body's matmuls that one token meets (of mixture-of-experts layers only the chosen experts)."""
    matmul_trained: int
    """Those of them that learn."""
    layers: int
    attention_width: int
    """Heads x their size."""
    hidden_size: int
    head_rows: int
    head_tied: bool
    """Whether the head is the embedding."""
    head_trained: bool
    sizes: tuple[int, ...]
    """Elements of each parameter."""
    sharded: int
    """Elements that tensor parallelism splits; every rank holds the others."""
    vision: int = 0
    """Weights of the matmuls that only images go through; `matmul` is without them."""
    vision_trained: int = 0
    """Those of them that learn."""


@dataclass(frozen=True)
class Activations:
    """Bytes beside parameters and their gradients while one micro-batch passes through the body."""

    saved: int
    """Kept for the backward pass."""
    forward_peak: int
    """The most during the forward pass."""
    backward_peak: int
    """The most during the backward pass."""

    def after(self, tower: "Activations") -> "Activations":
        """Those of a language model whose vision tower ran before it, and whose gradients go on to the tower."""
        return Activations(
            tower.saved + self.saved,
            max(tower.forward_peak, tower.saved + self.forward_peak),
            max(tower.saved + self.backward_peak, tower.backward_peak),
        )


@dataclass(frozen=True)
class ZeroOptions:
    """Options of DeepSpeed's zero_optimization that decide about memory, with its defaults; numbers of elements."""

    reduce_bucket_size: float = 5e8
    persistence_threshold: float = 1e5
    max_live_parameters: float = 1e9
    sub_group_size: float = 1e9
    overlap_comm: bool = False
    """Whether there is a second bucket, at stage 2."""
    lazy: bool = False
    """Whether memory counts only once it is written to, as on a CPU: of a bucket, what the gradients fill."""

    @classmethod
    def of(cls, passed: dict[str, Any], stage: int, lazy: bool) -> "ZeroOptions":
        """Reads the options from `passed`, student.deepspeed of the configuration."""
        zero = passed.get("zero_optimization", {})
        stage3 = {"persistence_threshold": "param_persistence_threshold", "max_live_parameters": "max_live_parameters"}
        found = {name: zero[f"stage3_{key}"] for name, key in stage3.items() if f"stage3_{key}" in zero}
        found |= {name: zero[key] for name, key in stage3.items() if key in zero}
        found |= {key: zero[key] for key in ("reduce_bucket_size", "sub_group_size") if key in zero}
        return cls(**found, overlap_comm=bool(stage == 2 and zero.get("overlap_comm")), lazy=lazy)

    def bucket(self, trained: int) -> float:
        """Returns the elements of a bucket that count."""
        return min(self.reduce_bucket_size, trained) if self.lazy else self.reduce_bucket_size


@dataclass(frozen=True)
class LossShape:
    """Sizes of one micro-batch's loss, which is formed in chunks."""

    tokens: int
    """Loss positions."""
    vocabulary: int
    """Shared ids."""
    memory_bytes: float
    """Bytes that the logits of a chunk may take (loss.memory_mib)."""
    payload: str | None
    """teacher.payload; None without a teacher."""
    teacher_hidden: int
    """The teacher's hidden size."""
    teacher_dtype_bytes: int
    closed_form: bool
    """Whether the loss needs no graph: taid, forward_kl and sft, and everything on `topk`."""

    @property
    def needs_head(self) -> bool:
        """True if the student rebuilds the teacher's logits with a copy of its head."""
        return self.payload not in (None, "topk", "logits")
