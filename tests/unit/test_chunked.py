from collections import Counter
from collections.abc import Sequence
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from taid_ray import losses
from taid_ray.chunked import LogitTransform, chunked_loss, chunked_scores
from taid_ray.config import LossName
from taid_ray.errors import ConfigError

NAMES: tuple[str, ...] = get_args(LossName)
N, V, HS, HT, T = 23, 31, 6, 10, 0.4
SOFTCAP = LogitTransform(scale=0.5, softcap=3.0)


class Case:
    """Random student and teacher; `options` are keyword arguments of chunked_loss."""

    def __init__(
        self, n: int = N, v: int = V, dtype: torch.dtype = torch.float32, bias: bool = False, **options: Any
    ) -> None:
        generator = torch.Generator().manual_seed(n + v)

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        self.hidden, self.head = randn(n, HS).requires_grad_(), randn(v, HS).requires_grad_()
        self.teacher_hidden, self.teacher_head = randn(n, HT), randn(v, HT)
        self.bias = randn(v).requires_grad_() if bias else None
        self.teacher_bias = randn(v) if bias else None
        self.labels = torch.randint(v, (n,), generator=generator)
        self.options = options

    @property
    def trained(self) -> list[Tensor]:
        return [x for x in (self.hidden, self.head, self.bias) if x is not None and x.requires_grad]

    def chunked(self, name: str = "taid", **changes: Any) -> Any:
        options: dict[str, Any] = {
            "t": T,
            "student_bias": self.bias,
            "teacher_bias": self.teacher_bias,
            "chunk_tokens": 5,
        }
        options |= self.options | changes
        return chunked_loss(name, self.hidden, self.head, self.teacher_hidden, self.teacher_head, **options)

    def logits(self) -> tuple[Tensor, Tensor]:
        """The plain form: whole [N, V] matrices."""
        student = F.linear(self.hidden, self.head, self.bias).to(torch.promote_types(self.hidden.dtype, torch.float32))
        teacher = F.linear(self.teacher_hidden, self.teacher_head, self.teacher_bias).to(student.dtype)
        transforms: list[LogitTransform] = [
            self.options.get(f"{side}_transform", LogitTransform()) for side in ("student", "teacher")
        ]
        return transforms[0](student), transforms[1](teacher)

    def plain(self, name: str = "taid") -> Tensor:
        student, teacher = self.logits()
        share: float = self.options.get("sft_weight", 0.0)
        values = losses.divergence(name, self.options.get("weight"))(student, teacher, self.options.get("t", T))
        return ((1 - share) * values + share * losses.sft(student, self.labels)).sum()


def assert_same(case: Case, chunked: Tensor, plain: Tensor, tolerance: float = 1e-6) -> None:
    """Values and gradients agree relative to their norm: single entries of two float32 sums may differ by a few ulp more."""
    factor = 1.7  # an incoming gradient other than 1
    got = [chunked, *torch.autograd.grad(factor * chunked, case.trained)]
    expected = [plain, *torch.autograd.grad(factor * plain, case.trained)]
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert (a.double() - b.double()).norm() <= tolerance * b.double().norm()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("chunk_tokens", [1, 5, N, 1000])
def test_equals_the_logits_form(name: str, chunk_tokens: int) -> None:
    case = Case(dtype=torch.float64, chunk_tokens=chunk_tokens)
    assert_same(case, case.chunked(name), case.plain(name), 1e-13)
    case = Case(chunk_tokens=chunk_tokens)
    assert_same(case, case.chunked(name), case.plain(name))


