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
from taid_ray.run.directory import has_open, is_locked
from taid_ray.run.layout import LIVE_FILE, LOCK_FILE
from taid_ray.run.live import Live, death, read_live, search_of

JOIN_S = 120.0
"""Limit for a driver that is starting to join its cluster."""
NOTIFY_S = 5.0


def stop(directory: Path, address: str | None, notify: Callable[[str], None]) -> None:
    """Asks the driver to save and end, and returns when its job has ended, or its process has let go of the directory.

    address: of the Jobs API, if not what the driver knows. notify: told of the progress. Raises ConfigError if the driver is
    out of reach, ClusterError if it died instead of saving.
    """
    if search := search_of(directory):
        raise ConfigError(
            f"{directory} is a trial of a search; stop the search, {search}: all its trials can be resumed"
        )
    status = read_status(directory)
    if status.state not in WORKING:
        notify(f"nothing to stop: {status.headline}")
        return
    live = _joined(directory, notify)
    if live is not None:
        ended = _ask_job(live, address, notify) if live.submission else _ask_process(directory, live, notify)
        _wait_for_end(directory, live, ended, notify)
    if not directory.exists():
        notify("ended before the first step, so there is nothing to resume")
        return
    notify(read_status(directory).headline)


def _joined(directory: Path, notify: Callable[[str], None]) -> Live | None:
    """The driver once it has joined its cluster: from then on it saves before it ends. None if it ended before.

    Raises ClusterError if it does not get that far within JOIN_S.
    """
    start, said = time.monotonic(), False
    while True:
        live = read_live(directory)
        if (death(directory, live) is not None) if live else not is_locked(directory):
            return None
        if live is not None and live.address is not None:
            return live
        if time.monotonic() - start > JOIN_S:
            where = f"process {live.pid} on {live.host}" if live else f"the process that holds {directory / LOCK_FILE}"
            raise ClusterError(
                f"{directory}: its driver has not joined a cluster within {JOIN_S:.0f} s; end {where} if it hangs"
            )
        if not said:
            notify("it is being started; waiting until it can be asked")
            said = True
        time.sleep(POLL_S)


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

    def ended() -> bool:
        try:
            return not has_open(live.pid, lock)
        except PermissionError:
            return True  # a zombie, whose files are closed: only root may look at it, and we could a moment ago

    return ended


def _wait_for_end(directory: Path, live: Live, ended: Callable[[], bool], notify: Callable[[str], None]) -> None:
    start = said = time.monotonic()
    while not ended():
        now = time.monotonic()
        if now - said >= NOTIFY_S and (directory / LIVE_FILE).exists():
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
