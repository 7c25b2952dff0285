"""A replica of the teacher pool: a group of tensor-parallel processes that Serve runs (see deployment).

The Serve replica is the leader, shard 0, and computes like the others; shards 1.. are its child actors, placed in its
placement group and gone when it is gone. All shards get every request; the leader's payload is the answer. The leader
processes images for all of them, in a thread beside the request that is computed meanwhile.
"""

import asyncio
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from typing import Any, TypeVar

import ray
import torch
from ray import serve
from ray.actor import ActorHandle
from ray.exceptions import RayActorError
from torch.distributed import TCPStore

from taid_ray.config.models import TeacherConfig
from taid_ray.errors import MessageError, TaidRayError, TeacherError
from taid_ray.media.processor import MediaSettings
from taid_ray.teacher.model import TeacherModel
from taid_ray.teacher.pictures import RowPictures
from taid_ray.teacher.pool.autoscaling import REPORT_S, LoadMeter
from taid_ray.teacher.pool.lease import ReplicaCommand, find_lease
from taid_ray.teacher.pool.messages import (
    AlreadyHereError,
    HeadPiece,
    ReplicaBrokenError,
    ScoreInputs,
    ScoreRequest,
    ScoreResponse,
    packed_pictures,
    sealed,
)
from taid_ray.teacher.pool.shard import GROUP_TIMEOUT, LOOPBACK, TeacherShard, load_shard
from taid_ray.teacher.protocol import TeacherInfo
from taid_ray.tracking.prometheus import TEACHER, Instruments, run_of_pool

PING_TIMEOUT_S = 20.0
"""Seconds for all shards to answer a health check."""
FAILURE_PAUSE_S = 5.0
"""Seconds between the report of a failed start and its exception."""
WITH_PIXELS = 3
"""Requests whose images' pixels are held at a time: of the one that is computed, and of two that are next."""

T = TypeVar("T")


