"""The same steps by taid-ray itself: `distill(config)` on a Ray of this machine, watched from outside its processes."""

import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

from benchmarks.step_case import Case, Outcome, Watched, settings
from taid_ray.files import read_lines
from taid_ray.run.layout import METRICS_FILE

POLL_S = 0.02
STUDENT, TEACHER = "ray::RayTrainWorker", "ray::ServeReplica"


def train_taid(case: Case, values: dict[str, Any]) -> Outcome:
    """Takes the steps of the case in a run of taid-ray, and then as many as its teacher works ahead. values: dotted keys.

    The times are those of metrics.jsonl. A process is idle when metrics.jsonl appears: models, engine and the teacher's
    head exist then, and the validation of one row comes next (its memory counts).
    """
    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "RAY_AUTH_MODE": "disabled",
        "RAY_worker_niceness": "0",  # Ray's 15 would let any other process have the cores first, unlike the other variants
        # Student and teacher share the cores: both may use all of them, and neither spins while it waits for its threads.
        "OMP_NUM_THREADS": str(len(os.sched_getaffinity(0))),
        "OMP_WAIT_POLICY": "passive",
    }
    from taid_ray import distill

    run = case.directory / "run"
    shutil.rmtree(run, ignore_errors=True)
    watcher = Watcher(run / METRICS_FILE, case.steps + case.window)
    watcher.start()
    distill(settings(case, run, values))
    watcher.join()
    lines = read_lines(run / METRICS_FILE)
    return Outcome(
        step_s=[line["step_s"] for line in lines[: case.steps]],
        cpu_s=watcher.cpu_s[: case.steps],
        first_loss=lines[0]["kl"],
        idle_bytes={role: process.idle_bytes for role, process in watcher.processes.items()},
        extra_bytes=watcher.extra_bytes,
    )


class Watcher(threading.Thread):
    """Watches the student's and the teacher's process of a run that this process drives, from first step to last."""

    def __init__(self, metrics: Path, steps: int):
        super().__init__(daemon=True)
        self._metrics, self._steps = metrics, steps
        self.cpu_s: list[float] = []
        self.extra_bytes: dict[str, int] = {}

    def run(self) -> None:
        while not self._metrics.exists():
            time.sleep(POLL_S)
        self.processes = {role: Watched(pid) for role, pid in roles().items()}
        used = self._cpu_s()
        while len(self.cpu_s) < self._steps:
            time.sleep(POLL_S)
            if self._metrics.read_bytes().count(b"\n") > len(self.cpu_s):
                before, used = used, self._cpu_s()
                self.cpu_s.append(used - before)
                self.extra_bytes = {role: process.extra_bytes() for role, process in self.processes.items()}

    def _cpu_s(self) -> float:
        return sum(process.cpu_s() for process in self.processes.values())


def roles() -> dict[str, int]:
    """Process ids below this process: the student worker's and, if there is a pool, the teacher replica's."""
    titles = {pid: Path(f"/proc/{pid}/cmdline").read_text() for pid in descendants(os.getpid())}
    prefixes = {"student": STUDENT, "teacher": TEACHER}
    return {role: pid for role, prefix in prefixes.items() for pid, title in titles.items() if title.startswith(prefix)}


def descendants(pid: int) -> list[int]:
    children = [int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in _children(task).split()]
    return [*children, *(grandchild for child in children for grandchild in descendants(child))]


def _children(task: Path) -> str:
    try:
        return (task / "children").read_text()
    except FileNotFoundError:  # a thread that has ended
        return ""
