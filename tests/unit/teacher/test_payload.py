from typing import Any

import pytest
import torch
from torch import Tensor

from taid_ray.errors import ConfigError, TeacherError
from taid_ray.losses import TopK
from taid_ray.losses.chunked import chunked_loss, chunked_scores
from taid_ray.losses.objective import Objective
from taid_ray.losses.projection import LogitTransform, Projection
from taid_ray.models.head import Head
from taid_ray.teacher import payload
from taid_ray.teacher.payload import (
    PayloadFormat,
    TeacherOutput,
    bytes_per_token,
    check_output,
    check_topk,
    dequantized,
    encode,
    measured_error,
    needs_head,
)
from taid_ray.teacher.wire import pack, unpack

CPU = torch.device("cpu")
N, H, V, K = 37, 32, 101, 8
KINDS: list[Any] = ["hidden", "hidden_int8", "hidden_fp8", "topk", "logits"]


def form(kind: Any, dtype: torch.dtype = torch.float32) -> PayloadFormat:
    return PayloadFormat(kind, H, V, K, dtype)


def example(dtype: torch.dtype = torch.float32, spread: float = 1.0) -> tuple[Tensor, Head, Tensor]:
    """Hidden states, a head with bias and transform, labels."""
    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, H, generator=random) * spread
    weight, bias = torch.randn(V, H, generator=random) * 0.5, torch.randn(V, generator=random)
    head = Head(weight.to(dtype), bias.to(dtype), LogitTransform(scale=0.5, softcap=30.0))
    return hidden.to(dtype), head, torch.randint(0, V, (N,), generator=random)


