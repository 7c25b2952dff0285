"""Rates, assumed and measured, and what the plan and the simulation make of them."""

import io
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from taid_ray.cli.quickstart import quickstart_config
from taid_ray.config.schema import DistillConfig
from taid_ray.errors import ConfigError
from taid_ray.plan import rates as plan_rates
from taid_ray.plan.calibration import Measured
from taid_ray.plan.forecast import forecast, with_simulation
from taid_ray.plan.hardware import hardware_named
from taid_ray.plan.inputs import PlanInputs, read_models
from taid_ray.plan.measure import KEPT, LARGEST_NOISE, WARM_UP, check_gpu, measuring_config, rates_of
from taid_ray.plan.memory_watch import peak_bytes, processes, role_of
from taid_ray.plan.rates import DATA_S, Rates, adapted, assumed_rates, scaling, simulated, times_of
from taid_ray.plan.simulation import simulate
from taid_ray.plan.tables import calibration_table, show
from taid_ray.run.metrics import StepMetrics

CPU = hardware_named("cpu")
GIB = 2**30
RATES = Rates(
    measured=True, teacher_s=0.1, forward_s=0.2, loss_s=0.1, backward_s=0.3, optimizer_s=0.05, read_s=1e-6, data_s=0.01,
    request_s=0.004, noise=0.0,
)  # fmt: skip
OWN = 0.2 + 0.1 + 0.3 + 0.01


def config(*overrides: str) -> DistillConfig:
    return quickstart_config(overrides, "unused")


def inputs(*overrides: str) -> PlanInputs:
    made = config(*overrides)
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
    assert times_of(two, half).student_s == pytest.approx(times_of(one, whole).student_s + DATA_S)


def test_without_a_limit_simulation_and_arithmetic_agree() -> None:
    for overrides in ((), ("train.micro_batch_size=4",), ("teacher.mode=local", "train.micro_batch_size=8")):
        here = inputs(*overrides)
        expected = times_of(here, RATES)
        found = simulated(here, RATES, expected.replicas, None)
        assert found.step_s == pytest.approx(expected.step_s, rel=1e-9)
    micro = here.accumulation
    assert expected.step_s == pytest.approx(micro * (OWN + 0.1) + 0.05)


def test_cores_that_all_share_are_a_limit() -> None:
    here = inputs("student.workers=2", "train.micro_batch_size=4")
    arithmetic = times_of(here, RATES)
    alone, shared = (with_simulation(here, RATES, arithmetic, cores) for cores in (None, 2.0))
    assert alone.bottleneck == "student" and shared.bottleneck == "cores"
    # two workers of two micro-batches, and the teacher's four requests
    work = 2 * (2 * OWN + 0.05) + 4 * (0.1 + 0.004)
    assert work / 2 <= shared.step_s < 1.2 * work / 2


def test_a_measurement_is_taken_over_to_another_layout() -> None:
    measured_at, here = inputs("train.micro_batch_size=8"), inputs("train.micro_batch_size=4", "student.workers=2")
    found = adapted(RATES, measured_at, here)
    assert found.forward_s == RATES.forward_s / 2 and found.teacher_s == RATES.teacher_s / 2
    assert found.optimizer_s == RATES.optimizer_s / 2  # ZeRO 2 shares the parameters
    assert (found.data_s, found.read_s, found.request_s) == (RATES.data_s, RATES.read_s, RATES.request_s)
    assert adapted(RATES, here, here) == RATES


def test_the_table_of_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_rates, "WORKERS", (1, 4, 16))
    points = scaling(inputs(), RATES, 2)
    assert [point.replicas for point in points] == [2, 8, 32]
    assert all(0.98 < point.efficiency <= 1 for point in points)
    # ZeRO 2 leaves a worker less of the optimizer's work the more there are
    for point in points:
        alone = 16 * 256 / (OWN + 0.05 / point.workers)
        assert point.tokens_per_s == pytest.approx(point.workers * alone, rel=0.02)
    slow = scaling(inputs(), replace(RATES, read_s=OWN / 64), 2)
    assert slow[-1].waits_for == "data" and slow[-1].efficiency == pytest.approx(1 / 4, rel=0.1)
    starved = scaling(inputs(), replace(RATES, teacher_s=3.0), 1)
    assert {point.waits_for for point in starved} == {"teacher"}


