from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from taid_ray.config.models import StudentConfig, TeacherConfig
from taid_ray.data.batch import NO_LABEL, Batch, Row, collate
from taid_ray.distributed import device
from taid_ray.errors import ClusterError, ConfigError, ModelError, TeacherError
from taid_ray.losses.projection import LogitTransform
from taid_ray.models import loading, self_test
from taid_ray.models.head import Head, head_of, hidden_states
from taid_ray.models.isolation import check_packing
from taid_ray.models.loading import explained_attention, load_causal_lm, load_tokenizer
from taid_ray.models.probes import probe_of
from taid_ray.teacher.fingerprint import bit_sums, head_digest
from taid_ray.teacher.groups import PADDING_LIMIT, micro_batches
from taid_ray.teacher.local import LocalTeacher
from taid_ray.teacher.model import TeacherModel
from taid_ray.teacher.payload import TeacherOutput, measured_error

VOCAB, SHARED = 61, 57
CPU = torch.device("cpu")
KINDS: list[Any] = ["hidden", "hidden_int8", "hidden_fp8", "topk", "logits"]
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


def score(teacher: TeacherModel, request: Batch) -> dict[str, Tensor]:
    return teacher.score(request.inputs, request.loss_positions, request.labels)


def forward_shapes(teacher: TeacherModel) -> list[torch.Size]:
    """Fills with the shape of the input of every forward pass from now on."""
    shapes: list[torch.Size] = []
    teacher.model.base_model.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    return shapes


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
    values = score(teacher, request)[payload]
    logits = teacher.head().logits(values) if payload == "hidden" else values
    assert values.shape == (len(request.labels), 32 if payload == "hidden" else SHARED)
    torch.testing.assert_close(logits, plain_logits(path, request), atol=2e-5, rtol=1e-5)


