from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from taid_ray.config.schema import DistillConfig, build_config
from taid_ray.errors import ConfigError, ModelError
from taid_ray.models.adapters import add_lora
from taid_ray.models.cut import keep_layers
from taid_ray.models.saving import merged_model
from taid_ray.models.student_init import (
    build_student,
    check_student,
    resize_with_mean,
    student_model_config,
)
from taid_ray.models.vocabulary import Vocabulary

VOCAB = 61
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "max_position_embeddings": 64, "initializer_range": 0.3,
}  # fmt: skip
NO_IDS: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
LLAMA4: dict[str, Any] = SIZES | {
    "num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 2, "intermediate_size_mlp": 40,
    "no_rope_layers": [1, 0, 0, 1], "attention_chunk_size": 3,
}  # fmt: skip
VISION: dict[str, Any] = {  # as many layers as the text model has
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": 8,
    "patch_size": 8,
}  # fmt: skip
# Where each architecture keeps its layers.
STACKS = {
    "llama": "model.layers",
    "tied": "model.layers",
    "qwen2": "model.layers",
    "gpt_neox": "gpt_neox.layers",
    "smollm3": "model.layers",
    "llama4": "model.layers",
}


def architectures() -> dict[str, Callable[[], Any]]:
    import transformers as hf

    sliding: dict[str, Any] = {
        "use_sliding_window": True,
        "sliding_window": 3,
        "max_window_layers": 2,
    }  # layers 2 and 3 slide
    return {
        "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, num_key_value_heads=2)),
        "tied": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, tie_word_embeddings=True)),
        "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**SIZES, num_key_value_heads=2, **sliding)),
        "gpt_neox": lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**SIZES)),
        "phi": lambda: hf.PhiForCausalLM(hf.PhiConfig(**SIZES)),  # its head has a bias
        "smollm3": lambda: hf.SmolLM3ForCausalLM(
            hf.SmolLM3Config(**SIZES, num_key_value_heads=2, no_rope_layers=[1, 0, 0, 1], **NO_IDS)
        ),
        "llama4": lambda: hf.Llama4ForCausalLM(hf.Llama4TextConfig(**LLAMA4)),  # every layer is a mixture of experts
        "llama4_mixed": lambda: hf.Llama4ForCausalLM(hf.Llama4TextConfig(**LLAMA4, moe_layers=[1, 3])),
        "gemma3n": lambda: hf.Gemma3nForCausalLM(
            hf.Gemma3nTextConfig(
                **SIZES | {"intermediate_size": [48, 64, 48, 48]}, num_key_value_heads=2, head_dim=8, num_kv_shared_layers=0,
                vocab_size_per_layer_input=VOCAB, hidden_size_per_layer_input=4, laurel_rank=4, altup_num_inputs=2,
                activation_sparsity_pattern=[0.5, 0.0, 0.5, 0.0],
            )
        ),
        "gemma3": lambda: hf.Gemma3ForConditionalGeneration(
            hf.Gemma3Config(
                text_config=SIZES | {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 3,
                                     "layer_types": ["sliding_attention", "full_attention"] * 2},
                vision_config=VISION, mm_tokens_per_image=1, image_token_index=5, boi_token_index=6, eoi_token_index=7,
            )
        ),
        "lfm2": lambda: hf.Lfm2ForCausalLM(hf.Lfm2Config(**SIZES, num_key_value_heads=2, full_attn_idxs=[1, 3])),
        "gpt_neo": lambda: hf.GPTNeoForCausalLM(
            hf.GPTNeoConfig(
                vocab_size=VOCAB, hidden_size=32, num_layers=4, num_heads=4, attention_types=[[["global", "local"], 2]],
                max_position_embeddings=64, **NO_IDS,
            )
        ),
    }  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Directory of a tiny saved model of an architecture; made once."""
    root = tmp_path_factory.mktemp("models")

    def path(name: str) -> Path:
        if not (root / name).exists():
            torch.manual_seed(0)
            model = architectures()[name]()
            for parameter in model.parameters():  # norms and biases start equal in all layers: tell them apart
                parameter.data += 0.05 * torch.randn_like(parameter)
            model.save_pretrained(root / name)
        return root / name

    return path


def config(path: Path, seed: int = 0, **student: Any) -> DistillConfig:
    return build_config(
        {
            "teacher": {"model": str(path)},
            "student": {"dtype": "float32"} | student,
            "data": {"train": "unused"},
            "train": {"steps": 1, "seed": seed},
        }
    )


def load(path: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    ids = torch.arange(24).view(2, 12) * 7 % VOCAB
    found: Tensor = model.eval()(input_ids=ids, use_cache=False).logits
    return found


def perturb_(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("layers", [[0, 3], [2], [3, 0, 3, 1], [1, 1, 1, 1, 1], [0, 1, 2, 3]], ids=str)
@pytest.mark.parametrize("name", STACKS)
def test_cut_keeps_exactly_the_chosen_layers(name: str, layers: list[int], saved: Callable[[str], Path]) -> None:
    teacher = load(saved(name))
    student = build_student(config(saved(name), init="cut", layers=layers), None)
    assert student.config.num_hidden_layers == len(layers)
    assert {parameter.dtype for parameter in student.parameters()} == {torch.float32}
    teacher_layers = teacher.get_submodule(STACKS[name])
    student_layers = student.get_submodule(STACKS[name])
    assert len(student_layers) == len(layers)
    for new, old in zip(student_layers, layers, strict=True):
        assert same(new.state_dict(), teacher_layers[old].state_dict())
    outside = [
        {n: w for n, w in model.state_dict().items() if not n.startswith(STACKS[name])} for model in (teacher, student)
    ]
    assert outside[0] and same(*outside)
    # and it computes what a teacher made of just these layers computes, sliding windows included
    parent, _, attribute = STACKS[name].rpartition(".")
    setattr(teacher.get_submodule(parent), attribute, nn.ModuleList(teacher_layers[old] for old in layers))
    teacher.config.num_hidden_layers = len(layers)
    if getattr(teacher.config, "layer_types", None):
        teacher.config.layer_types = [teacher.config.layer_types[old] for old in layers]
    assert torch.equal(logits(student), logits(teacher))


@pytest.mark.parametrize("name", [*STACKS, "phi", "gemma3n", "gemma3", "lfm2"])
def test_a_cut_that_keeps_all_layers_is_the_teacher(name: str, saved: Callable[[str], Path]) -> None:
    chosen = config(saved(name), init="cut", layers=[0, 1, 2, 3])
    check_student(chosen, student_model_config(chosen))
    student, teacher = build_student(chosen, None), load(saved(name))
    assert same(student.state_dict(), teacher.state_dict())
    assert torch.equal(logits(student), logits(teacher))


def test_cut_takes_every_list_of_the_config_along(saved: Callable[[str], Path]) -> None:
    def cut(name: str) -> Any:
        return student_model_config(config(saved(name), init="cut", layers=[3, 1])).get_text_config()

    assert cut("smollm3").no_rope_layers == [1, 0]
    assert (cut("llama4").no_rope_layers, cut("llama4").moe_layers) == ([1, 0], [0, 1])
    assert cut("llama4").layer_types == ["chunked_attention", "full_attention"]
    found = cut("gemma3n")
    assert (found.intermediate_size, found.activation_sparsity_pattern) == ([48, 64], [0.0, 0.0])
    assert cut("gemma3").layer_types == ["full_attention", "full_attention"]


def test_token_ids_are_no_list_of_layers(saved: Callable[[str], Path], tmp_path: Path) -> None:
    model = load(saved("llama"))
    model.config.eos_token_id = model.generation_config.eos_token_id = [2, 7, 8, 9]  # as many as layers
    model.save_pretrained(tmp_path)
    student = build_student(config(tmp_path, init="cut", layers=[1]), None)
    assert student.config.eos_token_id == student.generation_config.eos_token_id == [2, 7, 8, 9]


def test_a_list_that_may_be_about_layers_is_refused(saved: Callable[[str], Path], tmp_path: Path) -> None:
    model = load(saved("llama"))
    model.config.windows = [8, 8, 16, 16]  # as many as layers
    model.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"its windows has as many entries as there are layers.*set student\.init"):
        student_model_config(config(tmp_path, init="cut", layers=[1]))


@pytest.mark.parametrize(
    "field, before, after",
    [
        ("moe_topk", [1, 2, 3, 4], [2, 4]),
        ("moe_intermediate_size", [8, 8, 16, 32], [8, 32]),
        ("num_shared_expert", [1, 2, 3, 4], [2, 4]),
        ("num_experts", [1, 2, 3, 4], [2, 4]),
        ("swiglu_limits", [0.0, 7.0, 0.0, 16.0], [7.0, 16.0]),
        ("swiglu_limits_shared", [None, None, None, 16.0], [None, 16.0]),
        ("block_configs", ["a", "b", "c", "d"], ["b", "d"]),
        ("kv_source_layers", [0, 1, 2, 3], [0, 1]),
        ("attn_layer_indices", [0, 1, 2, 3], [0, 1]),
        ("bad_words_ids", [[1], [2], [3], [4]], [[1], [2], [3], [4]]),
        ("vision_feature_layer", [-2, -1], [-2, -1]),
        ("windows", [0, 2], [0, 2]),
    ],
)
def test_lists_of_other_architectures(field: str, before: list[Any], after: list[Any]) -> None:
    from transformers import LlamaConfig

    found = LlamaConfig(**SIZES)
    setattr(found, field, before)
    keep_layers(found, [1, 3])
    assert getattr(found, field) == after


@pytest.mark.parametrize(
    "field, value",
    [
        ("global_attn_layers", [0, 2]),
        ("sparse_idxs", [3]),
        ("attn_layer_indices", [1, 3]),
        ("kv_source_layers", [0, 0, 2, 2]),
    ],
)
def test_a_list_that_numbers_layers_is_refused(field: str, value: list[int]) -> None:
    from transformers import LlamaConfig

    with pytest.raises(ModelError, match=rf"its {field} numbers layers .*set student\.init"):
        keep_layers(LlamaConfig(**SIZES, **{field: value}), [1, 3])


def test_cut_of_a_text_model_beside_an_image_encoder(saved: Callable[[str], Path]) -> None:
    chosen = config(saved("gemma3"), init="cut", layers=[2, 1])
    check_student(chosen, student_model_config(chosen))
    student, teacher = build_student(chosen, None), load(saved("gemma3"))
    assert [len(model.model.language_model.layers) for model in (student, teacher)] == [2, 4]
    assert len(student.model.vision_tower.encoder.layers) == 4
    for new, old in enumerate((2, 1)):
        layers = student.model.language_model.layers[new], teacher.model.language_model.layers[old]
        assert same(layers[0].state_dict(), layers[1].state_dict())


@pytest.mark.parametrize(
    "name, message",
    [
        ("lfm2", r"full_attn_idxs numbers layers \(\[1, 3\]\); set student\.init"),
        ("llama4_mixed", r"moe_layers numbers layers \(\[1, 3\]\)"),
        ("gemma3n", r"student\.layers: \[3, 0\] gives no Gemma3nForCausalLM.* differ by their place"),
    ],
)
def test_what_cannot_be_cut_is_refused_before_weights_are_loaded(
    name: str, message: str, saved: Callable[[str], Path]
) -> None:
    chosen = config(saved(name), init="cut", layers=[3, 0])
    with pytest.raises(ModelError, match=message):
        check_student(chosen, student_model_config(chosen))
    with pytest.raises(ModelError, match=message):
        build_student(chosen, None)


@pytest.mark.parametrize(
    "name, message",
    [
        ("Gemma4TextConfig", "its per_layer_config is by number"),
        ("LongcatFlashConfig", "its num_hidden_layers is derived from other fields"),
        ("ProphetNetConfig", "does not support the setting of `num_hidden_layers`"),
    ],
)
def test_configs_that_cannot_describe_a_cut_model(name: str, message: str, tmp_path: Path) -> None:
    import transformers as hf

    getattr(hf, name)().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=f"{name} cannot describe a model of only some.*{message}.*student.init"):
        student_model_config(config(tmp_path, init="cut", layers=[2, 1, 0]))


def test_a_config_without_a_depth_cannot_be_cut() -> None:
    import transformers as hf

    with pytest.raises(ModelError, match=r"BltConfig cannot describe .*no num_hidden_layers; set student.init"):
        keep_layers(hf.BltConfig(), [0])


def test_a_config_that_derives_its_lists_is_saved_cut(saved: Callable[[str], Path], tmp_path: Path) -> None:
    chosen = config(saved("gpt_neo"), init="cut", layers=[3, 0, 1], attention="eager")
    check_student(chosen, student_model_config(chosen))
    student = build_student(chosen, None)
    student.save_pretrained(tmp_path)
    back = load(tmp_path)
    assert back.config.attention_layers == student.config.attention_layers == ["local", "global", "local"]
    assert torch.equal(logits(back), logits(student))


def test_cut_takes_the_layer_types_along(saved: Callable[[str], Path]) -> None:
    found = student_model_config(config(saved("qwen2"), init="cut", layers=[3, 0, 2]))
    assert found.layer_types == ["sliding_attention", "full_attention", "sliding_attention"]


def test_repeated_layers_train_apart(saved: Callable[[str], Path]) -> None:
    layers = build_student(config(saved("llama"), init="cut", layers=[1, 1]), None).model.layers
    with torch.no_grad():
        layers[0].mlp.down_proj.weight += 1
    assert not torch.equal(layers[0].mlp.down_proj.weight, layers[1].mlp.down_proj.weight)


def test_cut_keeps_tied_embeddings_tied(saved: Callable[[str], Path]) -> None:
    student = build_student(config(saved("tied"), init="cut", layers=[0]), None)
    assert student.lm_head.weight is student.model.embed_tokens.weight


@pytest.mark.parametrize("layers, wrong", [([4], "[4]"), ([0, 7, 3, 9], "[7, 9]")])
def test_a_layer_the_teacher_lacks(layers: list[int], wrong: str, saved: Callable[[str], Path]) -> None:
    chosen = config(saved("llama"), init="cut", layers=layers)
    for build in (student_model_config, lambda c: build_student(c, None)):
        with pytest.raises(ConfigError) as caught:
            build(chosen)
        assert "student.layers" in str(caught.value) and "0 to 3" in str(caught.value) and wrong in str(caught.value)


def test_pretrained_loads_the_students_own_weights(saved: Callable[[str], Path]) -> None:
    student = build_student(config(saved("gpt_neox"), init="pretrained", model=str(saved("llama"))), None)
    assert same(student.state_dict(), load(saved("llama")).state_dict())


def test_scratch_is_a_pure_function_of_the_seed(saved: Callable[[str], Path]) -> None:
    def weights(seed: int) -> dict[str, Tensor]:
        state: dict[str, Tensor] = build_student(config(saved("llama"), seed, init="scratch"), None).state_dict()
        return state

    first = weights(1)
    torch.manual_seed(99)
    before = torch.get_rng_state()
    assert same(first, weights(1))
    assert torch.equal(before, torch.get_rng_state())  # and takes nothing from the process's own random numbers
    assert not same(first, weights(2))
    assert not torch.equal(first["lm_head.weight"], load(saved("llama")).lm_head.weight)


def test_scratch_takes_the_architecture(saved: Callable[[str], Path]) -> None:
    changes = {"num_hidden_layers": 1, "hidden_size": 16, "tie_word_embeddings": True}
    student = build_student(config(saved("llama"), init="scratch", architecture=changes), None)
    assert len(student.model.layers) == 1 and student.lm_head.weight.shape == (VOCAB, 16)
    assert student.lm_head.weight is student.model.embed_tokens.weight
    with pytest.raises(ConfigError, match=r"student\.architecture\.num_layerz.*found 3"):
        build_student(config(saved("llama"), init="scratch", architecture={"num_layerz": 3}), None)


def vocabulary(rows: int, new: list[int], gaps: list[int] | None = None) -> Vocabulary:
    """Teacher's ids up to `rows`, of which the student lacks `new`; neither has `gaps`."""
    return Vocabulary(max(new) + 1, tuple(new), tuple(sorted([*new, *(gaps or [])])), rows)


