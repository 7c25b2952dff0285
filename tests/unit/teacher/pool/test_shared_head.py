"""How the teacher's head reaches all workers of a run, without Ray: threads are the ranks, a dictionary the object store."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ray.exceptions import ObjectStoreFullError, OwnerDiedError

from taid_ray.errors import AttemptError, TeacherError
from taid_ray.losses.projection import LogitTransform
from taid_ray.models.head import Head
from taid_ray.teacher.fingerprint import head_digest
from taid_ray.teacher.pool import shared_head as module
from taid_ray.teacher.pool.lease import Lease
from taid_ray.teacher.pool.messages import HeadPiece
from taid_ray.teacher.pool.shared_head import shared_head
from taid_ray.teacher.protocol import TeacherInfo
from taid_ray.teacher.wire import pack

HEAD = Head(torch.randn(7, 4), torch.randn(7), LogitTransform(softcap=3.0))
INFO = TeacherInfo(
    fingerprint="f", probe_digest="p", head_digest=head_digest(HEAD), dtype="float32", hidden_size=4, num_parameters=1,
    vocab_rows=7, num_shared=7, payload="hidden", topk=1, bytes_per_token=1, transform=HEAD.transform, has_bias=True,
    dropped_mass=0.0, packing_error=None,
)  # fmt: skip


class Group:
    """The worlds of some ranks that are threads. A rank that fails ends the others' waiting, as Ray Train does."""

    def __init__(self, size: int):
        self.meeting, self.shared, self.size = threading.Barrier(size), 0, size

    def world(self, rank: int) -> Any:
        def share(value: int) -> int:
            self.shared = value if rank == 0 else self.shared
            self.meeting.wait(30)
            return self.shared

        return SimpleNamespace(
            rank=rank, size=self.size, is_main=rank == 0, share=share, barrier=lambda: self.meeting.wait(30)
        )


class Store:
    """Stands for Ray: objects by reference, and what is done instead of a read or a write."""

    def __init__(self) -> None:
        self.objects: dict[str, Any] = {}
        self.written = 0
        self.put_error: Exception | None = None
        self.get_error: Exception | None = None

    def put(self, value: Any) -> str:
        if self.put_error is not None:
            raise self.put_error
        self.written += 1
        self.objects[f"reference {self.written}"] = value
        return f"reference {self.written}"

    def get(self, reference: Any, timeout: float) -> Any:
        """The lease below answers with values; a string is a reference to an object."""
        if not isinstance(reference, str):
            return reference
        if self.get_error is not None:
            raise self.get_error
        return self.objects[reference]


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Store:
    found = Store()
    monkeypatch.setattr(module.ray, "put", found.put)
    monkeypatch.setattr(module.ray, "get", found.get)
    return found


@pytest.fixture
def lease(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The real one, called at once."""
    monkeypatch.setattr(Lease, "_watch", lambda self: None)
    own = Lease("pool", 60.0, SimpleNamespace())  # type: ignore[arg-type]
    names = ("offer_head", "offered_head", "withdraw_head")
    return SimpleNamespace(own=own, **{name: SimpleNamespace(remote=getattr(own, name)) for name in names})


def run(size: int, lease: Any, asked: list[int] | None = None) -> list[Head]:
    """What all ranks got; `asked` gets the rank of each that asked the replicas."""
    group = Group(size)

    def work(rank: int) -> Head:
        def pieces() -> Iterator[HeadPiece]:
            if asked is not None:
                asked.append(rank)
            for start in (0, 3, 6):
                part = slice(start, start + 3)
                assert HEAD.bias is not None
                yield HeadPiece("f", {"weight": pack(HEAD.weight[part]), "bias": pack(HEAD.bias[part])}, "")

        try:
            return shared_head(group.world(rank), lease, INFO, pieces, 10.0)
        except BaseException:
            group.meeting.abort()
            raise

    with ThreadPoolExecutor(size) as threads:
        futures = [threads.submit(work, rank) for rank in range(size)]
        errors = [error for future in futures if (error := future.exception()) is not None]
        errors = [error for error in errors if not isinstance(error, threading.BrokenBarrierError)]
        if errors:
            raise errors[0]
        return [future.result() for future in futures]


@pytest.mark.parametrize("size", [1, 2, 5])
def test_the_replicas_are_asked_once_and_every_worker_has_the_head(size: int, store: Store, lease: Any) -> None:
    asked: list[int] = []
    for head in run(size, lease, asked):
        assert torch.equal(head.weight, HEAD.weight) and head.bias is not None and HEAD.bias is not None
        assert torch.equal(head.bias, HEAD.bias) and head.transform == HEAD.transform
    assert asked == [0] and store.written == (3 if size > 1 else 0)
    assert not lease.own._heads, "nobody holds the references once all workers have read the head"


def test_two_runs_of_one_pool_do_not_mix(store: Store, lease: Any) -> None:
    """As trials of a search. Each offers under a number of its own."""
    offered: list[int] = []
    offer = lease.offer_head.remote
    lease.offer_head.remote = lambda number, pieces: (offered.append(number), offer(number, pieces))
    with ThreadPoolExecutor() as threads:
        for heads in threads.map(lambda _: run(3, lease), range(2)):
            assert all(torch.equal(head.weight, HEAD.weight) for head in heads)
    assert len(set(offered)) == 2 and not lease.own._heads


def test_a_piece_that_is_damaged_on_the_way_is_noticed(
    store: Store, lease: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = store.put

    def damaged(piece: HeadPiece) -> str:
        dtype, shape, data = piece.rows["weight"]
        return put(piece._replace(rows=piece.rows | {"weight": (dtype, shape, data ^ 1)}))

    monkeypatch.setattr(module.ray, "put", damaged)
    with pytest.raises(TeacherError, match="arrived damaged"):
        run(2, lease)


def test_a_head_that_is_too_large_for_the_object_store_is_an_error(store: Store, lease: Any) -> None:
    store.put_error = ObjectStoreFullError("full")
    with pytest.raises(TeacherError, match=r"does not fit into the object store .*--object-store-memory"):
        run(2, lease)


def test_losing_rank_0_or_the_lease_ends_the_attempt(store: Store, lease: Any) -> None:
    store.get_error = OwnerDiedError("0" * 56, None, "")
    with pytest.raises(AttemptError, match=r"could not be handed from rank 0 .*OwnerDiedError"):
        run(2, lease)
    store.get_error, lease.offered_head.remote = None, lambda number: None
    with pytest.raises(AttemptError, match="lease was restarted"):
        run(2, lease)
