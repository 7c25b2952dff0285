"""`taid-ray plan --from RUN`: run directories as a run's own code writes them, and numbers worked out by hand."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from taid_ray.cli.plan import plan
from taid_ray.cli.quickstart import quickstart_config
from taid_ray.config.paths import with_absolute_paths
from taid_ray.config.schema import DistillConfig
from taid_ray.errors import ConfigError
from taid_ray.files import write_json
from taid_ray.plan import rates as plan_rates
from taid_ray.plan.forecast import forecast
from taid_ray.plan.from_run import LARGEST_NOISE, LATEST, OUTLIERS, WARM_UP, RunFigures, run_figures
from taid_ray.plan.hardware import hardware_named
from taid_ray.plan.inputs import PlanInputs, read_models
from taid_ray.plan.rates import assumed_rates, collectives
from taid_ray.plan.tables import rates_table
from taid_ray.report.history import read_history
from taid_ray.run.directory import RunManifest, write_config
from taid_ray.run.layout import METRICS_FILE, RUN_FILE, SUMMARY_FILE
from taid_ray.run.metrics import StepMetrics, metrics_log

CPU = hardware_named("cpu")
LAYOUT = ("student.workers=2", "train.batch_size=32", "train.micro_batch_size=8")  # two micro-batches of each worker
SECONDS = {
    "data_s": 0.02, "forward_s": 2.0, "loss_s": 1.0, "backward_s": 4.0, "optimizer_s": 1.5, "schedule_wait_s": 0.25,
    "teacher_wait_s": 0.5, "teacher_compute_s": 8.0, "step_s": 9.5,
}  # fmt: skip


@pytest.fixture(autouse=True)
def few_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands take seconds to simulate."""
    monkeypatch.setattr(plan_rates, "WORKERS", (1, 4))


def line(step: int, **changes: float) -> StepMetrics:
    """The metrics of a step, zero but for SECONDS and changes."""
    fields = dict.fromkeys(StepMetrics.__dataclass_fields__, 0) | {"sources": None} | SECONDS | changes
    return StepMetrics(**(fields | {"step": step}))


def make_run(config: DistillConfig, lines: list[StepMetrics], workers: tuple[int, ...] = (2,)) -> Path:
    """Leaves a run directory as the driver and rank 0 do."""
    write_config(with_absolute_paths(config))
    run = RunManifest(config)
    for number in workers:
        run.begin_attempt(number, "job")
    log = metrics_log(config.run_dir / METRICS_FILE, 0)
    for metrics in lines:
        log.write(metrics.line())
    log.close()
    return config.run_dir


def inputs(*overrides: str, out: str = "unused") -> PlanInputs:
    config = quickstart_config(overrides, out)
    return PlanInputs(config, read_models(config), CPU)


def figures(out: Path, *overrides: str, steps: int = 60, plan: PlanInputs | None = None) -> RunFigures:
    """What a run of `steps` equal steps says."""
    run = inputs(*LAYOUT, *overrides, out=str(out))
    return run_figures(read_history(make_run(run.config, [line(step + 1) for step in range(steps)])), plan or run)


def test_rates_are_seconds_per_micro_batch_without_the_collectives(tmp_path: Path) -> None:
    found = figures(tmp_path / "run")
    between = collectives(found.inputs, 2)
    assert between.gather_s is None and between.reduce_s and between.update_s  # ZeRO 2
    assert found.rates == pytest.approx(
        {
            "forward_s": 1.0, "loss_s": 0.5, "backward_s": 2.0 - between.reduce_s, "optimizer_s": 1.5 - between.update_s,
            "data_s": 0.01, "teacher_s": 2.0, "noise": 0.0,
        }
    )  # fmt: skip
    assert (found.steps, found.step_s) == (60 - WARM_UP - 2 * int(OUTLIERS * 57), pytest.approx(9.5))
    # Forward, loss, backward, optimizer and data as measured; the teacher's 8 s and the report are hidden behind them.
    assert found.replayed_s(assumed_rates(found.inputs, 0.4)) == pytest.approx(8.5 + 0.02, rel=1e-9)


