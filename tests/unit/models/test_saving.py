"""The saved student: whole and exact for architectures out of the ordinary, and what cannot be saved is refused at the start."""

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

from taid_ray.config.schema import DistillConfig
from taid_ray.errors import ModelError
from taid_ray.models.adapters import add_lora, idle_adapters
from taid_ray.models.precision import train_as_reloaded
from taid_ray.models.saving import (
    check_architecture,
    check_saving,
    dtypes_when_reloaded,
    save_model,
    saved_tensors,
    without_idle_values,
)
from tests.support.students import config_for

SIZES: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 4, "max_position_embeddings": 64, "initializer_range": 0.3,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
MIXTURE: dict[str, Any] = SIZES | {"moe_intermediate_size": 16, "num_experts_per_tok": 2}


def deepseek() -> Any:
    """The router's bias is a buffer that the architecture keeps in float32."""
    return hf.DeepseekV3ForCausalLM(
        hf.DeepseekV3Config(
            **MIXTURE,
            n_routed_experts=4,
            n_shared_experts=1,
            n_group=1,
            topk_group=1,
            first_k_dense_replace=1,
            q_lora_rank=8,
            kv_lora_rank=8,
            qk_rope_head_dim=4,
            qk_nope_head_dim=4,
            v_head_dim=8,
        )
    )


def ernie() -> Any:
    """The router's weight is a trained parameter, its bias a frozen one; both are kept in float32."""
    return hf.Ernie4_5_MoeForCausalLM(hf.Ernie4_5_MoeConfig(
        **MIXTURE, moe_num_experts=4, moe_num_shared_experts=1, moe_layer_start_index=1, moe_k=2,
    ))  # fmt: skip


def minimax_m2() -> Any:
    """The router's bias is a buffer of which the architecture says nothing: a reload has it in bfloat16."""
    return hf.MiniMaxM2ForCausalLM(hf.MiniMaxM2Config(**SIZES, num_local_experts=4, num_experts_per_tok=2, head_dim=8))


def zamba2() -> Any:
    """Layers share their weights."""
    return hf.Zamba2ForCausalLM(
        hf.Zamba2Config(
            **SIZES,
            mamba_d_state=8,
            mamba_ngroups=1,
            n_mamba_heads=8,
            chunk_size=8,
            layers_block_type=["mamba", "hybrid", "mamba", "hybrid"],
            num_mem_blocks=1,
            use_mem_rope=False,
        )
    )


