"""A causal language model taken apart into body (hidden states) and head; `self_test` tests that this changes nothing."""

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from taid_ray.errors import ModelError
from taid_ray.losses.projection import LogitTransform
from taid_ray.media.families import FAMILIES

MULTIPLIERS = ("logit_scale", "lm_head_multiplier", "output_multiplier")  # Cohere; Falcon-H1; Muse
"""Fields of transformers configs that logits are multiplied by."""
DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")  # Granite and MiniCPM3; Inkling
"""Fields of transformers configs that logits are divided by. HyperCLOVA X multiplies by its logits_scaling."""
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")  # Gemma; RecurrentGemma; xLSTM
"""Fields of transformers configs that hold the soft cap of the logits."""


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


def body_of(model: Any) -> Any:
    """The part of a causal language model that computes the hidden states: everything but the head.

    Raises ModelError if transformers does not say which part that is.
    """
    if model.base_model is not model:
        return model.base_model
    from transformers import PreTrainedModel

    bodies = [
        part for part in model.children() if isinstance(part, PreTrainedModel)
    ]  # Llama 4 keeps it under another name
    if len(bodies) != 1:
        raise ModelError(f"{type(model).__name__} keeps its decoder in no part of its own; choose another model")
    return bodies[0]


def hidden_states(model: Any, inputs: dict[str, Tensor], one_row: bool | None = None) -> Tensor:
    """Computes the hidden states [B, T, H] that the head of a causal language model is applied to (after the final norm).

    inputs: input_ids [B, T], position_ids, see `model_inputs`, and what the model takes for images, if there are any. No
    attention mask is passed: with restarting position_ids and no cache, transformers keeps packed documents apart. one_row: the
    rows are computed as one long row; by default as the model's attention needs it.
    """
    rows, length = inputs["input_ids"].shape
    inputs = model_inputs(model, inputs)
    if computes_one_row(model) if one_row is None else one_row:
        positions = inputs["position_ids"]
        shape = (1, -1) if positions.dim() == 2 else (len(positions), 1, -1)
        inputs |= {"input_ids": inputs["input_ids"].reshape(1, -1), "position_ids": positions.reshape(shape)}
    hidden: Tensor = body_of(model)(**inputs, use_cache=False)[0]
    # Mamba's residual stream is float32 in any dtype; its own forward converts what it hands to the head.
    head = model.get_output_embeddings().weight
    return hidden.reshape(rows, length, -1).to(head.dtype if head.is_floating_point() else hidden.dtype)


def model_inputs(model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gives positions [B, T] of text the form that the model wants: [4, B, T] where its positions have three coordinates.

    Such a model takes [B, T] as well, and lets documents of a packed row see each other then.
    """
    family = FAMILIES.get(model.config.model_type)
    if family is None or not family.mrope or inputs["position_ids"].dim() == 3:
        return dict(inputs)
    return inputs | {"position_ids": inputs["position_ids"].expand(4, -1, -1)}


def computes_one_row(model: Any) -> bool:
    """Tells whether `hidden_states` joins all rows of a batch into one, where their position_ids keep them apart.

    It does so for transformers' flash attention, which looks for packed documents only in inputs of one row (its
    `_is_packed_sequence`), and would mix them silently in others.
    """
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
    config = model.config.get_text_config()
    head = Head(whole_tensor(weight), None if bias is None else whole_tensor(bias), _logit_transform(config))
    return head.rows(getattr(config, "unpadded_vocab_size", None) or len(head.weight))  # Inkling


def _logit_transform(config: Any) -> LogitTransform:
    """Reads off the config how the architecture changes logits after the projection; `self_test` finds what is missed."""
    inverse = config.model_type == "hyperclovax"
    scale = 1.0
    multipliers = () if config.model_type == "mpt" else MULTIPLIERS  # transformers' MPT makes no use of its logit_scale
    for value in _numbers(config, multipliers + (DIVISORS if inverse else ())):
        scale *= value
    for value in _numbers(config, () if inverse else DIVISORS):
        scale /= value
    return LogitTransform(scale=float(scale), softcap=next(iter(_numbers(config, SOFTCAPS)), None))


def _numbers(config: Any, fields: tuple[str, ...]) -> list[float]:
    """The values of these fields of a config that are numbers other than 0."""
    values = [getattr(config, field, None) for field in fields]
    return [value for value in values if isinstance(value, int | float) and value]


def whole_tensor(tensor: Tensor) -> Tensor:
    """Returns a plain tensor; gathers a tensor-parallel one (collective)."""
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach()
