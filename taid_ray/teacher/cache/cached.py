"""A teacher client that asks the teacher only for what the cache does not hold."""

import queue
import threading
import uuid
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from taid_ray.data.batch import Batch
from taid_ray.errors import TeacherError
from taid_ray.models.head import Head
from taid_ray.teacher.cache.claims import RENEW_S, ClaimRegistry
from taid_ray.teacher.cache.samples import KeyedSample, batch_of_samples, join, samples_of, split
from taid_ray.teacher.cache.store import CacheStore
from taid_ray.teacher.payload import TeacherOutput
from taid_ray.teacher.protocol import TeacherClient, TeacherInfo
from taid_ray.teacher.transfer import ToDevice

POLL_S = 0.05
"""Seconds between two looks for a sample that another process computes."""
CLOSE_S = 5.0
"""How long `close` waits for each thread."""


@dataclass
class TeacherCall:
    """A request to the teacher itself."""

    request: Any
    """What `submit` of the inner client returned."""
    samples: list[KeyedSample]
    """The samples that were sent, in the order of the answer."""


@dataclass
class CachedRequest:
    """A batch on its way through the three threads."""

    batch: Batch
    samples: list[KeyedSample] = field(default_factory=list)
    parts: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """The known parts of the answer, on CPU, by the samples' keys."""
    call: TeacherCall | None = None
    compute_s: float = 0.0
    image_bytes: int = 0
    output: Future[Any] = field(default_factory=Future)

    def missing(self) -> list[KeyedSample]:
        """The samples whose outputs are not known yet, without duplicates."""
        return list({sample.key: sample for sample in self.samples if sample.key not in self.parts}.values())


