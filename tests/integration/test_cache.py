"""Clients of one real pool that share a cache: each sample is computed once, whatever becomes of the claims."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
import ray
import torch
from ray.exceptions import RayActorError

from taid_ray.cli.quickstart import BUNDLE
from taid_ray.config.models import TeacherConfig
from taid_ray.config.training import CacheConfig
from taid_ray.data.batch import Batch, collate
from taid_ray.data.packing import Sample, to_rows
from taid_ray.teacher.cache.cached import CachedTeacher
from taid_ray.teacher.cache.store import CacheStore
from taid_ray.teacher.local import LocalTeacher
from taid_ray.teacher.pool import lease as pool_lease
from taid_ray.teacher.pool import lifecycle
from taid_ray.teacher.pool.client import PoolTeacher
from taid_ray.teacher.pool.deployment import PoolSpec
from taid_ray.teacher.pool.lease import PoolClaims, find_lease
from taid_ray.teacher.pool.lifecycle import start_pool, stop_pool
from tests.support.waiting import START_S, WAIT_S, wait_until

pytestmark = [pytest.mark.more, pytest.mark.timeout(900)]  # most of it for the start of the pool on a busy machine
POOL, SHARED, CPU = "test-cache", 512, torch.device("cpu")
CONFIG = TeacherConfig(model=str(BUNDLE / "stories260k"), timeout_s=START_S, cpus_per_shard=0.2)
SAMPLES = 96
EVERY, KILLS = 4, 3
"""Batches, of 16, after which the lease is killed again, and how often it is."""


@pytest.fixture(scope="module")
def pool(ray_cluster: str) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lifecycle, "LEASE_S", START_S)  # the first answer comes when the lease's process has started
        start_pool(PoolSpec(CONFIG, SHARED, "cpu", use_role_resources=True), POOL)
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
    return [local.collect(local.submit(batch)).tensors["hidden"] for batch in batches]


def trial(
    batches: list[Batch], expected: list[torch.Tensor], directory: Path, answered: Callable[[int], Any] = lambda _: None
) -> tuple[int, int]:
    """Asks for all batches, three ahead; checks every answer; returns samples and tokens the teacher was asked for.

    answered: called after each batch with their number so far.
    """
    inner = PoolTeacher(POOL, CONFIG)
    teacher = CachedTeacher(inner, CacheStore(CacheConfig(directory=str(directory)), print), PoolClaims(POOL), CPU)
    try:
        requests = [teacher.submit(batch) for batch in batches[:3]]
        for number in range(len(batches)):
            found = teacher.collect(requests.pop(0)).tensors["hidden"]
            if number + 3 < len(batches):
                requests.append(teacher.submit(batches[number + 3]))
            torch.testing.assert_close(found, expected[number], rtol=1e-4, atol=1e-4)
            answered(number + 1)
        return teacher.samples_asked, teacher.tokens
    finally:
        teacher.close()


def orders() -> list[list[int]]:
    """Two trials alike, one the other way round, one that mixes them."""
    forward = list(range(SAMPLES))
    return [forward, forward, forward[::-1], [number * 37 % SAMPLES for number in forward]]


def work(seed: int) -> list[tuple[list[Batch], list[torch.Tensor]]]:
    return [(made, answers(made)) for made in (batches(order, seed) for order in orders())]


def test_concurrent_trials_ask_the_pool_once(pool: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Where the lease does not answer in time, samples are computed twice, which is right, but not meant here.
    monkeypatch.setattr(pool_lease, "CLAIM_S", WAIT_S)
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
    all_wait = Barrier(len(trials) + 1)  # of the trials and of this thread

    def pause(answered: int) -> None:
        if answered % EVERY == 0 and answered <= EVERY * KILLS:
            all_wait.wait(START_S)

    def one(number: int) -> int:
        try:
            return trial(*trials[number], tmp_path / "cache", pause)[0]
        except BaseException:
            all_wait.abort()
            raise

    with ThreadPoolExecutor() as threads:
        running = [threads.submit(one, number) for number in range(len(trials))]
        try:
            for _ in range(KILLS):
                before = lease_process()
                assert before is not None
                all_wait.wait(START_S)  # then the trials go on, with requests under way
                lease = find_lease(POOL)
                assert lease is not None
                ray.kill(lease, no_restart=False)
                wait_until(lambda before=before: lease_process() not in (before, None), "another lease")  # type: ignore[misc]
        except BaseException:
            all_wait.abort()
            raise
        finally:
            asked = [each.result(timeout=START_S) for each in running]
        assert SAMPLES <= sum(asked) <= len(running) * SAMPLES


def lease_process() -> int | None:
    """None while it is being restarted."""
    lease = find_lease(POOL)
    with suppress(RayActorError):
        found: int = ray.get(lease.__ray_call__.remote(lambda _: os.getpid()), timeout=WAIT_S)  # type: ignore[union-attr]
        return found
    return None
