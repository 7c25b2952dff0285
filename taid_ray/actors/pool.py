"""The teacher pool: starting and stopping it from the driver, and asking it from the student workers."""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
import torch
from ray import serve
from ray.actor import ActorHandle
from ray.exceptions import (
    ActorAlreadyExistsError,
    NodeDiedError,
    ObjectLostError,
    RayActorError,
    RayTaskError,
    WorkerCrashedError,
)
from ray.serve.exceptions import DeploymentUnavailableError, RayServeException, RequestCancelledError
from ray.serve.schema import ApplicationStatus

from taid_ray.actors.lease import RENEW_PERIOD_S, create_lease, end_lease, find_lease, keep_lease
from taid_ray.actors.teacher import DEPLOYMENT, ReplicaBrokenError, teacher_app
from taid_ray.batch import Batch
from taid_ray.config import TeacherConfig
from taid_ray.errors import TaidRayError, TeacherError
from taid_ray.models import Head
from taid_ray.teacher_model import TeacherInfo, TeacherOutput, head_digest
from taid_ray.wire import Packed, pack, unpack

PIECE_BYTES = 64 * 2**20
POLL_S = 0.5
BUILDING = threading.Lock()  # Serve cannot describe two deployments in two threads at a time
RETRY_PAUSE_S = 1.0
NOTICE_S = 15.0
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

logger = logging.getLogger(__name__)
logging.getLogger("ray.serve").setLevel(logging.WARNING)  # "Connecting to existing Serve app" and the like


def start_pool(
    config: TeacherConfig,
    num_shared: int,
    device_kind: str,
    app_name: str,
    use_role_resources: bool,
    on_wait: Callable[[str], None] = logger.debug,
) -> TeacherInfo:
    """Starts a pool and waits until every replica has loaded and tested its model.

    on_wait: told about twice a second what it waits for. A pool of that name that a dead driver left behind is
    replaced. Raises what a replica failed with (ModelError, TeacherError) at once, TeacherError after config.timeout_s
    or if somebody uses a pool of that name. Leaves nothing behind when it raises.
    """
    start = time.monotonic()
    _start_serve()
    _remove_abandoned(app_name)
    lease = create_lease(app_name, config.idle_timeout_s)
    try:
        with BUILDING:
            app = teacher_app(config, num_shared, device_kind, app_name, use_role_resources)
        target = serve.RunTarget(app, name=app_name, route_prefix=None)
        serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)
        _wait_until_running(config, app_name, lease, start, on_wait)
        if len(ray.get(lease.probe_digests.remote())) > 1:
            logger.warning("teacher pool %s: replicas differ in the last bits, so reruns will too", app_name)
        teacher = PoolTeacher(app_name, config)
        try:
            return teacher.info()
        finally:
            teacher.close()
    except BaseException:
        stop_pool(app_name)
        raise


def stop_pool(app_name: str) -> None:
    """Removes the pool and waits until its resources are free. Does nothing if there is none."""
    try:
        serve.delete(app_name)
    except RayServeException:
        pass  # Serve does not run
    except TimeoutError as error:
        logger.warning("teacher pool %s: Serve is still removing it: %s", app_name, error)
    end_lease(app_name)


def _start_serve() -> None:
    """Joins the cluster's Serve, or starts it, without HTTP proxies."""
    try:
        serve.start(proxy_location="Disabled")
    except ActorAlreadyExistsError:  # somebody else starts it at this moment
        serve.start(proxy_location="Disabled")


def _remove_abandoned(app_name: str) -> None:
    lease = find_lease(app_name)
    if lease is None and app_name not in serve.status().applications:
        return
    idle_s = float("inf") if lease is None else ray.get(lease.idle_s.remote())
    if idle_s < 3 * RENEW_PERIOD_S:
        raise TeacherError(
            f"a teacher pool named {app_name} is in use on this cluster (last sign of life {idle_s:.0f} s ago); give this "
            f"run another name, or, if that run was killed just now, try again in {3 * RENEW_PERIOD_S:.0f} s"
        )
    logger.warning("teacher pool %s: removing the one that an earlier run left behind", app_name)
    stop_pool(app_name)


def _wait_until_running(
    config: TeacherConfig, app_name: str, lease: ActorHandle, start: float, on_wait: Callable[[str], None]
) -> None:
    while True:
        lease.renew.remote()
        failure = ray.get(lease.failure.remote())
        if failure is not None:
            raise failure
        app = serve.status().applications.get(app_name)
        deployment = app.deployments.get(DEPLOYMENT) if app else None
        states = dict(deployment.replica_states) if deployment else {}
        ready, waited = states.get("RUNNING", 0), time.monotonic() - start
        if app is not None and app.status == ApplicationStatus.RUNNING:
            return
        message = deployment.message if deployment else ""
        if app is not None and app.status == ApplicationStatus.DEPLOY_FAILED:
            raise TeacherError(
                f"the teacher pool {app_name} failed to start: {message or app.message}; {WHERE_TO_LOOK}"
            )
        if waited > config.timeout_s:
            raise TeacherError(
                f"the teacher pool {app_name} was not ready after {waited:.0f} s (teacher.timeout_s); {ready} of "
                f"{config.replicas} replicas run, the others: {states or 'none'} {message}; {WHERE_TO_LOOK}"
            )
        on_wait(f"teacher pool: {ready} of {config.replicas} replicas ready after {waited:.0f} s")
        time.sleep(POLL_S)


