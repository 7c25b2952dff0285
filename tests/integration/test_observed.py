"""A run as others see it while it works: Ray's Prometheus endpoint, TensorBoard and the log say what metrics.jsonl says."""

import json
import signal
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from taid_ray import build_config
from taid_ray.driver.launch import RunContext, run_distillation
from taid_ray.driver.signals import StopRequest
from taid_ray.files import read_lines
from taid_ray.tracking.prometheus import METRICS
from tests.support.paths import BUNDLE
from tests.support.waiting import wait_until

pytestmark = pytest.mark.more
EXPORTED_WITHIN_S = 200.0
RARE = {"taid_requests_again", "taid_image_bytes"}
"""Only there once something was lost, and in runs with images."""


@pytest.fixture
def live_run(ray_cluster: str, tmp_path: Path) -> Iterator[Path]:
    """Directory of a run that goes on until the test is over, and is then stopped."""
    config = build_config(
        {
            "name": "observed",
            "out": str(tmp_path / "run"),
            "teacher": {"model": str(BUNDLE / "stories260k"), "timeout_s": 120},
            "student": {"init": "cut", "layers": [0, 4], "dtype": "float32", "zero_stage": 1},
            "data": {
                "train": str(BUNDLE / "tinystories_train.jsonl"),
                "valid": str(BUNDLE / "tinystories_valid.jsonl"),
                "valid_documents": 4,
                "sequence_length": 64,
                "block_documents": 64,
            },
            "train": {"steps": 100_000, "batch_size": 8, "micro_batch_size": 8, "eval_every": 25},
            "checkpoint": {"every_steps": 10},
        }
    )
    stop, ended = StopRequest(), []

    def run() -> None:
        try:
            run_distillation(config, RunContext(stop=stop))
        except BaseException as error:  # looked at below
            ended.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    yield tmp_path / "run"
    stop.request(signal.SIGTERM)
    thread.join(60)
    assert [type(error) for error in ended] == [SystemExit]
    check_tensorboard(tmp_path / "run")
    check_log(tmp_path / "run")


@pytest.mark.timeout(300)
def test_prometheus_sees_the_figures_of_metrics_jsonl(live_run: Path) -> None:
    wait_until(lambda: not differences(live_run), lambda: differences(live_run), EXPORTED_WITHIN_S)


def differences(run_dir: Path) -> str:
    """What of the metrics of this moment is missing or not as in the run's files; empty if nothing is."""
    run_file = run_dir / "run.json"
    if not run_file.exists():
        return "the run has not begun"
    metrics = scraped(json.loads(run_file.read_text())["id"])
    expected = {sample for name in set(METRICS) - RARE for sample in sample_names(name)}
    if missing := expected - set(metrics):
        return f"not exported: {sorted(missing)}"
    step = int(metrics["ray_taid_step"][""])
    lines = read_lines(run_dir / "metrics.jsonl")[:step]
    last = lines[-1]
    same = {
        "ray_taid_planned_steps": 100_000,
        "ray_taid_restarts": 0,
        "ray_taid_t": last["t"],
        "ray_taid_loss_nats": last["loss"],
        "ray_taid_kl_nats": last["kl"],
        "ray_taid_learning_rate": last["lr"],
        "ray_taid_gradient_norm": last["grad_norm"],
        "ray_taid_tokens_per_second": last["tokens_per_s"],
        "ray_taid_tokens_total": sum(line["tokens"] for line in lines),
        "ray_taid_payload_bytes_total": sum(line["payload_bytes"] for line in lines),
        "ray_taid_step_seconds_count": step,
    }
    wrong = [(name, metrics[name][""], value) for name, value in same.items() if metrics[name][""] != near(value)]
    for phase in ("data", "teacher_wait", "backward"):
        value = sum(line[f"{phase}_s"] for line in lines)
        if metrics["ray_taid_phase_seconds_total"][phase] != near(value):
            wrong.append((phase, metrics["ray_taid_phase_seconds_total"][phase], value))
    validations = {found["step"]: found["kl"] for found in read_lines(run_dir / "validation.jsonl")}
    if not any(metrics["ray_taid_validation_kl_nats"][""] == near(kl) for kl in validations.values()):
        wrong.append(("validation", metrics["ray_taid_validation_kl_nats"][""], validations))
    # The teacher exports at other moments than the student, and works ahead of it.
    if not 0 < metrics["ray_taid_teacher_compute_seconds_total"][""] < metrics["ray_taid_teacher_requests_total"][""]:
        wrong.append(("teacher", metrics["ray_taid_teacher_compute_seconds_total"], 0))
    checkpoint = metrics["ray_taid_checkpoint_step"][""]
    if checkpoint % 10 or not step - 30 <= checkpoint <= step:
        wrong.append(("checkpoint", checkpoint, step))
    return f"after step {step}: {wrong}" if wrong else ""


def near(value: float) -> Any:
    return pytest.approx(value, rel=1e-9)


def sample_names(name: str) -> list[str]:
    from ray.util.metrics import Counter, Histogram

    endings = {Counter: ["_total"], Histogram: ["_bucket", "_count", "_sum"]}
    return [f"ray_{name}{ending}" for ending in endings.get(METRICS[name][0], [""])]


def scraped(run: str) -> dict[str, dict[str, float]]:
    """Value by the tag of its own, if it has one, by name; of one run."""
    import ray
    from prometheus_client.parser import text_string_to_metric_families

    node = ray.nodes()[0]
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    with urllib.request.urlopen(url, timeout=10) as answer:
        text = answer.read().decode()
    found: dict[str, dict[str, float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.labels.get("run") == run:
                assert sample.labels["role"] == ("teacher" if "_teacher_" in sample.name else "student")
                found.setdefault(sample.name, {})[sample.labels.get("phase", "")] = sample.value
    return found


def check_tensorboard(run_dir: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0})
    board.Reload()
    lines = read_lines(run_dir / "metrics.jsonl")
    for key in ("loss", "t", "grad_norm"):
        shown = [(event.step, event.value) for event in board.Scalars(f"train/{key}")]
        assert shown == [(line["step"], pytest.approx(line[key])) for line in lines]
    validated = [found["step"] for found in read_lines(run_dir / "validation.jsonl")]
    assert [event.step for event in board.Scalars("validation/kl")] == validated


def check_log(run_dir: Path) -> None:
    """It has what driver and workers said, and ends with why the run ended."""
    log = read_lines(run_dir / "log.jsonl")
    messages = [line["message"] for line in log]
    assert messages[0] == "checking models and data" and messages[-1] == "interrupted"
    assert {"starting 1 student worker(s)", "training"} < set(messages)
    assert {line["role"] for line in log} == {"driver", "student"}
    last = read_lines(run_dir / "metrics.jsonl")[-1]["step"]
    assert f"stopped after step {last}, of which there is a checkpoint" in messages
    assert len({line["run"] for line in log}) == 1
