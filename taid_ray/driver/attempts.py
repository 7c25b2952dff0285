"""Attempt after attempt of the student workers, until the run is done: what failed goes on from the last checkpoint.

Ray Train itself starts one group of workers and reports how it ended. Restarting is decided here, because what a user must
put right must not be tried again, because the controller may be what died, and because Ray Train's own way to another
number of workers kills a group without asking it for a checkpoint.
"""

import re
import time
from collections.abc import Callable, Iterator
from typing import Any

from ray.exceptions import RayActorError, RayError
from ray.train import ControllerError, TrainingFailedError

from taid_ray.config.schema import StudentConfig
from taid_ray.distributed.capacity import Demand, free_room, workers_now
from taid_ray.driver.progress import ProgressView
from taid_ray.driver.signals import POLL_S, StopRequest, run_in_thread
from taid_ray.driver.supervise import RunProgress
from taid_ray.errors import AttemptError, ClusterError, TaidRayError, WorkerError
from taid_ray.scheduler.aggregate import STOP
from taid_ray.scheduler.owner import SchedulerOwner

GROW_CHECKS = 20
"""So many looks at the cluster, one per GROW_CHECK_S, must find room for more workers before these are restarted."""
GROW_CHECK_S = 1.0
PAUSE_S = 1.0

ANSI = re.compile(r"\x1b\[[0-9;]*m")

Fit = Callable[[int, int], Any]
"""Runs one attempt: (number of workers, attempts before) -> what rank 0 returned."""


def run_attempts(
    fit: Fit,
    student: StudentConfig,
    demand: Demand,
    scheduler: SchedulerOwner,
    followed: RunProgress,
    signals: StopRequest,
    view: ProgressView,
    restarts: int,
) -> dict[str, Any]:
    """Returns the summary. restarts: attempts that earlier drivers made.

    Raises what a user must put right, WorkerError after too many failures in a row, ClusterError without room for the
    workers, KeyboardInterrupt or SystemExit once a signal was obeyed.
    """
    failures = reached = 0
    most = demand.max_workers
    while True:
        workers = min(wait_for_room(demand, student.timeout_s, signals, view), most)
        view.say(f"starting {workers} student worker(s)")
        followed.training = False
        watch = AttemptMonitor(demand, workers, scheduler, followed, signals, view)
        try:
            result = run_in_thread(lambda: fit(workers, restarts), watch.look)  # noqa: B023  # ends before the next round
        except (TrainingFailedError, RayError) as error:
            cause = cause_of(error)
            if isinstance(cause, TaidRayError) and not isinstance(cause, AttemptError):
                raise cause from error
            if signals.count:
                raise signals.end() from error
            failures = failures + 1 if followed.step <= reached else 1
            reached = max(reached, followed.step)
            if failures > student.max_failures:
                raise WorkerError(
                    f"the student workers failed {failures} times in a row (student.max_failures: {student.max_failures}) "
                    f"without getting past step {reached}, the last time with: {shown(error)}; start the run again to resume it"
                ) from error
            view.say(f"the student workers failed: {shown(error)}; going on from the last checkpoint")
            time.sleep(PAUSE_S)
            # Where they found no room, others have what the nodes could hold.
            most = max(demand.workers, free_room(demand)) if isinstance(error, ControllerError) else demand.max_workers
        else:
            if "stopped" not in result:
                return result
            view.say(f"stopped after step {result['stopped']}, of which there is a checkpoint")
            if signals.count:
                raise signals.end()
            most = max(demand.workers, watch.room_for)
        restarts += 1


class AttemptMonitor:
    """What the driver looks after while one attempt runs."""

    def __init__(
        self,
        demand: Demand,
        workers: int,
        scheduler: SchedulerOwner,
        followed: RunProgress,
        signals: StopRequest,
        view: ProgressView,
    ):
        self._demand, self._workers, self._scheduler, self._followed = demand, workers, scheduler, followed
        self._signals, self._view = signals, view
        self.room_for = workers
        """More than that, if there was room for more."""
        self._said = False
        self._room = 0
        self._next_look = 0.0

    def look(self) -> None:
        """Asks the workers to stop when a signal came, or when there is room for more of them. Called every POLL_S."""
        nothing_to_lose = not self._followed.training and not self._followed.blind
        if self._signals.count > 1 or (self._signals.count and nothing_to_lose):
            raise self._signals.end()  # there was no step yet, or nobody wants to wait for a checkpoint
        if self._signals.count:
            self._ask("stopping after this step with a checkpoint; once more to stop at once")
        elif self._demand.max_workers > self._workers and self._followed.training and self._may_grow():
            self._ask("there is room for more student workers; restarting them after this step")

    def _may_grow(self) -> bool:
        if time.monotonic() >= self._next_look and self._room < GROW_CHECKS:
            self._next_look = time.monotonic() + GROW_CHECK_S
            self.room_for = min(workers_now(self._demand), self._workers + free_room(self._demand))
            self._room = self._room + 1 if self.room_for > self._workers else 0
        return self._room >= GROW_CHECKS

    def _ask(self, message: str) -> None:
        if not self._said:
            self._view.say(message)
            self._said = True
        self._scheduler.ask(STOP)  # again and again, because a restarted scheduler actor has forgotten it


def wait_for_room(demand: Demand, timeout_s: float, signals: StopRequest, view: ProgressView) -> int:
    """How many workers to start now. Raises ClusterError if there is no room for the fewest within timeout_s."""
    start = time.monotonic()
    while (workers := workers_now(demand)) < demand.workers:
        if signals.count:
            raise signals.end()
        waited = time.monotonic() - start
        if waited > timeout_s:
            raise ClusterError(
                f"the cluster has had room for {workers} of {demand.workers} student worker(s) for {waited:.0f} s "
                "(student.timeout_s), because nodes were lost; add nodes, and start the run again to resume it"
            )
        view.wait_for(f"waiting for room for {demand.workers} student worker(s), the cluster has room for {workers}")
        time.sleep(POLL_S)
    return min(workers, demand.max_workers)


def cause_of(error: BaseException) -> BaseException:
    """The TaidRayError inside a failure of the worker group, if there is one; else the failure itself.

    What ends the run comes before what ends the attempt: the latter often follows from the former, on another rank.
    """
    found = [inner for failure in _failures(error) for inner in _chain(failure) if isinstance(inner, TaidRayError)]
    final = [inner for inner in found if not isinstance(inner, AttemptError)]
    return next(iter(final or found), error)


def shown(error: BaseException) -> str:
    """A failure in one line: the death of a process before what it made of the others."""
    if isinstance(error, ControllerError):
        return f"Ray Train could not start them ({_line(error)}); `ray status` shows what holds the cluster's resources"
    failures = sorted(_failures(error), key=lambda failure: not isinstance([*_chain(failure)][-1], RayActorError))
    return _line(failures[0])


def _failures(error: BaseException) -> list[BaseException]:
    failures = getattr(error, "worker_failures", {})
    return [failures[rank] for rank in sorted(failures)] or [error]


def _chain(error: BaseException) -> Iterator[BaseException]:
    inner: BaseException | None = error
    while inner is not None:
        yield inner
        inside = (getattr(inner, name, None) for name in ("cause", "controller_failure", "health_check_failure"))
        inner = next(filter(None, inside), inner.__cause__)


def _line(error: BaseException) -> str:
    *_, innermost = _chain(error)
    lines = [line.strip() for line in ANSI.sub("", str(innermost)).splitlines() if line.strip()] or [""]
    told = lines[-1] if "creation task" in lines[0] else lines[0]  # the cause of that comes last
    return f"{type(innermost).__name__}: {told}"[:300]