class CachedTeacher:
    """A TeacherClient in front of another one, which must answer on CPU and is asked for each sample once.

    Three threads work ahead of `collect`, and each takes the requests in order. The first looks into the cache and sends what
    is missing to the teacher, in one request. The second writes the teacher's answers into the cache; it waits for nothing else,
    because other processes wait for these answers. The third waits for samples that other processes compute, and joins the parts.
    """

    def __init__(self, inner: TeacherClient, cache: CacheStore, claims: ClaimRegistry, device: torch.device):
        self._inner, self._cache, self._claims, self._device = inner, cache, claims, device
        self._scope, self._to_device = cache.scope, ToDevice(device)
        self._holder = uuid.uuid4().hex
        self._held: set[str] = set()
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self.samples_found = self.samples_asked = 0
        """Number of samples that the first look found in the cache, and number that the teacher was asked for."""
        stages = (self._lookup, self._keep, self._assemble)
        self._queues: list[queue.SimpleQueue[CachedRequest | None]] = [queue.SimpleQueue() for _ in stages]
        self._threads = [
            threading.Thread(target=self._run, args=(number, stage), name=f"taid-cache-{number}", daemon=True)
            for number, stage in enumerate(stages)
        ]
        self._threads.append(threading.Thread(target=self._renew, name="taid-cache-claims", daemon=True))
        for thread in self._threads:
            thread.start()

    @property
    def tokens(self) -> int:
        return self._inner.tokens

    @property
    def inner(self) -> TeacherClient:
        """The teacher itself."""
        return self._inner

    def submit(self, batch: Batch) -> CachedRequest | None:
        if not batch.num_loss_tokens:
            return None
        request = CachedRequest(batch)
        self._queues[0].put(request)
        return request

    def collect(self, request: CachedRequest | None) -> TeacherOutput:
        """The answer to a request, usually there already. Raises TeacherError as the inner client does."""
        if request is None:
            return self.info().empty_output(self._device)
        output, copied = request.output.result()
        self._to_device.wait(output, copied)
        answer: TeacherOutput = output
        return answer

    def payload_error(self, batch: Batch) -> float:
        return self._inner.payload_error(batch)

    def seeing(self, batch: Batch, without: Batch) -> list[float]:
        return self._inner.seeing(batch, without)

    def head(self) -> Head:
        return self._inner.head()

    def info(self) -> TeacherInfo:
        return self._inner.info()

    def close(self) -> None:
        """Ends the threads, the inner client and all claims. A request that still waits fails with TeacherError."""
        self._stopped.set()
        self._queues[0].put(None)
        self._inner.close()
        for thread in self._threads:
            thread.join(CLOSE_S)
        with self._lock:
            self._claims.release(self._holder, self._scoped(self._held))

    def _run(self, number: int, stage: Callable[[CachedRequest], None]) -> None:
        """Passes requests through one stage and on to the next, until None comes. An error ends its request's way."""
        following = self._queues[number + 1] if number + 1 < len(self._queues) else None
        while (request := self._queues[number].get()) is not None:
            try:
                stage(request)
            except BaseException as error:  # handed over, to be raised by `collect`
                request.output.set_exception(error)
            else:
                if following is not None:
                    following.put(request)
        if following is not None:
            following.put(None)

    def _lookup(self, request: CachedRequest) -> None:
        """First stage: looks into the cache, and sends to the teacher what is missing and not claimed by others."""
        info = self.info()
        request.samples = samples_of(request.batch, info.fingerprint, with_labels=info.payload == "topk")
        self._find(request)
        with self._lock:
            self.samples_found += len(request.parts)
        mine = self._claim(request)
        if mine:
            request.call = self._request(mine, request.batch, whole=len(mine) == len(request.samples))

    def _keep(self, request: CachedRequest) -> None:
        """Second stage: waits for the teacher's answer and writes it into the cache."""
        if request.call is not None:
            self._receive(request, request.call)

    def _assemble(self, request: CachedRequest) -> None:
        """Third stage: waits until others have computed the rest, and puts the answer together."""
        while request.missing():
            self._find(request)
            mine = self._claim(request) if request.missing() else []
            if mine:  # whoever had claimed them gave up, or could not write them
                self._receive(request, self._request(mine, request.batch))
            elif request.missing() and self._stopped.wait(POLL_S):
                raise TeacherError("the client of the cache was closed")
        tensors = join(request.samples, request.parts)
        request.parts.clear()
        output = TeacherOutput(self.info().payload, tensors, request.compute_s, request.image_bytes)
        request.output.set_result(self._to_device.copy(output))

    def _find(self, request: CachedRequest) -> None:
        """Reads from the cache those of the missing samples that it holds."""
        for sample in request.missing():
            tensors = self._cache.get(sample.key)
            if tensors is not None and self._fits(tensors, sample):
                request.parts[sample.key] = tensors

    def _fits(self, tensors: dict[str, Tensor], sample: KeyedSample) -> bool:
        """Checks whether the tensors can be this teacher's answer for the sample."""
        try:
            self.info().check_output(tensors, sample.num_positions)
        except TeacherError:
            return False
        return True

    def _claim(self, request: CachedRequest) -> list[KeyedSample]:
        """Claims the missing samples, and returns those that this client has to compute."""
        missing = request.missing()
        with self._lock:
            wanted = [sample.key for sample in missing if sample.key not in self._held]
            granted = {key for key, mine in zip(wanted, self._granted(wanted), strict=True) if mine}
            self._held |= granted
        self._find(request)  # another client may have written and released some since the last look
        mine = [sample for sample in missing if sample.key in granted]
        self._release([sample for sample in mine if sample.key in request.parts])
        return [sample for sample in mine if sample.key not in request.parts]

    def _granted(self, keys: Sequence[str]) -> list[bool]:
        return self._claims.claim(self._holder, self._scoped(keys)) if keys else []

    def _scoped(self, keys: Iterable[str]) -> list[str]:
        """Adds the cache's scope to the keys, so that only clients of the same directory wait for each other."""
        return [f"{self._scope} {key}" for key in keys]

    def _release(self, samples: Sequence[KeyedSample]) -> None:
        """Ends this client's claims to the samples."""
        keys = [sample.key for sample in samples]
        with self._lock:
            self._held.difference_update(keys)
        if keys:
            self._claims.release(self._holder, self._scoped(keys))

    def _request(self, samples: list[KeyedSample], batch: Batch, whole: bool = False) -> TeacherCall:
        """Sends the teacher one request for these samples of the batch.

        whole: these are all of its samples. It is then sent unchanged, so that the answer has the same bits as without a cache.
        """
        try:
            if not whole:
                may_share_rows = self.info().packing_error is None
                batch, samples = batch_of_samples(samples, batch.inputs["input_ids"].shape[1], may_share_rows)
            with self._lock:
                self.samples_asked += len(samples)
            return TeacherCall(self._inner.submit(batch), samples)
        except BaseException:
            self._release(samples)
            raise

    def _receive(self, request: CachedRequest, call: TeacherCall) -> None:
        """Waits for an answer, writes it into the cache, and ends the claims to its samples."""
        try:
            output = self._inner.collect(call.request)
            parts = split({name: tensor.cpu() for name, tensor in output.tensors.items()}, call.samples)
            request.compute_s += output.compute_s
            request.image_bytes += output.image_bytes
            request.parts |= parts
            for key, tensors in parts.items():
                self._cache.put(key, tensors)
        finally:
            self._release(call.samples)

    def _renew(self) -> None:
        """Renews all claims every RENEW_S until `close`."""
        while not self._stopped.wait(RENEW_S):
            with self._lock:
                self._granted(list(self._held))
