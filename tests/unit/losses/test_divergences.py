import json
import math
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from taid_ray import losses
from taid_ray.config.objective import SETTINGS, LossName
from taid_ray.losses.registry import METHODS
from tests.support.entropy import target_entropy
from tests.support.paths import GOLDEN_FILE

GOLDEN = json.loads(GOLDEN_FILE.read_text())["loss"]
NAMES: tuple[str, ...] = get_args(LossName)
INF = math.inf


def logits(*shape: int, seed: int = 0, scale: float = 2.0, dtype: torch.dtype = torch.float32) -> Tensor:
    return (scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).to(dtype)


def labels_of(logits: Tensor) -> Tensor:
    """A label [N] for each row, among the first ids."""
    return torch.arange(len(logits)) % 2


def value_and_gradient(
    name: str, student: Tensor, teacher: Tensor, t: float = 0.4, labels: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    labels = labels_of(student) if labels is None else labels
    student = student.clone().requires_grad_()
    values = losses.divergence(name)(student, teacher, t, labels)
    (gradient,) = torch.autograd.grad(values.sum(), student)
    return values.detach(), gradient


def row(*probabilities: float) -> Tensor:
    return torch.tensor([probabilities]).log()


# --- golden values and hand-computed ones


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: f"{case['shape']}-t{case['t']}")
def test_matches_the_published_code(case: dict[str, Any]) -> None:
    student = torch.tensor(case["student_logits"]).view(case["shape"]).requires_grad_()
    teacher = torch.tensor(case["teacher_logits"]).view(case["shape"])
    mask = torch.tensor(case["mask"], dtype=torch.bool).view(case["shape"][:2])
    names = {"forward_kl": "forward_kl", "reverse_kl": "reverse_kl", "js": "js", "tvd": "tvd", "taid": "taid_loss"}
    names |= {"skew_forward_kl": "skew_fkl", "skew_reverse_kl": "skew_rkl"}
    for name, key in names.items():
        pair = student[mask], teacher[mask], case["t"]
        loss = (losses.divergence(name)(*pair) + target_entropy(name)(*pair)).mean()
        assert loss.item() == pytest.approx(case[key], abs=2e-6), name
    (gradient,) = torch.autograd.grad(losses.taid(student[mask], teacher[mask], case["t"]).mean(), student)
    assert torch.allclose(gradient.flatten(), torch.tensor(case["taid_grad"]), rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("forward_kl", 0.5 * math.log(2 / 3) + 0.5 * math.log(2)),
        ("reverse_kl", 0.75 * math.log(1.5) + 0.25 * math.log(0.5)),
        ("tvd", 0.25),
        ("js", 0.9 * (0.75 * math.log(0.75 / 0.725) + 0.25 * math.log(0.25 / 0.275))
            + 0.1 * (0.5 * math.log(0.5 / 0.725) + 0.5 * math.log(0.5 / 0.275))),
        ("skew_forward_kl", 0.5 * math.log(0.5 / 0.725) + 0.5 * math.log(0.5 / 0.275)),
        ("skew_reverse_kl", 0.75 * math.log(0.75 / 0.525) + 0.25 * math.log(0.25 / 0.475)),
    ],
)  # fmt: skip
def test_by_hand(name: str, expected: float) -> None:
    student, teacher = row(0.75, 0.25), row(0.5, 0.5)
    assert losses.divergence(name)(student, teacher, 0.0).item() == pytest.approx(expected, abs=1e-6)


def test_taid_by_hand() -> None:
    # halfway in logit space between odds 9:1 and 1:1 lie odds 3:1
    value = losses.taid(row(0.9, 0.1), row(0.5, 0.5), 0.5)
    assert value.item() == pytest.approx(0.75 * math.log(0.75 / 0.9) + 0.25 * math.log(0.25 / 0.1), abs=1e-6)
    entropy = target_entropy("taid")(row(0.9, 0.1), row(0.5, 0.5), 0.5)
    assert entropy.item() == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25), abs=1e-6)


