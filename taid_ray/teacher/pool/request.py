"""Requests to the teacher pool that are under way: sent again when lost or damaged, and to a second replica when late."""

import math
import time
import uuid
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
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

from taid_ray.config.models import TeacherConfig
from taid_ray.errors import MessageError, TaidRayError, TeacherError
from taid_ray.teacher.pool.hedging import Hedge
from taid_ray.teacher.pool.lease import find_lease
from taid_ray.teacher.pool.messages import AlreadyHereError, ReplicaBrokenError

WHERE_TO_LOOK = "see `ray status`, `serve status` and /tmp/ray/session_latest/logs/serve on the cluster's head node"

LOST = (
    RayActorError,
    ObjectLostError,
    WorkerCrashedError,
    NodeDiedError,
    DeploymentUnavailableError,
    RequestCancelledError,
    ReplicaBrokenError,
)
"""Raised when a replica, a shard or a node was lost, or the answer with it. Requests are pure, so they are simply sent again."""
DAMAGED = (MessageError, RaySystemError)
"""Raised when a checksum failed, or when Ray could not even read what came."""
DAMAGED_TRIES = 3
"""How often a request may be damaged. A teacher whose values are always wrong is reported this soon."""


@dataclass(frozen=True)
class WaitTimes:
    """Durations, in seconds, of a wait for one answer."""

    retry_pause: float = 1.0
    """Before a request is sent again that no replica has any more."""
    notice: float = 15.0
    """Between two notices to the user that an answer is still missing."""
    look: float = 0.5
    """The longest look at a response, where there is only one; the client can be closed in between."""
    turn: float = 0.02
    """A look at one response of several, which take turns."""


WAIT_TIMES = WaitTimes()


class PendingRequest:
    """Something asked of the pool, under way at one replica or, after a hedge, as copies at several."""

    def __init__(
        self, send: Callable[[str], Any], accept: Callable[[Any], Any] = lambda answer: answer, at_once: bool = True
    ):
        """send: sends it under the id it is given, and returns Serve's response.

        accept: turns an answer into what the caller gets. Raises MessageError for one that is to be asked for again.
        at_once: False for a request that is under way only after `begin`.
        """
        self.accept, self.id, self._send = accept, uuid.uuid4().hex, send
        self.submitted = time.monotonic()
        self.responses: list[Any] = []
        self.output: Future[Any] = Future()
        self.wanted = False
        """Whether somebody stands still for it."""
        self.last_failure: Exception | None = None
        """What it was lost or damaged by, last."""
        self.damaged = 0
        """How often it was damaged."""
        if at_once:
            self.send()

    def begin(self) -> None:
        """Sends the first copy."""
        self.submitted = time.monotonic()
        self.send()

    def send(self) -> None:
        """Sends a copy."""
        self.responses.append(self._send(self.id))

    def cancel(self) -> None:
        """Withdraws all copies that still wait in a replica's queue."""
        while self.responses:
            # Neither waits for a replica. Cancelling what has failed raises that failure.
            with suppress(Exception):
                self.responses.pop().cancel()


