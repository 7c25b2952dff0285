"""Figures of a student beside its teacher: published numbers, a plain computation, and values worked out by hand."""

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from taid_ray.compare.calibration import Calibration
from taid_ray.compare.measures import PairTotals
from taid_ray.losses.projection import LogitTransform, Projection
from tests.support.paths import GOLDEN_FILE

GOLDEN = json.loads(GOLDEN_FILE.with_name("head_tail_mass.json").read_text())["cases"]


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case["id"])
@pytest.mark.parametrize("chunk_tokens", [1, 100])
def test_head_and_tail_have_the_masses_of_the_golden_file(case: dict[str, Any], chunk_tokens: int) -> None:
    mask = torch.tensor(case["mask"], dtype=torch.bool)
    student, teacher = (
        torch.tensor(case[f"{name}_logits"]).view(-1, case["shape"][-1])[mask] for name in ("student", "teacher")
    )
    totals = PairTotals(1, case["shape"][-1])
    none = torch.zeros(len(student), dtype=torch.int64)
    totals.add(Projection(student, None), Projection(teacher, None), none, none, chunk_tokens=chunk_tokens)
    for name, model in (("student", totals.student), ("teacher", totals.teacher)):
        own = [float(model.sums[f"{part}_mass"]) / len(student) for part in ("head", "tail")]
        assert own == pytest.approx([case[f"{name}_head_own_ranks"], case[f"{name}_tail_own_ranks"]], rel=1e-5)
        mean = [case[f"{name}_head_of_the_mean"], case[f"{name}_tail_of_the_mean"]]
        assert model.masses_of_the_mean() == pytest.approx(mean, rel=1e-5)


@pytest.mark.parametrize("chunk_tokens", [1, 3, 100])
def test_sums_by_document_equal_a_plain_computation_from_logits(chunk_tokens: int) -> None:
    hidden, head, bias = random(9, 4, seed=1), random(7, 4, seed=2), random(7, seed=3)
    student, teacher = Projection(hidden, head, bias, LogitTransform(0.5, 3.0)), Projection(random(9, 7, seed=4), None)
    labels, documents = torch.arange(9) % 7, torch.tensor([0, 0, 2, 2, 2, 0, 1, 1, 2])
    totals = PairTotals(4, 7)
    for half in (slice(0, 5), slice(5, 9)):
        parts = Projection(hidden[half], head, bias, student.transform), Projection(teacher.hidden[half], None)
        totals.add(*parts, labels[half], documents[half], chunk_tokens=chunk_tokens)
    log_q = (3 * torch.tanh(0.5 * (hidden @ head.T + bias) / 3)).double().log_softmax(-1)
    log_p = teacher.hidden.double().log_softmax(-1)
    expected = {
        "cross_entropy": -log_q.gather(1, labels[:, None]).squeeze(1),
        "forward_kl": (log_p.exp() * (log_p - log_q)).sum(1),
        "reverse_kl": (log_q.exp() * (log_q - log_p)).sum(1),
    }
    found = totals.student.sums | totals.divergences
    assert totals.tokens.tolist() == [3, 2, 4, 0]
    for name, values in expected.items():
        by_document = [float(values[documents == number].sum()) for number in range(4)]
        assert found[name].tolist() == pytest.approx(by_document, rel=1e-5, abs=1e-12), name
    assert float(totals.teacher.sums["cross_entropy"].sum()) == pytest.approx(
        -float(log_p.gather(1, labels[:, None]).sum()), rel=1e-6
    )
    assert totals.student.calibration.bins()[0]["count"] <= 9


def test_calibration_error_worked_out_by_hand() -> None:
    calibration = Calibration()
    # Three predictions in (0.6, 0.667], two of them right; one in (0.933, 1], wrong.
    calibration.add(torch.tensor([0.61, 0.62, 0.63]), torch.tensor([True, False, True]))
    calibration.add(torch.tensor([1.0, 0.19]), torch.tensor([False, True]))
    assert calibration.error() == pytest.approx((abs(2 - 1.86) + abs(0 - 1.0) + abs(1 - 0.19)) / 5)
    assert [(round(each["up_to"], 3), each["count"]) for each in calibration.bins()] == [(0.2, 1), (0.667, 3), (1, 1)]
    assert calibration.bins()[1]["accuracy"] == pytest.approx(2 / 3)


def test_an_honest_model_is_calibrated() -> None:
    probabilities = torch.rand(200_000, generator=torch.Generator().manual_seed(0))
    correct = torch.rand(200_000, generator=torch.Generator().manual_seed(1)) < probabilities
    honest, sure = Calibration(), Calibration()
    honest.add(probabilities, correct)
    sure.add(probabilities.sqrt(), correct)
    assert honest.error() < 0.01
    assert sure.error() == pytest.approx(2 / 3 - 1 / 2, abs=0.01)
