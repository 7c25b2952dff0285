"""The liveness file of a run or search: written when a driver takes its directory, renewed while it lives, settled at its end."""

import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import ray

from taid_ray.distributed.ray_internals import dashboard_address
from taid_ray.errors import RunError, TaidRayError
from taid_ray.files import write_json
from taid_ray.run.layout import ENDED_FILE, LIVE_FILE
from taid_ray.run.live import AUTH_MODE, BEAT_S, SUBMISSION_ID, Live, job_metadata, read_live


@contextmanager
def liveness_file(run_dir: Path) -> Iterator[None]:
    """Leaves live.json in the directory of a run or search, whose lock the caller holds, and touches it every BEAT_S.

    An end that is not the run's own, by a signal or an error, is left in ended.json.
    """
    (run_dir / ENDED_FILE).unlink(missing_ok=True)
    here = _this_driver()
    write_json(run_dir / LIVE_FILE, asdict(here))
    over = threading.Event()

    def beat() -> None:
        while not over.wait(BEAT_S):
            with suppress(OSError):  # what depends on it says how long it has heard nothing
                os.utime(run_dir / LIVE_FILE)

    threading.Thread(target=beat, name="taid-beat", daemon=True).start()
    try:
        yield
    except BaseException as error:
        with suppress(RunError, OSError):  # the error itself matters more
            write_json(run_dir / ENDED_FILE, _end(read_live(run_dir) or here, error))
        raise
    finally:
        over.set()
        (run_dir / LIVE_FILE).unlink(missing_ok=True)


def announce_cluster(run_dir: Path, pool: str | None, total_steps: int | None = None) -> None:
    """Adds to live.json what is known once the driver is connected to Ray. pool, total_steps: see Live."""
    dashboard = dashboard_address()
    live = replace(
        read_live(run_dir) or _this_driver(),
        auth_mode=os.environ.get(AUTH_MODE),
        address=ray.get_runtime_context().gcs_address,
        pool=pool,
        dashboard=f"http://{dashboard}" if dashboard else None,
        total_steps=total_steps,
    )
    write_json(run_dir / LIVE_FILE, asdict(live))


def _this_driver() -> Live:
    """Facts about this driver before it has joined a cluster."""
    submission = job_metadata().get(SUBMISSION_ID)
    return Live(socket.gethostname(), os.getpid(), time.time(), submission, os.environ.get(AUTH_MODE))


def _end(live: Live, error: BaseException) -> dict[str, Any]:
    stopped = isinstance(error, KeyboardInterrupt | SystemExit)
    told = str(error) if isinstance(error, TaidRayError) else f"{type(error).__name__}: {error}"
    return {
        "how": "stopped" if stopped else "failed",
        "error": None if stopped else told,
        "ended": time.time(),
        "total_steps": live.total_steps,
        "host": live.host,
        "submission": live.submission,
    }
