"""A pool's lease: a detached actor that removes the pool when nobody has used it for a while.

Serve applications outlive their driver. A driver that is killed cannot clean up, so its clients' heartbeats keep the
pool alive instead. The replicas also leave here what the driver must hear about: who they are, or why they failed; and
how much they have to do, from which the number of replicas follows unless somebody asked for one (see autoscaling).
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

from taid_ray.config.schema import TeacherConfig
from taid_ray.errors import TaidRayError, TeacherError
from taid_ray.teacher.cache.claims import Claims
from taid_ray.teacher.pool import autoscaling as scaling
from taid_ray.teacher.pool.autoscaling import REPORT_S, Autoscaler
from taid_ray.teacher.protocol import TeacherInfo

NAMESPACE = "taid-ray"
RENEW_PERIOD_S = 5.0
LEASE_S = 60.0
"""An answer of the lease takes milliseconds, or some seconds while Ray restarts it."""
CLAIM_S = 2.0
"""Longer than that nobody waits to learn whether somebody else computes the same."""

logger = logging.getLogger(__name__)

ReplicaCommand = Literal["go on", "register", "over"]
"""What a replica is to do: go on, say again who it is, or end, because the pool is being removed."""


class Lease:
    """Runs as a named actor, one per pool."""

    def __init__(self, app_name: str, idle_timeout_s: float, autoscaler: Autoscaler, spec: Any = None):
        """spec: what the pool was started with."""
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
        self._renewed = time.monotonic()

    def renew_if(self, spec: Any) -> bool:
        """Renews the lease of a pool that was started with `spec` and is not being removed; says whether it is one."""
        same = bool(spec == self._spec) and not self._over
        if same:
            self.renew()
            self._failure = None  # of a replica that its successor has replaced
        return same

    def idle_s(self) -> float:
        """Seconds since the last `renew`."""
        return time.monotonic() - self._renewed

    def register(self, info: TeacherInfo) -> TeacherInfo:
        """A replica has loaded its model. Returns what the pool's first replica registered."""
        self._first = self._first or info
        self._probe_digests.add(info.probe_digest)
        return self._first

    def first(self) -> TeacherInfo | None:
        """What the pool's first replica registered."""
        return self._first

    def report_failure(self, error: TaidRayError) -> None:
        """A replica could not start."""
        self._failure = error

    def failure(self) -> TaidRayError | None:
        return self._failure

    def probe_digests(self) -> set[str]:
        """More than one if replicas do not give identical bits."""
        return self._probe_digests

    def report_load(self, replica: str, load: float) -> ReplicaCommand:
        """A replica's mean number of requests since its last report."""
        self._loads[replica] = (time.monotonic(), load)
        if self._over:
            return "over"
        return "register" if self._first is None else "go on"  # after a restart nobody is known

    def replicas(self, current: int) -> int:
        """How many replicas the pool should have. current: how many Serve tries to reach now."""
        within = self._autoscaler.replicas.min <= current <= self._autoscaler.replicas.max
        if self._asked is None and self._replicas is None and not within:
            self._asked = current  # this actor was restarted and has forgotten that somebody asked for them
        if self._asked is None:
            now = time.monotonic()
            self._loads = {name: seen for name, seen in self._loads.items() if now - seen[0] < 3 * REPORT_S}
            load = sum(load for _, load in self._loads.values())
            self._replicas = self._autoscaler.decide(now, load, len(self._loads), current)
        else:
            self._replicas = self._asked
        return self._replicas

    def set_replicas(self, replicas: int | None) -> int | None:
        """From now on the pool has so many replicas, whatever the load; None: as many as the load needs.

        Returns what was asked for before.
        """
        self._asked, before, self._failure = replicas, self._asked, None
        return before

    def claim(self, holder: str, keys: Sequence[str]) -> list[bool]:
        """Which of these samples a client is to ask the pool for, see `Claims`."""
        return self._claims.claim(holder, keys)

    def release(self, holder: str, keys: Sequence[str]) -> None:
        self._claims.release(holder, keys)

    def offer_head(self, number: int, pieces: list[ray.ObjectRef]) -> None:
        """Keeps references to the pieces of the teacher's head for the workers of one attempt; see shared_head."""
        self._heads[number] = pieces

    def offered_head(self, number: int) -> list[ray.ObjectRef] | None:
        """Returns what was offered under this number; None after a restart."""
        return self._heads.get(number)

    def withdraw_head(self, number: int) -> None:
        """Drops the references, so that Ray frees the pieces once nobody else has any."""
        self._heads.pop(number, None)

    def end(self) -> None:
        """The pool is being removed, and nobody waits for what is still queued at its replicas."""
        self._over = True

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


def create_lease(app_name: str, config: TeacherConfig, spec: Any) -> ActorHandle:
    """Starts the lease of a new pool, started with `spec`. Raises ValueError if it exists."""
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
    """None if the pool is gone."""
    try:
        return ray.get_actor(lease_name(app_name), namespace=NAMESPACE)
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
    """The claims of a pool's clients, kept by its lease. Without it everything is granted."""

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
    """The lease of a pool. Raises TeacherError if the pool is gone."""
    lease = find_lease(app_name)
    if lease is None:
        raise TeacherError(f"there is no teacher pool {app_name} on this cluster; start the run again")
    return lease


def lease_name(app_name: str) -> str:
    """Name of the actor."""
    return f"lease-{app_name}"
