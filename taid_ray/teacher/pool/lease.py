"""The lease of a teacher pool: a detached actor that removes the pool when nobody has used it for a while.

Serve applications outlive their driver. A driver that is killed cannot clean up, so its clients' heartbeats keep the
pool alive instead. The replicas also leave here what the driver must hear about: who they are, or why they failed; and
how much they have to do, from which the number of replicas follows unless somebody set one (see autoscaling). Student
workers claim samples of the cache here, and hand on the teacher's head (see shared_head).
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Literal

import ray
from ray import serve
from ray.actor import ActorHandle
from ray.exceptions import RayError

from taid_ray.config.models import TeacherConfig
from taid_ray.errors import TaidRayError, TeacherError
from taid_ray.names import NAMESPACE
from taid_ray.teacher.cache.claims import Claims
from taid_ray.teacher.pool import autoscaling as scaling
from taid_ray.teacher.pool.autoscaling import REPORT_S, Autoscaler
from taid_ray.teacher.protocol import TeacherInfo

RENEW_PERIOD_S = 5.0
"""Seconds between two renewals by one client."""
LEASE_S = 60.0
"""Seconds to wait for an answer of the lease, which takes milliseconds, or some seconds while Ray restarts it."""
CLAIM_S = 2.0
"""Seconds to wait for the answer to a claim; without one the claimer computes the samples itself."""

logger = logging.getLogger(__name__)

ReplicaCommand = Literal["go on", "register", "over"]
"""Tells a replica to go on, to say again who it is, or to end, because the pool is being removed."""


class Lease:
    """The state of one pool that must outlive its driver. Runs as a named actor."""

    def __init__(self, app_name: str, idle_timeout_s: float, autoscaler: Autoscaler, spec: Any = None):
        """idle_timeout_s: without a renewal, after which the pool is removed. spec: what the pool was started with."""
        self._app_name, self._idle_timeout_s, self._autoscaler = app_name, idle_timeout_s, autoscaler
        self._spec = spec
        self._renewed = time.monotonic()
        self._loads: dict[str, tuple[float, float]] = {}
        self._asked: int | None = None
        self._replicas: int | None = None
        self._over = False
        self._first: TeacherInfo | None = None
        self._probe_digests: set[str] = set()
        self._failure: TaidRayError | None = None
        self._claims = Claims()
        self._heads: dict[int, list[ray.ObjectRef]] = {}
        threading.Thread(target=self._watch, daemon=True).start()

    def renew(self) -> None:
        """Records that somebody uses the pool."""
        self._renewed = time.monotonic()

    def renew_if(self, spec: Any) -> bool:
        """Renews the lease if the pool was started with `spec` and is not being removed; returns whether it is so."""
        same = bool(spec == self._spec) and not self._over
        if same:
            self.renew()
            self._failure = None  # of a replica that its successor has replaced
        return same

    def register(self, info: TeacherInfo) -> TeacherInfo:
        """Records a replica's teacher, once it is loaded. Returns what the pool's first replica registered."""
        self._first = self._first or info
        self._probe_digests.add(info.probe_digest)
        return self._first

    def first(self) -> TeacherInfo | None:
        """Returns what the pool's first replica registered; None while none has."""
        return self._first

    def report_failure(self, error: TaidRayError) -> None:
        """Records why a replica could not start."""
        self._failure = error

    def failure(self) -> TaidRayError | None:
        """Returns why a replica could not start; None if none failed since the pool was started or its number set."""
        return self._failure

    def probe_digests(self) -> set[str]:
        """Returns the digests of the replicas' answers to the probe; more than one if their bits differ."""
        return self._probe_digests

    def report_load(self, replica: str, load: float) -> ReplicaCommand:
        """Records a replica's mean number of requests since its last report."""
        self._loads[replica] = (time.monotonic(), load)
        if self._over:
            return "over"
        return "register" if self._first is None else "go on"  # after a restart nobody is known

    def replicas(self, current: int) -> int:
        """Returns how many replicas the pool should have. current: how many Serve tries to reach now."""
        within = self._autoscaler.replicas.min <= current <= self._autoscaler.replicas.max
        if self._asked is None and self._replicas is None and not within:
            self._asked = current  # this actor was restarted and has forgotten that somebody set them
        if self._asked is None:
            now = time.monotonic()
            self._loads = {name: seen for name, seen in self._loads.items() if now - seen[0] < 3 * REPORT_S}
            load = sum(load for _, load in self._loads.values())
            self._replicas = self._autoscaler.decide(now, load, len(self._loads), current)
        else:
            self._replicas = self._asked
        return self._replicas

    def set_replicas(self, replicas: int | None) -> int | None:
        """Sets the number of replicas, whatever the load; None: as many as the load needs. Returns what was set before."""
        self._asked, before, self._failure = replicas, self._asked, None
        return before

    def claim(self, holder: str, keys: Sequence[str]) -> list[bool]:
        """Returns for each of these samples whether the holder is to ask the pool for it; see `Claims`."""
        return self._claims.claim(holder, keys)

    def release(self, holder: str, keys: Sequence[str]) -> None:
        """Ends the holder's claims on these samples."""
        self._claims.release(holder, keys)

    def offer_head(self, number: int, pieces: list[ray.ObjectRef]) -> None:
        """Keeps references to the pieces of the teacher's head for the workers of one attempt; see shared_head.

        Where rank 0 dies before `withdraw_head`, Ray frees the pieces with their owner, and only the references stay here.
        """
        self._heads[number] = pieces

    def offered_head(self, number: int) -> list[ray.ObjectRef] | None:
        """Returns what was offered under this number; None after a restart."""
        return self._heads.get(number)

    def withdraw_head(self, number: int) -> None:
        """Drops the references, so that Ray frees the pieces once nobody else has any."""
        self._heads.pop(number, None)

    def end(self) -> None:
        """Tells the replicas, at their next report, to end: nobody waits any more for what is queued at them."""
        self._over = True

    def _watch(self) -> None:
        removed = False
        while not removed:
            time.sleep(min(1.0, self._idle_timeout_s / 4))
            if time.monotonic() - self._renewed > self._idle_timeout_s:
                removed = self._remove()
        ray.kill(ray.get_runtime_context().current_actor)

    def _remove(self) -> bool:
        """Removes the pool. Returns whether that succeeded."""
        logger.warning("teacher pool %s: no client for %.0f s, removing it", self._app_name, self._idle_timeout_s)
        try:
            serve.delete(self._app_name)
        except Exception as error:  # Serve's controller may be restarting; giving up would hold the GPUs for ever
            logger.warning("teacher pool %s: could not be removed (%s), trying again", self._app_name, error)
            return False
        return True