def perturbed(model: Any) -> Any:
    """Gives every weight, and every bias of a router, a value that bfloat16 has not."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for _, tensor in (*model.named_parameters(), *model.named_buffers()):
            if tensor.is_floating_point() and (isinstance(tensor, nn.Parameter) or not tensor.any()):
                tensor.data += 0.1 * torch.randn(tensor.shape)
    return model.eval()


def config(tmp_path: Path, **student: Any) -> DistillConfig:
    return config_for({"init": "pretrained", "model": str(tmp_path)} | student)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(40).view(2, 20), use_cache=False).logits.float()


def as_deepspeed_casts(model: Any) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("build", [deepseek, ernie, minimax_m2, zamba2])
def test_a_reload_computes_what_training_did(build: Any, dtype: str, tmp_path: Path) -> None:
    chosen, model = config(tmp_path, dtype=dtype), perturbed(build())
    if dtype == "bfloat16":
        train_as_reloaded(model, dtypes_when_reloaded(chosen, model))
        as_deepspeed_casts(model)
    trained = logits(model)
    check_saving(chosen, model, model)
    save_model(chosen, model, {name: tensor.detach() for name, tensor in saved_tensors(model).items()}, tmp_path)
    loaded, found = hf.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=getattr(torch, dtype), output_loading_info=True
    )
    assert not found["missing_keys"] and not found["unexpected_keys"]
    assert torch.equal(logits(loaded.eval()), trained)


def test_gradients_flow_through_float32_copies(tmp_path: Path) -> None:
    model = perturbed(ernie())
    train_as_reloaded(model, dtypes_when_reloaded(config(tmp_path, dtype="bfloat16"), model))
    as_deepspeed_casts(model)
    model(input_ids=torch.arange(20)[None], labels=torch.arange(20)[None]).loss.backward()
    router = model.get_submodule("model.layers.2.mlp.gate")
    assert router.weight.dtype == torch.float32
    weight = dict(model.named_parameters())["model.layers.2.mlp.gate.weight"]
    assert weight.dtype == torch.bfloat16 and weight.grad is not None and weight.grad.abs().max() > 0


def test_files_of_the_model_have_the_permissions_of_the_umask(tmp_path: Path) -> None:
    model = deepseek()
    before = os.umask(0o027)
    try:
        save_model(config(tmp_path), model, dict(saved_tensors(model)), tmp_path / "model")
    finally:
        os.umask(before)
    found = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "model").iterdir()}
    assert set(found) == {"config.json", "generation_config.json", "model.safetensors"}
    assert set(found.values()) == {0o640}


def test_a_file_in_the_way_is_an_error(tmp_path: Path) -> None:
    model = deepseek()
    (tmp_path / "model").touch()
    with pytest.raises(FileExistsError):  # transformers logs it, and returns
        save_model(config(tmp_path), model, dict(saved_tensors(model)), tmp_path / "model")


def test_a_model_that_no_config_describes_is_refused_at_the_start(tmp_path: Path) -> None:
    """The text part of some multi-modal models is a class of its own that the Auto classes cannot build."""
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES))
    model.config = hf.CLIPTextConfig()
    with pytest.raises(ModelError, match="LlamaForCausalLM, cannot be saved as a Hugging Face model"):
        check_saving(config(tmp_path), model, model)


def test_a_tensor_that_the_architecture_does_not_know_is_refused_at_the_start(tmp_path: Path) -> None:
    model = deepseek()
    model.model.register_buffer("steps_seen", torch.zeros(1))
    with pytest.raises(ModelError, match="steps_seen"):
        check_saving(config(tmp_path), model, model)


def test_a_generation_config_that_cannot_be_saved_is_refused_at_the_start(tmp_path: Path) -> None:
    model = deepseek()
    model.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"num_return_sequences": 4, "eos_token_id": 2}')
    with pytest.raises(
        ModelError, match=r"its generation_config\.json is not valid .*num_return_sequences.*; correct it"
    ):
        check_architecture(config(tmp_path), model.config)
    model.generation_config.num_return_sequences = 4
    with pytest.raises(
        ModelError, match=r"generation_config\.json can be loaded, but not saved .*num_return_sequences"
    ):
        check_saving(config(tmp_path), model, model)


def test_what_generation_ignores_is_not_saved(tmp_path: Path) -> None:
    model = deepseek()
    model.save_pretrained(tmp_path)
    idle = {"temperature": 0.6, "top_h": 0.3, "length_penalty": 2.0, "early_stopping": True, "pad_token_id": -1}
    (tmp_path / "generation_config.json").write_text(json.dumps(idle | {"max_new_tokens": 7}))
    check_architecture(config(tmp_path), model.config)
    model.generation_config = hf.GenerationConfig.from_pretrained(tmp_path)
    save_model(config(tmp_path), model, dict(saved_tensors(model)), tmp_path / "saved")
    found = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert found["max_new_tokens"] == 7 and not found.keys() & idle.keys()
    sampled = without_idle_values(hf.GenerationConfig(do_sample=True, temperature=0.6, num_beams=2, length_penalty=2.0))
    assert (sampled.temperature, sampled.length_penalty) == (0.6, 2.0)


def test_a_head_that_stays_in_float32_is_refused_beside_bfloat16(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hf.LlamaForCausalLM, "_keep_in_fp32_modules_strict", ["lm_head"])
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES))
    model.save_pretrained(tmp_path)
    check_architecture(config(tmp_path), model.config)
    with pytest.raises(ModelError, match=r"^student\.dtype: LlamaForCausalLM keeps its output projection in float32"):
        check_architecture(config(tmp_path, dtype="bfloat16"), model.config)


def lora(tmp_path: Path, targets: Any) -> Any:
    found = config(tmp_path, lora={"rank": 2, "target_modules": targets}).student.lora
    assert found is not None
    return found


def test_an_adapter_on_layers_that_share_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"which this student ties to .*q_proj.*leave q_proj out"):
        add_lora(zamba2(), lora(tmp_path, ["q_proj"]), 0)


def test_adapters_that_the_model_computes_past_are_named(tmp_path: Path) -> None:
    """Jamba multiplies with a layer's weight itself, where an adapter is not seen: it would stay untrained in silence."""
    sizes = {"mamba_d_state": 8, "mamba_dt_rank": 8, "num_experts": 1, "attn_layer_period": 2, "attn_layer_offset": 1}
    jamba = hf.JambaForCausalLM(hf.JambaConfig(**SIZES, **sizes, use_mamba_kernels=False)).eval()
    add_lora(jamba, lora(tmp_path, ["q_proj", "dt_proj"]), 0)
    assert idle_adapters(jamba) == [f"model.layers.{layer}.mamba.dt_proj" for layer in (0, 2)]


def test_adapters_that_the_model_does_not_compute_with_are_refused(tmp_path: Path) -> None:
    """peft takes any linear layer, and some return more than a tensor: Phi-MoE's router, for example."""
    model = hf.PhimoeForCausalLM(hf.PhimoeConfig(**SIZES, num_local_experts=4)).eval()
    add_lora(model, lora(tmp_path, "all-linear"), 0)
    with pytest.raises(ModelError, match=r"^student\.lora\.target_modules: PhimoeForCausalLM does not compute with"):
        idle_adapters(model)
