"""Divergences between a teacher and a student distribution over the vocabulary.

Every loss maps student_logits [N, V] and teacher_logits [N, V] to one value per loss position, [N], in nats. There is
no mask and no reduction: the caller selects the loss positions, sums and divides. In the formulas p is the teacher's
distribution and q the student's.

Precision: everything after the logits is float32 (float64 for float64 logits), so bfloat16 logits are safe.
Temperature: `temperature` T divides the logits of both sides, and no factor T^2 makes up for it. It is a float above 0 (else
ValueError), or a 0-dim tensor.
Gradients: to the student, and to a temperature that is a tensor; the teacher's logits are detached.
Masked vocabulary: a logit of -inf means probability 0, on either side, and each row needs one finite logit.
0 * log 0 counts as 0, also where a probability is too small to be represented. Where a KL meets p > 0 with q = 0 it is
+inf, its true value. No gradient is ever NaN: terms that are infinite contribute no gradient through the probability in
front of the logarithm.
"""

import math

import torch
from torch import Tensor


def at_least_float32(logits: Tensor) -> Tensor:
    """Returns the logits in float32, or unchanged if they are float64."""
    return logits if logits.dtype == torch.float64 else logits.float()


def tempered(logits: Tensor, temperature: float | Tensor) -> Tensor:
    """Computes logits / temperature in at least float32; -inf stays -inf. Raises ValueError for a float that is not above 0."""
    logits = at_least_float32(logits)
    if isinstance(temperature, Tensor):
        excluded = logits == -math.inf  # divided, they would give the temperature a gradient of 0 * inf
        return (logits.masked_fill(excluded, 0.0) / temperature).masked_fill(excluded, -math.inf)
    check_temperature(temperature)
    return logits if temperature == 1 else logits / temperature


def check_temperature(temperature: float | Tensor) -> None:
    """Raises ValueError for a float that is not above 0. The value of a tensor is not looked at."""
    if not isinstance(temperature, Tensor) and not 0 < temperature < math.inf:
        raise ValueError(f"the temperature must be above 0, found {temperature}")


def log_probs(logits: Tensor, temperature: float | Tensor = 1.0) -> Tensor:
    """Computes the log-softmax over the last dimension in at least float32; -inf stays -inf."""
    return torch.log_softmax(tempered(logits, temperature), dim=-1)


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


def forward_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float | Tensor = 1.0) -> Tensor:
    """KL(p || q). Its gradient with respect to the student's logits is (q - p) / T."""
    return kl_from_log_probs(log_probs(teacher_logits.detach(), temperature), log_probs(student_logits, temperature))


def reverse_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float | Tensor = 1.0) -> Tensor:
    """KL(q || p); +inf where the teacher excludes an id that the student allows."""
    return kl_from_log_probs(log_probs(student_logits, temperature), log_probs(teacher_logits.detach(), temperature))


def tvd(student_logits: Tensor, teacher_logits: Tensor, temperature: float | Tensor = 1.0) -> Tensor:
    """Total variation distance: half of sum_v |p - q|, within [0, 1]."""
    p, q = log_probs(teacher_logits.detach(), temperature).exp(), log_probs(student_logits, temperature).exp()
    return (p - q).abs().sum(dim=-1) / 2


def sft(student_logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy [N] of labels [N] (int64 ids) under the student; +inf where the student excludes the label.

    Every label must be an id: NO_LABEL or an id beyond V raises, because a loss position always has a label.
    """
    return -log_probs(student_logits).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
