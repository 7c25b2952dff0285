import multiprocessing
import os
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

from taid_ray.config.training import CacheConfig
from taid_ray.errors import ConfigError
from taid_ray.teacher.cache import store as cache_store
from taid_ray.teacher.cache.files import Entry, total_bytes
from taid_ray.teacher.cache.store import FULL, MADE_ROOM, CacheStore, check_directory
from tests.support.disk import fill, small_disk
from tests.support.waiting import WAIT_S

MIB = 2**20
KEYS = [f"{number:02x}{number:062x}" for number in range(200)]


def tensors(number: int, kib: int = 4) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(number)
    return {
        "values": torch.randint(-128, 127, (kib * 4, 256), generator=random, dtype=torch.int8),
        "scale": torch.rand(kib * 4, generator=random),
    }


def same(found: dict[str, torch.Tensor] | None, expected: dict[str, torch.Tensor]) -> bool:
    return found is not None and found.keys() == expected.keys() and all(found[k].equal(expected[k]) for k in found)


def fail(message: str) -> None:
    raise AssertionError(message)


def open_store(directory: Path, limit: int = 64 * MIB, notify: Callable[[str], None] = fail) -> CacheStore:
    return CacheStore(CacheConfig(directory=str(directory), disk_gib=limit / 2**30), notify)


@pytest.fixture
def store(tmp_path: Path) -> CacheStore:
    return open_store(tmp_path)


def files(root: Path) -> list[Path]:
    return sorted(root.glob("*/*.safetensors"))


def test_what_was_put_is_got(store: CacheStore, tmp_path: Path) -> None:
    assert store.get(KEYS[0]) is None
    for number in range(5):
        store.put(KEYS[number], tensors(number))
    again = open_store(tmp_path)  # another process, or a later one
    assert all(same(again.get(KEYS[number]), tensors(number)) for number in range(5))
    assert again.get(KEYS[5]) is None
    assert sorted(path.parent.name for path in files(tmp_path / "samples")) == ["00", "01", "02", "03", "04"]


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.int32, torch.bfloat16, torch.float32])
def test_parts_of_larger_tensors_of_every_dtype(store: CacheStore, dtype: torch.dtype) -> None:
    whole = torch.arange(60).view(20, 3).float().to(dtype)
    store.put(KEYS[0], {"x": whole[5:9]})
    found = store.get(KEYS[0])
    assert found is not None and found["x"].dtype == dtype
    assert torch.equal(found["x"].view(torch.uint8), whole[5:9].view(torch.uint8))
    assert files(Path(store._root))[0].stat().st_size < 1000


def test_damage_of_any_byte_is_a_miss_and_the_file_goes(store: CacheStore, tmp_path: Path) -> None:
    store.put(KEYS[0], {"x": torch.arange(40.0)})
    (path,) = files(tmp_path / "samples")
    good = path.read_bytes()
    assert same(store.get(KEYS[0]), {"x": torch.arange(40.0)})
    for place in range(len(good)):
        for bad in (good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :], good[:place]):
            path.write_bytes(bad)
            found = store.get(KEYS[0])
            # A space of the header may become another one that means nothing.
            assert found is None or (same(found, {"x": torch.arange(40.0)}) and len(bad) == len(good))
            assert path.exists() == (found is not None)


def test_a_file_under_another_samples_name_is_a_miss(store: CacheStore, tmp_path: Path) -> None:
    store.put(KEYS[0], tensors(0))
    (path,) = files(tmp_path / "samples")
    other = tmp_path / "samples" / KEYS[1][:2] / f"{KEYS[1]}.safetensors"
    other.parent.mkdir()
    other.write_bytes(path.read_bytes())
    assert store.get(KEYS[1]) is None and not other.exists()
    assert store.get(KEYS[0]) is not None


def test_the_least_recently_used_make_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = 2 * MIB
    store = open_store(tmp_path, limit)
    for number in range(50):
        store.put(KEYS[number], tensors(number, 32))  # 36 KiB on the disk
        moment = time.time() - 3600 + number
        os.utime(store._path(KEYS[number]), (moment, moment))
    assert len(files(tmp_path / "samples")) == 50
    assert same(store.get(KEYS[0]), tensors(0, 32))  # used now
    for number in range(50, 56):
        store.put(KEYS[number], tensors(number, 32))
    left = {path.stem for path in files(tmp_path / "samples")}
    assert KEYS[0] in left and KEYS[1] not in left and KEYS[49] in left and KEYS[55] in left
    assert MADE_ROOM * limit / 2 < total_bytes(store.entries()) <= FULL * limit


