"""The cache while processes that use it are killed, and files in it damaged: never a wrong output, never too many bytes."""

import itertools
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from taid_ray.config.training import CacheConfig
from taid_ray.teacher.cache import store as cache_store
from taid_ray.teacher.cache.files import ABANDONED_S, SUFFIX, seal, total_bytes
from taid_ray.teacher.cache.store import CacheStore

PROCESSES, KEYS = 8, 3000
KILLS = 250
WAIT_S = 120.0
LIMIT = 10 * 2**20
"""Every other of the samples, of 4 or 8 KiB on the disk, finds room. A writer counts again after 16 KiB."""


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


def open_store(root: Path, notify: Callable[[str], None] = print) -> CacheStore:
    return CacheStore(CacheConfig(directory=str(root.parent), disk_gib=LIMIT / 2**30), notify)


def read_and_write(root: Path, process: int, problems: Any, counts: Any) -> None:
    """Until it is killed, one time in ten in the middle of writing a file. Such files are named after the process."""
    store, draw, names = open_store(root, problems.put), random.Random(process), itertools.count()
    cache_store.uuid.uuid4 = lambda: SimpleNamespace(hex=f"{process}-{next(names)}")  # type: ignore[assignment, return-value]

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


@contextmanager
def standing_still(processes: list[BaseProcess]) -> Iterator[None]:
    """What is on the disk does not change meanwhile, at whatever the processes are."""
    living = [process for process in processes if process.is_alive()]
    for process in living:
        os.kill(process.pid or 0, signal.SIGSTOP)
    for process in living:
        os.waitid(os.P_PID, process.pid or 0, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
    yield
    for process in living:
        if process.is_alive():
            os.kill(process.pid or 0, signal.SIGCONT)


def left_by_dead(root: Path, living: list[BaseProcess]) -> list[Path]:
    """Files that a dead process was writing."""
    names = {process.name for process in living if process.is_alive()}
    return [path for path in (root / "new").glob("*") if path.name.partition("-")[0] not in names]


def age(paths: list[Path]) -> None:
    """As if nobody had written to them for long."""
    then = time.time() - 2 * ABANDONED_S
    for path in paths:
        os.utime(path, (then, then))


def bytes_in(root: Path) -> int:
    return total_bytes(open_store(root).entries())


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


@pytest.mark.more
def test_killed_readers_and_writers(tmp_path: Path) -> None:
    root, draw, fork = tmp_path / "samples", random.Random(0), multiprocessing.get_context("fork")
    problems, counts, numbers = fork.SimpleQueue(), fork.Array("q", 3, lock=False), itertools.count()

    for number in range(KEYS * 2 // 5):  # by one who does not count, to begin near the limit
        path = root / key_of(number)[:2] / f"{key_of(number)}{SUFFIX}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(seal(key_of(number), value(number)))

    first = bytes_in(root)

    def start() -> BaseProcess:
        number = next(numbers)
        arguments = (root, number, problems, counts)
        process = fork.Process(target=read_and_write, args=arguments, name=str(number), daemon=True)
        process.start()
        return process

    processes = [start() for _ in range(PROCESSES)]
    left: set[str] = set()
    most = most_left = kills = 0
    try:
        while kills < KILLS:
            assert wait([process.sentinel for process in processes], WAIT_S), "no process writes any more"
            with standing_still(processes):
                most = max(most, bytes_in(root))
                abandoned = left_by_dead(root, processes)
                age(abandoned)
            left |= {path.name for path in abandoned}
            most_left = max(most_left, len(abandoned))
            damage(root, draw)
            if draw.random() < 0.2:
                processes[draw.randrange(PROCESSES)].kill()
            for number, process in enumerate(processes):
                if not process.is_alive():
                    processes[number], kills = start(), kills + 1
    finally:
        for process in processes:
            process.kill()
            process.join()
    assert problems.empty(), problems.get()
    print(
        f"{kills} kills, {counts[1]} hits, {counts[0]} misses, at most {most} of {LIMIT} bytes, {len(left)} half written, "
        f"{most_left} of them at a time"
    )
    assert min(counts) > KILLS
    assert first + counts[2] > LIMIT > most > 0.7 * LIMIT
    assert len(left) > KILLS / 4 and most_left < len(left) / 4  # the killed leave some, which do not pile up
    age(left_by_dead(root, []))
    open_store(root).prune(LIMIT)
    assert list((root / "new").iterdir()) == []