def test_entropy_and_sft_by_hand() -> None:
    assert losses.entropy(row(0.25, 0.25, 0.5, 0.0)).item() == pytest.approx(1.5 * math.log(2))
    assert losses.sft(row(0.25, 0.75), torch.tensor([1])).item() == pytest.approx(-math.log(0.75))
    with pytest.raises((IndexError, RuntimeError)):
        losses.sft(row(0.25, 0.75), torch.tensor([-100]))


# --- properties of every loss


def test_the_registry_has_the_losses_of_the_configuration() -> None:
    student, teacher = logits(3, 5), logits(3, 5, seed=1)
    for name in NAMES:
        values = losses.divergence(name)(student, teacher, 0.3, labels_of(student))
        assert values.shape == (3,)
        assert target_entropy(name)(student, teacher, 0.3).shape == (3,)
        assert METHODS[name].settings.keys() == {key for key, having in SETTINGS.items() if name in having}
        for key in METHODS[name].settings:
            assert (losses.divergence(name, {key: 0.9})(student, teacher, 0.3, labels_of(student)) != values).any()
        for key in SETTINGS.keys() - METHODS[name].settings.keys():
            with pytest.raises(ValueError, match=key):
                losses.divergence(name, {key: 0.3})
    for function in (losses.divergence, losses.log_target):
        with pytest.raises(ValueError, match="kld"):
            function("kld")
    for weight in (-0.1, 1.5, math.nan):
        with pytest.raises(ValueError, match="weight"):
            losses.divergence("js", {"weight": weight})(student, teacher, 0.3)


def test_the_registry_has_the_defaults_of_the_functions() -> None:
    student, teacher, labels = logits(3, 5), logits(3, 5, seed=1), torch.arange(3)
    for name in NAMES:
        function = getattr(losses, name)
        others = {"taid": (0.3,), "taid_reverse_kl": (0.3,), "dkd": (labels,), "ctkd": (1.0,)}.get(name, ())
        options = {"temperature": 1.0} if name == "dkd" else {}
        expected = function(student, teacher, *others, **options)
        assert torch.equal(losses.divergence(name)(student, teacher, 0.3, labels), expected), name


