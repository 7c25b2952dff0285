"""The tokens at which a model stops generating: its own, and those that end what it was trained on."""

from collections.abc import Iterable
from typing import Any


def own_stop_ids(model: Any) -> list[int]:
    """Lists the ids at which `generate` ends a text by itself, as the model's generation config says."""
    generation_config = getattr(model, "generation_config", None)
    ids = getattr(generation_config, "eos_token_id", None)
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)


def add_stop_ids(model: Any, ids: Iterable[int]) -> list[int]:
    """Makes generation stop at these ids, too, beside the model's own. Returns those that are new."""
    own = own_stop_ids(model)
    new = [each for each in ids if each not in own]
    if new and getattr(model, "generation_config", None) is not None:
        model.generation_config.eos_token_id = [*own, *new]
        return new
    return []
