"""Three hosts with addresses of their own: a job scaled from another host, then a student's and the teacher's host cut off.

What a cut leaves alive on the other side is the difference to a host that dies: there the workers of an attempt that is
over go on, until they are told. Takes ten minutes, needs Linux and root: `make test-netns`.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from taid_ray.cli.quickstart import quickstart_config
from tests.support.hosts import Host, Switch, wait_until, why_not

REASON = why_not()
pytestmark = [
    pytest.mark.netns,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(REASON is not None, reason=str(REASON)),
]
STEPS = 500
SAME = ("t", "loss", "kl", "entropy_pt", "grad_norm", "tokens", "lr", "samples_seen")
TOLERANCE = 1e-5
OVERRIDES = (f"train.steps={STEPS}", "train.micro_batch_size=4", "data.valid=null", "data.valid_documents=5")
GCS_PORT, DASHBOARD_PORT = 6379, 8265
STORE_BYTES = 200_000_000
WAIT_S, LOCAL_S = 240.0, 900.0
BIN = Path(sys.executable).parent
# A host that does not answer is given up after some seconds instead of a minute.
DETECTION = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "3000",
    "RAY_health_check_failure_threshold": "3",
}


class RayHosts:
    """A head that also trains, a host for a second student worker, and one for the teacher."""

    def __init__(self, logs: Path):
        self._switch, self._logs = Switch(), logs
        self.head, self.student, self.teacher = self.all = [Host(self._switch, number, logs) for number in (1, 2, 3)]
        self.address, self.dashboard = f"{self.head.address}:{GCS_PORT}", f"http://{self.head.address}:{DASHBOARD_PORT}"
        self._ray: dict[str, subprocess.Popen[bytes]] = {}
        self.start(
            self.head,
            {"taid_student": 1},
            "--head",
            f"--port={GCS_PORT}",
            "--dashboard-host=0.0.0.0",
            f"--dashboard-port={DASHBOARD_PORT}",
        )
        wait_until(lambda: self.run(self.head, "status", "ray", "status", code=None) == 0, 90, "the head did not start")
        self.start_student()
        self.start_teacher()
        wait_until(lambda: self.nodes() == 3, 90, "the hosts did not join")

    def start_student(self) -> None:
        self.start(self.student, {"taid_student": 1}, f"--address={self.address}")

    def start_teacher(self) -> None:
        self.start(self.teacher, {"taid_teacher": 3}, f"--address={self.address}")

    def start(self, host: Host, resources: dict[str, int], *arguments: str) -> None:
        command = [f"{BIN}/ray", "start", "--block", f"--node-ip-address={host.address}", *arguments]
        command += ["--num-cpus=4", f"--resources={json.dumps(resources)}", f"--object-store-memory={STORE_BYTES}"]
        self._ray[host.name] = host.popen(command, "ray", **DETECTION, PATH=f"{BIN}:{os.environ['PATH']}")

    def ray_lives(self, host: Host) -> bool:
        return self._ray[host.name].poll() is None

    def nodes(self) -> int:
        """That the cluster counts on."""
        log = self._logs / f"{self.head.name}-nodes.log"
        log.unlink(missing_ok=True)
        self.run(self.head, "nodes", "ray", "list", "nodes", "--format=json", "--filter=state=ALIVE", code=None)
        # Ray's warnings, coloured ones too, lie around the list.
        found = re.search(r"^\[(\{.*\})?\]$", log.read_text(), re.MULTILINE)
        return len(json.loads(found[0])) if found else 0

    def run(self, host: Host, log: str, *command: str, code: int | None = 0) -> int:
        """Runs a command of this installation on a host to its end. code: that it must end with."""
        found = self.popen(host, log, *command).wait(WAIT_S)
        assert code is None or found == code, f"{command} on {host.name}: {found}\n{host.log(log)[-3000:]}"
        return found

    def popen(self, host: Host, log: str, *command: str) -> subprocess.Popen[bytes]:
        environment = {"RAY_API_SERVER_ADDRESS": self.dashboard, "RAY_ADDRESS": self.address, "COLUMNS": "160"}
        return host.popen([f"{BIN}/{command[0]}", *command[1:]], log, **environment)

    def taid(self, host: Host, log: str, *arguments: str) -> int:
        return self.run(host, log, "python", "-m", "taid_ray.cli", *arguments)

    def close(self) -> None:
        for host in self.all:
            host.close()
        self._switch.close()


class Job:
    """The submitted run, seen through its directory."""

    def __init__(self, directory: Path, submission: subprocess.Popen[bytes]):
        self.directory, self.submission = directory, submission

    def lines(self) -> list[dict[str, Any]]:
        path = self.directory / "metrics.jsonl"
        text = path.read_text() if path.exists() else ""
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]

    @property
    def step(self) -> int:
        return len(self.lines())

    def attempts(self) -> list[int]:
        """The number of workers of each."""
        return [attempt["workers"] for attempt in json.loads((self.directory / "run.json").read_text())["attempts"]]

    def wait_until(self, holds: Callable[[], object], what: str) -> float:
        """As hosts.wait_until, but ends with the job."""
        seconds = wait_until(lambda: holds() or self.submission.poll() is not None, WAIT_S, what)
        assert holds(), f"{what}: the job ended before"
        return seconds


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[RayHosts]:
    started = RayHosts(tmp_path)
    yield started
    started.close()


@pytest.fixture
def expected(tmp_path: Path) -> list[dict[str, Any]]:
    """What the same run says of itself on one host, with one worker and without Ray's network."""
    out = tmp_path / "LOCAL"
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    command = [sys.executable, "-m", "taid_ray.cli", "quickstart", *OVERRIDES, "teacher.mode=local"]
    command += ["train.micro_batch_size=16", "--out", str(out)]
    subprocess.run(command, env=environment, check=True, timeout=LOCAL_S, capture_output=True)
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_a_run_on_several_hosts_survives_their_isolation(
    expected: list[dict[str, Any]], hosts: RayHosts, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table: list[tuple[str, float]] = []

    def took(what: str, seconds: float) -> None:
        table.append((what, seconds))
        with capsys.disabled():
            print(f"\n{what:.<60} {seconds:6.1f} s", end="", flush=True)

    directory = tmp_path / "RUN"
    job = Job(directory, submit(hosts, tmp_path, directory))
    took("first step", job.wait_until(lambda: job.step > 0, "no step was made"))
    for replicas in (3, 1):  # from a host that has nothing to do with the run
        hosts.taid(hosts.teacher, "scale", "scale", str(directory), "--teacher", str(replicas))
    assert 0 < job.step < STEPS and job.attempts() == [2]

    # A student's host: the attempt ends, the other worker goes on alone, and the host comes back.
    before = job.step
    hosts.student.cut_off()
    took("student's host cut off: new attempt", job.wait_until(lambda: len(job.attempts()) == 2, "no second attempt"))
    assert job.attempts()[1] == 1
    job.wait_until(lambda: job.step > before, "no step was made without the host")
    hosts.student.bring_back()
    took("back: Ray there has ended", wait_until(lambda: not hosts.ray_lives(hosts.student), 90, "Ray lives on"))
    took("and every process of the old attempt", wait_until(lambda: not hosts.student.processes(), 60, "some live on"))
    hosts.start_student()
    took("Ray started again: both work", job.wait_until(lambda: job.attempts() == [2, 1, 2], "it did not grow again"))
    before = job.step
    took("20 more steps", job.wait_until(lambda: job.step > before + 20, "no step was made with the host"))

    # The teacher's host, for less time than it takes to be given up, and for more.
    hosts.teacher.cut_off()
    wait_until(lambda: stands_still(job), 60, "steps went on without a teacher")
    hosts.teacher.bring_back()
    before = job.step
    took("teacher's host gone for some seconds: steps again", job.wait_until(lambda: job.step > before, "no step"))
    hosts.teacher.cut_off()
    wait_until(lambda: hosts.nodes() == 2, 90, "the host was not given up")
    hosts.teacher.bring_back()
    wait_until(lambda: not hosts.ray_lives(hosts.teacher), 90, "Ray lives on")
    before = job.step
    hosts.start_teacher()
    took("gone for good and started again: steps again", job.wait_until(lambda: job.step > before, "no step was made"))
    assert job.attempts() == [2, 1, 2]  # the students waited

    job.wait_until(lambda: (directory / "summary.json").exists(), "it did not finish")
    assert job.submission.wait(WAIT_S) == 0
    check_same(job.lines(), expected)


def submit(hosts: RayHosts, home: Path, directory: Path) -> subprocess.Popen[bytes]:
    """From the teacher's host: cut off later, it has to find the log again."""
    overrides = ("student.workers={min: 1, max: 2}", "student.timeout_s=40", "checkpoint.every_steps=20")
    config = quickstart_config([*OVERRIDES, *overrides], str(directory)).model_dump(mode="json")
    (home / "config.yaml").write_text(yaml.safe_dump(config))
    command = ("python", "-m", "taid_ray.cli", "submit", str(home / "config.yaml"), "--out", str(directory))
    return hosts.popen(hosts.teacher, "submit", *command)


def stands_still(job: Job) -> bool:
    """Whether no step is made for two seconds."""
    before = job.step
    try:
        wait_until(lambda: job.step > before, 2.0, "")
    except AssertionError:
        return True
    return False


def check_same(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert [line["step"] for line in found] == list(range(1, STEPS + 1))
    for key in SAME:
        values = [line[key] for line in expected]
        assert [line[key] for line in found] == pytest.approx(values, rel=TOLERANCE), key
