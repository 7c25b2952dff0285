"""The teacher pool, with real Serve replicas and tensor-parallel shards, against the same teacher in this process."""

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray
import torch
from ray import serve
from ray.serve.handle import DeploymentResponse

from taid_ray.config.models import TeacherConfig
from taid_ray.data.batch import NO_LABEL, Batch, Row, collate
from taid_ray.distributed.world import World
from taid_ray.errors import ModelError, TeacherError
from taid_ray.teacher.fingerprint import head_digest
from taid_ray.teacher.local import LocalTeacher
from taid_ray.teacher.pool import lifecycle, shared_head
from taid_ray.teacher.pool.client import PoolTeacher, replica_states
from taid_ray.teacher.pool.deployment import PoolSpec
from taid_ray.teacher.pool.lease import find_lease, keep_lease
from taid_ray.teacher.pool.lifecycle import start_pool, stop_pool
from taid_ray.teacher.pool.messages import AlreadyHereError, ScoreRequest, ScoreResponse
from taid_ray.teacher.protocol import TeacherInfo
from tests.support.processes import processes, replica_processes
from tests.support.waiting import START_S, wait_until

pytestmark = pytest.mark.timeout(900)  # most of it for the start of replicas on a busy machine

VOCAB, SHARED = 96, 90
IDLE_TIMEOUT_S = 30.0
"""Its clients renew the lease every 5 s, a little later on a busy machine."""
SECONDS_OF_WORK = 6.0
"""Of the processor's time."""
POOLS = {
    "replicas": {"replicas": 2, "payload": "topk", "topk": 8},
    "shards": {"shards": 2, "payload": "hidden", "idle_timeout_s": IDLE_TIMEOUT_S},
}


@pytest.fixture(scope="module")
def teacher_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    directory = tmp_path_factory.mktemp("teacher")
    LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, initializer_range=0.3, **sizes)).save_pretrained(directory)
    return directory


def config(directory: Path, **values: Any) -> TeacherConfig:
    return TeacherConfig(
        **{"model": str(directory), "max_tokens": 32, "timeout_s": START_S, "cpus_per_shard": 0.2, **values}
    )


def spec(directory: Path, **values: Any) -> PoolSpec:
    return PoolSpec(config(directory, **values), SHARED, "cpu", use_role_resources=True)


@pytest.fixture(scope="module", autouse=True)
def patience() -> Iterator[None]:
    """A lease answers first when its process has started."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lifecycle, "LEASE_S", START_S)
        yield


@pytest.fixture(scope="module")
def pools(ray_cluster: str, teacher_dir: Path, patience: None) -> Iterator[dict[str, TeacherInfo]]:
    """Both pools, started side by side."""

    def start(name: str) -> TeacherInfo:
        return start_pool(spec(teacher_dir, **POOLS[name]), name)

    with ThreadPoolExecutor() as threads:
        started = dict(zip(POOLS, threads.map(start, POOLS), strict=True))
    yield started
    for name in POOLS:
        stop_pool(name)


@pytest.fixture(scope="module", autouse=True)
def let_go(pools: dict[str, TeacherInfo]) -> Callable[[], None]:
    """The pools live on between the tests, however slow the machine is, until this is called."""
    stops = [keep_lease(name) for name in POOLS]

    def stop() -> None:
        for one in stops:
            one()

    return stop


@pytest.fixture
def connect(pools: dict[str, TeacherInfo], teacher_dir: Path) -> Iterator[Callable[[str], PoolTeacher]]:
    """Makes clients that are closed even if the test fails; an open one would keep its pool's lease."""
    clients: list[PoolTeacher] = []

    def client(name: str) -> PoolTeacher:
        clients.append(PoolTeacher(name, config(teacher_dir, **POOLS[name])))
        return clients[-1]

    yield client
    for opened in clients:
        opened.close()


def batches() -> list[Batch]:
    """Requests of different sizes; one packed row, one without loss positions."""
    generator = torch.Generator().manual_seed(1)

    def row(*lengths: int) -> Row:
        documents = [torch.randint(0, SHARED, (length,), generator=generator).tolist() for length in lengths]
        return Row(
            [token for document in documents for token in document],
            [position for document in documents for position in range(len(document))],
            [target for document in documents for target in (*document[1:], NO_LABEL)],
        )

    sizes = [[row(9), row(14), row(5)], [row(6, 11)], [], [row(20)], [row(3), row(30)]]
    return [collate(rows) for rows in sizes]


