"""Weight decay by the role of a parameter, where its number of dimensions says something else."""

from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

from taid_ray.student.decay import decay_groups

SIZES: dict[str, Any] = {
    "vocab_size": 16, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2,
}  # fmt: skip
MODELS: dict[str, Any] = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES)),
    "qwen2_moe": lambda: hf.Qwen2MoeForCausalLM(
        hf.Qwen2MoeConfig(**SIZES, num_experts=2, moe_intermediate_size=8, shared_expert_intermediate_size=8)
    ),
    "gpt_oss": lambda: hf.GptOssForCausalLM(hf.GptOssConfig(**SIZES, head_dim=4, num_local_experts=2)),
    "cohere": lambda: hf.CohereForCausalLM(hf.CohereConfig(**SIZES, use_qk_norm=True, pad_token_id=0)),
    "mamba": lambda: hf.MambaForCausalLM(hf.MambaConfig(vocab_size=16, hidden_size=8, num_hidden_layers=1)),
    "rwkv": lambda: hf.RwkvForCausalLM(
        hf.RwkvConfig(vocab_size=16, hidden_size=8, attention_hidden_size=8, num_hidden_layers=1, intermediate_size=8)
    ),
}
NOT_MATRICES = {
    "llama": set(),
    "qwen2_moe": set(),
    "gpt_oss": {"mlp.experts.gate_up_proj_bias", "mlp.experts.down_proj_bias"},
    "cohere": {"self_attn.q_norm.weight", "self_attn.k_norm.weight"},
    "mamba": {"mixer.A_log"},
    "rwkv": {
        *(f"attention.time_mix_{part}" for part in ("key", "value", "receptance")),
        *(f"feed_forward.time_mix_{part}" for part in ("key", "receptance")),
    },
}
"""Parameters of a layer that do not decay though they have two dimensions or more."""


def decaying(model: nn.Module) -> set[str]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = decay_groups(model, 0.1)
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert sorted(id(p) for group in groups for p in group["params"]) == sorted(names)
    return {names[id(parameter)] for parameter in groups[0]["params"]}


@pytest.mark.parametrize("name", MODELS)
def test_matrices_decay(name: str) -> None:
    with torch.device("meta"):
        model = MODELS[name]()
    matrices = {found for found, parameter in model.named_parameters() if parameter.dim() >= 2}
    spared = {".".join(found.split(".")[3:]) for found in matrices - decaying(model)}
    assert spared == NOT_MATRICES[name]


def test_what_its_author_marked_does_not_decay() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    model[0].weight._no_weight_decay = True  # type: ignore[assignment]
    assert decaying(model) == {"1.weight"}


def test_the_order_within_the_groups_is_that_of_the_parameters() -> None:
    """It decides in which order ZeRO lays them out, and so the bits of sums over them."""
    with torch.device("meta"):
        model = MODELS["llama"]()
    matrices, vectors = decay_groups(model, 0.1)
    assert [id(p) for p in matrices["params"]] == [id(p) for p in model.parameters() if p.dim() >= 2]
    assert [id(p) for p in vectors["params"]] == [id(p) for p in model.parameters() if p.dim() < 2]
