"""The number of a teacher pool's replicas: as set by hand (`taid-ray scale`), else as its load needs.

Serve starts, drains and stops replicas; it asks an autoscaling policy for their number ten times a second. Ours repeats
what the pool's lease says, so that a number given by hand and one that follows the load take the same way, through
public API only. Serve's external scaler would be the alternative: it is reachable through the dashboard, which need not
run, or through private methods, and it excludes a policy. Serve's own request metrics arrive every 10 s, and faster by
a deprecated option only; so the replicas tell the lease themselves what they have to do.
"""

import logging
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from math import ceil
from typing import Any

import ray
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

from taid_ray.config.fields import Range

UP_S, DOWN_S = 5.0, 30.0
"""Seconds for which requests must have queued up, or replicas have been idle, before their number changes."""
REPORT_S = 1.0
"""Seconds between two reports of a replica's load."""
TOO_MANY = 1.2
"""Requests per replica, computing or queued, above which there are too few replicas."""
MOST_REPLICAS = 4096
"""A bound for Serve, which wants one before anybody can set a number."""
POLL_S = 0.5
"""Seconds between two questions of the policy to the lease."""


class PoolPolicy:
    """Serve's autoscaling policy of one pool: repeats the number that the pool's lease gives. Runs in Serve's controller.

    Serve sends this class there by value, so it needs no taid_ray there; keep it to ray and the standard library.
    """

    def __init__(self, lease: str, namespace: str):
        """lease, namespace: name and Ray namespace of the pool's lease, an actor."""
        self._current: int | None = None
        self._wanted: int | None = None
        # In a thread, because the controller's event loop calls the policy and must not wait.
        threading.Thread(target=self._follow, args=(lease, namespace), daemon=True).start()

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """Returns the number of replicas to have, and no state for Serve to keep."""
        self._current = context.target_num_replicas
        return self._wanted or context.target_num_replicas, {}

    def _follow(self, name: str, namespace: str) -> None:
        own, said = None, set[str]()
        while True:
            time.sleep(POLL_S)
            if self._current is None:
                continue
            try:
                lease = ray.get_actor(name, namespace=namespace)
                own = own or lease._actor_id
                if lease._actor_id != own:
                    return  # of the next pool of that name, which must not hear how many replicas this one had
                self._wanted = lease.replicas.remote(self._current).future().result(timeout=10 * POLL_S)
            except ValueError:
                return  # the pool is being removed
            except Exception as error:  # the lease is being restarted, or its node is slow: what it said last stays
                kind = type(error).__name__
                if kind not in said:
                    said.add(kind)
                    cause = f"{kind}: {error}"[:300]
                    logging.getLogger("ray.serve").warning("the teacher pool keeps its number of replicas: %s", cause)


def serve_scaling(replicas: Range, lease: str, namespace: str) -> AutoscalingConfig:
    """Returns the settings with which Serve starts `replicas.min` replicas and then follows the pool's lease at once."""
    policy = AutoscalingPolicy(policy_function=PoolPolicy, policy_kwargs={"lease": lease, "namespace": namespace})
    return AutoscalingConfig(
        min_replicas=1,
        initial_replicas=replicas.min,
        max_replicas=MOST_REPLICAS,
        upscale_delay_s=0,
        downscale_delay_s=0,
        policy=policy,
    )


class LoadMeter:
    """The mean number of requests at one replica, computing or queued, between two readings."""

    def __init__(self, now: float):
        self._count, self._area = 0, 0.0
        self._start = self._changed = now

    def add(self, requests: int, now: float) -> None:
        """Counts requests that arrive (1) or leave (-1)."""
        self._area += self._count * (now - self._changed)
        self._count, self._changed = self._count + requests, now

    def read(self, now: float) -> float:
        """Returns the mean since the last reading."""
        self.add(0, now)
        mean = self._area / (now - self._start) if now > self._start else float(self._count)
        self._area, self._start = 0.0, now
        return mean


@dataclass
class Autoscaler:
    """The fewest replicas, within a range, that keep the requests computing or queued at about one per replica.

    Requests beyond that mean that students wait. How many they are says little about how many replicas are missing,
    since students fill their windows however slow the teacher is; so the number at most doubles before it is judged
    anew. It falls to what the load of the last DOWN_S needs.
    """

    replicas: Range
    up_s: float
    down_s: float
    _loads: deque[tuple[float, float]] = field(default_factory=deque)
    _since: float | None = None

    def decide(self, now: float, load: float, running: int, current: int) -> int:
        """Returns the number of replicas to have.

        now: time.monotonic(). load: requests at all replicas, a mean over about REPORT_S. running: replicas that report.
        current: the number that Serve tries to reach.
        """
        if self._since is None:
            self._since = now
        self._loads.append((now, load))
        while self._loads[0][0] < now - self.down_s:
            self._loads.popleft()
        wanted = max(self.replicas.min, min(self.replicas.max, self._needed(now, running, current)))
        if wanted != current:
            self._loads.clear()  # judged anew: what was seen with another number says nothing about this one
            self._since = now
        return wanted

    def _needed(self, now: float, running: int, current: int) -> int:
        assert self._since is not None
        recent = _mean([load for at, load in self._loads if at >= now - self.up_s])
        # While replicas are still starting, the load says nothing about what they will change.
        if now - self._since >= self.up_s and running >= current and recent > TOO_MANY * current:
            return min(2 * current, ceil(recent))
        if now - self._since >= self.down_s:
            return min(current, ceil(_mean([load for _, load in self._loads])))
        return current


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
