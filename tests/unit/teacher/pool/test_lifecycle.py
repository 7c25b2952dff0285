"""Starting a pool where its lease does not answer, without Ray."""

from types import SimpleNamespace
from typing import Any

import pytest

from taid_ray.config.models import TeacherConfig
from taid_ray.errors import TeacherError
from taid_ray.teacher.pool import lifecycle
from taid_ray.teacher.pool.deployment import PoolSpec
from taid_ray.teacher.pool.lifecycle import start_pool


def test_a_lease_that_cannot_start_is_named_after_the_pools_own_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by Ray's bare time-out after a minute, and nothing of the pool stays."""
    removed: list[str] = []
    said: list[str] = []
    now = [0.0]

    def wait(answers: list[Any], timeout: float) -> tuple[list[Any], list[Any]]:
        now[0] += timeout
        return [], answers

    silent = SimpleNamespace(remote=lambda *given: None)
    lease = SimpleNamespace(renew=silent, failure=silent)
    serve = SimpleNamespace(start=lambda **options: None, run_many=lambda *given, **options: None, RunTarget=dict)
    monkeypatch.setattr(lifecycle, "ray", SimpleNamespace(wait=wait))
    monkeypatch.setattr(lifecycle, "serve", serve)
    monkeypatch.setattr(lifecycle, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(lifecycle, "find_lease", lambda name: None)
    monkeypatch.setattr(lifecycle, "create_lease", lambda name, config, spec: lease)
    monkeypatch.setattr(lifecycle, "teacher_app", lambda *given: None)
    monkeypatch.setattr(lifecycle, "stop_pool", removed.append)
    serve.RunTarget = lambda app, name, route_prefix: None
    config = TeacherConfig(model="t", timeout_s=900)
    with pytest.raises(
        TeacherError, match=r"the lease of the teacher pool p, an actor, gave no answer .*teacher.timeout_s"
    ):
        start_pool(PoolSpec(config, 7, "cpu", use_role_resources=False), "p", on_wait=said.append)
    assert now[0] == pytest.approx(900, abs=2) and removed == ["p", "p"]
    assert len(said) > 1000, "the driver can show that it waits, and end the wait"
