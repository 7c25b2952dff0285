"""Clients of one real pool that share a cache: each sample is computed once, whatever becomes of the claims."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import ray
import torch

from taid_ray.cli.quickstart import BUNDLE
from taid_ray.config.schema import CacheConfig, TeacherConfig
from taid_ray.data.batch import Batch, collate
from taid_ray.data.packing import Sample, to_rows
from taid_ray.teacher.cache.cached import CachedTeacher
from taid_ray.teacher.cache.tiers import Cache
from taid_ray.teacher.local import LocalTeacher
from taid_ray.teacher.pool.client import PoolTeacher
from taid_ray.teacher.pool.lease import PoolClaims, find_lease
from taid_ray.teacher.pool.lifecycle import start_pool, stop_pool

POOL, SHARED, CPU = "test-cache", 512, torch.device("cpu")
CONFIG = TeacherConfig(model=str(BUNDLE / "stories260k"), timeout_s=120, cpus_per_shard=0.2)
SAMPLES = 96


@pytest.fixture(scope="module")
def pool(ray_cluster: str) -> Iterator[None]:
    start_pool(CONFIG, SHARED, "cpu", POOL, use_role_resources=True)
    yield
    stop_pool(POOL)


def batches(order: list[int], first: int) -> list[Batch]:
    """The same samples in any order, six to a batch."""
    draw = torch.Generator().manual_seed(first)
    made = []
    for _ in range(SAMPLES):
        ids = torch.randint(1, SHARED, (int(torch.randint(5, 40, (1,), generator=draw)),), generator=draw).tolist()
        made.append(Sample(ids, [False] + [True] * (len(ids) - 1)))
    ordered = [made[number] for number in order]
    return [collate(to_rows(ordered[i : i + 6], 128, pack=True)) for i in range(0, SAMPLES, 6)]


def answers(batches: list[Batch]) -> list[torch.Tensor]:
    local = LocalTeacher(CONFIG, SHARED, CPU)
    return [local.collect(batch).tensors["hidden"] for batch in batches]


def trial(batches: list[Batch], expected: list[torch.Tensor], directory: Path) -> tuple[int, int]:
    """Asks for all batches, three ahead; checks every answer; returns samples and tokens the teacher was asked for."""
    inner = PoolTeacher(POOL, CONFIG)
    teacher = CachedTeacher(inner, Cache(CacheConfig(directory=str(directory)), print), PoolClaims(POOL), CPU)
    try:
        requests = [teacher.submit(batch) for batch in batches[:3]]
        for number in range(len(batches)):
            found = teacher.collect(requests.pop(0)).tensors["hidden"]
            if number + 3 < len(batches):
                requests.append(teacher.submit(batches[number + 3]))
            torch.testing.assert_close(found, expected[number], rtol=1e-4, atol=1e-4)
        return teacher.samples_asked, teacher.tokens
    finally:
        teacher.close()


def orders() -> list[list[int]]:
    """Two trials alike, one the other way round, one that mixes them."""
    forward = list(range(SAMPLES))
    return [forward, forward, forward[::-1], [number * 37 % SAMPLES for number in forward]]


def work(seed: int) -> list[tuple[list[Batch], list[torch.Tensor]]]:
    return [(made, answers(made)) for made in (batches(order, seed) for order in orders())]


def test_concurrent_trials_ask_the_pool_once(pool: None, tmp_path: Path) -> None:
    trials = work(seed=1)
    with ThreadPoolExecutor() as threads:
        done = list(threads.map(lambda one: trial(*one, tmp_path / "cache"), trials))
    alone = sum(batch.inputs["input_ids"].numel() for batch in trials[0][0])
    assert sum(samples for samples, _ in done) == SAMPLES
    assert sum(tokens for _, tokens in done) <= 1.1 * alone
    assert trial(*trials[3], tmp_path / "cache") == (0, 0)  # a later run


def test_without_the_lease_trials_go_on(pool: None, tmp_path: Path) -> None:
    """It is killed several times, and restarted by Ray; what it forgets may be computed twice."""
    trials = work(seed=2)
    with ThreadPoolExecutor() as threads:
        running = [threads.submit(trial, *one, tmp_path / "cache") for one in trials]
        for _ in range(3):
            lease = find_lease(POOL)
            assert lease is not None
            ray.kill(lease, no_restart=False)
            time.sleep(1)
        assert SAMPLES <= sum(one.result(timeout=120)[0] for one in running) <= len(running) * SAMPLES
