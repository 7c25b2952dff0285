"""How much memory a run's processes take, seen from outside: an actor on every node that looks into /proc."""

import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

POLL_S = 0.2
LOOK_S = 10.0


class MemoryWatch:
    """Runs as an actor. Knows the most that each student worker and teacher replica that came after it has held on its node."""

    def __init__(self, pool: str):
        self._raylet, self._pool = os.getppid(), pool
        # Ray keeps idle processes, which may get a role later.
        self._earlier = {pid for pid, title in processes(self._raylet) if role_of(title, pool)}
        self._peaks: dict[str, int] = {}
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def peaks(self) -> dict[str, int]:
        """Bytes of resident memory by role: `worker`, `replica`."""
        return self._peaks

    def _look(self) -> None:
        while True:
            for pid, title in processes(self._raylet):
                role = role_of(title, self._pool)
                if role and pid not in self._earlier:
                    self._peaks[role] = max(self._peaks.get(role, 0), peak_bytes(pid))
            time.sleep(POLL_S)


def role_of(title: str, pool: str) -> str | None:
    """Of a process by the name that Ray gives it. pool: begin of the name of the Serve application of the run's teacher."""
    if title.startswith("ray::RayTrainWorker"):
        return "worker"
    return "replica" if title.startswith((f"ray::ServeReplica:{pool}", "ray::TeacherShard")) else None


def processes(parent: int) -> Iterator[tuple[int, str]]:
    """Those that a raylet has started, with their titles."""
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, IndexError):  # it has ended meanwhile
            if int((path / "stat").read_text().rpartition(")")[2].split()[1]) == parent:
                yield int(path.name), (path / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")


def peak_bytes(pid: int) -> int:
    """The most resident memory that a process has held; 0 if it has ended."""
    with suppress(OSError):
        found = re.search(r"^VmHWM:\s+(\d+) kB$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
        return int(found[1]) * 1024 if found else 0
    return 0


@contextmanager
def memory_watched(pool: str) -> Iterator[Callable[[], dict[str, int]]]:
    """Watches all nodes of the connected cluster. Yields what gives the peaks so far, over all of them."""
    watch = ray.remote(num_cpus=0)(MemoryWatch)
    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
    actors: list[Any] = [
        watch.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=True)).remote(pool)
        for node in nodes
    ]

    def peaks() -> dict[str, int]:
        found: dict[str, int] = {}
        for each in ray.get([actor.peaks.remote() for actor in actors], timeout=LOOK_S):
            found |= {role: max(count, found.get(role, 0)) for role, count in each.items()}
        return found

    try:
        yield peaks
    finally:
        for actor in actors:
            ray.kill(actor)
