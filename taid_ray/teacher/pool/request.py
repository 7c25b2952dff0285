"""A request to the teacher pool on its way: sent again when lost or damaged, and to a second replica when late."""

import math
import statistics
import time
import uuid
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

from ray.exceptions import (
    NodeDiedError,
    ObjectLostError,
    RayActorError,
    RaySystemError,
    RayTaskError,
    WorkerCrashedError,
)
from ray.serve.exceptions import DeploymentUnavailableError, RequestCancelledError

from taid_ray.config.schema import TeacherConfig
from taid_ray.errors import MessageError, TaidRayError, TeacherError
from taid_ray.teacher.pool.lease import find_lease
from taid_ray.teacher.pool.replica import AlreadyHereError, ReplicaBrokenError, ScoreResponse

RETRY_PAUSE_S = 1.0
NOTICE_S = 15.0
STEP_S = 0.5
"""One look at a response takes at most so long; several responses are looked at in turn, for TURN_S each."""
TURN_S = 0.02
WHERE_TO_LOOK = "see `ray status`, `serve status` and /tmp/ray/session_latest/logs/serve on the cluster's head node"

# A replica, a shard or a node was lost, or the answer with it. Requests are pure, so they are simply sent again.
LOST = (
    RayActorError,
    ObjectLostError,
    WorkerCrashedError,
    NodeDiedError,
    DeploymentUnavailableError,
    RequestCancelledError,
    ReplicaBrokenError,
)
# A checksum failed, or Ray could not even read what came.
DAMAGED = (MessageError, RaySystemError)
DAMAGED_TRIES = 3
"""So often one request may come to harm; a teacher whose values are wrong each time says so quickly."""


class LatencyTracker:
    """How long one client's answers usually take, from the time at which they could have been served."""

    KEPT, KNOWN = 64, 8
    """Answers remembered, and how many of them say what is usual."""
    LEAST_S = 1.0

    def __init__(self, multiple: float):
        """multiple: of the usual time, after which a request is late; 0: it never is."""
        self._multiple = multiple
        self._seen: deque[tuple[float, str]] = deque(maxlen=self.KEPT)
        self._last = -math.inf

    def answered(self, submitted: float, now: float, answer: ScoreResponse) -> None:
        # With several replicas answers come in groups, all but the first of each without a wait; what their computation
        # took is what a request may take at least.
        waited = now - max(submitted, self._last)
        self._seen.append((max(waited, answer.compute_s), answer.replica))
        self._last = now

    @property
    def _usual_s(self) -> float:
        return statistics.median(seconds for seconds, _ in self._seen)

    @property
    def limit_s(self) -> float:
        """Infinite while little is known, or if only one replica was seen at work lately."""
        others = len({replica for _, replica in self._seen}) > 1
        if not self._multiple or len(self._seen) < self.KNOWN or not others:
            return math.inf
        return max(self.LEAST_S, self._multiple * self._usual_s)

    def hedge(self, submitted: float) -> "Hedge":
        """For a request that is waited for from now on. Earlier answers may have kept the replicas busy until theirs."""
        if math.isinf(self.limit_s):
            return Hedge(math.inf, math.inf)
        return Hedge(max(submitted, self._last) + self.limit_s, self.limit_s, self._usual_s)


class Hedge:
    """When to send a late request once more. Serve chooses the replica, so it may take several attempts to reach another."""

    ATTEMPTS, PAUSE_S = 8, 0.25

    def __init__(self, at: float, again_s: float, usual_s: float = 0.0):
        """at: when the request is late; again_s: how long a second one may take until it counts as stuck, too.

        usual_s: what answers take, to tell the user.
        """
        self.at, self._again_s, self.usual_s = at, again_s, usual_s
        self._attempts, self._pause_s = 0, self.PAUSE_S

    @property
    def begun(self) -> bool:
        return self._attempts > 0

    def sent(self, now: float) -> None:
        self._attempts += 1
        self.at = now + self._again_s if self._attempts < self.ATTEMPTS else math.inf

    def refused(self, now: float) -> None:
        """It came to the replica that has the request already."""
        if 0 < self._attempts < self.ATTEMPTS:
            self.at, self._pause_s = now + self._pause_s, 2 * self._pause_s


PENDING = object()


class PendingRequest:
    """Something asked of the pool, under way at one replica or, after a hedge, at several."""

    def __init__(self, send: Callable[[str], Any], accept: Callable[[Any], Any] = lambda answer: answer):
        """send: sends it under the id it is given, and returns Serve's response.

        accept: what the caller gets for an answer. Raises MessageError for one that is to be asked for again.
        """
        self.accept, self.id, self._send = accept, uuid.uuid4().hex, send
        self.submitted = time.monotonic()
        self.responses: list[Any] = []
        self.output: Future[Any] = Future()
        self.wanted = False
        """Whether somebody stands still for it."""
        self.lost: Exception | None = None
        """What it was lost or damaged by, last."""
        self.damaged = 0
        """How often it was."""
        self.send()

    def send(self) -> None:
        self.responses.append(self._send(self.id))

    def cancel(self) -> None:
        """Takes it out of the queues of the replicas, where it still waits in one."""
        while self.responses:
            # Neither waits for a replica. Cancelling what has failed raises that failure.
            with suppress(Exception):
                self.responses.pop().cancel()