@pytest.mark.parametrize("name", POOLS)
def test_answers_equal_the_local_teacher(
    name: str, connect: Callable[[str], PoolTeacher], pools: dict[str, TeacherInfo], teacher_dir: Path
) -> None:
    values = {key: value for key, value in POOLS[name].items() if key in ("payload", "topk")}
    local = LocalTeacher(config(teacher_dir, mode="local", **values), SHARED, torch.device("cpu"))
    client = connect(name)
    requests = [client.submit(batch) for batch in batches()]  # all in flight at once
    for batch, request in zip(batches(), requests, strict=True):
        found, expected = client.collect(request), local.collect(local.submit(batch))
        assert found.kind == expected.kind and (found.compute_s > 0) == bool(batch.num_loss_tokens)
        torch.testing.assert_close(found.tensors, expected.tensors, atol=1e-5, rtol=1e-5)
    assert client.payload_error(batches()[0]) == pytest.approx(local.payload_error(batches()[0]), abs=1e-5)
    assert client.num_replicas() == POOLS[name].get("replicas", 1)
    assert client.tokens == local.tokens == sum(b.inputs["input_ids"].numel() for b in batches() if b.num_loss_tokens)
    head, expected_head = client.head(), local.head()
    assert torch.equal(head.weight, expected_head.weight) and head.transform == expected_head.transform
    assert client.info() == pools[name] and pools[name].packing_error is None


def test_replicas_are_the_same_teacher_and_an_impossible_request_is_explained(
    connect: Callable[[str], PoolTeacher], pools: dict[str, TeacherInfo], teacher_dir: Path
) -> None:
    lease = find_lease("replicas")
    assert lease is not None and ray.get(lease.probe_digests.remote()) == {pools["replicas"].probe_digest}
    local = LocalTeacher(config(teacher_dir, mode="local", payload="topk", topk=8), SHARED, torch.device("cpu"))
    assert pools["replicas"].fingerprint == local.info().fingerprint
    whole = LocalTeacher(config(teacher_dir, mode="local", payload="hidden"), SHARED, torch.device("cpu"))
    assert pools["shards"].fingerprint == whole.info().fingerprint, "so that a cache serves both"
    client = connect("replicas")
    ids = torch.full((1, 4), VOCAB)
    wrong = Batch(
        {"input_ids": ids, "position_ids": torch.arange(4)[None]}, torch.arange(3), ids[0, 1:], torch.zeros(3)
    )
    with pytest.raises(TeacherError, match=f"must lie in 0 to {VOCAB - 1}"):
        client.collect(client.submit(wrong))


@pytest.mark.parametrize("name", POOLS)
def test_damage_on_the_way_is_noticed_and_asked_for_again(
    name: str, connect: Callable[[str], PoolTeacher], monkeypatch: pytest.MonkeyPatch
) -> None:
    client, notes, batch = connect(name), list[str](), batches()[0]
    client._waiter._notify = notes.append
    expected = client.collect(client.submit(batch)).tensors
    accept = client._accepted

    def accept_damaged(answer: ScoreResponse, num_positions: int) -> Any:
        if not notes:
            tensor, (dtype, shape, data) = next(iter(answer.payload.items()))
            answer = answer._replace(payload=answer.payload | {tensor: (dtype, shape, flipped(data))})
        return accept(answer, num_positions)

    monkeypatch.setattr(client, "_accepted", accept_damaged)
    torch.testing.assert_close(client.collect(client.submit(batch)).tensors, expected, atol=0, rtol=0)
    assert len(notes) == 1 and "sent a damaged answer (" in notes[0]
    request = ScoreRequest.of(batch)
    dtype, shape, data = request.inputs["input_ids"]
    request.inputs["input_ids"] = (dtype, shape, flipped(data))
    monkeypatch.setattr(ScoreRequest, "of", lambda _: request)
    with pytest.raises(TeacherError, match=r"checksum .* \(at replica \w+\); the teacher pool was asked 3 times"):
        client.collect(client.submit(batch))
    assert len(notes) == 3 and all("received a damaged request (" in note for note in notes[1:])


def flipped(data: np.ndarray) -> np.ndarray:
    """A copy with one bit changed."""
    return np.concatenate([data[:1] ^ 1, data[1:]])


