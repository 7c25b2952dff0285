"""Gradients against finite differences in float64, and limits in which a loss is another one, or has a known value."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from taid_ray import losses
from taid_ray.losses.adaptive_kl import head_weight

Loss = Callable[[Tensor, Tensor], Tensor]
LABELS = torch.tensor([2, 0, 5, 2])
TEMPERATURES = (0.7, 3.0)
INF = math.inf


def logits(seed: int, n: int = 4, v: int = 6) -> Tensor:
    return 2 * torch.randn(n, v, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def frozen_weight(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Adaptive KL whose weight does not move with the student: what its gradient is the derivative of."""
    p, q = ((x / temperature).softmax(-1) for x in (teacher, logits(0)))
    weight = head_weight(p, q, 0.5)
    forward, reverse = (f(student, teacher, temperature) for f in (losses.forward_kl, losses.reverse_kl))
    return weight * forward + (1 - weight) * reverse


def frozen_target(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """TAID with reverse KL whose target does not move with the student."""
    return losses.reverse_kl(student, 0.6 * logits(0) + 0.4 * teacher, temperature)


# The loss, and the function that its gradient is the derivative of, at a temperature.
DIFFERENTIABLE: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    name: (function, function)
    for name, function in {
        "forward_kl": losses.forward_kl,
        "reverse_kl": losses.reverse_kl,
        "tvd": losses.tvd,
        "js": lambda z, tau, temperature: losses.js(z, tau, temperature=temperature),
        "gkd": lambda z, tau, temperature: losses.gkd(z, tau, 0.3, temperature),
        "gkd-0": lambda z, tau, temperature: losses.gkd(z, tau, 0.0, temperature),
        "gkd-1": lambda z, tau, temperature: losses.gkd(z, tau, 1.0, temperature),
        "skew_forward_kl": lambda z, tau, temperature: losses.skew_forward_kl(z, tau, 0.2, temperature),
        "skew_reverse_kl": lambda z, tau, temperature: losses.skew_reverse_kl(z, tau, 0.2, temperature),
        "dkd": lambda z, tau, temperature: losses.dkd(z, tau, LABELS, 0.7, 3.0, temperature),
        "ctkd": losses.ctkd,
    }.items()
} | {
    "adaptive_kl": (lambda z, tau, temperature: losses.adaptive_kl(z, tau, 0.5, temperature), frozen_weight),
    "taid_reverse_kl": (lambda z, tau, temperature: losses.taid_reverse_kl(z, tau, 0.4, temperature), frozen_target),
}


@pytest.mark.parametrize("name", DIFFERENTIABLE)
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_gradient_is_the_derivative(name: str, temperature: float) -> None:
    loss, primitive = DIFFERENTIABLE[name]
    student, teacher = logits(0).requires_grad_(), logits(1)
    (gradient,) = torch.autograd.grad(loss(student, teacher, temperature).sum(), student)
    step = 1e-6
    for index in range(student.numel()):
        change = torch.zeros(student.numel(), dtype=torch.float64)
        change[index] = step
        up, down = (
            primitive(student.detach() + sign * change.view_as(student), teacher, temperature).sum() for sign in (1, -1)
        )
        assert gradient.flatten()[index].item() == pytest.approx((up - down).item() / (2 * step), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "tvd", "js", "gkd", "skew_forward_kl", "skew_reverse_kl"])
def test_a_temperature_divides_the_logits_of_both_sides(name: str) -> None:
    loss, _ = DIFFERENTIABLE[name]
    student, teacher = logits(0), logits(1)
    torch.testing.assert_close(loss(student, teacher, 4.0), loss(student / 4, teacher / 4, 1.0))
    torch.testing.assert_close(loss(student, teacher, torch.tensor(4.0)), loss(student, teacher, 4.0))
    assert not torch.allclose(loss(student, teacher, 4.0), loss(student, teacher, 1.0))


