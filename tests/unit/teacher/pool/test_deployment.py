"""What Serve is told of the teacher's replicas."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from taid_ray.config.models import TeacherConfig
from taid_ray.teacher.pool import deployment as module
from taid_ray.teacher.pool.deployment import CALLER_GONE, LEAST_QUEUE, PoolSpec, replica_environment, teacher_app


def test_a_replica_has_the_job_s_environment_and_ours() -> None:
    job: dict[str, Any] = {"working_dir": "gcs://code.zip", "pip": ["numpy"], "env_vars": {"HF_HOME": "/models"}}
    found = replica_environment(job)
    assert found == job | {"env_vars": {"HF_HOME": "/models", **CALLER_GONE}}
    assert job["env_vars"] == {"HF_HOME": "/models"}
    assert replica_environment({}) == {"env_vars": CALLER_GONE}


def test_ray_still_knows_these_settings() -> None:
    """It ignores others without a word."""
    library = Path(ray._raylet.__file__).read_bytes()
    assert [name for name in CALLER_GONE if name.encode() not in library] == []


def spec(workers: int, **values: Any) -> PoolSpec:
    return PoolSpec(TeacherConfig(model="t", **values), 7, "cpu", use_role_resources=False, max_workers=workers)


def test_half_of_the_replicas_can_hold_all_requests_of_all_workers() -> None:
    """A full queue makes callers back off by up to half a second, while the replica idles."""
    assert spec(4000, window=8, replicas=4).queue_limit == 16_000
    assert spec(4000, window=8, replicas={"min": 2, "max": 64}).queue_limit == 32_000
    assert spec(1).queue_limit == LEAST_QUEUE


def test_serve_is_told_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[str, Any] = {}

    def deployment(**options: Any) -> Any:
        told.update(options)
        return lambda replica: SimpleNamespace(bind=lambda *given: None)

    monkeypatch.setattr(module.serve, "deployment", deployment)
    monkeypatch.setattr(module.ray, "get_runtime_context", lambda: SimpleNamespace(runtime_env={}))
    teacher_app(spec(1000, window=4, replicas=1), "pool")
    assert told["max_ongoing_requests"] == 8000


def test_more_workers_do_not_replace_a_pool_that_was_left_behind() -> None:
    assert spec(2) == spec(4) != spec(2, window=7)
