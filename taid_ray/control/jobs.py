"""Client of Ray's Jobs API: connecting, finding a run's job, following its log."""

import asyncio
import json
import logging
import os
import re
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from taid_ray.control.state import POLL_S
from taid_ray.errors import ClusterError, shortened

CONNECT_TIMEOUT_S = 5.0
ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
HEADERS_VARIABLE = "RAY_JOB_HEADERS"
"""Environment variable of Ray's own `ray job`, as ADDRESS_VARIABLES; a cluster's token is read by Ray itself."""
SHOWN_LINES = 30
"""Lines shown first of the log of a job that was under way before."""
RETRY_S, RECONNECT_S = 2.0, 120.0
PENDING_S = 10.0
SILENT_S = 60.0
"""Time without a line after which the log is asked for again: a connection that broke silently looks the same."""
STOPPED_CODE, FAILED_CODE = 143, 1
UNREACHABLE = (ConnectionError, requests.RequestException, aiohttp.ClientError, OSError)
HICCUPS = (*UNREACHABLE, AuthenticationError, RuntimeError)
"""Errors of a cluster that may answer again, as it answered before."""
for _module in ("dashboard.modules.dashboard_sdk", "dashboard.modules.job.sdk", "_private.runtime_env.packaging"):
    # These log connections and uploads, between the job's own lines.
    logging.getLogger(f"ray.{_module}").setLevel(logging.WARNING)


def connect(address: str | None) -> JobSubmissionClient:
    """Connects to a cluster. address: as `ray job --address`; None: the environment's. Raises ClusterError if none answers."""
    address = address or next((os.environ[name] for name in ADDRESS_VARIABLES if os.environ.get(name)), None)
    if address is None:
        raise ClusterError(
            "no cluster to submit to: give --address http://HEAD:8265 (what `ray start --head` calls its dashboard), or set "
            "RAY_ADDRESS"
        )
    with answering(address):
        _knock(address)
        headers = json.loads(os.environ.get(HEADERS_VARIABLE, "null"))
        with _preferred(address):
            return JobSubmissionClient(address, headers=headers)


@contextmanager
def answering(address: str) -> Iterator[None]:
    """Turns the errors of a cluster that does not answer, or refuses us, into ClusterError."""
    try:
        yield
    except AuthenticationError as error:
        raise ClusterError(f"{address}: the cluster wants a token: {' '.join(str(error).split())}") from error
    except (*UNREACHABLE, ValueError) as error:
        raise ClusterError(
            f"{address}: no Jobs API of a Ray cluster answers there ({_one_line(error)}); correct --address or RAY_ADDRESS; "
            "it is the dashboard's address, by default port 8265 of the head"
        ) from error
    except RuntimeError as error:  # an answer with another status than 200
        raise ClusterError(f"{address}: Ray's Jobs API refuses: {_one_line(error)}") from error


def newest(client: JobSubmissionClient, name: str) -> tuple[int, JobDetails | None]:
    """Number and details of the last of a run's jobs, whose ids are NAME, NAME-2, NAME-3, ...; (0, None) without one."""
    found: tuple[int, JobDetails | None] = (0, None)
    for job in client.list_jobs():
        match = re.fullmatch(rf"{re.escape(name)}(?:-(\d+))?", job.submission_id or "")
        if match and int(match[1] or 1) > found[0]:
            found = int(match[1] or 1), job
    return found


class ReconnectDeadline:
    """Time limit for a cluster that does not answer: RECONNECT_S from its first failure after an answer."""

    def __init__(self, client: JobSubmissionClient, job: str, notify: Callable[[str], None]):
        self._address, self._job, self._notify = client.get_address(), job, notify
        self._lost: float | None = None

    def answered(self) -> None:
        """Records an answer, so that the next failure is a first one."""
        self._lost = None

    def lost(self, error: Exception) -> None:
        """Records a failure. Raises ClusterError if the cluster has not answered for RECONNECT_S."""
        now = time.monotonic()
        if self._lost is None:
            self._lost = now
            self._notify(f"the connection to {self._address} was lost ({_one_line(error)}); trying again")
        if now - self._lost > RECONNECT_S:
            raise ClusterError(
                f"{self._address} has not answered for {RECONNECT_S:.0f} s ({_one_line(error)}); the job {self._job} may go on "
                "there. Give the same command again when it answers"
            ) from error


