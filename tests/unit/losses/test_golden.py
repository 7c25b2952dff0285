"""The losses against the figures of published code in tests/golden/more_losses.json.

`value` and `grad` are the published code's own, in float32; `value64` and `grad64` are float64. Losses are means over the
positions of a case. What the published code does wrong has names that begin with `taid/`.
"""

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from taid_ray import losses
from tests.support.paths import MORE_LOSSES_FILE

GOLDEN = json.loads(MORE_LOSSES_FILE.read_text())
CASES = {case["id"]: case for case in GOLDEN["cases"] + GOLDEN["edge"]}
Positions = tuple[Tensor, Tensor, Tensor]
"""Logits [N, V] of student and teacher, and labels [N]."""


def learned(settings: dict[str, Any]) -> float:
    """CTKD's temperature."""
    low, span = (
        settings[key] for key in (("t_start", "t_end") if "t_start" in settings else ("temp_start", "temp_end"))
    )
    return float(low + span / (1 + math.exp(-settings["theta"])))


def taid_with_cross_entropy(x: Positions, t: float, distil_ratio: float) -> Tensor:
    z, tau, labels = x
    cross_entropy_form = losses.taid(z, tau, t) + (
        -(target := losses.log_target("taid")(z, tau, t)).exp() * target
    ).sum(-1)  # type: ignore[misc]
    return distil_ratio * cross_entropy_form + (1 - distil_ratio) * losses.sft(z, labels)


def published_ctkd(x: Positions, temperature: float) -> Tensor:
    """With the entropy of its target, which a run reports as part of its loss."""
    sides, target = (x[0] / temperature, x[1] / temperature, 1.0), losses.log_target("published_ctkd")
    log_p = target(*sides) if target else torch.zeros(())
    return temperature**2 * (losses.divergence("published_ctkd")(*sides) - (log_p.exp() * log_p).sum(-1))


FUNCTIONS: dict[str, Callable[[Positions, dict[str, Any]], Tensor]] = {
    "adaptive_kl/author": lambda x, s: losses.adaptive_kl(*x[:2], mu=s["mu"]),
    "dkd/mdistiller": lambda x, s: losses.dkd(*x, **s),
    "ctkd/original": lambda x, s: losses.ctkd(*x[:2], temperature=learned(s)),
    "gkd/trl": lambda x, s: losses.gkd(*x[:2], **s),
    "js/distillm": lambda x, s: losses.js(*x[:2], teacher_weight=1 - s["lam"]),
    "skew_fkl/distillm": lambda x, s: losses.skew_forward_kl(*x[:2], weight=s["lam"]),
    "skew_rkl/distillm": lambda x, s: losses.skew_reverse_kl(*x[:2], weight=s["lam"]),
    "skew_fkl/dskd": lambda x, s: losses.skew_forward_kl(*x[:2], weight=s["lam"], temperature=s["temperature"]),
    "skew_rkl/dskd": lambda x, s: losses.skew_reverse_kl(*x[:2], weight=s["lam"], temperature=s["temperature"]),
    "fkl/dskd": lambda x, s: losses.forward_kl(*x[:2], temperature=s["temperature"]),
    "rkl/dskd": lambda x, s: losses.reverse_kl(*x[:2], temperature=s["temperature"]),
    "taid_rkl/composed": lambda x, s: losses.taid_reverse_kl(*x[:2], t=s["t"]),
    "taid/ctkd": lambda x, s: published_ctkd(x, learned(s)),
    "taid/adaptive_kl": lambda x, s: losses.divergence("published_adaptive_kl", {"mu": s["head_threshold"]})(
        *x[:2], 1.0
    ),
    "taid_ce_mix/taid": lambda x, s: taid_with_cross_entropy(x, **s),
}
ENTRIES = [entry for entry in GOLDEN["losses"] if entry["loss"] in FUNCTIONS]
CROSS_ENTROPY = {"skew_fkl/distillm": "kl_value"}
"""Losses published as cross-entropy, and the key of the KL, which has the same gradient."""


def logits_of(case: dict[str, Any], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Student's and teacher's logits [B, S, V]; they become float32 first."""
    sides = ([float(x) for x in case[f"{name}_logits"]] for name in ("student", "teacher"))
    student, teacher = (torch.tensor(side, dtype=torch.float32).to(dtype).view(case["shape"]) for side in sides)
    return student, teacher


def value_and_gradient(entry: dict[str, Any], case: dict[str, Any], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Mean over the positions of a case, and its gradient [B, S, V]."""
    student, teacher = logits_of(case, dtype)
    mask = torch.tensor(case["mask"], dtype=torch.bool).view(case["shape"][:2])
    labels = torch.tensor(case["labels"]).view(mask.shape)[mask]
    student.requires_grad_()
    values = FUNCTIONS[entry["loss"]]((student[mask], teacher[mask], labels), entry["settings"])
    assert values.shape == labels.shape and values.dtype == dtype
    (gradient,) = torch.autograd.grad(values.sum() / max(1, len(values)), student)
    return values.detach().sum() / max(1, len(values)), gradient


def scale_of(value: float, settings: dict[str, Any]) -> float:
    temperature = learned(settings) if "theta" in settings else settings.get("temperature", 1.0)
    return max(1.0, abs(value), temperature**2 / 10)


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: f"{entry['case']}-{entry['loss']}-{entry['settings']}")
def test_matches_the_published_code(entry: dict[str, Any]) -> None:
    case, name = CASES[entry["case"]], entry["loss"]
    key = CROSS_ENTROPY.get(name, "value")
    value, gradient = value_and_gradient(entry, case, torch.float32)
    assert value.item() == pytest.approx(entry[key], rel=0, abs=1e-5 * scale_of(entry[key], entry["settings"]))
    expected = torch.tensor(entry["grad"]).view(case["shape"])
    assert (gradient - expected).abs().max() <= 2e-5 * expected.abs().max()
    value, _ = value_and_gradient(entry, case, torch.float64)
    assert value.item() == pytest.approx(entry[CROSS_ENTROPY.get(name, "value64")], rel=1e-8)


