"""The menu of losses: functions of student and teacher logits [N, V] with one float32 value per loss position."""

from taid_ray.losses.buckets import TopK
from taid_ray.losses.divergences import (
    Divergence,
    entropy,
    forward_kl,
    js,
    reverse_kl,
    sft,
    skew_forward_kl,
    skew_reverse_kl,
    tvd,
)
from taid_ray.losses.menu import divergence, log_target, target_entropy
from taid_ray.losses.taid import taid, taid_target_entropy

__all__ = [
    "Divergence",
    "TopK",
    "divergence",
    "entropy",
    "forward_kl",
    "js",
    "log_target",
    "reverse_kl",
    "sft",
    "skew_forward_kl",
    "skew_reverse_kl",
    "taid",
    "taid_target_entropy",
    "target_entropy",
    "tvd",
]
