"""The teacher pool's client in a student worker: sends requests, and takes the answers in order in a thread."""

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from typing import Any

import ray
import torch
from ray import serve

from taid_ray.config.models import TeacherConfig
from taid_ray.data.batch import Batch
from taid_ray.distributed.world import World
from taid_ray.errors import MessageError, TeacherError
from taid_ray.media.pictures import Read
from taid_ray.models.head import Head
from taid_ray.teacher.payload import TeacherOutput
from taid_ray.teacher.pictures import read_once
from taid_ray.teacher.pool.deployment import DEPLOYMENT
from taid_ray.teacher.pool.hedging import LatencyTracker
from taid_ray.teacher.pool.lease import keep_lease, require_lease
from taid_ray.teacher.pool.messages import HeadPiece, ScoreRequest, ScoreResponse, contents_of
from taid_ray.teacher.pool.request import PendingRequest, ResponseWaiter
from taid_ray.teacher.pool.shared_head import shared_head
from taid_ray.teacher.protocol import TeacherInfo
from taid_ray.teacher.transfer import ToDevice
from taid_ray.teacher.wire import unpack, verify
from taid_ray.tracking.prometheus import STUDENT, Instruments, run_of_pool

PIECE_BYTES = 64 * 2**20
"""Bytes of the teacher's head in one answer of a replica, at most."""
CLOSE_S = 5.0
"""Seconds that `close` waits for the thread."""
CPU = torch.device("cpu")
ALONE = World()

logger = logging.getLogger(__name__)


