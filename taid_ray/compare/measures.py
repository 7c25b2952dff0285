"""Figures of a student beside its teacher on held-out documents, from hidden states, a block of positions at a time.

Shapes: N loss positions of a batch, n of a block, D documents, V vocabulary. In the formulas p is the teacher's distribution
and q the student's. All figures are sums in float64 of values in at least float32; divergences are nats.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from taid_ray.compare.calibration import Calibration
from taid_ray.losses.divergences import kl_from_log_probs, log_probs
from taid_ray.losses.objective import block_rows
from taid_ray.losses.projection import ChunkLogits, Projection, slices

HEAD_IDS = 10
"""Number of ids in the head of a distribution: the likeliest ones (TAID paper, Table 3)."""
TAIL_FIFTH = 5
"""One of this many ids, the least likely ones, are the tail: the 80th to the 100th percentile (TAID paper, Table 3)."""


class ModelTotals:
    """Sums of what is measured of one model alone: student or teacher."""

    def __init__(self, documents: int, vocabulary: int):
        self.sums = {name: _zeros(documents) for name in ("cross_entropy", "head_mass", "tail_mass")}
        """Sums over the loss positions of each document [D], by figure."""
        self.calibration = Calibration()
        self._probabilities, self._positions = _zeros(vocabulary), 0

    def add(self, log_q: Tensor, labels: Tensor, documents: Tensor) -> None:
        """Adds a block. log_q: [n, V]; labels: [n], ids; documents: [n], index of each position's document."""
        q = log_q.exp()
        confidence, likeliest = q.max(-1)
        head, tail = head_and_tail(q)
        cross_entropy = -log_q.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
        for name, values in (("cross_entropy", cross_entropy), ("head_mass", head), ("tail_mass", tail)):
            add_by_document_(self.sums[name], values, documents)
        self.calibration.add(confidence, likeliest == labels)
        self._probabilities += q.sum(0, dtype=torch.float64).cpu()
        self._positions += len(q)

    def masses_of_the_mean(self) -> tuple[float, float]:
        """Masses of head and tail of the distribution that is averaged over all positions first, and ranked then.

        The paper's figures are of this size; per position a language model's head holds about 0.9.
        """
        head, tail = head_and_tail((self._probabilities / self._positions).unsqueeze(0))
        return float(head), float(tail)


class PairTotals:
    """Sums of everything that is measured of a student beside its teacher."""

    def __init__(self, documents: int, vocabulary: int):
        """documents: their number, D; vocabulary: number of ids that both models share, V."""
        self.tokens = _zeros(documents)
        """Number of loss positions of each document [D]."""
        self.student, self.teacher = (ModelTotals(documents, vocabulary) for _ in range(2))
        self.divergences = {name: _zeros(documents) for name in ("forward_kl", "reverse_kl")}
        """Sums of KL(p || q) and KL(q || p) over the loss positions of each document [D]."""

    def add(
        self, student: Projection, teacher: Projection, labels: Tensor, documents: Tensor, *, chunk_tokens: int
    ) -> None:
        """Adds a batch. labels: [N], ids; documents: [N], index of each position's document; all on one device.

        chunk_tokens: positions whose logits may exist at the same time. Both projections have V ids.
        """
        add_by_document_(self.tokens, torch.ones(len(labels)), documents)
        for rows, log_q, log_p in _blocks(student, teacher, chunk_tokens):
            here = documents[rows]
            self.student.add(log_q, labels[rows], here)
            self.teacher.add(log_p, labels[rows], here)
            add_by_document_(self.divergences["forward_kl"], kl_from_log_probs(log_p, log_q), here)
            add_by_document_(self.divergences["reverse_kl"], kl_from_log_probs(log_q, log_p), here)


def head_and_tail(q: Tensor) -> tuple[Tensor, Tensor]:
    """Masses [n] of the HEAD_IDS likeliest ids and of the least likely fifth of all ids, by the ranks of q [n, V] itself."""
    ranked = q.sort(-1, descending=True).values
    tail_first_rank = -(-(TAIL_FIFTH - 1) * q.shape[-1] // TAIL_FIFTH)
    return ranked[:, :HEAD_IDS].sum(-1), ranked[:, tail_first_rank:].sum(-1)


def add_by_document_(sums: Tensor, values: Tensor, documents: Tensor) -> None:
    """Adds values [n] to the sums [D] of their documents [n]."""
    sums.index_add_(0, documents.cpu(), values.double().cpu())


def _blocks(student: Projection, teacher: Projection, chunk_tokens: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yields blocks of positions with the log-probabilities [n, V] of student and teacher."""
    sides = [ChunkLogits(side.prepared(), chunk_tokens) for side in (student, teacher)]
    length = block_rows(chunk_tokens, in_graph=True)
    for chunk in slices(0, len(student.hidden), chunk_tokens):
        for side in sides:
            side.load(chunk)
        for rows in slices(chunk.start, chunk.stop, length):
            log_q, log_p = (log_probs(side.rows(rows)) for side in sides)
            yield rows, log_q, log_p


def _zeros(size: int) -> Tensor:
    return torch.zeros(size, dtype=torch.float64)
