"""Pools whose teacher is shown images, with real Serve replicas and shards, against the same teacher in this process."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
import xxhash
from ray import serve
from ray.exceptions import OwnerDiedError

from taid_ray.config.models import TeacherConfig
from taid_ray.data.batch import NO_LABEL, Batch, Row, collate
from taid_ray.errors import DataError, MessageError
from taid_ray.media.processor import MediaSettings
from taid_ray.media.refs import ImageRef
from taid_ray.teacher.local import LocalTeacher
from taid_ray.teacher.pool import lifecycle
from taid_ray.teacher.pool.client import PoolTeacher, replica_states
from taid_ray.teacher.pool.deployment import PoolSpec
from taid_ray.teacher.pool.lease import keep_lease
from taid_ray.teacher.pool.lifecycle import start_pool, stop_pool
from taid_ray.teacher.pool.messages import ScoreRequest, contents_of
from taid_ray.teacher.pool.request import LOST
from tests.support.shown import batch_with_images
from tests.support.tiny_vision import save_tiny, tiny_media
from tests.support.waiting import START_S, wait_until

pytestmark = [pytest.mark.timeout(900), pytest.mark.more]

SHARED, MEDIA, NAME = 500, MediaSettings("pil"), "llava"
POOLS = {"whole": {"replicas": 1}, "split": {"shards": 2}}
Answers = Callable[[str], PoolTeacher]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(NAME, tmp_path_factory.mktemp("teacher"))


def config(model: Path, **values: Any) -> TeacherConfig:
    given = {"model": str(model), "dtype": "float32", "timeout_s": START_S, "cpus_per_shard": 0.2}
    return TeacherConfig(**given | values)


@pytest.fixture(scope="module")
def contents() -> dict[str, bytes]:
    """The images' bytes, by digest."""
    return batch_with_images(tiny_media(NAME))[1]


@pytest.fixture(scope="module")
def connect(ray_cluster: str, model: Path, contents: dict[str, bytes]) -> Iterator[Answers]:
    """Starts both pools, and makes a client of one."""
    clients: list[PoolTeacher] = []

    def start(name: str) -> Callable[[], None]:
        spec = PoolSpec(config(model, **POOLS[name]), SHARED, "cpu", use_role_resources=True, media=MEDIA)
        start_pool(spec, name)
        return keep_lease(name)

    def client(name: str) -> PoolTeacher:
        clients.append(PoolTeacher(name, config(model, **POOLS[name]), read=lambda image: contents[image.digest]))
        return clients[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lifecycle, "LEASE_S", START_S)  # a lease answers first when its process has started
        with ThreadPoolExecutor() as threads:
            stops = list(threads.map(start, POOLS))
        yield client
        for stop in (*(opened.close for opened in clients), *stops):
            stop()
        for name in POOLS:
            stop_pool(name)


def batches() -> list[Batch]:
    seen = batch_with_images(tiny_media(NAME))[0]
    text = collate([Row([5, 6, 7, 8], [0, 1, 2, 3], [6, 7, 8, NO_LABEL])])
    return [seen, text, seen]


def without(batch: Batch) -> tuple[Batch, dict[str, bytes]]:
    """The batch with grey images, and their bytes."""
    media, greys = tiny_media(NAME), {}

    def grey(image: ImageRef) -> ImageRef:
        content = media.grey(image)
        greys[xxhash.xxh3_128_hexdigest(content)] = content
        return replace(image, digest=xxhash.xxh3_128_hexdigest(content))

    return replace(batch, images=tuple(tuple(map(grey, row)) for row in batch.images)), greys


@pytest.mark.parametrize("name", POOLS)
def test_a_pool_sees_what_the_local_teacher_sees(
    name: str, connect: Answers, model: Path, contents: dict[str, bytes]
) -> None:
    local = LocalTeacher(
        config(model, mode="local"), SHARED, torch.device("cpu"), MEDIA, lambda image: contents[image.digest]
    )
    teacher = connect(name)
    requests = [teacher.submit(batch) for batch in batches()]
    found = [teacher.collect(request).tensors["hidden"] for request in requests]
    expected = [local.collect(local.submit(batch)).tensors["hidden"] for batch in batches()]
    assert torch.equal(found[0], found[2]) and teacher.info().fingerprint == local.info().fingerprint
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other) if name == "whole" else torch.allclose(one, other, atol=2e-5, rtol=1e-4)
    seen, (unseen, greys) = batches()[0], without(batches()[0])
    contents |= greys
    assert teacher.seeing(seen, unseen) == pytest.approx(local.seeing(seen, unseen), rel=1e-3, abs=1e-6)
    assert teacher.seeing(seen, unseen)[0] > 1e-4 and teacher.payload_error(seen) == 0.0


@ray.remote(num_cpus=0)
class Owner:
    """A process that owns the bytes of images, as a client does."""

    def put(self, found: Any) -> list[ray.ObjectRef]:
        return [ray.put(found)]


def is_lost(reference: ray.ObjectRef) -> bool:
    try:
        ray.get(reference)
    except OwnerDiedError:
        return True
    return False


def refused(name: str, request: ScoreRequest) -> Exception:
    """What a replica says to a request."""
    try:
        serve.get_app_handle(name).score.remote(request, "one").result(timeout_s=START_S)
    except Exception as error:
        return error
    raise AssertionError("it answered")


@pytest.mark.parametrize("name", POOLS)
def test_bytes_that_are_lost_or_damaged_break_a_request_and_no_replica(
    name: str, connect: Answers, contents: dict[str, bytes]
) -> None:
    teacher, seen = connect(name), batches()[0]
    before = teacher.collect(teacher.submit(seen)).tensors["hidden"]
    owner = Owner.remote()
    (reference,) = ray.get(owner.put.remote({"padding": bytes(2**20), **contents_of(contents)}))
    ray.kill(owner)
    wait_until(lambda: is_lost(reference), "the death of the bytes' owner", START_S)
    error = refused(name, ScoreRequest.of(seen, reference))
    assert isinstance(error, OwnerDiedError) and isinstance(error, LOST)
    first = seen.images[0][0].digest
    damaged = contents_of(contents | {first: contents[first][:-1]})
    assert isinstance(refused(name, ScoreRequest.of(seen, ray.put(damaged))), MessageError)
    noise = b"no picture"
    broken = replace(seen.images[0][0], digest=xxhash.xxh3_128_hexdigest(noise))
    contents[broken.digest] = noise
    with pytest.raises(DataError, match=r"memory:"):
        teacher.collect(teacher.submit(replace(seen, images=((broken,), *seen.images[1:]))))
    wait_until(lambda: replica_states(name) == {"RUNNING": 1}, "one replica that runs", START_S)
    assert torch.equal(teacher.collect(teacher.submit(seen)).tensors["hidden"], before)
