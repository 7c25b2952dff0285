"""The longest rows that models may be given, by their configs."""

import sys
from collections.abc import Iterator
from typing import Any

from taid_ray.config.schema import DistillConfig
from taid_ray.errors import ConfigError

BY_LONGEST = ("longrope", "su")
"""Rotary embeddings with two sets of factors, one of which transformers takes for a whole call, by the largest position in it."""


def check_lengths(config: DistillConfig, teacher_config: Any, student_config: Any) -> None:
    """Raises ConfigError unless both models hold rows of data.sequence_length, each row as if it were alone.

    teacher_config: None without a teacher.
    """
    models = (
        {"student": student_config}
        if teacher_config is None
        else {"teacher": teacher_config, "student": student_config}
    )
    length, most = config.data.sequence_length, context_length(*models.values())
    for name, model_config in models.items():
        longest, uniform, chunk = (
            _position_limit(model_config),
            uniform_length(model_config),
            chunk_length(model_config),
        )
        if length > longest:
            raise ConfigError(
                f"data.sequence_length: {length} is longer than the {name}'s context of {longest} tokens; set it to at most "
                f"{most}"
            )
        if uniform is not None and length > uniform:
            raise ConfigError(
                f"data.sequence_length: {length} is longer than the {uniform} tokens up to which the {name}'s rotary "
                "embedding (longrope) is the same for all rows: beyond, transformers takes other factors for every row of a "
                f"batch as soon as one row is longer; set it to at most {most}"
            )
        if length > chunk and (config.data.pack or config.cache.on):
            raise ConfigError(
                f"data.sequence_length: {length} is longer than the chunks of {chunk} tokens in which the {name} attends, "
                "and packed rows would be cut into chunks regardless of their documents; set data.pack: false and no "
                f"cache.directory, or data.sequence_length: {min(chunk, most)}"
            )


def context_length(*model_configs: Any) -> int:
    """The longest row that every one of these models holds, each as if it were alone; unbounded where no config names a limit."""
    limits = [(_position_limit(each), uniform_length(each) or sys.maxsize) for each in model_configs]
    return min(min(pair) for pair in limits)


def uniform_length(model_config: Any) -> int | None:
    """The longest row beside which other rows keep their rotary factors; None if these do not depend on other rows.

    Those of type `dynamic` change behind max_position_embeddings only, where no row is allowed.
    """
    text = model_config.get_text_config()
    found = [
        settings.get("original_max_position_embeddings") or getattr(text, "original_max_position_embeddings", None)
        for settings in _rope_settings(text)
        if settings.get("rope_type", settings.get("type")) in BY_LONGEST
    ]
    return min((limit for limit in found if limit), default=None)


def _rope_settings(text: Any) -> Iterator[dict[str, Any]]:
    """The settings of every rotary embedding of a model: one for all layers, or one for each kind of layer."""
    for field in ("rope_parameters", "rope_scaling"):
        value = getattr(text, field, None)
        if isinstance(value, dict):
            yield from (value, *(inner for inner in value.values() if isinstance(inner, dict)))


def _position_limit(model_config: Any) -> int:
    limit = getattr(model_config.get_text_config(), "max_position_embeddings", None) or 0
    return limit if limit > 0 else sys.maxsize  # XLNet says -1


def chunk_length(model_config: Any) -> int:
    """The length of the chunks within which a row attends (Llama 4); unbounded for other models."""
    text = model_config.get_text_config()
    chunked = "chunked_attention" in (getattr(text, "layer_types", None) or ())
    return (getattr(text, "attention_chunk_size", None) if chunked else None) or sys.maxsize
