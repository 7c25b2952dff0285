"""What is tested before a model is trusted: no position sees what it must not see, and no change to its logits is missed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from taid_ray.config.models import StudentConfig, TeacherConfig
from taid_ray.config.schema import DistillConfig, build_config
from taid_ray.data.batch import NO_LABEL, Row, collate
from taid_ray.errors import ConfigError, ModelError, TeacherError
from taid_ray.losses.projection import LogitTransform
from taid_ray.models import self_test
from taid_ray.models.head import Head, head_of, hidden_states
from taid_ray.models.isolation import check_neighbours, check_rows
from taid_ray.models.lengths import check_lengths, context_length
from taid_ray.models.loading import check_attention, check_divisible, load_causal_lm
from taid_ray.models.probes import probe_of
from taid_ray.models.student_init import check_student
from taid_ray.teacher.local import LocalTeacher
from tests.support.students import TIED, config_for

VOCAB = 61
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256, "pad_token_id": None, "bos_token_id": None,
    "eos_token_id": None, "initializer_range": 0.3,
}  # fmt: skip
EXPERTS: dict[str, Any] = {
    "num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
}  # fmt: skip
LONGROPE: dict[str, Any] = {
    "rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 32,
    "short_factor": [1.0] * 4, "long_factor": [1.0, 4.0, 16.0, 32.0],
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "mixtral": ("mixtral", EXPERTS),
    "llama4": ("llama4_text", {"intermediate_size_mlp": 40, "num_local_experts": 2, "attention_chunk_size": 8}),
    "lfm2": ("lfm2", {"layer_types": ["conv", "full_attention"]}),
    "qwen3_next": (
        "qwen3_next",
        EXPERTS
        | {
            "layer_types": ["linear_attention", "full_attention"], "shared_expert_intermediate_size": 16,
            "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
        },
    ),
    "bidirectional": ("gemma3_text", {"use_bidirectional_attention": True}),
    "encoder": ("bert", {"is_decoder": False}),
    "longrope": ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 32}),
    "phimoe": ("phimoe", EXPERTS | {"rope_parameters": LONGROPE | {"short_mscale": 1.0, "long_mscale": 1.5}}),
    "dynamic": (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "factor": 8.0, "rope_theta": 1e4}, "max_position_embeddings": 32},
    ),
    "recurrent_gemma": ("recurrent_gemma", {"num_hidden_layers": 3, "num_key_value_heads": 1, "lru_width": 32}),
    "hyperclovax": ("hyperclovax", {"logits_scaling": 3.0}),
    "minicpm3": (
        "minicpm3",
        {
            "dim_model_base": 8, "num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8,
            "v_head_dim": 8, "qk_nope_head_dim": 8, "head_dim": None,
        },
    ),
    "mamba": ("mamba", {"state_size": 4}),
}  # fmt: skip
BOTH = [torch.float32, torch.bfloat16]


def model_config(name: str, **changes: Any) -> Any:
    from transformers import AutoConfig

    kind, values = MODELS[name]
    return AutoConfig.for_model(kind, **{**SIZES, **values, **changes})


def model(name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(model_config(name, **changes)).eval().to(dtype)


@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("name", ["llama", "mixtral", "llama4"])
def test_models_that_keep_documents_apart_pass(name: str, dtype: torch.dtype) -> None:
    """Also those of experts, where the bits of a token's hidden states depend on how many others take the same expert."""
    assert self_test.tested_head(model(name, dtype), "student.model", True, 64 if name != "llama4" else 16)


@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("name", ["lfm2", "qwen3_next"])
def test_layers_that_run_across_packed_documents_are_found_in_any_dtype(name: str, dtype: torch.dtype) -> None:
    mixing = model(name, dtype, initializer_range=0.02)  # so that little leaks
    self_test.tested_head(mixing, "student.model", packed=False, length=64)
    with pytest.raises(ModelError, match=r"^student\.model: .* see each other .*; set data\.pack: false"):
        self_test.tested_head(mixing, "student.model", packed=True)


