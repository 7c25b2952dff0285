"""A worker's side of the scheduler actor, without Ray: when it tells the actor what it knows, and how long it waits."""

import math
import pickle
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from taid_ray.config.objective import ScheduleConfig
from taid_ray.errors import AttemptError
from taid_ray.scheduler import client as module
from taid_ray.scheduler import owner
from taid_ray.scheduler.aggregate import HEARTBEAT_S, LossAggregator, LossSums
from taid_ray.scheduler.client import SchedulerClient
from taid_ray.scheduler.owner import SchedulerOwner
from taid_ray.scheduler.schedule import TAIDSchedule
from tests.support.journal import Journal

RESULT = LossAggregator(TAIDSchedule(ScheduleConfig(), 9), "cross_entropy").result
SUMS = LossSums(1.0, 1.0, 0.0, 4, 0.0, 0, 0.0, 0)


class Actor:
    """What it is asked, in order; answers at once."""

    def __init__(self, pool: tuple[bool, Exception | None] = (True, None)):
        self.asked = Journal()
        self.heartbeat = self._method("heartbeat", None)
        self.report = self._method("report", pickle.dumps(RESULT))
        self.pool = self._method("pool", pool)

    def _method(self, name: str, answer: Any) -> Any:
        def remote(*given: Any) -> Any:
            self.asked.append(name)
            return answer

        return SimpleNamespace(remote=remote)


class Pauses(threading.Event):
    """An event that nobody sets; tells how often it was waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.journal = Journal()

    def wait(self, timeout: float | None = None) -> bool:
        self.journal.append(timeout)
        return super().wait(0.001)


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, which the test moves."""
    now = [1000.0]
    fake = SimpleNamespace(monotonic=lambda: now[0], sleep=lambda seconds: now.__setitem__(0, now[0] + seconds))
    monkeypatch.setattr(module, "time", fake)
    monkeypatch.setattr(module.ray, "get", lambda answer, timeout: answer)
    return now


@pytest.fixture
def joined(now: list[float]) -> Iterator[Any]:
    """Makes a client that has joined, with the actor it speaks to; its first heartbeat is over."""
    clients: list[SchedulerClient] = []

    def join(world_size: int) -> tuple[SchedulerClient, Actor, Pauses]:
        actor: Any = Actor()
        client = SchedulerClient(actor, 0, 60)
        client._closed = pauses = Pauses()
        clients.append(client)
        client.join(1, world_size, RESULT)
        actor.asked.wait_for("heartbeat")
        return client, actor, pauses

    yield join
    for client in clients:
        client.close()


def rounds(pauses: Pauses) -> None:
    """Returns after the heartbeat's thread has looked at the clock several times more."""
    pauses.journal.wait_length(len(pauses.journal) + 5)


@pytest.mark.parametrize(("world_size", "period"), [(2, HEARTBEAT_S), (1000, 20.0)])
def test_heartbeats_are_rarer_the_more_workers_there_are(
    joined: Any, now: list[float], world_size: int, period: float
) -> None:
    """The actor is one process: all workers together send at most 200 a second."""
    _, actor, pauses = joined(world_size)
    now[0] += 0.99 * period
    rounds(pauses)
    assert list(actor.asked) == ["heartbeat"]
    now[0] += 0.02 * period
    actor.asked.wait_length(2)
    rounds(pauses)
    assert list(actor.asked) == ["heartbeat"] * 2


def test_a_report_takes_the_place_of_a_heartbeat(joined: Any, now: list[float]) -> None:
    """It carries the same; so where steps are short, reports are all that the actor has to answer."""
    client, actor, pauses = joined(2)
    for step in range(1, 6):
        now[0] += 0.9 * HEARTBEAT_S
        client.submit(step, SUMS)
        client._pending = None
        rounds(pauses)
    assert list(actor.asked) == ["heartbeat"] + ["report"] * 5
    now[0] += HEARTBEAT_S  # silent again, in a collective for example
    actor.asked.wait_length(7)
    assert actor.asked[-1] == "heartbeat"


def test_a_driver_that_says_nothing_of_the_pool_is_not_waited_for_for_ever(
    now: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    actor: Any = Actor(pool=(False, None))

    def get(answer: Any, timeout: float) -> Any:
        now[0] += 10.0  # so long the actor itself waits for word
        return answer

    monkeypatch.setattr(module.ray, "get", get)
    with pytest.raises(AttemptError, match=r"has not said within 900 s whether the teacher pool is up"):
        SchedulerClient(actor, 0, 60).wait_for_pool(900)
    assert len(actor.asked) == 91
    SchedulerClient(Actor(), 0, 60).wait_for_pool(900)  # type: ignore[arg-type]


def test_the_actor_takes_what_all_workers_may_ask_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A report of everybody waits in it, while heartbeats and the driver's questions must get through."""
    given: dict[str, Any] = {}

    class Remote:
        def options(self, **options: Any) -> Any:
            given.update(options)
            return SimpleNamespace(remote=lambda *arguments: None)

    monkeypatch.setattr(owner.ray, "remote", lambda actor: Remote())
    for workers in (1, 512, 20_000):
        SchedulerOwner("x", ScheduleConfig(), 9, workers)
        assert given["max_concurrency"] > 3 * workers and math.isfinite(given["max_concurrency"])
