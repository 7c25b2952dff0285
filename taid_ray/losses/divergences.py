"""Divergences between a teacher and a student distribution over the vocabulary.

Every loss maps student_logits [N, V] and teacher_logits [N, V] to one value per loss position, [N], in nats. There is
no mask and no reduction: the caller selects the loss positions, sums and divides. In the formulas p is the teacher's
distribution and q the student's.

Precision: everything after the logits is float32 (float64 for float64 logits), so bfloat16 logits are safe.
Gradients: to the student only; the teacher's logits are detached.
Masked vocabulary: a logit of -inf means probability 0, on either side, and each row needs one finite logit.
0 * log 0 counts as 0, also where a probability is too small to be represented. Where a KL meets p > 0 with q = 0 it is
+inf, its true value. No gradient is ever NaN: terms that are infinite contribute no gradient through the probability in
front of the logarithm.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

Divergence = Callable[[Tensor, Tensor, float | Tensor], Tensor]
"""A loss as a function (student_logits [N, V], teacher_logits [N, V], t) -> [N]; registry.log_target gives -> [N, V]."""

# Stands in for log 0 inside a mixture: exp(-1e4) is exactly 0, and unlike -inf it has a derivative.
_LOG_ZERO = -1e4


def at_least_float32(logits: Tensor) -> Tensor:
    """Returns the logits in float32, or unchanged if they are float64."""
    return logits if logits.dtype == torch.float64 else logits.float()


def log_probs(logits: Tensor) -> Tensor:
    """Computes the log-softmax over the last dimension in at least float32; -inf stays -inf."""
    return torch.log_softmax(at_least_float32(logits), dim=-1)


def kl_from_log_probs(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Computes KL(p || q) = sum_v p log(p / q) over the last dimension, from two [N, V] log-probabilities."""
    p = log_p.exp()
    gap = torch.where(p > 0, log_p - log_q, 0.0)
    if p.requires_grad:  # an infinite gap would reach the logits as inf - inf
        p = torch.where(gap == math.inf, p.detach(), p)
    return (p * gap).sum(dim=-1)


def entropy_from_log_probs(log_p: Tensor) -> Tensor:
    """Computes the entropy -sum_v p log p over the last dimension, from [N, V] log-probabilities."""
    return -(log_p.exp() * torch.where(log_p > -math.inf, log_p, 0.0)).sum(dim=-1)


def entropy(logits: Tensor) -> Tensor:
    """Entropy [N] of softmax(logits [N, V])."""
    return entropy_from_log_probs(log_probs(logits))


def forward_kl(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """KL(p || q). Its gradient with respect to the student's logits is q - p."""
    return kl_from_log_probs(log_probs(teacher_logits.detach()), log_probs(student_logits))


def reverse_kl(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """KL(q || p); +inf where the teacher excludes an id that the student allows."""
    return kl_from_log_probs(log_probs(student_logits), log_probs(teacher_logits.detach()))


def tvd(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Total variation distance: half of sum_v |p - q|, within [0, 1]."""
    return (log_probs(teacher_logits.detach()).exp() - log_probs(student_logits).exp()).abs().sum(dim=-1) / 2


def js(student_logits: Tensor, teacher_logits: Tensor, teacher_weight: float = 0.1) -> Tensor:
    """Generalised Jensen-Shannon divergence (GKD): (1-w) KL(q || m) + w KL(p || m), m = w p + (1-w) q.

    w is teacher_weight; the gradient also flows through m. Always finite, and 0 everywhere at w = 0 and w = 1.
    """
    log_p, log_q = log_probs(teacher_logits.detach()), log_probs(student_logits)
    log_m = _log_mixture(log_p, log_q, teacher_weight)
    from_student = kl_from_log_probs(log_q, log_m)
    return (1 - teacher_weight) * from_student + teacher_weight * kl_from_log_probs(log_p, log_m)


def skew_forward_kl(student_logits: Tensor, teacher_logits: Tensor, weight: float = 0.1) -> Tensor:
    """DistiLLM's skew KL: KL(p || w p + (1-w) q), the gradient flowing through the mixture. Finite for w > 0."""
    if weight == 0:
        return forward_kl(student_logits, teacher_logits)
    log_p = log_probs(teacher_logits.detach())
    return kl_from_log_probs(log_p, _log_mixture(log_p, log_probs(student_logits), weight))


def skew_reverse_kl(student_logits: Tensor, teacher_logits: Tensor, weight: float = 0.1) -> Tensor:
    """DistiLLM's skew reverse KL: KL(q || (1-w) p + w q), otherwise as skew_forward_kl."""
    if weight == 0:
        return reverse_kl(student_logits, teacher_logits)
    log_q = log_probs(student_logits)
    return kl_from_log_probs(log_q, _log_mixture(log_q, log_probs(teacher_logits.detach()), weight))


def sft(student_logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy [N] of labels [N] (int64 ids) under the student; +inf where the student excludes the label.

    Every label must be an id: NO_LABEL or an id beyond V raises, because a loss position always has a label.
    """
    return -log_probs(student_logits).gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def _log_mixture(log_a: Tensor, log_b: Tensor, weight: float) -> Tensor:
    """Computes log(weight * a + (1 - weight) * b), formed in log space because small probabilities underflow."""
    log_weight, log_rest = (math.log(w) if w > 0 else -math.inf for w in (weight, 1 - weight))
    return torch.logaddexp(log_a.clamp(min=_LOG_ZERO) + log_weight, log_b.clamp(min=_LOG_ZERO) + log_rest)