def test_a_frozen_replica_holds_nobody_up(
    pools: dict[str, TeacherInfo], connect: Callable[[str], PoolTeacher], teacher_dir: Path
) -> None:
    client, notes = connect("replicas"), list[str]()
    client._waiter._notify = notes.append
    asked = [batch for batch in batches() if batch.num_loss_tokens]
    expected = [client.collect(client.submit(batch)).tensors for batch in asked] * 2
    victim = replica_processes("replicas")[0]

    def usual_is_known() -> bool:
        for batch in asked:
            client.collect(client.submit(batch))
        return not math.isinf(client._latency.limit_s)

    def one_came_to_it() -> bool:
        """Everything is answered while it is frozen, also if the router has sent it something."""
        wait_until(usual_is_known, "answers of both replicas")
        victim.suspend()
        try:
            requests = [client.submit(batch) for batch in asked * 2]
            found = [client.collect(request).tensors for request in requests]
            assert victim.status() == psutil.STATUS_STOPPED
        finally:
            victim.resume()
        for got, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(got, wanted, atol=0, rtol=0)
        return any("asking another replica, too" in note for note in notes)

    wait_until(one_came_to_it, "a request to the frozen replica", START_S)
    assert not any("lost" in note or "damaged" in note for note in notes)


@pytest.mark.parametrize(("pool", "title"), [("replicas", "ServeReplica:replicas:teacher"), ("shards", "TeacherShard")])
def test_requests_of_a_process_that_is_killed_are_asked_again(
    pool: str, title: str, pools: dict[str, TeacherInfo], connect: Callable[[str], PoolTeacher]
) -> None:
    """A replica, or a shard of the only one, while it computes."""
    client, notes = connect(pool), list[str]()
    client._waiter._notify = notes.append
    rows = torch.arange(64 * 256).remainder(SHARED).view(64, 256)
    nothing = torch.zeros(rows.numel(), dtype=torch.int64)
    batch = Batch({"input_ids": rows}, torch.arange(rows.numel()), nothing, nothing)
    client.collect(client.submit(batch))
    began = seconds_computed(title)
    expected = client.collect(client.submit(batch)).tensors
    before = seconds_computed(title)
    one = max(0.01, sum(before.values()) - sum(began.values()))
    requests = [client.submit(batch) for _ in range(math.ceil(SECONDS_OF_WORK / one))]

    def amid_work() -> list[int]:
        found = seconds_computed(title)
        return [pid for pid in before if found.get(pid, 0.0) > before[pid] + SECONDS_OF_WORK / 12]

    # Not any one: the router avoids the replica that was frozen for a while.
    wait_until(amid_work, "a process that computes")
    psutil.Process(amid_work()[0]).kill()
    for request in requests:
        torch.testing.assert_close(client.collect(request).tensors, expected, atol=0, rtol=0)
    assert any("lost a request" in note for note in notes)
    wait_until(lambda: seconds_computed(title).keys() - before.keys(), "a successor", START_S)
    wait_until(lambda: client.num_replicas() == POOLS[pool].get("replicas", 1), "as many replicas as before", START_S)


def seconds_computed(title: str) -> dict[int, float]:
    """By the processes of that title since they live. Does not depend on how busy the machine is."""
    found = {}
    for process in processes(title):
        with suppress(psutil.Error):  # it has ended
            used = process.cpu_times()
            found[process.pid] = used.user + used.system
    return found


def test_a_replica_refuses_what_it_has_already(
    pools: dict[str, TeacherInfo], connect: Callable[[str], PoolTeacher]
) -> None:
    """Of two copies of a request that wait for a frozen shard, the later one; which one comes later is Serve's choice."""
    connect("shards")
    handle, rows = serve.get_app_handle("shards"), torch.zeros(4, 8, dtype=torch.int64)
    request = ScoreRequest.of(Batch({"input_ids": rows}, torch.arange(4), *torch.zeros(2, 4, dtype=torch.int64)))
    (shard,) = processes("TeacherShard")
    shard.suspend()
    try:
        copies = [handle.score.remote(request, "id") for _ in range(2)]
        wait_until(lambda: any(map(is_refused, copies)), "a refusal")
    finally:
        shard.resume()
    (answered,) = (copy for copy in copies if not is_refused(copy))
    assert answered.result(timeout_s=60).payload["hidden"][1] == (4, 32)


def is_refused(copy: DeploymentResponse[ScoreResponse]) -> bool:
    """Whether the replica said that it has this request already."""
    try:
        copy.result(timeout_s=0.05)
    except AlreadyHereError:
        return True
    except TimeoutError:
        pass
    return False


