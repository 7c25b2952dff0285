"""The word that the driver of a live run or search leaves in its directory: where it runs, and that it still does.

Without Ray, which other processes must not import before they know the run's RAY_AUTH_MODE.
"""

import json
import os
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from taid_ray.config.schema import DistillConfig, stored_config
from taid_ray.config.text import read_tree
from taid_ray.errors import ConfigError
from taid_ray.files import damaged, read_json
from taid_ray.run.layout import CONFIG_FILE, LIVE_FILE, SEARCH_FILE, SUMMARY_FILE, TRIALS, TRIALS_FILE

AUTH_MODE, JOB_CONFIG, SUBMISSION_ID = "RAY_AUTH_MODE", "RAY_JOB_CONFIG_JSON_ENV_VAR", "job_submission_id"
"""Names that Ray gave: environment variables, the second one of the entry points of jobs, and a key of what that holds."""
BEAT_S, SILENT_S = 5.0, 60.0
"""How often a driver touches its live.json, and after how long without that one on another host counts as dead."""


@dataclass(frozen=True)
class Live:
    """Content of DIR/live.json, which is there from the start of a driver's work to its end."""

    address: str
    """Of the Ray cluster."""
    auth_mode: str | None
    """RAY_AUTH_MODE of the driver, which Ray sets when it starts a local cluster; other processes must have the same."""
    pool: str | None
    """Name of the Serve application of the run's own teacher pool; None if it has none."""
    host: str
    pid: int
    """The driver's process."""
    namespace: str | None = None
    """Of process ids: containers may share a host's name."""
    process: str | None = None
    """What tells the driver from a later process with the same id."""
    dashboard: str | None = None
    """http://HOST:PORT of the cluster's dashboard and Jobs API, as the cluster itself names it."""
    submission: str | None = None
    """Id of the Ray job that the driver is."""
    total_steps: int | None = None
    """Of the whole run; None for a search."""
    began: float = 0.0
    """Unix time."""

    @property
    def is_here(self) -> bool:
        """Whether this process could see the driver's."""
        return self.host == socket.gethostname() and self.namespace in (None, pid_namespace())

    @property
    def runs_here(self) -> bool:
        """Whether the driver's process is there, if it can be seen from here."""
        found = process_start(self.pid)
        return self.is_here and found is not None and self.process in (None, found)


def read_live(run_dir: Path) -> Live | None:
    """None if there is no driver, or it has not come so far. Raises RunError if the file is damaged."""
    content: Any = read_json(run_dir / LIVE_FILE)
    try:
        return None if content is None else Live(**content)
    except TypeError as error:
        raise damaged(run_dir / LIVE_FILE, f"it is not what this version writes ({error})") from None


def death(run_dir: Path, live: Live) -> str | None:
    """Why the driver counts as dead; None if it lives as far as can be told from here."""
    if live.is_here:
        return None if live.runs_here else f"its driver, process {live.pid}, ended without a goodbye"
    with suppress(FileNotFoundError):  # it ends just now
        silence = time.time() - (run_dir / LIVE_FILE).stat().st_mtime
        if silence > SILENT_S:
            return f"its driver, process {live.pid} on {live.host}, has given no sign of life for {silence:.0f} s"
    return None


def job_metadata() -> dict[str, str]:
    """Of the Ray job that this process is the entry point of; else empty."""
    metadata: dict[str, str] = json.loads(os.environ.get(JOB_CONFIG, "{}")).get("metadata", {})
    return metadata


def pid_namespace() -> str:
    return os.readlink("/proc/self/ns/pid")


def process_start(pid: int) -> str | None:
    """When a process started, in clock ticks since this boot, with the boot's id; None if there is no such process."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    if fields[0] in "ZX":  # it has ended, and its parent has not asked yet
        return None
    return f"{Path('/proc/sys/kernel/random/boot_id').read_text(encoding='utf-8').strip()}-{fields[19]}"


def live_pool(run_dir: Path) -> Live:
    """Raises ConfigError unless the run, as far as can be told from here, is alive and has a pool."""
    run_config(run_dir)
    if (run_dir / SUMMARY_FILE).exists():
        raise not_alive(run_dir, "it is finished")
    live = read_live(run_dir)
    if live is None:
        raise not_alive(run_dir, f"it left no {LIVE_FILE}: it has not started its teacher pool yet, or has ended")
    if why := death(run_dir, live):
        raise not_alive(run_dir, why)
    if live.pool is None:
        raise ConfigError(f"{run_dir} uses the teacher pool of its search; scale that one: {run_dir.parent.parent}")
    return live


def run_config(run_dir: Path) -> DistillConfig:
    """The configuration of a run, or of a search, with a pool. Raises ConfigError."""
    if (run_dir / SEARCH_FILE).is_file():
        config = stored_config(read_tree(run_dir / SEARCH_FILE)["config"])
    elif (run_dir / CONFIG_FILE).is_file():
        config = stored_config(read_tree(run_dir / CONFIG_FILE))
    else:
        raise ConfigError(
            f"{run_dir} is not a run directory: it holds no {CONFIG_FILE}; name the directory of a live run or search"
        )
    if config.teacher.mode != "pool":
        raise ConfigError(
            f"{run_dir} has no teacher pool to scale: teacher.mode is {config.teacher.mode}; start a run with "
            "teacher.mode: pool"
        )
    return config


def search_of(run_dir: Path) -> Path | None:
    """The directory of the search that a run is a trial of."""
    parent = run_dir.absolute().parent
    return parent.parent if parent.name == TRIALS and (parent.parent / SEARCH_FILE).is_file() else None


def stopped_early(run_dir: Path) -> bool:
    """Whether this is a trial that its search has given up."""
    search = search_of(run_dir)
    trials = read_json(search / TRIALS_FILE) if search else None
    with suppress(TypeError, KeyError):  # damaged, which the status of the search says
        return (run_dir.absolute().name, "stopped") in [(trial["name"], trial["status"]) for trial in trials or ()]
    return False


def not_alive(run_dir: Path, why: str) -> ConfigError:
    return ConfigError(f"the run in {run_dir} is not alive: {why}; only a live run can be scaled")
