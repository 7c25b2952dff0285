"""The learning rate of every optimizer step."""

import math

from taid_ray.config.training import TrainConfig


def learning_rate(step: int, config: TrainConfig, total_steps: int) -> float:
    """Learning rate of the 0-based optimizer step.

    Linear warm-up that reaches the peak in the last of `warmup_steps`; from there constant, or falling to 0 as a line
    or half a cosine. 0 would be reached at step total_steps, so the last step still learns.
    """
    peak, warmup = config.learning_rate, config.warmup_steps
    if step < warmup:
        return peak * (step + 1) / warmup
    if config.lr_schedule == "constant":
        return peak
    progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    return peak * ((1 + math.cos(math.pi * progress)) / 2 if config.lr_schedule == "cosine" else 1 - progress)
