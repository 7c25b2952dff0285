"""TAID (arXiv 2501.16937): the student learns from an intermediate teacher between itself and the teacher.

    p_t = softmax((1 - t) * stop_gradient(student_logits) + t * teacher_logits)         mixed in logit space
    taid = KL(p_t || q),  q = softmax(student_logits),  gradient with respect to the student's logits exactly q - p_t

Masked vocabulary (-inf logits): at t = 0 the target is exactly the student, at t = 1 exactly the teacher, in between
an id that either side excludes has p_t = 0. A position where the two sides share no id has no target; its loss is +inf.
"""

import math

import torch
from torch import Tensor

from taid_ray.losses.divergences import at_least_float32, entropy_from_log_probs, kl_from_log_probs, log_probs


def taid(student_logits: Tensor, teacher_logits: Tensor, t: float | Tensor) -> Tensor:
    """KL(p_t || q) [N] of student_logits [N, V] and teacher_logits [N, V]; see divergences for precision and -inf.

    t is a float or a 0-dim tensor within [0, 1], else ValueError. (A tensor on a GPU makes the host wait for it.)
    """
    return kl_from_log_probs(_log_target(student_logits, teacher_logits, t), log_probs(student_logits))


def taid_target_entropy(student_logits: Tensor, teacher_logits: Tensor, t: float | Tensor) -> Tensor:
    """Entropy of p_t [N], without gradient. Added to `taid` it gives the published code's loss, - sum p_t log q."""
    return entropy_from_log_probs(_log_target(student_logits, teacher_logits, t))


@torch.no_grad()
def _log_target(student_logits: Tensor, teacher_logits: Tensor, t: float | Tensor) -> Tensor:
    """log p_t [N, V]."""
    t = float(t)
    if not 0 <= t <= 1:
        raise ValueError(f"t must lie within [0, 1], found {t}")
    if t == 0:  # 0 * -inf would be NaN
        return log_probs(student_logits)
    if t == 1:
        return log_probs(teacher_logits)
    mixed = ((1 - t) * at_least_float32(student_logits)).add_(at_least_float32(teacher_logits), alpha=t)
    # No shared id: any target will do, since the student excludes some id and the KL comes out as +inf.
    mixed.masked_fill_(mixed.amax(dim=-1, keepdim=True) == -math.inf, 0.0)
    return log_probs(mixed)
