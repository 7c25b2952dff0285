"""Checks that a run fits the Ray cluster: what it demands, what the nodes have, and what is free now."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import ray

from taid_ray.config.models import TeacherConfig
from taid_ray.config.schema import DistillConfig
from taid_ray.distributed.ray_internals import draining_nodes, free_resources
from taid_ray.errors import ClusterError

STUDENT_RESOURCE, TEACHER_RESOURCE = "taid_student", "taid_teacher"


@dataclass(frozen=True)
class Demand:
    """Resources that one run asks for: per worker and per teacher shard."""

    device: str
    workers: int
    """Smallest number of workers; the run cannot go on with fewer."""
    max_workers: int
    worker_cpus: float
    replicas: int
    """Number of replicas that the run starts with, and always has."""
    max_replicas: int
    shards: int
    shard_cpus: float
    student_role: bool
    """Whether some node offers the `taid_student` resource, so that workers must ask for it."""
    teacher_role: bool

    def worker_resources(self) -> dict[str, float]:
        """Resources of one student worker."""
        return self._resources(self.worker_cpus, STUDENT_RESOURCE if self.student_role else None)

    def shard_resources(self) -> dict[str, float]:
        """Resources of one teacher shard."""
        return self._resources(self.shard_cpus, TEACHER_RESOURCE if self.teacher_role else None)

    def replica_resources(self) -> dict[str, float]:
        """Resources of one replica: of all its shards, which share a node."""
        return {key: value * self.shards for key, value in self.shard_resources().items()}

    def _resources(self, cpus: float, role: str | None) -> dict[str, float]:
        resources = {"CPU": cpus}
        if self.device == "cuda":
            resources["GPU"] = 1
        return resources | ({role: 1} if role else {})


def demand_of(config: DistillConfig, device: str) -> Demand:
    """Works out what `config` asks of the connected cluster, on `device` (cpu or cuda)."""
    offered = ray.cluster_resources()
    pool = config.given_teacher if config.has_pool else None
    return Demand(
        device=device,
        workers=config.student.workers.min,
        max_workers=config.student.workers.max,
        worker_cpus=config.student.cpus_per_worker,
        replicas=pool.replicas.min if pool else 0,
        max_replicas=pool.replicas.max if pool else 0,
        shards=pool.shards if pool else 1,
        shard_cpus=pool.cpus_per_shard if pool else 1.0,
        student_role=offered.get(STUDENT_RESOURCE, 0) > 0,
        teacher_role=offered.get(TEACHER_RESOURCE, 0) > 0,
    )


def check_capacity(demand: Demand, nodes: list[dict[str, Any]] | None = None) -> None:
    """Raises ClusterError if the cluster's nodes, all free, could not hold the run; says what was asked and what exists.

    A replica's shards share a node.
    """
    alive = _alive(nodes)
    if demand.max_workers > demand.workers and not demand.student_role:
        raise ClusterError(
            f"student.workers: {{min: {demand.workers}, max: {demand.max_workers}}} needs nodes that offer the resource "
            f"{STUDENT_RESOURCE}, so that workers and teacher do not take each other's room; start the students' nodes with "
            f"`ray start --resources='{{\"{STUDENT_RESOURCE}\": 8}}'` (8: workers per node), or give a fixed number"
        )
    replica = demand.replica_resources()
    room = workers_beside(alive, replica, demand.worker_resources(), demand.replicas)
    if room[-1] >= demand.workers:
        return
    if room[-1] < 0:
        most = max(count for count, workers in enumerate(room) if workers >= 0)
        key, found = "teacher.shards", f"only {most} of the replicas ({_shown(replica)} on one node each) find a place"
    else:
        key, found = "student.workers", f"only {room[-1]} of the workers find a place beside the teacher"
    raise ClusterError(
        f"the cluster cannot hold this run: asked for {demand.replicas} teacher replica(s) x {demand.shards} shard(s) of "
        f"{_shown(demand.shard_resources())} and {demand.workers} student worker(s) of "
        f"{_shown(demand.worker_resources())}; the nodes have {_existing(alive)}, and {found}. "
        f"Lower {key}, teacher.replicas or the CPUs of each (student.cpus_per_worker, teacher.cpus_per_shard), or add nodes."
    )


def capacity_note(demand: Demand, nodes: list[dict[str, Any]] | None = None) -> str | None:
    """Makes a note to the user if the pool cannot grow to its largest number of replicas on these nodes."""
    most = most_replicas(demand, demand.max_replicas, nodes)
    if most >= demand.max_replicas:
        return None
    return (
        f"teacher.replicas.max = {demand.max_replicas}, but the cluster has room for {most} beside "
        f"{demand.workers} student worker(s), unless it grows; the nodes have {_existing(_alive(nodes))}"
    )


def workers_now(demand: Demand) -> int:
    """The largest number of workers that the living nodes, without those about to leave, hold beside the replicas they can."""
    leaving = draining_nodes()
    alive = _alive([node for node in ray.nodes() if node["NodeID"] not in leaving])
    room = workers_beside(alive, demand.replica_resources(), demand.worker_resources(), demand.replicas)
    return next(workers for workers in reversed(room) if workers >= 0)


def free_room(demand: Demand) -> int:
    """The number of further workers that find a place now, beside everything else that is on the cluster."""
    leaving = draining_nodes()
    free = [node for name, node in free_resources().items() if name not in leaving]
    return workers_beside(free, demand.replica_resources(), demand.worker_resources(), 0)[0]


def room_for_trials(demand: Demand, own_teachers: bool) -> int:
    """The number of runs like this one that the cluster has room for now, beside everything else that is on it.

    own_teachers: every run has replicas of its own; else they share a pool that is up already.
    """
    free = list(free_resources().values())
    replicas = demand.replicas if own_teachers else 0
    count = 0
    while True:
        more = count + 1
        room = workers_beside(free, demand.replica_resources(), demand.worker_resources(), more * replicas)
        if room[-1] < more * demand.workers:
            return count
        count = more


def check_scale(demand: Demand, replicas: int, nodes: list[dict[str, Any]] | None = None) -> None:
    """Raises ClusterError if the cluster's nodes could not hold so many replicas beside the run's workers."""
    most = most_replicas(demand, replicas, nodes)
    if most < replicas:
        raise ClusterError(
            f"--teacher {replicas}: the cluster has room for {most} replica(s) of {demand.shards} shard(s) x "
            f"{_shown(demand.shard_resources())} beside {demand.workers} student worker(s) of "
            f"{_shown(demand.worker_resources())}; the nodes have {_existing(_alive(nodes))}. Ask for fewer, or add nodes."
        )


def most_replicas(demand: Demand, limit: int, nodes: list[dict[str, Any]] | None = None) -> int:
    """The largest number of replicas, up to `limit`, that fit beside the run's workers on the cluster's nodes, all free."""
    alive, replica = _alive(nodes), demand.replica_resources()
    limit = min(limit, sum(_times(replica, node) for node in alive))
    room = workers_beside(alive, replica, demand.worker_resources(), limit)
    return max((count for count, workers in enumerate(room) if workers >= demand.workers), default=0)


def check_object_store(
    payload_bytes: int,
    teacher: TeacherConfig,
    workers: int,
    nodes: list[dict[str, Any]] | None = None,
    image_bytes: int = 0,
) -> None:
    """Raises ClusterError if requests in flight and the teacher's answers would fill more than half of the object stores.

    payload_bytes: largest size of one answer. image_bytes: of one request's images. All is taken to be spread evenly over
    the nodes, so that what is refused here could not have worked.
    """
    room = sum(node.get("object_store_memory", 0) for node in _alive(nodes)) / 2
    needed = (teacher.in_flight_bytes(payload_bytes) + teacher.window * image_bytes) * workers
    if needed > room:
        images = f"and images of up to {image_bytes / 2**20:.0f} MiB for each of them, " if image_bytes else ""
        raise ClusterError(
            f"teacher.window: {teacher.window} answers of up to {payload_bytes / 2**20:.0f} MiB, in all at most "
            f"teacher.window_mib: {teacher.window_mib}, {images}for each of {workers} student worker(s) need "
            f"{needed / 2**20:.0f} MiB, more than half of the cluster's object store ({room / 2**20:.0f} MiB). Lower "
            "teacher.window, teacher.window_mib or train.micro_batch_size, choose a smaller teacher.payload, or start Ray "
            "with more --object-store-memory."
        )


def workers_beside(
    nodes: list[dict[str, float]], replica: dict[str, float], worker: dict[str, float], replicas: int
) -> list[int]:
    """Returns a list whose entry r, from 0 to `replicas`, is the most workers that fit beside r replicas.

    It is -1 where not even those replicas fit.

    Exact for any mixture of nodes: tries every number of replicas on each node.
    """
    best = [0] + [-1] * replicas
    for node in nodes:
        most = min(_times(replica, node), replicas)
        left = [{key: node.get(key, 0) - count * replica.get(key, 0) for key in worker} for count in range(most + 1)]
        here = [_times(worker, free) for free in left]
        best = [
            max((best[r - k] + here[k] for k in range(min(r, most) + 1) if best[r - k] >= 0), default=-1)
            for r in range(replicas + 1)
        ]
    return best


def _alive(nodes: list[dict[str, Any]] | None) -> list[dict[str, float]]:
    """Resources that each living node has in all; by default of the connected cluster."""
    return [node["Resources"] for node in (nodes if nodes is not None else ray.nodes()) if node["Alive"]]


def _times(needs: dict[str, float], free: dict[str, float]) -> int:
    """The number of times `needs` fits into `free`. Ray counts in units of 1e-4, so rounding errors must not decide."""
    return min(int((free.get(key, 0) + 1e-6) / amount) for key, amount in needs.items())


def _shown(resources: dict[str, float]) -> str:
    kinds = [k for k in ("CPU", "GPU", STUDENT_RESOURCE, TEACHER_RESOURCE) if resources.get(k)]
    return " + ".join(f"{resources[kind]:g} {kind}" for kind in kinds) or "nothing"


def _existing(nodes: list[dict[str, float]]) -> str:
    kinds = [f"{count} x ({shown})" for shown, count in Counter(map(_shown, nodes)).items()]
    return ", ".join(kinds) or "nothing"
