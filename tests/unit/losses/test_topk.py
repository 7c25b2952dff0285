"""Top-k teachers: k + 1 buckets say the same as the whole vocabulary with a tail in the student's shape."""

import math
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from taid_ray import losses
from taid_ray.config.objective import WITHOUT_TOPK, LossName
from taid_ray.losses import TopK
from taid_ray.losses.chunked import chunked_loss, chunked_scores
from taid_ray.losses.objective import Objective
from taid_ray.losses.projection import LogitTransform, Projection
from taid_ray.losses.topk import with_labels
from tests.support.entropy import target_entropy

NAMES = [name for name in get_args(LossName) if name not in WITHOUT_TOPK]
N, V, K = 12, 40, 5
INF = math.inf


def logits(n: int = N, seed: int = 0, v: int = V) -> Tensor:
    return 2 * torch.randn(n, v, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def top_k(teacher_logits: Tensor, labels: Tensor, k: int = K) -> TopK:
    """What a teacher sends, before any rounding."""
    log_p = teacher_logits.log_softmax(-1)
    log_probs, ids = log_p.topk(k)
    log_tail = log_p.scatter(-1, ids, -INF).logsumexp(-1)
    return TopK(log_probs, ids.int(), log_tail, log_p.gather(-1, labels[:, None]).squeeze(-1))


def with_students_tail(known: TopK, student_logits: Tensor) -> Tensor:
    """Log-probabilities [N, V] of the teacher with p_tail * q_v / Q outside its k ids."""
    ids = known.ids.long()
    tail = student_logits.detach().scatter(-1, ids, -INF).log_softmax(-1) + known.log_tail[:, None]
    return tail.scatter(-1, ids, known.log_probs)


def random_case(n: int = N) -> tuple[Tensor, TopK, Tensor]:
    labels = torch.randint(V, (n,), generator=torch.Generator().manual_seed(3))
    return logits(n), top_k(logits(n, seed=1), labels), labels


def on_buckets(name: str, z: Tensor, known: TopK, t: float, labels: Tensor | None = None, **options: Any) -> Any:
    objective = Objective(name, torch.tensor(t, dtype=z.dtype), **options)
    return objective.evaluate_(z.clone(), known, labels, learn=True)


# (name, t, settings)
MENU: list[tuple[str, float, dict[str, float]]] = [
    (name, t, {}) for name in ("taid", "taid_reverse_kl") for t in (0.0, 0.3, 1.0)
]
MENU += [(name, 0.3, {}) for name in NAMES if not name.startswith("taid")]
MENU += [
    (name, 0.3, {"weight": weight})
    for name in ("js", "skew_forward_kl", "skew_reverse_kl")
    for weight in (0.0, 0.6, 1.0)
]
MENU += [("gkd", 0.3, {"beta": beta}) for beta in (0.0, 1.0)] + [("dkd", 0.3, {"alpha": 2.0, "beta": 0.5})]


@pytest.mark.parametrize(("name", "t", "settings"), MENU)
@pytest.mark.parametrize("sft_weight", [0.0, 0.2, 1.0])
@pytest.mark.parametrize(("temperature", "squared"), [(1.0, False), (2.5, True), (torch.tensor(0.6).double(), False)])
def test_equals_the_whole_vocabulary(
    name: str, t: float, settings: dict[str, float], sft_weight: float, temperature: float | Tensor, squared: bool
) -> None:
    z, known, labels = random_case()
    labels[: N // 2] = known.ids[: N // 2, 2]  # labels within and outside the k ids
    known = replace(known, label_log_probs=logits(seed=1).log_softmax(-1).gather(-1, labels[:, None]).squeeze(-1))
    options: dict[str, Any] = {"settings": settings, "temperature": temperature, "squared": squared}
    (kl, entropy, ce), gradient, _ = on_buckets(name, z, known, t, labels, sft_weight=sft_weight, **options)

    if name == "dkd":
        known, _ = with_labels(known, labels)
    teacher, z = with_students_tail(known, z), z.requires_grad_()
    factor = temperature**2 if squared else 1.0
    sides = z / temperature, teacher / temperature
    expected_kl = factor * losses.divergence(name, settings)(*sides, t, labels)
    expected_ce = losses.sft(z, labels)
    total = (1 - sft_weight) * expected_kl + sft_weight * expected_ce
    (expected_gradient,) = torch.autograd.grad(total.sum(), z)
    for got, expected in (
        (kl, expected_kl),
        (entropy, factor * target_entropy(name)(*sides, t).double()),
        (ce, expected_ce),
        (gradient, expected_gradient),
    ):
        torch.testing.assert_close(got, expected.detach(), rtol=1e-12, atol=1e-14)


def test_no_temperature_learns() -> None:
    z, known, _ = random_case()
    temperature = torch.tensor(2.5, dtype=torch.float64, requires_grad=True)
    with pytest.raises(ValueError, match="whole distributions only"):
        on_buckets("ctkd", z, known, 1.0, temperature=temperature, squared=True)


@pytest.mark.parametrize("name", NAMES)
def test_all_ids_but_one_are_the_whole_vocabulary(name: str) -> None:
    z, teacher = logits(), logits(seed=1)
    known = top_k(teacher, torch.zeros(N, dtype=torch.int64), V - 1)
    labels = torch.zeros(N, dtype=torch.int64)
    (kl, *_), gradient, _ = on_buckets(name, z, known, 0.4, labels)
    z = z.requires_grad_()
    expected = losses.divergence(name)(z, teacher, 0.4, labels)
    torch.testing.assert_close(kl, expected.detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), z)[0])


