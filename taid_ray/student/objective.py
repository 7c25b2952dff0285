"""What a student minimises, from the configuration: the objective, and a temperature that is learned with the model."""

from typing import Any

import torch

from taid_ray.config.objective import LossConfig
from taid_ray.config.schema import DistillConfig
from taid_ray.losses.learned_temperature import LearnedTemperature
from taid_ray.losses.objective import Objective


def objective_of(loss: LossConfig, t: float) -> Objective:
    """The quantity to minimise at interpolation `t`."""
    # t as a tensor, so that its changing value recompiles nothing; on the CPU, so that no device waits for it.
    return Objective(
        loss.method,
        torch.tensor(t, dtype=torch.float64),
        loss.sft_weight,
        loss.settings,
        loss.fixed_temperature,
        loss.squares_temperature,
    )


def learned_temperature(config: DistillConfig) -> LearnedTemperature | None:
    """The temperature of the loss at its start, if it is learned."""
    learned = config.loss.learned_temperature
    return LearnedTemperature(learned.min_temperature, learned.max_temperature) if learned else None


def temperature_group(config: DistillConfig, temperature: LearnedTemperature | None) -> list[dict[str, Any]]:
    """AdamW groups of a learned temperature. `rate`: its learning rate relative to the model's."""
    learned = config.loss.learned_temperature
    if learned is None or temperature is None:
        return []
    rate = learned.learning_rate / config.train.learning_rate
    return [{"params": [temperature.offset], "weight_decay": 0.0, "rate": rate}]


def denominator(config: DistillConfig, tokens: int) -> int:
    """Returns the number that the gradient of a global batch's sum is divided by: its loss positions, `tokens`.

    The published DKD divides by all positions instead, those without loss and padding included.
    """
    if config.loss.published and config.loss.name == "dkd":
        return config.train.batch_size * config.data.sequence_length
    return tokens
