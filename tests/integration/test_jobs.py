"""A run as a Ray job on a cluster of several nodes: scaled, stopped and resumed from outside, it is the local run.

The cluster lives in a process of its own, so that the tests' own one does not notice it.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from taid_ray.cli.quickstart import quickstart_config
from taid_ray.control.submit import job_name
from taid_ray.driver.launch import distill
from tests.support.waiting import wait_until

STEPS = 100
WAIT_S = 300.0
GROWN = "teacher pool: 3 replica(s) run"
SAME, TOLERANCE = ("t", "loss", "kl", "grad_norm"), 1e-5
OVERRIDES = [f"train.steps={STEPS}", "train.micro_batch_size=4", "data.valid=null", "data.valid_documents=5"]
pytestmark = [pytest.mark.more, pytest.mark.timeout(1200)]  # the fixtures hold whole runs

# The temporary directory is what Ray's job supervisor finds its own cluster by, where a machine has several.
NODES = """
import json, shutil, socket, sys, tempfile
from ray._private.utils import write_ray_address
from ray.cluster_utils import Cluster

def free():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]

temp, port = tempfile.mkdtemp(prefix="taid-", dir="/tmp"), free()
head = {"num_cpus": 0, "include_dashboard": True, "dashboard_port": port, "dashboard_agent_listen_port": free(), "temp_dir": temp}
cluster = Cluster(initialize_head=True, head_node_args=head)
try:
    write_ray_address(cluster.address, temp)
    for role, slots in (("taid_teacher", 2), ("taid_teacher", 2), ("taid_student", 1)):
        cluster.add_node(num_cpus=slots, resources={role: slots})
    print("nodes:", json.dumps(f"http://127.0.0.1:{port}"), flush=True)
    sys.stdin.read()
finally:
    cluster.shutdown()
    shutil.rmtree(temp, ignore_errors=True)
