"""A model of only some of the teacher's layers: its config, and its weights."""

from typing import Any

from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn

from taid_ray.errors import ConfigError, ModelError, shortened

PER_LAYER = {
    "activation_sparsity_pattern",
    "attention_layers",
    "attn_layers",
    "block_configs",
    "indexer_types",
    "intermediate_size",
    "layer_rope_theta",
    "layer_types",
    "layers_block_type",
    "mlp_layer_types",
    "moe_intermediate_size",
    "moe_topk",
    "no_rope_layers",
    "num_attention_heads_per_layer",
    "num_experts",
    "num_shared_expert",
    "swiglu_limits",
    "swiglu_limits_shared",
}
"""Fields of transformers configs that hold, where they are lists, one entry per layer."""
NUMBERING = {
    "attn_layer_indices",
    "cross_attention_layers",
    "full_attn_idxs",
    "hybrid_layer_ids",
    "kv_source_layers",
    "mlp_only_layers",
    "moe_layers",
}
"""Fields of transformers configs that list layers by their numbers."""


def keep_layers(model_config: Any, layers: list[int]) -> None:
    """Cuts the depth, and every per-layer list, of a transformers (text) config down to `layers`, in place.

    Raises ConfigError for a layer that is not there, ModelError if the config cannot describe these layers alone.
    """
    depth = getattr(model_config, "num_hidden_layers", None)
    if depth is None:
        raise _not_cuttable(model_config, "it names no num_hidden_layers")
    wrong = [layer for layer in layers if layer >= depth]
    if wrong:
        raise ConfigError(f"student.layers: the teacher has layers 0 to {depth - 1} (found {wrong}); leave those out")
    if layers == list(range(depth)):
        return
    if getattr(model_config, "is_heterogeneous", False):
        raise _not_cuttable(model_config, "its per_layer_config is by number of layer")
    changed = {"num_hidden_layers": len(layers)} | _cut_lists(model_config, layers, depth)
    try:
        for key, value in changed.items():
            setattr(model_config, key, value)
        # as RUN/model/config.json will be read
        again = type(model_config).from_dict(model_config.to_dict())
        lost = [key for key, value in changed.items() if getattr(again, key) != value]
    except (TypeError, ValueError, LookupError, RuntimeError, StrictDataclassError) as error:
        raise _not_cuttable(model_config, shortened(str(error))) from None
    if lost:
        raise _not_cuttable(model_config, f"its {lost[0]} is derived from other fields")


def _cut_lists(model_config: Any, layers: list[int], depth: int) -> dict[str, Any]:
    """The lists of a config that are about its layers, cut down to `layers`. Raises ModelError for one that is not known."""
    changed: dict[str, Any] = {}
    for key, value in vars(model_config).items():
        if not isinstance(value, list | tuple) or not value or key.startswith("_"):
            continue
        if "token" in key or key in ("architectures", "bad_words_ids"):
            continue
        if key in NUMBERING or (len(value) < depth and _may_number(key, list(value), depth)):
            if list(value) != list(range(depth)):
                raise _not_cuttable(model_config, f"its {key} numbers layers ({list(value)})")
            changed[key] = type(value)(range(len(layers)))
        elif len(value) == depth and key in PER_LAYER:
            changed[key] = type(value)(value[layer] for layer in layers)
        elif len(value) == depth:
            raise _not_cuttable(
                model_config, f"its {key} has as many entries as there are layers, and may be about them"
            )
    return changed


def _may_number(key: str, value: list[Any], depth: int) -> bool:
    """Tests whether a list of a config is called, and looks, like one of numbers of layers."""
    named = "layer" in key or key.endswith(("idxs", "indices", "indexes"))
    return named and all(type(x) is int and 0 <= x < depth for x in value) and value == sorted(set(value))


def _not_cuttable(model_config: Any, why: str) -> ModelError:
    return ModelError(
        f"teacher.model: {type(model_config).__name__} cannot describe a model of only some of the teacher's layers: "
        f"{why}; set student.init to pretrained or scratch"
    )


def kept_state(teacher: Any, student: Any, layers: list[int]) -> dict[str, Tensor]:
    """Picks the teacher's state with its `layers` only, numbered anew. Raises ModelError unless it fits the student."""
    stack, state = _layer_stack(teacher), teacher.state_dict()
    kept = {name: tensor for name, tensor in state.items() if not name.startswith(f"{stack}.")}
    for new, old in enumerate(layers):
        prefix = f"{stack}.{old}."
        kept |= {f"{stack}.{new}.{name[len(prefix) :]}": state[name] for name in state if name.startswith(prefix)}
    have, need = ({(name, tensor.shape) for name, tensor in each.items()} for each in (kept, student.state_dict()))
    if have != need:
        names = sorted({name for name, _ in have ^ need})
        raise ModelError(
            f"student.layers: {layers} gives no {type(student).__name__}, whose layers differ by their place "
            f"({len(names)} parameters do not fit, for example {names[0]}); choose other layers, or set student.init to "
            "pretrained or scratch"
        )
    return kept


def _layer_stack(model: Any) -> str:
    """Finds the name of the ModuleList that holds the decoder layers. Raises ModelError if there is none."""
    depth = model.config.get_text_config().num_hidden_layers
    decoder = set(model.get_decoder().modules())  # an image encoder may be as deep
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth and module in decoder:
            return name
    raise ModelError(
        f"teacher.model: {type(model).__name__} keeps its {depth} layers in no single list, so student.init: cut cannot "
        "take some of them; set student.init to pretrained or scratch"
    )
