"""The notice that a node is about to go, without Ray: who asks for it, and until when."""

from types import SimpleNamespace
from typing import Any

import pytest

from taid_ray.distributed.world import World
from taid_ray.student import preemption
from taid_ray.student.preemption import watch_node
from tests.support.waiting import wait_until


class Elsewhere(World):
    """A world whose ranks run on the nodes a, b, a, c: four workers of one host, say, in three Ray nodes."""

    def gather(self, value: Any) -> Any:
        assert value == NODES[self.rank]
        return NODES


NODES = ["a", "b", "a", "c"]


@pytest.fixture
def draining(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The nodes that are about to go, which the test changes."""
    nodes: set[str] = set()
    monkeypatch.setattr(preemption, "draining_nodes", lambda: nodes)
    monkeypatch.setattr(preemption, "POLL_S", 0.001)
    return nodes


def on_rank(rank: int, monkeypatch: pytest.MonkeyPatch) -> Any:
    context = SimpleNamespace(get_node_id=lambda: NODES[rank])
    fake = SimpleNamespace(get_runtime_context=lambda: context, is_initialized=lambda: True)
    monkeypatch.setattr(preemption, "ray", fake)
    return watch_node(Elsewhere(rank, len(NODES)))


def test_the_first_worker_of_every_ray_node_asks(monkeypatch: pytest.MonkeyPatch, draining: set[str]) -> None:
    """Also where nodes share an address, by which Ray Train counts LOCAL_RANK."""
    watches = [on_rank(rank, monkeypatch) for rank in range(len(NODES))]
    assert [watch is not None for watch in watches] == [True, True, False, True]
    draining.add("b")
    wait_until(lambda: watches[1].draining, "the notice")
    assert not watches[0].draining and not watches[3].draining
    for watch in filter(None, watches):
        watch.close()
