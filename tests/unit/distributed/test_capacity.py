import os
import socket
from itertools import product
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ray._private.utils import validate_socket_filepath

from taid_ray.config.schema import DistillConfig, build_config
from taid_ray.distributed import cluster
from taid_ray.distributed.capacity import (
    Demand,
    capacity_note,
    check_capacity,
    check_scale,
    demand_of,
    most_replicas,
    workers_beside,
)
from taid_ray.errors import ClusterError


def demand(**changes: Any) -> Demand:
    values: dict[str, Any] = {
        "device": "cpu", "workers": 1, "worker_cpus": 1.0, "replicas": 1, "shards": 1, "shard_cpus": 1.0,
        "student_role": False, "teacher_role": False, "max_replicas": changes.get("replicas", 1),
        "max_workers": changes.get("workers", 1),
    }  # fmt: skip
    return Demand(**values | changes)


def node(alive: bool = True, **resources: float) -> dict[str, Any]:
    return {"Alive": alive, "Resources": resources | {"memory": 1e9, "node:10.0.0.1": 1.0}}


def refusal(asked: Demand, nodes: list[dict[str, Any]]) -> str:
    with pytest.raises(ClusterError) as caught:
        check_capacity(asked, nodes)
    return str(caught.value)


@pytest.mark.parametrize(
    "asked, nodes",
    [
        (demand(), [node(CPU=2)]),
        (demand(workers=4, replicas=2, shards=2), [node(CPU=4), node(CPU=4)]),
        (demand(replicas=0, workers=2), [node(CPU=2)]),
        (demand(device="cuda", workers=2, shards=2), [node(CPU=8, GPU=2), node(CPU=8, GPU=2)]),
        (
            demand(student_role=True, teacher_role=True),
            [node(CPU=1, taid_teacher=1), node(CPU=1, taid_student=1)],
        ),
        # ten times 0.1 is less than 1 in floating point
        (demand(replicas=0, workers=10, worker_cpus=0.1), [node(CPU=1)]),
        (demand(replicas=7, shard_cpus=0.1, workers=3, worker_cpus=0.1), [node(CPU=1)]),
        # only if the small teacher leaves the large node to the worker
        (demand(workers=1, worker_cpus=4), [node(CPU=4), node(CPU=1)]),
        (demand(workers=2, worker_cpus=4, replicas=2, shards=2, shard_cpus=1), [node(CPU=6), node(CPU=4), node(CPU=2)]),
    ],
)
def test_what_fits_is_accepted(asked: Demand, nodes: list[dict[str, Any]]) -> None:
    check_capacity(asked, nodes)


def test_too_many_workers() -> None:
    message = refusal(demand(workers=8, replicas=1), [node(CPU=2), node(CPU=2), node(CPU=1)])
    assert "1 teacher replica(s) x 1 shard(s) of 1 CPU and 8 student worker(s) of 1 CPU" in message  # asked
    assert "the nodes have 2 x (2 CPU), 1 x (1 CPU)" in message  # exists
    assert "only 4 of the workers" in message
    assert "Lower student.workers" in message
    assert "memory" not in message


def test_shards_of_a_replica_share_a_node() -> None:
    asked = demand(replicas=2, shards=3)
    message = refusal(asked, [node(CPU=4), node(CPU=2), node(CPU=2)])
    assert "2 teacher replica(s) x 3 shard(s) of 1 CPU" in message
    assert "only 1 of the replicas (3 CPU on one node each)" in message
    assert "Lower teacher.shards" in message
    check_capacity(asked, [node(CPU=4), node(CPU=3)])


def test_gpus_count_one_per_worker_and_shard() -> None:
    message = refusal(demand(device="cuda", workers=2, replicas=1, shards=2), [node(CPU=64, GPU=3)])
    assert "2 shard(s) of 1 CPU + 1 GPU" in message and "1 x (64 CPU + 3 GPU)" in message
    assert "student.workers" in message
    check_capacity(demand(workers=2, replicas=1, shards=2), [node(CPU=64)])


def test_roles_bind_to_their_nodes() -> None:
    nodes = [node(CPU=8, taid_teacher=1), node(CPU=8, taid_student=2)]
    asked = {"student_role": True, "teacher_role": True}
    check_capacity(demand(workers=2, **asked), nodes)
    assert "student.workers" in refusal(demand(workers=3, **asked), nodes)
    message = refusal(demand(replicas=2, **asked), nodes)
    assert "teacher.shards" in message and "1 CPU + 1 taid_teacher" in message


def test_dead_and_missing_nodes_hold_nothing() -> None:
    for nodes in ([node(alive=False, CPU=64)], [{"Alive": False}], []):
        assert "the nodes have nothing" in refusal(demand(), nodes)


def test_a_range_needs_room_for_its_smallest_number_only() -> None:
    asked = demand(workers=2, max_replicas=5, shards=2)
    nodes = [node(CPU=4), node(CPU=5)]
    check_capacity(asked, nodes)
    assert most_replicas(asked, 10**9, nodes) == 3
    note = capacity_note(asked, nodes)
    assert note and "teacher.replicas.max = 5, but the cluster has room for 3 beside 2 student worker(s)" in note
    assert "1 x (4 CPU), 1 x (5 CPU)" in note
    assert capacity_note(demand(workers=2, max_replicas=3, shards=2), nodes) is None
    assert capacity_note(demand(replicas=0), nodes) is None


