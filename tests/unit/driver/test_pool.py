"""The driver's care for the teacher pool: what fails beside it is said once, and it goes on."""

import threading
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayError

from taid_ray.config.schema import build_config
from taid_ray.driver import pool
from taid_ray.driver.pool import PoolKeeper
from taid_ray.media.processor import MediaSettings
from taid_ray.teacher.pool.deployment import PoolSpec
from tests.support.views import WITHIN_S, View

MEDIA = MediaSettings("pil")
SPEC: Any = SimpleNamespace(total_steps=40, vocabulary=SimpleNamespace(num_shared=7), media=MEDIA)
DEMAND: Any = SimpleNamespace(replicas=1, max_replicas=1, shards=1, device="cpu", teacher_role=False, max_workers=3)
CONFIG = build_config(
    {"teacher": {"model": "t"}, "student": {"model": "s"}, "data": {"train": "d"}, "train": {"steps": 40}}
)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "RETELL_S", 0.001)


def test_news_of_the_pool_may_fail_and_the_workers_are_told_of_the_pool_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A restarted scheduler actor must hear that the pool is up, or the workers of the next attempt would wait for ever."""

    class News:
        def __init__(self, name: str):
            pass

        def news(self) -> list[str]:
            raise failures.pop(0) if len(failures) > 1 else failures[0]

    failures: list[Exception] = [RayError("restarting"), ValueError("not to be read")]
    told, enough, started = [], threading.Event(), list[PoolSpec]()

    def tell(error: Exception | None) -> None:
        told.append(error)
        if len(told) >= 6:
            enough.set()

    info = SimpleNamespace(num_parameters=1, dtype="float32", dropped_mass=0.0)
    monkeypatch.setattr(pool, "PoolWatch", News)
    monkeypatch.setattr(pool, "start_pool", lambda spec, *given, **options: started.append(spec) or info)
    monkeypatch.setattr(pool, "stop_pool", lambda name: None)
    monkeypatch.setattr(pool, "keep_lease", lambda name: lambda: None)
    view: Any = View()
    with PoolKeeper(CONFIG, SPEC, DEMAND, "pool", tell, view):
        assert enough.wait(WITHIN_S)
    assert set(told) == {None}
    assert started[0].max_workers == DEMAND.max_workers, "for the queues of the replicas"
    assert started[0].media == MEDIA
    assert [line for line in view.said if "not to be read" in line] == [
        "watching the teacher pool failed (ValueError: not to be read); the run goes on, and it is tried again"
    ]