def test_taid_by_the_formula() -> None:
    z, known, _ = random_case()
    (kl, *_), _, _ = on_buckets("taid", z, known, 0.3)
    q = z.softmax(-1).gather(-1, known.ids.long())
    student = torch.cat([q, 1 - q.sum(-1, keepdim=True)], -1)
    teacher = torch.cat([known.log_probs, known.log_tail[:, None]], -1).exp()
    target = student**0.7 * teacher**0.3
    target /= target.sum(-1, keepdim=True)
    torch.testing.assert_close(kl, (target * (target / student).log()).sum(-1))


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "js", "tvd"])
def test_is_a_lower_bound_of_the_true_divergence(name: str) -> None:
    z, known, _ = random_case()
    (kl, *_), _, _ = on_buckets(name, z, known, 1.0)
    assert (kl <= losses.divergence(name)(z, logits(seed=1), 1.0) + 1e-12).all() and (kl > 0).all()


def test_rounded_probabilities_share_what_the_tail_leaves() -> None:
    known = random_case()[1]
    rounded = TopK(known.log_probs.bfloat16(), known.ids, known.log_tail.float(), known.label_log_probs.float())
    buckets = rounded.buckets(torch.float32)
    assert buckets.dtype == torch.float32
    assert torch.allclose(buckets.exp().sum(-1), torch.ones(N), atol=1e-6)
    assert torch.allclose(buckets[:, -1], known.log_tail.float())
    assert torch.allclose(buckets[:, :-1], known.log_probs.float(), atol=0.03)
    spread = rounded.log_probs.float().diff() - buckets[:, :-1].diff()
    assert spread.abs().max() < 1e-5


NO_TAIL, ALL_TAIL = -INF, 0.0
STUDENT_TAILS = {"usual": 0.0, "tiny": -300.0, "none": -INF}


