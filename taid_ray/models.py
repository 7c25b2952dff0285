"""Loading Hugging Face causal language models, and taking them apart into body (hidden states) and head."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from taid_ray.chunked import LogitTransform
from taid_ray.errors import ModelError

PROBE_ROWS, PROBE_LENGTH = 2, 16
# Largest difference, relative to the largest value, between two ways to compute the same in one precision.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class Head:
    """The output projection: logits = transform(hidden @ weight.T + bias)."""

    weight: Tensor
    """[V, H]"""
    bias: Tensor | None
    """[V]"""
    transform: LogitTransform

    def rows(self, stop: int) -> "Head":
        """The first `stop` rows, as views."""
        return replace(self, weight=self.weight[:stop], bias=None if self.bias is None else self.bias[:stop])

    def to(self, device: torch.device) -> "Head":
        return replace(self, weight=self.weight.to(device), bias=None if self.bias is None else self.bias.to(device))

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., H] -> [..., V], float32. Forms all logits at once; training uses the chunked loss instead."""
        return self.transform(F.linear(hidden, self.weight, self.bias).float())


def load_model_config(name: str, revision: str | None = None, trust_remote_code: bool = False, *, key: str) -> Any:
    """The transformers config of a model. `key` is the configuration key that named it, for error messages.

    Raises ModelError if there is no such model.
    """
    from transformers import AutoConfig

    with _explained(key, name):
        return AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)


def load_tokenizer(
    name: str, revision: str | None = None, trust_remote_code: bool = False, *, key: str = "teacher.model"
) -> Any:
    """The tokenizer of a model. Raises ModelError if there is none."""
    from transformers import AutoTokenizer

    with _explained(key, name):
        return AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)