@pytest.mark.parametrize("name", ["llama", "tied", "phi"])
def test_resize_adds_mean_rows(name: str, saved: Callable[[str], Path]) -> None:
    model, again, old = (load(saved(name)) for _ in range(3))
    for seed, resized in enumerate((model, again)):
        torch.manual_seed(seed)
        resize_with_mean(resized, vocabulary(VOCAB + 4, [*range(VOCAB, VOCAB + 4)]))
    assert same(model.state_dict(), again.state_dict())  # no random numbers: every rank gets the same
    assert model.config.vocab_size == VOCAB + 4
    for module, former in zip(
        (model.get_input_embeddings(), model.get_output_embeddings()),
        (old.get_input_embeddings(), old.get_output_embeddings()),
        strict=True,
    ):
        assert torch.equal(module.weight[:VOCAB], former.weight)
        assert module.weight.shape[0] == VOCAB + 4
        torch.testing.assert_close(module.weight[VOCAB:], former.weight.mean(0).expand(4, -1))
        if getattr(former, "bias", None) is not None:
            torch.testing.assert_close(module.bias, torch.cat([former.bias, former.bias.mean().expand(4)]))
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert tied == (name == "tied")
    torch.testing.assert_close(logits(model)[..., :VOCAB], logits(old))


def test_build_resizes(saved: Callable[[str], Path]) -> None:
    found = vocabulary(VOCAB + 3, [VOCAB, VOCAB + 2])
    plain = build_student(config(saved("llama"), init="cut", layers=[0]), found)
    assert plain.lm_head.weight.shape[0] == VOCAB
    student = build_student(config(saved("llama"), init="cut", layers=[0], resize_to_teacher=True), found)
    assert student.lm_head.weight.shape[0] == student.model.embed_tokens.weight.shape[0] == VOCAB + 3