def test_another_layout_takes_its_time_in_proportion(tmp_path: Path) -> None:
    """One worker has half the rows in a micro-batch, and with ZeRO 2 all the parameters."""
    here = inputs("train.batch_size=8", "train.micro_batch_size=4")
    found, assumed = figures(tmp_path / "run", plan=here), assumed_rates(here, 0.4)
    rates = found.applied(assumed, here)
    for name in ("forward_s", "loss_s", "backward_s", "teacher_s"):
        assert getattr(rates, name) == pytest.approx(found.rates[name] / 2)
    assert rates.optimizer_s == pytest.approx(2 * found.rates["optimizer_s"])
    assert rates.data_s == pytest.approx(0.01)
    assert (rates.read_s, rates.request_s) == (assumed.read_s, assumed.request_s)
    own_s = 2 * (rates.data_s + rates.forward_s + rates.loss_s + rates.backward_s) + rates.optimizer_s
    planned = forecast(here, utilisation=0.4, run=found)
    assert planned.times.step_s == pytest.approx(own_s, rel=1e-9)  # the teacher needs 2 s
    assert planned.rates == rates and planned.assumed == assumed


def test_the_first_steps_outliers_and_an_idle_end_do_not_count(tmp_path: Path) -> None:
    config = quickstart_config(LAYOUT, str(tmp_path / "run"))
    slow = dict.fromkeys(SECONDS, 100.0)
    odd = {1, 2, 3, 20, 30, 40, 59, 60}  # the end: a window of 4 are two steps
    run = make_run(config, [line(step, **(slow if step in odd else {})) for step in range(1, 61)])
    write_json(run / SUMMARY_FILE, {"steps": 60})
    assert run_figures(read_history(run), inputs(*LAYOUT)).rates == figures(tmp_path / "other").rates


def test_only_the_latest_steps_count(tmp_path: Path) -> None:
    config = quickstart_config(LAYOUT, str(tmp_path / "run"))
    lines = [line(step, step_s=20.0 if step <= 300 - LATEST else 9.5) for step in range(1, 301)]
    assert run_figures(read_history(make_run(config, lines)), inputs(*LAYOUT)).step_s == pytest.approx(9.5)


def test_noise_is_that_of_a_workers_own_work(tmp_path: Path) -> None:
    def noise(name: str, factor: float) -> float:
        config = quickstart_config(LAYOUT, str(tmp_path / name))
        lines = [line(step, backward_s=4.0 * (factor if step % 2 else 1.0)) for step in range(1, 61)]
        return run_figures(read_history(make_run(config, lines)), inputs(*LAYOUT)).rates["noise"]

    assert noise("little", 1.1) == pytest.approx(0.0230, rel=0.01)  # half of log(8.9 / 8.5)
    assert noise("much", 10.0) == LARGEST_NOISE


