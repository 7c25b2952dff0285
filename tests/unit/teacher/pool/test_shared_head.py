"""The head is asked of the pool once, and checked by everybody who gets it; without Ray."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from taid_ray.errors import TeacherError
from taid_ray.losses.projection import LogitTransform
from taid_ray.models.loading import Head
from taid_ray.teacher.model import head_digest
from taid_ray.teacher.pool import shared_head as module
from taid_ray.teacher.pool.shared_head import shared_head

BIAS = torch.arange(6.0).bfloat16()


class Store:
    """An object store and a group of workers that come to `broadcast` one after another, rank 0 first."""

    def __init__(self) -> None:
        self.objects: list[Any] = []
        self.shared: Any = None
        self.barriers = 0

    def put(self, value: Any) -> int:
        self.objects.append(value)
        return len(self.objects) - 1

    def get(self, reference: int) -> Any:
        return self.objects[reference]

    def broadcast(self, data: Any) -> Any:
        if data != [None]:
            self.shared = data
        return self.shared

    def barrier(self) -> None:
        self.barriers += 1


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Store:
    store = Store()
    monkeypatch.setattr(module, "ray", SimpleNamespace(put=store.put, get=store.get))
    monkeypatch.setattr(module, "broadcast_from_rank_zero", store.broadcast)
    monkeypatch.setattr(module, "barrier", store.barrier)
    return store


def teacher_of(head: Head, asked: list[str]) -> Any:
    info = SimpleNamespace(transform=head.transform, head_digest=head_digest(head))
    return SimpleNamespace(head=lambda: asked.append("head") or head, info=lambda: info)


@pytest.mark.parametrize("bias", [None, BIAS])
def test_all_workers_have_the_bits_that_rank_0_asked_for(store: Store, bias: torch.Tensor | None) -> None:
    asked: list[str] = []
    head = Head(torch.randn(6, 4).bfloat16(), bias, LogitTransform(2.0, 30.0))
    teacher = teacher_of(head, asked)
    heads = [shared_head(teacher, rank) for rank in range(3)]
    assert asked == ["head"] and store.barriers == 3
    for found in heads:
        assert torch.equal(found.weight, head.weight) and found.transform == head.transform
        assert found.bias is None if bias is None else torch.equal(found.bias, bias)
    assert heads[1].weight.data_ptr() != heads[2].weight.data_ptr(), "a view would keep the object store's room"


def test_a_head_that_is_not_the_pools_is_refused(store: Store) -> None:
    head = Head(torch.randn(6, 4), None, LogitTransform())
    teacher = teacher_of(head, [])
    shared_head(teacher, 0)
    other = teacher_of(Head(head.weight + 1, None, head.transform), [])
    with pytest.raises(TeacherError, match="not that of the teacher pool"):
        shared_head(other, 1)
