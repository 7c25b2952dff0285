"""A run in a process of its own, on the tests' cluster, and what it takes to hurt exactly that run and nothing else."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from tests.support.paths import BUNDLE
from tests.support.waiting import START_S, WAIT_S, wait_until

GONE_S = 120.0
"""Within this time nothing of a run may be left after its driver ended by itself."""
LOG_TAIL = 6000
SAME = (
    "t",
    "loss",
    "kl",
    "entropy_pt",
    "grad_norm",
    "tokens",
    "samples_seen",
    "momentum",
    "lr",
    "epoch",
    "floor_active",
)
"""What of a step does not depend on how long it took."""

SHARED = ("ServeController", "_AutoscalingCoordinatorActor")
"""Classes of actors that serve all runs of a cluster, though they carry the job of the driver that needed them first."""

Tree = dict[str, Any]


def small_config(name: str, **changes: Tree | None) -> Tree:
    """Seconds of training, whose t moves with every loss. changes: values of whole sections, laid over these; None for null."""
    tree: Tree = {
        "name": name,
        "device": "cpu",
        "teacher": {
            "model": str(BUNDLE / "stories260k"),
            "dtype": "float32",
            "replicas": 2,
            "cpus_per_shard": 0.5,
            "timeout_s": 180,
            "idle_timeout_s": 60,
        },
        "student": {
            "init": "cut",
            "layers": [0, 4],
            "dtype": "float32",
            "workers": 2,
            "cpus_per_worker": 0.5,
            "zero_stage": 2,
            "timeout_s": 60,
        },
        "data": {
            "train": str(BUNDLE / "tinystories_train.jsonl"),
            "valid": str(BUNDLE / "tinystories_valid.jsonl"),
            "valid_documents": 5,
            "sequence_length": 96,
            "block_documents": 64,
        },
        "schedule": {"alpha": 0.2, "beta": 0.5},
        "train": {"steps": 48, "batch_size": 16, "micro_batch_size": 2, "learning_rate": 2e-3, "eval_every": 10},
        "checkpoint": {"every_steps": 4},
    }
    for section, values in changes.items():
        tree[section] = None if values is None else tree.get(section, {}) | values
    return tree


class Run:
    """One run directory, and the driver that works in it now."""

    def __init__(self, path: Path, config: Tree):
        """path: a directory of the run's own, made here; the run directory is RUN in it."""
        path.mkdir()
        self.dir, self._home = path / "RUN", path
        self._config = path / "config.yaml"
        self._config.write_text(yaml.safe_dump(config))
        self._log = path / "driver.log"
        self._driver: subprocess.Popen[bytes] | None = None
        self._jobs: set[str] = set()

    def start(self, *overrides: str) -> None:
        """`taid-ray train`, which begins the run or resumes it."""
        command = [sys.executable, "-m", "taid_ray.cli", "train", str(self._config), *overrides, "--out", str(self.dir)]
        environment = os.environ | {"COLUMNS": "160"}  # see tests/conftest.py
        with self._log.open("ab") as log:
            self._driver = subprocess.Popen(
                command, cwd=self._home, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    # What the run has done

    @property
    def log(self) -> str:
        """What all drivers said."""
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    def seconds_until(self, message: str) -> float:
        """When the first driver said it."""
        found = re.search(rf"\[ *([\d.]+)s\] {re.escape(message)}", self.log)
        assert found, f"nobody said: {message}"
        return float(found[1])

    def lines(self) -> list[Tree]:
        """Of metrics.jsonl; without a last one that is being written."""
        with suppress(FileNotFoundError):
            text = (self.dir / "metrics.jsonl").read_text()
            return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
        return []

    @property
    def step(self) -> int:
        """The last one on file; what attempts that are over have made beyond their checkpoint may count."""
        return max((line["step"] for line in self.lines()), default=0)

    @property
    def attempts(self) -> int:
        """How often workers were started."""
        with suppress(FileNotFoundError):
            return len(json.loads((self.dir / "run.json").read_text())["attempts"])
        return 0

    def resumed_from(self) -> int:
        """The step of the checkpoint that the last attempt went on from; 0 before there was one."""
        return int((re.findall(r"going on after step (\d+),", self.log) or [0])[-1])

    @property
    def id(self) -> str:
        found: str = json.loads((self.dir / "run.json").read_text())["id"]
        return found

    @property
    def summary(self) -> Tree:
        found: Tree = json.loads((self.dir / "summary.json").read_text())
        return found

    # Waiting

    def until(self, met: Callable[[], bool], what: str, timeout_s: float = START_S) -> float:
        """Seconds until `met`. Fails after timeout_s, and as soon as the driver has ended.

        The default is ten times what a quiet machine takes for a driver's next new step, or its end.
        """

        def met_alive() -> bool:
            if self.ended and not met():  # asked again, because it may have been met just before
                self.fail(f"the driver ended with {self.exit_code} before {what}")
            return met()

        return wait_until(met_alive, lambda: f"{what}\n{self.log[-LOG_TAIL:]}", timeout_s)

    def wait_for_step(self, step: int, timeout_s: float = START_S) -> None:
        self.until(lambda: self.step >= step, f"step {step}", timeout_s)

    def wait_for_attempt(self, before: int) -> None:
        """Until workers were started once more than `before` times."""
        self.until(lambda: self.attempts > before, f"attempt {before + 1}")

    def wait_for_end(self, code: int = 0, timeout_s: float = START_S) -> None:
        """Until the driver has ended, with exit code `code`."""
        if not self.ended_within(timeout_s):
            self.fail(f"the driver has not ended within {timeout_s:.0f} s")
        if self.exit_code != code:
            self.fail(f"the driver ended with {self.exit_code} instead of {code}")

    def ended_within(self, seconds: float) -> bool:
        """Waits that long for the driver's end."""
        assert self._driver is not None
        with suppress(subprocess.TimeoutExpired):
            self._driver.wait(seconds)
        return self.ended

    def fail(self, message: str) -> None:
        raise AssertionError(f"{message}\n{self.log[-LOG_TAIL:]}")

    # Victims

    def actors(self, class_name: str = "") -> list[Any]:
        """The run's actors that are not dead, by the State API."""
        from ray.util.state import list_actors

        self._note_job()
        found = list_actors(filters=[("state", "!=", "DEAD")], limit=1000, detail=True, timeout=int(WAIT_S))
        # Serve's replicas belong to the job of Serve's controller, and the lease outlives its own.
        own = [a for a in found if a.job_id in self._jobs or (self._named and self.id in f"{a.class_name} {a.name}")]
        return [a for a in own if a.class_name.startswith(class_name) and not a.class_name.startswith(SHARED)]

    def rank(self, rank: int) -> int:
        """Process of a student worker: rank 0 is the one that writes the metrics."""
        found = self.pids("RayTrainWorker")
        main = [pid for pid in found if _has_open(pid, self.dir / "metrics.jsonl")]
        assert len(main) == 1, f"ranks {found}, of which {main} write metrics.jsonl"
        others = [pid for pid in found if pid not in main]
        return main[0] if rank == 0 else others[rank - 1]

    def pids(self, class_name: str) -> list[int]:
        """Processes of the run's living actors of a class."""
        return sorted(actor.pid for actor in self.actors(class_name) if actor.state == "ALIVE" and actor.pid)

    @property
    def driver(self) -> int:
        assert self._driver is not None
        return self._driver.pid

    @property
    def ended(self) -> bool:
        """Whether the driver has."""
        return self.exit_code is not None

    @property
    def exit_code(self) -> int | None:
        """Of the driver, if it has ended."""
        return self._driver.poll() if self._driver is not None else None

    def signal_driver(self, number: int) -> None:
        os.kill(self.driver, number)

    def kill_driver(self) -> None:
        """And waits for its end, as a shell would."""
        self._note_job()
        self.signal_driver(signal.SIGKILL)
        assert self._driver is not None
        self._driver.wait(GONE_S)

    def close(self) -> None:
        """Ends the driver, if a test left it behind."""
        if self._driver is not None and self._driver.poll() is None:
            self.signal_driver(signal.SIGTERM)
            self.signal_driver(signal.SIGTERM)
            try:
                self._driver.wait(GONE_S)
            except subprocess.TimeoutExpired:
                self.kill_driver()

    # What is left

    def left_on_cluster(self) -> list[str]:
        """The run's actors, Serve application and placement groups that are there."""
        from ray import serve
        from ray.util.state import list_placement_groups

        found = [f"actor {a.class_name} {a.name} ({a.state}, process {a.pid})" for a in self.actors()]
        found += [f"application {app}" for app in serve.status().applications if self._named and self.id in app]
        groups = list_placement_groups(
            filters=[("state", "!=", "REMOVED")], limit=1000, detail=True, timeout=int(WAIT_S)
        )
        return found + [f"placement group {g.state}" for g in groups if g.creator_job_id in self._jobs]

    def left_on_disk(self) -> list[str]:
        """Files that only a live run has."""
        names = [path.name for path in self.dir.rglob("*")] + [path.name for path in self._home.glob(".taid-*")]
        return [n for n in names if n.startswith((".", "taid-")) or n.endswith(".tmp") or n == "live.json"]

    def check_nothing_left(self) -> None:
        """On the cluster and on the disk, soon after the driver has ended by itself."""
        self.check_left_cluster(GONE_S)
        assert not self.left_on_disk()

    def check_left_cluster(self, timeout_s: float) -> None:
        """Waits until nothing of the run is left there."""
        wait_until(
            lambda: not self.left_on_cluster(),
            lambda: f"nothing on the cluster, where there is {self.left_on_cluster()}\n{self.log[-LOG_TAIL:]}",
            timeout_s,
        )

    @property
    def _named(self) -> bool:
        return (self.dir / "run.json").exists()

    def _note_job(self) -> None:
        """Remembers the Ray job of the driver: what it starts carries that job's id."""
        from ray._private.state import state

        if self._driver is not None:
            jobs = state.job_table()
            self._jobs |= {job["JobID"] for job in jobs if job["DriverPid"] == self.driver}


NewRun = Callable[[Tree], Run]
"""The fixture `new_run`: makes runs, and ends those that a failed test leaves behind."""


RESULTS = ("before", "after", "validations", "tokens", "steps")


def check_same_result(run: Run, baseline: Run, compared: tuple[str, ...] = RESULTS) -> None:
    """Every step once, with the same figures; the same weights and validations, bit for bit. compared: keys of the summary."""
    lines, expected = run.lines(), baseline.lines()
    assert [line["step"] for line in lines] == list(range(1, len(expected) + 1))
    for line, other in zip(lines, expected, strict=True):
        same = [key for key in SAME if key in other]
        assert {key: line.get(key) for key in same} == {key: other[key] for key in same}, f"step {line['step']} differs"
    for key in compared:
        assert run.summary[key] == baseline.summary[key], f"{key} differs"
    weights = [(each.dir / "model" / "model.safetensors").read_bytes() for each in (run, baseline)]
    assert weights[0] == weights[1], "the weights differ"


def wait_for_death(pid: int, timeout_s: float = GONE_S) -> None:
    """Of a process that somebody else must have ended by then."""
    wait_until(lambda: not Path(f"/proc/{pid}").exists() or _is_zombie(pid), f"the end of process {pid}", timeout_s)


def _is_zombie(pid: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    return True


def _has_open(pid: int, path: Path) -> bool:
    with suppress(OSError):  # it has ended, or closed a file meanwhile
        return any(os.readlink(entry) == str(path) for entry in Path(f"/proc/{pid}/fd").iterdir())
    return False