def follow(
    client: JobSubmissionClient, job: str, write: Callable[[str], None], notify: Callable[[str], None], late: bool
) -> JobDetails:
    """Passes the log of a job on until the job has ended. late: leave out all but the last lines of what it said before.

    Raises ClusterError if the cluster does not answer for RECONNECT_S; the job may go on.
    """
    log, deadline = _Log(write), ReconnectDeadline(client, job, notify)
    while True:
        try:
            _wait_for_start(client, job, notify, deadline)
            if late:
                log.skip_all_but_last(client.get_job_logs(job))
                late = False
            heard = asyncio.run(_tail(client, job, log, deadline))
            info = client.get_job_info(job)
            if info.status.is_terminal():
                return info
            if not heard:
                raise TimeoutError(f"no line of the log came for {SILENT_S:.0f} s")
        except HICCUPS as error:
            deadline.lost(error)
        else:
            deadline.answered()
        time.sleep(RETRY_S)


def exit_code(job: JobDetails) -> int:
    """Exit code of a job that has ended: its entry point's, as a shell has it after a signal; 143 after `stop`."""
    if job.status == JobStatus.SUCCEEDED:
        return 0
    if job.status == JobStatus.STOPPED:
        return STOPPED_CODE
    code = job.driver_exit_code
    return FAILED_CODE if code is None else 128 - code if code < 0 else code


def _wait_for_start(
    client: JobSubmissionClient, job: str, notify: Callable[[str], None], deadline: ReconnectDeadline
) -> None:
    """Waits until a job runs: until then there is no log, and installing packages may take minutes."""
    start, said = time.monotonic(), ""
    # Once the job runs only its log counts as an answer: a proxy may let requests through, but no log.
    while (info := client.get_job_info(job)).status == JobStatus.PENDING:
        deadline.answered()
        message = info.message or "it is pending"
        if message != said and time.monotonic() - start > PENDING_S:
            said = message
            notify(f"the job has not begun after {PENDING_S:.0f} s: {_one_line(message)}")
        time.sleep(POLL_S)


class _Log:
    """Writes a log that is sent anew from its beginning after each loss of the connection."""

    def __init__(self, write: Callable[[str], None]):
        self._write, self._written, self.place = write, 0, 0

    def skip_all_but_last(self, text: str) -> None:
        self._written = len(text)
        self._write("".join(text.splitlines(keepends=True)[-SHOWN_LINES:]))

    def add(self, chunk: str) -> None:
        new = chunk[max(0, self._written - self.place) :]
        self.place += len(chunk)
        self._written = max(self._written, self.place)
        if new:
            self._write(new)


async def _tail(client: JobSubmissionClient, job: str, log: _Log, deadline: ReconnectDeadline) -> bool:
    """Follows the log until it ends, or says nothing for SILENT_S: Ray's client itself would wait for ever.

    Returns True if it said anything, as a log that can be reached does: it is sent from its beginning.
    """
    log.place, heard = 0, False
    chunks = client.tail_job_logs(job)
    while True:
        waiting = asyncio.ensure_future(anext(chunks))
        done, _ = await asyncio.wait([waiting], timeout=SILENT_S)
        if not done:
            waiting.cancel()
            return heard
        try:
            chunk = waiting.result()  # raises what the connection failed with
        except StopAsyncIteration:
            return True
        heard = True
        deadline.answered()
        log.add(chunk)


def _knock(address: str) -> None:
    """Fails soon if nothing answers; Ray itself would wait for minutes."""
    parts = urlsplit(address if "://" in address else f"//{address}")
    port = parts.port or {"http": 80, "https": 443}.get(parts.scheme)
    if parts.hostname and port:
        socket.create_connection((parts.hostname, port), CONNECT_TIMEOUT_S).close()


@contextmanager
def _preferred(address: str) -> Iterator[None]:
    """Sets the environment's address for a while, which Ray prefers to the one it is given."""
    name = ADDRESS_VARIABLES[0]
    before = os.environ.get(name)
    os.environ[name] = address
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


def _one_line(error: Any) -> str:
    return shortened(str(error)) or type(error).__name__