class ResponseWaiter:
    """Waits for the answers of one pool.

    | event                                   | raised as            | action                                             |
    |-----------------------------------------|----------------------|----------------------------------------------------|
    | an answer that `accept` takes           |                      | withdraw the other copies, return it               |
    | request or answer damaged               | DAMAGED              | drop the copy; at the third time TeacherError      |
    | replica, node or answer lost            | LOST                 | drop the copy; TeacherError if the pool is gone    |
    | the replica has the request already     | AlreadyHereError     | drop the copy; hedge again after a longer pause    |
    | the replica refuses the request         | RayTaskError         | raise what it raised                               |
    | no copy is left                         |                      | pause, send one                                    |
    | the request is late                     |                      | send a copy, which may reach another replica       |
    | nothing for a while                     |                      | tell the user; TeacherError if the pool is gone    |
    | the client is closed, or time is up     |                      | TeacherError                                       |
    """

    def __init__(
        self, app_name: str, config: TeacherConfig, notify: Callable[[str], None], times: WaitTimes = WAIT_TIMES
    ):
        self._app_name, self._config, self._notify, self._times = app_name, config, notify, times
        self.stopped = False

    def answer(self, request: PendingRequest, hedge: Hedge | None = None) -> Any:
        """Returns the first accepted answer to `request`, sent again when it is lost and, when it is late, as `hedge` says.

        Raises TeacherError after config.timeout_s, if the pool is gone, for DAMAGED_TRIES damaged answers, or once
        `stopped` is set; or what the replica raised on the request itself.
        """
        hedge = hedge or Hedge(math.inf, math.inf)
        start = noticed = time.monotonic()
        while (now := time.monotonic()) - start < self._config.timeout_s:
            if self.stopped:
                raise TeacherError("the client of the teacher pool was closed")
            if now >= hedge.at:
                self._on_late(request, hedge, now)
            for response in tuple(request.responses):
                try:
                    answer = request.accept(response.result(timeout_s=self._look_s(request, hedge, start)))
                except Exception as error:
                    self._on_error(request, response, hedge, error)
                else:
                    request.responses.remove(response)
                    request.cancel()
                    return answer
            if not request.responses:
                time.sleep(self._times.retry_pause)
                request.send()
            if time.monotonic() - noticed >= self._times.notice:
                noticed = time.monotonic()
                self._on_silence(request, noticed - start)
        found = f"; last failure: {_first_line(request.last_failure)}" if request.last_failure else ""
        raise TeacherError(
            f"no answer from the teacher pool {self._app_name} after {now - start:.0f} s (teacher.timeout_s){found}; "
            f"{WHERE_TO_LOOK}"
        )

    def _look_s(self, request: PendingRequest, hedge: Hedge, start: float) -> float:
        """Seconds to look at one response: until the next decision is due, or its turn ends."""
        now = time.monotonic()
        if len(request.responses) > 1:
            return self._times.turn
        return max(0.0, min(self._times.look, hedge.at - now, start + self._config.timeout_s - now))

    def _on_error(self, request: PendingRequest, response: Any, hedge: Hedge, error: Exception) -> None:
        """Drops a copy that failed. Raises what ends the wait."""
        if isinstance(error, AlreadyHereError):
            hedge.refused(time.monotonic())
        elif isinstance(error, DAMAGED):
            self._on_damage(request, error)
        elif isinstance(error, LOST):
            self._on_loss(request, error)
        elif isinstance(error, RayTaskError):
            raise self._refusal(error) from error
        elif isinstance(error, TimeoutError):
            return  # no answer yet
        else:
            raise error
        request.responses.remove(response)

    def _on_damage(self, request: PendingRequest, error: Exception) -> None:
        request.last_failure, request.damaged = error, request.damaged + 1
        found = _message(error)
        if request.damaged == DAMAGED_TRIES:
            raise TeacherError(f"{found}; the teacher pool was asked {DAMAGED_TRIES} times") from error
        what = "received a damaged request" if isinstance(error, RayTaskError) else "sent a damaged answer"
        self._notify(f"the teacher pool {what} ({found}); asking again")

    def _on_loss(self, request: PendingRequest, error: Exception) -> None:
        request.last_failure = error
        self._notify(f"the teacher pool lost a request ({_first_line(error)}); sending it again")
        self._require_pool()

    def _on_late(self, request: PendingRequest, hedge: Hedge, now: float) -> None:
        if not hedge.begun:
            self._notify(
                f"the teacher pool has not answered a request for {now - request.submitted:.1f} s, where "
                f"{hedge.usual_s:.1f} s are usual; asking another replica, too"
            )
        request.send()
        hedge.sent(now)

    def _on_silence(self, request: PendingRequest, waited_s: float) -> None:
        self._require_pool()
        if request.wanted:
            self._notify(f"still waiting for the teacher pool after {waited_s:.0f} s")

    def _require_pool(self) -> None:
        """Raises TeacherError if the pool was removed."""
        if find_lease(self._app_name) is None:
            raise TeacherError(
                f"the teacher pool {self._app_name} was removed while a worker waited for it: its driver stopped it, "
                f"or nobody used it for {self._config.idle_timeout_s:.0f} s (teacher.idle_timeout_s); start the run again"
            )

    def _refusal(self, error: RayTaskError) -> TaidRayError:
        """Returns what the replica raised on a request that no other replica would answer either."""
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
    """Returns the whole message of an error of ours, and the first line of any other, which may hold a traceback."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    return str(cause) if isinstance(cause, TaidRayError) else _first_line(error)