@pytest.fixture(params=["whole", "in small chunks"])
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param != "whole":
        monkeypatch.setattr(payload, "CHUNK_BYTES", 5 * V * 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_every_payload_survives_the_wire_and_becomes_a_target(kind: Any, dtype: torch.dtype, chunks: None) -> None:
    hidden, head, labels = example(dtype)
    tensors = encode(kind, hidden, head, labels, K)
    check_output(tensors, form(kind, dtype), N)
    arrived = TeacherOutput(kind, {name: unpack(pack(tensor)) for name, tensor in tensors.items()}).to(CPU)
    assert arrived.num_bytes == N * bytes_per_token(kind, H, V, K, dtype.itemsize)
    target = arrived.target(head if needs_head(kind) else None)
    if kind == "topk":
        assert isinstance(target, TopK) and target.log_probs.shape == target.ids.shape == (N, K)
        return
    assert isinstance(target, Projection) and target.hidden.dtype == dtype
    if kind == "logits":
        assert target.head is None
        torch.testing.assert_close(target.hidden, head.logits(hidden).to(dtype))
    else:
        assert target.head is head.weight and target.bias is head.bias and target.transform is head.transform
    if kind == "hidden":
        assert target.hidden.data_ptr() == hidden.data_ptr()  # nothing was copied on the way


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_losses_take_every_payload_and_leave_it_as_it_is(dtype: torch.dtype) -> None:
    """What arrives lies in shared memory, where nobody may write."""
    hidden, head, labels = example(dtype)
    student = Projection(torch.randn(N, 16, requires_grad=True), torch.randn(V, 16, requires_grad=True))
    objective = Objective("taid", torch.tensor(0.4))
    found = {}
    for kind in KINDS:
        tensors = encode(kind, hidden, head, labels, K)
        copies = {name: tensor.clone() for name, tensor in tensors.items()}
        target = TeacherOutput(kind, tensors).target(head)
        loss, _ = chunked_loss(objective, student, target, labels, chunk_tokens=7)
        loss.backward()
        scores = chunked_scores(student, target, labels, chunk_tokens=7)
        found[kind] = torch.stack([loss.detach().double(), scores.kl, scores.teacher_ce])
        assert all(torch.equal(tensor, copies[name]) for name, tensor in tensors.items())
    exact = (
        1e-6 if dtype == torch.float32 else 1e-2
    )  # payload logits are rounded to the teacher's dtype after the transform
    torch.testing.assert_close(found["logits"], found["hidden"], rtol=exact, atol=0)
    torch.testing.assert_close(found["hidden_int8"], found["hidden"], rtol=0.01, atol=0)
    torch.testing.assert_close(found["hidden_fp8"], found["hidden"], rtol=0.03, atol=0)
    torch.testing.assert_close(found["topk"][2], found["hidden"][2], rtol=1e-6, atol=0)
    assert bool((found["topk"][:2] <= found["hidden"][:2] * 1.01).all())  # merging ids never adds divergence


@pytest.mark.parametrize("kind", KINDS)
def test_no_positions(kind: Any) -> None:
    hidden, head, labels = example(torch.bfloat16)
    empty = form(kind, torch.bfloat16).empty(CPU)
    for tensors in (empty.tensors, encode(kind, hidden[:0], head, labels[:0], K)):
        check_output(tensors, form(kind, torch.bfloat16), 0)
    assert empty.num_bytes == 0 and measured_error(kind, hidden[:0], head, K) == 0
    empty.target(head)


@pytest.mark.parametrize(("kind", "largest", "step"), [("hidden_int8", 127, 0.5), ("hidden_fp8", 448, 16)])
def test_quantised_values_lie_within_half_a_step(kind: Any, largest: float, step: float, chunks: None) -> None:
    """float8_e4m3fn has 3 bits of mantissa: steps of 32 up to 448."""
    hidden, head, labels = example(spread=3.0)
    hidden[5] *= 1e4
    tensors = encode(kind, hidden, head, labels, K)
    torch.testing.assert_close(tensors["scale"], hidden.abs().amax(-1) / largest)
    assert float(tensors["values"].float().abs().amax(-1).min()) == largest
    error = (dequantized(tensors["values"], tensors["scale"], torch.float32) - hidden).abs()
    assert bool((error <= step * tensors["scale"][:, None] * 1.00001).all())


@pytest.mark.parametrize("kind", ["hidden_int8", "hidden_fp8"])
def test_positions_of_zeros_and_of_tiny_values_stay_finite(kind: Any) -> None:
    _, head, labels = example()
    hidden = torch.zeros(3, H)
    hidden[1], hidden[2] = 1e-44, 3e38
    output = TeacherOutput(kind, encode(kind, hidden, head, labels[:3], K))
    check_output(output.tensors, form(kind), 3)
    target = output.target(head)
    assert isinstance(target, Projection)
    torch.testing.assert_close(target.hidden, hidden, atol=1e-30, rtol=1e-6)


def test_topk_holds_the_largest_the_label_and_the_tail(chunks: None) -> None:
    hidden, head, labels = example()
    exact = head.logits(hidden).double().log_softmax(-1)
    best = exact.topk(K)
    tensors = encode("topk", hidden, head, labels, K)
    order = best.indices.argsort(-1)
    ids = best.indices.gather(1, best.indices.argsort(-1))
    assert torch.equal(tensors["ids"].long(), ids) and bool((ids.diff(dim=-1) > 0).all())
    assert torch.equal(tensors["log_probs"], best.values.gather(1, order).float().bfloat16())
    torch.testing.assert_close(
        tensors["label_log_probs"].double(), exact.gather(1, labels[:, None])[:, 0], atol=3e-6, rtol=0
    )
    tail = exact.scatter(1, ids, float("-inf")).logsumexp(-1)
    torch.testing.assert_close(tensors["log_tail"].double(), tail, atol=3e-6, rtol=0)


@pytest.mark.parametrize("gap", [20.0, 60.0, 1000.0])
def test_a_tiny_tail_keeps_its_mass(gap: float) -> None:
    """1 - sum(p) would be 0 or noise here; at 1,000 even the mass itself is below the smallest float."""
    logits = torch.full((1, V), -gap)
    logits[0, :K] = 0.0
    head = Head(torch.eye(V), None, LogitTransform())
    log_tail = encode("topk", logits, head, torch.zeros(1, dtype=torch.int64), K)["log_tail"]
    expected = torch.tensor([-gap]).double() + torch.tensor([(V - K) / K]).double().log()
    torch.testing.assert_close(log_tail.double(), expected, atol=1e-5, rtol=1e-6)


def test_excluded_ids_leave_an_empty_tail() -> None:
    logits = torch.full((2, V), float("-inf"))
    logits[:, :K] = torch.randn(2, K)
    tensors = payload._topk(logits, torch.zeros(2, dtype=torch.int64), K)
    assert tensors["log_tail"].tolist() == [float("-inf")] * 2
    check_output(tensors, form("topk"), 2)


def test_of_equal_logits_the_first_ids_are_sent() -> None:
    logits = torch.zeros(2, V)
    logits[1, [3, 90]] = 1.0
    ids = payload._topk(logits, torch.zeros(2, dtype=torch.int64), 4)["ids"]
    assert ids.tolist() == [[0, 1, 2, 3], [0, 1, 3, 90]]


def test_measured_error(chunks: None) -> None:
    hidden, head, labels = example()
    exact = head.logits(hidden).double().log_softmax(-1)
    assert measured_error("hidden", hidden, head, K) == measured_error("logits", hidden, head, K) == 0
    errors = []
    for kind in ("hidden_int8", "hidden_fp8"):
        target = TeacherOutput(kind, encode(kind, hidden, head, labels, K)).target(head)
        assert isinstance(target, Projection)
        carried = head.logits(target.hidden).double().log_softmax(-1)
        errors.append(measured_error(kind, hidden, head, K))
        assert errors[-1] == pytest.approx(float((exact.exp() * (exact - carried)).sum(-1).mean()), abs=2e-7)
    assert 0 < errors[0] < 1e-3 and errors[0] < errors[1] < 3e-2
    tail = 1 - exact.topk(K).values.exp().sum(-1).mean()
    assert measured_error("topk", hidden, head, K) == pytest.approx(float(tail), rel=1e-5)


def test_an_id_the_teacher_excludes_does_not_spoil_the_measured_error() -> None:
    hidden, head, _ = example()
    bias = torch.zeros(V)
    bias[4] = float("-inf")
    error = measured_error("hidden_int8", hidden, Head(head.weight, bias, LogitTransform()), K)
    assert 0 < error < 1e-2


def test_bytes_per_token_at_the_sizes_of_qwen_32b() -> None:
    found = {kind: bytes_per_token(kind, 5120, 152_064, 64, 2) for kind in KINDS}
    assert found == {"hidden": 10_240, "hidden_int8": 5_124, "hidden_fp8": 5_124, "topk": 392, "logits": 304_128}


def test_topk_must_leave_a_tail() -> None:
    check_topk(V - 1, V)
    with pytest.raises(ConfigError, match=r"teacher\.topk = 101 must be below the 101 ids"):
        check_topk(V, V)


@pytest.mark.parametrize(
    ("kind", "name", "value", "fine"),
    [
        ("hidden", "hidden", float("nan"), False),
        ("hidden", "hidden", float("-inf"), False),
        ("logits", "logits", float("-inf"), True),
        ("logits", "logits", float("inf"), False),
        ("logits", "logits", float("nan"), False),
        ("hidden_int8", "scale", float("inf"), False),
        ("hidden_fp8", "scale", float("nan"), False),
        ("hidden_fp8", "values", float("nan"), False),
        ("topk", "log_tail", float("-inf"), True),
        ("topk", "log_tail", float("nan"), False),
        ("topk", "log_probs", float("-inf"), False),
        ("topk", "label_log_probs", float("nan"), False),
    ],
)
def test_only_finite_values_are_sent(kind: Any, name: str, value: float, fine: bool) -> None:
    tensors = encode(kind, *example(), K)
    tensors[name].view(N, -1)[3, 0] = value
    if fine:
        check_output(tensors, form(kind), N)
    else:
        with pytest.raises(TeacherError, match=rf"{name} .* not finite at 1 of {N} positions"):
            check_output(tensors, form(kind), N)


LARGEST, SMALLEST = torch.iinfo(torch.int32).max, torch.iinfo(torch.int32).min


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (0, -1), (0, SMALLEST), (K - 1, V), (K - 1, LARGEST),  # outside
        (3, SMALLEST), (3, LARGEST), (3, "left"), (3, "right"),  # not ascending
    ],
)  # fmt: skip
def test_ids_must_ascend_within_the_vocabulary(place: int, value: Any) -> None:
    tensors = encode("topk", *example(), K)
    check_output(tensors, form("topk"), N)
    ids = tensors["ids"]
    ids[3, place] = {"left": ids[3, 2], "right": ids[3, 4]}.get(value, value)
    with pytest.raises(TeacherError, match=rf"ids .* do not ascend within 0 to {V - 1} at 1 of {N} positions"):
        check_output(tensors, form("topk"), N)


