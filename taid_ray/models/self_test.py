"""Tests of a model before it is trusted: its logits can be rebuilt from its hidden states and head, and its rows are apart."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from taid_ray.errors import ModelError, shortened
from taid_ray.models.head import Head, computes_one_row, head_of, hidden_states, model_inputs, whole_tensor
from taid_ray.models.isolation import check_probe
from taid_ray.models.probes import (
    PROBE_LENGTH,
    attention_that_runs,
    not_finite,
    of_the_machine,
    probe_inputs,
    probe_of,
    relative_difference,
)

LOGIT_TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""Largest difference of logits, relative to the largest, that are computed of the same hidden states, so that only the last few
operations are rounded."""
LARGE_LOGIT = 256.0
"""Size of the logits, before any change to them, at which a soft cap that was missed shows."""


def tested_head(model: Any, key: str, packed: bool, length: int = PROBE_LENGTH) -> Head:
    """Returns the head of a model that passes `self_test` and `check_probe`.

    Expects a model in eval mode. packed: whether rows will be packed. length: of the longest rows to try. Raises ModelError
    that begins with `key`, the configuration key of the model.
    """
    section = key.partition(".")[0]
    with explained_tests(model, key):
        head = head_of(model)
        one_row = computes_one_row(model)
        with attention_that_runs(model, head.weight.device):
            self_test(model, head, section)
            check_probe(probe_of(model, head, section, one_row), packed, length)
    return head


@contextmanager
def explained_tests(model: Any, key: str, shared: bool = False) -> Iterator[None]:
    """Raises a ModelError that begins with `key`, a model's configuration key, for whatever the model fails with.

    Leaves alone what may be the machine's fault: no memory, a failure of a GPU, or, where a model is `shared` by several
    processes, the loss of another one.
    """
    kinds = (TypeError, ValueError, LookupError, AttributeError, AssertionError, RuntimeError)
    try:
        yield
    except ModelError as error:
        raise ModelError(f"{key}: {error}") from error
    except kinds as error:
        of_tensors = any(word in str(error) for word in ("dtype", "scalar type", "shape", "size of tensor", "DTensor"))
        if of_the_machine(error) or (shared and type(error) is RuntimeError and not of_tensors):
            raise
        found, section, remedy = shortened(error), key.partition(".")[0], "choose another model"
        if "sdpa" in found or "scaled_dot_product" in found:
            remedy = f"set {section}.attention: eager"
        elif "DTensor" in found:  # transformers has split some of it only
            remedy = f"set {section}.shards: 1"
        elif any(word in found for word in ("dtype", "scalar type", "BFloat16", "Half")):
            remedy = f"set {section}.dtype: float32"
        raise ModelError(
            f"{key}: {type(model).__name__} cannot compute input_ids with position_ids ({found}); {remedy}"
        ) from error


@torch.no_grad()
def self_test(model: Any, head: Head, section: str) -> Tensor:
    """Checks that `head` applied to `hidden_states` gives the model's own logits on a fixed probe; returns those.

    Compares them a second time for hidden states so large that a soft cap shows. section: as in `Probe`. Collective for a
    tensor-parallel model. Raises ModelError if the two differ, or if the hidden states are not finite.
    """
    inputs = probe_inputs(head.weight.shape[0], head.weight.device)
    name = type(model).__name__
    if computes_one_row(model) and head.weight.dtype == torch.float32:
        raise ModelError(
            f"flash attention computes in bfloat16 or float16 only (found {name} in float32); set {section}.dtype: bfloat16, "
            f"or {section}.attention: sdpa"
        )
    hidden = hidden_states(model, inputs)
    if not bool(torch.isfinite(hidden).all()):
        raise ModelError(f"the hidden states of {name} are {not_finite(hidden.dtype, section)}")
    inputs = model_inputs(model, inputs)
    own = whole_tensor(model(**inputs, use_cache=False).logits)
    if not bool((own < float("inf")).all()):  # an id that the model excludes has -inf
        raise ModelError(f"the logits of {name} are {not_finite(own.dtype, section)}")
    _compare_logits(head, hidden, own, name)
    factor = _enlargement(head.logits(hidden), hidden)
    if factor > 1:
        with _enlarged(model, factor) as reached:
            enlarged = whole_tensor(model(**inputs, use_cache=False).logits)
        if reached:
            _compare_logits(head, hidden * factor, enlarged, name)
    return own


def _compare_logits(head: Head, hidden: Tensor, own: Tensor, name: str) -> None:
    """Raises ModelError unless the head's logits of `hidden` are a model's `own`."""
    rebuilt, allowed = head.logits(hidden), LOGIT_TOLERANCE[hidden.dtype]
    difference = float("inf")
    if rebuilt.shape == own.shape:
        difference = relative_difference(rebuilt, own)
    if not difference <= allowed:
        raise ModelError(
            f"the logits of {name}, rebuilt from its hidden states and head, differ from its own by {difference:.1e} of "
            f"the largest (allowed {allowed:.0e}), so taid-ray cannot distil this architecture exactly; choose another "
            "model, or report its name"
        )


def _enlargement(logits: Tensor, hidden: Tensor) -> float:
    """A power of two, so that nothing is rounded, that makes logits about LARGE_LOGIT but no hidden state infinite."""
    largest, widest = float(logits.abs().max()), float(hidden.abs().max())
    if not 0 < largest < LARGE_LOGIT:
        return 1.0
    return 2.0 ** math.floor(math.log2(min(LARGE_LOGIT / largest, torch.finfo(hidden.dtype).max / (4 * widest))))


@contextmanager
def _enlarged(model: Any, factor: float) -> Iterator[list[bool]]:
    """Multiplies what the head is applied to, meanwhile. Yields a list that is not empty once that has happened."""
    reached: list[bool] = []

    def enlarge(_: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not arguments:
            return None
        reached.append(True)
        return (arguments[0] * factor, *arguments[1:])

    handle = model.get_output_embeddings().register_forward_pre_hook(enlarge)
    try:
        yield reached
    finally:
        handle.remove()