VARIANTS: dict[str, dict[str, Any]] = {
    "bias": {"bias": True},
    "softcap": {"student_transform": SOFTCAP, "teacher_transform": LogitTransform(scale=2.0)},
    "teacher softcap": {"teacher_transform": SOFTCAP, "bias": True},
    "t=0": {"t": 0.0, "sft_weight": 0.2},
    "t=1": {"t": 1.0},
    "tensor t": {"t": torch.tensor(0.25)},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_options_equal_the_logits_form(variant: str) -> None:
    case = Case(**VARIANTS[variant])
    case.options |= {"labels": case.labels}
    assert_same(case, case.chunked(), case.plain())


@pytest.mark.parametrize("sft_weight", [0.3, 1.0])
@pytest.mark.parametrize("name", ["taid", "reverse_kl"])
def test_cross_entropy_on_labels(name: str, sft_weight: float) -> None:
    case = Case(sft_weight=sft_weight)
    case.options |= {"labels": case.labels}
    assert_same(case, case.chunked(name), case.plain(name))


def test_weight_reaches_the_divergence() -> None:
    case = Case(weight=0.6)
    assert_same(case, case.chunked("js"), case.plain("js"))


def test_no_share_of_an_infinite_term() -> None:
    case = Case(sft_weight=1.0)
    case.teacher_hidden, case.teacher_head = case.logits()[1].detach(), None  # type: ignore[assignment]
    case.teacher_hidden[:, 0] = -torch.inf
    assert case.chunked("reverse_kl", labels=case.labels).isfinite()


def test_teacher_logits_instead_of_hidden_states() -> None:
    case = Case()
    expected = case.plain()
    case.teacher_hidden, case.teacher_head = case.logits()[1].detach(), None  # type: ignore[assignment]
    assert_same(case, case.chunked(), expected)


@pytest.mark.parametrize("frozen", [["head"], ["hidden"], ["bias"], ["hidden", "bias"]])
def test_frozen_tensors_get_no_gradient(frozen: list[str]) -> None:
    case = Case(bias=True)
    for name in frozen:
        getattr(case, name).requires_grad_(False)
    assert_same(case, case.chunked(), case.plain())
    case.chunked().backward()
    assert all(getattr(case, name).grad is None for name in frozen)


def test_tied_head() -> None:
    case = Case()
    table, ids = case.head, case.labels
    case.hidden, case.head = table[ids].tanh(), table
    (got,) = torch.autograd.grad(case.chunked(), table, retain_graph=True)
    (expected,) = torch.autograd.grad(case.plain(), table)
    assert (got - expected).norm() <= 1e-6 * expected.norm()


def test_gradient_is_the_derivative() -> None:
    case = Case(n=4, v=5, dtype=torch.float64, bias=True, student_transform=SOFTCAP, chunk_tokens=3)

    def loss(hidden: Tensor, head: Tensor, bias: Tensor) -> Tensor:
        case.hidden, case.head, case.bias = hidden, head, bias
        result: Tensor = case.chunked("js")
        return result

    assert torch.autograd.gradcheck(loss, tuple(case.trained))


def test_bfloat16() -> None:
    case = Case(dtype=torch.bfloat16, bias=True)
    chunked = case.chunked()
    assert chunked.dtype == torch.float32
    assert_same(case, chunked, case.plain(), 0.02)
    assert chunked.item() == pytest.approx(case.plain().item(), rel=1e-6)


def test_head_of_another_dtype_follows_the_hidden_states() -> None:
    case, low = Case(), Case(dtype=torch.bfloat16)
    case.hidden, case.teacher_hidden = low.hidden, low.teacher_hidden
    loss = case.chunked()
    assert loss.item() == low.chunked().item()
    loss.backward()
    assert case.head.grad is not None and case.head.grad.dtype == torch.float32
    assert low.hidden.grad is not None and low.hidden.grad.dtype == torch.bfloat16


def test_works_under_autocast() -> None:
    case = Case()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = case.chunked()
    loss.backward()
    assert loss.item() == pytest.approx(case.plain().item(), rel=0.02)
    assert case.head.grad is not None and case.head.grad.dtype == torch.float32


def test_no_tokens_keep_the_graph() -> None:
    case = Case(n=0, bias=True)
    loss, parts = case.chunked(return_parts=True, labels=case.labels)
    assert loss.item() == 0 and parts.tokens.item() == 0 and parts.kl.item() == 0
    loss.backward()
    for tensor in case.trained:
        assert tensor.grad is not None and (tensor.grad == 0).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("with_labels", [False, True])
def test_parts(name: str, with_labels: bool) -> None:
    case = Case(student_transform=SOFTCAP)
    loss, parts = case.chunked(name, return_parts=True, labels=case.labels if with_labels else None)
    student, teacher = (x.detach() for x in case.logits())
    expected = [losses.divergence(name)(student, teacher, T), losses.target_entropy(name)(student, teacher, T)]
    expected.append(losses.sft(student, case.labels) if with_labels else torch.zeros(N))
    for got, values in zip((parts.kl, parts.entropy, parts.sft), expected, strict=True):
        assert got.dtype == torch.float64 and got.shape == () and not got.requires_grad
        assert got.item() == pytest.approx(values.sum().item(), rel=1e-6)
    assert parts.tokens.item() == N and loss.item() == pytest.approx(parts.kl.item())
    assert loss.requires_grad


def test_scores() -> None:
    case = Case(bias=True, student_transform=SOFTCAP)
    student, teacher = (x.detach() for x in case.logits())
    scores = chunked_scores(
        case.hidden, case.head, case.teacher_hidden, case.teacher_head, case.labels, chunk_tokens=7,
        student_bias=case.bias, teacher_bias=case.teacher_bias, student_transform=SOFTCAP,
    )  # fmt: skip
    assert scores.student_ce.item() == pytest.approx(F.cross_entropy(student, case.labels, reduction="sum").item())
    assert scores.teacher_ce.item() == pytest.approx(F.cross_entropy(teacher, case.labels, reduction="sum").item())
    assert scores.kl.item() == pytest.approx(losses.forward_kl(student, teacher).sum().item(), rel=1e-6)
    assert scores.tokens.item() == N and not scores.kl.requires_grad


class Watch(TorchDispatchMode):
    """Records the size of the largest tensor that any operation creates, and which operations run."""

    def __init__(self) -> None:
        super().__init__()
        self.largest, self.operations = 0, Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.operations[str(func)] += 1
        self.largest = max([self.largest, *(x.numel() for x in tree_leaves(result) if isinstance(x, Tensor))])
        return result


@pytest.mark.parametrize("name", NAMES)
def test_logits_of_all_tokens_never_exist(name: str) -> None:
    case = Case(n=200, v=100, chunk_tokens=8)
    with Watch() as watch:
        loss, _ = case.chunked(name, return_parts=True, labels=case.labels, sft_weight=0.1)
        loss.backward()
        chunked_scores(case.hidden, case.head, case.teacher_hidden, case.teacher_head, case.labels, chunk_tokens=8)
    assert 8 * 100 <= watch.largest <= 200 * HT  # the largest tensor is an input, not a matrix of logits
    with Watch() as watch:
        case.plain(name)
    assert watch.largest == 200 * 100


def test_no_gradients_without_grad_mode() -> None:
    case = Case()
    with Watch() as watch, torch.no_grad():
        loss = case.chunked()
    assert not loss.requires_grad and not any("backward" in operation for operation in watch.operations)
    with Watch() as watch:
        assert case.chunked().item() == loss.item()
    assert any("backward" in operation for operation in watch.operations)


@pytest.mark.parametrize(("frozen", "matmuls"), [(None, 4), ("head", 3), ("hidden", 3)])
def test_matmuls_per_chunk(frozen: str | None, matmuls: int) -> None:
    case = Case(n=20, chunk_tokens=5)
    if frozen:
        getattr(case, frozen).requires_grad_(False)
    with Watch() as watch:
        case.chunked().backward()
    assert watch.operations["aten.mm.default"] == matmuls * 4


def test_bad_arguments() -> None:
    case = Case()
    for changes in ({"sft_weight": 0.5}, {"sft_weight": 1.5, "labels": case.labels}, {"chunk_tokens": 0}, {"t": 2.0}):
        with pytest.raises(ValueError):
            case.chunked(**changes)
    with pytest.raises(ConfigError):
        case.chunked("kld")
    with pytest.raises(ValueError, match="tokens"):
        case.chunked(labels=case.labels[1:])
    case.teacher_head = case.teacher_head[:-1]
    with pytest.raises(ValueError, match="slice both"):
        case.chunked()
