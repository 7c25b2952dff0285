"""The teacher pool's Serve application: what a pool is started with, and how Serve starts, watches and stops replicas."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import ceil
from typing import Any

import ray
from ray import serve
from ray.serve.schema import LoggingConfig

from taid_ray.config.models import TeacherConfig
from taid_ray.distributed.capacity import TEACHER_RESOURCE
from taid_ray.media.processor import MediaSettings
from taid_ray.names import NAMESPACE
from taid_ray.teacher.pool.autoscaling import serve_scaling
from taid_ray.teacher.pool.lease import lease_name
from taid_ray.teacher.pool.replica import TeacherReplica

DEPLOYMENT = "teacher"
DRAIN_S = 60.0
"""Seconds for a replica that is to go to finish what it has; what is lost then is asked of another one again."""
LEAST_QUEUE = 1000
"""Requests every replica takes, also for a client that keeps more under way than teacher.window says (filling a cache)."""
QUEUE_MARGIN = 2
"""Requests one replica takes, as a multiple of its even part: others may be gone, and late requests are sent twice."""
CALLER_GONE = {
    "RAY_grpc_client_keepalive_timeout_ms": "20000",
    "RAY_core_worker_rpc_server_reconnect_timeout_base_s": "5",
    "RAY_core_worker_rpc_server_reconnect_timeout_max_s": "5",
}
"""Settings of Ray by which a replica gives up a caller after 20 s without an acknowledgement, then looks every 5 s whether
the caller's node is dead.

Serve streams its answers, and at the end of such a stream Ray (2.60) holds up the whole replica until the caller has
confirmed it. A caller on a host that is cut off never does; Ray's own patience is over two minutes, of which Serve's
health checks grant a minute and a half.
"""


@dataclass(frozen=True)
class PoolSpec:
    """Settings of a pool at its start. Two pools of equal specs answer alike, so that one can be taken over for the other."""

    config: TeacherConfig
    num_shared: int
    """Ids that teacher and student share."""
    device_kind: str
    """cpu or cuda."""
    use_role_resources: bool
    """Whether shards ask for TEACHER_RESOURCE, which some node offers."""
    max_workers: int = field(default=1, compare=False)
    """The most student workers that ask the pool at the same time."""
    media: MediaSettings | None = None
    """How images are processed; None for a teacher that is shown none."""

    @property
    def queue_limit(self) -> int:
        """The most requests one replica takes at a time.

        Where a replica takes no more, the callers' routers try again after up to half a second, while the replica idles
        (100 requests of 7 ms took 11 s with a limit of 16). So it is never reached as long as half the replicas run.
        """
        requests = self.max_workers * self.config.window
        return max(LEAST_QUEUE, ceil(QUEUE_MARGIN * requests / self.config.replicas.min))


def teacher_app(spec: PoolSpec, app_name: str) -> serve.Application:
    """Returns the Serve application of a pool: replicas that are groups of config.shards processes."""
    config = spec.config
    gpus = 1 if spec.device_kind == "cuda" else 0
    role = {TEACHER_RESOURCE: 1} if spec.use_role_resources else {}
    bundle = {"CPU": config.cpus_per_shard} | ({"GPU": gpus} if gpus else {}) | role
    actor = {"num_cpus": config.cpus_per_shard, "num_gpus": gpus, "resources": role}
    environment = replica_environment(ray.get_runtime_context().runtime_env)
    deployment = serve.deployment(
        name=DEPLOYMENT,
        autoscaling_config=serve_scaling(config.replicas, lease_name(app_name), NAMESPACE),
        max_ongoing_requests=spec.queue_limit,  # one is computed at a time, the others wait at the replica
        ray_actor_options=actor | {"runtime_env": environment},
        placement_group_bundles=[bundle] * config.shards,
        placement_group_strategy="STRICT_PACK",
        health_check_period_s=5,
        health_check_timeout_s=30,
        graceful_shutdown_wait_loop_s=0.2,
        graceful_shutdown_timeout_s=DRAIN_S,
        # For processes that are killed while they load; Serve tries three times per replica at most. A model that cannot
        # be loaded ends the run before that, through the lease.
        max_constructor_retry_count=100,
        logging_config=LoggingConfig(log_level="WARNING", enable_access_log=False),
    )(TeacherReplica)
    return deployment.bind(config, spec.num_shared, spec.device_kind, app_name, actor, spec.media)


def replica_environment(job: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a replica's runtime environment: the driver's and CALLER_GONE.

    job: the driver's, which Serve gives only to a replica that has none of its own.
    """
    return {**job, "env_vars": {**job.get("env_vars", {}), **CALLER_GONE}}
