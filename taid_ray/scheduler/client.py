"""A student worker's side of the TAID scheduler actor: reports the loss of a step, and collects t of the next one.

An unanswered report is sent again, and a heartbeat keeps telling the actor the newest result that this worker knows, so
that an actor which was killed in between comes back with the same state, and no step counts twice.
"""

import math
import pickle
import threading
import time
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import ActorDiedError, ActorUnavailableError, GetTimeoutError, RayError, RayTaskError

from taid_ray.errors import AttemptError
from taid_ray.scheduler.actor import Report
from taid_ray.scheduler.aggregate import BEATS_PER_S, HEARTBEAT_S, LossSums, StepResult

GONE_S = 10.0
"""Time within which Ray brings a dead actor back, or at least says that it is restarting it."""


class SchedulerClient:
    """A worker's connection to the actor. The training loop uses `submit` and `collect`."""

    def __init__(self, actor: ActorHandle, rank: int, timeout_s: float):
        """timeout_s: limit for an answer, which depends on the slowest of the other workers."""
        self._actor, self._rank, self._timeout_s = actor, rank, timeout_s
        self._attempt = self._world_size = 0
        self._result: StepResult | None = None
        self._pending: tuple[int, LossSums, ray.ObjectRef] | None = None
        self._closed = threading.Event()
        self._spoken = 0.0

    def begin(self, attempt: int, world_size: int) -> None:
        """Rank 0 only: opens a new attempt and thereby ends all earlier ones. It starts from what `join` is given.

        Raises StaleReportError if a newer attempt is open.
        """
        self._call(lambda: self._actor.begin.remote(attempt, world_size), "begin")

    def join(self, attempt: int, world_size: int, result: StepResult | None) -> StepResult:
        """Joins an attempt that rank 0 has begun, and starts the heartbeat. Every rank.

        result: that of the checkpoint to continue from, None without one. Returns the result to start from.
        """
        self._attempt, self._world_size = attempt, world_size
        self._result = result or self._call(lambda: self._actor.current.remote(attempt, world_size), "the start")
        threading.Thread(target=self._beat, name="taid-scheduler-heartbeat", daemon=True).start()
        return self._result

    def submit(self, step: int, sums: LossSums) -> None:
        """Sends this rank's sums of `step` (1-based) without waiting."""
        self._pending = (step, sums, self._send(step, sums))

    def collect(self, step: int) -> StepResult:
        """Waits for the result of `step`, which every rank has to report.

        Raises AttemptError when the actor gives no answer in time; NonFiniteLossError and StaleReportError as it does.
        """
        assert self._pending is not None and self._pending[0] == step, "collect without submit"
        _, sums, reference = self._pending
        sent = iter([reference])
        self._result = pickle.loads(self._call(lambda: next(sent, None) or self._send(step, sums), f"step {step}"))
        self._pending = None
        return self._result

    @property
    def step(self) -> int:
        """The step that was submitted and has no result yet; 0 if there is none."""
        return self._pending[0] if self._pending else 0

    @property
    def sums_are_finite(self) -> bool:
        """True if this rank's sums of the step that has no result yet are finite."""
        sums = self._pending[1] if self._pending else None
        return sums is None or all(map(math.isfinite, (sums.kl, sums.entropy, sums.sft)))

    def wait_for_pool(self, timeout_s: float) -> None:
        """Blocks until the driver has the teacher pool up; raises its error if it failed.

        timeout_s: more than the driver itself gives the pool, which then says so. Raises AttemptError if it says nothing.
        """
        deadline = time.monotonic() + timeout_s
        known, error = False, None
        while not known:
            if time.monotonic() > deadline:
                raise AttemptError(
                    f"the driver has not said within {timeout_s:.0f} s whether the teacher pool is up; its thread that starts "
                    "the pool is probably gone"
                )
            known, error = self._call(lambda: self._actor.pool.remote(), "the teacher pool")
        if error is not None:
            raise error

    def note(self, message: str) -> None:
        """Shows a line on the driver's terminal."""
        self._actor.note.remote(message)

    def close(self) -> None:
        """Ends the heartbeat."""
        self._closed.set()

    def _send(self, step: int, sums: LossSums) -> ray.ObjectRef:
        assert self._result is not None, "submit before join"
        report = Report(self._attempt, self._world_size, self._result, step, self._rank, sums)
        self._spoken = time.monotonic()
        return self._actor.report.remote(pickle.dumps(report))

    def _call(self, send: Any, what: str) -> Any:
        """Sends until there is an answer: Ray restarts a dead actor, and the request goes to the new one."""
        deadline, died = time.monotonic() + self._timeout_s, None
        while True:
            try:
                return ray.get(send(), timeout=max(0.0, deadline - time.monotonic()))
            except (ActorDiedError, ActorUnavailableError) as error:
                now = time.monotonic()
                died = (died or now) if isinstance(error, ActorDiedError) else None
                if now > deadline or (died is not None and now - died > GONE_S):
                    raise AttemptError(
                        f"the TAID scheduler actor is gone, and with it perhaps the driver: {error}"
                    ) from error
                time.sleep(0.2)
            except GetTimeoutError as error:
                raise AttemptError(
                    f"the TAID scheduler gave no answer for {what} within {self._timeout_s:.0f} s (student.timeout_s); "
                    "another student worker is probably stuck or gone"
                ) from error
            except RayTaskError as error:
                raise error.cause if isinstance(error.cause, Exception) else error from None

    def _beat(self) -> None:
        """Keeps the newest result known to the actor, also while this rank is blocked in a collective.

        A report says the same, so there is no heartbeat while steps are shorter than the period.
        """
        period = max(HEARTBEAT_S, self._world_size / BEATS_PER_S)
        while not self._closed.wait(max(0.05 * period, self._spoken + period - time.monotonic())):
            if time.monotonic() - self._spoken < period:
                continue
            self._spoken = time.monotonic()
            try:
                ray.get(self._actor.heartbeat.remote(self._attempt, self._world_size, self._result), timeout=10)
            except RayError:
                continue  # being restarted; the next beat re-seeds it