def test_reading_touches_a_file_once_a_minute(store: CacheStore) -> None:
    store.put(KEYS[0], tensors(0))
    path = store._path(KEYS[0])
    for age, touched in ((30, False), (90, True)):
        moment = time.time() - age
        os.utime(path, (moment, moment))
        store.get(KEYS[0])
        assert (path.stat().st_mtime > moment + 1) == touched


def test_64_writers_keep_to_the_limit_in_the_worst_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has just got an allowance when the files are counted; then others fill the cache; then each writes it all."""
    limit = 64 * MIB
    writers = [open_store(tmp_path, limit) for _ in range(64)]
    for number, writer in enumerate(writers):
        writer.put(f"{number:064x}", {"x": torch.zeros(100)})
    other = open_store(tmp_path, limit)
    assert other.prune(limit) == 0  # counts what is there, and not what may still be written
    for number in range(63):  # more than fits without making room
        other.put(f"ff{number:062x}", {"x": torch.zeros(MIB, dtype=torch.int8)})
    assert MADE_ROOM * limit < total_bytes(other.entries()) <= FULL * limit
    while other._read_used() < FULL * limit - 4096:  # type: ignore[operator]
        other.put(os.urandom(32).hex(), {"x": torch.zeros(100)})
    monkeypatch.setattr(CacheStore, "_reserve", lambda self, size: False)  # each writes until it would look again
    for writer in writers:
        for _ in range(100):
            writer.put(os.urandom(32).hex(), {"x": torch.zeros(5000)})
    assert FULL * limit < 0.97 * limit < total_bytes(other.entries()) <= limit


def write_many(directory: Path, process: int, count: int, scans: Any, most: Any) -> None:
    """Writes samples of 8 KiB on the disk, and notes each scan and the most bytes that one found."""
    scan = CacheStore._scan

    def noted(self: CacheStore) -> list[Entry]:
        entries = scan(self)
        scans.value += 1  # under the store's lock
        most.value = max(most.value, total_bytes(entries))
        return entries

    CacheStore._scan = noted  # type: ignore[method-assign]  # in this process only
    store = open_store(directory, 16 * MIB)
    for number in range(count):
        store.put(f"{number % 256:02x}{process:031x}{number:031x}", {"x": torch.zeros(1500)})


def test_processes_keep_to_the_limit_and_seldom_count_the_files(tmp_path: Path) -> None:
    """Each asks for an allowance after three files, so they ask a thousand times."""
    fork = multiprocessing.get_context("fork")
    scans, most = fork.Value("q", 0), fork.Value("q", 0)
    for first, count, scans_at_most in ((0, 200, 1), (8, 400, 30)):  # far from full; then twice what fits
        processes = [
            fork.Process(target=write_many, args=(tmp_path, number, count, scans, most), daemon=True)
            for number in range(first, first + 8)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(WAIT_S)
            assert process.exitcode == 0
        assert 0 < scans.value <= scans_at_most
    assert MADE_ROOM * 16 * MIB / 2 < total_bytes(open_store(tmp_path).entries()) <= FULL * 16 * MIB + 8 * 4 * 8192
    assert most.value <= 16 * MIB


@pytest.mark.parametrize("content", ["", "x", "\0\0\0", "text that is longer than a counter", "9" * 30, None])
def test_where_nobody_knows_how_much_is_used_the_files_are_counted(tmp_path: Path, content: str | None) -> None:
    store, used = open_store(tmp_path), tmp_path / "samples" / "used"
    store.put(KEYS[0], tensors(0))
    if content is None:
        used.unlink()
    else:
        used.write_text(content)
    other = open_store(tmp_path)
    other.put(KEYS[1], tensors(1))
    assert int(used.read_text()) - other._may_write == total_bytes(other.entries()) == 2 * 8192


def test_a_lock_that_is_not_got_is_said_once_and_waited_for_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(cache_store, "LOCK_S", 0.1)
    store = open_store(tmp_path, notify=said.append)
    assert store.scope
    with FileLock(tmp_path / "samples" / "lock"):
        store.put(KEYS[0], tensors(0))
        monkeypatch.setattr(cache_store, "LOCK_S", 1e6)
        store.put(KEYS[1], tensors(1))
        assert store.get(KEYS[0]) is None and store.get(KEYS[1]) is None
        with pytest.raises(OSError, match=r"another process holds .*/samples/lock, and still did after 0 s"):
            store.prune(0)
    assert len(said) == 1 and "cannot keep more (another process holds" in said[0] and "after 0.1 s" in said[0]
    store.put(KEYS[1], tensors(1))
    assert same(store.get(KEYS[1]), tensors(1)) and store._patience_s == 1e6


def test_too_large_a_sample_is_said_once_and_not_kept(tmp_path: Path) -> None:
    said: list[str] = []
    store = open_store(tmp_path, MIB, said.append)
    for _ in range(2):
        store.put(KEYS[0], {"x": torch.zeros(MIB // 4)})
    assert store.get(KEYS[0]) is None and len(said) == 1 and "too small for a sample of 1.0 MiB" in said[0]
    store.put(KEYS[1], tensors(1))
    assert same(store.get(KEYS[1]), tensors(1))


def test_what_killed_writers_leave_counts_and_is_removed_when_old(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.put(KEYS[0], tensors(0))
    young, old = (tmp_path / "samples" / "new" / name for name in "ab")
    for path in (young, old):
        path.write_bytes(bytes(5000))
    os.utime(old, (0, 0))
    assert total_bytes(store.entries()) == 2 * 8192 + 8192  # of 5000, 5000 and 4400 bytes
    (tmp_path / "samples" / "used").unlink()  # so that the files are counted
    open_store(tmp_path).put(KEYS[1], tensors(1))
    assert young.exists() and not old.exists()


def test_prune(store: CacheStore, tmp_path: Path) -> None:
    for number in range(10):
        store.put(KEYS[number], tensors(number))
    each = store.entries()[0].bytes
    assert store.prune(4 * each) == 6 and len(files(tmp_path / "samples")) == 4
    assert store.prune(0) == 4 and not files(tmp_path / "samples")
    assert open_store(tmp_path / "nothing").prune(0) == 0 and not (tmp_path / "nothing").exists()


def test_a_full_disk_is_said_once(tmp_path: Path) -> None:
    said: list[str] = []
    with small_disk(tmp_path / "disk", 4) as disk:
        store = open_store(disk, notify=said.append)
        store.put(KEYS[0], tensors(0))
        ballast = fill(disk)
        for number in range(1, 4):
            store.put(KEYS[number], tensors(number, 64))
        assert len(said) == 1 and "No space left" in said[0] and str(disk) in said[0]
        assert same(store.get(KEYS[0]), tensors(0)) and store.get(KEYS[1]) is None
        ballast.unlink()
        store.put(KEYS[1], tensors(1))
        assert same(store.get(KEYS[1]), tensors(1))
        assert not list((disk / "samples" / "new").iterdir())


def test_a_directory_that_is_a_file_is_said_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    said: list[str] = []
    store = open_store(tmp_path / "file", notify=said.append)
    for _ in range(2):
        store.put(KEYS[0], tensors(0))
        assert store.get(KEYS[0]) is None
    assert len(said) == 1 and "the run goes on" in said[0]


def test_all_who_see_a_directory_are_of_one_scope(tmp_path: Path) -> None:
    """Also those that come first, all at once; else they would compute the same without knowing of each other."""
    for number in range(20):
        barrier = threading.Barrier(4)

        def scope(directory: str, barrier: threading.Barrier = barrier) -> str:
            barrier.wait()
            return CacheStore(CacheConfig(directory=directory), fail).scope

        with ThreadPoolExecutor(4) as threads:
            found = set(threads.map(scope, [str(tmp_path / str(number))] * 4))
        assert len(found) == 1 and len(found.pop()) == 32
    assert len({CacheStore(CacheConfig(directory=str(tmp_path / str(i))), fail).scope for i in range(20)}) == 20
    (tmp_path / "0" / "id").write_text("")  # by one who was killed in the middle
    (again,) = {CacheStore(CacheConfig(directory=str(tmp_path / "0")), fail).scope for _ in range(2)}
    assert len(again) == 32


@pytest.mark.parametrize(
    ("directory", "found"), [("file", "is a file"), ("file/cache", "is a file"), ("new/cache", ""), (None, "")]
)
def test_a_directory_that_cannot_be_used_is_refused(tmp_path: Path, directory: str | None, found: str) -> None:
    (tmp_path / "file").write_text("")
    config = CacheConfig(directory=directory and str(tmp_path / directory))
    if not found:
        check_directory(config)
        return
    with pytest.raises(
        ConfigError, match=rf"^cache.directory: {re.escape(str(tmp_path))}/{directory} cannot be used, .*/file {found}"
    ):
        check_directory(config)
    assert not (tmp_path / "samples" / "new").exists()
