"""TAID (arXiv 2501.16937): the student learns from an intermediate teacher between itself and the teacher.

    p_t = softmax((1 - t) * stop_gradient(student_logits) + t * teacher_logits)         mixed in logit space
    taid = KL(p_t || q),  q = softmax(student_logits),  gradient with respect to the student's logits exactly q - p_t

Masked vocabulary (-inf logits): at t = 0 the target is exactly the student, at t = 1 exactly the teacher, in between
an id that either side excludes has p_t = 0. A position where the two sides share no id has no target; its loss is +inf.
"""

import math

import torch
from torch import Tensor

from taid_ray.losses.divergences import at_least_float32, kl_from_log_probs, log_probs

# Stands in for a logit of -inf while two sides are mixed, because 0 * -inf would be NaN. exp(t * _FLOOR) is exactly 0
# for every t above 1e-18, and what lies below EXCLUDED is no logit of a model.
_FLOOR, EXCLUDED = -1e38, -1e20


def taid(
    student_logits: Tensor, teacher_logits: Tensor, t: float | Tensor, temperature: float | Tensor = 1.0
) -> Tensor:
    """Computes KL(p_t || q) [N] of student_logits [N, V] and teacher_logits [N, V]; see divergences for precision and -inf.

    t within [0, 1] is a float, else ValueError, or a 0-dim tensor, whose value the host never looks at.
    """
    return kl_from_log_probs(
        log_taid_target(student_logits, teacher_logits, t, temperature), log_probs(student_logits, temperature)
    )


def taid_reverse_kl(
    student_logits: Tensor, teacher_logits: Tensor, t: float | Tensor, temperature: float | Tensor = 1.0
) -> Tensor:
    """Computes KL(q || p_t) [N], TAID's other direction; arguments as in `taid`.

    Nobody publishes it: the reverse KL of TAID's code was not given p_t. Its gradient is exactly t times that of KL(q || p).
    """
    log_target = log_taid_target(student_logits, teacher_logits, t, temperature)
    kl = kl_from_log_probs(log_probs(student_logits, temperature), log_target)
    apart = ((student_logits == -math.inf) | (teacher_logits == -math.inf)).all(dim=-1)
    between = torch.as_tensor((t > 0) & (t < 1), device=kl.device)  # at an end one side alone is the target
    return torch.where(apart & between, math.inf, kl)


@torch.no_grad()
def log_taid_target(
    student_logits: Tensor, teacher_logits: Tensor, t: float | Tensor, temperature: float | Tensor = 1.0
) -> Tensor:
    """Computes log p_t [N, V], without gradient. Arguments as in `taid`."""
    student_logits, teacher_logits = at_least_float32(student_logits), at_least_float32(teacher_logits)
    mixed = mix(student_logits, teacher_logits, _as_tensor(t, student_logits))
    mixed.masked_fill_(mixed < EXCLUDED, -math.inf)
    # No shared id: any target will do, since the student excludes some id and the KL comes out as +inf.
    mixed.masked_fill_(mixed.amax(dim=-1, keepdim=True) == -math.inf, 0.0)
    return log_probs(mixed, temperature)


def mix(student_logits: Tensor, teacher_logits: Tensor, t: Tensor) -> Tensor:
    """Computes (1 - t) * student_logits + t * teacher_logits, [N, V], new and finite: excluded ids lie below EXCLUDED.

    A side whose weight is 0 excludes nothing. t is 0-dim, with the dtype of the logits (at least float32).
    """
    mixed = student_logits.clamp(min=_FLOOR).mul_(1 - t)
    return mixed.addcmul_(teacher_logits.clamp(min=_FLOOR), t)


def _as_tensor(t: float | Tensor, like: Tensor) -> Tensor:
    """Returns t as a 0-dim tensor with the dtype and device of `like`. Raises ValueError for a float outside [0, 1]."""
    if isinstance(t, Tensor):
        return t.to(like.device, like.dtype, non_blocking=True)
    if not 0 <= t <= 1:
        raise ValueError(f"t must lie within [0, 1], found {t}")
    return torch.full((), t, dtype=like.dtype, device=like.device)
