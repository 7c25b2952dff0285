"""What TAID's published code (github.com/SakanaAI/TAID at a0628922) computes in place of a loss it names, for comparison only.

Adaptive KL is here. CTKD there is the KL at a temperature that never moves, and DKD the right one divided by another number of
positions; both need no function of their own.
"""

import torch
from torch import Tensor

from taid_ray.losses.divergences import entropy_from_log_probs, kl_from_log_probs, log_probs


def published_adaptive_kl(
    student_logits: Tensor, teacher_logits: Tensor, mu: float = 0.5, temperature: float | Tensor = 1.0
) -> Tensor:
    """Computes what src/distil_losses/adaptive_kl.py does, [N] from logits [N, V]; mu is its head_threshold.

    Its faults, against `adaptive_kl`: the mask of the head is in the order of falling p and the gaps in that of the vocabulary,
    so that with n ids in the head the last n ids of the vocabulary count as such; gradients flow through the weight; in place
    of KL(p || q) stands the cross-entropy. NaN where both sides agree.
    """
    log_p, log_q = log_probs(teacher_logits.detach(), temperature), log_probs(student_logits, temperature)
    p, q = log_p.exp(), log_q.exp()
    in_head = _misplaced_head(p, mu)
    gaps = (p - q).abs()
    head, tail = ((gaps * part).sum(dim=-1) for part in (in_head, 1 - in_head))
    cross_entropy = kl_from_log_probs(log_p, log_q) + entropy_from_log_probs(log_p)
    return (head * cross_entropy + tail * kl_from_log_probs(log_q, log_p)) / (head + tail)


@torch.no_grad()
def _misplaced_head(p: Tensor, mu: float) -> Tensor:
    """Computes the mask [N, V] of the published head, as 0 and 1: as many ids as by rising p lie beyond a mass of mu."""
    return (p.sort(dim=-1).values.cumsum(dim=-1) > mu).to(p.dtype)
