"""CTKD (arXiv 2211.16231): distillation at a temperature that is learned against the student.

    ctkd = T^2 KL(p || q),   p, q = softmax of the logits of teacher and student divided by T

The student lowers the loss, the temperature raises it (see `learned_temperature`).
"""

from torch import Tensor

from taid_ray.losses.divergences import forward_kl


def ctkd(student_logits: Tensor, teacher_logits: Tensor, temperature: float | Tensor) -> Tensor:
    """Computes T^2 KL(p || q) [N] of student_logits [N, V] and teacher_logits [N, V]; see `divergences` for precision and -inf.

    The gradient flows to the student, and to a temperature that is a tensor, through both sides.
    """
    return temperature**2 * forward_kl(student_logits, teacher_logits, temperature)
