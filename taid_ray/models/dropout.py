"""Whether training a model draws random numbers, which would make its trajectory depend on the number of workers."""

from typing import Any

from taid_ray.config.schema import DistillConfig


def uses_dropout(model: Any, config: DistillConfig) -> bool:
    """Tests whether training draws random numbers, by the rates in the model's config and in that of the adapters.

    Those are dropout of values and of whole layers (layerdrop), and the noise of routers (jitter).
    """
    values = [*model.config.get_text_config().to_dict().items()]
    if config.data.has_images:
        values += model.config.vision_config.to_dict().items()
    rates = [value for key, value in values if any(name in key for name in ("drop", "jitter"))]
    return any(isinstance(rate, float) and rate > 0 for rate in rates) or bool(
        config.student.lora and config.student.lora.dropout
    )
