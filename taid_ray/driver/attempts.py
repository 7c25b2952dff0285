"""Attempt after attempt of the student workers, until the run is done: what failed goes on from the last checkpoint.

Ray Train itself starts one group of workers and reports how it ended. Restarting is decided here, because what a user must
put right must not be tried again, because the controller may be what died, and because Ray Train's own way to another
number of workers kills a group without asking it for a checkpoint.
"""

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from ray.exceptions import RayActorError, RayError
from ray.train import ControllerError, TrainingFailedError

from taid_ray.config.models import StudentConfig
from taid_ray.distributed.capacity import Demand, free_room, workers_now
from taid_ray.driver.progress import ProgressView
from taid_ray.driver.progress_relay import RunProgress
from taid_ray.driver.signals import POLL_S, StopRequest, run_in_thread
from taid_ray.errors import AttemptError, ClusterError, TaidRayError, WorkerError
from taid_ray.scheduler.aggregate import STOP
from taid_ray.scheduler.owner import SchedulerOwner
from taid_ray.student.spec import Finished, Outcome, Stopped

GROW_CHECKS = 20
"""So many looks at the cluster, one per GROW_CHECK_S, must find room for more workers before these are restarted."""
GROW_CHECK_S = 1.0
PAUSE_S = 1.0

ANSI = re.compile(r"\x1b\[[0-9;]*m")


class Launcher(Protocol):
    """Starts groups of student workers."""

    def begin(self, workers: int) -> int:
        """Records that an attempt with so many workers begins. Returns its number."""

    def run(self, attempt: int, workers: int) -> Outcome:
        """Runs the attempt. Returns what rank 0 returned; raises what Ray Train raises."""


@dataclass(frozen=True)
class AttemptContext:
    """Everything that an attempt is started by and watched with."""

    demand: Demand
    scheduler: SchedulerOwner
    progress: RunProgress
    stop: StopRequest
    view: ProgressView


class AttemptLoop:
    """Starts attempt after attempt until one finishes the run, or until it must not go on."""

    def __init__(self, student: StudentConfig, context: AttemptContext):
        self._student, self._context = student, context
        self._failures = self._reached = 0
        self._most = context.demand.max_workers

    def run(self, launcher: Launcher) -> dict[str, Any]:
        """Returns the summary.

        Raises what a user must put right, WorkerError after too many failures in a row, ClusterError without room for the
        workers, KeyboardInterrupt or SystemExit once a request to stop was obeyed.
        """
        while True:
            workers = min(wait_for_room(self._context, self._student.timeout_s), self._most)
            attempt = launcher.begin(workers)
            self._context.view.say(f"starting {workers} student worker(s)")
            monitor = AttemptMonitor(self._context, attempt, workers)
            try:
                outcome = run_in_thread(lambda: launcher.run(attempt, workers), monitor.poll)  # noqa: B023  # ends before the next round
            except (TrainingFailedError, RayError) as error:
                self._after_failure(error)
            else:
                if isinstance(outcome, Finished):
                    return outcome.summary
                self._after_stop(outcome, monitor)

    def _after_failure(self, error: Exception) -> None:
        """Prepares the next attempt, or raises what ends the run."""
        context, progress = self._context, self._context.progress
        cause = cause_of(error)
        if isinstance(cause, TaidRayError) and not isinstance(cause, AttemptError):
            raise cause from error
        if context.stop.requested:
            raise context.stop.end() from error
        self._failures = self._failures + 1 if progress.step <= self._reached else 1
        self._reached = max(self._reached, progress.step)
        if self._failures > self._student.max_failures:
            raise WorkerError(
                f"the student workers failed {self._failures} times in a row (student.max_failures: "
                f"{self._student.max_failures}) without getting past step {self._reached}, the last time with: "
                f"{shown(error)}; start the run again to resume it"
            ) from error
        context.view.say(f"the student workers failed: {shown(error)}; going on from the last checkpoint")
        time.sleep(PAUSE_S)
        # Where they found no room, others have what the nodes could hold.
        room = max(context.demand.workers, free_room(context.demand)) if isinstance(error, ControllerError) else None
        self._most = room or context.demand.max_workers

    def _after_stop(self, stopped: Stopped, monitor: "AttemptMonitor") -> None:
        """Prepares the attempt with more workers that this one was stopped for, or ends the run as requested."""
        context = self._context
        context.view.say(f"stopped after step {stopped.step}, of which there is a checkpoint")
        if context.stop.requested:
            raise context.stop.end()
        self._most = max(context.demand.workers, monitor.room_for)


class AttemptMonitor:
    """The driver's watch over one attempt: it passes requests to stop on, and looks for room for more workers."""

    def __init__(self, context: AttemptContext, attempt: int, workers: int):
        self._context, self._attempt, self._workers = context, attempt, workers
        self.room_for = workers
        """Workers that there is room for, these included."""
        self._said = False
        self._checks_with_room = 0
        self._next_check = 0.0

    def poll(self) -> None:
        """Asks the workers to stop when somebody wants it, or when there is room for more of them. Called every POLL_S."""
        stop, progress = self._context.stop, self._context.progress
        if stop.at_once or (stop.requested and not progress.may_have_steps(self._attempt)):
            raise stop.end()  # there was no step yet, or nobody wants to wait for a checkpoint
        if stop.requested:
            self._ask("stopping after this step with a checkpoint; once more to stop at once")
        elif self._may_grow():
            self._ask("there is room for more student workers; restarting them after this step")

    def _may_grow(self) -> bool:
        """Tests whether the cluster has had room for more workers for a while, and these have made a step to save."""
        demand = self._context.demand
        if demand.max_workers <= self._workers or self._context.progress.reporting != self._attempt:
            return False
        if time.monotonic() >= self._next_check and self._checks_with_room < GROW_CHECKS:
            self._next_check = time.monotonic() + GROW_CHECK_S
            self.room_for = min(workers_now(demand), self._workers + free_room(demand))
            self._checks_with_room = self._checks_with_room + 1 if self.room_for > self._workers else 0
        return self._checks_with_room >= GROW_CHECKS

    def _ask(self, message: str) -> None:
        if not self._said:
            self._context.view.say(message)
            self._said = True
        self._context.scheduler.ask(STOP)  # again and again, because a restarted scheduler actor has forgotten it


def wait_for_room(context: AttemptContext, timeout_s: float) -> int:
    """The number of workers to start now. Raises ClusterError if there is no room for the fewest within timeout_s."""
    demand, start = context.demand, time.monotonic()
    while (workers := workers_now(demand)) < demand.workers:
        if context.stop.requested:
            raise context.stop.end()
        waited = time.monotonic() - start
        if waited > timeout_s:
            raise ClusterError(
                f"the cluster has had room for {workers} of {demand.workers} student worker(s) for {waited:.0f} s "
                "(student.timeout_s), because nodes were lost; add nodes, and start the run again to resume it"
            )
        context.view.wait_for(
            f"waiting for room for {demand.workers} student worker(s), the cluster has room for {workers}"
        )
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