@pytest.mark.parametrize("appended", [0, 2])
@pytest.mark.parametrize("name", ["llama", "tied", "phi"])
def test_new_ids_in_padding_rows_get_mean_rows(name: str, appended: int, saved: Callable[[str], Path]) -> None:
    """The student knows ids 0 to 49 but 7; rows 50 to 60 are padding, of which the teacher uses 51 and 53."""
    model, old = load(saved(name)), load(saved(name))
    new, known = [51, 53, *range(VOCAB, VOCAB + appended)], [i for i in range(50) if i != 7]
    padding = [7, *(i for i in range(50, new[-1]) if i not in new)]
    resize_with_mean(model, vocabulary(VOCAB + appended, new, padding))
    modules = [(m.get_input_embeddings(), m.get_output_embeddings()) for m in (model, old)]
    for module, former in zip(*modules, strict=True):
        kept = [i for i in range(VOCAB) if i not in new]
        assert torch.equal(module.weight[kept], former.weight[kept])
        for index in new:
            torch.testing.assert_close(module.weight[index], former.weight[known].mean(0))
            if getattr(former, "bias", None) is not None:
                torch.testing.assert_close(module.bias[index], former.bias[known].mean())
    assert (modules[0][0].weight is modules[0][1].weight) == (name == "tied")


