"""A comparison of real runs that is killed in the middle and started again: nothing is lost, and the teacher works once."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from taid_ray.compare.results import Comparison, read_comparison
from taid_ray.files import read_lines
from taid_ray.report.search_results import read_search
from tests.support.harness import small_config
from tests.support.waiting import wait_until

STEPS, WAIT_S = 20, 300.0
METHODS = ("forward_kl", "sft", "taid")
pytestmark = [pytest.mark.more, pytest.mark.timeout(900)]  # the fixture holds a whole comparison


@pytest.fixture(scope="module")
def killed(ray_cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Comparison, int]]:
    """A comparison whose driver was killed while its second run trained, and when the first one's summary was written."""
    home = tmp_path_factory.mktemp("compared")
    tree = small_config(
        "compared",
        teacher={"replicas": 1},
        student={"workers": 1},
        data={"train": write_pairs(home), "valid": None, "format": "prompt_response", "sequence_length": 64},
        train={"steps": STEPS, "eval_every": 10},
    )
    (home / "config.yaml").write_text(yaml.safe_dump(tree))
    command = [sys.executable, "-m", "taid_ray.cli", "compare", "config.yaml", "--methods", ",".join(METHODS)]
    command += ["--seeds", "1", "--out", "C", "--max-concurrent", "1"]

    def start() -> subprocess.Popen[bytes]:
        with (home / "driver.log").open("ab") as log:
            return subprocess.Popen(command, cwd=home, env=os.environ | {"COLUMNS": "160"}, stdout=log, stderr=log)

    def said() -> str:
        return (home / "driver.log").read_text()[-4000:]

    driver, first, second = start(), home / "C/trials/0001", home / "C/trials/0002"

    def second_run_has_a_checkpoint() -> bool:
        assert driver.poll() is None, said()
        return any((second / "checkpoints").glob("*/rank-*.json"))

    wait_until(second_run_has_a_checkpoint, said, WAIT_S)
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    written = (first / "summary.json").stat().st_mtime_ns
    driver = start()
    assert driver.wait(WAIT_S) == 0, said()
    assert "Quality" in said() and "forward_kl" in said()
    yield read_comparison(home / "C"), written


def write_pairs(home: Path) -> str:
    """Prompts with responses, the first five held out."""
    path = home / "pairs.jsonl"
    rows = [{"prompt": f"Story {number}: Tom went", "response": f"to park {number % 7}."} for number in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_killed_comparison_goes_on_and_ends(killed: tuple[Comparison, int]) -> None:
    comparison, written = killed
    first, second = (comparison.path / "trials" / name for name in ("0001", "0002"))
    assert (first / "summary.json").stat().st_mtime_ns == written
    assert [len(json.loads((run / "run.json").read_text())["attempts"]) for run in (first, second)] == [1, 2]
    assert sorted(comparison.evaluations) == [(method, 0) for method in METHODS]
    assert sorted(comparison.memory) == [*METHODS] and min(comparison.memory.values()) > 1e6
    assert all(len(found.rouge_l) == len(found.documents) == 5 for found in comparison.evaluations.values())
    assert (comparison.path / "comparison.html").exists()


def test_methods_begin_alike_and_their_last_figures_are_those_of_the_runs(killed: tuple[Comparison, int]) -> None:
    comparison, _ = killed
    assert comparison.unequal_starts() == []
    for place, trial in comparison.trials.items():
        found = comparison.evaluations[place].mean
        assert trial.validations[-1]["cross_entropy"] == pytest.approx(found["cross_entropy"], abs=1e-4)
        assert trial.validations[-1]["kl"] == pytest.approx(found["forward_kl"], abs=1e-4)
    steps = [read_lines(comparison.path / "trials" / name / "metrics.jsonl") for name in ("0001", "0002", "0003")]
    assert steps[0][0]["tokens"] == steps[1][0]["tokens"] == steps[2][0]["tokens"]
    assert {len(lines) for lines in steps} == {STEPS}


def test_the_teacher_computes_each_sample_once(killed: tuple[Comparison, int]) -> None:
    """The run that was killed may have asked again for what was under way."""
    trials = read_search(killed[0].path).trials
    tokens = [trial.summary["teacher_tokens"] for trial in trials if trial.summary]
    assert tokens[0] > 0 and tokens[2] == 0 and tokens[1] <= 0.1 * tokens[0]