def test_a_teacher_in_the_worker_is_known_and_one_behind_a_cache_is_not(tmp_path: Path) -> None:
    assert figures(tmp_path / "local", "teacher.mode=local").rates["teacher_s"] == 2.0
    cached = figures(tmp_path / "cached", f"cache.directory={tmp_path / 'cache'}")
    assert "teacher_s" not in cached.rates
    assert cached.applied(assumed := assumed_rates(inputs(), 0.4), inputs()).teacher_s == assumed.teacher_s
    offline = inputs("teacher.mode=cache", f"cache.directory={tmp_path / 'cache'}")
    assert figures(tmp_path / "pool").applied(assumed_rates(offline, 0.4), offline).teacher_s == 0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("student.layers=[0, 1, 4]",), r"they differ in student.layers \(there \[0, 4\], here \[0, 1, 4\]\)"),
        (("student.lora.rank=4",), r"student.lora.rank \(there null, here 4\)"),
        (("data.sequence_length=128", "teacher.payload=topk"), "data.sequence_length .*; teacher.payload"),
        (("loss.name=forward_kl",), r'loss.name \(there "taid", here "forward_kl"\)'),
        (
            ("data.format=prompt_response", "data.loss_on=all", "data.overlong=drop"),
            "data.format .*data.loss_on .*data.over",
        ),
        (("teacher.shards=2",), "teacher.shards .*Name a run with the same values, or plan without --from"),
    ],
)
def test_a_run_of_something_else_is_refused(tmp_path: Path, overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        figures(tmp_path / "run", plan=inputs(*overrides))


@pytest.mark.parametrize(
    "overrides",
    [
        ("train.learning_rate=1", "data.valid=null"),
        ("teacher.replicas=[1, 4]", "teacher.window=9"),
        ("student.zero_stage=3",),
    ],
)
def test_what_does_not_change_the_rates_may_differ(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    figures(tmp_path / "run", plan=inputs(*overrides))


def test_a_changing_number_of_workers_is_refused(tmp_path: Path) -> None:
    config = quickstart_config(LAYOUT, str(tmp_path / "run"))
    run = make_run(config, [line(step + 1) for step in range(60)], workers=(2, 1, 2))
    with pytest.raises(
        ConfigError, match="its attempts had 2, 1, 2 workers, and its metrics do not say which steps are"
    ):
        run_figures(read_history(run), inputs(*LAYOUT))


def test_too_short_a_run_is_refused(tmp_path: Path) -> None:
    assert figures(tmp_path / "enough", steps=8).steps == 5
    with pytest.raises(ConfigError, match=r"of its 7 steps, 4 are left without the first 3, and at least 5 are needed"):
        figures(tmp_path / "short", steps=7)


def test_too_short_a_run_with_a_long_idle_end_is_refused(tmp_path: Path) -> None:
    """10 steps of one micro-batch each, the last 12 of which the teacher may have been idle in."""
    layout = (*LAYOUT, "train.micro_batch_size=16", "teacher.window=12")
    config = quickstart_config(layout, str(tmp_path / "run"))
    run = make_run(config, [line(step + 1) for step in range(10)])
    write_json(run / SUMMARY_FILE, {"steps": 10})
    with pytest.raises(
        ConfigError, match="of its 10 steps, 0 are left without the first 3 and the last 12, and at least 5"
    ):
        run_figures(read_history(run), inputs(*layout))


def resume(config: DistillConfig, lines: list[StepMetrics], workers: int = 2) -> Path:
    """Leaves in its directory what a run leaves that is resumed from its newest step."""
    write_config(with_absolute_paths(config))
    RunManifest(config).begin_attempt(workers, "another job")
    log = metrics_log(config.run_dir / METRICS_FILE, lines[0].step - 1)
    for metrics in lines:
        log.write(metrics.line())
    log.close()
    return config.run_dir


def test_only_steps_since_a_run_was_resumed_count(tmp_path: Path) -> None:
    """With the settings that it has since then: here four micro-batches of each worker, where there were two of two workers."""
    halves = (*LAYOUT, "train.micro_batch_size=4", "student.workers=1")
    out = str(tmp_path / "run")
    make_run(quickstart_config(LAYOUT, out), [line(step, forward_s=16.0) for step in range(1, 51)])
    run = resume(quickstart_config(halves, out), [line(step) for step in range(51, 58)], workers=1)
    with pytest.raises(
        ConfigError, match=r"of its 57 steps, 4 are left without the first 53 \(it was resumed after step 50"
    ):
        run_figures(read_history(run), inputs(*halves))
    run = resume(quickstart_config(halves, out), [line(step) for step in range(58, 68)], workers=1)
    found = run_figures(read_history(run), inputs(*halves))
    assert (found.steps, found.inputs.workers, found.mixed_starts) == (7, 1, 0)
    assert found.rates["forward_s"] == 2.0 / 8


def test_a_run_of_an_older_version_that_was_resumed_may_be_mixed(tmp_path: Path) -> None:
    config = quickstart_config(LAYOUT, str(tmp_path / "run"))
    run = make_run(config, [line(step + 1) for step in range(60)], workers=(2, 2, 2))
    assert (
        run_figures(read_history(run), inputs(*LAYOUT)).mixed_starts == 0
    )  # all of one driver, whose settings are the same
    change_attempts(run, lambda attempts: [{"began": "then", "workers": 2, "host": "h"} for _ in attempts])
    here = inputs(*LAYOUT)
    found = run_figures(read_history(run), here)
    assert (found.steps, found.mixed_starts) == (60 - WARM_UP - 2 * int(OUTLIERS * 57), 3)
    note = "the workers of run were started 3 times, and an older version did not record at which steps"
    assert any(text.startswith(note) for text in forecast(here, utilisation=0.4, run=found).notes)
    change_attempts(run, lambda attempts: attempts[:1])
    assert run_figures(read_history(run), here).mixed_starts == 0


def test_a_manifest_without_attempts_is_refused(tmp_path: Path) -> None:
    run = make_run(quickstart_config(LAYOUT, str(tmp_path / "run")), [line(step + 1) for step in range(60)])
    change_attempts(run, lambda attempts: [])
    with pytest.raises(ConfigError, match=r"run: its run.json names no start of workers, so their number is not known"):
        run_figures(read_history(run), inputs(*LAYOUT))


def change_attempts(run: Path, change: Callable[[list[Any]], list[Any]]) -> None:
    content = json.loads((run / RUN_FILE).read_text())
    write_json(run / RUN_FILE, content | {"attempts": change(content["attempts"])})


@pytest.mark.parametrize(
    ("there", "here", "gpu", "message"),
    [
        ("cpu", "cuda", "cpu", r'they differ in device \(there "cpu", here "cuda"\)'),
        ("cuda", "cpu", "l4-24g", r'they differ in device \(there "cuda", here "cpu"\)'),
        ("cpu", "auto", "l4-24g", "its device: cpu contradicts --gpu l4-24g; plan with --gpu cpu, or without --from"),
        (
            "cuda",
            "auto",
            "cpu",
            "its device: cuda contradicts --gpu cpu; plan with the GPU that it ran on, or without --from",
        ),
    ],
)
def test_contradicting_devices_are_refused(tmp_path: Path, there: str, here: str, gpu: str, message: str) -> None:
    """The message says whose key `device` it is."""
    plan = replace(inputs(*LAYOUT, f"device={here}"), hardware=hardware_named(gpu))
    with pytest.raises(ConfigError, match=rf"--from {tmp_path / 'run'}: .*{message}"):
        figures(tmp_path / "run", f"device={there}", plan=plan)


def test_steps_that_took_no_time_have_no_scatter(tmp_path: Path) -> None:
    config = quickstart_config(LAYOUT, str(tmp_path / "run"))
    nothing = dict.fromkeys(("forward_s", "loss_s", "backward_s", "optimizer_s"), 0.0)
    run = make_run(config, [line(step + 1, **nothing) for step in range(60)])
    assert run_figures(read_history(run), inputs(*LAYOUT)).rates["noise"] == 0.0


@pytest.mark.parametrize(
    ("mode", "missing"), [("cache", "teacher, one request"), ("local", "a request's way, there and back")]
)
def test_rates_that_the_mode_does_not_have_are_not_named(tmp_path: Path, mode: str, missing: str) -> None:
    here = inputs(*LAYOUT, f"teacher.mode={mode}", f"cache.directory={tmp_path / 'cache'}")
    for run in ("pool", mode):
        found = forecast(
            here,
            utilisation=0.4,
            run=figures(tmp_path / run, f"teacher.mode={run}", f"cache.directory={tmp_path / 'cache'}", plan=here),
        )
        shown = rates_table(found)
        assert shown is not None
        assert missing not in "\n".join([*found.notes, *map(str, shown.columns[0].cells)])


@pytest.fixture
def config_file(tmp_path: Path) -> str:
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(quickstart_config(LAYOUT, "unused").model_dump(mode="json")))
    return str(path)


def invoke(*arguments: str) -> Any:
    app = typer.Typer()
    app.command()(plan)
    return CliRunner().invoke(app, arguments)


def test_the_command_says_what_is_known_and_what_is_assumed(tmp_path: Path, config_file: str) -> None:
    run = make_run(quickstart_config(LAYOUT, str(tmp_path / "run")), [line(step + 1) for step in range(60)])
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    printed = invoke(config_file, "--from", str(run), "--gpu", "cpu").stdout
    assert "stays assumed" in printed and "its steps took 9.5 s" in printed
    assert max(len(text) for text in printed.splitlines() if not text.startswith("note: ")) <= 100
    assert f"note: from {run} (2 worker(s), teacher: 1, means of 47 steps): teacher, one request; student's" in printed
    assert "note: still assumed: a request's way, there and back; reading one row of data; memory, links" in printed
    assert "that of run is taken to be cpu" in printed
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    found = json.loads(invoke(config_file, "--from", str(run), "--gpu", "cpu", "--json").stdout)
    assert (found["run"]["workers"], found["run"]["replicas"], found["run"]["step_s"]) == (2, "1", pytest.approx(9.5))
    assert found["run"]["rates"]["forward_s"] == found["rates"]["forward_s"] == 1.0
    assert found["rates"]["read_s"] == found["assumed"]["read_s"] and found["times"]["limit"] == "student"


def test_the_command_refuses(tmp_path: Path, config_file: str) -> None:
    def refused(message: str, *arguments: str) -> None:
        result = invoke(config_file, *arguments)
        assert result.exit_code != 0
        with pytest.raises(ConfigError, match=message):
            raise result.exception

    empty = make_run(quickstart_config(LAYOUT, str(tmp_path / "empty")), [])
    refused("the run in .*empty has made no step yet", "--from", str(empty), "--gpu", "cpu")
    refused("is not a run directory: there is no such directory", "--from", str(tmp_path / "none"))
    run = str(make_run(quickstart_config(LAYOUT, str(tmp_path / "run")), [line(step + 1) for step in range(60)]))
    refused(r"does not say on what hardware it ran \(device: auto\); name it with --gpu", "--from", run)
    on_cpu = quickstart_config((*LAYOUT, "device=cpu"), str(tmp_path / "cpu"))
    run = str(make_run(on_cpu, [line(step + 1) for step in range(60)]))
    refused("device: cpu contradicts --gpu l4-24g", "--from", run, "--gpu", "l4-24g")
    assert invoke(config_file, "--from", run).exit_code == 0  # its device says it