class TeacherReplica:
    """The leader of a replica's shards. Runs as a Serve replica, which answers health checks while it computes."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self,
        config: TeacherConfig,
        num_shared: int,
        device_kind: str,
        app_name: str,
        shard_options: dict[str, Any],
        media: MediaSettings | None = None,
    ):
        """Loads the model on all shards. media: how images are processed, if there are any.

        Raises ModelError or TeacherError, which also goes to the pool's lease.
        """
        self._one_at_a_time, self._media = asyncio.Lock(), media
        self._with_pixels = asyncio.Semaphore(WITH_PIXELS)
        self._here: set[str] = set()
        self._load_meter = LoadMeter(time.monotonic())
        self._name = serve.get_replica_context().replica_id.unique_id
        self._broken: str | None = None
        self._instruments = Instruments(run_of_pool(app_name), TEACHER)
        lease = await asyncio.to_thread(find_lease, app_name)
        shard = ray.remote(TeacherShard).options(**shard_options)
        self._shards = [shard.remote() for _ in range(1, config.shards)]
        try:
            self._model = await self._load(config, num_shared, device_kind)
            if lease is not None:
                _check_same(await lease.register.remote(self._model.info()), self._model.info())
        except RayActorError:  # a shard was killed: Serve starts the replica again
            raise
        except Exception as error:
            failure = _startup_failure(error)
            if lease is not None:
                await lease.report_failure.remote(failure)
                # The driver polls and removes the pool meanwhile; Serve would print a traceback and try again.
                await asyncio.sleep(FAILURE_PAUSE_S)
            raise failure from error
        if lease is not None:
            self._reporting = asyncio.create_task(self._report_load(lease))

    async def score(self, request: ScoreRequest, request_id: str) -> ScoreResponse:
        """Computes the payload at the loss positions, as TeacherModel.score.

        request_id: the same for all copies of a request. Raises AlreadyHereError at once if one is here already,
        MessageError if the request is damaged, TeacherError for impossible ids, DataError for an image that cannot be used,
        ReplicaBrokenError if a shard is lost.
        """
        if request_id in self._here:
            raise AlreadyHereError(f"replica {self._name} has this request already")
        self._here.add(request_id)
        try:
            tensors, seconds = await self._in_turn([request], lambda *asked: _timed(lambda: self._model.score(*asked)))
        finally:
            self._here.discard(request_id)
        self._instruments.add("taid_teacher_requests", 1)
        self._instruments.add("taid_teacher_compute_seconds", seconds)
        self._instruments.observe("taid_teacher_request_seconds", seconds)
        payload, checksum = await asyncio.to_thread(sealed, tensors)
        return ScoreResponse(payload, seconds, self._name, checksum)

    async def payload_error(self, request: ScoreRequest) -> float:
        """Computes what the payload loses on this request, as TeacherModel.payload_error; errors as in `score`."""
        return await self._in_turn(
            [request], lambda inputs, positions, _, *shown: self._model.payload_error(inputs, positions, *shown)
        )

    async def seeing(self, request: ScoreRequest, without: ScoreRequest) -> list[float]:
        """Computes how far the images change the answers, as TeacherModel.seeing; errors as in `score`.

        without: the same rows with other images.
        """
        return await self._in_turn(
            [request, without], lambda inputs, positions, _, *shown: self._model.seeing(inputs, positions, *shown)
        )

    async def head_piece(self, start: int, stop: int) -> HeadPiece:
        """Returns the rows from `start` to `stop` of the shared head."""
        return await asyncio.to_thread(self._head_piece, start, stop)

    async def info(self) -> TeacherInfo:
        """Returns what identifies the loaded teacher."""
        return self._model.info()

    async def check_health(self) -> None:
        """Raises if a shard is lost or silent; Serve then replaces the replica with all its shards."""
        if self._broken is not None:
            raise ReplicaBrokenError(self._broken)
        await asyncio.wait_for(asyncio.gather(*[shard.ping.remote() for shard in self._shards]), PING_TIMEOUT_S)

    def _unpacked(self, request: ScoreRequest) -> ScoreInputs:
        try:
            return request.unpacked()
        except MessageError as error:
            raise MessageError(f"{error} (at replica {self._name})") from error

    def _pictures(self, request: ScoreRequest, contents: dict[str, Any]) -> RowPictures:
        """Processes the images of a request. Raises MessageError for damaged bytes, DataError for a broken picture."""
        try:
            checked = request.checked_contents(contents)
        except MessageError as error:
            raise MessageError(f"{error} (at replica {self._name})") from error
        return self._model.pictures(request.images, lambda image: checked[image.digest])

    async def _load(self, config: TeacherConfig, num_shared: int, device_kind: str) -> TeacherModel:
        store = None
        if config.shards > 1:
            # Port 0: the system picks a free one, so replicas on one node cannot collide.
            store = TCPStore(LOOPBACK, 0, is_master=True, wait_for_workers=False, timeout=GROUP_TIMEOUT)
        others = [
            shard.load.remote(config, num_shared, device_kind, rank, store.port, self._media)
            for rank, shard in enumerate(self._shards, start=1)
            if store is not None
        ]
        leader = asyncio.to_thread(load_shard, config, num_shared, device_kind, 0, store, self._media)
        return (await asyncio.gather(leader, *others))[0]  # the first failure of any shard ends the wait

    async def _in_turn(self, requests: Sequence[ScoreRequest], compute: Callable[..., T]) -> T:
        """Returns `compute(inputs, loss_positions, labels, *pictures)` of a request, run after all earlier ones.

        requests: the request, and others that differ from it in their images only; `pictures` are those of each, where
        there are any. Raises what Ray raises if a client that holds the images' bytes is gone.
        """
        self._load_meter.add(1, time.monotonic())
        try:
            inputs = self._unpacked(requests[0])
            # Not in `_compute`: bytes that are lost break this request, and not the replica.
            contents = [(request, await request.contents) for request in requests if request.contents is not None]
            async with self._with_pixels if contents else nullcontext():
                shown = [await asyncio.to_thread(self._pictures, *found) for found in contents]
                # A caller that gives up while its request waits takes it out of the queue.
                await self._one_at_a_time.acquire()
                # Once started, all shards must finish together before the next batch, whether or not anybody listens.
                return await asyncio.shield(asyncio.create_task(self._compute(requests[0], inputs, shown, compute)))
        finally:
            self._load_meter.add(-1, time.monotonic())

    async def _compute(
        self, request: ScoreRequest, inputs: ScoreInputs, shown: list[RowPictures], compute: Callable[..., T]
    ) -> T:
        try:
            if self._broken is not None:
                raise ReplicaBrokenError(self._broken)
            # Before any shard sees the request: an impossible one must not stop the group inside a collective.
            for pictures in shown or [()]:
                self._model.check_request(*inputs, *([pictures] if pictures else []))
            try:
                others = await self._shared(request, shown) if self._shards else []
                found: T = (await asyncio.gather(asyncio.to_thread(compute, *inputs, *shown), *others))[0]
            except Exception as error:
                if not self._shards:
                    raise
                self._broken = f"a shard failed on node {socket.gethostname()}: {type(error).__name__}: {error}"
                raise ReplicaBrokenError(self._broken) from error
            return found
        finally:
            self._one_at_a_time.release()

    async def _shared(self, request: ScoreRequest, shown: list[RowPictures]) -> list[ray.ObjectRef]:
        """Starts the other shards' part of a computation."""
        # Put by the leader, so that no shard depends on the client, and the pixels are written once for all of them.
        packed = [await asyncio.to_thread(ray.put, packed_pictures(pictures)) for pictures in shown]
        return [shard.score.remote(request, *packed) for shard in self._shards]

    async def _report_load(self, lease: ActorHandle) -> None:
        """Tells the pool's lease how much there is to do here, until the pool is removed."""
        while self._broken is None:
            await asyncio.sleep(REPORT_S)
            load = self._load_meter.read(time.monotonic())
            self._instruments.set("taid_teacher_queue", load)
            with suppress(RayActorError):  # it is being restarted
                word: ReplicaCommand = await lease.report_load.remote(self._name, load)
                if word == "over":
                    self._broken = "the teacher pool is being removed"
                elif word == "register":
                    await lease.register.remote(self._model.info())

    def _head_piece(self, start: int, stop: int) -> HeadPiece:
        head = self._model.head()
        tensors = {"weight": head.weight} if head.bias is None else {"weight": head.weight, "bias": head.bias}
        return HeadPiece(self._model.info().fingerprint, *sealed({n: x[start:stop] for n, x in tensors.items()}))


def _timed(compute: Callable[[], T]) -> tuple[T, float]:
    start = time.perf_counter()
    found = compute()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return found, time.perf_counter() - start


def _check_same(first: TeacherInfo, own: TeacherInfo) -> None:
    if first.fingerprint != own.fingerprint or first.head_digest != own.head_digest:
        raise TeacherError(
            f"the replica on node {socket.gethostname()} loaded another teacher (fingerprint {own.fingerprint[:12]}) than "
            f"the pool's first replica ({first.fingerprint[:12]}); make the same files and package versions visible on "
            "all nodes"
        )


def _startup_failure(error: Exception) -> TaidRayError:
    """Turns the cause of a failed start into an error for the driver: one string, no traceback."""
    cause = getattr(error, "cause", None) or error  # a shard's error arrives wrapped by Ray
    if isinstance(cause, TaidRayError):
        return type(cause)(str(cause.args[0]))
    return TeacherError(
        f"a teacher replica on node {socket.gethostname()} failed to start: {type(cause).__name__}: {cause}"
    )
