"""Decoupled knowledge distillation, DKD (arXiv 2203.08679): the label's probability, and how the others share the rest.

    dkd  = T^2 (alpha TCKD + beta NCKD)        p, q = softmax of the logits of teacher and student divided by T, y the label
    TCKD = KL((p_y, 1 - p_y) || (q_y, 1 - q_y))
    NCKD = KL(p' || q'),   p' and q' = p and q without the label, scaled to sum 1

KL(p || q) itself is TCKD + (1 - p_y) NCKD.
"""

import math

import torch
from torch import Tensor

from taid_ray.losses.divergences import kl_from_log_probs, tempered


def dkd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float | Tensor = 4.0,
) -> Tensor:
    """Computes DKD [N] of student_logits [N, V], teacher_logits [N, V] and labels [N] (int64 ids).

    Precision and -inf as in `divergences`. Where the teacher allows no other id than the label, NCKD has no p' and counts as 0.
    Every label must be an id, as in `divergences.sft`.
    """
    labels = labels.unsqueeze(-1)
    target_p, others_p = decouple(tempered(teacher_logits.detach(), temperature), labels)
    target_q, others_q = decouple(tempered(student_logits, temperature), labels)
    tckd, nckd = kl_from_log_probs(target_p, target_q), kl_of_others(target_p, others_p, target_q, others_q)
    return temperature**2 * (alpha * tckd + beta * nckd)


def decouple(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Computes the log-probabilities [N, 2] of the label and of all others, and [N, V] of each id among the others.

    labels: [N, 1]. Where there is no other id, all of them get the same probability, so that no NaN arises.
    """
    others = logits.scatter(-1, labels, -math.inf)
    log_others = others.logsumexp(-1, keepdim=True)
    target = torch.log_softmax(torch.cat([logits.gather(-1, labels), log_others], -1), -1)
    return target, torch.log_softmax(others.masked_fill(log_others == -math.inf, 0.0), -1)


def kl_of_others(target_p: Tensor, others_p: Tensor, target_q: Tensor, others_q: Tensor) -> Tensor:
    """Computes NCKD [N] from what `decouple` gives for both sides."""
    without_p, without_q = target_p[:, 1] == -math.inf, target_q[:, 1] == -math.inf
    kl = torch.where(without_q, math.inf, kl_from_log_probs(others_p, others_q))
    return torch.where(without_p, 0.0, kl)