@dataclass
class PoolRequest:
    """A request in flight, and how to send it again."""

    send: Callable[[], Any]
    response: Any


@dataclass
class BatchRequest:
    num_positions: int
    request: PoolRequest | None
    """None without loss positions: there is nothing to ask."""


class PoolTeacher:
    """A TeacherClient of a running pool, for one student worker. Keeps the pool's lease while it exists."""

    def __init__(self, app_name: str, config: TeacherConfig, notify: Callable[[str], None] = logger.warning):
        """`notify` is told of long waits and lost requests. Raises TeacherError if there is no such pool."""
        self._app_name, self._config, self._notify = app_name, config, notify
        self._stop_renewing = keep_lease(app_name)
        self._handle = serve.get_app_handle(app_name)
        self.tokens = 0
        self._info: TeacherInfo | None = None

    def submit(self, batch: Batch) -> BatchRequest:
        """Sends the batch and returns at once."""
        if not batch.num_loss_tokens:
            return BatchRequest(0, None)
        inputs = {name: pack(tensor) for name, tensor in batch.inputs.items()}
        positions = pack(batch.loss_positions)
        self.tokens += batch.inputs["input_ids"].numel()
        return BatchRequest(batch.num_loss_tokens, self._send(lambda: self._handle.score.remote(inputs, positions)))

    def collect(self, request: BatchRequest) -> TeacherOutput:
        """The answer, on CPU, in memory that must not be written to. Sends the request again if a replica is lost.

        Raises TeacherError after config.timeout_s, or for an answer of the wrong kind.
        """
        info = self.info()
        width = info.hidden_size if info.payload == "hidden" else info.num_shared
        dtype, shape = getattr(torch, info.dtype), (request.num_positions, width)
        if request.request is None:
            return TeacherOutput(torch.empty(shape, dtype=dtype), info.payload)
        values = unpack(self._answer(request.request))
        if values.shape != shape or values.dtype != dtype:
            raise TeacherError(
                f"the teacher pool {self._app_name} answered with {tuple(values.shape)} {values.dtype}, expected {shape} "
                f"{dtype}; restart the run with the same taid-ray on all nodes"
            )
        return TeacherOutput(values, info.payload)

    def info(self) -> TeacherInfo:
        """Asks the pool once."""
        if self._info is None:
            self._info = self._answer(self._send(lambda: self._handle.info.remote()))
        assert self._info is not None
        return self._info

    def head(self) -> Head:
        """The head's shared rows, on CPU, fetched in pieces of at most PIECE_BYTES and verified.

        Raises TeacherError if what arrives is not the head that the pool's first replica has.
        """
        info = self.info()
        dtype = getattr(torch, info.dtype)
        weight = torch.empty(info.num_shared, info.hidden_size, dtype=dtype)
        bias = torch.empty(info.num_shared, dtype=dtype) if info.has_bias else None
        rows = max(1, PIECE_BYTES // (info.hidden_size * dtype.itemsize))
        for start in range(0, info.num_shared, rows):
            stop = min(start + rows, info.num_shared)
            weight_rows, bias_rows = self._head_piece(start, stop)
            weight[start:stop] = unpack(weight_rows)
            if bias is not None and bias_rows is not None:
                bias[start:stop] = unpack(bias_rows)
        head = Head(weight, bias, info.transform)
        if head_digest(head) != info.head_digest:
            raise TeacherError(
                f"the head fetched from the teacher pool {self._app_name} is damaged; start the run again"
            )
        return head

    def close(self) -> None:
        """Stops keeping the lease."""
        self._stop_renewing()

    def _head_piece(self, start: int, stop: int) -> tuple[Packed, Packed | None]:
        fingerprint, weight, bias = self._answer(self._send(lambda: self._handle.head_piece.remote(start, stop)))
        if fingerprint != self.info().fingerprint:
            raise TeacherError(
                f"the teacher pool {self._app_name} changed its model while its head was read; start again"
            )
        return weight, bias

    @staticmethod
    def _send(send: Callable[[], Any]) -> PoolRequest:
        return PoolRequest(send, send())

    def _answer(self, request: PoolRequest) -> Any:
        """Waits, sending the request again whenever its replica is lost."""
        start = time.monotonic()
        lost: Exception | None = None
        while (waited := time.monotonic() - start) < self._config.timeout_s:
            try:
                return request.response.result(timeout_s=min(NOTICE_S, self._config.timeout_s - waited))
            except LOST as error:
                lost = error
                self._notify(f"the teacher pool lost a request ({_first_line(error)}); sending it again")
                time.sleep(RETRY_PAUSE_S)
                request.response = request.send()
            except RayTaskError as error:
                raise self._refused(error) from error
            except TimeoutError:
                self._notify(f"still waiting for the teacher pool after {time.monotonic() - start:.0f} s")
            self._require_lease()
        found = f"; last failure: {_first_line(lost)}" if lost else ""
        raise TeacherError(
            f"no answer from the teacher pool {self._app_name} after {waited:.0f} s (teacher.timeout_s){found}; "
            f"{WHERE_TO_LOOK}"
        )

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
