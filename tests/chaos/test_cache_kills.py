"""The cache while processes that use it are killed, and files in it damaged: never a wrong output, never too many bytes."""

import multiprocessing
import os
import random
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch

from taid_ray.config.schema import CacheConfig
from taid_ray.teacher.cache import store as cache_store
from taid_ray.teacher.cache import tiers as cache
from taid_ray.teacher.cache.store import SUFFIX, Store
from taid_ray.teacher.cache.tiers import Cache

PROCESSES, KEYS = 8, 3000
SECONDS = 15.0
LIMIT = 10 * 2**20
"""Every other of the samples, of 4 or 8 KiB on the disk, finds room. A writer counts again after 16 KiB."""
ABANDONED_S = 2.0


def key_of(number: int) -> str:
    return f"{number * 7919 % 256:02x}{number:062x}"


def value(number: int) -> dict[str, torch.Tensor]:
    """What belongs to a key."""
    random = torch.Generator().manual_seed(number)
    rows = 1 + number % 14
    return {
        "values": torch.randint(-128, 127, (rows, 448), generator=random, dtype=torch.int8),
        "scale": torch.rand(rows, generator=random),
    }


def read_and_write(root: Path, seed: int, problems: Any, counts: Any) -> None:
    """Until it is killed, one time in ten in the middle of writing a file."""
    store, draw = Store(root, LIMIT, problems.put), random.Random(seed)

    def write(path: Path, content: bytes) -> int:
        with path.open("wb", buffering=0) as file:
            file.write(content[: len(content) // 2])
            if draw.random() < 0.1:
                os.kill(os.getpid(), signal.SIGKILL)
            return file.write(content[len(content) // 2 :])

    Path.write_bytes = write  # type: ignore[assignment, method-assign]  # in this process only
    while True:
        number = draw.randrange(KEYS)
        found = store.get(key_of(number))
        if found is None:
            store.put(key_of(number), value(number))
            counts[2] += 4096  # at least
        elif found.keys() != value(number).keys() or not all(found[k].equal(x) for k, x in value(number).items()):
            problems.put(f"wrong tensors for {number}")
        counts[found is not None] += 1


def bytes_in(root: Path) -> int:
    return sum(entry.bytes for entry in Store(root, 0, print).entries())


def damage(root: Path, draw: random.Random) -> None:
    """Flips a bit of a file, or cuts its end off."""
    files = list(root.glob(f"*/*{SUFFIX}"))
    try:
        path = draw.choice(files)
        content = bytearray(path.read_bytes())
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        with path.open("r+b") as file:
            file.write(content)
            if draw.random() < 0.3:
                file.truncate(draw.randrange(len(content)))
    except (OSError, IndexError):
        pass  # evicted meanwhile


def test_killed_readers_and_writers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_store, "ABANDONED_S", ABANDONED_S)
    root, draw, fork = tmp_path / "samples", random.Random(0), multiprocessing.get_context("fork")
    problems, counts = fork.SimpleQueue(), fork.Array("q", 3, lock=False)

    for number in range(KEYS * 2 // 5):  # by one who does not count, to begin near the limit
        path = root / key_of(number)[:2] / f"{key_of(number)}{SUFFIX}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(cache_store._sealed(key_of(number), value(number)))

    first = bytes_in(root)

    def start() -> BaseProcess:
        process = fork.Process(target=read_and_write, args=(root, draw.random(), problems, counts), daemon=True)
        process.start()
        return process

    processes = [start() for _ in range(PROCESSES)]
    most = most_left = kills = 0
    try:
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            most = max(most, bytes_in(root))
            most_left = max(most_left, len(list((root / "new").glob("*"))))
            damage(root, draw)
            if draw.random() < 0.2:
                processes[draw.randrange(PROCESSES)].kill()
            for number, process in enumerate(processes):
                if not process.is_alive():
                    processes[number], kills = start(), kills + 1
            time.sleep(0.01)
    finally:
        for process in processes:
            process.kill()
            process.join()
    assert problems.empty(), problems.get()
    print(
        f"{kills} kills, {counts[1]} hits, {counts[0]} misses, at most {most} of {LIMIT} bytes, {most_left} half written"
    )
    assert kills > 30 and min(counts) > 100
    assert first + counts[2] > LIMIT > most > 0.7 * LIMIT
    assert PROCESSES < most_left < kills / 2  # the killed leave some, which do not pile up
    time.sleep(ABANDONED_S)
    Store(root, LIMIT, print).put(key_of(0), value(0))
    assert list((root / "new").iterdir()) == []


def hold(memory: Path, ready: Any) -> None:
    cache.SHARED_MEMORY = memory
    mine = Cache(CacheConfig(memory_gib=0.01), print)
    mine.put(key_of(1), value(1))
    ready.put(True)
    time.sleep(60)


def test_memory_that_the_killed_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It stays while one process lives, and goes when the next one comes after all were killed."""
    memory = tmp_path / "shm"
    memory.mkdir()
    monkeypatch.setattr(cache, "SHARED_MEMORY", memory)
    fork = multiprocessing.get_context("fork")
    ready = fork.SimpleQueue()
    processes = [fork.Process(target=hold, args=(memory, ready), daemon=True) for _ in range(3)]
    for process in processes:
        process.start()
    for _ in processes:
        assert ready.get()
    for process in processes[:2]:
        process.kill()
        process.join()
    mine = Cache(CacheConfig(memory_gib=0.01), print)
    assert mine.get(key_of(1)) is not None
    mine.close()
    assert len(list(memory.iterdir())) == 1
    processes[2].kill()
    processes[2].join()
    other = Cache(CacheConfig(memory_gib=0.01), print)
    assert other.get(key_of(1)) is None
    other.close()
    assert list(memory.iterdir()) == []
