"""How a replica treats requests with images. No Ray runs, and no model: only their order and their errors are looked at."""

import asyncio
import threading
from collections.abc import Callable, Coroutine, Generator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import xxhash
from ray.exceptions import OwnerDiedError

from taid_ray.config.models import TeacherConfig
from taid_ray.data.batch import NO_LABEL, Batch, Row, collate
from taid_ray.errors import DataError, MessageError
from taid_ray.media.joining import Picture
from taid_ray.media.refs import ImageRef
from taid_ray.teacher.pool import replica as module
from taid_ray.teacher.pool.messages import ScoreRequest, contents_of
from taid_ray.teacher.pool.replica import WITH_PIXELS, TeacherReplica
from taid_ray.teacher.pool.shard import TeacherShard

GONE = OwnerDiedError("ab", "", "")


class Stored:
    """Stands for a reference to an object in Ray's store."""

    def __init__(self, found: Any):
        self._found = found

    def __await__(self) -> Generator[Any, None, Any]:
        yield from asyncio.sleep(0).__await__()
        if isinstance(self._found, Exception):
            raise self._found
        return self._found


def asked(content: bytes, found: Any = None) -> ScoreRequest:
    """A request with one image, whose store holds it, or what is given instead."""
    image = ImageRef(xxhash.xxh3_128_hexdigest(content), 0, 1, 4, 3, "file:a.png")
    batch: Batch = collate([Row([5, 6], [0, 1], [6, NO_LABEL], images=(image,))])
    return ScoreRequest.of(batch, Stored(contents_of({image.digest: content}) if found is None else found))


class Model:
    """Stands for a TeacherModel: a picture holds the first byte of its image."""

    def __init__(self) -> None:
        self.lock, self.free = threading.Lock(), threading.Event()
        self.made = self.computed = self.most = 0
        self.shown: list[int] = []

    def pictures(self, images: Any, read: Callable[[ImageRef], bytes]) -> Any:
        content = read(images[0][0])
        if content == b"broken":
            raise DataError("the image file:a.png is truncated")
        with self.lock:
            self.made += 1
            self.most = max(self.most, self.made - self.computed)
            if self.made == WITH_PIXELS:
                self.free.set()
        return ((Picture(0, 1, {"pixel_values": torch.tensor([content[0]])}, 1),),)

    def check_request(self, *request: Any) -> None:
        pass

    def score(self, inputs: Any, positions: Any, labels: Any, pictures: Any = ()) -> dict[str, torch.Tensor]:
        assert self.free.wait(60)
        with self.lock:
            self.computed += 1
            self.shown += [int(picture.tensors["pixel_values"]) for row in pictures for picture in row]
        return {"hidden": torch.zeros(1, 2)}

    def seeing(self, inputs: Any, positions: Any, *shown: Any) -> list[int]:
        return [int(picture.tensors["pixel_values"]) for pictures in shown for row in pictures for picture in row]


class Loaded(TeacherReplica):
    async def _load(self, *args: Any) -> Any:
        return Model()


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Runs a play with a replica and its model."""
    named = SimpleNamespace(replica_id=SimpleNamespace(unique_id="replica-7"))
    monkeypatch.setattr(module.serve, "get_replica_context", lambda: named)
    monkeypatch.setattr(module, "find_lease", lambda _: None)
    monkeypatch.setattr(module.ray, "put", lambda value: value)

    def run(play: Callable[[Any, Model], Coroutine[Any, Any, Any]]) -> Any:
        async def whole() -> Any:
            replica: Any = object.__new__(Loaded)
            await replica.__init__(TeacherConfig(model="t"), 7, "cpu", "pool", {})
            return await asyncio.wait_for(play(replica, replica._model), 120)

        return asyncio.run(whole())

    return run


def test_images_are_processed_while_others_are_computed_and_few_are_held(played: Callable[..., Any]) -> None:
    async def play(replica: Any, model: Model) -> None:
        # The first computation waits until the images of as many requests are processed as may be at a time.
        await asyncio.gather(*[replica.score(asked(bytes([n, 1])), f"{n}") for n in range(2 * WITH_PIXELS)])
        assert sorted(model.shown) == list(range(2 * WITH_PIXELS)) and model.most == WITH_PIXELS

    played(play)


@pytest.mark.parametrize(
    ("request_", "error", "text"),
    [
        (lambda: asked(b"a", GONE), OwnerDiedError, "owner"),
        (lambda: asked(b"a", {}), MessageError, r"arrived damaged \(0 bytes\) \(at replica replica-7\)"),
        (lambda: asked(b"a")._replace(images=()), MessageError, r"checksum .* \(at replica replica-7\)"),
        (lambda: asked(b"broken"), DataError, r"a\.png is truncated"),
    ],
)
def test_a_request_whose_images_are_lost_or_bad_breaks_only_itself(
    request_: Callable[[], ScoreRequest], error: type[Exception], text: str, played: Callable[..., Any]
) -> None:
    async def play(replica: Any, model: Model) -> None:
        model.free.set()
        for _ in range(2 * WITH_PIXELS):
            with pytest.raises(error, match=text):
                await replica.score(request_(), "same")
        await replica.check_health()
        assert (await replica.score(asked(b"b"), "other")).replica == "replica-7" and model.shown == [ord("b")]

    played(play)


def test_what_is_seen_is_measured_with_both_sets_of_images(played: Callable[..., Any]) -> None:
    async def play(replica: Any, model: Model) -> None:
        assert await replica.seeing(asked(b"with"), asked(b"out")) == [ord("w"), ord("o")]

    played(play)


def test_other_shards_get_the_pixels_that_the_leader_made(played: Callable[..., Any]) -> None:
    async def play(replica: Any, model: Model) -> None:
        shard: Any = TeacherShard()
        shard._model = Model()
        shard._model.free.set()
        model.free.set()
        actor = SimpleNamespace(score=SimpleNamespace(remote=shard.score))
        replica._shards = [actor]
        await replica.score(asked(b"a"), "0")
        await replica.seeing(asked(b"b"), asked(b"c"))
        assert shard._model.shown == [ord("a"), ord("b"), ord("c")] and shard._model.made == 0

    played(play)
