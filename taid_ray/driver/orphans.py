"""Ends what Ray Train leaves behind where its controller was killed in its first seconds.

Beside each controller Ray Train starts a detached actor, the PlacementGroupCleaner, which ends once it sees that the
controller is gone. It is told to watch some seconds after it was created; a controller that is killed before that leaves
an actor that waits for ever (Ray 2.60).
"""

import logging
import os
import signal
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from ray.util.state import list_actors
from ray.util.state.exception import RayStateApiException

from taid_ray.distributed.ray_internals import dead_jobs

CLEANER, CONTROLLER = "PlacementGroupCleaner", "TrainController"
QUERY_S, END_S = 10, 20.0
MOST = 10_000

logger = logging.getLogger(__name__)


def own_job() -> str:
    """Name of this driver's Ray job: SESSION/ID, because ids of jobs repeat from one cluster to the next."""
    context = ray.get_runtime_context()
    return f"{context.get_session_name()}/{context.get_job_id()}"


@contextmanager
def ending_orphaned_cleaners(former: Collection[str] = ()) -> Iterator[None]:
    """Ends, on exit, the abandoned cleaners of this driver and of the same run's former drivers.

    former: their jobs, as `own_job` names them. Nothing of anybody else's is touched.
    """
    try:
        yield
    finally:
        with suppress(RayStateApiException, RayError, OSError):  # no dashboard, say; nothing depends on this
            end_orphaned_cleaners(former)


def end_orphaned_cleaners(former: Collection[str] = ()) -> None:
    """Ends cleaners of `former` jobs that are over, and this job's if no controller of it lives."""
    cleaners = _alive(CLEANER)
    if not cleaners:
        return
    session, own = own_job().split("/")
    over = {job for job in dead_jobs() if f"{session}/{job}" in former}
    busy = {controller.job_id for controller in _alive(CONTROLLER)}
    for actor in cleaners:
        if actor.job_id in over or (actor.job_id == own and own not in busy):
            logger.info("ending the abandoned actor %s of job %s", CLEANER, actor.job_id)
            there = NodeAffinitySchedulingStrategy(actor.node_id, soft=False)
            end = ray.remote(num_cpus=0, max_retries=0)(end_cleaner).options(scheduling_strategy=there)
            ray.get(end.remote(actor.pid), timeout=END_S)


def end_cleaner(pid: int) -> None:
    """Ends the actor's process if it is still the one that was meant. Runs on the actor's node."""
    with suppress(FileNotFoundError, ProcessLookupError):
        if CLEANER in Path(f"/proc/{pid}/cmdline").read_text():
            os.kill(pid, signal.SIGKILL)


def _alive(class_name: str) -> list[Any]:
    """Lists the living actors of a class by the State API, which finds the cluster by RAY_ADDRESS where there are several."""
    filters = [("class_name", "=", class_name), ("state", "=", "ALIVE")]
    found: list[Any] = list_actors(filters=filters, detail=True, limit=MOST, timeout=QUERY_S)
    return found
