"""A search with real trials: each equals the same configuration run alone, and an interrupted one loses nothing."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from taid_ray.config.schema import DistillConfig, build_config, load_config
from taid_ray.config.space import Space
from taid_ray.driver.launch import RunResult, distill
from taid_ray.report.search_results import read_search
from taid_ray.run.live import read_live
from taid_ray.search.driver import SearchResult, run_search
from tests.support.harness import SAME, small_config
from tests.support.waiting import wait_until

STEPS, RATE, USELESS_RATE = 24, 2e-3, 1e-8
WAIT_S = 240.0
pytestmark = [pytest.mark.more, pytest.mark.timeout(600)]  # the fixtures hold whole searches


def tree() -> dict[str, Any]:
    return small_config(
        "searched",
        teacher={"replicas": 1},
        student={"workers": 1},
        train={"steps": STEPS, "eval_every": 6, "learning_rate": RATE},
    )


def lines(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def figures(run_dir: Path) -> list[dict[str, Any]]:
    return [{key: line[key] for key in SAME} for line in lines(run_dir)]


@pytest.fixture(scope="module")
def alone(ray_cluster: str, tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    return distill(build_config(tree(), values={"out": str(tmp_path_factory.mktemp("alone") / "RUN")}))


@pytest.fixture(scope="module")
def interrupted(ray_cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The directory of a search whose driver was killed while its second trial trained, and that was then resumed; and
    what the second trial's run.json and the first one's summary were when it was killed."""
    home = tmp_path_factory.mktemp("interrupted")
    (home / "config.yaml").write_text(yaml.safe_dump(tree()))
    space = {
        "search": "grid",
        "scheduler": "asha",
        "grace_fraction": 0.5,
        "space": {"train.learning_rate": {"choice": [RATE, USELESS_RATE]}},
    }
    (home / "space.yaml").write_text(yaml.safe_dump(space))
    command = [sys.executable, "-m", "taid_ray.cli", "tune", "config.yaml", "--space", "space.yaml", "--out", "S"]
    command += ["--max-concurrent", "1", "--no-share-outputs"]

    def start() -> subprocess.Popen[bytes]:
        with (home / "driver.log").open("ab") as log:
            return subprocess.Popen(command, cwd=home, env=os.environ | {"COLUMNS": "160"}, stdout=log, stderr=log)

    driver, first, second = start(), home / "S/trials/0001", home / "S/trials/0002"

    def second_trial_has_a_checkpoint() -> bool:
        assert driver.poll() is None, (home / "driver.log").read_text()[-3000:]
        return any((second / "checkpoints").glob("*/rank-*.json"))

    wait_until(second_trial_has_a_checkpoint, lambda: (home / "driver.log").read_text()[-3000:], WAIT_S)
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    before = {"summary": (first / "summary.json").stat().st_mtime_ns, "step": lines(second)[-1]["step"]}
    driver = start()
    assert driver.wait(WAIT_S) == 0, (home / "driver.log").read_text()[-3000:]
    yield home / "S", before


def test_finished_trials_are_kept_and_running_ones_go_on(interrupted: tuple[Path, dict[str, Any]]) -> None:
    directory, before = interrupted
    first, second = directory / "trials/0001", directory / "trials/0002"
    assert before["step"] < STEPS // 2, "it was killed too late to show anything"
    assert (first / "summary.json").stat().st_mtime_ns == before["summary"]
    attempts = [len(json.loads((run / "run.json").read_text())["attempts"]) for run in (first, second)]
    assert attempts == [1, 2]
    assert "going on after step" in second.with_suffix(".log").read_text()
    steps = [line["step"] for line in lines(second)]
    assert steps == list(range(1, len(steps) + 1))


def test_a_bad_trial_is_stopped_and_the_best_one_found(interrupted: tuple[Path, dict[str, Any]]) -> None:
    directory, _ = interrupted
    found = read_search(directory)
    assert [(trial.name, trial.status) for trial in found.trials] == [("0001", "finished"), ("0002", "stopped")]
    assert STEPS // 2 <= found.trials[1].step < STEPS
    assert load_config(directory / "best.yaml").train.learning_rate == RATE
    assert (directory / "report.html").exists()
    # The search's driver wrote the stopped trial's figures once more, after the end of the process that had done so.
    (events,) = (directory / "trials/0002/tensorboard").iterdir()
    trial = read_live(directory / "trials/0002")
    assert trial is not None and events.name.split(".")[-2] != str(trial.pid)
    assert not [path for path in directory.rglob("*") if path.name in (".tune", ".stop") or "ray-train" in path.name]


def test_a_trial_equals_the_same_run_alone(interrupted: tuple[Path, dict[str, Any]], alone: RunResult) -> None:
    directory, _ = interrupted
    assert figures(directory / "trials/0001") == figures(alone.path)


@pytest.fixture(scope="module")
def shared(ray_cluster: str, tmp_path_factory: pytest.TempPathFactory) -> SearchResult:
    """Two trials at the same time, whose teacher computes each sample once."""
    space = Space.model_validate({"search": "grid", "space": {"train.learning_rate": {"choice": [RATE, RATE / 2]}}})
    return run_search(build_config(tree()), space, tmp_path_factory.mktemp("shared") / "S", max_concurrent=2)


def test_shared_outputs_change_nothing_that_matters(shared: SearchResult, alone: RunResult) -> None:
    found = figures(shared.path / "trials/0001")
    assert len(found) == STEPS
    for line, expected in zip(found, figures(alone.path), strict=True):
        assert line == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_the_teacher_computes_each_sample_once(shared: SearchResult, alone: RunResult) -> None:
    computed = [trial.summary["teacher_tokens"] for trial in shared.search.trials if trial.summary]
    assert len(computed) == 2 and 0 < sum(computed) <= 1.1 * alone.summary["teacher_tokens"]


def test_a_finished_search_is_not_run_again(shared: SearchResult) -> None:
    config: DistillConfig = build_config(tree())
    space = Space.model_validate({"search": "grid", "space": {"train.learning_rate": {"choice": [RATE, RATE / 2]}}})
    before = {path: path.stat().st_mtime_ns for path in shared.path.glob("trials/*/*.json*")}
    again = run_search(config, space, shared.path)
    assert again.best and shared.best and again.best.name == shared.best.name
    assert before == {path: path.stat().st_mtime_ns for path in shared.path.glob("trials/*/*.json*")}
