"""The term that some losses lack to be the cross-entropy form of the published code."""

import torch

from taid_ray.losses.divergences import entropy_from_log_probs
from taid_ray.losses.registry import Divergence, log_target


def target_entropy(name: str) -> Divergence:
    """Returns the entropy [N] of the target of the loss `name`, without gradient; 0 for the losses that lack nothing."""
    target = log_target(name)
    if target is None:
        return lambda student_logits, teacher_logits, t: torch.zeros(len(teacher_logits), device=teacher_logits.device)
    return lambda student_logits, teacher_logits, t: entropy_from_log_probs(target(student_logits, teacher_logits, t))
