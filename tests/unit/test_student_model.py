from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from taid_ray.config import DistillConfig, build_config
from taid_ray.errors import ConfigError, ModelError
from taid_ray.student_model import add_lora, build_student, merged_model, resize_with_mean, student_model_config

VOCAB = 61
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "max_position_embeddings": 64, "initializer_range": 0.3,
}  # fmt: skip
# Where each architecture keeps its layers.
STACKS = {"llama": "model.layers", "tied": "model.layers", "qwen2": "model.layers", "gpt_neox": "gpt_neox.layers"}


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
    }


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


@pytest.mark.parametrize("name", ["llama", "tied", "phi"])
def test_resize_adds_mean_rows(name: str, saved: Callable[[str], Path]) -> None:
    model, again, old = (load(saved(name)) for _ in range(3))
    for seed, resized in enumerate((model, again)):
        torch.manual_seed(seed)
        resize_with_mean(resized, VOCAB + 4)
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
    student = build_student(config(saved("llama"), init="cut", layers=[0]), VOCAB + 3)
    assert student.lm_head.weight.shape[0] == student.model.embed_tokens.weight.shape[0] == VOCAB + 3


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
    torch.testing.assert_close(logits(merged), adapted, atol=2e-5, rtol=1e-5)
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
    with pytest.raises(AssertionError, match=r"model\.norm\.weight"):
        merged_model(chosen, trained, state)