"""


@dataclass
class Ended:
    """A command of the terminal, when it was over."""

    code: int
    output: str


class Terminal:
    """Of somebody outside of the cluster, who knows the address of its dashboard."""

    def __init__(self, home: Path, environment: dict[str, str], dashboard: str):
        self.home, self._environment = home, environment | {"RAY_API_SERVER_ADDRESS": dashboard, "COLUMNS": "160"}
        self.config, self.run, self._begun = home / "config.yaml", home / "RUN", 0

    def begin(self, *arguments: str) -> Callable[[], Ended]:
        """Starts a command of taid-ray; what it returns waits for the end."""
        command = [sys.executable, "-m", "taid_ray.cli", *arguments]
        self._begun += 1
        path = self.home / f"{self._begun}-{arguments[0]}.log"
        with path.open("w") as log:
            process = subprocess.Popen(command, cwd=self.home, env=self._environment, stdout=log, stderr=log)

        def end() -> Ended:
            return Ended(process.wait(timeout=WAIT_S), path.read_text())

        return end

    def submit(self, *overrides: str) -> Callable[[], Ended]:
        return self.begin("submit", str(self.config), *overrides, "--out", str(self.run))

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.begin("status", str(self.run), "--json")().output)
        return found

    def lines(self) -> list[dict[str, Any]]:
        path = self.run / "metrics.jsonl"
        text = path.read_text() if path.exists() else ""
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


@pytest.fixture(scope="module")
def terminal(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Terminal]:
    """With a cluster of a head that trains nothing, two nodes for the teacher and one for the student."""
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    own = str(Path(sys.executable).parent)  # not on the PATH: a job finds the Python of its Ray without it
    environment["PATH"] = ":".join(each for each in environment["PATH"].split(":") if each != own)
    home = tmp_path_factory.mktemp("jobs")
    with (home / "nodes.log").open("w") as log:
        nodes = subprocess.Popen(
            [sys.executable, "-c", NODES],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
    assert nodes.stdin is not None and nodes.stdout is not None
    told = next(line for line in nodes.stdout if line.startswith("nodes:"))
    yield Terminal(home, environment, json.loads(told.removeprefix("nodes:")))
    nodes.stdin.close()
    nodes.wait(timeout=60)


@dataclass
class Story:
    """What was seen of a run that was submitted twice at once, scaled, stopped, and submitted again."""

    first: list[Ended]
    """The two submissions that were made at the same time."""
    up: Ended
    after_up: int
    """Steps made when the teacher had three replicas, and when it had one again."""
    down: Ended
    after_down: int
    meanwhile: dict[str, Any]
    """The status with three replicas."""
    stop: Ended
    stopped: dict[str, Any]
    """The status then."""
    again: Ended
    finished: dict[str, Any]
    lines: list[dict[str, Any]]
    other: Ended
    """A submission of another learning rate."""


@pytest.fixture(scope="module")
def story(terminal: Terminal) -> Story:
    config = quickstart_config(OVERRIDES, str(terminal.run))
    terminal.config.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    both = [terminal.submit(), terminal.submit()]

    def log() -> str:
        return (terminal.home / "1-submit.log").read_text()

    wait_until(terminal.lines, lambda: f"a step:\n{log()}", WAIT_S)
    up = terminal.begin("scale", str(terminal.run), "--teacher", "3")()
    after_up, meanwhile = len(terminal.lines()), terminal.status()
    wait_until(lambda: GROWN in log(), lambda: f"word of the replicas:\n{up.output}\n{log()}", WAIT_S)
    down = terminal.begin("scale", str(terminal.run), "--teacher", "1")()
    after_down = len(terminal.lines())
    stop = terminal.begin("stop", str(terminal.run))()
    first = [end() for end in both]
    stopped = terminal.status()
    again = terminal.submit()()
    other = terminal.submit("train.learning_rate=1.0e-3")()
    return Story(
        first,
        up,
        after_up,
        down,
        after_down,
        meanwhile,
        stop,
        stopped,
        again,
        terminal.status(),
        terminal.lines(),
        other,
    )


def test_the_trajectory_is_that_of_a_local_run(story: Story, ray_cluster: str, tmp_path: Path) -> None:
    local = distill(quickstart_config([*OVERRIDES, "teacher.mode=local"], str(tmp_path / "RUN")))
    expected = [json.loads(line) for line in (local.path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in story.lines] == [line["step"] for line in expected] == list(range(1, STEPS + 1))
    for key in SAME:
        found = [line[key] for line in story.lines]
        assert found == pytest.approx([line[key] for line in expected], rel=TOLERANCE), key


def test_the_teacher_is_scaled_while_it_trains(story: Story) -> None:
    assert (story.up.code, story.down.code) == (0, 0), story.up.output + story.down.output
    assert "3 replica(s) run" in story.up.output and "1 replica(s) run" in story.down.output
    assert 0 < story.after_up <= story.after_down < STEPS
    log = story.first[0].output
    assert GROWN in log
    assert story.meanwhile["teacher_replicas"]["running"] == 3


def test_two_submissions_at_once_follow_one_job(story: Story, terminal: Terminal) -> None:
    job = job_name(str(terminal.run))
    assert sorted(f"job {job} submitted" in each.output for each in story.first) == [False, True]
    assert sum(f"job {job} is under way already" in each.output for each in story.first) == 1
    for each in story.first:
        assert (
            each.code == 143
            and "stopping after this step with a checkpoint" in each.output
            and f"job {job}: stopped" in each.output
        )


def test_status_tells_what_it_does(story: Story, terminal: Terminal) -> None:
    found = story.meanwhile
    assert (found["state"], found["total_steps"], found["attempts"]) == ("training", STEPS, 1)
    assert story.after_up - 5 <= found["step"] < STEPS and found["step_age_s"] < 60
    line = story.lines[found["step"] - 1]
    assert (found["t"], found["loss"], found["kl"]) == (line["t"], line["loss"], line["kl"])
    assert found["tokens_per_s"] > 0 and 0 <= found["teacher_wait_share"] < 1 and found["left_s"] > 0
    assert found["driver"]["submission"] == job_name(str(terminal.run))


def test_stop_saves_and_the_same_command_goes_on(story: Story, terminal: Terminal) -> None:
    assert story.stop.code == 0, story.stop.output
    step = story.stopped["step"]
    assert f"stopped after step {step} of {STEPS}" in story.stop.output
    assert story.stopped["state"] == "stopped" and story.stopped["checkpoint"]["step"] == step >= story.after_down
    assert story.again.code == 0, story.again.output
    assert f"job {job_name(str(terminal.run))}-2 submitted" in story.again.output
    assert f"going on after step {step}" in story.again.output
    assert (story.finished["state"], story.finished["attempts"]) == ("finished", 2)


def test_a_jobs_exit_code_is_the_commands(story: Story) -> None:
    assert story.other.code == 2
    assert "train.learning_rate (was 0.002, now 0.001)" in story.other.output
