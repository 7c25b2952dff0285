"""Directories of runs and searches that nobody ran, as `status` and `stop` find them."""

import json
import os
import socket
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml

from taid_ray.control.status import RECENT_STEPS
from taid_ray.run.layout import CONFIG_FILE, LIVE_FILE, METRICS_FILE, RUN_FILE, SEARCH_FILE, TRIALS_FILE
from taid_ray.run.live import Live

NOBODY = 2**22 + 1
"""Above the largest process id."""


HERE = Live(socket.gethostname(), os.getpid(), address="127.0.0.1:9", pool="pool")
"""A driver of this host, which lives as long as the lock of its directory is held."""


ELSEWHERE = replace(HERE, host="another-host", pid=NOBODY)
"""A driver whose lock is out of sight, and which lives as long as its live.json is young."""


TREE: dict[str, Any] = {
    "teacher": {"model": "t"},
    "student": {"model": "s"},
    "data": {"train": "d"},
    "train": {"steps": 40},
}


def run_dir(path: Path, steps: int = 0, live: Live | None = None, **files: dict[str, Any]) -> Path:
    """files: contents of other JSON files."""
    path.mkdir(exist_ok=True)
    (path / CONFIG_FILE).write_text(yaml.safe_dump(TREE | {"out": str(path)}))
    attempt = {"began": "2026-11-21T20:00:00+00:00", "workers": 2, "host": "h"}
    (path / RUN_FILE).write_text(json.dumps({"id": "run-1", "attempts": [attempt]}))
    if steps:
        (path / METRICS_FILE).write_text("".join(json.dumps(line(step)) + "\n" for step in range(1, steps + 1)))
    if live is not None:
        (path / LIVE_FILE).write_text(json.dumps(asdict(live)))
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return path


def line(step: int) -> dict[str, Any]:
    """Steps take 2 s from the 21st on, 1 s before."""
    seconds = 2.0 if step > RECENT_STEPS else 1.0
    return {
        "step": step, "t": step / 100, "loss": 3.0 - step / 100, "kl": 1.0, "tokens": 500,
        "step_s": seconds, "teacher_wait_s": seconds / 4,
    }  # fmt: skip


def ended(how: str, error: str | None = None) -> dict[str, Any]:
    return {"how": how, "error": error, "ended": time.time() - 100, "total_steps": 50}


def search_dir(path: Path, *statuses: str, live: Live | None = None) -> Path:
    path.mkdir()
    space = {"search": "grid", "space": {"schedule.alpha": {"choice": [0.1, 0.2]}}}
    (path / SEARCH_FILE).write_text(yaml.safe_dump({"id": "s-1", "config": TREE | {"name": "s"}, "space": space}))
    entries = [{"name": f"{n:04d}", "params": {}, "status": status} for n, status in enumerate(statuses, start=1)]
    (path / TRIALS_FILE).write_text(json.dumps(entries))
    if live is not None:
        (path / LIVE_FILE).write_text(json.dumps(asdict(live)))
    return path