class Rank:
    """A student worker that reads the teacher's head with others. Runs as an actor."""

    def __init__(self, directory: Path, rank: int, size: int):
        meeting = f"file://{directory / 'meeting'}"
        torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=size)

    def read(self, config: TeacherConfig) -> tuple[str, int, list[str]]:
        """Returns the head's digest, how often this worker asked the replicas, and the objects it made, which exist."""
        client, objects, asked = PoolTeacher("shards", config, world=World.current()), list[str](), 0
        put, ask = ray.put, client._ask

        def put_and_note(value: Any) -> ray.ObjectRef:
            reference = put(value)
            assert is_stored(reference.hex())
            objects.append(reference.hex())
            return reference

        def count_and_ask(*given: Any) -> Any:
            nonlocal asked
            asked += len(given) > 1  # with what checks a piece; the others ask who the teacher is
            return ask(*given)

        shared_head.ray.put = put_and_note
        client._ask = count_and_ask  # type: ignore[method-assign]
        digest = head_digest(client.head())
        client.close()
        return digest, asked, objects


def is_stored(reference: str) -> bool:
    """Whether the object is in this node's object store."""
    core: Any = ray._private.worker.global_worker.core_worker
    return bool(core.object_exists(ray.ObjectRef(bytes.fromhex(reference))))


@pytest.mark.more
def test_the_head_is_read_once_handed_on_and_freed(
    pools: dict[str, TeacherInfo], teacher_dir: Path, tmp_path: Path
) -> None:
    ranks = [ray.remote(num_cpus=0)(Rank).remote(tmp_path, rank, 3) for rank in range(3)]
    own = config(teacher_dir, **POOLS["shards"])
    found = ray.get([rank.read.remote(own) for rank in ranks])
    assert [digest for digest, _, _ in found] == [pools["shards"].head_digest] * 3
    assert [asked for _, asked, _ in found] == [1, 0, 0]
    ((stored,), *others) = [objects for _, _, objects in found]
    assert others == [[], []]
    wait_until(lambda: not is_stored(stored), "the object store without the head, while its owner lives")
    for rank in ranks:
        ray.kill(rank)


def test_a_pool_that_was_left_behind_is_taken_over(pools: dict[str, TeacherInfo], teacher_dir: Path) -> None:
    before = {process.pid for process in replica_processes("replicas")}
    assert start_pool(spec(teacher_dir, **POOLS["replicas"]), "replicas") == pools["replicas"]
    assert {process.pid for process in replica_processes("replicas")} == before


def test_a_pool_without_clients_removes_itself(
    connect: Callable[[str], PoolTeacher], let_go: Callable[[], None]
) -> None:
    let_go()
    connect("shards").close()
    wait_until(
        lambda: "shards" not in serve.status().applications and find_lease("shards") is None, "the pool's end", START_S
    )
    with pytest.raises(TeacherError, match="no teacher pool shards"):
        connect("shards")


def test_a_model_that_cannot_be_loaded_is_reported_at_once(ray_cluster: str, teacher_dir: Path) -> None:
    """By its own error, and not by the one that ends the wait for a pool, or by Serve's after many tries."""
    with pytest.raises(ModelError, match=r"teacher\.model: no such directory \(found '/nowhere'\)"):
        start_pool(spec(Path("/nowhere"), replicas=2), "bad")
    assert "bad" not in serve.status().applications and find_lease("bad") is None


@pytest.mark.parametrize(
    ("title", "replicas", "shards", "after"),
    [
        pytest.param("TeacherShard.load", 1, 2, 0, id="shard that loads"),
        pytest.param("ServeReplica:young:teacher", 1, 2, 0, id="leader that loads", marks=pytest.mark.more),
        pytest.param(
            "ServeReplica:young:teacher",
            2,
            1,
            1,
            id="replica that is ready while the other one loads",
            marks=pytest.mark.more,
        ),
    ],
)
def test_a_process_that_is_killed_while_the_pool_starts_is_started_again(
    title: str, replicas: int, shards: int, after: int, ray_cluster: str, teacher_dir: Path
) -> None:
    """after: so many replicas are ready when it is killed."""
    with ThreadPoolExecutor() as threads:
        young = spec(teacher_dir, replicas=replicas, shards=shards, payload="hidden")
        started = threads.submit(start_pool, young, "young")

        def has_begun() -> bool:
            assert not started.done(), "the pool has started before anybody was killed"
            return len(processes(title)) > after

        try:
            wait_until(has_begun, f"{after + 1} process(es) {title}", START_S)
            *slow, victim = processes(title)
            for process in slow:
                process.suspend()
            try:
                wait_until(lambda: replica_states("young").get("RUNNING", 0) >= after, "a replica", START_S)
                victim.kill()
            finally:
                for process in slow:
                    process.resume()
            assert started.result(timeout=2 * START_S).fingerprint
            wait_until(lambda: len(processes("ServeReplica:young:teacher")) == replicas, "all replicas")
        finally:
            stop_pool("young")