def test_topk_answers_equal_the_models_own_probabilities(saved: Callable[..., Path]) -> None:
    path, request = saved("phi"), batch()
    exact = plain_logits(path, request).log_softmax(-1)
    found = score(TeacherModel(config(path, payload="topk", topk=5), SHARED, CPU), request)
    ids = found["ids"].long()
    assert torch.equal(ids, exact.topk(5).indices.sort(-1).values)
    torch.testing.assert_close(found["log_probs"].float(), exact.gather(1, ids), atol=1e-3, rtol=5e-3)
    own = exact.gather(1, request.labels[:, None])[:, 0]
    torch.testing.assert_close(found["label_log_probs"], own, atol=2e-5, rtol=1e-5)
    tail = exact.scatter(1, ids, float("-inf")).logsumexp(-1)
    torch.testing.assert_close(found["log_tail"], tail, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("max_tokens", [1, 8, 16, 24, 27])
def test_splitting_by_max_tokens_changes_nothing(max_tokens: int, saved: Callable[..., Path]) -> None:
    request = batch()
    whole = TeacherModel(config(saved("llama")), SHARED, CPU)
    split = TeacherModel(config(saved("llama"), max_tokens=max_tokens), SHARED, CPU)
    shapes = forward_shapes(split)
    found = score(split, request)["hidden"]
    torch.testing.assert_close(found, score(whole, request)["hidden"], atol=3e-6, rtol=1e-5)
    assert all(shape.numel() <= max(max_tokens, 8) for shape in shapes) and sum(shape[0] for shape in shapes) == 3


def ragged() -> Batch:
    """Rows of 40 positions: packed, with loss at the end only, in the middle only, nowhere, and short ones."""
    generator = torch.Generator().manual_seed(3)
    rows = []
    for length, carrying, cut in (
        (40, range(39), 13), (3, range(2), 3), (40, range(5), 40), (40, (), 40), (12, (10,), 12), (5, range(4), 2),
        (40, (17, 30), 20), (2, (0,), 2),
    ):  # fmt: skip
        ids = torch.randint(0, SHARED, (length,), generator=generator).tolist()
        targets = [ids[i + 1] if i in carrying and i + 1 != cut else NO_LABEL for i in range(length)]
        rows.append(Row(ids, [*range(cut), *range(length - cut)], targets))
    return collate(rows)


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "gemma2"])
def test_leaving_out_what_nobody_reads_changes_nothing(
    name: str, saved: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("taid_ray.teacher.groups.PADDING_LIMIT", 10)
    attention = "eager" if name == "gemma2" else "sdpa"
    teacher, request = TeacherModel(config(saved(name), attention=attention, max_tokens=64), SHARED, CPU), ragged()
    shapes = forward_shapes(teacher)
    found = score(teacher, request)["hidden"]
    computed = [tuple(shape) for shape in shapes]
    with torch.no_grad():
        whole = hidden_states(teacher.model, request.inputs).flatten(0, 1)[request.loss_positions]
    torch.testing.assert_close(found, whole, atol=3e-6, rtol=1e-5)
    assert torch.equal(found, score(teacher, request)["hidden"])
    # The lengths that matter are 39, 2, 5, 0, 11, 4, 31, 1, so 93 positions do, of 8 x 40.
    assert computed == [(1, 39), (1, 31), (2, 11), (3, 4)]
    assert sum(rows * longest for rows, longest in computed) == 104 < 320


def test_positions_in_any_order_get_their_own_answers(saved: Callable[..., Path]) -> None:
    teacher, request = TeacherModel(config(saved("llama"), max_tokens=16), SHARED, CPU), ragged()
    order = torch.randperm(request.num_loss_tokens, generator=torch.Generator().manual_seed(0))
    found = teacher.score(request.inputs, request.loss_positions[order], request.labels[order])["hidden"]
    assert torch.equal(found, score(teacher, request)["hidden"][order])


@pytest.mark.parametrize(
    ("lengths", "max_tokens", "groups"),
    [
        ([], 100, []),
        ([0, 0], 100, []),
        ([7, 0, 7, 7], 14, [[0, 2], [3]]),
        ([200, 300], 100, [[1], [0]]),
        ([10, 512, 10, 500, 10], 10_000, [[1, 3], [0, 2, 4]]),
        ([1] * 5, 3, [[0, 1, 2], [3, 4]]),
    ],
)
def test_rows_of_similar_length_are_computed_together(
    lengths: list[int], max_tokens: int, groups: list[list[int]]
) -> None:
    assert list(micro_batches(lengths, max_tokens)) == groups


def test_micro_batches_keep_to_their_limits() -> None:
    lengths = torch.randint(0, 2049, (500,), generator=torch.Generator().manual_seed(0)).tolist()
    groups = list(micro_batches(lengths, 16384))
    assert sorted(row for group in groups for row in group) == [row for row, length in enumerate(lengths) if length]
    computed = [len(group) * max(lengths[row] for row in group) for group in groups]
    padding = [total - sum(lengths[row] for row in group) for total, group in zip(computed, groups, strict=True)]
    assert max(computed) <= 16384 and max(padding) <= PADDING_LIMIT
    assert sum(computed) < 1.03 * sum(lengths)  # where whole rows would be 2.0 times as much


@pytest.mark.parametrize("kind", KINDS)
def test_every_payload_is_the_same_bits_again_and_fits_its_description(kind: Any, saved: Callable[..., Path]) -> None:
    request, settings = ragged(), config(saved("tied", torch.bfloat16), payload=kind, topk=5)
    first, second = (LocalTeacher(settings, SHARED, CPU) for _ in range(2))
    outputs = [teacher.collect(teacher.submit(request)) for teacher in (first, second, first)]
    for name, tensor in outputs[0].tensors.items():
        assert all(torch.equal(tensor, output.tensors[name]) for output in outputs[1:])
    info = first.info()
    assert info == second.info() and (info.payload, info.topk, info.dtype) == (kind, 5, "bfloat16")
    assert outputs[0].kind == kind and outputs[0].compute_s > 0
    assert outputs[0].num_bytes == request.num_loss_tokens * info.bytes_per_token
    info.check_output(outputs[0].tensors, request.num_loss_tokens)
    with pytest.raises(TeacherError, match=f"answered a {kind} request"):
        info.check_output(outputs[0].tensors, request.num_loss_tokens + 1)


@pytest.mark.parametrize("kind", KINDS)
def test_payload_error_is_that_of_the_exact_hidden_states(kind: Any, saved: Callable[..., Path]) -> None:
    request = ragged()
    teacher = LocalTeacher(config(saved("llama"), payload=kind, topk=5), SHARED, CPU)
    exact = score(TeacherModel(config(saved("llama")), SHARED, CPU), request)["hidden"]
    error = teacher.payload_error(request)
    assert error == pytest.approx(measured_error(kind, exact, teacher.head(), 5), rel=1e-5)
    assert (error > 0) == (kind not in ("hidden", "logits"))


@pytest.mark.parametrize("payload", ["hidden", "logits"])
def test_bfloat16_stays_bfloat16(payload: Any, saved: Callable[..., Path]) -> None:
    path, request = saved("llama", torch.bfloat16), batch()
    teacher = LocalTeacher(config(path, payload=payload), SHARED, CPU)
    values = teacher.collect(teacher.submit(request)).tensors[payload]
    logits = teacher.head().logits(values) if payload == "hidden" else values.float()
    assert values.dtype == torch.bfloat16 and teacher.info().dtype == "bfloat16"
    torch.testing.assert_close(logits, plain_logits(path, request), atol=0.3, rtol=0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_no_loss_positions_give_an_empty_answer(kind: Any, saved: Callable[..., Path]) -> None:
    teacher = LocalTeacher(config(saved("llama"), payload=kind, topk=5), SHARED, CPU)
    output, empty = teacher.collect(teacher.submit(collate([]))), teacher.info().empty_output(CPU)
    assert isinstance(output, TeacherOutput) and output.kind == empty.kind == kind
    shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in output.tensors.items()}
    assert shapes == {name: (tensor.shape, tensor.dtype) for name, tensor in empty.tensors.items()}
    assert teacher.tokens == output.num_bytes == 0 and teacher.payload_error(collate([])) == 0


def test_shards_other_than_the_leader_compute_and_keep_nothing(saved: Callable[..., Path]) -> None:
    shard = TeacherModel(config(saved("llama"), payload="topk", topk=5), SHARED, CPU, leader=False)
    shapes = forward_shapes(shard)
    assert score(shard, batch()) == {} and len(shapes) == 1


def test_answers_can_feed_a_backward_pass_and_the_teacher_gets_no_gradient(saved: Callable[..., Path]) -> None:
    teacher = TeacherModel(config(saved("llama")), SHARED, CPU)
    values = score(teacher, batch())["hidden"]
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
    model = load_causal_lm(config(saved("llama")))
    probabilities = self_test.self_test(model, head_of(model), "teacher").softmax(-1)
    assert info.dropped_mass == pytest.approx(float(probabilities[..., SHARED:].sum(-1).mean()), rel=1e-5)
    assert TeacherModel(config(saved("llama")), VOCAB, CPU).info().dropped_mass == 0

    with torch.no_grad():
        model.base_model.layers[1].self_attn.v_proj.weight[0, 0] += 0.1
    model.save_pretrained(tmp_path / "changed")
    changed = TeacherModel(config(tmp_path / "changed"), SHARED, CPU).info()
    assert changed.fingerprint != info.fingerprint and changed.probe_digest != info.probe_digest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8])