def test_one_id_per_position_is_enough() -> None:
    found = PayloadFormat("topk", H, V, 1, torch.float32)
    check_output(encode("topk", *example(), 1), found, N)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", KINDS)
def test_hidden_states_that_are_not_finite_are_noticed_in_every_payload(kind: Any, value: float) -> None:
    hidden, head, labels = example()
    hidden[3, 0] = value
    tensors = encode(kind, hidden, Head(head.weight, None, LogitTransform()), labels, K)
    with pytest.raises(TeacherError, match=rf"not finite at 1 of {N}"):
        check_output(tensors, form(kind), N)


def test_answers_of_another_shape_are_refused() -> None:
    hidden, head, labels = example()
    tensors = encode("hidden_int8", hidden, head, labels, K)
    check_output(tensors, form("hidden_int8"), N)
    for wrong, number in (
        (tensors, N - 1),
        (tensors | {"values": tensors["values"][:, 1:]}, N),
        (tensors | {"scale": tensors["scale"].double()}, N),
        ({"values": tensors["values"]}, N),
        ({"hidden": hidden}, N),
    ):
        with pytest.raises(TeacherError, match=r"instead of values \[\d+, 32\] int8, scale \[\d+\] float32"):
            check_output(wrong, form("hidden_int8"), number)
