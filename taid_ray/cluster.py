"""The Ray cluster of a run: joined if there is one, else a local one that ends with the run; and whether the run fits."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray

from taid_ray.config import DistillConfig
from taid_ray.errors import ClusterError

STUDENT_RESOURCE, TEACHER_RESOURCE = "taid_student", "taid_teacher"


@contextmanager
def ray_cluster() -> Iterator[None]:
    """Joins the cluster this process is connected to, or that RAY_ADDRESS names; else starts one and stops it again."""
    if ray.is_initialized():
        yield
        return
    joins = bool(os.environ.get("RAY_ADDRESS"))
    cores = os.cpu_count() or 1
    if joins:
        ray.init(logging_level="ERROR", log_to_driver=False)
    else:
        # Both roles get a resource of their own, as nodes of a real cluster should (see cluster/README.md).
        roles = {STUDENT_RESOURCE: 1000, TEACHER_RESOURCE: 1000}
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        context = ray.init(address="local", num_cpus=cores, resources=roles, logging_level="ERROR", log_to_driver=False)
        # Ray's own helpers look for a cluster by this variable; a second cluster on this machine would confuse them.
        os.environ["RAY_ADDRESS"] = context.address_info["gcs_address"]
    try:
        yield
    finally:
        ray.shutdown()
        if not joins:
            os.environ.pop("RAY_ADDRESS", None)


@dataclass(frozen=True)
class Demand:
    """What one run asks for: per worker and per teacher shard."""

    device: str
    workers: int
    worker_cpus: float
    replicas: int
    shards: int
    shard_cpus: float
    student_role: bool
    """Whether some node offers the `taid_student` resource, so that workers must ask for it."""
    teacher_role: bool

    def worker_resources(self) -> dict[str, float]:
        return self._resources(self.worker_cpus, STUDENT_RESOURCE if self.student_role else None)

    def shard_resources(self) -> dict[str, float]:
        return self._resources(self.shard_cpus, TEACHER_RESOURCE if self.teacher_role else None)

    def _resources(self, cpus: float, role: str | None) -> dict[str, float]:
        resources = {"CPU": cpus}
        if self.device == "cuda":
            resources["GPU"] = 1
        return resources | ({role: 1} if role else {})


def cluster_has_gpus() -> bool:
    return ray.cluster_resources().get("GPU", 0) > 0


def demand_of(config: DistillConfig, device: str) -> Demand:
    """What `config` asks of the connected cluster."""
    offered = ray.cluster_resources()
    pooled = config.teacher.mode == "pool"
    return Demand(
        device=device,
        workers=config.student.workers,
        worker_cpus=config.student.cpus_per_worker,
        replicas=config.teacher.replicas if pooled else 0,
        shards=config.teacher.shards,
        shard_cpus=config.teacher.cpus_per_shard,
        student_role=offered.get(STUDENT_RESOURCE, 0) > 0,
        teacher_role=offered.get(TEACHER_RESOURCE, 0) > 0,
    )


def check_capacity(demand: Demand, nodes: list[dict[str, Any]] | None = None) -> None:
    """Raises ClusterError if the cluster's nodes, all free, could not hold the run; says what was asked and what exists.

    A replica's shards share a node. Placement is first-fit, teachers first, as at the start of a run.
    """
    alive = [dict(node["Resources"]) for node in (nodes if nodes is not None else ray.nodes()) if node["Alive"]]
    free = [dict(node) for node in alive]
    replica = {key: value * demand.shards for key, value in demand.shard_resources().items()}
    units = [(f"a teacher replica of {demand.shards} shard(s)", replica, "teacher.shards")] * demand.replicas
    units += [("a student worker", demand.worker_resources(), "student.workers")] * demand.workers
    for what, needs, key in units:
        node = next((n for n in free if all(n.get(k, 0) >= v for k, v in needs.items())), None)
        if node is None:
            raise ClusterError(
                f"the cluster cannot hold this run: asked for {demand.replicas} teacher replica(s) x {demand.shards} "
                f"shard(s) of {_shown(demand.shard_resources())} and {demand.workers} student worker(s) of "
                f"{_shown(demand.worker_resources())}; the nodes have {'; '.join(_shown(n) for n in alive)}, "
                f"and {what} ({_shown(needs)}) finds no place. Lower {key}, teacher.replicas or the CPUs of each "
                "(student.cpus_per_worker, teacher.cpus_per_shard), or add nodes."
            )
        for resource, amount in needs.items():
            node[resource] -= amount


def _shown(resources: dict[str, float]) -> str:
    kinds = [k for k in ("CPU", "GPU", STUDENT_RESOURCE, TEACHER_RESOURCE) if resources.get(k)]
    return " + ".join(f"{resources[kind]:g} {kind}" for kind in kinds) or "nothing"
