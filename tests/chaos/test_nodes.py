"""Nodes that come and go under a run: a cluster of five raylets on this machine, and one run that survives all of it.

Takes about four minutes. `pytest -s` prints how long each recovery took.

The test process connects to none of it: it may be connected to the cluster of the other tests.
"""

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.harness import GONE_S, LOG_TAIL, Run, Tree, small_config, wait_for_death
from tests.support.nodes import Nodes
from tests.support.waiting import wait_until

DRAIN_S = 120.0
"""From the notice to the end of a node; clouds give 30 s to 2 min."""
QUERY_S = 120
"""An answer of the State API takes well below a second on a quiet machine."""
ROLES = {"teacher": {"taid_teacher": 2}, "student": {"taid_student": 1}}
Row = tuple[str, float]
"""What was waited for, and the seconds it took."""
RAYS_OWN = ("ServeController", "_AutoscalingCoordinatorActor")

# A process that is connected to the cluster runs what it is told, as the test process may be connected to another one.
CONNECTED = """
import json, sys, time, ray
from ray.core.generated.autoscaler_pb2 import DrainNodeReason
from ray.util.state import list_actors, list_placement_groups
ray.init(address=sys.argv[1], logging_level="ERROR", log_to_driver=False)

def actors():
    found = list_actors(filters=[("state", "!=", "DEAD")], limit=1000, detail=True, timeout=QUERY_S)
    return [(a.class_name, a.node_id, a.pid) for a in found]

def groups():
    found = list_placement_groups(filters=[("state", "!=", "REMOVED")], limit=1000, timeout=QUERY_S)
    return [g.placement_group_id for g in found]

def drain(node, seconds):
    deadline = time.time() + seconds
    reason = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    gcs = ray._private.worker.global_worker.gcs_client
    accepted, why = gcs.drain_node(node, reason, "the cloud takes it back", int(deadline * 1000))
    assert accepted, why
    return deadline

print(ANSWER, "null", flush=True)
for line in sys.stdin:
    function, *arguments = json.loads(line)
    print(ANSWER, json.dumps(globals()[function](*arguments)), flush=True)
"""
ANSWER = "answer:"


class ConnectedNodes(Nodes):
    """A head without a role, nodes for teacher and student, and a process that is connected to them."""

    def __init__(self) -> None:
        with socket.socket() as free:  # the cluster of the other tests may have the usual port
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        super().__init__(num_cpus=1, include_dashboard=True, dashboard_port=port)
        self._connected: subprocess.Popen[str] | None = None

    def connect(self) -> None:
        command = [sys.executable, "-c", f"ANSWER, QUERY_S = {ANSWER!r}, {QUERY_S}" + CONNECTED, self.address]
        self._connected = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._answer()

    def ask(self, function: str, *arguments: Any) -> Any:
        """Calls a function of CONNECTED."""
        assert self._connected is not None and self._connected.stdin is not None
        print(json.dumps([function, *arguments]), file=self._connected.stdin, flush=True)
        return self._answer()

    def _answer(self) -> Any:
        assert self._connected is not None and self._connected.stdout is not None
        for line in self._connected.stdout:  # Ray may print there, too
            if line.startswith(ANSWER):
                return json.loads(line.removeprefix(ANSWER))
        raise AssertionError("the connected process has ended")

    def processes(self, class_name: str) -> dict[str, list[int]]:
        """Of living actors of a class, by their nodes."""
        found: dict[str, list[int]] = {}
        for name, node, pid in self.ask("actors"):
            if name.startswith(class_name) and node in self:
                found.setdefault(node, []).append(pid)
        return found

    def left(self) -> list[Any]:
        """Of runs: everything but what Serve and Ray Train keep for the whole cluster."""
        return [a for a in self.ask("actors") if not a[0].startswith(RAYS_OWN)] + self.ask("groups")

    def close(self) -> None:
        if self._connected is not None:
            self._connected.kill()
            self._connected.wait()
        super().close()


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[ConnectedNodes]:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    found = ConnectedNodes()
    monkeypatch.setenv("RAY_ADDRESS", found.address)  # for the nodes' processes and the drivers
    try:
        for role in ("teacher", "student", "teacher", "student"):
            found.add(**ROLES[role])
        found.connect()
        yield found
    finally:
        found.close()


@pytest.fixture
def runs(tmp_path: Path) -> Iterator[Callable[[str], Run]]:
    made: list[Run] = []

    def make(name: str) -> Run:
        student: Tree = {"workers": {"min": 1, "max": 2}, "timeout_s": 90}
        made.append(Run(tmp_path / name, small_config(name, student=student)))
        made[-1].start()
        return made[-1]

    yield make
    for run in made:
        run.close()
        print(f"== the end of the log of {run.dir}\n{run.log[-LOG_TAIL:]}")


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_nodes_come_and_go(nodes: ConnectedNodes, runs: Callable[[str], Run]) -> None:
    """A teacher's node is lost, a student's node is lost, another one comes, and one is taken back after a notice."""
    draw, start = random.Random(7), time.monotonic()
    baseline = runs("nodes-baseline")
    baseline.wait_for_end()
    table: list[Row] = [("the run that nothing happens to", time.monotonic() - start)]
    run = runs("nodes-chaos")
    for event in (lose_teacher, lose_student, add_student, drain_student):
        run.wait_for_step(run.step + draw.randint(1, 3))
        table += event(nodes, run, draw)
    run.wait_for_end()
    for what, seconds in table:
        print(f"| {what} | {seconds:.1f} s |", file=sys.stderr)
    check_same(run, baseline)
    assert workers(run) == [2, 1, 2, 1]
    assert not run.left_on_disk()
    wait_until_empty(nodes)


