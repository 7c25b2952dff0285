"""Divergences against a mixture of teacher and student, m: Jensen-Shannon, GKD and the skew KLs of DistiLLM.

Arguments, precision, temperature and masked vocabulary as in `divergences`. Mixtures are formed in log space, because a
probability that underflows would be log 0. Gradients flow through m, too.
"""

import math

import torch
from torch import Tensor

from taid_ray.losses.divergences import forward_kl, kl_from_log_probs, log_probs, reverse_kl

# Stands in for log 0 inside a mixture: exp(-1e4) is exactly 0, and unlike -inf it has a derivative.
_LOG_ZERO = -1e4


def js(
    student_logits: Tensor, teacher_logits: Tensor, teacher_weight: float = 0.1, temperature: float | Tensor = 1.0
) -> Tensor:
    """Generalised Jensen-Shannon divergence: (1-w) KL(q || m) + w KL(p || m), m = w p + (1-w) q.

    w is teacher_weight, within [0, 1], else ValueError. Always finite, and 0 everywhere at w = 0 and w = 1.
    """
    check_weight(teacher_weight)
    log_p, log_q = log_probs(teacher_logits.detach(), temperature), log_probs(student_logits, temperature)
    log_m = log_mixture(log_p, log_q, teacher_weight)
    from_student = kl_from_log_probs(log_q, log_m)
    return (1 - teacher_weight) * from_student + teacher_weight * kl_from_log_probs(log_p, log_m)


def gkd(student_logits: Tensor, teacher_logits: Tensor, beta: float = 0.5, temperature: float | Tensor = 1.0) -> Tensor:
    """GKD's loss (arXiv 2306.13649, equation 1): `js` with the teacher's weight beta, whose ends are the KLs.

    beta = 0 is KL(p || q) and beta = 1 is KL(q || p), as in TRL's code. That is no limit: as beta falls to 0, the loss does, too
    (divided by beta it goes to KL(p || q)). Raises ValueError for a beta outside [0, 1].
    """
    if beta == 0:
        return forward_kl(student_logits, teacher_logits, temperature)
    if beta == 1:
        return reverse_kl(student_logits, teacher_logits, temperature)
    return js(student_logits, teacher_logits, beta, temperature)


def skew_forward_kl(
    student_logits: Tensor, teacher_logits: Tensor, weight: float = 0.1, temperature: float | Tensor = 1.0
) -> Tensor:
    """DistiLLM's skew KL (arXiv 2402.03898): KL(p || m), m = w p + (1-w) q. Finite for w > 0.

    w is weight, within [0, 1], else ValueError.
    """
    check_weight(weight)
    if weight == 0:
        return forward_kl(student_logits, teacher_logits, temperature)
    log_p = log_probs(teacher_logits.detach(), temperature)
    return kl_from_log_probs(log_p, log_mixture(log_p, log_probs(student_logits, temperature), weight))


def skew_reverse_kl(
    student_logits: Tensor, teacher_logits: Tensor, weight: float = 0.1, temperature: float | Tensor = 1.0
) -> Tensor:
    """DistiLLM's skew reverse KL: KL(q || m), m = (1-w) p + w q, otherwise as skew_forward_kl."""
    check_weight(weight)
    if weight == 0:
        return reverse_kl(student_logits, teacher_logits, temperature)
    log_q = log_probs(student_logits, temperature)
    return kl_from_log_probs(log_q, log_mixture(log_q, log_probs(teacher_logits.detach(), temperature), weight))


def check_weight(weight: float) -> None:
    """Raises ValueError for a mixing weight outside [0, 1]."""
    if not 0 <= weight <= 1:
        raise ValueError(f"the mixing weight must lie within [0, 1], found {weight}")


def log_mixture(log_a: Tensor, log_b: Tensor, weight: float) -> Tensor:
    """Computes log(weight * a + (1 - weight) * b) [N, V] from the logs of a and b."""
    log_weight, log_rest = (math.log(w) if w > 0 else -math.inf for w in (weight, 1 - weight))
    # Added in place: nothing else holds what `clamp` returns.
    return torch.logaddexp(log_a.clamp(min=_LOG_ZERO).add_(log_weight), log_b.clamp(min=_LOG_ZERO).add_(log_rest))