def load_causal_lm(
    name: str,
    revision: str | None = None,
    dtype: str = "auto",
    attention: str = "sdpa",
    trust_remote_code: bool = False,
    quantization: dict[str, Any] | None = None,
    shards: int = 1,
    device: torch.device | None = None,
    *,
    key: str = "teacher.model",
) -> Any:
    """A causal language model in eval mode, on CPU unless `device` says otherwise.

    shards > 1: this process's part of a tensor-parallel model; all `shards` processes of an initialised process group
    must call it together. Raises ModelError if there is no such model, its architecture or a setting is not supported,
    or the checkpoint lacks weights.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # taid-ray reports progress itself, and actors' bars would mix with it
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": attention}
    if quantization:
        options["quantization_config"] = quantization
    if shards > 1:
        from transformers.distributed import DistributedConfig

        _check_divisible(load_model_config(name, revision, trust_remote_code, key=key), shards, key)
        options["distributed_config"] = DistributedConfig(tp_size=shards, tp_plan="auto")
    elif device is not None and (device.type != "cpu" or quantization):
        options["device_map"] = {"": device}
    with _explained(key, name):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            name, revision=revision, trust_remote_code=trust_remote_code, output_loading_info=True, **options
        )
    model, loading = loaded
    if loading["missing_keys"] or loading["mismatched_keys"]:
        absent = sorted(str(k) for k in [*loading["missing_keys"], *loading["mismatched_keys"]])
        raise ModelError(
            f"{key} = {name}: the checkpoint has no weights that fit {len(absent)} parameters of "
            f"{type(model).__name__} ({', '.join(absent[:3])} ...); name a complete causal language model"
        )
    return model.eval()


def _check_divisible(config: Any, shards: int, key: str) -> None:
    text = config.get_text_config()
    for field in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(text, field, None) or shards
        if heads % shards:
            raise ModelError(
                f"{_section(key)}.shards = {shards} does not divide the model's {field} = {heads}; "
                "choose a number that does"
            )


@contextmanager
def _explained(key: str, name: str) -> Iterator[None]:
    """Turns whatever transformers raises while loading `name` into one ModelError that names the key."""
    path = Path(name).expanduser()
    looks_local = name.startswith(("/", ".", "~")) or name.count("/") > 1
    if looks_local and not path.is_dir():
        raise ModelError(f"{key}: no such directory (found {name!r}). Give a model directory or a hub name.")
    if path.is_dir() and not (path / "config.json").is_file():
        raise ModelError(f"{key}: {name} has no config.json. Give the directory of a Hugging Face model.")
    try:
        yield
    except Exception as error:  # transformers and what it calls raise many types here; all mean "cannot be loaded"
        raise ModelError(f"{key} = {name} cannot be loaded. {_remedy(_section(key), error)}") from error


def _section(key: str) -> str:
    return key.rpartition(".")[0] or key


def _remedy(section: str, error: Exception) -> str:
    text = " ".join(str(error).split())
    shown = f"({type(error).__name__}: {text[:300]})"
    lower = text.lower()
    if isinstance(error, OSError):
        return f"Give an existing model directory, or a hub name this machine can reach or has in its cache. {shown}"
    if isinstance(error, ImportError):
        return f"A package is missing. {shown}"
    if "trust_remote_code" in lower:
        return f"If you trust its authors, set {section}.trust_remote_code: true. {shown}"
    if "tensor parallel" in lower or "tp_plan" in lower or "parallel plan" in lower:
        return f"This architecture cannot be split in transformers; set {section}.shards: 1. {shown}"
    if "sdpa" in lower or "scaled_dot_product" in lower:
        return f"Set {section}.attention: eager. {shown}"
    if "unrecognized configuration class" in lower or "does not recognize this architecture" in lower:
        return f"It is no causal language model that the installed transformers knows. {shown}"
    return shown


def hidden_states(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """[B, T, H]: what the head of a causal language model is applied to (after the final norm).

    No attention mask is passed: with restarting position_ids and no cache, transformers keeps packed documents apart.
    """
    return model.base_model(**inputs, use_cache=False)[0]


def head_of(model: Any) -> Head:
    """The whole head of a causal language model, as detached views where possible.

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
    """How the architecture changes logits after the projection; `self_test` finds out if this misses anything."""
    scale = 1.0
    for field in ("logit_scale", "lm_head_multiplier"):  # Cohere; Falcon-H1
        scale *= getattr(config, field, None) or 1.0
    scale /= getattr(config, "logits_scaling", None) or 1.0  # Granite
    return LogitTransform(scale=float(scale), softcap=getattr(config, "final_logit_softcapping", None))  # Gemma


def _whole(tensor: Tensor) -> Tensor:
    """A plain tensor; gathers a tensor-parallel one (collective)."""
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach()


def probe_inputs(vocab_rows: int, device: torch.device) -> dict[str, Tensor]:
    """Fixed pseudo-random tokens, [PROBE_ROWS, PROBE_LENGTH]."""
    ids = torch.arange(PROBE_ROWS * PROBE_LENGTH, device=device).view(PROBE_ROWS, PROBE_LENGTH) * 7919 % vocab_rows
    return {"input_ids": ids, "position_ids": torch.arange(PROBE_LENGTH, device=device).expand(PROBE_ROWS, -1)}


@torch.no_grad()
def self_test(model: Any, head: Head) -> Tensor:
    """Checks that `head` applied to `hidden_states` gives the model's own logits on a fixed probe; returns those.

    Expects a model in eval mode. Collective for a tensor-parallel model. Raises ModelError if the two differ.
    """
    inputs = probe_inputs(head.weight.shape[0], head.weight.device)
    name = type(model).__name__
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
    ids = probe_inputs(table.shape[0], table.device)["input_ids"][:1]
    cut = PROBE_LENGTH // 2 - 1
    parts = [ids[:, :cut], ids[:, cut:]]
    positions = [torch.arange(part.shape[1], device=ids.device)[None] for part in parts]
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


def _relative_difference(found: Tensor, expected: Tensor) -> float:
    found, expected = found.float(), expected.float()
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
