"""The liveness file of a run or search: written when the driver begins, renewed while it lives, settled at its end."""

import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray

from taid_ray.distributed.ray_internals import dashboard_address
from taid_ray.errors import RunError, TaidRayError
from taid_ray.files import write_json
from taid_ray.run.layout import ENDED_FILE, LIVE_FILE
from taid_ray.run.live import AUTH_MODE, BEAT_S, SUBMISSION_ID, Live, job_metadata, pid_namespace, process_start


@contextmanager
def liveness_file(run_dir: Path, pool: str | None, total_steps: int | None = None) -> Iterator[None]:
    """Leaves word in the directory of a run or search that it lives, until it is over. In the driver, connected to Ray.

    pool: see Live. An end that is not the run's own, by a signal or an error, is left in ended.json.
    """
    here = _this_driver(pool, total_steps)
    (run_dir / ENDED_FILE).unlink(missing_ok=True)
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
        with suppress(RunError):  # the error itself matters more
            write_json(run_dir / ENDED_FILE, _end(here, error))
        raise
    finally:
        over.set()
        (run_dir / LIVE_FILE).unlink(missing_ok=True)


def _this_driver(pool: str | None, total_steps: int | None) -> Live:
    dashboard = dashboard_address()
    pid = os.getpid()
    return Live(
        address=ray.get_runtime_context().gcs_address,
        auth_mode=os.environ.get(AUTH_MODE),
        pool=pool,
        host=socket.gethostname(),
        pid=pid,
        namespace=pid_namespace(),
        process=process_start(pid),
        dashboard=f"http://{dashboard}" if dashboard else None,
        submission=job_metadata().get(SUBMISSION_ID),
        total_steps=total_steps,
        began=time.time(),
    )


def _end(here: Live, error: BaseException) -> dict[str, Any]:
    stopped = isinstance(error, KeyboardInterrupt | SystemExit)
    told = str(error) if isinstance(error, TaidRayError) else f"{type(error).__name__}: {error}"
    return {
        "how": "stopped" if stopped else "failed",
        "error": None if stopped else told,
        "ended": time.time(),
        "total_steps": here.total_steps,
        "host": here.host,
        "submission": here.submission,
    }
