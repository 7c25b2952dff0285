"""RUN/live.json, by which the driver of a run or search says where it works and that it still does.

Free of Ray, which other processes must not import before they know the driver's RAY_AUTH_MODE.
"""

import json
import os
import socket
import time
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from taid_ray.config.schema import DistillConfig, stored_config
from taid_ray.config.text import read_tree
from taid_ray.errors import ConfigError
from taid_ray.files import damaged, read_json
from taid_ray.run.directory import is_locked
from taid_ray.run.layout import CONFIG_FILE, LIVE_FILE, SEARCH_FILE, SUMMARY_FILE, TRIALS, TRIALS_FILE

AUTH_MODE, JOB_CONFIG, SUBMISSION_ID = "RAY_AUTH_MODE", "RAY_JOB_CONFIG_JSON_ENV_VAR", "job_submission_id"
"""Names that Ray gave: environment variables, the second one of the entry points of jobs, and a key of what that holds."""
BEAT_S, SILENT_S = 5.0, 60.0
"""Period in which a driver touches its live.json, and the age of that from which a driver of another host counts as dead."""


@dataclass(frozen=True)
class Live:
    """Content of DIR/live.json: written when a driver takes the directory, removed when it ends by itself."""

    host: str
    pid: int
    """The driver's process on that host."""
    began: float = 0.0
    """Unix time at which the driver took the directory."""
    submission: str | None = None
    """Id of the Ray job that the driver is; None if it is none."""
    auth_mode: str | None = None
    """RAY_AUTH_MODE of the driver, which Ray sets when it starts a local cluster; other processes must have the same."""
    address: str | None = None
    """Address of the Ray cluster; None until the driver has joined it, as all that follows."""
    pool: str | None = None
    """Name of the Serve application of the run's own teacher pool; None if it has none."""
    dashboard: str | None = None
    """http://HOST:PORT of the cluster's dashboard and Jobs API, as the cluster itself names it."""
    total_steps: int | None = None
    """Steps of the whole run; None for a search."""


def read_live(run_dir: Path) -> Live | None:
    """The content of live.json; None without a driver. Raises RunError if the file is damaged."""
    content: Any = read_json(run_dir / LIVE_FILE)
    known = {field.name for field in fields(Live)}  # versions before this one left more
    try:
        return None if content is None else Live(**{key: value for key, value in content.items() if key in known})
    except (TypeError, AttributeError) as error:
        raise damaged(run_dir / LIVE_FILE, f"it is not what a driver writes ({error})") from None


def death(run_dir: Path, live: Live) -> str | None:
    """Why the driver counts as dead; None if it lives as far as can be told from here.

    Whoever holds the directory's lock lives. A lock that is free says so of a driver on this host only; that of another
    host may be out of sight, so there the age of live.json decides.
    """
    with suppress(FileNotFoundError):  # live.json: it ends just now
        silence = time.time() - (run_dir / LIVE_FILE).stat().st_mtime
        if is_locked(run_dir):
            return None
        if live.host == socket.gethostname():
            return f"its driver, process {live.pid}, died"
        if silence > SILENT_S:
            return f"its driver, process {live.pid} on {live.host}, has given no sign of life for {silence:.0f} s"
    return None


def job_metadata() -> dict[str, str]:
    """Metadata of the Ray job that this process is the entry point of; empty if it is none."""
    metadata: dict[str, str] = json.loads(os.environ.get(JOB_CONFIG, "{}")).get("metadata", {})
    return metadata


def live_pool(run_dir: Path) -> Live:
    """The driver of a run that has a teacher pool. Raises ConfigError if it is not alive, as far as can be told from here."""
    run_config(run_dir)
    if (run_dir / SUMMARY_FILE).exists():
        raise not_alive(run_dir, "it is finished")
    live = read_live(run_dir)
    if live is None:
        raise not_alive(run_dir, f"it left no {LIVE_FILE}: it has not begun, or has ended")
    if why := death(run_dir, live):
        raise not_alive(run_dir, why)
    if live.address is None:
        raise not_alive(run_dir, "it has not joined a cluster yet")
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
    if not config.has_pool:
        why = f"teacher.mode is {config.teacher.mode}" if config.teacher else "teacher is null"
        raise ConfigError(f"{run_dir} has no teacher pool to scale: {why}; start a run with teacher.mode: pool")
    return config


def search_of(run_dir: Path) -> Path | None:
    """The directory of the search that a run is a trial of; None if it is none."""
    parent = run_dir.absolute().parent
    return parent.parent if parent.name == TRIALS and (parent.parent / SEARCH_FILE).is_file() else None


def stopped_early(run_dir: Path) -> bool:
    """True for a trial that its search has stopped early."""
    search = search_of(run_dir)
    trials = read_json(search / TRIALS_FILE) if search else None
    with suppress(TypeError, KeyError):  # damaged, which the status of the search says
        return (run_dir.absolute().name, "stopped") in [(trial["name"], trial["status"]) for trial in trials or ()]
    return False


def not_alive(run_dir: Path, why: str) -> ConfigError:
    """The error for a run that cannot be scaled because it does not live."""
    return ConfigError(f"the run in {run_dir} is not alive: {why}; only a live run can be scaled")
