"""Rates and what arithmetic and simulation make of them."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from taid_ray.cli.quickstart import quickstart_config
from taid_ray.plan import data as plan_data
from taid_ray.plan import rates as plan_rates
from taid_ray.plan.forecast import forecast
from taid_ray.plan.from_run import RunFigures
from taid_ray.plan.hardware import hardware_named
from taid_ray.plan.inputs import PlanInputs, read_models
from taid_ray.plan.rates import (
    BEAT_S,
    DATA_S,
    POLLS_SHARE,
    REPORT_S,
    Rates,
    assumed_rates,
    collectives,
    computed_times,
    scaling,
    simulated_times,
)
from taid_ray.plan.simulation import simulate
from taid_ray.scheduler.aggregate import BEATS_PER_S, HEARTBEAT_S

CPU = hardware_named("cpu")
RATES = Rates(
    teacher_s=0.1, forward_s=0.2, loss_s=0.1, backward_s=0.3, optimizer_s=0.05, read_s=1e-6, data_s=0.01,
    request_s=0.004, noise=0.0,
)  # fmt: skip
OWN = 0.2 + 0.1 + 0.3 + 0.01


def inputs(*overrides: str) -> PlanInputs:
    made = quickstart_config(overrides, "unused")
    return PlanInputs(made, read_models(made), CPU)


def test_assumed_rates_are_the_arithmetic_of_sizes() -> None:
    """Operations over speed, per micro-batch; two micro-batches have half the rows each."""
    one, two = (inputs(f"train.micro_batch_size={rows}") for rows in (16, 8))
    whole, half = assumed_rates(one, 0.4), assumed_rates(two, 0.4)
    assert half.forward_s == pytest.approx(whole.forward_s / 2) and half.teacher_s == pytest.approx(whole.teacher_s / 2)
    assert half.optimizer_s == whole.optimizer_s
    speed = 0.4 * CPU.float32_flops
    assert whole.forward_s == pytest.approx(one.workload.tokens * one.flops.forward / speed)
    assert whole.backward_s == pytest.approx(one.workload.tokens * one.flops.backward / speed)
    assert computed_times(two, half).student_s == pytest.approx(computed_times(one, whole).student_s + DATA_S)


def test_without_a_limit_simulation_and_arithmetic_agree() -> None:
    for overrides in ((), ("train.micro_batch_size=4",), ("teacher.mode=local", "train.micro_batch_size=8")):
        here = inputs(*overrides)
        expected = computed_times(here, RATES)
        assert simulated_times(here, RATES).step_s == pytest.approx(expected.step_s, rel=1e-9)
    micro = here.accumulation
    assert expected.step_s == pytest.approx(micro * (OWN + 0.1) + 0.05)


def test_the_table_of_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_rates, "WORKERS", (1, 4, 16))
    points = scaling(inputs(), RATES, 2)
    assert [point.replicas for point in points] == [2, 8, 32]
    assert all(0.98 < point.efficiency <= 1 for point in points)
    # ZeRO 2 leaves a worker less of the optimizer's work the more there are
    for point in points:
        alone = 16 * 256 / (OWN + 0.05 / point.workers)
        assert point.tokens_per_s == pytest.approx(point.workers * alone, rel=0.02)
    slow = replace(RATES, read_s=OWN / 64)
    blocks, own = (scaling(inputs(f"data.order={order}"), slow, 2) for order in ("blocks", "global"))
    assert blocks[-1].waits_for == "data" and blocks[-1].efficiency == pytest.approx(1 / 4, rel=0.1)
    assert own[-1].waits_for != "data" and own[-1].efficiency > 0.98  # 16 rows of 256 only
    slower = scaling(inputs(), replace(RATES, read_s=OWN / 4), 2)
    assert {point.waits_for for point in slower} == {"data"}
    starved = scaling(inputs(), replace(RATES, teacher_s=3.0), 1)
    assert {point.waits_for for point in starved} == {"teacher"}


def test_what_limits_many_workers_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """16 workers' reading, and 4 workers' reports where each takes the scheduler a tenth of a second."""
    monkeypatch.setattr(plan_rates, "WORKERS", (1, 4, 16))

    def said(module: Any, name: str, value: float, start: str, order: str = "global") -> bool:
        with monkeypatch.context() as changed:
            changed.setattr(module, name, value)
            return any(start in note for note in forecast(inputs(f"data.order={order}"), utilisation=0.4).notes)

    reading = (
        "on 16 workers with 16 rows each, reading the data takes longer than training: every worker reads and encodes"
    )
    assert said(plan_data, "ENCODE_TOKENS_PER_S", 256 / 0.002, reading, "blocks")
    assert not said(plan_data, "ENCODE_TOKENS_PER_S", 1e6, reading, "blocks")
    assert not said(plan_data, "ENCODE_TOKENS_PER_S", 256 / 0.002, "reading the data takes")
    stored = "on 1 workers with 16 rows each, reading the data takes longer than training"
    assert said(plan_data, "STORED_TOKENS_PER_S", 1e3, stored) and not said(
        plan_data, "STORED_TOKENS_PER_S", 1e6, stored
    )
    reports = "on 4 workers with 16 rows each, steps wait for the scheduler actor, one process that is busy"
    assert said(plan_rates, "REPORT_S", 0.08, reports) and not said(plan_rates, "REPORT_S", 0.001, reports)


def test_the_scheduler_is_busy_with_reports_and_heartbeats(monkeypatch: pytest.MonkeyPatch) -> None:
    """One report per worker and step; heartbeats of all workers, but never more than BEATS_PER_S; and polls."""
    monkeypatch.setattr(plan_rates, "WORKERS", (4, 1024))
    slow = replace(RATES, backward_s=2.0)
    few, many = scaling(inputs(), slow, 1)
    for point, beats in ((few, 4 / HEARTBEAT_S), (many, BEATS_PER_S)):
        step_s = point.workers * 16 * 256 / point.tokens_per_s
        assert point.scheduler_share == pytest.approx(point.workers * REPORT_S / step_s + beats * BEAT_S + POLLS_SHARE)


def test_large_steps_are_simulated_in_part(monkeypatch: pytest.MonkeyPatch) -> None:
    here = inputs("train.batch_size=64", "train.micro_batch_size=4")
    pipeline = plan_rates._pipeline(here, RATES, 4, 2)
    monkeypatch.setattr(plan_rates, "REQUESTS_SIMULATED", 160)
    shorter, share = plan_rates._shortened(pipeline)
    assert (pipeline.micro_batches, shorter.micro_batches, share) == (16, 10, 1.6)
    assert simulate(shorter).step_s * share == pytest.approx(simulate(pipeline).step_s, rel=0.02)


@pytest.mark.parametrize(
    ("stage", "expected"), [(0, (None, None, 2)), (1, (None, None, 3)), (2, (None, 1, 1)), (3, (1, 2, None))]
)
def test_what_the_students_send_each_other(stage: int, expected: tuple[float | None, ...]) -> None:
    """In times that each worker's link carries all weights; ZeRO-3 meets before each forward and with each backward pass."""
    here = inputs(f"student.zero_stage={stage}")
    here = replace(here, hardware=replace(CPU, latency_s=0.0))
    once = here.student.parameters * 4 * 3 / 4 / CPU.collective
    found = collectives(here, 4)
    assert [None if seconds is None else seconds / once for seconds in found] == pytest.approx(list(expected))


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_rates_adapted_to_their_own_layout_stay_the_same(stage: int) -> None:
    here = inputs(f"student.zero_stage={stage}", "student.workers=2", "train.micro_batch_size=3")
    run = RunFigures(
        Path("run"),
        here,
        steps=9,
        step_s=1.0,
        teacher_wait_s=0.0,
        schedule_wait_s=0.0,
        mixed_starts=0,
        rates=asdict(RATES),
    )
    assert run.applied(assumed_rates(here, 0.4), here) == RATES
