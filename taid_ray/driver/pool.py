"""The driver's care for the teacher pool: it starts the pool, keeps its lease, tells the workers of it, and removes it."""

import threading
from collections.abc import Callable
from contextlib import suppress

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from taid_ray.config.schema import DistillConfig
from taid_ray.distributed.capacity import Demand
from taid_ray.driver.background import Unbroken
from taid_ray.driver.progress import ProgressView
from taid_ray.errors import TaidRayError, TeacherError
from taid_ray.student.spec import RunSpec
from taid_ray.teacher.pool.deployment import PoolSpec
from taid_ray.teacher.pool.lease import keep_lease
from taid_ray.teacher.pool.lifecycle import PoolWatch, start_pool, stop_pool

CANCEL_S = 30.0
RETELL_S = 5.0
Tell = Callable[[Exception | None], None]
"""Told that the pool is up (None), or why it is not; again and again, because a restarted scheduler actor has forgotten it."""


class _CancelledError(Exception):
    """The run ended while its teacher pool was still starting."""


class SharedPool:
    """A teacher pool that is up already, and that somebody else keeps and removes. A context manager that gives its name."""

    def __init__(self, name: str, tell: Tell):
        self._name, self._tell, self._over = name, tell, threading.Event()

    def __enter__(self) -> str:
        retelling = threading.Thread(target=_retell, args=(self._tell, None, self._over), name="taid-tell-pool")
        retelling.daemon = True
        retelling.start()
        return self._name

    def __exit__(self, *exception: object) -> None:
        self._over.set()


class PoolKeeper:
    """A run's own teacher pool: started in the background, removed at the end. A context manager that gives its name."""

    def __init__(self, config: DistillConfig, spec: RunSpec, demand: Demand, name: str, tell: Tell, view: ProgressView):
        self._config, self._spec, self._demand = config, spec, demand
        self._name, self._tell, self._view = name, tell, view
        self._over = threading.Event()
        self._stop_renewing: Callable[[], None] | None = None
        self._thread = threading.Thread(target=self._run, name="taid-start-pool", daemon=True)

    def __enter__(self) -> str:
        demand = self._demand
        up_to = f" (up to {demand.max_replicas})" if demand.max_replicas > demand.replicas else ""
        self._view.say(f"starting the teacher pool: {demand.replicas} replica(s){up_to} x {demand.shards} shard(s)")
        self._thread.start()
        return self._name

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        self._view.say("removing the teacher pool")
        self._thread.join(CANCEL_S)
        if self._stop_renewing is not None:
            self._stop_renewing()
        stop_pool(self._name)

    def _run(self) -> None:
        """Starts the pool, then tells how it stands and shows its news until the end."""
        error: Exception | None = None
        try:
            self._start()
        except _CancelledError:
            return
        except TaidRayError as problem:
            error = problem
        except Exception as problem:
            # Whatever went wrong, the workers wait for word of it; this one may not even pickle.
            error = TeacherError(f"the teacher pool could not be started: {type(problem).__name__}: {problem}")
        watch, news = PoolWatch(self._name), Unbroken("watching the teacher pool", self._view)

        def show_news() -> None:
            if error is None:
                news.attempt(lambda: self._show_news(watch))

        _retell(self._tell, error, self._over, show_news)

    def _start(self) -> None:
        demand, num_shared = self._demand, self._spec.vocabulary.num_shared
        pool = PoolSpec(
            self._config.given_teacher,
            num_shared,
            demand.device,
            demand.teacher_role,
            demand.max_workers,
            self._spec.media,
        )
        info = start_pool(pool, self._name, on_wait=self._wait)
        self._stop_renewing = keep_lease(self._name)
        self._view.say(f"teacher pool is ready ({info.num_parameters:,} parameters, {info.dtype})")
        if info.dropped_mass:
            lost = f"{info.dropped_mass:.2g} of the teacher's probability on the probe"
            self._view.say(f"note: {lost} lies outside the shared vocabulary")

    def _wait(self, waiting_for: str) -> None:
        if self._over.is_set():
            raise _CancelledError
        self._view.wait_for(waiting_for.partition(" after ")[0])

    def _show_news(self, watch: PoolWatch) -> None:
        with suppress(RayError, RayServeException):  # Serve or the pool's lease is being restarted, or removed
            for line in watch.news():
                self._view.say(line)


def _retell(
    tell: Tell, error: Exception | None, over: threading.Event, between: Callable[[], None] = lambda: None
) -> None:
    """Tells how the pool stands until `over`. between: called after each time but the first."""
    tell(error)
    while not over.wait(RETELL_S):
        tell(error)
        between()