class ResponseWaiter:
    """Waits for the answers of one pool."""

    def __init__(self, app_name: str, config: TeacherConfig, notify: Callable[[str], None]):
        self._app_name, self._config, self._notify = app_name, config, notify
        self.stopped = False

    def answer(self, request: PendingRequest, hedge: Hedge | None = None) -> Any:
        """The first accepted answer to `request`, sent again when it is lost and, when it is late, as `hedge` says.

        Raises TeacherError after config.timeout_s, if the pool is gone, for DAMAGED_TRIES damaged answers, or once
        `stopped` is set; or what the replica raised on the request itself.
        """
        hedge = hedge or Hedge(math.inf, math.inf)
        start = noticed = time.monotonic()
        while (now := time.monotonic()) - start < self._config.timeout_s:
            if self.stopped:
                raise TeacherError("the client of the teacher pool was closed")
            if now >= hedge.at:
                self._send_too(request, hedge, now)
            for response in tuple(request.responses):
                answer = self._look(request, response, hedge, start)
                if answer is not PENDING:
                    request.responses.remove(response)
                    request.cancel()
                    return answer
            if not request.responses:
                time.sleep(RETRY_PAUSE_S)
                request.send()
            if time.monotonic() - noticed >= NOTICE_S:
                noticed = time.monotonic()
                self._require_lease()
                if request.wanted:
                    self._notify(f"still waiting for the teacher pool after {noticed - start:.0f} s")
        found = f"; last failure: {_first_line(request.lost)}" if request.lost else ""
        raise TeacherError(
            f"no answer from the teacher pool {self._app_name} after {now - start:.0f} s (teacher.timeout_s){found}; "
            f"{WHERE_TO_LOOK}"
        )

    def _send_too(self, request: PendingRequest, hedge: Hedge, now: float) -> None:
        if not hedge.begun:
            self._notify(
                f"the teacher pool has not answered a request for {now - request.submitted:.1f} s, where "
                f"{hedge.usual_s:.1f} s are usual; asking another replica, too"
            )
        request.send()
        hedge.sent(now)

    def _look(self, request: PendingRequest, response: Any, hedge: Hedge, start: float) -> Any:
        """The answer if it comes before the next decision is due, else PENDING. Forgets a response that failed."""
        try:
            return request.accept(response.result(timeout_s=self._step_s(request, hedge, start)))
        except AlreadyHereError:
            hedge.refused(time.monotonic())
        except DAMAGED as error:
            self._note_damage(request, error)
        except LOST as error:
            request.lost = error
            self._notify(f"the teacher pool lost a request ({_first_line(error)}); sending it again")
            self._require_lease()
        except RayTaskError as error:
            raise self._refused(error) from error
        except TimeoutError:
            return PENDING
        request.responses.remove(response)
        return PENDING

    def _note_damage(self, request: PendingRequest, error: Exception) -> None:
        """Raises TeacherError once that is enough."""
        request.lost, request.damaged = error, request.damaged + 1
        found = _message(error)
        if request.damaged == DAMAGED_TRIES:
            raise TeacherError(f"{found}; the teacher pool was asked {DAMAGED_TRIES} times") from error
        what = "received a damaged request" if isinstance(error, RayTaskError) else "sent a damaged answer"
        self._notify(f"the teacher pool {what} ({found}); asking again")

    def _step_s(self, request: PendingRequest, hedge: Hedge, start: float) -> float:
        now = time.monotonic()
        if len(request.responses) > 1:
            return TURN_S
        return max(0.0, min(STEP_S, hedge.at - now, start + self._config.timeout_s - now))

    def _require_lease(self) -> None:
        if find_lease(self._app_name) is None:
            raise TeacherError(
                f"the teacher pool {self._app_name} was removed while a worker waited for it: its driver stopped it, "
                f"or nobody used it for {self._config.idle_timeout_s:.0f} s (teacher.idle_timeout_s); start the run again"
            )

    def _refused(self, error: RayTaskError) -> TaidRayError:
        """What the replica raised on a request that no other replica would answer either."""
        cause = error.cause
        if isinstance(cause, TaidRayError):
            return type(cause)(str(cause.args[0]))
        return TeacherError(
            f"the teacher pool {self._app_name} failed on a request: {type(cause).__name__}: {cause}; if it ran out of "
            "memory, lower teacher.max_tokens"
        )


def _first_line(error: Exception) -> str:
    cause = error.cause if isinstance(error, RayTaskError) else error
    return f"{type(cause).__name__}: {(str(cause).strip().splitlines() or [''])[0]}"


def _message(error: Exception) -> str:
    """Ours in full, and of any other, which may hold a traceback, the first line."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    return str(cause) if isinstance(cause, TaidRayError) else _first_line(error)
