"""CTKD (arXiv 2211.16231): distillation at a temperature that is learned against the student.

    ctkd = T^2 KL(p || q),   p, q = softmax of the logits of teacher and student divided by T
    T    = low + (high - low) sigmoid(theta)

The student lowers the loss, theta raises it: on its way to theta the gradient is reversed, at first with strength 0, later 1.
TAID's published code keeps T as it is at the start, because no optimizer has theta; nor does its strength have the sign.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from taid_ray.losses.divergences import forward_kl


def ctkd(student_logits: Tensor, teacher_logits: Tensor, temperature: float | Tensor) -> Tensor:
    """Computes T^2 KL(p || q) [N] of student_logits [N, V] and teacher_logits [N, V]; see `divergences` for precision and -inf.

    The gradient flows to the student, and to a temperature that is a tensor, through both sides.
    """
    return temperature**2 * forward_kl(student_logits, teacher_logits, temperature)


class LearnedTemperature(nn.Module):
    """The temperature T within (low, high), as a module whose parameter an optimizer that lowers the loss makes raise it."""

    START = 1.0
    """theta at the start, as published: T is then low + 0.73 (high - low)."""

    def __init__(self, low: float, high: float):
        super().__init__()
        self.low, self.high = low, high
        # theta - START: near 0 bfloat16 is finer than near 1.
        self.offset = nn.Parameter(torch.zeros(1))

    def forward(self, strength: float) -> Tensor:
        """Computes T, a 0-dim float32 tensor, whose gradient reaches the parameter times -strength."""
        theta = self.START + _reverse(self.offset.float(), strength).squeeze(0)
        return self.low + (self.high - self.low) * torch.sigmoid(theta)


class _Reversal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, strength: float) -> Tensor:
        ctx.strength = strength
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * -ctx.strength, None


def _reverse(x: Tensor, strength: float) -> Tensor:
    reversed_: Tensor = _Reversal.apply(x, strength)
    return reversed_


def reversal_strength(step: int, ramp_steps: float) -> float:
    """Strength of the reversal in a step, from 1: half a cosine from 0 to 1 over `ramp_steps`, as in CTKD's code. No ramp: 1."""
    return (1 - math.cos(math.pi * min(1.0, step / ramp_steps))) / 2 if ramp_steps > 0 else 1.0