EDGES = [
    (case, entry)
    for case in GOLDEN["edge"]
    for entry in case["results"]
    if entry["loss"] in FUNCTIONS and not entry["loss"].startswith("taid/")
]


@pytest.mark.parametrize(
    ("case", "entry"), EDGES, ids=lambda x: x["id"] if "id" in x else f"{x['loss']}-{x['settings']}"
)
def test_corners_have_their_true_values(case: dict[str, Any], entry: dict[str, Any]) -> None:
    """Where the published code gives NaN, infinity or too little, too."""
    value, gradient = value_and_gradient(entry, case, torch.float32)
    scale = scale_of(0.0, entry["settings"])
    assert gradient.isfinite().all()
    if case["id"] in ("identical", "no_loss_position"):
        assert abs(value.item()) <= 1e-6 * scale and gradient.abs().max() <= 1e-6
    elif case["id"] == "id_excluded_by_the_teacher":
        limit = float(entry["limit"]) - cross_entropy_offset(entry, case)
        assert value.item() == limit or value.item() == pytest.approx(limit, rel=1e-5, abs=1e-5 * scale)
    elif case["id"] == "id_excluded_by_both":
        expected = torch.zeros(12).view(2, 6)
        kept = [v for v in range(6) if case["student_logits"][v] != "-inf"]
        expected[:, kept] = torch.tensor(entry["grad_without_the_id"]).view(2, len(kept))
        limit = entry["value_without_the_id"] - cross_entropy_offset(entry, case)
        assert value.item() == pytest.approx(limit, rel=1e-5, abs=1e-5 * scale)
        assert (gradient[0] - expected).abs().max() <= 2e-5 * expected.abs().max()
    else:
        limit = entry["value64"] - cross_entropy_offset(entry, case)
        assert value.item() == pytest.approx(limit, rel=1e-5, abs=1e-5 * scale)
        expected = torch.tensor(entry["grad64"]).view(case["shape"])
        assert (gradient - expected).abs().max() <= 2e-5 * expected.abs().max()


def cross_entropy_offset(entry: dict[str, Any], case: dict[str, Any]) -> float:
    """The teacher's entropy, which a loss published as cross-entropy has beside the KL."""
    if entry["loss"] not in CROSS_ENTROPY:
        return 0.0
    return float(losses.entropy(logits_of(case, torch.float64)[1].flatten(0, 1)).mean())


@pytest.mark.parametrize(
    "entry", [e for e in ENTRIES if e["loss"] == "ctkd/original"], ids=lambda e: f"{e['case']}-{e['settings']['theta']}"
)
def test_gradient_of_the_learned_temperature(entry: dict[str, Any]) -> None:
    case, settings = CASES[entry["case"]], entry["settings"]
    student, teacher = logits_of(case, torch.float64)
    mask = torch.tensor(case["mask"], dtype=torch.bool).view(case["shape"][:2])
    theta = torch.tensor(settings["theta"], dtype=torch.float64, requires_grad=True)
    temperature = settings["t_start"] + settings["t_end"] * theta.sigmoid()
    (gradient,) = torch.autograd.grad(losses.ctkd(student[mask], teacher[mask], temperature).mean(), theta)
    assert gradient.item() == pytest.approx(entry["theta_derivative_of_the_kl"], rel=1e-7)
    assert entry["lambda"] * gradient.item() == pytest.approx(entry["theta_grad64"], rel=1e-7)


def test_strength_of_the_reversal() -> None:
    for row in GOLDEN["ctkd_lambda"]:
        for epoch, expected in zip(row["epoch"], row["lambda"], strict=True):
            found = -row["decay_min"] * losses.reversal_strength(epoch, row["decay_loops"])
            assert -found == pytest.approx(expected, abs=1e-10)
    assert losses.reversal_strength(1, 0) == 1


def test_a_temperature_learns_as_published() -> None:
    run = GOLDEN["ctkd_temperature"][0]
    student, teacher = logits_of(CASES[run["case"]], torch.float64)
    mask = torch.tensor(CASES[run["case"]]["mask"], dtype=torch.bool).view(student.shape[:2])
    temperature = losses.LearnedTemperature(run["t_start"], run["t_start"] + run["t_end"])
    optimizer = torch.optim.SGD(temperature.parameters(), run["lr"], run["momentum"])
    theta = lambda: temperature.START + temperature.offset  # noqa: E731
    for n, epoch in enumerate(run["epoch"]):
        value = temperature(losses.reversal_strength(epoch, run["decay_loops"]))
        assert value.item() == pytest.approx(run["temperature"][n], rel=1e-6)
        optimizer.zero_grad()
        losses.ctkd(student[mask], teacher[mask], value.double()).mean().backward()
        assert temperature.offset.grad is not None
        assert temperature.offset.grad.item() == pytest.approx(run["theta_grad"][n], rel=2e-3)
        temperature.offset.grad += run["weight_decay"] * theta().detach()
        optimizer.step()
        assert theta().item() == pytest.approx(run["theta_after64"][n], abs=5e-6)
