"""Change of the number of replicas of a live run's teacher pool (`taid-ray scale`)."""

import time
from collections.abc import Callable
from pathlib import Path

import ray
from ray.actor import ActorHandle

from taid_ray.control.state import POLL_S
from taid_ray.distributed.capacity import check_scale, demand_of
from taid_ray.distributed.cluster import cluster_has_gpus, join_cluster
from taid_ray.distributed.device import resolve
from taid_ray.errors import ClusterError, TeacherError
from taid_ray.run.live import Live, not_alive, run_config
from taid_ray.teacher.pool.client import replica_states
from taid_ray.teacher.pool.lease import LEASE_S, find_lease
from taid_ray.teacher.pool.request import WHERE_TO_LOOK


def scale_teacher(run_dir: Path, live: Live, replicas: int, notify: Callable[[str], None]) -> None:
    """Changes the number of replicas, and returns when exactly so many run. No batch is lost or repeated meanwhile.

    notify: told of the progress. Raises ConfigError if the run is not alive, ClusterError if its cluster has no room for so
    many, TeacherError if they do not run within teacher.timeout_s, or cannot start; then the pool stays as it was.
    """
    config = run_config(run_dir)  # `live_pool` has seen to it that the run has an address and a pool
    try:
        if not ray.is_initialized():
            join_cluster(str(live.address))
    except ClusterError:
        raise not_alive(run_dir, f"the Ray cluster at {live.address}, where it was, does not answer") from None
    pool = str(live.pool)
    lease = find_lease(pool)
    if lease is None:
        raise TeacherError(
            f"the teacher pool of {run_dir} is not there: it is being started, or removed; try again in some seconds"
        )
    check_scale(demand_of(config, resolve(config.device, cluster_has_gpus())), replicas)
    before = ray.get(lease.set_replicas.remote(replicas), timeout=LEASE_S)
    try:
        _wait(pool, lease, replicas, config.given_teacher.timeout_s, notify)
    except TeacherError:
        ray.get(lease.set_replicas.remote(before), timeout=LEASE_S)
        raise


def _wait(pool: str, lease: ActorHandle, replicas: int, timeout_s: float, notify: Callable[[str], None]) -> None:
    start, said = time.monotonic(), ""
    while (waited := time.monotonic() - start) < timeout_s:
        states = replica_states(pool)
        if not states:
            raise TeacherError(f"the teacher pool {pool} was removed meanwhile: its run ended")
        if states == {"RUNNING": replicas}:
            notify(f"teacher pool: {replicas} replica(s) run, after {waited:.0f} s")
            return
        failure = ray.get(lease.failure.remote(), timeout=LEASE_S)
        if failure is not None:
            raise TeacherError(f"a new replica could not start, so the pool stays as it was: {failure}")
        shown = ", ".join(f"{count} {state.lower()}" for state, count in sorted(states.items()))
        if shown != said:
            said = shown
            notify(f"teacher pool: {shown}; to be {replicas}")
        time.sleep(POLL_S)
    raise TeacherError(
        f"the teacher pool has {states.get('RUNNING', 0)} of {replicas} replicas after {waited:.0f} s (teacher.timeout_s), so "
        f"it stays as it was; {WHERE_TO_LOOK}, for what holds the cluster's resources"
    )
