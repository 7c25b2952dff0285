"""The run directory: whether it may be used or taken up again, its lock, and its manifest run.json."""

import fcntl
import json
import os
import shutil
import socket
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, date, datetime
from pathlib import Path
from typing import IO, Any, Literal

import yaml

from taid_ray.config.fields import MOVABLE, RESUMABLE
from taid_ray.config.paths import flat, with_absolute_paths
from taid_ray.config.schema import DistillConfig, marks_of, same_meaning, stored_config
from taid_ray.config.text import read_tree
from taid_ray.errors import ConfigError, TaidRayError
from taid_ray.files import damaged, read_json, replace_text, write_json
from taid_ray.run.layout import (
    CONFIG_FILE,
    LIVE_FILE,
    LOCK_FILE,
    METRICS_FILE,
    RAY_TRAIN_PREFIX,
    RUN_FILE,
    SUMMARY_FILE,
)

LOCK_S = 1.0
"""Time for which a lock is tried: `is_locked` has one for a moment, only a driver has it for longer."""


def inspect_run_dir(config: DistillConfig) -> Literal["new", "unfinished", "finished"]:
    """State of this run in `config.run_dir`. Raises ConfigError if that holds anything else, or cannot be made.

    Whether an unfinished run's data are the same, under whatever path, is not asked here; see `driver.same_data`.
    """
    run_dir = config.run_dir
    try:
        run_dir.exists()
    except OSError as error:
        raise ConfigError(
            f"out: {str(run_dir)[:100]} cannot be a directory ({error.strerror}); choose another one"
        ) from None
    if run_dir.exists() and not run_dir.is_dir():
        raise ConfigError(f"out: {run_dir} is a file; name a directory that does not exist yet")
    if run_dir.exists() and any(run_dir.iterdir()):
        if not (run_dir / CONFIG_FILE).exists() or not (run_dir / RUN_FILE).exists():
            raise ConfigError(
                f"out: {run_dir} already holds other files than a run's; choose another directory with --out, or remove it"
            )
        finished = (run_dir / SUMMARY_FILE).exists()
        _check_same(config, may_move=not finished)
        return "finished" if finished else "unfinished"
    existing = next(path for path in (run_dir, *run_dir.parents) if path.exists())
    try:
        with tempfile.TemporaryDirectory(prefix=".taid-probe-", dir=existing):
            pass
    except OSError as error:
        raise ConfigError(
            f"out: {run_dir} cannot be made, because nothing can be written to {existing} ({error.strerror}); "
            "choose another directory with --out"
        ) from None
    return "new"


def read_summary(run_dir: Path) -> dict[str, Any]:
    """Reads summary.json of a finished run."""
    summary: dict[str, Any] = json.loads((run_dir / SUMMARY_FILE).read_text(encoding="utf-8"))
    return summary


def moved_data(config: DistillConfig) -> list[str]:
    """Keys of data that have another path than in the directory's config.yaml, each with both values."""
    before, now = stored_config(read_tree(config.run_dir / CONFIG_FILE)), with_absolute_paths(config)
    return sorted(set(changed_keys(before, now)) - set(changed_keys(before, now, may_move=True)))


def _check_same(config: DistillConfig, may_move: bool) -> None:
    """Raises ConfigError if the directory's run was begun with something else that its trajectory depends on."""
    stored = stored_config(read_tree(config.run_dir / CONFIG_FILE))
    changed = changed_keys(stored, with_absolute_paths(config), may_move)
    if changed:
        raise ConfigError(
            f"out: {config.run_dir} holds a run that was begun with other values of keys that may not change: "
            f"{'; '.join(changed)}. Give them their old values to resume it, or choose another directory with --out"
        )


def changed_keys(before: DistillConfig, now: DistillConfig, may_move: bool = False) -> list[str]:
    """Keys that a trajectory depends on and that differ, each with both values. may_move: without paths of data."""
    free = {RESUMABLE, MOVABLE} if may_move else {RESUMABLE}
    old, new = (flat(each.model_dump(mode="json")) for each in (before, now))
    return [
        f"{key} (was {json.dumps(old.get(key))}, now {json.dumps(new.get(key))})"
        for key in sorted(old.keys() | new.keys())
        if not same_meaning(key, old.get(key), new.get(key)) and free.isdisjoint(marks_of(key))
    ]


def on_its_day(config: DistillConfig, path: Path | None = None) -> DistillConfig:
    """Fills in data.date where it is null: from what a run or a search left at `path`, else with today's date.

    Raises ConfigError if that cannot be read.
    """
    if config.data.date is not None:
        return config
    left = read_tree(path) if path is not None and path.exists() else {}
    begun = stored_config(left.get("config", left)).data.date if left else None
    today = date.today().isoformat()
    return config.model_copy(update={"data": config.data.model_copy(update={"date": begun or today})})


def read_manifest(path: Path) -> dict[str, Any] | None:
    """Reads a run.json: `id`, and `attempts` with what `RunManifest.begin_attempt` records of each.

    None if there is none, or no longer: a run that ends before its first step removes its directory. Raises RunError if it is
    damaged.
    """
    content = read_json(path)
    if content is None:
        return None
    try:
        if isinstance(content["id"], str) and all(attempt["workers"] for attempt in content["attempts"]):
            return dict(content)
    except (TypeError, KeyError, IndexError):
        pass
    raise damaged(path, "it does not hold id and attempts")


