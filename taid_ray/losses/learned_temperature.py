"""CTKD (arXiv 2211.16231): distillation at a temperature that is learned against the student.

    ctkd = T^2 KL(p || q),   p, q = softmax of the logits of teacher and student divided by T

The student lowers the loss, the temperature raises it.
"""

import math

import torch
from torch import Tensor

from taid_ray.losses.divergences import forward_kl


def ctkd(student_logits: Tensor, teacher_logits: Tensor, temperature: float | Tensor) -> Tensor:
    """Computes T^2 KL(p || q) [N] of student_logits [N, V] and teacher_logits [N, V]; see `divergences` for precision and -inf.

    The gradient flows to the student, and to a temperature that is a tensor, through both sides.
    """
    return temperature**2 * forward_kl(student_logits, teacher_logits, temperature)


def temperature_slope(logits: Tensor, target_logits: Tensor, temperature: Tensor) -> Tensor:
    """Computes the derivative [N] of KL(p || q) with respect to T, where p, q = softmax of target_logits, logits [N, V].

    Both logits are divided by T already (a and b below). They stay as they are.

        d KL / dT = -(<q - p, a> + Cov_p(b, b - a)) / T
    """
    q, p = torch.softmax(logits, -1), torch.softmax(target_logits, -1)
    a, b = (_from_top(x) for x in (logits, target_logits))
    pull = (q.sub_(p).mul_(a)).sum(-1)
    mean = (p * b).sum(-1, keepdim=True)
    covariance = torch.sub(b, a, out=a).mul_(b.sub_(mean)).mul_(p).sum(-1)
    return -(pull + covariance) / temperature


def _from_top(logits: Tensor) -> Tensor:
    """Subtracts the largest logit of each row, and puts 0 in the place of -inf, whose probability is 0."""
    x = logits - logits.amax(-1, keepdim=True)
    return x.masked_fill_(x == -math.inf, 0.0)