def test_reading_that_limits_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_rates, "WORKERS", (1, 64))
    here, models = config(), read_models(config())
    slow = measured(here, rates=replace(RATES, read_s=0.01))
    notes = forecast(here, models, CPU, utilisation=0.4, measured=slow).notes
    assert any(note.startswith("on 64 workers with 16 rows each, reading the data takes longer") for note in notes)
    notes = forecast(here, models, CPU, utilisation=0.4, measured=measured(here)).notes
    assert not any("reading" in note for note in notes)


def test_large_steps_are_simulated_in_part(monkeypatch: pytest.MonkeyPatch) -> None:
    here = inputs("train.batch_size=64", "train.micro_batch_size=4")
    pipeline = plan_rates._pipeline(here, RATES, 4, 2, None)
    monkeypatch.setattr(plan_rates, "REQUESTS_SIMULATED", 160)
    shorter, share = plan_rates._shortened(pipeline)
    assert (pipeline.micro_batches, shorter.micro_batches, share) == (16, 10, 1.6)
    assert simulate(shorter).step_s * share == pytest.approx(simulate(pipeline).step_s, rel=0.02)


@pytest.mark.parametrize(
    ("stage", "collectives"), [(0, (None, None, 2)), (1, (None, None, 3)), (2, (None, 1, 1)), (3, (1, 2, None))]
)
def test_what_the_students_send_each_other(stage: int, collectives: tuple[float | None, ...]) -> None:
    """In times that each worker's link carries all weights; ZeRO-3 meets before each forward and with each backward pass."""
    here = inputs(f"student.zero_stage={stage}")
    here = replace(here, hardware=replace(CPU, latency_s=0.0))
    once = here.student.parameters * 4 * 3 / 4 / CPU.collective
    found = plan_rates._collectives(here, 4)
    assert [None if seconds is None else seconds / once for seconds in found] == pytest.approx(list(collectives))


def measured(own: DistillConfig, **changes: Any) -> Measured:
    values: dict[str, Any] = {
        "config": own, "on_gpus": False, "rates": RATES, "step_s": 0.7, "cores": None, "worker_bytes": 3.0 * GIB,
        "replica_bytes": 2.0 * GIB,
    }  # fmt: skip
    return Measured(**(values | changes))