def create_lease(app_name: str, config: TeacherConfig, spec: Any) -> ActorHandle:
    """Starts the lease of a new pool that is started with `spec`. Raises ValueError if it exists."""
    autoscaler = Autoscaler(config.replicas, scaling.UP_S, scaling.DOWN_S)
    # max_restarts: if its node dies, the pool must still be removed some day.
    options = {
        "name": lease_name(app_name),
        "namespace": NAMESPACE,
        "lifetime": "detached",
        "num_cpus": 0,
        "max_restarts": -1,
    }
    return ray.remote(Lease).options(**options).remote(app_name, config.idle_timeout_s, autoscaler, spec)


def find_lease(app_name: str) -> ActorHandle | None:
    """Returns the lease of a pool; None if the pool is gone."""
    try:
        return ray.get_actor(lease_name(app_name), namespace=NAMESPACE)
    except ValueError:
        return None


def end_lease(app_name: str) -> None:
    """Ends the lease, and nothing else of the pool."""
    lease = find_lease(app_name)
    if lease is not None:
        ray.kill(lease)


def keep_lease(app_name: str) -> Callable[[], None]:
    """Renews the lease from a background thread until the function it returns is called, or Ray goes away.

    Raises TeacherError if the pool is gone.
    """
    lease = require_lease(app_name)
    stopped = threading.Event()

    def renew() -> None:
        # Without Ray, `.remote` would start a new local cluster.
        while ray.is_initialized():
            lease.renew.remote()
            if stopped.wait(RENEW_PERIOD_S):
                return

    threading.Thread(target=renew, name=f"lease-{app_name}", daemon=True).start()
    return stopped.set


class PoolClaims:
    """A ClaimRegistry kept by the pool's lease. While the lease does not answer, every claim is granted."""

    def __init__(self, app_name: str):
        """Raises TeacherError if the pool is gone."""
        self._lease = require_lease(app_name)

    def claim(self, holder: str, keys: Sequence[str]) -> list[bool]:
        with suppress(RayError):  # it is being restarted, or gone
            if ray.is_initialized():  # else `.remote` would start a new local cluster
                granted: list[bool] = ray.get(self._lease.claim.remote(holder, keys), timeout=CLAIM_S)
                return granted
        return [True] * len(keys)

    def release(self, holder: str, keys: Sequence[str]) -> None:
        with suppress(RayError):  # then they end by themselves
            if ray.is_initialized():
                self._lease.release.remote(holder, keys)


def require_lease(app_name: str) -> ActorHandle:
    """Returns the lease of a pool. Raises TeacherError if the pool is gone."""
    lease = find_lease(app_name)
    if lease is None:
        raise TeacherError(f"there is no teacher pool {app_name} on this cluster; start the run again")
    return lease


def lease_name(app_name: str) -> str:
    """Returns the name of a pool's lease, an actor."""
    return f"lease-{app_name}"