def test_rows_that_flash_attention_joins_are_joined_in_the_test_on_a_cpu() -> None:
    for name in ("llama", "lfm2"):
        found = model(name)
        found.config._attn_implementation = "flash_attention_2"
        if name == "llama":
            self_test.tested_head(found, "student.model", packed=True)
        else:
            with pytest.raises(ModelError, match=r"rows of a batch see each other; .*set student\.attention: sdpa"):
                self_test.tested_head(found, "student.model", packed=False)
        assert found.config._attn_implementation == "flash_attention_2"


@pytest.mark.parametrize("seen", [False, True])
def test_rounding_is_told_from_a_small_leak(seen: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some mixtures of experts round a token's hidden states otherwise where other tokens stand elsewhere."""
    found = model("llama")
    forward = found.model.forward

    def noisy(**inputs: Any) -> Any:
        result = forward(**inputs)
        others = result[0][:2].sum((0, 1))
        result.last_hidden_state = result[0] + 1e-7 * (others if seen else others.detach())
        return result

    monkeypatch.setattr(found.model, "forward", noisy)
    if not seen:
        self_test.tested_head(found, "student.model", packed=True)
        return
    with pytest.raises(ModelError, match="rows of a batch see each other"):
        self_test.tested_head(found, "student.model", packed=True)


@pytest.mark.parametrize("kind", [RuntimeError, NotImplementedError, ValueError])
def test_kernels_without_a_backward_pass_are_no_reason_to_refuse(
    kind: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A quantized mixture may round otherwise and compute no gradient."""
    found = model("mixtral")
    forward = found.model.forward

    def noisy(**inputs: Any) -> Any:
        result = forward(**inputs)
        result.last_hidden_state = result[0] + 1e-7 * result[0][:2].sum((0, 1)).detach()
        if torch.is_grad_enabled():
            raise kind("no backward pass")
        return result

    monkeypatch.setattr(found.model, "forward", noisy)
    self_test.tested_head(found, "student.model", packed=True)


@pytest.mark.parametrize("name", ["bidirectional", "encoder"])
def test_models_that_see_what_follows_are_refused(name: str, tmp_path: Path) -> None:
    found = model(name)
    # Not by tested_head: an encoder's head has a layer of its own, which the test of the logits would name.
    with pytest.raises(ModelError, match="see the tokens that follow"):
        check_rows(probe_of(found, head_of(found), "student"))
    if name == "bidirectional":
        found.save_pretrained(tmp_path)
        with pytest.raises(ModelError, match=r"^teacher\.model: .* see the tokens that follow"):
            LocalTeacher(TeacherConfig(model=str(tmp_path)), VOCAB, torch.device("cpu"))


@pytest.mark.parametrize("name", ["longrope", "phimoe", "dynamic"])
def test_rows_whose_rotary_factors_depend_on_longer_rows_are_found(name: str) -> None:
    found = model(name)
    probe = probe_of(found, head_of(found), "student")
    check_neighbours(probe, 32)
    with pytest.raises(ModelError, match="depend on the longest row of the batch"):
        check_neighbours(probe, 64)


def settings(length: int, **data: Any) -> DistillConfig:
    tree = config_for(TIED).model_dump(mode="json")
    return build_config(tree | {"data": tree["data"] | {"sequence_length": length} | data})


def test_rows_are_no_longer_than_those_that_have_the_same_factors_beside_any_row() -> None:
    plain = model_config("llama")
    layers = dict.fromkeys(("full_attention", "sliding_attention"), LONGROPE)
    nested = model_config("llama")
    nested.rope_parameters = layers
    for each in (model_config("longrope"), model_config("phimoe"), nested):
        assert context_length(each) == context_length(plain, each) == 32
        check_lengths(settings(32), each, plain)
        for pair, who in ((each, plain), "teacher"), ((plain, each), "student"):
            with pytest.raises(
                ConfigError, match=rf"^data\.sequence_length: 33 .* 32 tokens .* {who}'s rotary .* at most 32"
            ):
                check_lengths(settings(33), *pair)
    assert context_length(model_config("dynamic")) == 32 and context_length(plain) == 256


def test_packed_rows_are_no_longer_than_the_chunks_of_chunked_attention() -> None:
    plain, chunked = model_config("llama"), model_config("llama4")
    check_lengths(settings(8), plain, chunked)
    check_lengths(settings(64, pack=False), plain, chunked)
    with pytest.raises(
        ConfigError, match=r"chunks of 8 tokens .* student .* data\.pack: false .* data\.sequence_length: 8"
    ):
        check_lengths(settings(9), plain, chunked)


@pytest.mark.parametrize("name", ["recurrent_gemma", "hyperclovax", "minicpm3", "llama4", "mamba"])
@pytest.mark.parametrize("dtype", BOTH)
def test_logits_are_rebuilt_whatever_the_config_calls_their_scale(name: str, dtype: torch.dtype) -> None:
    found = model(name, dtype)
    self_test.self_test(found, head_of(found), "student")
    expected = {"recurrent_gemma": LogitTransform(softcap=30.0), "hyperclovax": LogitTransform(scale=3.0)}
    assert head_of(found).transform == expected.get(name, LogitTransform(scale=0.25 if name == "minicpm3" else 1.0))


@pytest.mark.parametrize("dtype", [*BOTH, torch.float16])
def test_a_soft_cap_that_is_missed_is_found_though_the_logits_are_small(dtype: torch.dtype) -> None:
    found = model("recurrent_gemma", dtype, logits_soft_cap=500.0)
    head = head_of(found)
    assert head.transform.softcap == 500.0
    with pytest.raises(ModelError, match="cannot distil this architecture exactly"):
        self_test.self_test(found, Head(head.weight, head.bias, LogitTransform()), "student")


def overflowing(directory: Path, factor: float) -> str:
    found = model("llama")
    with torch.no_grad():
        found.model.layers[0].mlp.down_proj.weight.mul_(factor)
    found.save_pretrained(directory)
    return str(directory)


def test_hidden_states_that_are_not_finite_name_the_dtype_that_helps(tmp_path: Path) -> None:
    hot, broken = overflowing(tmp_path / "hot", 1e6), overflowing(tmp_path / "broken", float("nan"))
    cpu = torch.device("cpu")
    with pytest.raises(ModelError, match=r"^teacher\.model: .* not finite in float16; set teacher\.dtype: bfloat16$"):
        LocalTeacher(TeacherConfig(model=hot, dtype="float16"), VOCAB, cpu)
    with pytest.raises(
        ModelError, match=r"^teacher\.model: .* not finite in bfloat16; check the weights .* teacher\.model$"
    ):
        LocalTeacher(TeacherConfig(model=broken, dtype="bfloat16"), VOCAB, cpu)
    LocalTeacher(TeacherConfig(model=hot, dtype="bfloat16"), VOCAB, cpu)
    with pytest.raises(ModelError, match=r"^student\.model: .* not finite in float16; set student\.dtype: bfloat16$"):
        self_test.tested_head(load_causal_lm(StudentConfig(model=hot), dtype="float16"), "student.model", True)


def test_an_answer_that_is_not_finite_names_the_dtype_that_helps(tmp_path: Path) -> None:
    model("llama").save_pretrained(tmp_path)
    teacher = LocalTeacher(TeacherConfig(model=str(tmp_path), dtype="float16"), VOCAB, torch.device("cpu"))
    with torch.no_grad():
        teacher._model.model.model.embed_tokens.weight[3] = 6e4
        teacher._model.model.model.layers[0].mlp.down_proj.weight.mul_(1e3)
    batch = collate([Row([1, 2, 3, 4], [0, 1, 2, 3], [2, 3, 4, NO_LABEL])])
    with pytest.raises(
        TeacherError, match=r"not finite at . of 3 positions: not finite in float16; set teacher\.dtype: bfloat16"
    ):
        teacher.collect(teacher.submit(batch))


def test_what_a_model_raises_at_its_test_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    found = model("llama")

    def failing(**inputs: Tensor) -> Any:
        raise RuntimeError("expected m1 and m2 to have the same dtype, but got: float != c10::BFloat16")

    monkeypatch.setattr(found.model, "forward", failing)
    with pytest.raises(
        ModelError, match=r"^student\.model: LlamaForCausalLM cannot compute .*; set student\.dtype: float32$"
    ):
        self_test.tested_head(found, "student.model", packed=True)
    with pytest.raises(ModelError, match="cannot compute"), self_test.explained_tests(found, "student.model"):
        raise NotImplementedError("no kernel for this layer")
    with pytest.raises(torch.OutOfMemoryError), self_test.explained_tests(found, "student.model"):
        raise torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(RuntimeError, match="DefaultCPU"), self_test.explained_tests(found, "student.model"):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes.")
    mixed = RuntimeError(
        "aten.where.self got mixed torch.Tensor and DTensor, need to convert all torch.Tensor to DTensor"
    )
    with (  # Gemma 4 with its parts for images
        pytest.raises(ModelError, match=r"^teacher\.model: .*; set teacher\.shards: 1$"),
        self_test.explained_tests(found, "teacher.model", shared=True),
    ):
        raise mixed


def test_a_model_that_takes_multiples_of_a_chunk_only_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    found = model("llama")
    plain = found.model.forward

    def chunked(**inputs: Tensor) -> Any:
        if inputs["input_ids"].shape[1] % 8:
            raise RuntimeError("upper bound and lower bound inconsistent with step sign")
        return plain(**inputs)

    monkeypatch.setattr(found.model, "forward", chunked)
    with pytest.raises(ModelError, match=r"^student\.model: LlamaForCausalLM cannot compute .*; choose another model$"):
        self_test.tested_head(found, "student.model", packed=False)


def test_teachers_that_transformers_does_not_split_rightly_are_refused() -> None:
    check_divisible(model_config("lfm2"), 1)
    with pytest.raises(ModelError, match=r"teacher\.shards = 2: .* lfm2 rightly; set teacher\.shards: 1"):
        check_divisible(model_config("lfm2"), 2)


def test_auto_is_eager_for_a_model_without_sdpa(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, GPTNeoConfig

    kind = GPTNeoConfig(
        vocab_size=VOCAB, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]]
    )
    AutoModelForCausalLM.from_config(kind).save_pretrained(tmp_path / "gpt_neo")
    model("llama").save_pretrained(tmp_path / "llama")
    for name, expected in (("gpt_neo", "eager"), ("llama", "sdpa")):
        for source in (StudentConfig(model=str(tmp_path / name)), TeacherConfig(model=str(tmp_path / name))):
            assert load_causal_lm(source).config._attn_implementation == expected
    sdpa = StudentConfig(model=str(tmp_path / "gpt_neo"), attention="sdpa")
    for check in (lambda: load_causal_lm(sdpa), lambda: check_attention(sdpa, kind)):
        with pytest.raises(
            ModelError, match=r"^student\.attention = sdpa: .* GPTNeoForCausalLM; set student\.attention: auto$"
        ):
            check()
    check_attention(StudentConfig(model=str(tmp_path / "gpt_neo")), kind)
    for attention in ("auto", "sdpa"):
        cut = build_config(
            {
                "teacher": {"model": str(tmp_path / "gpt_neo"), "mode": "local"},
                "student": {"init": "cut", "layers": [0, 1], "attention": attention},
                "data": {"train": "d"},
                "train": {"steps": 1},
            }
        )
        if attention == "auto":
            check_student(cut, kind)
        else:
            with pytest.raises(ModelError, match=r"^student\.attention = sdpa: .*; set student\.attention: auto$"):
                check_student(cut, kind)


def test_a_body_that_answers_in_float32_is_handed_to_the_head_in_its_dtype() -> None:
    found = model("mamba", torch.bfloat16)
    ids = torch.arange(8)[None]
    assert found.backbone(ids)[0].dtype == torch.float32
    assert hidden_states(found, {"input_ids": ids, "position_ids": ids}).dtype == torch.bfloat16
