"""A student worker's start, as far as it can be seen without a cluster."""

from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import pytest

from taid_ray.distributed.world import World
from taid_ray.errors import ModelError
from taid_ray.student import context, open_teacher
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
            self.note = print

        def close(self) -> None:
            closed.append("scheduler")

        def begin(self, attempt: int, world_size: int) -> None:
            raise Reached

    class Elsewhere(World):
        def barrier(self) -> None:
            raise Reached

    tried: list[int] = []
    closed: list[str] = []
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    monkeypatch.setattr(context, "World", SimpleNamespace(current=lambda: Elsewhere(rank, 16)))
    monkeypatch.setattr(context, "SchedulerClient", SchedulerClient)
    monkeypatch.setattr(context, "check_run_dir_writable", lambda run_dir, rank: tried.append(rank))
    spec: Any = SimpleNamespace(config=config_for(TIED), spec=None, device="cpu", scheduler=None, attempt=1)
    with pytest.raises(Reached):
        run_worker(spec)
    assert tried == probes and closed == ["scheduler"]


def test_a_teacher_that_is_refused_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pool's client has a thread, and keeps the pool's lease alive for as long as it is open."""

    class Teacher:
        closed = False

        def info(self) -> Any:
            raise ModelError("teacher.model: no packed rows")

        def close(self) -> None:
            self.closed = True

    teacher, spec = Teacher(), SimpleNamespace(config=config_for(TIED))
    monkeypatch.setattr(open_teacher, "connect_teacher", lambda context: teacher)
    place: Any = SimpleNamespace(config=spec.config, note=print)
    with pytest.raises(ModelError), ExitStack() as closing:
        open_teacher.open_teacher(place, SimpleNamespace(), closing)  # type: ignore[arg-type]
    assert teacher.closed