def lose_teacher(nodes: ConnectedNodes, run: Run, draw: random.Random) -> list[Row]:
    """Requests that were under way are answered by the other replica, or by the one that is started anew."""
    replicas = nodes.processes("ServeReplica")
    lost = draw.choice(sorted(replicas))
    reached = run.step
    nodes.lose(lost)
    seconds = run.until(lambda: run.step > reached + 1, "a step that began after the loss")
    wait_for_deaths(replicas[lost])
    assert run.attempts == 1  # the students have not noticed
    return [("teacher node lost: next step", seconds)]


def lose_student(nodes: ConnectedNodes, run: Run, draw: random.Random) -> list[Row]:
    run.until(lambda: re.search(r"checkpoint of step \d+ saved", run.log) is not None, "a checkpoint")
    processes = nodes.processes("RayTrainWorker")
    lost = draw.choice(sorted(processes))
    start = time.monotonic()
    nodes.lose(lost)
    until_restarted(run, 1)
    seconds = time.monotonic() - start
    wait_for_deaths(processes[lost])
    return [("student node lost: first new step, on the other one", seconds)]


def add_student(nodes: ConnectedNodes, run: Run, draw: random.Random) -> list[Row]:
    """The driver watches for a while whether the room is there to stay; the worker must not finish the run meanwhile."""
    ((only,),) = nodes.processes("RayTrainWorker").values()
    os.kill(only, signal.SIGSTOP)
    try:
        nodes.add(**ROLES["student"])
        asked = run.until(lambda: "there is room for more" in run.log, "a word of the new node")
    finally:
        os.kill(only, signal.SIGCONT)
    start = time.monotonic()
    last = stopped(run, 1)
    assert until_restarted(run, 2) == last
    return [
        ("student node added: workers asked to stop", asked),
        ("student node added: first step on both, after that", time.monotonic() - start),
    ]


def drain_student(nodes: ConnectedNodes, run: Run, draw: random.Random) -> list[Row]:
    node = draw.choice(sorted(nodes.processes("RayTrainWorker")))
    start = time.monotonic()
    deadline = nodes.ask("drain", node, DRAIN_S)
    reached = stopped(run, 2)
    seconds = time.monotonic() - start
    saved = list((run.dir / "checkpoints").glob(f"step-{reached:09d}-*/rank-*.json"))
    assert len(saved) == 2 and all(path.stat().st_mtime < deadline for path in saved)
    assert until_restarted(run, 3) == reached
    whole = time.monotonic() - start
    nodes.lose(node)
    return [("notice to leave: stopped with a checkpoint", seconds), ("notice to leave: first step elsewhere", whole)]


def stopped(run: Run, times: int) -> int:
    """Waits until the workers have stopped on request that often. Returns their last step, of which there is a checkpoint."""

    def found() -> list[str]:
        return re.findall(r"stopped after step (\d+), of which there is a checkpoint", " ".join(run.log.split()))

    run.until(lambda: len(found()) == times, "the workers to stop")
    return int(found()[-1])


def until_restarted(run: Run, before: int) -> int:
    """Waits until attempt `before` + 1 has made a step that none had made. Returns the step it went on after."""
    run.until(lambda: run.attempts > before, f"attempt {before + 1}")
    reached = run.step
    run.until(lambda: run.step > reached, f"a new step of attempt {before + 1}")

    def found() -> list[str]:
        return re.findall(r"going on after step (\d+), from the checkpoint", " ".join(run.log.split()))

    run.until(lambda: len(found()) == before, f"a word of attempt {before + 1}")
    return int(found()[-1])


def wait_until_empty(nodes: ConnectedNodes) -> None:
    wait_until(lambda: not nodes.left(), lambda: f"an empty cluster, where there is {nodes.left()}", GONE_S)


def wait_for_deaths(pids: list[int]) -> None:
    for pid in pids:
        wait_for_death(pid)


def workers(run: Run) -> list[int]:
    """Of each attempt."""
    return [attempt["workers"] for attempt in json.loads((run.dir / "run.json").read_text())["attempts"]]


def check_same(run: Run, baseline: Run) -> None:
    """Every step once, and its figures as without the losses but for the order of sums."""
    lines, expected = run.lines(), baseline.lines()
    assert [line["step"] for line in lines] == [line["step"] for line in expected] == list(range(1, len(lines) + 1))
    for line, other in zip(lines, expected, strict=True):
        for key in ("t", "loss", "kl"):
            assert line[key] == pytest.approx(other[key], rel=0, abs=1e-5), (line["step"], key)
        assert line["tokens"] == other["tokens"] and line["samples_seen"] == other["samples_seen"]