IDS = {"bos_token_id": 11, "eos_token_id": 12, "pad_token_id": 13}


@pytest.mark.parametrize("own", [True, False], ids=["generation_config.json", "config only"])
@pytest.mark.parametrize("resize", [True, False])
def test_the_saved_student_stops_at_the_teachers_ids(
    resize: bool, own: bool, saved: Callable[[str], Path], tmp_path: Path
) -> None:
    teacher = load(saved("llama"))
    for key, value in IDS.items():
        setattr(teacher.config, key, value)
        setattr(teacher.generation_config, key, value)
    teacher.generation_config.eos_token_id = [12, 14]  # as many chat models have it
    teacher.save_pretrained(tmp_path / "teacher")
    if not own:
        (tmp_path / "teacher" / "generation_config.json").unlink()
    chosen = config(tmp_path / "teacher", model=str(saved("qwen2")), resize_to_teacher=resize)
    trained = build_student(chosen, vocabulary(VOCAB + 1, [VOCAB]))
    merged_model(chosen, trained, gathered(trained)).save_pretrained(tmp_path / "model")
    student, former = load(tmp_path / "model"), load(saved("qwen2"))
    generation = IDS | ({"eos_token_id": [12, 14]} if own else {})
    for key in IDS:
        assert getattr(student.config, key) == (IDS[key] if resize else getattr(former.config, key))
        expected = generation[key] if resize else getattr(former.generation_config, key)
        assert getattr(student.generation_config, key) == expected


