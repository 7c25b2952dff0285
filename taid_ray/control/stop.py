"""End of a live run or search from outside, with a checkpoint (`taid-ray stop`)."""

import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

from taid_ray.control.state import POLL_S, WORKING
from taid_ray.control.status import read_status
from taid_ray.errors import ClusterError, ConfigError
from taid_ray.run.directory import has_open
from taid_ray.run.layout import LOCK_FILE
from taid_ray.run.live import Live, read_live, search_of

NOTIFY_S = 5.0


def stop(directory: Path, address: str | None, notify: Callable[[str], None]) -> None:
    """Asks the driver to save and end, and returns when it has ended. notify: told of the progress.

    address: of the Jobs API, if not what the driver knows. Raises ConfigError if the driver is out of reach, ClusterError
    if it died instead of saving.
    """
    if search := search_of(directory):
        raise ConfigError(
            f"{directory} is a trial of a search; stop the search, {search}: all its trials can be resumed"
        )
    status = read_status(directory)
    if status.state not in WORKING:
        notify(f"nothing to stop: {status.headline}")
        return
    live = status.driver
    assert live is not None  # these are the states of a driver that works
    ended = _ask_job(live, address, notify) if live.submission else _ask_process(directory, live, notify)
    _wait_for_end(directory, live, ended, notify)
    if not directory.exists():
        notify("ended before the first step, so there is nothing to resume")
        return
    notify(read_status(directory).headline)


def _ask_job(live: Live, address: str | None, notify: Callable[[str], None]) -> Callable[[], bool]:
    from taid_ray.control import jobs

    client = jobs.connect(address or os.environ.get(jobs.ADDRESS_VARIABLES[0]) or live.dashboard or live.address)
    job = str(live.submission)
    with jobs.answering(client.get_address()):
        client.stop_job(job)
    notify(f"asked the job {job} to stop; it saves a checkpoint after its step")
    deadline = jobs.ReconnectDeadline(client, job, notify)

    def ended() -> bool:
        try:
            over = bool(client.get_job_status(job).is_terminal())
        except jobs.HICCUPS as error:
            deadline.lost(error)
            return False
        deadline.answered()
        return over

    return ended


def _ask_process(directory: Path, live: Live, notify: Callable[[str], None]) -> Callable[[], bool]:
    """Sends SIGTERM to the driver. Returns what tells whether it has ended.

    A process is taken for the driver only if it has the lock of the directory open: never a later one with the same id, or
    one of another container.
    """
    unreachable = ConfigError(
        f"{directory}: its driver is process {live.pid} on {live.host}, and no Ray job, so it cannot be reached from here; "
        f"use `taid-ray stop` or `kill {live.pid}` there"
    )
    if live.host != socket.gethostname():
        raise unreachable
    try:
        lock = (directory / LOCK_FILE).stat()
        if not has_open(live.pid, lock):
            raise unreachable
        os.kill(live.pid, signal.SIGTERM)
    except (FileNotFoundError, ProcessLookupError):  # it ends just now
        return lambda: True
    except PermissionError:
        raise ClusterError(f"{directory}: its driver, process {live.pid}, belongs to another user; ask them") from None
    notify(f"asked process {live.pid} to stop; it saves a checkpoint after its step")
    return lambda: not has_open(live.pid, lock)


def _wait_for_end(directory: Path, live: Live, ended: Callable[[], bool], notify: Callable[[str], None]) -> None:
    start = said = time.monotonic()
    while not ended():
        now = time.monotonic()
        if now - said >= NOTIFY_S and directory.exists():
            said = now
            status = read_status(directory)
            place = f", at step {status.step}" if status.trials is None else ""
            notify(f"waiting for its end{place} ({now - start:.0f} s)")
        time.sleep(POLL_S)
    left = read_live(directory)  # which a driver takes away when it ends by itself
    if left is not None and left.began == live.began:
        _tell_death(directory)


def _tell_death(directory: Path) -> None:
    """Raises ClusterError with what can be resumed, unless the run was complete before its driver died."""
    status = read_status(directory)
    if status.state == "finished":
        return
    if status.trials is not None:
        left = "its trials have the checkpoints they had"
    elif status.checkpoint is not None:
        left = f"its newest whole checkpoint is that of step {status.checkpoint.step}, of {status.step} steps"
    else:
        left = f"no whole checkpoint is seen in {status.checkpoints}"
    raise ClusterError(
        f"{directory}: its driver died without saving, perhaps because it was killed before it was done; {left}. "
        "The same command goes on from there"
    )
