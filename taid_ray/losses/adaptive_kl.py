"""Adaptive KL (arXiv 2404.02657): forward and reverse KL, weighted by where student and teacher differ.

    adaptive_kl = w KL(p || q) + (1 - w) KL(q || p),   w = g_head / (g_head + g_tail),   g = sum of |p - q| over the ids

The head are the teacher's likeliest ids, the tail all others; w is held fixed. The head is aligned by vocabulary id, and its
border is that of the paper's author; TAID's published code has it in another order of the ids than the gaps.
"""

import torch
from torch import Tensor

from taid_ray.losses.divergences import kl_from_log_probs, log_probs


def adaptive_kl(
    student_logits: Tensor, teacher_logits: Tensor, mu: float = 0.5, temperature: float | Tensor = 1.0
) -> Tensor:
    """Computes adaptive KL [N] of student_logits [N, V] and teacher_logits [N, V]; see `divergences` for precision and -inf.

    mu: the head's largest mass, see `head_weight`. Where both sides agree the loss and its gradient are 0.
    """
    log_p, log_q = log_probs(teacher_logits.detach(), temperature), log_probs(student_logits, temperature)
    weight = head_weight(log_p.exp(), log_q.detach().exp(), mu).detach()
    return weighted(weight, kl_from_log_probs(log_p, log_q), kl_from_log_probs(log_q, log_p))


def head_weight(p: Tensor, q: Tensor, mu: float) -> Tensor:
    """Computes the weight [N] of the forward KL, within [0, 1], from the probabilities p and q [N, V] of teacher and student.

    The head takes ids by falling p while their cumulated mass, the id's own included, is at most mu, and always the first.
    Ids of the same p are taken by their number. One half where p = q. Raises ValueError for mu outside [0, 1).
    """
    if not 0 <= mu < 1:
        raise ValueError(f"mu must lie within [0, 1), found {mu}")
    mass, ids = p.sort(dim=-1, descending=True, stable=True)
    gaps = (p - q).abs_().gather(-1, ids)
    in_head = mass.cumsum_(dim=-1) <= mu
    in_head[:, :1] = True
    head, tail = (gaps.masked_fill(ignored, 0.0).sum(dim=-1) for ignored in (~in_head, in_head))
    total = head + tail
    return torch.where(total > 0, head / total, 0.5)


def weighted(weight: Tensor, forward: Tensor, reverse: Tensor) -> Tensor:
    """Sums w forward + (1 - w) reverse, each [N], without the term whose weight is 0: 0 * inf would be NaN."""
    forward_part = torch.where(weight > 0, weight * forward, 0.0)
    return forward_part + torch.where(weight < 1, (1 - weight) * reverse, 0.0)