def test_a_new_student_stops_where_its_teacher_does(saved: Callable[[str], Path], tmp_path: Path) -> None:
    teacher = load(saved("llama"))
    teacher.generation_config.eos_token_id = [2, 14]
    teacher.generation_config.pad_token_id = VOCAB - 1
    teacher.save_pretrained(tmp_path)
    student = build_student(config(tmp_path, init="scratch", architecture={"vocab_size": 40, "eos_token_id": 3}), None)
    assert student.config.eos_token_id == student.generation_config.eos_token_id == 3  # as asked for
    assert student.generation_config.pad_token_id is None  # it has no such row
    student = build_student(config(tmp_path, init="scratch"), None)
    assert (student.config.eos_token_id, student.generation_config.eos_token_id) == (2, [2, 14])


@pytest.mark.parametrize("init", ["cut", "scratch"])
def test_the_students_code_is_trusted_where_it_comes_from(
    init: str, saved: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    seen, plain = [], AutoModelForCausalLM.from_config

    def from_config(*arguments: Any, trust_remote_code: bool, **options: Any) -> Any:
        seen.append(trust_remote_code)
        return plain(*arguments, **options)

    monkeypatch.setattr(AutoModelForCausalLM, "from_config", from_config)
    trusted = {"model": str(saved("llama")), "trust_remote_code": True}
    student: dict[str, Any] = {"init": init, "layers": [0] if init == "cut" else None}
    chosen = config(saved("llama"), **student)
    chosen = chosen.model_copy(update={"teacher": chosen.teacher.model_copy(update=trusted)})
    check_student(chosen, student_model_config(chosen))
    merged_model(chosen, built := build_student(chosen, None), gathered(built))
    assert len(seen) >= 3 and all(seen)
    if init == "scratch":  # now the student's own model, and the student's section does not trust it
        del seen[:]
        other = config(saved("llama"), init="scratch", model=str(saved("llama")))
        chosen = other.model_copy(update={"teacher": chosen.teacher})
        check_student(chosen, student_model_config(chosen))
        build_student(chosen, None)
        assert len(seen) == 2 and not any(seen)


def gathered(trained: nn.Module) -> dict[str, Tensor]:
    """What `Student` collects: each parameter once (a tied head under its embedding's name) and the saved buffers."""
    saved = trained.state_dict().keys()
    state = {name: buffer.detach().clone() for name, buffer in trained.named_buffers() if name in saved}
    return state | {name: parameter.detach().clone() for name, parameter in trained.named_parameters()}


LORA: dict[str, Any] = {"rank": 3, "alpha": 12.0}
HEADS = {
    "llama": ["q_proj", "down_proj", "lm_head"],
    "qwen2": ["q_proj", "lm_head"],
    "gpt_neox": ["query_key_value", "embed_out"],
    "phi": ["q_proj", "lm_head"],
}


@pytest.mark.parametrize(
    "name, modules", [(name, "all-linear") for name in (*HEADS, "tied")] + [(name, "with the head") for name in HEADS]
)
def test_merging_adapters_changes_no_logits(
    name: str, modules: str, saved: Callable[[str], Path], tmp_path: Path
) -> None:
    targets = modules if modules == "all-linear" else HEADS[name]
    chosen = config(saved(name), init="cut", layers=[0, 3], lora=LORA | {"target_modules": targets})
    base = build_student(chosen, None)
    plain = logits(base)
    assert chosen.student.lora is not None
    trained = add_lora(base, chosen.student.lora, seed=0)
    perturb_(trained)
    adapted = logits(trained)
    assert (adapted - plain).abs().max() > 0.1
    merged = merged_model(chosen, base, gathered(trained))
    assert not [key for key in merged.state_dict() if "lora" in key]
    merged.save_pretrained(tmp_path / "model")
    torch.testing.assert_close(logits(load(tmp_path / "model")), adapted, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(logits(trained), adapted)  # the trained model itself is left alone


def test_an_adapter_on_a_tied_head_is_refused(saved: Callable[[str], Path]) -> None:
    chosen = config(saved("tied"), init="cut", layers=[0], lora=LORA | {"target_modules": ["q_proj", "lm_head"]})
    assert chosen.student.lora is not None
    with pytest.raises(ModelError, match=r"student\.lora"):
        add_lora(build_student(chosen, None), chosen.student.lora, 0)


def test_only_adapters_train_and_start_as_nothing(saved: Callable[[str], Path]) -> None:
    chosen = config(saved("llama"), init="pretrained", model=str(saved("llama")), lora=LORA)
    assert chosen.student.lora is not None
    first, second = (add_lora(build_student(chosen, None), chosen.student.lora, seed=4) for _ in range(2))
    trainable = {name for name, parameter in first.named_parameters() if parameter.requires_grad}
    assert trainable and all("lora_" in name for name in trainable)
    assert not any("lm_head" in name for name in trainable)
    assert first.get_submodule("model.model.layers.0.self_attn.q_proj").scaling == {"default": 12.0 / 3}
    assert torch.equal(logits(first), logits(load(saved("llama"))))
    assert same(first.state_dict(), second.state_dict())  # the same on every rank
    other = add_lora(build_student(chosen, None), chosen.student.lora, seed=5)
    assert not same(first.state_dict(), other.state_dict())


def test_without_peft_the_message_says_what_to_install(
    saved: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    chosen = config(saved("llama"), init="cut", layers=[0], lora=LORA)
    assert chosen.student.lora is not None
    with pytest.raises(ModelError, match=r"pip install 'taid-ray\[lora\]'"):
        add_lora(nn.Module(), chosen.student.lora, 0)


@pytest.mark.parametrize("name", STACKS)
def test_trained_weights_without_adapters_survive_saving(
    name: str, saved: Callable[[str], Path], tmp_path: Path
) -> None:
    chosen = config(saved(name), init="cut", layers=[2, 1])
    trained = build_student(chosen, None)
    perturb_(trained)
    merged = merged_model(chosen, trained, gathered(trained))
    merged.save_pretrained(tmp_path / "model")
    back = load(tmp_path / "model")
    assert back.config.num_hidden_layers == 2
    assert torch.equal(logits(back), logits(trained))


def test_saved_weights_have_the_students_dtype(saved: Callable[[str], Path]) -> None:
    chosen = config(saved("tied"), init="cut", layers=[0], dtype="bfloat16")
    trained = build_student(chosen, None)
    merged = merged_model(chosen, trained, gathered(trained))
    assert {parameter.dtype for parameter in merged.parameters()} == {torch.bfloat16}


def test_an_incomplete_state_is_not_saved(saved: Callable[[str], Path]) -> None:
    chosen = config(saved("llama"), init="cut", layers=[0])
    trained = build_student(chosen, None)
    state = gathered(trained)
    del state["model.norm.weight"]
    with pytest.raises(ModelError, match=r"model\.norm\.weight"):
        merged_model(chosen, trained, state)


def test_sampling_values_that_greedy_decoding_ignores_do_not_spoil_the_save(
    saved: Callable[[str], Path], tmp_path: Path
) -> None:
    """transformers loads such a checkpoint but refuses to save it: that must not come up after days of training."""
    from transformers import AutoModelForCausalLM

    cut = config(saved("llama"), init="cut", layers=[0])
    trained = build_student(cut, None)
    trained.generation_config.temperature, trained.generation_config.do_sample = 0.6, False
    merged_model(cut, trained, dict(trained.state_dict())).save_pretrained(tmp_path / "model")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "model").generation_config.do_sample is False
