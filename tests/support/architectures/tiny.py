"""A tiny random model of any architecture that transformers has as a causal language model."""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from tests.support.architectures.fields import DEPTH, LOGITS, OTHERS, SIZES, VARIANTS, VOCAB

PAD, BOS, EOS, UNK = range(4)
MAX_PARAMETERS = 3_000_000
"""A model with more has a field that is not in the tables of sizes."""


def names() -> list[str]:
    """Lists all architectures (by model_type) and variants, those that cannot be built included."""
    return sorted([*_classes(), *VARIANTS])


def tiny_config(name: str) -> Any:
    """Makes the config of a tiny model, without dropout, whose token ids are those of `tokenizer`.

    Raises whatever the config's class raises.
    """
    model_type, others = VARIANTS.get(name, (name, {}))
    config_class = _classes()[model_type]
    return config_class(**(_fields(config_class, _default(config_class)) | others))


def _classes() -> dict[str, Any]:
    """Finds the config class of every causal language model, by its model_type."""
    return {config_class.model_type: config_class for config_class in MODEL_FOR_CAUSAL_LM_MAPPING}


def _default(config_class: Any) -> Any:
    """Makes the config of a class's own default values; None if these contradict each other."""
    try:
        return config_class()
    except (ValueError, StrictDataclassError):
        return None


def _fields(config_class: Any, default: Any) -> dict[str, Any]:
    """Chooses the arguments of a tiny config of a class, whose default config is `default`."""
    keys = [field.name for field in dataclasses.fields(config_class)]
    known = {} if default is None else vars(default)
    values = {key: SIZES[key] for key in (*keys, *config_class.attribute_map) if key in SIZES}
    if "kv_lora_rank" in keys:
        values["num_key_value_heads"] = values["num_attention_heads"]
    for key in keys:
        if key in LOGITS and known.get(key) is None:
            values.pop(key, None)  # not every class that has the field uses it
        elif isinstance(known.get(key), float) and ("drop" in key or "jitter" in key):
            values[key] = 0.0
        elif key.endswith("token_id") and isinstance(known.get(key), int | list):
            token = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}.get(key, UNK)
            values[key] = [token] if isinstance(known[key], list) else token
    kinds = list(dict.fromkeys(known.get("layer_types") or []))
    if "layer_types" in keys and len(kinds) > 1:  # all kinds, though there are few layers
        values["layer_types"] = (kinds * DEPTH)[:DEPTH]
    for key, part_class in config_class.sub_configs.items():
        part = known.get(key)
        if part is not None or part_class is not AutoConfig:
            values[key] = _fields(part_class if part is None else type(part), part or _default(part_class))
            if part_class is AutoConfig:
                values[key]["model_type"] = part.model_type
    return values | OTHERS.get(config_class.model_type, {})


def build(model_config: Any, seed: int) -> Any:
    """Builds a model whose weights are large enough for every part of it to matter. Raises whatever transformers raises."""
    with torch.device("meta"):
        count = AutoModelForCausalLM.from_config(copy.deepcopy(model_config)).num_parameters()
    if count > MAX_PARAMETERS:
        raise ValueError(f"{type(model_config).__name__}: not tiny, it has {count} parameters")
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(copy.deepcopy(model_config), dtype=torch.float32)
        for parameter in model.parameters():
            parameter += _spread(parameter) * torch.randn(parameter.shape)
    return model.eval()


def _spread(parameter: nn.Parameter) -> float:
    """The standard deviation of what is added to a parameter."""
    if parameter.dim() < 2:
        return 0.1
    return (2.0 if len(parameter) == VOCAB else 0.7) * float(parameter.shape[-1]) ** -0.5


def tokenizer() -> PreTrainedTokenizerFast:
    """Makes a tokenizer with a token per byte, which no class of tokenizers changes when it loads it as its own."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = {"<pad>": PAD, "<s>": BOS, "</s>": EOS, "<unk>": UNK}
    vocabulary = special | {letter: len(special) + at for at, letter in enumerate(alphabet)}
    bytes_only = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=bytes_only, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def save(model: Any, model_config: Any, directory: Path) -> None:
    """Saves a model, its whole config, and the tokenizer."""
    model.save_pretrained(directory)
    # The model may know its text part only, by which it could not be loaded.
    whole = copy.deepcopy(model_config)
    whole.architectures = [type(model).__name__]
    whole.save_pretrained(directory)
    tokenizer().save_pretrained(directory)
