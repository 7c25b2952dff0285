"""What the driver does beside waiting: keeping the teacher pool, and telling the terminal what the workers do."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from taid_ray.config.schema import DistillConfig
from taid_ray.distributed.capacity import Demand
from taid_ray.driver.progress import ProgressView
from taid_ray.errors import TaidRayError, TeacherError
from taid_ray.run.log import STUDENT
from taid_ray.scheduler.owner import SchedulerOwner
from taid_ray.student.spec import RunSpec
from taid_ray.teacher.pool.deployment import PoolSpec
from taid_ray.teacher.pool.lease import keep_lease
from taid_ray.teacher.pool.lifecycle import PoolWatch, start_pool, stop_pool

POLL_S = 0.5
CANCEL_S = 30.0
RETELL_S = 5.0
FOLLOW_END_S = 30.0
"""So long the end of a run waits for whoever is told of its validations."""


class _CancelledError(Exception):
    """The run ended while its teacher pool was still starting."""


@contextmanager
def scheduler_actor(config: DistillConfig, spec: RunSpec, name: str) -> Iterator[SchedulerOwner]:
    """The run's TAID scheduler actor, ended with the run."""
    owner = SchedulerOwner(name, config.effective_schedule, spec.total_steps, config.student.workers.max)
    try:
        yield owner
    finally:
        owner.close()


@contextmanager
def teacher_pool(
    config: DistillConfig,
    spec: RunSpec,
    demand: Demand,
    name: str,
    tell: Callable[[Exception | None], None],
    view: ProgressView,
) -> Iterator[str]:
    """Starts the teacher pool in the background, keeps its lease, and removes it at the end.

    tell: called, every few seconds, once the pool is up (None), or with why it is not.
    """
    if config.teacher.mode != "pool":
        yield name
        return
    up_to = f" (up to {demand.max_replicas})" if demand.max_replicas > demand.replicas else ""
    view.say(f"starting the teacher pool: {demand.replicas} replica(s){up_to} x {demand.shards} shard(s)")
    over = threading.Event()

    def go_on(waiting_for: str) -> None:
        if over.is_set():
            raise _CancelledError
        view.wait_for(waiting_for.partition(" after ")[0])

    def start() -> None:
        error: Exception | None = None
        try:
            num_shared, workers = spec.vocabulary.num_shared, demand.max_workers
            pool = PoolSpec(config.teacher, num_shared, demand.device, demand.teacher_role, workers)
            info = start_pool(pool, name, on_wait=go_on)
            stop_renewing.append(keep_lease(name))
            view.say(f"teacher pool is ready ({info.num_parameters:,} parameters, {info.dtype})")
            if info.dropped_mass:
                lost = f"{info.dropped_mass:.2g} of the teacher's probability on the probe"
                view.say(f"note: {lost} lies outside the shared vocabulary")
        except _CancelledError:
            return
        except TaidRayError as problem:
            error = problem
        except Exception as problem:
            # Whatever went wrong, the workers wait for word of it; this one may not even pickle.
            error = TeacherError(f"the teacher pool could not be started: {type(problem).__name__}: {problem}")
        watch = PoolWatch(name)
        tell(error)
        while not over.wait(RETELL_S):
            tell(error)  # again and again, because a restarted scheduler actor has forgotten it
            if error is None:
                news.attempt(lambda: _show_news(watch, view))

    stop_renewing: list[Any] = []
    news = _Unbroken("watching the teacher pool", view)
    starter = threading.Thread(target=start, name="taid-start-pool", daemon=True)
    starter.start()
    try:
        yield name
    finally:
        over.set()
        view.say("removing the teacher pool")
        starter.join(timeout=CANCEL_S)
        for stop in stop_renewing:
            stop()
        stop_pool(name)


@contextmanager
def shared_pool(name: str, tell: Callable[[Exception | None], None]) -> Iterator[str]:
    """A teacher pool that is up already, and that somebody else keeps and removes. tell: as for `teacher_pool`."""
    over = threading.Event()

    def retell() -> None:
        tell(None)
        while not over.wait(RETELL_S):
            tell(None)

    threading.Thread(target=retell, name="taid-tell-pool", daemon=True).start()
    try:
        yield name
    finally:
        over.set()


class _Unbroken:
    """Work that a thread repeats, and whose failures must not end the thread: each kind of failure is said once."""

    def __init__(self, what: str, view: ProgressView):
        self._what, self._view = what, view
        self._said: set[str] = set()

    def attempt(self, work: Callable[[], None]) -> bool:
        """Does the work. Returns whether it succeeded."""
        try:
            work()
        except Exception as error:
            told, kind = f"{type(error).__name__}: {error}"[:300], type(error).__name__
            if kind not in self._said:
                self._said.add(kind)
                with suppress(Exception):  # a log disk that is full, say, which is what failed in the first place
                    self._view.say(f"{self._what} failed ({told}); the run goes on, and it is tried again")
            return False
        return True


def _show_news(watch: PoolWatch, view: ProgressView) -> None:
    with suppress(RayError, RayServeException):  # Serve or the pool's lease is being restarted, or removed
        for line in watch.news():
            view.say(line)


@dataclass
class RunProgress:
    """What the driver knows of the workers' progress."""

    step: int = 0
    """The last one, of any attempt."""
    training: bool = False
    """Whether the current attempt has made a step."""
    blind: bool = False
    """Whether the driver cannot hear of steps at present."""


@contextmanager
def followed(
    scheduler: SchedulerOwner,
    spec: RunSpec,
    view: ProgressView,
    on_validation: Callable[[dict[str, Any]], None] | None = None,
) -> Iterator[RunProgress]:
    """Shows on the terminal what the scheduler actor hears from the workers.

    on_validation: called, in a thread, with the figures of each validation once, those of earlier attempts included; but
    for the one after the last step, which the summary has.
    """
    done, found = threading.Event(), RunProgress()
    following = _Unbroken("following the workers", view)
    seen, shown, validated = 0, 0, -1

    def look() -> None:
        nonlocal seen, shown, validated
        notes, metrics, validations = scheduler.progress(seen)
        if metrics and metrics["step"] != shown:
            found.step, found.training = max(found.step, metrics["step"]), True
            view.step(metrics, spec.total_steps)
            shown = metrics["step"]
        for note in notes:
            view.say(note, STUDENT)
            seen += 1
        for figures in validations:
            if on_validation is not None and validated < figures["step"] < spec.total_steps:
                on_validation(figures)
                validated = figures["step"]

    def follow() -> None:
        last = False
        while not last:
            last = done.wait(POLL_S)  # once more after the end, for what was said last
            found.blind = not following.attempt(look)

    thread = threading.Thread(target=follow, name="taid-follow", daemon=True)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join(FOLLOW_END_S)
        if thread.is_alive():
            view.say(
                f"what follows the workers' progress has not ended within {FOLLOW_END_S:.0f} s; going on without it"
            )
