"""The loss from hidden states, a chunk of tokens at a time, so that no [N, V] matrix ever exists.

Gradients are formed in the forward pass: a chunk's logits become their own gradient, which matmuls turn into gradients
of hidden states, head and bias. Softmax and divergence work on blocks of rows of the chunk, so little more than two
tensors of [chunk_tokens, V] lives beside one float32 [V, H] if the head learns.

What each piece of memory holds at which moment, for one chunk (`out` is allocated once for all chunks):

    moment                      student's `out` [chunk, V]     block [rows, V], float32          teacher's `out` [chunk, V]
    ChunkLogits.load            output of the head             -                                 output of the head
    ChunkLogits.rows            (in float32: as the block)     final logits: the rows of `out`   final logits, in the same way
                                                               if float32, else a copy
    Objective.evaluate_         (in float32: as the block)     gradient of the final logits (*)  read only (**)
    ChunkLogits.put_gradient    gradient of the head's output  free                              free
    HeadGradients.add           read, then free                -                                 free

    (*) In the memory of the final logits for losses in closed form and for a TopK teacher, whose bucket functions hand the
    same memory on: logits, then the tail's logits (`bucketed_`), its shares (`tail_shares_`), the gradient (`spread_`).
    With autograd it is a new tensor.
    (**) A temperature other than 1 divides a copy of the block.

A teacher that sent its logits, and a TopK, have no `out`: their tensors may lie in shared memory and are only read. Without
a teacher, which only the objective SFT does, there is the student's side alone.

Precision: a matmul runs in the dtype of its hidden states. A head of another dtype is converted to it, as autocast
would do (bfloat16 hidden states with a float32 head compute in bfloat16). Logits are upcast to float32 before anything
else touches them; the head's gradient accumulates in float32; every gradient is returned in its tensor's own dtype.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from taid_ray.losses.divergences import sft
from taid_ray.losses.objective import SFT, Objective, block_rows
from taid_ray.losses.projection import ChunkLogits, HeadGradients, Projection, slices, sum_dtype
from taid_ray.losses.topk import TopK

Target = Projection | TopK


@dataclass(frozen=True)
class LossParts:
    """Detached sums over the tokens, float64 scalars."""

    kl: Tensor
    """The divergence."""
    entropy: Tensor
    """Entropy of the divergence's target (see registry.log_target), which added to `kl` gives the cross-entropy form."""
    sft: Tensor
    """Cross-entropy on the labels; 0 without labels."""
    tokens: Tensor
    """N."""
    by_group: Tensor
    """The same three sums, [3, G], of each of G groups of tokens; [3, 0] where there are none."""


@dataclass(frozen=True)
class Scores:
    """Sums over the tokens, float64 scalars."""

    student_ce: Tensor
    """Cross-entropy of the labels under the student."""
    teacher_ce: Tensor | None
    """Cross-entropy of the labels under the teacher; None without one."""
    kl: Tensor | None
    """KL(teacher || student); None without a teacher."""
    tokens: Tensor
    """N."""