@pytest.mark.parametrize(("name", "t"), [(name, t) for name, t, settings in MENU if not settings])
@pytest.mark.parametrize("student_tail", STUDENT_TAILS)
@pytest.mark.parametrize("log_tail", [NO_TAIL, ALL_TAIL, -1.0])
def test_extreme_tails_give_no_nan(name: str, t: float, student_tail: str, log_tail: float) -> None:
    z, known, labels = random_case()
    z = z.float() + STUDENT_TAILS[student_tail]
    z = z.scatter(-1, known.ids.long(), logits(seed=2).float()[:, :K])
    labels = known.ids[:, 0].long()
    known = TopK(known.log_probs.bfloat16(), known.ids, torch.full((N,), log_tail), known.label_log_probs.float())
    values, gradient, _ = on_buckets(name, z, known, t, labels, sft_weight=0.1)
    assert not values.isnan().any() and gradient.isfinite().all()
    missing_at_student = student_tail == "none" and log_tail != NO_TAIL
    infinite = {
        "forward_kl": missing_at_student,
        "ctkd": missing_at_student,
        "taid": missing_at_student and t == 1,
        "reverse_kl": student_tail == "usual" and log_tail == NO_TAIL,
        "taid_reverse_kl": t > 0 and student_tail == "usual" and log_tail == NO_TAIL,
        "dkd": missing_at_student,
    }
    assert (values[0] == INF).all() if infinite.get(name) else values.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_float32_is_accurate(name: str) -> None:
    z, known, labels = random_case()
    exact, exact_gradient, _ = on_buckets(name, z, known, 0.4, labels, sft_weight=0.1)
    low = TopK(known.log_probs.float(), known.ids, known.log_tail.float(), known.label_log_probs.float())
    values, gradient, _ = on_buckets(name, z.float(), low, 0.4, labels, sft_weight=0.1)
    assert values.dtype == gradient.dtype == torch.float32
    assert torch.allclose(values.double(), exact, rtol=2e-6, atol=1e-6)
    assert torch.allclose(gradient.double(), exact_gradient, rtol=1e-4, atol=1e-7)


# --- from hidden states


def from_hidden_states(n: int = N) -> tuple[Projection, TopK, Tensor]:
    generator = torch.Generator().manual_seed(4)
    hidden, head, bias = (torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((n, 6), (V, 6), (V,)))
    student = Projection(*(x.requires_grad_() for x in (hidden, head, bias)), LogitTransform(2.0, 5.0))
    _, known, labels = random_case(n)
    return student, known, labels


def final_logits(student: Projection) -> Tensor:
    assert student.head is not None
    return student.transform(torch.nn.functional.linear(student.hidden, student.head, student.bias))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("chunk_tokens", [1, 5, 1000])
def test_chunked_loss(name: str, chunk_tokens: int) -> None:
    student, known, labels = from_hidden_states()
    trained = [x for x in (student.hidden, student.head, student.bias) if x is not None]
    objective = Objective(name, torch.tensor(0.3), sft_weight=0.2)
    loss, parts = chunked_loss(objective, student, known, labels, chunk_tokens=chunk_tokens)
    same = with_labels(known, labels)[0] if name == "dkd" else known
    full = Projection(with_students_tail(same, final_logits(student)), None)
    expected, expected_parts = chunked_loss(objective, student, full, labels, chunk_tokens=N)
    torch.testing.assert_close((loss, *vars(parts).values()), (expected, *vars(expected_parts).values()))
    torch.testing.assert_close(torch.autograd.grad(loss, trained), torch.autograd.grad(expected, trained))


def test_scores() -> None:
    student, known, labels = from_hidden_states()
    z = final_logits(student).detach()
    scores = chunked_scores(student, known, labels, chunk_tokens=5)
    assert scores.student_ce.item() == pytest.approx(losses.sft(z, labels).sum().item())
    assert scores.teacher_ce.item() == pytest.approx(losses.sft(logits(seed=1), labels).sum().item())
    assert scores.kl.item() == pytest.approx(losses.forward_kl(z, with_students_tail(known, z)).sum().item())
    assert scores.tokens.item() == N


def test_no_tokens_keep_the_graph() -> None:
    student, known, labels = from_hidden_states(0)
    loss, _ = chunked_loss(Objective("taid", torch.tensor(0.3)), student, known, labels, chunk_tokens=5)
    loss.backward()
    assert loss.item() == 0 and student.head is not None and student.head.grad is not None


def test_number_of_positions_must_agree() -> None:
    student, known, labels = from_hidden_states()
    with pytest.raises(ValueError, match="tokens"):
        chunked_loss(Objective("taid", torch.tensor(0.3)), student, known.rows(slice(1, None)), labels, chunk_tokens=5)
