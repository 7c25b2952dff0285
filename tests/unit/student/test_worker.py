"""A student worker's start, as far as it can be seen without a cluster."""

from types import SimpleNamespace
from typing import Any

import pytest

from taid_ray.distributed.world import World
from taid_ray.student import worker
from taid_ray.student.worker import run_worker
from tests.support.students import TIED, config_for


class Reached(Exception):
    """The worker has come as far as the test looks."""


@pytest.mark.parametrize(("rank", "local_rank", "probes"), [(0, 0, [0]), (3, 3, []), (8, 0, [8])])
def test_one_worker_of_a_node_tries_to_write_to_the_run_directory(
    monkeypatch: pytest.MonkeyPatch, rank: int, local_rank: int, probes: list[int]
) -> None:
    """A thousand files made and removed at once would be a burden for a shared file system."""

    class SchedulerClient:
        def __init__(self, *given: Any):
            raise_reached = Reached()
            self.begin = lambda size: (_ for _ in ()).throw(raise_reached)
            self.note = print

    class Elsewhere(World):
        def share(self, value: int) -> int:
            raise Reached

    tried: list[int] = []
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    monkeypatch.setattr(worker, "World", SimpleNamespace(current=lambda: Elsewhere(rank, 16)))
    monkeypatch.setattr(worker, "SchedulerClient", SchedulerClient)
    monkeypatch.setattr(worker, "check_run_dir_writable", lambda run_dir, rank: tried.append(rank))
    job: Any = SimpleNamespace(config=config_for(TIED), spec=None, device="cpu", scheduler=None)
    with pytest.raises(Reached):
        run_worker(job)
    assert tried == probes
