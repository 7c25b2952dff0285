"""A causal language model taken apart into body (hidden states) and head, and the tests that this changes nothing."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from taid_ray.errors import ModelError
from taid_ray.losses.projection import LogitTransform

PROBE_ROWS, PROBE_LENGTH = 2, 16
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Largest difference, relative to the largest value, between two ways to compute the same in one precision."""


@dataclass(frozen=True)
class Head:
    """The output projection: logits = transform(hidden @ weight.T + bias)."""

    weight: Tensor
    """[V, H]"""
    bias: Tensor | None
    """[V]"""
    transform: LogitTransform

    def rows(self, stop: int) -> "Head":
        """Returns the head of the first `stop` ids, as views."""
        return replace(self, weight=self.weight[:stop], bias=None if self.bias is None else self.bias[:stop])

    def to(self, device: torch.device) -> "Head":
        """Returns the head on a device."""
        return replace(self, weight=self.weight.to(device), bias=None if self.bias is None else self.bias.to(device))

    def logits(self, hidden: Tensor) -> Tensor:
        """Computes logits [..., V], float32, of hidden states [..., H]; all at once, where training uses the chunked loss."""
        return self.transform(F.linear(hidden, self.weight, self.bias).float())


def hidden_states(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Computes the hidden states [B, T, H] that the head of a causal language model is applied to (after the final norm).

    inputs: [B, T] each. No attention mask is passed: with restarting position_ids and no cache, transformers keeps
    packed documents apart.
    """
    rows, length = inputs["input_ids"].shape
    if _is_flash(model):
        # transformers' flash attention looks for packed documents only in inputs of one row, and would mix them silently
        # in others (its `_is_packed_sequence`). So all rows become one; their position_ids keep them apart.
        inputs = {name: tensor.reshape(1, -1) for name, tensor in inputs.items()}
    hidden: Tensor = model.base_model(**inputs, use_cache=False)[0]
    return hidden.reshape(rows, length, -1)


def _is_flash(model: Any) -> bool:
    return "flash" in (getattr(model.config, "_attn_implementation", None) or "")


def head_of(model: Any) -> Head:
    """Returns the whole head of a causal language model, as detached views where possible.

    Collective for a tensor-parallel model. Raises ModelError for a model without a plain head.
    """
    module = model.get_output_embeddings()
    weight = None if module is None else getattr(module, "weight", None)
    if weight is None or not weight.is_floating_point():
        found = "none" if weight is None else str(weight.dtype)
        raise ModelError(
            f"{type(model).__name__} has no floating-point output projection (found {found}); choose another model, or "
            "leave the head (lm_head) out of the quantization"
        )
    bias = getattr(module, "bias", None)
    return Head(
        _whole(weight), None if bias is None else _whole(bias), _logit_transform(model.config.get_text_config())
    )


def _logit_transform(config: Any) -> LogitTransform:
    """Reads off the config how the architecture changes logits after the projection; `self_test` finds what this misses."""
    scale = 1.0
    for field in ("logit_scale", "lm_head_multiplier"):  # Cohere; Falcon-H1
        scale *= getattr(config, field, None) or 1.0
    scale /= getattr(config, "logits_scaling", None) or 1.0  # Granite
    return LogitTransform(scale=float(scale), softcap=getattr(config, "final_logit_softcapping", None))  # Gemma


def _whole(tensor: Tensor) -> Tensor:
    """Returns a plain tensor; gathers a tensor-parallel one (collective)."""
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach()


def probe_inputs(vocab_rows: int, device: torch.device) -> dict[str, Tensor]:
    """Makes fixed pseudo-random tokens, [PROBE_ROWS, PROBE_LENGTH]."""
    ids = torch.arange(PROBE_ROWS * PROBE_LENGTH, device=device).view(PROBE_ROWS, PROBE_LENGTH) * 7919 % vocab_rows
    return {"input_ids": ids, "position_ids": torch.arange(PROBE_LENGTH, device=device).expand(PROBE_ROWS, -1)}


@torch.no_grad()
def self_test(model: Any, head: Head) -> Tensor:
    """Checks that `head` applied to `hidden_states` gives the model's own logits on a fixed probe; returns those.

    Expects a model in eval mode. Collective for a tensor-parallel model. Raises ModelError if the two differ.
    """
    inputs = probe_inputs(head.weight.shape[0], head.weight.device)
    name = type(model).__name__
    if _is_flash(model) and head.weight.dtype == torch.float32:
        raise ModelError(
            f"flash attention computes in bfloat16 or float16 only (found {name} in float32); set dtype: bfloat16, or "
            "attention: sdpa"
        )
    try:
        hidden = hidden_states(model, inputs)
        own = _whole(model(**inputs, use_cache=False).logits)
    except TypeError as error:
        raise ModelError(f"{name} does not take input_ids with position_ids ({error}); choose another model") from error
    difference = _relative_difference(head.logits(hidden), own)
    if not difference <= TOLERANCE[hidden.dtype]:
        raise ModelError(
            f"the logits of {name}, rebuilt from its hidden states and head, differ from its own by {difference:.1e} of "
            f"the largest (allowed {TOLERANCE[hidden.dtype]:.0e}), so taid-ray cannot distil this architecture exactly; "
            "choose another model, or report its name"
        )
    return own


@torch.no_grad()
def check_packing(model: Any) -> None:
    """Checks that two documents packed into one row (position_ids restart) do not see each other.

    Expects a model in eval mode. Collective for a tensor-parallel model. Raises ModelError if they do.
    """
    table = model.get_input_embeddings().weight
    ids = probe_inputs(table.shape[0], table.device)["input_ids"]  # two rows: some code packs single ones only
    cut = PROBE_LENGTH // 2 - 1
    parts = [ids[:, :cut], ids[:, cut:]]
    positions = [torch.arange(part.shape[1], device=ids.device).expand(PROBE_ROWS, -1) for part in parts]
    packed = hidden_states(model, {"input_ids": ids, "position_ids": torch.cat(positions, 1)})
    alone = [
        hidden_states(model, {"input_ids": part, "position_ids": position})
        for part, position in zip(parts, positions, strict=True)
    ]
    difference = _relative_difference(packed, torch.cat(alone, 1))
    if not difference <= TOLERANCE[packed.dtype]:
        raise ModelError(
            f"{type(model).__name__} lets documents packed into one row see each other (hidden states change by "
            f"{difference:.1e} of the largest, allowed {TOLERANCE[packed.dtype]:.0e}); set data.pack: false"
        )


def tested_head(model: Any, key: str, packed: bool) -> Head:
    """Returns the head of a model that passes `self_test` and, if rows will be packed, `check_packing`.

    Expects a model in eval mode. Raises ModelError that begins with `key`, the configuration key of the model.
    """
    try:
        head = head_of(model)
        with attention_that_runs(model, head.weight.device):
            self_test(model, head)
            if packed:
                check_packing(model)
    except ModelError as error:
        raise ModelError(f"{key}: {error}") from None
    return head


@contextmanager
def attention_that_runs(model: Any, device: torch.device) -> Iterator[None]:
    """Replaces flash attention by sdpa, meanwhile, for a model that is not on a GPU yet."""
    chosen = getattr(model.config, "_attn_implementation", None)
    replaced = _is_flash(model) and device.type == "cpu"
    if replaced:
        model.config._attn_implementation = "sdpa"
    try:
        yield
    finally:
        if replaced:
            model.config._attn_implementation = chosen


def _relative_difference(found: Tensor, expected: Tensor) -> float:
    found, expected = found.float(), expected.float()
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
