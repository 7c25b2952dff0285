"""A live run: the word that its driver leaves of it, and giving its teacher pool another number of replicas from outside."""

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray
from ray._private.services import get_webui_url_from_internal_kv  # a driver that joined has no public way to it
from ray.actor import ActorHandle

from taid_ray.actors.client import replica_states
from taid_ray.actors.lease import LEASE_S, find_lease
from taid_ray.actors.request import WHERE_TO_LOOK
from taid_ray.cluster import check_scale, cluster_has_gpus, demand_of, join_cluster
from taid_ray.device import resolve
from taid_ray.errors import ClusterError, TaidRayError, TeacherError
from taid_ray.live_file import (
    AUTH_MODE,
    BEAT_S,
    ENDED_FILE,
    LIVE_FILE,
    SUBMISSION_ID,
    Live,
    job_metadata,
    not_alive,
    pid_namespace,
    process_start,
    run_config,
)
from taid_ray.metrics import write_json

POLL_S = 0.5


@contextmanager
def announced(run_dir: Path, pool: str | None, total_steps: int | None = None) -> Iterator[None]:
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
        with suppress(OSError):  # the error itself matters more
            write_json(run_dir / ENDED_FILE, _end(here, error))
        raise
    finally:
        over.set()
        (run_dir / LIVE_FILE).unlink(missing_ok=True)


def _this_driver(pool: str | None, total_steps: int | None) -> Live:
    dashboard = get_webui_url_from_internal_kv()
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


def scale_teacher(run_dir: Path, live: Live, replicas: int, say: Callable[[str], None]) -> None:
    """Returns when exactly so many replicas run. No batch is lost or repeated meanwhile.

    say: told of the progress. Raises ConfigError if the run is not alive, ClusterError if its cluster has no room for so
    many, TeacherError if they do not run within teacher.timeout_s, or cannot start; then the pool stays as it was.
    """
    config = run_config(run_dir)
    try:
        if not ray.is_initialized():
            join_cluster(live.address)
    except ClusterError:
        raise not_alive(run_dir, f"the Ray cluster at {live.address}, where it was, does not answer") from None
    pool = str(live.pool)  # which `live_pool` has seen to
    lease = find_lease(pool)
    if lease is None:
        raise TeacherError(
            f"the teacher pool of {run_dir} is not there: it is being started, or removed; try again in some seconds"
        )
    check_scale(demand_of(config, resolve(config.device, cluster_has_gpus())), replicas)
    before = ray.get(lease.ask_for.remote(replicas), timeout=LEASE_S)
    try:
        _wait(pool, lease, replicas, config.teacher.timeout_s, say)
    except TeacherError:
        ray.get(lease.ask_for.remote(before), timeout=LEASE_S)
        raise


def _wait(pool: str, lease: ActorHandle, replicas: int, timeout_s: float, say: Callable[[str], None]) -> None:
    start, said = time.monotonic(), ""
    while (waited := time.monotonic() - start) < timeout_s:
        states = replica_states(pool)
        if not states:
            raise TeacherError(f"the teacher pool {pool} was removed meanwhile: its run ended")
        if states == {"RUNNING": replicas}:
            say(f"teacher pool: {replicas} replica(s) run, after {waited:.0f} s")
            return
        failure = ray.get(lease.failure.remote(), timeout=LEASE_S)
        if failure is not None:
            raise TeacherError(f"a new replica could not start, so the pool stays as it was: {failure}")
        shown = ", ".join(f"{count} {state.lower()}" for state, count in sorted(states.items()))
        if shown != said:
            said = shown
            say(f"teacher pool: {shown}; to be {replicas}")
        time.sleep(POLL_S)
    raise TeacherError(
        f"the teacher pool has {states.get('RUNNING', 0)} of {replicas} replicas after {waited:.0f} s (teacher.timeout_s), so "
        f"it stays as it was; {WHERE_TO_LOOK}, for what holds the cluster's resources"
    )
