"""What Serve is told of the teacher's replicas."""

from pathlib import Path
from typing import Any

import ray

from taid_ray.teacher.pool.deployment import CALLER_GONE, replica_environment


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