@pytest.mark.parametrize("name", NAMES)
def test_is_positive_and_zero_at_equality(name: str) -> None:
    student, teacher = logits(50, 17), logits(50, 17, seed=1)
    assert (losses.divergence(name)(student, teacher, 0.4, labels_of(student)) > 1e-3).all()
    values, gradient = value_and_gradient(name, student, student + 3.0)
    tolerance = 1e-5 if name == "dkd" else 1e-6  # dkd has a factor of 8
    assert values.abs().max() < tolerance
    assert name == "tvd" or gradient.abs().max() < tolerance  # tvd has a kink at equality


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_computes_in_float32(name: str, dtype: torch.dtype) -> None:
    student, teacher = logits(6, 33, dtype=dtype), logits(6, 33, seed=1, dtype=dtype)
    values, gradient = value_and_gradient(name, student, teacher)
    exact, exact_gradient = value_and_gradient(name, student.double(), teacher.double())
    assert values.dtype == torch.float32 and gradient.dtype == dtype
    assert torch.allclose(values.double(), exact, rtol=2e-6, atol=1e-6)
    assert torch.allclose(gradient.double(), exact_gradient, rtol=1e-2 if dtype != torch.float32 else 1e-4, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_extreme_logits_stay_finite(name: str) -> None:
    sign = logits(8, 33).sign()
    for student, teacher in ((60 * sign, -60 * sign), (60 * sign, 60 * logits(8, 33, seed=1).sign())):
        values, gradient = value_and_gradient(name, student, teacher)
        assert values.isfinite().all() and gradient.isfinite().all() and (values >= 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_no_tokens(name: str) -> None:
    values, gradient = value_and_gradient(name, torch.zeros(0, 7), torch.zeros(0, 7))
    assert values.shape == (0,) and gradient.shape == (0, 7)


@pytest.mark.parametrize("name", NAMES)
def test_ids_have_no_order(name: str) -> None:
    student, teacher, order = (
        logits(5, 19),
        logits(5, 19, seed=1),
        torch.randperm(19, generator=torch.Generator().manual_seed(2)),
    )
    plain = value_and_gradient(name, student, teacher)
    labels = order.argsort()[labels_of(student)]
    permuted = value_and_gradient(name, student[:, order], teacher[:, order], labels=labels)
    assert torch.allclose(plain[0], permuted[0], rtol=1e-5)
    assert torch.allclose(plain[1][:, order], permuted[1], atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_the_teacher_gets_no_gradient(name: str) -> None:
    student, teacher = logits(3, 5).requires_grad_(), logits(3, 5, seed=1).requires_grad_()
    torch.autograd.backward(losses.divergence(name)(student, teacher, 0.4, labels_of(student)).sum())
    assert student.grad is not None and teacher.grad is None
    assert not target_entropy(name)(student, teacher, 0.4).requires_grad


@pytest.mark.parametrize("name", NAMES)
def test_gradient_is_the_derivative(name: str) -> None:
    # taid's target is held fixed, so its gradient is that of forward_kl to that target (next section)
    # adaptive_kl's weight and taid_reverse_kl's target are held fixed, too: test_limits has what their gradient belongs to
    if name == "adaptive_kl":
        return
    student, teacher = logits(3, 6, dtype=torch.float64), logits(3, 6, seed=1, dtype=torch.float64)
    t = 1.0 if name.startswith("taid") else 0.0
    loss, labels = losses.divergence(name), labels_of(student)
    assert torch.autograd.gradcheck(lambda z: loss(z, teacher, t, labels), student.requires_grad_())


# --- masked vocabulary

MASKS: dict[str, tuple[list[int], list[int]]] = {
    "student": ([1, 4], []),
    "teacher": ([], [1, 4]),
    "both": ([1], [1, 4]),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("t", [0.0, 0.4, 1.0])
def test_minus_infinity_gives_no_nan(name: str, mask: str, t: float) -> None:
    student, teacher = logits(4, 7), logits(4, 7, seed=1)
    student[:, MASKS[mask][0]], teacher[:, MASKS[mask][1]] = -INF, -INF
    values, gradient = value_and_gradient(name, student, teacher, t)
    assert not values.isnan().any() and gradient.isfinite().all()
    student_only, teacher_only = mask == "student", mask != "student"
    infinite = {
        "taid": t == 1 and student_only,
        "forward_kl": student_only,
        "ctkd": student_only,
        "reverse_kl": teacher_only,
        "taid_reverse_kl": t > 0 and teacher_only,
        "adaptive_kl": True,
        "dkd": student_only,
    }
    assert (values == INF).all() if infinite.get(name) else values.isfinite().all()
    assert not target_entropy(name)(student, teacher, t).isnan().any()


@pytest.mark.parametrize("name", NAMES)
def test_ids_excluded_by_both_sides_do_not_exist(name: str) -> None:
    student, teacher = logits(4, 7), logits(4, 7, seed=1)
    student[:, [2, 5]], teacher[:, [2, 5]] = -INF, -INF
    kept = [0, 1, 3, 4, 6]
    values, gradient = value_and_gradient(name, student, teacher)
    fewer, fewer_gradient = value_and_gradient(name, student[:, kept], teacher[:, kept])
    assert torch.allclose(values, fewer, rtol=1e-5) and torch.allclose(gradient[:, kept], fewer_gradient, atol=1e-6)
    assert (gradient[:, [2, 5]] == 0).all()


def test_taid_target_of_an_excluded_id() -> None:
    student, teacher = logits(4, 7), logits(4, 7, seed=1)
    student[:, 1], teacher[:, 4] = -INF, -INF
    kept = [0, 2, 3, 5, 6]
    target = torch.zeros(4, 7)
    target[:, kept] = torch.softmax(0.6 * student[:, kept] + 0.4 * teacher[:, kept], -1)
    _, gradient = value_and_gradient("taid", student, teacher)
    assert torch.allclose(gradient, student.softmax(-1) - target, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_a_probability_of_almost_nothing_is_none(name: str) -> None:
    tiny, excluded = torch.tensor([[0.0, 1.0, -300.0]]), torch.tensor([[1.0, 0.0, -INF]])
    for student, teacher in ((tiny, excluded), (excluded, tiny)):
        values, gradient = value_and_gradient(name, student, teacher)
        assert values.isfinite().all() and gradient.isfinite().all()


def test_taid_without_a_shared_id_is_infinite() -> None:
    values, gradient = value_and_gradient("taid", torch.tensor([[1.0, -INF]]), torch.tensor([[-INF, 1.0]]))
    assert values.item() == INF and gradient.isfinite().all()


# --- identities


@pytest.mark.parametrize("t", [0.0, 0.25, 0.7, 1.0])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_taid_gradient_is_q_minus_target(t: float, as_tensor: bool) -> None:
    student, teacher = logits(9, 21).requires_grad_(), logits(9, 21, seed=1)
    target = torch.softmax((1 - t) * student.detach() + t * teacher, -1)
    values = losses.taid(student, teacher, torch.tensor(t) if as_tensor else t)
    (gradient,) = torch.autograd.grad(values.sum(), student)
    assert torch.allclose(gradient, student.detach().softmax(-1) - target, atol=3e-7)


def test_taid_ends() -> None:
    student, teacher = logits(9, 21), logits(9, 21, seed=1)
    assert torch.equal(losses.taid(student, teacher, 1.0), losses.forward_kl(student, teacher))
    assert torch.equal(target_entropy("taid")(student, teacher, 1.0), losses.entropy(teacher))
    assert torch.equal(losses.taid(student, teacher, 0.0), torch.zeros(9))
    assert torch.equal(target_entropy("taid")(student, teacher, 0.0), losses.entropy(student))


@pytest.mark.parametrize("t", [-0.1, 1.1, math.nan])
def test_taid_refuses_t_outside_its_range(t: float) -> None:
    with pytest.raises(ValueError, match="within"):
        losses.taid(logits(2, 3), logits(2, 3), t)


def test_js_is_symmetric_at_one_half() -> None:
    a, b = logits(9, 21), logits(9, 21, seed=1)
    assert torch.allclose(losses.js(a, b, 0.5), losses.js(b, a, 0.5), rtol=1e-5)


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_js_vanishes_at_its_ends(weight: float) -> None:
    a, b = logits(9, 21), logits(9, 21, seed=1)
    b[:, 3] = -INF
    assert losses.js(a, b, weight).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("skew", "limit"), [(losses.skew_forward_kl, losses.forward_kl), (losses.skew_reverse_kl, losses.reverse_kl)]
)
def test_skew_limits(skew: Callable[..., Tensor], limit: Callable[[Tensor, Tensor], Tensor]) -> None:
    student, teacher = logits(9, 21), logits(9, 21, seed=1)
    assert torch.equal(skew(student, teacher, 0.0), limit(student, teacher))
    assert torch.allclose(skew(student, teacher, 1e-6), limit(student, teacher), rtol=1e-3)
    assert skew(student, teacher, 1.0).abs().max() < 1e-6


def test_reverse_kl_is_forward_kl_the_other_way_round() -> None:
    student, teacher = logits(9, 21), logits(9, 21, seed=1)
    assert torch.equal(losses.reverse_kl(student, teacher), losses.forward_kl(teacher, student))
