"""A live run and its teacher pool: leaving word of it, and giving it another number of replicas from another process."""

import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import ray
from ray.actor import ActorHandle

from taid_ray.actors.client import replica_states
from taid_ray.actors.lease import LEASE_S, find_lease
from taid_ray.actors.request import WHERE_TO_LOOK
from taid_ray.cluster import check_scale, cluster_has_gpus, demand_of, join_cluster
from taid_ray.device import resolve
from taid_ray.errors import ClusterError, TeacherError
from taid_ray.live_file import AUTH_MODE, LIVE_FILE, LivePool, not_alive, run_config
from taid_ray.metrics import write_json

POLL_S = 0.5


@contextmanager
def announced(run_dir: Path, pool: str) -> Iterator[None]:
    """Leaves word of a run's pool in its directory, until the run is over. In the driver, connected to the cluster."""
    address = ray.get_runtime_context().gcs_address
    here = LivePool(address, os.environ.get(AUTH_MODE), pool, socket.gethostname(), os.getpid())
    write_json(run_dir / LIVE_FILE, asdict(here))
    try:
        yield
    finally:
        (run_dir / LIVE_FILE).unlink(missing_ok=True)


def scale_teacher(run_dir: Path, live: LivePool, replicas: int, say: Callable[[str], None]) -> None:
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
    lease = find_lease(live.pool)
    if lease is None:
        raise TeacherError(
            f"the teacher pool of {run_dir} is not there: it is being started, or removed; try again in some seconds"
        )
    check_scale(demand_of(config, resolve(config.device, cluster_has_gpus())), replicas)
    before = ray.get(lease.ask_for.remote(replicas), timeout=LEASE_S)
    try:
        _wait(live.pool, lease, replicas, config.teacher.timeout_s, say)
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