def jobs_of(manifest: dict[str, Any]) -> set[str]:
    """The Ray jobs of all drivers that started workers of a run. manifest: as `read_manifest` gives it."""
    return {attempt["job"] for attempt in manifest["attempts"] if "job" in attempt}


class RunManifest:
    """RUN/run.json: the name of a run on its cluster, and the attempts of all its drivers."""

    def __init__(self, config: DistillConfig):
        self._path = config.run_dir / RUN_FILE
        new: dict[str, Any] = {"id": f"{config.name}-{uuid.uuid4().hex[:8]}", "attempts": []}
        self._content = read_manifest(self._path) or new
        self.id: str = self._content["id"]
        self._metrics = config.run_dir / METRICS_FILE
        self._steps_before: int | None = None
        storage = config.checkpoint.storage
        self.checkpoints = f"{storage.rstrip('/')}/{self.id}" if storage else str(config.run_dir / "checkpoints")
        """Directory or URI of the run's checkpoints."""

    @property
    def attempts(self) -> int:
        """Number of starts of the workers, by all drivers."""
        return len(self._content["attempts"])

    @property
    def jobs(self) -> set[str]:
        """The Ray jobs, as `driver.orphans.own_job` names them, of all drivers that started workers."""
        return jobs_of(self._content)

    def begin_attempt(self, workers: int, job: str) -> int:
        """Records that a driver, the Ray job `job`, starts workers. Returns the attempt's number, from 1 over all drivers.

        In run.json it has `began` (UTC, ISO 8601), `workers`, `host`, `job`, and `steps_before`: the number of steps in
        metrics.jsonl when this driver took the run up. Later steps were all made with its configuration. Older versions did
        not record this.
        """
        if self._steps_before is None:  # the first attempt of this driver, none of whose workers has written yet
            self._steps_before = _count_lines(self._metrics)
        attempt = {
            "began": datetime.now(UTC).isoformat(timespec="seconds"),
            "workers": workers,
            "host": socket.gethostname(),
            "job": job,
            "steps_before": self._steps_before,
        }
        self._content["attempts"].append(attempt)
        self.write()
        return self.attempts

    def write(self) -> None:
        """Writes run.json."""
        write_json(self._path, self._content)


def _count_lines(path: Path) -> int:
    """Counts without parsing: after a crash of the machine, the last lines may be damaged."""
    with suppress(FileNotFoundError), path.open("rb") as file:
        return sum(1 for _ in file)
    return 0


def write_config(config: DistillConfig) -> None:
    """Makes the run directory and writes the resolved configuration into it."""
    config.run_dir.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    replace_text(config.run_dir / CONFIG_FILE, text)


@contextmanager
def scratch_directory(run_dir: Path) -> Iterator[str]:
    """A directory in RUN for Ray Train's own files, removed at the end.

    What cannot be removed then, because a process still writes there or NFS keeps a file that is open, must not make a
    finished run fail; the next driver removes it.
    """
    with tempfile.TemporaryDirectory(prefix=RAY_TRAIN_PREFIX, dir=run_dir, ignore_cleanup_errors=True) as directory:
        yield directory


@contextmanager
def run_directory(config: DistillConfig) -> Iterator[RunManifest]:
    """Makes the run directory, or takes it up again, and keeps other drivers out of it.

    Removes it again if it is new and the run ends before its first step by what a user can put right. Raises ConfigError if
    another driver has it.
    """
    run_dir = config.run_dir
    run_dir.mkdir(parents=True, exist_ok=True)
    with locked(run_dir):
        new = not (run_dir / RUN_FILE).exists()
        for left in run_dir.glob(f"{RAY_TRAIN_PREFIX}*"):  # by a driver that was killed
            shutil.rmtree(left, ignore_errors=True)
        run = RunManifest(config)
        run.write()
        write_config(config)
        try:
            yield run
        except (TaidRayError, KeyboardInterrupt, SystemExit):
            metrics = run_dir / METRICS_FILE
            if new and (not metrics.exists() or not metrics.stat().st_size):
                shutil.rmtree(run_dir, ignore_errors=True)
            raise


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Keeps other drivers out of a directory. The lock ends with the process, however that ends.

    What a driver that was killed left in live.json goes first: nobody may take it for this one's. Raises ConfigError if
    another driver has the directory.
    """
    path = run_dir / LOCK_FILE
    deadline = time.monotonic() + LOCK_S
    while not _has(file := path.open("a"), path):
        file.close()
        if time.monotonic() > deadline:
            raise ConfigError(
                f"out: another process is at work in {run_dir}; wait for it, or end it with `taid-ray stop {run_dir}`"
            )
        time.sleep(LOCK_S / 10)
    with file:
        (run_dir / LIVE_FILE).unlink(missing_ok=True)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def is_locked(run_dir: Path) -> bool:
    """True if a process is seen to hold the lock. One on another host may be out of sight, so False means little there."""
    with suppress(OSError), (run_dir / LOCK_FILE).open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def has_open(pid: int, file: os.stat_result) -> bool:
    """True if a process of this host has a file open, also one that was removed meanwhile.

    A directory's lock tells its driver from a later process with the same id, and from one of another container. Raises
    PermissionError if the process belongs to another user.
    """
    with suppress(FileNotFoundError):  # the process has ended
        for opened in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(FileNotFoundError):  # it was closed just now
                if os.path.samestat(opened.stat(), file):
                    return True
    return False


def _has(file: IO[str], path: Path) -> bool:
    """Tries to lock the file at `path`, opened as `file`. Returns False if somebody has it, or has removed it meanwhile."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except (BlockingIOError, FileNotFoundError):
        return False