@dataclass(frozen=True)
class _Work:
    """One evaluation of the loss: its tensors, without graph and in the dtype of the matmuls, and the loop over chunks."""

    student: Projection
    teacher: Target | None
    labels: Tensor | None
    objective: Objective
    chunk_tokens: int
    groups: Tensor | None = None
    """[N, G], see `chunked_loss`."""

    def chunks(
        self, student: ChunkLogits, teacher: ChunkLogits | TopK | None
    ) -> Iterator[tuple[slice, Iterator[slice]]]:
        """Loads each chunk's logits in turn; yields its tokens, whole and in blocks."""
        length = block_rows(self.chunk_tokens, self.objective.many_tensors(self.teacher))
        for chunk in slices(0, len(self.student.hidden), self.chunk_tokens):
            student.load(chunk)
            if isinstance(teacher, ChunkLogits):
                teacher.load(chunk)
            yield chunk, slices(chunk.start, chunk.stop, length)

    def logits(self) -> tuple[ChunkLogits, ChunkLogits | TopK | None]:
        """Memory for both sides' logits of a chunk; a TopK teacher needs none, nor does one that is not there."""
        known = self.teacher
        teacher = ChunkLogits(known, self.chunk_tokens) if isinstance(known, Projection) else known
        return ChunkLogits(self.student, self.chunk_tokens), teacher

    def loss(self, gradients: HeadGradients | None) -> Tensor:
        """Computes the sums [divergence, entropy, sft, derivative by the temperature], and adds to the gradients.

        Returns [4, 1 + G], float64: the sums over all tokens, then those over each group.
        """
        student, teacher = self.logits()
        groups = 0 if self.groups is None else self.groups.shape[1]
        sums = torch.zeros(4, 1 + groups, dtype=torch.float64, device=self.student.hidden.device)
        for chunk, blocks in self.chunks(student, teacher):
            for rows in blocks:
                sums += self._block(student, teacher, rows, gradients is not None)
            if gradients is not None:
                gradients.add(student.raw, chunk)
        return sums

    def scores(self) -> Tensor:
        """Computes the sums [divergence, student's and teacher's cross-entropy], float64; the last is 0 without a teacher."""
        student, teacher = self.logits()
        assert self.labels is not None
        sums = torch.zeros(3, dtype=torch.float64, device=self.student.hidden.device)
        for _, blocks in self.chunks(student, teacher):
            for rows in blocks:
                known, labels = teacher.rows(rows) if teacher else None, self.labels[rows]
                kl, _, ce = self.objective.evaluate_(student.rows(rows), known, labels, learn=False).values
                teacher_ce = torch.zeros_like(ce) if known is None else _label_losses(known, labels)
                sums += torch.stack([kl, ce, teacher_ce]).sum(dim=1, dtype=torch.float64)
        return sums

    def _block(self, student: ChunkLogits, teacher: ChunkLogits | TopK | None, rows: slice, learn: bool) -> Tensor:
        """Computes the sums of one block, as `loss` does, and, to learn, leaves its gradient in the student's memory."""
        logits = student.rows(rows)
        slope = self.student.transform.slope(logits) if learn else None
        labels = None if self.labels is None else self.labels[rows]
        found = self.objective.evaluate_(logits, teacher.rows(rows) if teacher else None, labels, learn)
        if found.gradient is not None:
            student.put_gradient(rows, found.gradient, slope)
        slope_of_temperature = found.temperature_slope
        if slope_of_temperature is None:
            slope_of_temperature = torch.zeros_like(found.values[0])
        values = torch.stack([*found.values, slope_of_temperature])
        total = values.sum(dim=1, keepdim=True, dtype=torch.float64)
        return total if self.groups is None else torch.cat([total, values.double() @ self.groups[rows]], dim=1)


