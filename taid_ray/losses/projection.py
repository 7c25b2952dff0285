"""The matmuls of the chunked loss: hidden states to logits, and the logits' gradient to those of hidden states and head."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from taid_ray.losses.divergences import at_least_float32

_PRODUCT_ROWS = 8192
"""Rows of a head's gradient that are formed at a time where its matmul's dtype is not its own."""


@dataclass(frozen=True)
class LogitTransform:
    """The model's change to its head's output x: logits = softcap * tanh(scale * x / softcap), or scale * x without softcap."""

    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, x: Tensor) -> Tensor:
        x = x if self.scale == 1 else self.scale * x
        return x if self.softcap is None else self.softcap * torch.tanh(x / self.softcap)

    def apply_(self, x: Tensor) -> Tensor:
        """Changes x in place, as `__call__` does anew."""
        if self.softcap is None:
            return x if self.scale == 1 else x.mul_(self.scale)
        return x.mul_(self.scale / self.softcap).tanh_().mul_(self.softcap)

    def slope(self, logits: Tensor) -> Tensor | None:
        """Computes the derivative of the logits with respect to x; None for 1."""
        if self.softcap is None:
            return None if self.scale == 1 else torch.full_like(logits[:, :1], self.scale)
        return (1 - (logits / self.softcap) ** 2).mul_(self.scale)


@dataclass(frozen=True)
class Projection:
    """Hidden states and the head that turns them into the logits of N loss positions."""

    hidden: Tensor
    """[N, H], or, without a head, the final logits [N, V]."""
    head: Tensor | None
    """[V, H]"""
    bias: Tensor | None = None
    """[V]"""
    transform: LogitTransform = LogitTransform()

    @property
    def vocabulary(self) -> int:
        """Size of the vocabulary, V."""
        return self.hidden.shape[1] if self.head is None else self.head.shape[0]

    def prepared(self) -> "Projection":
        """Returns a copy without graph, its head in the dtype of the hidden states, converted once for all chunks."""
        dtype = self.hidden.dtype
        head, bias = (None if x is None else x.detach().to(dtype) for x in (self.head, self.bias))
        return replace(self, hidden=self.hidden.detach(), head=head, bias=bias)

    def raw(self, chunk: slice, out: Tensor | None) -> Tensor:
        """Computes the head's output for a chunk of the tokens, before the transform, into the top rows of `out`.

        Without a head it is the hidden states themselves, a view.
        """
        hidden = self.hidden[chunk]
        if self.head is None:
            return hidden
        assert out is not None
        out = out[: len(hidden)]
        if self.bias is None:
            return torch.mm(hidden, self.head.T, out=out)
        return torch.addmm(self.bias, hidden, self.head.T, out=out)


class ChunkLogits:
    """Logits of one chunk at a time, always in the same memory, in the dtype of the hidden states."""

    def __init__(self, projection: Projection, chunk_tokens: int) -> None:
        self.projection = projection
        shape = (min(chunk_tokens, len(projection.hidden)), projection.vocabulary)
        # New memory for every chunk would cost a CPU about a fifth of the matmul.
        self.out = None if projection.head is None else projection.hidden.new_empty(shape)
        self.start = 0

    def load(self, chunk: slice) -> None:
        """Fills `raw` [chunk, V], the head's output before the transform."""
        self.raw = self.projection.raw(chunk, self.out)
        self.start = chunk.start

    def rows(self, rows: slice) -> Tensor:
        """Computes the final logits of some rows of the chunk, in at least float32.

        To be called once for each row: in float32 they take the place of `raw`.
        """
        x = at_least_float32(self._raw_rows(rows))
        return x if self.projection.head is None else self.projection.transform.apply_(x)

    def put_gradient(self, rows: slice, gradient: Tensor, slope: Tensor | None) -> None:
        """Puts the gradient with respect to the head's output in the place of that output.

        gradient: with respect to the final logits [rows, V]. slope: the transform's, see LogitTransform.slope.
        """
        raw = self._raw_rows(rows)
        if slope is not None:
            torch.mul(gradient, slope, out=raw)
        elif gradient.data_ptr() != raw.data_ptr():
            raw.copy_(gradient)

    def _raw_rows(self, rows: slice) -> Tensor:
        return self.raw[rows.start - self.start : rows.stop - self.start]


class HeadGradients:
    """Sums over all chunks of the gradients that are wanted; the others stay None."""

    def __init__(self, student: Projection, wanted: Sequence[bool]) -> None:
        hidden, head, bias = student.hidden, student.head, student.bias
        assert head is not None
        self.student = student
        self.hidden = torch.empty_like(hidden) if wanted[0] else None
        self.head = torch.zeros_like(head, dtype=sum_dtype(head)) if wanted[1] else None
        self.bias = torch.zeros_like(bias, dtype=sum_dtype(bias)) if wanted[2] and bias is not None else None

    def add(self, grad_logits: Tensor, chunk: slice) -> None:
        """Adds what the gradient with respect to the head's output, [chunk, V], gives for hidden states, head and bias."""
        assert self.student.head is not None
        if self.bias is not None:
            self.bias += grad_logits.sum(dim=0, dtype=self.bias.dtype)
        if self.head is not None:
            add_product_(self.head, grad_logits, self.student.hidden[chunk])
        if self.hidden is not None:
            torch.mm(grad_logits, self.student.head, out=self.hidden[chunk])

    def take(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Returns the gradients of hidden states, head and bias."""
        return self.hidden, self.head, self.bias


def add_product_(total: Tensor, grad_logits: Tensor, hidden: Tensor) -> None:
    """Adds grad_logits.T @ hidden to total [V, H], where no product is rounded to less than the dtype of `total`."""
    if grad_logits.dtype == total.dtype:
        total.addmm_(grad_logits.T, hidden)
        return
    for ids in slices(0, len(total), _PRODUCT_ROWS):
        part = grad_logits[:, ids].T
        if part.is_cuda:
            total[ids] += torch.mm(part, hidden, out_dtype=total.dtype)
        else:
            total[ids].addmm_(part.to(total.dtype), hidden.to(total.dtype))


def slices(start: int, stop: int, length: int) -> Iterator[slice]:
    """Cuts start to stop into pieces of `length`, the last one perhaps shorter."""
    return (slice(first, min(first + length, stop)) for first in range(start, stop, length))


def sum_dtype(x: Tensor) -> torch.dtype:
    """The dtype to sum in: float32, or float64 for float64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
