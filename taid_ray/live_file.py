"""Finds the teacher pool of a live run by the word its driver left in the run directory.

Without Ray, which other processes must not import before they know the run's RAY_AUTH_MODE.
"""

import json
import socket
from dataclasses import dataclass
from pathlib import Path

from taid_ray.config import DistillConfig, build_config
from taid_ray.config_text import read_tree
from taid_ray.errors import ConfigError
from taid_ray.metrics import CONFIG_FILE, SUMMARY_FILE
from taid_ray.search_results import SEARCH_FILE

LIVE_FILE = "live.json"
AUTH_MODE = "RAY_AUTH_MODE"


@dataclass(frozen=True)
class LivePool:
    """Content of RUN/live.json."""

    address: str
    """Of the Ray cluster."""
    auth_mode: str | None
    """RAY_AUTH_MODE of the driver, which Ray sets when it starts a local cluster; other processes must have the same."""
    pool: str
    """Name of the pool's Serve application."""
    host: str
    pid: int
    """The driver's process."""


def live_pool(run_dir: Path) -> LivePool:
    """Raises ConfigError unless the run, as far as can be told from here, is alive and has a pool."""
    run_config(run_dir)
    path = run_dir / LIVE_FILE
    if (run_dir / SUMMARY_FILE).exists():
        raise not_alive(run_dir, "it is finished")
    if not path.is_file():
        raise not_alive(run_dir, f"it left no {LIVE_FILE}: it has not started its teacher pool yet, or has ended")
    live = LivePool(**json.loads(path.read_text(encoding="utf-8")))
    if live.host == socket.gethostname() and not Path(f"/proc/{live.pid}").exists():
        raise not_alive(run_dir, f"its driver, process {live.pid}, ended without a goodbye")
    return live


def run_config(run_dir: Path) -> DistillConfig:
    """The configuration of a run, or of a search, with a pool. Raises ConfigError."""
    if (run_dir / SEARCH_FILE).is_file():
        config = build_config(read_tree(run_dir / SEARCH_FILE)["config"])
    elif (run_dir / CONFIG_FILE).is_file():
        config = build_config(read_tree(run_dir / CONFIG_FILE))
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


def not_alive(run_dir: Path, why: str) -> ConfigError:
    return ConfigError(f"the run in {run_dir} is not alive: {why}; only a live run can be scaled")
