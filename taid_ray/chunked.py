"""The loss from hidden states, a chunk of tokens at a time, so that no [N, V] matrix ever exists.

Gradients are formed in the forward pass: per chunk the student's logits are the only leaf of a small autograd graph,
their gradient is turned into gradients of hidden states, head and bias by matmuls, and the logits are dropped. At any
time about ten float32 tensors of [chunk_tokens, V] are alive, and one float32 [V, H] if the head learns.

Precision: a matmul runs in the dtype of its hidden states. A head of another dtype is converted to it, as autocast
would do (bfloat16 hidden states with a float32 head compute in bfloat16). Logits are upcast to float32 before anything
else touches them; the head's gradient accumulates in float32; every gradient is returned in its tensor's own dtype.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from taid_ray.losses import Divergence, divergence, forward_kl, sft, target_entropy
from taid_ray.losses.divergences import at_least_float32


@dataclass(frozen=True)
class LogitTransform:
    """What a model does to the output of its head: logits = softcap * tanh(scale * x / softcap), or scale * x."""

    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, x: Tensor) -> Tensor:
        x = x if self.scale == 1 else self.scale * x
        return x if self.softcap is None else self.softcap * torch.tanh(x / self.softcap)


@dataclass(frozen=True)
class LossParts:
    """Detached sums over the tokens, float64 scalars."""

    kl: Tensor
    """The divergence."""
    entropy: Tensor
    """What added to `kl` gives the cross-entropy form (see losses.target_entropy)."""
    sft: Tensor
    """Cross-entropy on the labels; 0 without labels."""
    tokens: Tensor
    """N."""


@dataclass(frozen=True)
class Scores:
    """Sums over the tokens, float64 scalars."""

    student_ce: Tensor
    """Cross-entropy of the labels under the student."""
    teacher_ce: Tensor
    """Cross-entropy of the labels under the teacher."""
    kl: Tensor
    """KL(teacher || student)."""
    tokens: Tensor
    """N."""


@dataclass(frozen=True)
class _Projection:
    """Hidden states [N, H] and the head [V, H] that makes logits of them. Without a head they are the logits [N, V]."""

    hidden: Tensor
    head: Tensor | None
    bias: Tensor | None
    transform: LogitTransform

    @property
    def vocabulary(self) -> int:
        return self.hidden.shape[1] if self.head is None else self.head.shape[0]

    def raw(self, chunk: slice) -> Tensor:
        """Output of the head, before the transform, in at least float32."""
        if self.head is None:
            return at_least_float32(self.hidden[chunk])
        return at_least_float32(F.linear(self.hidden[chunk], self.head, self.bias))

    def logits(self, chunk: slice) -> Tensor:
        return self.raw(chunk) if self.head is None else self.transform(self.raw(chunk))


def _project(hidden: Tensor, head: Tensor | None, bias: Tensor | None, transform: LogitTransform) -> _Projection:
    """Converts the head to the dtype of the hidden states, once for all chunks, and cuts the graph."""
    dtype = hidden.dtype
    head, bias = (None if x is None else x.detach().to(dtype) for x in (head, bias))
    return _Projection(hidden.detach(), head, bias, transform)


@dataclass(frozen=True)
class _Objective:
    """What is minimised, as a function of one chunk's student logits."""

    teacher: _Projection
    loss: Divergence
    entropy: Divergence | None
    """None when nobody asks for the parts."""
    t: float
    labels: Tensor | None
    sft_weight: float

    def __call__(self, student_logits: Tensor, chunk: slice) -> tuple[Tensor, Tensor]:
        """The chunk's loss (a scalar, with graph) and its sums [kl, entropy, sft] (detached, float64)."""
        teacher_logits = self.teacher.logits(chunk)
        zero = student_logits.new_zeros(())
        # The entropy comes first: its temporaries are gone before the graph of the divergence grows.
        entropy = self.entropy(student_logits.detach(), teacher_logits, self.t).sum() if self.entropy else zero
        kl = self.loss(student_logits, teacher_logits, self.t).sum()
        del teacher_logits
        labels_wanted = self.labels is not None and (self.sft_weight > 0 or self.entropy is not None)
        ce = sft(student_logits, self.labels[chunk]).sum() if self.labels is not None and labels_wanted else zero
        # A share of 0 drops its term: 0 * inf would be NaN.
        terms = [share * term for share, term in ((1 - self.sft_weight, kl), (self.sft_weight, ce)) if share > 0]
        return sum(terms, start=zero), torch.stack([kl.detach(), entropy, ce.detach()]).double()