def test_measured_memory_replaces_the_reserve(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a process held beyond what the plan counts is beside every other layout's, too."""
    monkeypatch.setattr(plan_rates, "WORKERS", (1,))
    here, models = config("train.micro_batch_size=8"), read_models(config())
    plain = forecast(here, models, CPU, utilisation=0.4)
    found = forecast(here, models, CPU, utilisation=0.4, measured=measured(here))
    assert found.configured().bytes == pytest.approx(3 * GIB) and found.teacher_memory[0].bytes == pytest.approx(
        2 * GIB
    )
    for before, after in zip(plain.worker_memory, found.worker_memory, strict=True):
        assert after.bytes - before.bytes == pytest.approx(3 * GIB - plain.configured().bytes)
    unseen = measured(here, worker_bytes=None, replica_bytes=None)
    assert forecast(here, models, CPU, utilisation=0.4, measured=unseen).worker_memory == plain.worker_memory
    assert found.calibration is not None and found.calibration.assumed == plain.rates
    assert calibration_table(plain) is None
    console = Console(width=100, record=True, file=io.StringIO())
    show(found, console)
    text = console.export_text()
    assert "3.0 GiB" in text and "measured on 1 worker(s) and 1 replica(s), steps of 0.7 s" in text
    assert max(map(len, text.splitlines())) <= 100


def test_measuring_is_the_same_work_in_few_steps(tmp_path: Path) -> None:
    whole = config(
        "train.batch_size=30", "train.micro_batch_size=4", "student.workers=2", "train.eval_every=3", "train.epochs=2",
        "train.steps=null", "tracking.wandb=project",
        f"cache.directory={tmp_path}", "teacher.replicas=[2, 5]", "checkpoint.every_steps=1",
    )  # fmt: skip
    own = measuring_config(whole, 1, 1, tmp_path / "run")
    models = read_models(whole)
    before, after = PlanInputs(whole, models, CPU), PlanInputs(own, models, CPU)
    assert (after.micro_rows, after.workload.length) == (before.micro_rows, before.workload.length) == (4, 256)
    assert (before.accumulation, after.accumulation, after.workers) == (4, 2, 1)
    assert own.train.steps == WARM_UP + KEPT + 2 and own.run_dir == tmp_path / "run"  # a window of 4 is two steps
    assert not own.cache.on and own.checkpoint.every_steps is None and not own.train.eval_every
    assert own.tracking.wandb is None
    assert own.teacher.replicas.fixed and own.student.max_failures == 0
    assert own.teacher.model == whole.teacher.model and own.student.zero_stage == whole.student.zero_stage


def test_a_cache_without_a_teacher_stays() -> None:
    own = measuring_config(config("teacher.mode=cache", "cache.directory=/somewhere"), 1, 1, Path("/tmp/run"))
    assert own.teacher.mode == "cache" and own.cache.directory == "/somewhere"


def lines(count: int, **phases: float) -> list[dict[str, Any]]:
    names = StepMetrics.__dataclass_fields__
    return [dict.fromkeys(names, 0.0) | {"step": step} | phases for step in range(1, count + 1)]


def test_rates_are_medians_of_the_steps_that_count(tmp_path: Path) -> None:
    own = measuring_config(config("train.batch_size=32", "train.micro_batch_size=8"), 2, 1, tmp_path / "run")
    phases = {f"{name}_s": 2.0 for name in ("forward", "loss", "backward", "data")}
    phases |= {"optimizer_s": 1.0, "teacher_compute_s": 8.0, "step_s": 9.0}
    found = lines(own.train.steps or 0, **phases)
    for line in (*found[:WARM_UP], *found[WARM_UP + KEPT :], found[WARM_UP]):
        line |= dict.fromkeys(phases, 100.0)  # slow starts, idle ends, and one outlier
    rates, step_s = rates_of(found, own, read_s=0.5, request_s=0.25)
    assert (rates.forward_s, rates.loss_s, rates.backward_s, rates.data_s) == (1, 1, 1, 1)  # two micro-batches
    assert (rates.teacher_s, rates.optimizer_s, step_s) == (2.0, 1.0, 9.0)  # four requests of two workers
    assert (rates.read_s, rates.request_s, rates.noise) == (0.5, 0.25, LARGEST_NOISE)
    local = measuring_config(config("teacher.mode=local"), 1, 1, tmp_path / "run")
    rates, _ = rates_of(lines(30, **(phases | {"teacher_wait_s": 3.0})), local, 0.0, 0.0)
    assert rates.teacher_s == 3.0 and rates.noise == 0


@pytest.mark.parametrize(("gpu", "device"), [("h100-80g", "cpu"), ("cpu", "cuda")])
def test_other_hardware_than_here_cannot_be_measured(gpu: str, device: str) -> None:
    with pytest.raises(ConfigError, match=f"--gpu {gpu}: --measure .* here; leave --gpu out"):
        check_gpu(gpu, device)
    check_gpu(None, device)
    check_gpu(gpu, "cuda" if device == "cpu" else "cpu")


def test_processes_are_known_by_their_titles() -> None:
    assert role_of("ray::RayTrainWorker", "taid-x") == "worker"
    assert (
        role_of("ray::ServeReplica:taid-x-1:teacher.score", "taid-x") == "replica" == role_of("ray::TeacherShard", "")
    )
    assert role_of("ray::ServeReplica:taid-y:teacher", "taid-x") is None and role_of("ray::Lease", "taid-x") is None


def test_the_peak_of_a_process_is_seen_from_outside() -> None:
    assert os.getpid() in dict(processes(os.getppid()))
    assert peak_bytes(os.getpid()) > 50 * 2**20 and peak_bytes(2**30) == 0