@pytest.mark.parametrize("name", DIFFERENTIABLE)
@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, INF])
def test_a_temperature_that_is_not_above_0_is_refused(name: str, temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature must be above 0"):
        DIFFERENTIABLE[name][0](logits(0), logits(1), temperature)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_identical_models_have_nothing_to_learn(name: str) -> None:
    student = logits(0).float().requires_grad_()
    values = DIFFERENTIABLE[name][0](student, student.detach() + 3.0, 2.0)
    (gradient,) = torch.autograd.grad(values.sum(), student)
    assert values.abs().max() < 1e-5
    assert name == "tvd" or gradient.abs().max() < 1e-5  # tvd has a kink at equality


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_a_position_is_independent_of_the_others(name: str) -> None:
    student, teacher = logits(0), logits(1)
    loss = DIFFERENTIABLE[name][0]
    whole = loss(student, teacher, 2.0)
    if name != "dkd":  # whose labels are bound above
        torch.testing.assert_close(loss(student[2:3], teacher[2:3], 2.0), whole[2:3])
    else:
        torch.testing.assert_close(losses.dkd(student[2:3], teacher[2:3], LABELS[2:3], 0.7, 3.0, 2.0), whole[2:3])


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_taid_reverse_kl_pulls_t_times_as_much_as_reverse_kl(t: float) -> None:
    student, teacher = logits(0).requires_grad_(), logits(1)
    (gradient,) = torch.autograd.grad(losses.taid_reverse_kl(student, teacher, t).sum(), student)
    (whole,) = torch.autograd.grad(losses.reverse_kl(student, teacher).sum(), student)
    torch.testing.assert_close(gradient, t * whole)


def test_taid_reverse_kl_ends() -> None:
    student, teacher = logits(0), logits(1)
    assert torch.equal(losses.taid_reverse_kl(student, teacher, 0.0), torch.zeros(4, dtype=torch.float64))
    assert torch.equal(losses.taid_reverse_kl(student, teacher, 1.0), losses.reverse_kl(student, teacher))


def test_gkd_ends_in_the_kls() -> None:
    student, teacher = logits(0), logits(1)
    assert torch.equal(losses.gkd(student, teacher, 0.0), losses.forward_kl(student, teacher))
    assert torch.equal(losses.gkd(student, teacher, 1.0), losses.reverse_kl(student, teacher))
    torch.testing.assert_close(
        losses.gkd(student, teacher, 1e-7) / 1e-7, losses.forward_kl(student, teacher), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("beta", [-0.1, 1.1, math.nan])
def test_gkd_refuses_a_beta_outside_its_range(beta: float) -> None:
    with pytest.raises(ValueError, match="within"):
        losses.gkd(logits(0), logits(1), beta)


def test_dkd_with_the_weights_of_the_kl_is_the_kl() -> None:
    student, teacher = logits(0), logits(1)
    rest = 1 - teacher.softmax(-1).gather(-1, LABELS[:, None]).squeeze(-1)
    values = [losses.dkd(student[[i]], teacher[[i]], LABELS[[i]], 1.0, float(rest[i]), 1.0) for i in range(4)]
    torch.testing.assert_close(torch.cat(values), losses.forward_kl(student, teacher))


def test_ctkd_goes_to_half_the_variance_of_the_differences() -> None:
    student, teacher = logits(0), logits(1)
    expected = (teacher - student).var(-1, unbiased=False) / 2
    torch.testing.assert_close(losses.ctkd(student, teacher, 1e5), expected, rtol=1e-3, atol=0)


# The teacher is certain of an id: p = (1, 0, 0).
CERTAIN = torch.tensor([[0.0, -INF, -INF]])
STUDENT = torch.tensor([[0.5, 0.3, 0.2]]).log()
TAIL_GAP = 0.5  # |p - q| over the ids that are not the teacher's


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (losses.forward_kl, math.log(2)),
        (losses.reverse_kl, INF),
        (lambda z, tau: losses.adaptive_kl(z, tau), INF),
        (lambda z, tau: losses.taid_reverse_kl(z, tau, 0.5), INF),
        (lambda z, tau: losses.gkd(z, tau, 0.5), 0.5 * (math.log(1 / 0.75) + 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(2))),
        (lambda z, tau: losses.dkd(z, tau, torch.tensor([0]), 1.0, 8.0, 1.0), math.log(2)),  # NCKD has no teacher
        (lambda z, tau: losses.dkd(z, tau, torch.tensor([1]), 1.0, 8.0, 1.0), math.log(1 / 0.7) + 8 * math.log(0.7 / 0.5)),
        (lambda z, tau: losses.ctkd(z, tau, 1.0), math.log(2)),
    ],
)  # fmt: skip
def test_a_teacher_that_is_certain(loss: Loss, expected: float) -> None:
    student = STUDENT.clone().requires_grad_()
    value = loss(student, CERTAIN)
    (gradient,) = torch.autograd.grad(value.sum(), student)
    assert value.item() == pytest.approx(expected) and gradient.isfinite().all()


def test_a_vocabulary_of_two() -> None:
    student, teacher = torch.tensor([[0.75, 0.25]]).log(), torch.tensor([[0.5, 0.5]]).log()
    forward, reverse = 0.5 * math.log(2 / 3) + 0.5 * math.log(2), 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert losses.dkd(student, teacher, torch.tensor([0]), 1.0, 8.0, 1.0).item() == pytest.approx(forward)
    assert losses.adaptive_kl(student, teacher).item() == pytest.approx((forward + reverse) / 2)  # a gap of 1/4 each
    assert losses.ctkd(student, teacher, 1.0).item() == pytest.approx(forward)


@pytest.mark.parametrize(
    ("mu", "head"), [(0.0, [2]), (0.39, [2]), (0.41, [2]), (0.71, [2, 0]), (0.91, [2, 0, 3]), (0.999, [2, 0, 3])]
)
def test_the_head_holds_at_most_mu_and_always_the_first(mu: float, head: list[int]) -> None:
    p, q = torch.tensor([[0.3, 0.1, 0.4, 0.2]]), torch.tensor([[0.1, 0.4, 0.2, 0.3]])
    gap = (p - q).abs().squeeze(0)
    assert head_weight(p, q, mu).item() == pytest.approx((gap[head].sum() / gap.sum()).item())


@pytest.mark.parametrize("mu", [-0.1, 1.0, math.nan])
def test_adaptive_kl_refuses_a_mu_outside_its_range(mu: float) -> None:
    with pytest.raises(ValueError, match="mu"):
        losses.adaptive_kl(logits(0), logits(1), mu)


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_temperature_learns_nothing_from_excluded_ids(side: str) -> None:
    student, teacher = logits(0), logits(1)
    (student if side == "student" else teacher)[:, 3] = -INF
    other = teacher if side == "student" else student
    other[:, 3] = -INF
    kept = [0, 1, 2, 4, 5]
    found = []
    for z, tau in ((student, teacher), (student[:, kept], teacher[:, kept])):
        temperature = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
        found.append(torch.autograd.grad(losses.ctkd(z, tau, temperature).sum(), temperature)[0])
    torch.testing.assert_close(*found)