@pytest.mark.parametrize("shape", [(300, 70), (4096,), (11, 4096), (7,), (), (0, 3)])
def test_sums_over_all_bits_notice_every_change(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(0)
    weights = torch.randint(-100, 100, shape, generator=random).to(dtype)
    before = torch.cat([part.view(torch.uint8) for part in bit_sums(weights)])

    def same(changed: Tensor) -> bool:
        return torch.equal(torch.cat([part.view(torch.uint8) for part in bit_sums(changed)]), before)

    assert same(weights.clone())
    for place in torch.randint(0, max(1, weights.numel()), (20,), generator=random).tolist() if weights.numel() else []:
        changed = weights.clone().view(-1)
        changed.view(torch.uint8)[place] ^= 1
        assert not same(changed)
    if weights.ndim == 2 and weights.numel():
        assert not same(weights.roll(1, 0))
    odd = torch.cat([torch.zeros(1, dtype=dtype), weights.view(-1)])[1:]  # not where torch reads an int64
    assert same(odd)


def test_info_identifies_the_payload(saved: Callable[..., Path]) -> None:
    settings = [{"payload": kind} for kind in KINDS if kind != "topk"]
    settings += [{"payload": "topk", "topk": 5}, {"payload": "topk", "topk": 6}]
    infos = [TeacherModel(config(saved("llama"), **values), SHARED, CPU).info() for values in settings]
    assert len({info.fingerprint for info in infos}) == len({info.probe_digest for info in infos}) == 6
    assert len({info.head_digest for info in infos}) == 1
    assert TeacherModel(config(saved("llama"), topk=9), SHARED, CPU).info().fingerprint == infos[0].fingerprint
    assert [info.bytes_per_token for info in infos] == [128, 36, 36, 4 * SHARED, 38, 44]


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "gemma2"])
def test_packed_documents_do_not_see_each_other(name: str, saved: Callable[..., Path]) -> None:
    model = load_causal_lm(config(saved(name), attention="eager" if name == "gemma2" else "sdpa"))
    check_packing(probe_of(model, head_of(model), "teacher"))
    ids = torch.arange(10)[None]
    packed = {"input_ids": ids, "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5]])}
    alone = {"input_ids": ids[:, 4:], "position_ids": torch.arange(6)[None]}
    with torch.no_grad():
        torch.testing.assert_close(
            hidden_states(model, packed)[:, 4:], hidden_states(model, alone), atol=1e-5, rtol=1e-5
        )


def test_a_model_that_mixes_packed_documents_is_reported(saved: Callable[..., Path], monkeypatch: Any) -> None:
    model = load_causal_lm(config(saved("llama")))
    forward = model.base_model.forward

    def mixing(**inputs: Any) -> Any:
        return forward(**inputs, attention_mask=torch.ones_like(inputs["input_ids"]))

    monkeypatch.setattr(model.base_model, "forward", mixing)
    with pytest.raises(ModelError, match=r"data\.pack: false"):
        check_packing(probe_of(model, head_of(model), "teacher"))


def test_a_head_that_misses_a_transform_is_refused(saved: Callable[..., Path]) -> None:
    model = load_causal_lm(config(saved("gemma2"), attention="eager"))
    head = head_of(model)
    assert head.transform == LogitTransform(softcap=2.0)
    with pytest.raises(ModelError, match="cannot distil"):
        self_test.self_test(model, Head(head.weight, head.bias, LogitTransform()), "teacher")


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
        teacher.score(
            {"input_ids": tokens, "position_ids": torch.zeros_like(tokens)},
            torch.tensor(positions, dtype=torch.int64),
            torch.tensor([0]),
        )


def test_impossible_labels_are_refused(saved: Callable[..., Path]) -> None:
    teacher, request = TeacherModel(config(saved("llama"), payload="topk", topk=5), SHARED, CPU), batch()
    with pytest.raises(TeacherError, match="one label per loss position"):
        teacher.score(request.inputs, request.loss_positions, request.labels[1:])
    for label in (-1, SHARED):
        labels = request.labels.clone()
        labels[2] = label
        with pytest.raises(TeacherError, match=f"labels must lie in 0 to {SHARED - 1}"):
            teacher.score(request.inputs, request.loss_positions, labels)


def test_a_topk_without_a_tail_is_refused(saved: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match=rf"teacher\.topk = {SHARED} must be below"):
        TeacherModel(config(saved("llama"), payload="topk", topk=SHARED), SHARED, CPU)


def test_values_that_are_not_finite_are_refused(saved: Callable[..., Path]) -> None:
    teacher = LocalTeacher(config(saved("llama")), SHARED, CPU)
    with torch.no_grad():
        next(teacher._model.model.parameters())[3] = float("nan")  # the embedding of id 3
    row = Row([1, 2, 3, 4], [0, 1, 2, 3], [2, 3, 4, NO_LABEL])
    with pytest.raises(
        TeacherError,
        match=r"hidden \(payload hidden\) are not finite at . of 3 positions: .* float32; check .* teacher\.model",
    ):
        teacher.collect(teacher.submit(collate([row])))


def test_a_teacher_that_is_not_deterministic_is_refused(
    saved: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def noisy(model: Any, inputs: dict[str, Tensor]) -> Tensor:
        return hidden_states(model, inputs) + torch.randn(1) * 1e-6

    monkeypatch.setattr("taid_ray.teacher.model.hidden_states", noisy)
    for kind in ("hidden", "hidden_fp8", "topk"):
        with pytest.raises(TeacherError, match="is not deterministic"):
            TeacherModel(config(saved("llama"), payload=kind, topk=5), SHARED, CPU)


@pytest.mark.parametrize("attention", ["flash_attention_2", "flash_attention_3"])
def test_flash_attention_that_is_not_installed_is_explained(attention: Any, saved: Callable[..., Path]) -> None:
    with pytest.raises(
        ModelError, match=rf"^teacher\.attention = {attention} cannot be used .* teacher\.attention: auto"
    ):
        TeacherModel(config(saved("llama", torch.bfloat16), attention=attention), SHARED, CPU)
    with pytest.raises(
        ModelError, match=rf"^student\.attention = {attention} cannot be used .* student\.attention: auto"
    ):
        load_causal_lm(StudentConfig(model=str(saved("llama")), attention=attention))
    with pytest.raises(ImportError, match="flash"), explained_attention("sdpa", "student"):
        raise ImportError("another package lacks flash-attn")


def test_what_sharding_lacks_is_not_taken_for_the_attention(
    saved: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def lacking(source: TeacherConfig, device: Any) -> Any:
        raise ImportError("no DistributedConfig beside this flash-attn")

    monkeypatch.setattr(loading, "_placement", lacking)
    with pytest.raises(ImportError, match="DistributedConfig"):
        load_causal_lm(config(saved("llama"), attention="flash_attention_2"))


@pytest.fixture
def flash_like(saved: Callable[..., Path]) -> Any:
    """A bfloat16 model whose attention passes for transformers' flash attention: in inputs of one row it keeps packed
    documents apart, otherwise it takes every row for one document."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def run_in_thread(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
        return sdpa_attention_forward(module, query, key, value, mask if len(query) == 1 else None, **options)

    AttentionInterface.register("flash_like", run_in_thread)
    AttentionMaskInterface.register("flash_like", sdpa_mask)
    model = load_causal_lm(config(saved("llama", torch.bfloat16)))
    model.config._attn_implementation = "flash_like"
    return model


def test_flash_attention_keeps_packed_rows_apart(flash_like: Any) -> None:
    head = head_of(flash_like)
    check_packing(probe_of(flash_like, head, "teacher"))
    self_test.self_test(flash_like, head, "teacher")
    inputs = ragged().inputs
    with torch.no_grad():
        found = hidden_states(flash_like, inputs)
        mixed = flash_like.base_model(**inputs, use_cache=False)[0]  # what would happen without our care
        flash_like.config._attn_implementation = "sdpa"
        expected = hidden_states(flash_like, inputs)
    torch.testing.assert_close(found, expected, atol=0.1, rtol=0.05)
    assert float((mixed - expected).abs().max()) > 0.5


def test_a_model_on_its_way_to_a_gpu_is_tested_with_an_attention_that_runs(flash_like: Any) -> None:
    with pytest.raises(ModelError, match="bfloat16 or float16 only"):
        self_test.self_test(flash_like.float(), head_of(flash_like), "student")
    assert self_test.tested_head(flash_like, "student.model", packed=True).weight.shape == (VOCAB, 32)
    assert flash_like.config._attn_implementation == "flash_like"


def test_a_vocabulary_that_is_too_small_is_refused(saved: Callable[..., Path]) -> None:
    with pytest.raises(ModelError, match=f"{VOCAB} vocabulary rows"):
        TeacherModel(config(saved("llama")), VOCAB + 1, CPU)


def test_what_cannot_be_loaded_is_explained(saved: Callable[..., Path], tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelError, match=r"student\.model: no such directory \(found '/nowhere'\)"):
        load_causal_lm(StudentConfig(model="/nowhere"))
    with pytest.raises(ModelError, match=r"teacher\.model: .* has no config\.json"):
        load_tokenizer(config(tmp_path))
    with pytest.raises(ModelError, match=r"teacher\.shards = 4 does not divide the model's num_key_value_heads = 2"):
        load_causal_lm(config(saved("llama"), shards=4))
    with pytest.raises(ModelError, match=r"cannot be loaded\. A package is missing"):
        load_causal_lm(
            config(saved("llama"), quantization={"quant_method": "bitsandbytes", "load_in_4bit": True}), device=CPU
        )
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(ModelError, match=r"teacher\.model = .* cannot be loaded"):
        load_causal_lm(config(tmp_path))


def test_a_checkpoint_without_some_weights_is_refused(saved: Callable[..., Path], tmp_path: Path) -> None:
    model = load_causal_lm(config(saved("llama")))
    state = {name: tensor for name, tensor in model.state_dict().items() if "lm_head" not in name}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ModelError, match=r"no weights that fit 1 parameters .*lm_head"):
        load_causal_lm(config(tmp_path))


def test_devices() -> None:
    assert device.resolve("auto", False) == device.resolve("cpu", True) == "cpu"
    assert device.resolve("auto", True) == device.resolve("cuda", True) == "cuda"
    with pytest.raises(ClusterError, match="no node of the cluster has a GPU"):
        device.resolve("cuda", False)
    assert device.torch_device("cpu") == CPU
    with pytest.raises(ClusterError, match="sees"):
        device.torch_device("cuda", torch.cuda.device_count())
