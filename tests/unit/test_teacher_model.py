from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from taid_ray import device
from taid_ray.batch import NO_LABEL, Batch, Row, collate
from taid_ray.chunked import LogitTransform
from taid_ray.config import TeacherConfig
from taid_ray.errors import ClusterError, ModelError, TeacherError
from taid_ray.models import Head, check_packing, head_of, hidden_states, load_causal_lm, load_tokenizer, self_test
from taid_ray.teacher_model import LocalTeacher, TeacherModel, check_finite, head_digest

VOCAB, SHARED = 61, 57
CPU = torch.device("cpu")
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
GROUPED: dict[str, Any] = {"num_key_value_heads": 2, "head_dim": 8}


def architectures() -> dict[str, Callable[[], Any]]:
    import transformers as hf

    return {
        "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, **GROUPED, initializer_range=0.3)),
        "tied": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, tie_word_embeddings=True, initializer_range=0.3)),
        "gpt_neox": lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**SIZES, initializer_range=0.3)),
        "gemma2": lambda: hf.Gemma2ForCausalLM(
            hf.Gemma2Config(**SIZES, **GROUPED, initializer_range=0.3, final_logit_softcapping=2.0)
        ),
        "cohere": lambda: hf.CohereForCausalLM(hf.CohereConfig(**SIZES, initializer_range=0.3, logit_scale=0.25)),
        "granite": lambda: hf.GraniteForCausalLM(hf.GraniteConfig(**SIZES, initializer_range=0.3, logits_scaling=4.0)),
        "phi": lambda: hf.PhiForCausalLM(hf.PhiConfig(**SIZES, initializer_range=0.3)),  # its head has a bias
    }


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Directory of a tiny saved model of an architecture; made once."""
    root = tmp_path_factory.mktemp("models")

    def path(name: str, dtype: torch.dtype = torch.float32) -> Path:
        directory = root / f"{name}-{dtype}"
        if not directory.exists():
            torch.manual_seed(0)
            model = architectures()[name]().to(dtype)
            bias = getattr(model.get_output_embeddings(), "bias", None)
            if bias is not None:
                torch.nn.init.normal_(bias)
            model.save_pretrained(directory)
        return directory

    return path


def config(path: Path, **values: Any) -> TeacherConfig:
    return TeacherConfig(model=str(path), mode="local", **values)


def batch(lengths: tuple[int, ...] = (9, 4, 7)) -> Batch:
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(0, SHARED, (length,), generator=generator).tolist() for length in lengths]
    return collate([Row(row, list(range(len(row))), [*row[1:], NO_LABEL]) for row in ids])


def plain_logits(path: Path, batch: Batch) -> Tensor:
    """The ordinary way: each row alone, without padding, straight from transformers."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(path)
    length = batch.inputs["input_ids"].shape[1]
    rows = []
    for i, ids in enumerate(batch.inputs["input_ids"]):
        chosen = batch.loss_positions[(batch.loss_positions // length) == i] % length
        with torch.no_grad():
            rows.append(model(ids[None, : int(chosen.max()) + 1]).logits[0][chosen])
    return torch.cat(rows)[:, :SHARED].float()


@pytest.mark.parametrize("payload", ["hidden", "logits"])
@pytest.mark.parametrize("name", architectures())
def test_answers_equal_the_models_own_logits(name: str, payload: Any, saved: Callable[..., Path]) -> None:
    path, request = saved(name), batch()
    attention = "eager" if name == "gemma2" else "sdpa"
    teacher = TeacherModel(config(path, payload=payload, attention=attention), SHARED, CPU)
    values = teacher.score(request.inputs, request.loss_positions)
    logits = teacher.head().logits(values) if payload == "hidden" else values
    assert values.shape == (len(request.labels), 32 if payload == "hidden" else SHARED)
    torch.testing.assert_close(logits, plain_logits(path, request), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("max_tokens", [1, 9, 18, 26, 27])
def test_splitting_by_max_tokens_changes_nothing(max_tokens: int, saved: Callable[..., Path]) -> None:
    request = batch()
    whole = TeacherModel(config(saved("llama")), SHARED, CPU)
    split = TeacherModel(config(saved("llama"), max_tokens=max_tokens), SHARED, CPU)
    calls: list[torch.Size] = []
    split._model.base_model.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    found = split.score(request.inputs, request.loss_positions)
    torch.testing.assert_close(found, whole.score(request.inputs, request.loss_positions), atol=1e-5, rtol=1e-5)
    assert all(shape.numel() <= max(max_tokens, 9) for shape in calls) and sum(shape[0] for shape in calls) == 3


@pytest.mark.parametrize("payload", ["hidden", "logits"])
def test_bfloat16_stays_bfloat16(payload: Any, saved: Callable[..., Path]) -> None:
    path, request = saved("llama", torch.bfloat16), batch()
    teacher = LocalTeacher(config(path, payload=payload), SHARED, CPU)
    output = teacher.collect(teacher.submit(request))
    logits = teacher.head().logits(output.values) if payload == "hidden" else output.values.float()
    assert output.values.dtype == torch.bfloat16 and teacher.info().dtype == "bfloat16"
    assert output.num_bytes == output.values.numel() * 2
    torch.testing.assert_close(logits, plain_logits(path, request), atol=0.3, rtol=0.05)


@pytest.mark.parametrize(("payload", "width"), [("hidden", 32), ("logits", SHARED)])
def test_no_loss_positions_give_an_empty_answer(payload: Any, width: int, saved: Callable[..., Path]) -> None:
    teacher = LocalTeacher(config(saved("llama"), payload=payload), SHARED, CPU)
    output = teacher.collect(teacher.submit(collate([])))
    assert output.values.shape == (0, width) and output.kind == payload and teacher.tokens == 0


def test_answers_can_feed_a_backward_pass_and_the_teacher_gets_no_gradient(saved: Callable[..., Path]) -> None:
    teacher, request = TeacherModel(config(saved("llama")), SHARED, CPU), batch()
    values = teacher.score(request.inputs, request.loss_positions)
    scale = torch.ones(32, requires_grad=True)
    teacher.head().logits(values * scale).sum().backward()
    assert scale.grad is not None and not any(p.requires_grad for p in teacher._model.parameters())
    assert not teacher._model.training


def test_info_identifies_the_teacher(saved: Callable[..., Path], tmp_path: Path) -> None:
    first = TeacherModel(config(saved("llama")), SHARED, CPU)
    info = first.info()
    assert info == TeacherModel(config(saved("llama")), SHARED, CPU).info()
    assert (info.hidden_size, info.vocab_rows, info.num_shared, info.dtype) == (32, VOCAB, SHARED, "float32")
    assert info.num_parameters == sum(p.numel() for p in first._model.parameters())
    assert info.head_digest == head_digest(first.head()) and first.head().weight.shape == (SHARED, 32)
    model = load_causal_lm(str(saved("llama")))
    probabilities = self_test(model, head_of(model)).softmax(-1)
    assert info.dropped_mass == pytest.approx(float(probabilities[..., SHARED:].sum(-1).mean()), rel=1e-5)
    assert TeacherModel(config(saved("llama")), VOCAB, CPU).info().dropped_mass == 0

    with torch.no_grad():
        model.base_model.layers[1].self_attn.v_proj.weight[0, 0] += 0.1
    model.save_pretrained(tmp_path / "changed")
    changed = TeacherModel(config(tmp_path / "changed"), SHARED, CPU).info()
    assert changed.fingerprint != info.fingerprint and changed.probe_digest != info.probe_digest


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "gemma2"])
def test_packed_documents_do_not_see_each_other(name: str, saved: Callable[..., Path]) -> None:
    model = load_causal_lm(str(saved(name)), attention="eager" if name == "gemma2" else "sdpa")
    check_packing(model)
    ids = torch.arange(10)[None]
    packed = {"input_ids": ids, "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5]])}
    alone = {"input_ids": ids[:, 4:], "position_ids": torch.arange(6)[None]}
    with torch.no_grad():
        torch.testing.assert_close(
            hidden_states(model, packed)[:, 4:], hidden_states(model, alone), atol=1e-5, rtol=1e-5
        )


def test_a_model_that_mixes_packed_documents_is_reported(saved: Callable[..., Path], monkeypatch: Any) -> None:
    model = load_causal_lm(str(saved("llama")))
    forward = model.base_model.forward
    mixes = {"attention_mask": torch.ones(1, 16)}

    def mixing(**inputs: Any) -> Any:
        return forward(**inputs, attention_mask=mixes["attention_mask"][:, : inputs["input_ids"].shape[1]])

    monkeypatch.setattr(model.base_model, "forward", mixing)
    with pytest.raises(ModelError, match=r"data\.pack: false"):
        check_packing(model)


def test_a_head_that_misses_a_transform_is_refused(saved: Callable[..., Path]) -> None:
    model = load_causal_lm(str(saved("gemma2")), attention="eager")
    head = head_of(model)
    assert head.transform == LogitTransform(softcap=2.0)
    with pytest.raises(ModelError, match="cannot distil"):
        self_test(model, Head(head.weight, head.bias, LogitTransform()))


@pytest.mark.parametrize(
    ("ids", "positions", "message"),
    [
        ([[VOCAB]], [0], f"0 to {VOCAB - 1}"),
        ([[-1]], [0], "input ids"),
        ([[1, 2]], [2], "loss positions"),
        ([[]], [], "empty"),
    ],
)
def test_impossible_requests_are_refused(ids: Any, positions: Any, message: str, saved: Callable[..., Path]) -> None:
    teacher = TeacherModel(config(saved("llama")), SHARED, CPU)
    tokens = torch.tensor(ids, dtype=torch.int64)
    with pytest.raises(TeacherError, match=message):
        teacher.score({"input_ids": tokens, "position_ids": torch.zeros_like(tokens)}, torch.tensor(positions))


def test_values_that_are_not_finite_are_refused() -> None:
    check_finite(torch.tensor([[0.0, float("-inf")]]), "logits")
    check_finite(torch.empty(0, 4), "hidden")
    for value, kind in (
        (float("-inf"), "hidden"),
        (float("nan"), "hidden"),
        (float("nan"), "logits"),
        (float("inf"), "logits"),
    ):
        with pytest.raises(TeacherError, match="1 of 2 positions"):
            check_finite(torch.tensor([[0.0, value], [0.0, 1.0]]), kind)


def test_a_vocabulary_that_is_too_small_is_refused(saved: Callable[..., Path]) -> None:
    with pytest.raises(ModelError, match=f"{VOCAB} vocabulary rows"):
        TeacherModel(config(saved("llama")), VOCAB + 1, CPU)


def test_what_cannot_be_loaded_is_explained(saved: Callable[..., Path], tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelError, match=r"student\.model: no such directory \(found '/nowhere'\)"):
        load_causal_lm("/nowhere", key="student.model")
    with pytest.raises(ModelError, match=r"teacher\.model: .* has no config\.json"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(ModelError, match=r"teacher\.shards = 4 does not divide the model's num_key_value_heads = 2"):
        load_causal_lm(str(saved("llama")), shards=4)
    with pytest.raises(ModelError, match=r"cannot be loaded\. A package is missing"):
        load_causal_lm(
            str(saved("llama")), quantization={"quant_method": "bitsandbytes", "load_in_4bit": True}, device=CPU
        )
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(ModelError, match=r"teacher\.model = .* cannot be loaded"):
        load_causal_lm(str(tmp_path))


def test_a_checkpoint_without_some_weights_is_refused(saved: Callable[..., Path], tmp_path: Path) -> None:
    model = load_causal_lm(str(saved("llama")))
    state = {name: tensor for name, tensor in model.state_dict().items() if "lm_head" not in name}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ModelError, match=r"no weights that fit 1 parameters .*lm_head"):
        load_causal_lm(str(tmp_path))


def test_devices() -> None:
    assert device.resolve("auto", False) == device.resolve("cpu", True) == "cpu"
    assert device.resolve("auto", True) == device.resolve("cuda", True) == "cuda"
    with pytest.raises(ClusterError, match="no node of the cluster has a GPU"):
        device.resolve("cuda", False)
    assert device.torch_device("cpu") == CPU
    with pytest.raises(ClusterError, match="sees"):
        device.torch_device("cuda", torch.cuda.device_count())
