"""The quantity to minimise, on a block of loss positions: values, and the gradient with respect to the student's logits."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from taid_ray.losses.closed_form import closed_form_kl_
from taid_ray.losses.divergences import entropy_from_log_probs, sft
from taid_ray.losses.registry import divergence, log_target
from taid_ray.losses.taid import mix
from taid_ray.losses.topk import TopK, spread_, tail_shares_, take_buckets_

CLOSED_FORM = ("taid", "forward_kl")
"""Losses whose gradient is formed without autograd."""


class BlockResult(NamedTuple):
    """Values and gradient of an objective on N positions."""

    values: Tensor
    """[3, N]: divergence, entropy of its target, cross-entropy on the labels."""
    gradient: Tensor | None
    """[N, V]: gradient of the objective's sum with respect to the student's logits."""


@dataclass(frozen=True)
class Objective:
    """(1 - sft_weight) * divergence + sft_weight * cross-entropy on the labels, per token."""

    name: str
    """The divergence, as registry.divergence knows it."""
    t: Tensor
    """TAID's interpolation, within [0, 1]: a 0-dim tensor, whose value is checked on the CPU only. Other losses ignore it."""
    sft_weight: float = 0.0
    """Share of the cross-entropy, within [0, 1]; above 0 it needs labels."""
    weight: float | None = None
    """Mixing weight of the divergence, see registry.divergence."""

    def check(self, labels: Tensor | None) -> None:
        """Raises ValueError for an unknown loss, a weight that it cannot have, t or a share of cross-entropy outside [0, 1], or
        missing labels."""
        divergence(self.name, self.weight)
        # For a value on another device the host would have to wait.
        t: Any = self.t.tolist() if self.t.device.type == "cpu" else 0.0
        if not 0 <= t <= 1:
            raise ValueError(f"t must lie within [0, 1], found {t}")
        if not 0 <= self.sft_weight <= 1 or (self.sft_weight > 0 and labels is None):
            raise ValueError(f"sft_weight must lie within [0, 1] and needs labels above 0; found {self.sft_weight}")

    def evaluate_(self, logits: Tensor, teacher: Tensor | TopK, labels: Tensor | None, learn: bool) -> BlockResult:
        """Evaluates N positions. Without labels their cross-entropy is 0; without `learn` there is no gradient.

        logits: the student's [N, V] in at least float32; they are overwritten. teacher: logits [N, V], or a TopK of N
        positions, which are not. `t` must have the dtype and device of the logits.
        """
        if isinstance(teacher, TopK):
            return self._on_buckets(logits, teacher, labels, learn)
        if self.in_graph(teacher):
            return self._by_autograd(logits, teacher, labels, learn)
        return self._in_closed_form(logits, teacher, labels, learn)

    def in_graph(self, teacher: object) -> bool:
        """Tests whether the gradient against this teacher (logits, or a TopK) takes an autograd graph over the vocabulary."""
        return self.name not in CLOSED_FORM and not isinstance(teacher, TopK)

    def total(self, kl: Tensor, ce: Tensor) -> Tensor:
        """Sums both parts by their shares. A share of 0 drops its term: 0 * inf would be NaN."""
        terms = [share * term for share, term in ((1 - self.sft_weight, kl), (self.sft_weight, ce)) if share > 0]
        return sum(terms, start=torch.zeros_like(kl))

    def _in_closed_form(self, logits: Tensor, teacher: Tensor, labels: Tensor | None, learn: bool) -> BlockResult:
        label_logits = _at(logits, labels)
        kl, entropy, normaliser, target = closed_form_kl_(
            logits, mix(logits, teacher, self.t) if self.name == "taid" else teacher
        )
        ce = torch.zeros_like(kl) if label_logits is None else normaliser - label_logits
        if labels is not None and self.sft_weight > 0:  # (1 - w) (q - p) + w (q - onehot)
            _subtract_at_(logits.add_(target, alpha=self.sft_weight), labels, self.sft_weight)
        return BlockResult(torch.stack([kl, entropy, ce]), logits if learn else None)

    def _by_autograd(self, logits: Tensor, teacher: Tensor, labels: Tensor | None, learn: bool) -> BlockResult:
        # The entropy comes first: its temporaries are gone before the graph of the divergence grows.
        target = log_target(self.name)
        entropy = entropy_from_log_probs(target(logits, teacher, self.t)) if target else logits.new_zeros(len(logits))
        logits.requires_grad_(learn)
        with torch.set_grad_enabled(learn):
            ce = torch.zeros_like(entropy) if labels is None else sft(logits, labels)
            return self._differentiate(logits, teacher, entropy, ce)

    def _on_buckets(self, logits: Tensor, teacher: TopK, labels: Tensor | None, learn: bool) -> BlockResult:
        label_logits = _at(logits, labels)
        ids, teacher_buckets = teacher.ids.long(), teacher.buckets(logits.dtype)
        buckets = take_buckets_(logits, ids)
        shares, tail_entropy = tail_shares_(logits, buckets)
        target = log_target(self.name)
        entropy = torch.zeros_like(tail_entropy)
        if target:
            log_p = target(buckets, teacher_buckets, self.t)
            entropy = entropy_from_log_probs(log_p) + log_p[:, -1].exp() * tail_entropy
        buckets.requires_grad_(learn)
        with torch.set_grad_enabled(learn):
            ce = torch.zeros_like(entropy) if label_logits is None else buckets.logsumexp(-1) - label_logits
            values, gradient = self._differentiate(buckets, teacher_buckets, entropy, ce)
        if gradient is None:
            return BlockResult(values, None)
        gradient = spread_(gradient, shares, ids)
        if labels is not None and self.sft_weight > 0:  # of the label's own logit, which is outside the buckets' graph
            _subtract_at_(gradient, labels, self.sft_weight)
        return BlockResult(values, gradient)

    def _differentiate(self, leaf: Tensor, teacher: Tensor, entropy: Tensor, ce: Tensor) -> BlockResult:
        kl = divergence(self.name, self.weight)(leaf, teacher, self.t)
        values = torch.stack([kl.detach(), entropy, ce.detach()])
        if not leaf.requires_grad:
            return BlockResult(values, None)
        return BlockResult(values, torch.autograd.grad(self.total(kl.sum(), ce.sum()), leaf)[0])


def block_rows(chunk_tokens: int, in_graph: bool) -> int:
    """The number of rows of a chunk to evaluate at once, so that what is alive stays below two thirds of its logits.

    In closed form and on buckets that is up to 5 tensors of a block, in a graph up to 14 (js); one more with a soft-capped
    student, and another one for each side in bfloat16. Fewer rows would fit a CPU's cache better, but threads meet after
    every operation, and where they share the cores with other processes each meeting may cost a time slice: with 8 rows
    of 32,000 ids a loss took 15 s that took 0.7 s on idle cores, with 64 rows 2 s.
    """
    return max(1, chunk_tokens // (32 if in_graph else 8))


def _at(logits: Tensor, labels: Tensor | None) -> Tensor | None:
    """Picks the labels' own logits [N]; None without labels."""
    return None if labels is None else logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def _subtract_at_(gradient: Tensor, labels: Tensor, amount: float) -> None:
    """Subtracts `amount` at the labels [N] of gradient [N, V]."""
    gradient.scatter_add_(-1, labels.unsqueeze(-1), gradient.new_full((len(labels), 1), -amount))