class _ChunkedLoss(torch.autograd.Function):
    """Function (hidden, head, bias, temperature) -> (loss sum, detached sums).

    Its backward pass only scales what its forward pass formed.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        bias: Tensor | None,
        temperature: Tensor | None,
        work: _Work,
        wanted: tuple[bool, ...],
    ) -> tuple[Tensor, Tensor]:
        gradients = HeadGradients(work.student, wanted[:3]) if any(wanted) else None
        sums = work.loss(gradients)
        of_temperature = (1 - work.objective.sft_weight) * sums[3, 0] if wanted[3] else None
        ctx.gradients = (*gradients.take(), of_temperature) if gradients else None
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, head, bias, temperature)]
        sums = sums[:3].clone()
        ctx.mark_non_differentiable(sums)
        return work.objective.total(sums[0, 0], sums[2, 0]).to(sum_dtype(hidden)), sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, grad_sums: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:  # they are scaled in place: a second [V, H] would be the largest tensor of all
            raise RuntimeError("a chunked loss can be differentiated once only; compute it again")
        pairs = zip(gradients, ctx.dtypes, strict=True)
        return (*(None if x is None else x.mul_(grad_loss).to(dtype) for x, dtype in pairs), None, None)


_apply_chunked_loss: Callable[..., tuple[Tensor, Tensor]] = _ChunkedLoss.apply


def chunked_loss(
    objective: Objective,
    student: Projection,
    teacher: Target | None,
    labels: Tensor | None = None,
    *,
    chunk_tokens: int,
    groups: Tensor | None = None,
) -> tuple[Tensor, LossParts]:
    """Computes the sum over N tokens of `objective`, and its detached parts.

    The student's hidden states, head and bias, and a temperature that is a tensor, receive gradients, if they require them and
    gradients are enabled; the teacher never does. teacher: None for the objective SFT. labels: [N] int64. N = 0 gives 0 and
    keeps its graph. groups: [N, G] float64, 1 where a token belongs to a group and 0 elsewhere, to have each group's part of
    the sums, too.

    Returns a scalar, float32 (float64 for float64 hidden states), and the parts. Raises ValueError for an
    objective that its `check` refuses, and for shapes that do not fit together.
    """
    work = replace(_work(student, teacher, labels, objective, chunk_tokens), groups=groups)
    temperature = objective.temperature if isinstance(objective.temperature, Tensor) else None
    trained = (student.hidden, student.head, student.bias, temperature)
    wanted = tuple(torch.is_grad_enabled() and x is not None and x.requires_grad for x in trained)
    loss, sums = _apply_chunked_loss(*trained, work, wanted)
    kl, entropy_sum, sft_sum = sums[:, 0].unbind()
    return loss, LossParts(kl, entropy_sum, sft_sum, _count(student), sums[:, 1:])


@torch.no_grad()
def chunked_scores(student: Projection, teacher: Target | None, labels: Tensor, *, chunk_tokens: int) -> Scores:
    """Computes validation sums, without gradients, none of which depends on t. Arguments and errors as in chunked_loss.

    With a TopK teacher, kl is the one between the buckets, a lower bound of the KL between the vocabularies. Without a
    teacher there is the student's cross-entropy only.
    """
    objective = Objective(SFT if teacher is None else "forward_kl", torch.ones(()))
    kl, student_ce, teacher_ce = _work(student, teacher, labels, objective, chunk_tokens).scores().unbind()
    if teacher is None:
        return Scores(student_ce, None, None, _count(student))
    return Scores(student_ce, teacher_ce, kl, _count(student))


def chunk_tokens_for(vocabulary: int, memory_bytes: int) -> int:
    """The number of tokens, at least 1, whose logits over a vocabulary of that many ids fit into memory_bytes as a chunk.

    A chunk keeps two float32 tensors [chunk, V], the student's logits, which become their gradient, and the teacher's.
    What `Objective` keeps of a block adds up to two thirds of one more. (A budget below 64 rows of logits is exceeded,
    because a block has at least one row.)
    """
    return max(1, memory_bytes * 3 // (8 * 4 * vocabulary))


def _work(
    student: Projection, teacher: Target | None, labels: Tensor | None, objective: Objective, chunk_tokens: int
) -> _Work:
    """Checks that everything fits together, and brings it into the dtype of the matmuls."""
    objective.check(labels)
    if (teacher is None) != (objective.name == SFT):
        raise ValueError(f"{SFT} has no teacher, every other loss needs one; found {objective.name}")
    _check_shapes(student, teacher, labels, chunk_tokens)
    hidden, temperature = student.hidden, objective.temperature
    t = objective.t.to(hidden.device, sum_dtype(hidden), non_blocking=True)
    if isinstance(temperature, Tensor):
        learns = torch.is_grad_enabled() and temperature.requires_grad
        temperature = temperature.detach().to(hidden.device, sum_dtype(hidden), non_blocking=True)
        temperature = temperature.clone().requires_grad_(learns)
    teacher = teacher.prepared() if isinstance(teacher, Projection) else teacher
    return _Work(student.prepared(), teacher, labels, replace(objective, t=t, temperature=temperature), chunk_tokens)


def _check_shapes(student: Projection, teacher: Target | None, labels: Tensor | None, chunk_tokens: int) -> None:
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be at least 1, found {chunk_tokens}")
    if student.head is None:
        raise ValueError("the student's projection needs its head")
    known = teacher.ids if isinstance(teacher, TopK) else teacher.hidden if teacher else None
    tokens = [len(each) for each in (student.hidden, known, labels) if each is not None]
    if len(set(tokens)) > 1:
        raise ValueError(f"student, teacher and labels must have the same number of tokens, found {tokens}")
    if isinstance(teacher, Projection) and student.vocabulary != teacher.vocabulary:
        raise ValueError(
            f"the student's head has {student.vocabulary} ids, the teacher's {teacher.vocabulary}; "
            "slice both to the ids they share"
        )


def _label_losses(known: Tensor | TopK, labels: Tensor) -> Tensor:
    """Computes the cross-entropy [N] of labels [N] under the teacher."""
    return -known.label_log_probs if isinstance(known, TopK) else sft(known, labels)


def _count(student: Projection) -> Tensor:
    return torch.full((), len(student.hidden), dtype=torch.float64, device=student.hidden.device)
