"""The tokens at which a model stops generating."""

from types import SimpleNamespace
from typing import Any

import pytest
from transformers import GenerationConfig

from taid_ray.models.stopping import add_stop_ids, own_stop_ids


@pytest.mark.parametrize(
    ("own", "added", "new", "after"),
    [
        (0, [2], [2], [0, 2]),
        ([5, 3], [3, 7], [7], [5, 3, 7]),
        (None, [2], [2], [2]),
        (2, [2], [], 2),
        (None, [], [], None),
    ],
)
def test_what_ends_trained_turns_joins_the_models_own(own: Any, added: list[int], new: list[int], after: Any) -> None:
    model = SimpleNamespace(generation_config=GenerationConfig(eos_token_id=own))
    assert add_stop_ids(model, added) == new
    assert model.generation_config.eos_token_id == after
    assert set(own_stop_ids(model)) >= {*added}


def test_a_model_that_does_not_generate() -> None:
    assert add_stop_ids(SimpleNamespace(generation_config=None), [2]) == []