class _Gradients:
    """Sums of the gradients that are wanted; the others stay None."""

    def __init__(self, student: _Projection, wanted: tuple[bool, bool, bool]) -> None:
        hidden, head, bias = student.hidden, student.head, student.bias
        assert head is not None
        self.student = student
        self.hidden = torch.zeros_like(hidden) if wanted[0] else None
        self.head = torch.zeros_like(head, dtype=_sum_dtype(head)) if wanted[1] else None
        self.bias = torch.zeros_like(bias, dtype=_sum_dtype(bias)) if wanted[2] and bias is not None else None

    def add(self, grad_logits: Tensor, chunk: slice) -> None:
        """Takes the gradient of the loss with respect to the head's output, [chunk, V]."""
        assert self.student.head is not None
        if self.bias is not None:
            self.bias += grad_logits.sum(dim=0)
        grad_logits = grad_logits.to(self.student.head.dtype)
        if self.hidden is not None:
            self.hidden[chunk] = grad_logits @ self.student.head
        if self.head is not None:
            self.head += grad_logits.T @ self.student.hidden[chunk]

    def tensors(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return self.hidden, self.head, self.bias


class _ChunkedLoss(torch.autograd.Function):
    """(hidden, head, bias) -> (loss sum, detached sums). The backward pass only scales what the forward pass formed."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        bias: Tensor | None,
        student: _Projection,
        objective: _Objective,
        chunk_tokens: int,
        wanted: tuple[bool, bool, bool],
    ) -> tuple[Tensor, Tensor]:
        gradients = _Gradients(student, wanted) if any(wanted) else None
        sums = torch.zeros(4, dtype=torch.float64, device=hidden.device)
        for chunk in _chunks(len(hidden), chunk_tokens):
            sums += _one_chunk(student, objective, chunk, gradients)
        ctx.save_for_backward(*(gradients.tensors() if gradients else ()))
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, head, bias)]
        loss, parts = sums[0].to(_sum_dtype(hidden)), sums[1:]
        ctx.mark_non_differentiable(parts)
        return loss, parts

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, grad_parts: Tensor) -> tuple[Tensor | None, ...]:
        gradients = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        scaled = [None if gradient is None else (gradient * grad_loss).to(dtype) for gradient, dtype in gradients]
        return (*scaled, None, None, None, None)


_apply_chunked_loss: Callable[..., tuple[Tensor, Tensor]] = _ChunkedLoss.apply


def _one_chunk(student: _Projection, objective: _Objective, chunk: slice, gradients: _Gradients | None) -> Tensor:
    """Sums [loss, kl, entropy, sft] of one chunk, detached, float64. All [chunk, V] tensors die when it returns."""
    raw = student.raw(chunk).requires_grad_(gradients is not None)
    with torch.set_grad_enabled(gradients is not None):
        loss, parts = objective(student.transform(raw), chunk)
    if gradients is not None:
        (grad_logits,) = torch.autograd.grad(loss, raw)
        gradients.add(grad_logits, chunk)
    return torch.cat([loss.detach().double().unsqueeze(0), parts])


# fmt: off
@overload
def chunked_loss(
    name: str, student_hidden: Tensor, student_head: Tensor, teacher_hidden: Tensor, teacher_head: Tensor | None, *,
    t: float | Tensor, labels: Tensor | None = None, sft_weight: float = 0.0, weight: float | None = None,
    chunk_tokens: int = 1024, student_bias: Tensor | None = None, teacher_bias: Tensor | None = None,
    student_transform: LogitTransform = ..., teacher_transform: LogitTransform = ...,
    return_parts: Literal[False] = False,
) -> Tensor: ...
@overload
def chunked_loss(
    name: str, student_hidden: Tensor, student_head: Tensor, teacher_hidden: Tensor, teacher_head: Tensor | None, *,
    t: float | Tensor, labels: Tensor | None = None, sft_weight: float = 0.0, weight: float | None = None,
    chunk_tokens: int = 1024, student_bias: Tensor | None = None, teacher_bias: Tensor | None = None,
    student_transform: LogitTransform = ..., teacher_transform: LogitTransform = ...,
    return_parts: Literal[True],
) -> tuple[Tensor, LossParts]: ...
# fmt: on
def chunked_loss(
    name: str,
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor | None,
    *,
    t: float | Tensor,
    labels: Tensor | None = None,
    sft_weight: float = 0.0,
    weight: float | None = None,
    chunk_tokens: int = 1024,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    student_transform: LogitTransform = LogitTransform(),
    teacher_transform: LogitTransform = LogitTransform(),
    return_parts: bool = False,
) -> Tensor | tuple[Tensor, LossParts]:
    """Sum over N tokens of (1 - sft_weight) * divergence + sft_weight * cross-entropy on the labels.

    student_hidden [N, Hs], student_head [V, Hs], student_bias [V] receive gradients, if they require them and gradients
    are enabled. teacher_hidden [N, Ht], teacher_head [V, Ht] and teacher_bias [V] never do; with teacher_head None,
    teacher_hidden holds the teacher's final logits [N, V], to which neither bias nor transform is applied. labels [N]
    int64. `name` and `weight` as in losses.divergence; `t` is used by taid only. N = 0 gives 0 and keeps its graph.

    Returns a scalar, float32 (float64 for float64 hidden states); with return_parts also the detached LossParts.
    Raises ValueError for shapes that do not fit together, ConfigError for a wrong name or weight.
    """
    if not 0 <= sft_weight <= 1 or (sft_weight > 0 and labels is None):
        raise ValueError(f"sft_weight must lie within [0, 1] and needs labels above 0; found {sft_weight}")
    student = _project(student_hidden, student_head, student_bias, student_transform)
    teacher = _project(teacher_hidden, teacher_head, teacher_bias, teacher_transform)
    _check_shapes(student, teacher, labels)
    entropy = target_entropy(name) if return_parts else None
    objective = _Objective(teacher, divergence(name, weight), entropy, float(t), labels, sft_weight)
    trained = (student_hidden, student_head, student_bias)
    wanted = tuple(torch.is_grad_enabled() and x is not None and x.requires_grad for x in trained)
    loss, sums = _apply_chunked_loss(*trained, student, objective, chunk_tokens, wanted)
    if not return_parts:
        return loss
    kl, entropy_sum, sft_sum = sums.unbind()
    return loss, LossParts(kl, entropy_sum, sft_sum, _count(student))


@torch.no_grad()
def chunked_scores(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor | None,
    labels: Tensor,
    *,
    chunk_tokens: int = 1024,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    student_transform: LogitTransform = LogitTransform(),
    teacher_transform: LogitTransform = LogitTransform(),
) -> Scores:
    """Validation sums, without gradients, none of which depends on t. Arguments and errors as in chunked_loss."""
    student = _project(student_hidden, student_head, student_bias, student_transform)
    teacher = _project(teacher_hidden, teacher_head, teacher_bias, teacher_transform)
    _check_shapes(student, teacher, labels)
    sums = torch.zeros(3, dtype=torch.float64, device=student_hidden.device)
    for chunk in _chunks(student_hidden.shape[0], chunk_tokens):
        q, p = student.logits(chunk), teacher.logits(chunk)
        sums += torch.stack([sft(q, labels[chunk]).sum(), sft(p, labels[chunk]).sum(), forward_kl(q, p).sum()])
        del q, p  # before the next chunk's exist
    student_ce, teacher_ce, kl = sums.unbind()
    return Scores(student_ce, teacher_ce, kl, _count(student))


def _chunks(num_tokens: int, chunk_tokens: int) -> Iterator[slice]:
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be at least 1, found {chunk_tokens}")
    return (slice(start, start + chunk_tokens) for start in range(0, num_tokens, chunk_tokens))


def _check_shapes(student: _Projection, teacher: _Projection, labels: Tensor | None) -> None:
    tokens = [len(student.hidden), len(teacher.hidden)] + ([] if labels is None else [len(labels)])
    if len(set(tokens)) > 1:
        raise ValueError(f"student, teacher and labels must have the same number of tokens, found {tokens}")
    if student.vocabulary != teacher.vocabulary:
        raise ValueError(
            f"the student's head has {student.vocabulary} ids, the teacher's {teacher.vocabulary}; "
            "slice both to the ids they share"
        )


def _count(student: _Projection) -> Tensor:
    return torch.tensor(len(student.hidden), dtype=torch.float64, device=student.hidden.device)


def _sum_dtype(x: Tensor) -> torch.dtype:
    """float32, or float64 for float64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
