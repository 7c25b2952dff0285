"""Pools that change their number of replicas, by hand and by load, while requests are under way."""

import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from ray.util.state import list_actors

from taid_ray.config.schema import DistillConfig, build_config
from taid_ray.control import scale
from taid_ray.control.scale import scale_teacher
from taid_ray.data.batch import Batch, Row, collate
from taid_ray.driver.live import announce_cluster, liveness_file
from taid_ray.errors import ClusterError, TeacherError
from taid_ray.run.directory import locked, write_config
from taid_ray.run.layout import LIVE_FILE
from taid_ray.run.live import live_pool
from taid_ray.teacher.pool import autoscaling as scaling
from taid_ray.teacher.pool import lifecycle
from taid_ray.teacher.pool.client import PoolTeacher, replica_states
from taid_ray.teacher.pool.deployment import DEPLOYMENT, PoolSpec
from taid_ray.teacher.pool.lifecycle import PoolWatch, start_pool, stop_pool
from taid_ray.teacher.pool.messages import ScoreResponse
from tests.support.waiting import START_S, WAIT_S, wait_until

pytestmark = [pytest.mark.more, pytest.mark.timeout(900)]  # most of it for the start of replicas on a busy machine
VOCAB = 96
WINDOW = 8
BATCHES = 6
POOLS: dict[str, Any] = {"by-hand": 1, "by-load": {"min": 1, "max": 2}}


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, DistillConfig]:
    """A run for each pool, with a teacher of its own."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def run(name: str) -> DistillConfig:
        directory = tmp_path_factory.mktemp(name)
        torch.manual_seed(0)
        sizes = {"hidden_size": 64, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 4}
        LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, **sizes)).save_pretrained(directory / "teacher")
        teacher = {
            "model": str(directory / "teacher"),
            "cpus_per_shard": 0.2,
            "replicas": POOLS[name],
            "timeout_s": START_S,
        }
        tree = {"out": str(directory / "run"), "teacher": teacher, "student": {"model": "s", "cpus_per_worker": 0.2}}
        config = build_config(tree | {"data": {"train": "d"}, "train": {"steps": 1}})
        write_config(config)
        return config

    return {name: run(name) for name in POOLS}


@pytest.fixture(scope="module")
def pools(ray_cluster: str, configs: dict[str, DistillConfig]) -> Iterator[None]:
    """Both pools, started side by side, that judge their load within short times."""

    def start(name: str) -> None:
        start_pool(PoolSpec(configs[name].teacher, VOCAB, "cpu", use_role_resources=True), name)

    patch = pytest.MonkeyPatch()
    patch.setattr(scaling, "UP_S", 2.0)
    patch.setattr(scaling, "DOWN_S", 5.0)
    patch.setattr(lifecycle, "LEASE_S", START_S)  # the first answer comes when the lease's process has started
    with ThreadPoolExecutor() as threads:
        list(threads.map(start, POOLS))
    patch.undo()
    yield
    for name in POOLS:
        stop_pool(name)


class Worker:
    """A student worker that only asks: WINDOW requests are always under way, until it is told to stop."""

    def __init__(self, name: str, config: DistillConfig):
        self.teacher, self.notes = PoolTeacher(name, config.teacher, self._note), list[str]()
        self.batches = [batch(seed) for seed in range(BATCHES)]
        self.expected = [
            self.teacher.collect(self.teacher.submit(one)).tensors["hidden"].clone() for one in self.batches
        ]
        self.submitted = self.right = 0
        self.answered_by: deque[str] = deque(maxlen=2 * WINDOW)
        """The replicas whose answers came last."""
        self._accepted = self.teacher._accepted
        self.teacher._accepted = self._accept  # type: ignore[method-assign]
        self._news = threading.Condition()
        self._stop = threading.Event()
        self._thread: Future[None] = ThreadPoolExecutor(1).submit(self._ask)

    def until(self, condition: Callable[[], object], what: str) -> None:
        """Waits for something about the answers or the notes. Raises what went wrong meanwhile."""
        with self._news:
            met = self._news.wait_for(lambda: condition() or self._thread.done(), START_S)
        if self._thread.done():
            self._thread.result()
        assert met, f"not within {START_S:.0f} s: {what}"

    def until_more_answers(self, count: int) -> None:
        before = self.right
        self.until(lambda: self.right >= before + count, f"{count} more answers")

    def stop(self) -> None:
        """Raises what went wrong meanwhile."""
        self._stop.set()
        try:
            self._thread.result(timeout=START_S)
        finally:
            self.teacher.close()

    def lost(self) -> list[str]:
        """What was said of requests that had to be sent again (on a busy machine some may only be late)."""
        return [note for note in self.notes if "lost" in note]

    def _ask(self) -> None:
        try:
            window: deque[Any] = deque()
            while window or not self._stop.is_set():
                while len(window) < WINDOW and not self._stop.is_set():
                    window.append(self.teacher.submit(self.batches[self.submitted % BATCHES]))
                    self.submitted += 1
                found = self.teacher.collect(window.popleft()).tensors["hidden"]
                assert torch.equal(found, self.expected[self.right % BATCHES]), f"answer {self.right} is another one"
                with self._news:
                    self.right += 1
                    self._news.notify_all()
        finally:
            with self._news:
                self._news.notify_all()

    def _accept(self, answer: ScoreResponse, num_positions: int) -> Any:
        with self._news:
            self.answered_by.append(answer.replica)
            self._news.notify_all()
        return self._accepted(answer, num_positions)

    def _note(self, message: str) -> None:
        with self._news:
            self.notes.append(message)
            self._news.notify_all()


@contextmanager
def working(name: str, config: DistillConfig) -> Iterator[Worker]:
    """A worker that has stopped afterwards, and must have got an answer to everything."""
    worker = Worker(name, config)
    try:
        yield worker
    finally:
        worker.stop()
    assert worker.right == worker.submitted


def batch(seed: int) -> Batch:
    """A request of another size for every seed. A replica computes it for far longer than it takes to ask for.

    So the replicas have always something to do, and not the worker, however busy the machine is.
    """
    generator, length = torch.Generator().manual_seed(seed), 80 + 5 * seed
    ids = torch.randint(0, VOCAB, (16, length), generator=generator).tolist()
    return collate([Row(row, list(range(length)), [*row[1:], 0]) for row in ids])


def process_of(pool: str, replica: str) -> psutil.Process:
    """Of a replica that lives, on this cluster."""
    found = list_actors(
        filters=[("state", "=", "ALIVE"), ("name", "=", f"SERVE_REPLICA::{pool}#{DEPLOYMENT}#{replica}")],
        detail=True,
        timeout=int(WAIT_S),
    )
    assert len(found) == 1, f"replica {replica}: {found}"
    return psutil.Process(found[0].pid)


def kill_amid_requests(worker: Worker, pool: str) -> set[str]:
    """Kills replicas until a request was lost with one; returns which. It is the first but by rare chance."""
    killed: set[str] = set()
    while not worker.lost():
        victim = worker.answered_by[-1]
        process_of(pool, victim).kill()
        killed.add(victim)
        before = worker.right  # answers come in order: of what the victim had, all has been heard after WINDOW of them
        worker.until(
            lambda before=before: worker.lost() or worker.right > before + 3 * WINDOW,  # type: ignore[misc]
            "word of a lost request, or answers to all",
        )
    return killed


@contextmanager
def alive(run_dir: Path) -> Iterator[None]:
    """What a driver whose pool is `by-hand` leaves in its directory."""
    with locked(run_dir), liveness_file(run_dir):
        announce_cluster(run_dir, "by-hand")
        yield


def test_by_hand_under_load_no_answer_is_lost(pools: None, configs: dict[str, DistillConfig]) -> None:
    config, said = configs["by-hand"], list[str]()
    watch = PoolWatch("by-hand")
    assert watch.news() == []
    with working("by-hand", config) as worker, alive(config.run_dir):
        scale_teacher(config.run_dir, live_pool(config.run_dir), 3, said.append)
        assert worker.teacher.num_replicas() == 3
        assert watch.news() == ["teacher pool: 3 replica(s) run, 1 before"]
        worker.until_more_answers(5 * WINDOW)
        scale_teacher(config.run_dir, live_pool(config.run_dir), 1, said.append)
        worker.until_more_answers(5 * WINDOW)
    assert worker.submitted > 10 * WINDOW
    assert not worker.lost()
    assert "3 replica(s) run, after" in " ".join(said) and "1 replica(s) run, after" in said[-1]
    assert not (config.run_dir / LIVE_FILE).exists()


def test_by_hand_beyond_the_cluster_or_a_lost_model(
    ray_cluster: str, pools: None, configs: dict[str, DistillConfig]
) -> None:
    config = configs["by-hand"]
    with alive(config.run_dir):
        with pytest.raises(ClusterError, match=r"--teacher 30: .*room for 8 replica\(s\) of 1 shard\(s\) x 0.2 CPU"):
            scale_teacher(config.run_dir, live_pool(config.run_dir), 30, print)
        shutil.move(config.teacher.model, config.teacher.model + "-away")
        with pytest.raises(TeacherError, match=r"could not start, so the pool stays as it was: .*no such directory"):
            scale_teacher(config.run_dir, live_pool(config.run_dir), 2, print)
        shutil.move(config.teacher.model + "-away", config.teacher.model)
        wait_until(lambda: replica_states("by-hand") == {"RUNNING": 1}, "the pool as it was", START_S)


def test_by_hand_past_its_deadline(
    pools: None, configs: dict[str, DistillConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What others hold counts as there, so it is waited for."""
    config = configs["by-hand"]
    hurried = config.model_copy(
        update={"out": str(tmp_path), "teacher": config.teacher.model_copy(update={"timeout_s": 0.5})}
    )
    write_config(hurried)
    monkeypatch.setattr(scale, "POLL_S", 0.1)
    with (
        alive(tmp_path),
        pytest.raises(TeacherError, match=r"has 1 of 2 replicas after \d+ s"),
    ):
        scale_teacher(tmp_path, live_pool(tmp_path), 2, print)


def test_by_load_and_when_a_replica_is_killed(pools: None, configs: dict[str, DistillConfig]) -> None:
    def run(count: int) -> None:
        wait_until(lambda: replica_states("by-load") == {"RUNNING": count}, f"{count} replica(s)", START_S)

    with working("by-load", configs["by-load"]) as worker:
        run(2)
        worker.until(lambda: len(set(worker.answered_by)) == 2, "answers of both replicas")
        worker.until_more_answers(5 * WINDOW)
        assert not worker.lost()
        killed = kill_amid_requests(worker, "by-load")
        worker.until_more_answers(5 * WINDOW)
        worker.until(lambda: len(set(worker.answered_by) - killed) == 2, "answers of the successor")
        run(2)
        last = time.monotonic()
    run(1)
    assert time.monotonic() - last > 2.0  # not at the first idle moment
