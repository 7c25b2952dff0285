"""Ends a live run or search from outside, with a checkpoint."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

from taid_ray.control.status import read_status
from taid_ray.errors import ClusterError, ConfigError
from taid_ray.run.live import Live, death, read_live, search_of

POLL_S, NOTIFY_S = 0.5, 5.0
START_S = 120.0
"""So long a driver may take to connect to its cluster."""


def stop(directory: Path, address: str | None, notify: Callable[[str], None]) -> None:
    """Returns when the driver has ended. notify: told of the progress.

    address: of the Jobs API, if not what the driver knows. Raises ConfigError if the driver is out of reach, ClusterError
    if it died instead of saving.
    """
    if search := search_of(directory):
        raise ConfigError(
            f"{directory} is a trial of a search; stop the search, {search}: all its trials can be resumed"
        )
    status = read_status(directory)
    if status.state not in ("starting", "training", "searching"):
        notify(f"nothing to stop: {status.headline}")
        return
    live = _wait_for_driver(directory, notify)
    if live is None:
        notify(f"nothing to stop: {read_status(directory).headline if directory.exists() else 'it has ended'}")
        return
    ended = _ask_job(live, address, notify) if live.submission else _ask_process(directory, live, notify)
    _wait_for_end(directory, live, ended, notify)
    if not directory.exists():
        notify("ended before the first step, so there is nothing to resume")
        return
    notify(read_status(directory).headline)


def _wait_for_driver(directory: Path, notify: Callable[[str], None]) -> Live | None:
    start, said = time.monotonic(), False
    while directory.exists() and read_status(directory).state in ("starting", "training", "searching"):
        live = read_live(directory)
        if live is not None and death(directory, live) is None:  # else it is of one before
            return live
        if time.monotonic() - start > START_S:
            raise ConfigError(
                f"{directory}: its driver has not connected to a cluster for {START_S:.0f} s; end it where it was started "
                "(Ctrl-C)"
            )
        if not said:
            notify("it is being started; waiting until it can be told")
        said = True
        time.sleep(POLL_S)
    return None


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
    if not live.is_here:
        raise ConfigError(
            f"{directory}: its driver is process {live.pid} on {live.host}, and no Ray job, so it cannot be reached from here; "
            f"say `taid-ray stop` or `kill {live.pid}` there"
        )
    try:
        os.kill(live.pid, signal.SIGTERM)
    except PermissionError:
        raise ClusterError(f"{directory}: its driver, process {live.pid}, belongs to another user; ask them") from None
    except ProcessLookupError:
        pass
    notify(f"asked process {live.pid} to stop; it saves a checkpoint after its step")
    return lambda: not live.runs_here


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
    if directory.exists() and read_live(directory) == live:  # which a driver takes away when it ends by itself
        _tell_death(directory)


def _tell_death(directory: Path) -> None:
    """Raises ClusterError, unless the run was complete before."""
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
        f"{directory}: its driver died without saving, perhaps because it was killed when its time to stop was over; {left}. "
        "The same command goes on from there"
    )
