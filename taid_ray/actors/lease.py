"""A pool's lease: a detached actor that removes the pool when nobody has used it for a while.

Serve applications outlive their driver. A driver that is killed cannot clean up, so its clients' heartbeats keep the
pool alive instead. The replicas also leave here what the driver must hear about: who they are, or why they failed.
"""

import logging
import threading
import time
from collections.abc import Callable

import ray
from ray import serve
from ray.actor import ActorHandle

from taid_ray.errors import TaidRayError, TeacherError
from taid_ray.teacher_model import TeacherInfo

NAMESPACE = "taid-ray"
RENEW_PERIOD_S = 5.0

logger = logging.getLogger(__name__)


class Lease:
    """Runs as a named actor, one per pool."""

    def __init__(self, app_name: str, idle_timeout_s: float):
        self._app_name, self._idle_timeout_s = app_name, idle_timeout_s
        self._renewed = time.monotonic()
        self._first: TeacherInfo | None = None
        self._probe_digests: set[str] = set()
        self._failure: TaidRayError | None = None
        threading.Thread(target=self._watch, daemon=True).start()

    def renew(self) -> None:
        self._renewed = time.monotonic()

    def idle_s(self) -> float:
        """Seconds since the last `renew`."""
        return time.monotonic() - self._renewed

    def register(self, info: TeacherInfo) -> TeacherInfo:
        """A replica has loaded its model. Returns what the pool's first replica registered."""
        self._first = self._first or info
        self._probe_digests.add(info.probe_digest)
        return self._first

    def report_failure(self, error: TaidRayError) -> None:
        """A replica could not start."""
        self._failure = error

    def failure(self) -> TaidRayError | None:
        return self._failure

    def probe_digests(self) -> set[str]:
        """More than one if replicas do not give identical bits."""
        return self._probe_digests

    def _watch(self) -> None:
        removed = False
        while not removed:
            time.sleep(min(1.0, self._idle_timeout_s / 4))
            if self.idle_s() > self._idle_timeout_s:
                removed = self._remove()
        ray.kill(ray.get_runtime_context().current_actor)

    def _remove(self) -> bool:
        logger.warning("teacher pool %s: no client for %.0f s, removing it", self._app_name, self._idle_timeout_s)
        try:
            serve.delete(self._app_name)
        except Exception as error:  # Serve's controller may be restarting; giving up would hold the GPUs for ever
            logger.warning("teacher pool %s: could not be removed (%s), trying again", self._app_name, error)
            return False
        return True


def create_lease(app_name: str, idle_timeout_s: float) -> ActorHandle:
    """Starts the lease of a new pool. Raises ValueError if it exists."""
    # max_restarts: if its node dies, the pool must still be removed some day.
    options = {
        "name": _name(app_name),
        "namespace": NAMESPACE,
        "lifetime": "detached",
        "num_cpus": 0,
        "max_restarts": -1,
    }
    return ray.remote(Lease).options(**options).remote(app_name, idle_timeout_s)


def find_lease(app_name: str) -> ActorHandle | None:
    """None if the pool is gone."""
    try:
        return ray.get_actor(_name(app_name), namespace=NAMESPACE)
    except ValueError:
        return None


def end_lease(app_name: str) -> None:
    """Ends the lease without touching the pool."""
    lease = find_lease(app_name)
    if lease is not None:
        ray.kill(lease)


def keep_lease(app_name: str) -> Callable[[], None]:
    """Renews the lease from a background thread until the function it returns is called, or Ray goes away.

    Raises TeacherError if the pool is gone.
    """
    lease = find_lease(app_name)
    if lease is None:
        raise TeacherError(f"there is no teacher pool {app_name} on this cluster; start the run again")
    stopped = threading.Event()

    def renew() -> None:
        # Without Ray, `.remote` would start a new local cluster.
        while ray.is_initialized():
            lease.renew.remote()
            if stopped.wait(RENEW_PERIOD_S):
                return

    threading.Thread(target=renew, name=f"lease-{app_name}", daemon=True).start()
    return stopped.set


def _name(app_name: str) -> str:
    return f"lease-{app_name}"