class PoolTeacher:
    """A TeacherClient of a running pool, for one student worker.

    A thread takes the answers in the order of the requests, so that `collect` finds them checked and on the device. Where
    there are images another thread reads them, and so sends the requests, in the same order.
    """

    def __init__(
        self,
        app_name: str,
        config: TeacherConfig,
        notify: Callable[[str], None] = logger.warning,
        device: torch.device = CPU,
        world: World = ALONE,
        read: Read | None = None,
    ):
        """notify: told of long waits, and of late, lost and damaged requests. device: where answers are wanted. world: the
        workers that use the pool together; rank 0 keeps it alive while this client exists. read: returns the bytes of an
        image; None where there are none.

        Raises TeacherError if there is no such pool.
        """
        self._app_name, self._config, self._world = app_name, config, world
        self._lease = require_lease(app_name)
        self._handle = serve.get_app_handle(app_name)
        self._stop_renewing = keep_lease(app_name) if world.is_main else _nothing
        self.tokens = 0
        self._info: TeacherInfo | None = None
        self._waiter = ResponseWaiter(app_name, config, notify)
        self._latency = LatencyTracker(config.hedge_after)
        self._instruments = Instruments(run_of_pool(app_name), STUDENT)
        self._to_device = ToDevice(device)
        self._device = device
        self._read = read
        self._unsent: queue.SimpleQueue[PendingRequest | None] = queue.SimpleQueue()
        self._pending: queue.SimpleQueue[PendingRequest | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._fetch_all, name=f"fetch-{app_name}", daemon=True)
        self._thread.start()
        self._sending = threading.Thread(target=self._send_all, name=f"send-{app_name}", daemon=True)
        if read is not None:
            self._sending.start()

    def submit(self, batch: Batch) -> PendingRequest | None:
        """Sends the batch and returns at once; None for one without loss positions, about which there is nothing to ask.

        Answers are fetched in the order of the calls, so collect them in it.
        """
        if not batch.num_loss_tokens:
            return None
        num_positions = batch.num_loss_tokens
        self.tokens += batch.inputs["input_ids"].numel()
        packed = cache(lambda: self._packed(batch))  # all copies refer to the same bytes in the object store
        pending = PendingRequest(
            lambda request_id: self._handle.score.remote(packed()[0], request_id),
            lambda answer: (answer, replace(self._accepted(answer, num_positions), image_bytes=packed()[1])),
            at_once=self._read is None,
        )
        (self._pending if self._read is None else self._unsent).put(pending)
        return pending

    def collect(self, request: PendingRequest | None) -> TeacherOutput:
        """Waits for the answer, which usually is there already, and returns it in memory that must not be written to.

        Raises TeacherError after config.timeout_s, or if the answers are damaged, of the wrong kind or not finite each
        time they are asked for.
        """
        if request is None:
            return self.info().empty_output(self._device)
        request.wanted = True
        output, copied = request.output.result()
        self._to_device.wait(output, copied)
        return output

    def payload_error(self, batch: Batch) -> float:
        """Returns what the payload loses on a batch, as measured by a replica; see TeacherModel.payload_error."""
        request, _ = self._packed(batch)
        return float(self._ask(lambda: self._handle.payload_error.remote(request)))

    def seeing(self, batch: Batch, without: Batch) -> list[float]:
        """Returns how far the images change what the teacher predicts, as measured by a replica; see TeacherModel.seeing."""
        requests = [self._packed(one)[0] for one in (batch, without)]
        return [float(value) for value in self._ask(lambda: self._handle.seeing.remote(*requests))]

    def info(self) -> TeacherInfo:
        """Returns what identifies the pool's teacher, asked of the pool once."""
        if self._info is None:
            self._info = self._ask(lambda: self._handle.info.remote())
        assert self._info is not None
        return self._info

    def head(self) -> Head:
        """Returns the head's shared rows, on the CPU. Collective: all ranks of the client's world call it.

        Raises TeacherError if what arrives is not the head that the pool's first replica has, AttemptError if another
        worker is lost meanwhile.
        """
        return shared_head(self._world, self._lease, self.info(), self._head_pieces, self._config.timeout_s)

    def num_replicas(self) -> int:
        """Counts the replicas that run now."""
        return replica_states(self._app_name).get("RUNNING", 0)

    def close(self) -> None:
        """Withdraws what is still under way and stops keeping the lease."""
        self._waiter.stopped = True
        if self._read is not None:
            self._unsent.put(None)
            self._sending.join(CLOSE_S)
        self._pending.put(None)
        self._thread.join(CLOSE_S)
        self._stop_renewing()

    def _head_pieces(self) -> Iterator[HeadPiece]:
        """Asks the replicas for the head, at most PIECE_BYTES at a time."""
        info = self.info()
        rows = max(1, PIECE_BYTES // (info.hidden_size * getattr(torch, info.dtype).itemsize))
        for start in range(0, info.num_shared, rows):
            send = partial(self._handle.head_piece.remote, start, min(start + rows, info.num_shared))
            piece: HeadPiece = self._ask(send, _accepted_piece)
            if piece.fingerprint != info.fingerprint:
                raise TeacherError(
                    f"the teacher pool {self._app_name} changed its model while its head was read; start again"
                )
            yield piece

    def _ask(self, send: Callable[[], Any], accept: Callable[[Any], Any] = lambda answer: answer) -> Any:
        """Asks the pool and waits for the answer, while the caller stands still."""
        request = PendingRequest(lambda _: send(), accept)
        request.wanted = True
        return self._waiter.answer(request)

    def _packed(self, batch: Batch) -> tuple[ScoreRequest, int]:
        """Makes a request of a batch, whose images' bytes are read and put into the object store, equal ones once.

        Returns it, and the number of these bytes.
        """
        if not batch.images:
            return ScoreRequest.of(batch), 0
        contents = read_once(batch.images, self._read)
        return ScoreRequest.of(batch, ray.put(contents_of(contents))), sum(map(len, contents.values()))

    def _send_all(self) -> None:
        """Sends what was submitted, until None comes. An error ends its request's way."""
        while (request := self._unsent.get()) is not None:
            try:
                request.begin()
            except BaseException as error:  # handed over, to be raised by `collect`
                request.output.set_exception(error)
            else:
                self._pending.put(request)

    def _fetch_all(self) -> None:
        while (request := self._pending.get()) is not None:
            try:
                found = self._fetch(request)
            except BaseException as error:  # handed over, to be raised by `collect`
                request.cancel()
                request.output.set_exception(error)
            else:
                request.output.set_result(found)

    def _fetch(self, request: PendingRequest) -> tuple[TeacherOutput, Any]:
        hedge = self._latency.hedge(request.submitted)
        answer, output = self._waiter.answer(request, hedge)
        again = {"damaged": request.damaged > 0, "lost": request.last_failure is not None and not request.damaged}
        for reason, happened in (again | {"late": hedge.begun}).items():
            self._instruments.add("taid_requests_again", float(happened), reason)
        self._latency.answered(request.submitted, time.monotonic(), answer)
        return self._to_device.copy(output)

    def _accepted(self, answer: ScoreResponse, num_positions: int) -> TeacherOutput:
        """Returns an answer's tensors, on the CPU. Raises MessageError, naming the replica, for one that cannot be right."""
        info = self.info()
        try:
            verify(answer.payload, answer.checksum)
            tensors = {name: unpack(packed) for name, packed in answer.payload.items()}
            info.check_output(tensors, num_positions)
        except (MessageError, TeacherError) as error:
            raise MessageError(f"{error} (sent by replica {answer.replica})") from error
        return TeacherOutput(info.payload, tensors, answer.compute_s)


def _nothing() -> None:
    """Stands for the end of a renewal that was not begun."""


def _accepted_piece(piece: HeadPiece) -> HeadPiece:
    verify(piece.rows, piece.checksum)
    return piece


def replica_states(app_name: str) -> dict[str, int]:
    """Counts a pool's replicas by state (RUNNING, STARTING, STOPPING ...); empty if there is no such pool."""
    app = serve.status().applications.get(app_name)
    deployment = app.deployments.get(DEPLOYMENT) if app else None
    return dict(deployment.replica_states) if deployment else {}