def test_a_live_pool_grows_into_what_the_workers_leave() -> None:
    asked, nodes = demand(workers=1, worker_cpus=2.0), [node(CPU=4)]
    check_scale(asked, 2, nodes)
    with pytest.raises(ClusterError) as caught:
        check_scale(asked, 3, nodes)
    message = str(caught.value)
    assert "--teacher 3: the cluster has room for 2 replica(s) of 1 shard(s) x 1 CPU" in message
    assert "beside 1 student worker(s) of 2 CPU; the nodes have 1 x (4 CPU). Ask for fewer" in message
    with pytest.raises(ClusterError, match="room for 0 replica"):
        check_scale(asked, 1, [])


def brute_force(nodes: list[int], replica: int, worker: int, replicas: int) -> int:
    """Most workers beside exactly `replicas` replicas, from all ways to spread them; -1 if there is none."""
    best = -1
    for counts in product(range(replicas + 1), repeat=len(nodes)):
        left = [cpus - count * replica for cpus, count in zip(nodes, counts, strict=True)]
        if sum(counts) == replicas and min(left, default=0) >= 0:
            best = max(best, sum(free // worker for free in left))
    return best


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 9), max_size=4), st.integers(1, 5), st.integers(1, 5), st.integers(0, 4))
def test_placement_is_exact(nodes: list[int], replica: int, worker: int, replicas: int) -> None:
    found = workers_beside([{"CPU": float(n)} for n in nodes], {"CPU": replica}, {"CPU": worker}, replicas)
    assert found == [brute_force(nodes, replica, worker, count) for count in range(replicas + 1)]


def config(**teacher: Any) -> DistillConfig:
    return build_config(
        {
            "teacher": {"model": "t", "cpus_per_shard": 2} | teacher,
            "student": {"model": "s", "workers": 3, "cpus_per_worker": 1.5},
            "data": {"train": "d"},
            "train": {"steps": 1, "batch_size": 8},
        }
    )


def test_demand_asks_for_roles_only_where_they_are_offered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster.ray, "cluster_resources", lambda: {"CPU": 8.0, "taid_student": 4.0})
    found = demand_of(config(replicas=2, shards=2), "cpu")
    assert (found.workers, found.replicas, found.shards) == (3, 2, 2)
    assert found.worker_resources() == {"CPU": 1.5, "taid_student": 1}
    assert found.shard_resources() == {"CPU": 2}
    assert found.max_replicas == 2
    ranged = demand_of(config(replicas={"min": 1, "max": 3}), "cpu")
    assert (ranged.replicas, ranged.max_replicas) == (1, 3)
    gpu = demand_of(config(), "cuda")
    assert gpu.worker_resources() == {"CPU": 1.5, "GPU": 1, "taid_student": 1}
    assert gpu.shard_resources() == {"CPU": 2, "GPU": 1}


def test_a_local_teacher_asks_for_no_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster.ray, "cluster_resources", lambda: {"CPU": 8.0})
    found = demand_of(config(mode="local"), "cpu")
    assert found.replicas == found.max_replicas == 0
    check_capacity(found, [node(CPU=4.5)])
    refusal(found, [node(CPU=4.4)])


def test_a_dead_address_is_refused_within_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"  # bound and not listening
        monkeypatch.setenv("RAY_ADDRESS", address)
        monkeypatch.setattr(cluster.ray, "is_initialized", lambda: False)
        timeouts: list[float] = []
        connect = socket.create_connection

        def knock(address: tuple[str, int], timeout: float) -> socket.socket:
            timeouts.append(timeout)
            return connect(address, timeout)

        monkeypatch.setattr(cluster.socket, "create_connection", knock)
        monkeypatch.setattr(cluster.ray, "init", lambda **_: pytest.fail("Ray itself would try for minutes"))
        with pytest.raises(ClusterError, match=f"RAY_ADDRESS = {address}.*unset it"), cluster.ray_cluster():
            pass
    assert timeouts == [cluster.CONNECT_TIMEOUT_S] and cluster.CONNECT_TIMEOUT_S <= 5
    assert os.environ["RAY_ADDRESS"] == address


def test_a_temporary_directory_too_long_for_rays_sockets_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(**_: Any) -> None:
        validate_socket_filepath("/tmp/" + "deep/" * 20 + "ray/session/sockets/plasma_store")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(cluster.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(cluster.ray, "init", start)
    with pytest.raises(ClusterError, match=r"107 bytes: /tmp/deep/.*set RAY_TMPDIR"), cluster.ray_cluster():
        pass


def test_an_address_that_ray_cannot_find_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing_runs(**_: Any) -> None:
        raise ConnectionError("Could not find any running Ray instance.")

    monkeypatch.setattr(cluster.ray, "init", nothing_runs)
    with pytest.raises(ClusterError, match=r"RAY_ADDRESS = auto: .*Could not find"):
        cluster.join_cluster("auto")
