"""Start and stop of a teacher pool by the driver, and news of its replicas. Workers ask it through client.PoolTeacher."""

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import ray
from ray import serve
from ray.actor import ActorHandle
from ray.exceptions import ActorAlreadyExistsError, RayError
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ApplicationStatus, DeploymentStatusTrigger

from taid_ray.config.models import TeacherConfig
from taid_ray.errors import TeacherError
from taid_ray.teacher.pool.client import replica_states
from taid_ray.teacher.pool.deployment import DEPLOYMENT, PoolSpec, teacher_app
from taid_ray.teacher.pool.lease import LEASE_S, create_lease, end_lease, find_lease
from taid_ray.teacher.pool.request import WHERE_TO_LOOK
from taid_ray.teacher.protocol import TeacherInfo

POLL_S = 0.5
"""Seconds between two looks at a pool that starts."""
BUILDING = threading.Lock()  # Serve cannot describe two deployments in two threads at a time

logger = logging.getLogger(__name__)
logging.getLogger("ray.serve").setLevel(logging.WARNING)  # "Connecting to existing Serve app" and the like


def start_pool(spec: PoolSpec, app_name: str, on_wait: Callable[[str], None] = logger.debug) -> TeacherInfo:
    """Starts a pool and waits until every replica has loaded and tested its model.

    on_wait: told about twice a second what it waits for. A pool of that name is one that a dead driver left behind: no
    other driver may be alive. It is taken over if it was started with an equal spec, its model loaded, else replaced.
    Raises what a replica failed with (ModelError, TeacherError) at once, TeacherError after config.timeout_s. Leaves
    nothing behind when it raises.
    """
    start, config = time.monotonic(), spec.config
    _start_serve()
    lease = _adoptable_lease(app_name, spec)
    try:
        if lease is None:
            stop_pool(app_name)
            lease = create_lease(app_name, config, spec)
            with BUILDING:
                app = teacher_app(spec, app_name)
            target = serve.RunTarget(app, name=app_name, route_prefix=None)
            serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)
        # Not asked through a handle: Serve's threads behind one outlive `ray.shutdown`, and would start another Ray.
        info = _wait_until_running(config, app_name, lease, start, on_wait)
        if len(_told(lease.probe_digests.remote(), config, app_name, start, on_wait)) > 1:
            logger.warning("teacher pool %s: replicas differ in the last bits, so reruns will too", app_name)
        return info
    except BaseException:
        stop_pool(app_name)
        raise


def stop_pool(app_name: str) -> None:
    """Removes the pool and waits until its resources are free. Does nothing if there is none."""
    lease = find_lease(app_name)
    if lease is not None:
        lease.end.remote()
    try:
        serve.delete(app_name)
    except RayServeException:
        pass  # Serve does not run
    except TimeoutError as error:
        logger.warning("teacher pool %s: Serve is still removing it: %s", app_name, error)
    end_lease(app_name)


class PoolWatch:
    """Watches a running pool for replicas that come, go or fail."""

    def __init__(self, app_name: str):
        self._app_name, self._running, self._failure = app_name, 0, ""

    def news(self) -> list[str]:
        """Returns a line for each change since the last call. Raises what Ray raises while Serve or the lease restarts."""
        before, self._running = self._running, replica_states(self._app_name).get("RUNNING", 0)
        lines = []
        if before and before != self._running:
            lines.append(f"teacher pool: {self._running} replica(s) run, {before} before")
        lease = find_lease(self._app_name)
        failure = str(ray.get(lease.failure.remote(), timeout=LEASE_S) or "") if lease is not None else ""
        if failure not in ("", self._failure):
            lines.append(f"teacher pool: a new replica could not start: {failure}")
        self._failure = failure
        return lines


def _start_serve() -> None:
    """Joins the cluster's Serve, or starts it, without HTTP proxies."""
    try:
        serve.start(proxy_location="Disabled")
    except ActorAlreadyExistsError:  # somebody else starts it at this moment
        serve.start(proxy_location="Disabled")


def _adoptable_lease(app_name: str, spec: Any) -> ActorHandle | None:
    """Returns the lease of a pool that was started with an equal `spec` and still serves; None if there is none."""
    lease = find_lease(app_name)
    try:
        if lease is None or not ray.get(lease.renew_if.remote(spec), timeout=LEASE_S):
            return None
    except RayError:  # it has just ended
        return None
    app = serve.status().applications.get(app_name)
    return lease if app is not None and app.status == ApplicationStatus.RUNNING else None


def _told(answer: Any, config: TeacherConfig, app_name: str, start: float, on_wait: Callable[[str], None]) -> Any:
    """Waits for an answer of the lease, whose process may take a while to start on a node that is busy loading models.

    Raises TeacherError if it does not come within config.timeout_s of `start`, but for LEASE_S at least.
    """
    asked = time.monotonic()
    within = max(LEASE_S, config.timeout_s - (asked - start))
    while not ray.wait([answer], timeout=POLL_S)[0]:
        waited = time.monotonic() - asked
        if waited > within:
            raise TeacherError(
                f"the lease of the teacher pool {app_name}, an actor, gave no answer within {within:.0f} s "
                "(teacher.timeout_s); the head node or the one that it was put on is overloaded or gone"
            )
        on_wait(f"teacher pool: no answer from its lease after {waited:.0f} s")
    return ray.get(answer)


def _wait_until_running(
    config: TeacherConfig, app_name: str, lease: ActorHandle, start: float, on_wait: Callable[[str], None]
) -> TeacherInfo:
    """Waits until all replicas run. Returns what the first one registered; raises TeacherError or what a replica raised."""
    while True:
        lease.renew.remote()
        failure = _told(lease.failure.remote(), config, app_name, start, on_wait)
        if failure is not None:
            raise failure
        app = serve.status().applications.get(app_name)
        deployment = app.deployments.get(DEPLOYMENT) if app else None
        states = dict(deployment.replica_states) if deployment else {}
        ready, waited = states.get("RUNNING", 0), time.monotonic() - start
        if app is not None and app.status == ApplicationStatus.RUNNING:
            info: TeacherInfo | None = _told(lease.first.remote(), config, app_name, start, on_wait)
            if info is not None:  # else the lease was restarted, and a replica says it again
                return info
        message = deployment.message if deployment else ""
        # A replica that ran already and was lost is replaced, although Serve calls that a failed deployment meanwhile.
        replaced = deployment is not None and deployment.status_trigger == DeploymentStatusTrigger.HEALTH_CHECK_FAILED
        if app is not None and app.status == ApplicationStatus.DEPLOY_FAILED and not replaced:
            raise TeacherError(
                f"the teacher pool {app_name} failed to start: {message or app.message}; {WHERE_TO_LOOK}"
            )
        if waited > config.timeout_s:
            raise TeacherError(
                f"the teacher pool {app_name} was not ready after {waited:.0f} s (teacher.timeout_s); {ready} of "
                f"{config.replicas.min} replicas run, the others: {states or 'none'} {message}; {WHERE_TO_LOOK}"
            )
        on_wait(f"teacher pool: {ready} of {config.replicas.min} replicas ready after {waited:.0f} s")
        time.sleep(POLL_S)
