import os
import re
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from taid_ray.config.schema import CacheConfig
from taid_ray.errors import ConfigError
from taid_ray.teacher.cache import store as cache_store
from taid_ray.teacher.cache import tiers as cache
from taid_ray.teacher.cache.store import FULL, MADE_ROOM, CacheStore
from taid_ray.teacher.cache.tiers import Cache, SharedDirectory, check_directory
from tests.support.disk import fill, small_disk

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


@pytest.fixture
def store(tmp_path: Path) -> CacheStore:
    return CacheStore(tmp_path / "samples", 64 * MIB, fail)


def files(root: Path) -> list[Path]:
    return sorted(root.glob("*/*.safetensors"))


def test_what_was_put_is_got(store: CacheStore, tmp_path: Path) -> None:
    assert store.get(KEYS[0]) is None
    for number in range(5):
        store.put(KEYS[number], tensors(number))
    again = CacheStore(tmp_path / "samples", 64 * MIB, fail)  # another process, or a later one
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
    store = CacheStore(tmp_path, limit, fail)
    for number in range(50):
        store.put(KEYS[number], tensors(number, 32))  # 36 KiB on the disk
        moment = time.time() - 3600 + number
        os.utime(store._path(KEYS[number]), (moment, moment))
    assert len(files(tmp_path)) == 50
    assert same(store.get(KEYS[0]), tensors(0, 32))  # used now
    for number in range(50, 56):
        store.put(KEYS[number], tensors(number, 32))
    left = {path.stem for path in files(tmp_path)}
    assert KEYS[0] in left and KEYS[1] not in left and KEYS[49] in left and KEYS[55] in left
    assert MADE_ROOM * limit / 2 < sum(entry.bytes for entry in store.entries()) <= FULL * limit


def test_reading_touches_a_file_once_a_minute(store: CacheStore) -> None:
    store.put(KEYS[0], tensors(0))
    path = store._path(KEYS[0])
    for age, touched in ((30, False), (90, True)):
        moment = time.time() - age
        os.utime(path, (moment, moment))
        store.get(KEYS[0])
        assert (path.stat().st_mtime > moment + 1) == touched


def test_a_writer_looks_again_before_64_of_them_could_exceed_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """64 writers that look at the same moment, at which the store is as full as it may be without making room."""
    limit = 64 * MIB
    writers = [CacheStore(tmp_path, limit, fail) for _ in range(64)]
    first = CacheStore(tmp_path, limit, fail)
    big = {"x": torch.zeros(int(FULL * limit) - 65 * 8192, dtype=torch.uint8).view(torch.int8)}
    monkeypatch.setattr(cache_store, "MADE_ROOM", FULL)
    first.put("ff" * 32, big)
    for number, writer in enumerate(writers):
        writer.put(f"{number:064x}", {"x": torch.zeros(100)})
    assert sum(entry.bytes for entry in first.entries()) <= FULL * limit
    monkeypatch.setattr(CacheStore, "_make_room", lambda self, size: False)  # each writes until it would look again
    for writer in writers:
        for _ in range(100):
            writer.put(os.urandom(32).hex(), {"x": torch.zeros(5000)})
    total = sum(entry.bytes for entry in first.entries())
    assert FULL * limit < 0.97 * limit < total <= limit


def test_too_large_a_sample_is_said_once_and_not_kept(tmp_path: Path) -> None:
    said: list[str] = []
    store = CacheStore(tmp_path, MIB, said.append)
    for _ in range(2):
        store.put(KEYS[0], {"x": torch.zeros(MIB // 4)})
    assert store.get(KEYS[0]) is None and len(said) == 1 and "too small for a sample of 1.0 MiB" in said[0]
    store.put(KEYS[1], tensors(1))
    assert same(store.get(KEYS[1]), tensors(1))


def test_what_killed_writers_leave_counts_and_is_removed_when_old(tmp_path: Path) -> None:
    store = CacheStore(tmp_path, 64 * MIB, fail)
    store.put(KEYS[0], tensors(0))
    young, old = tmp_path / "new" / "a", tmp_path / "new" / "b"
    for path in (young, old):
        path.write_bytes(bytes(5000))
    os.utime(old, (0, 0))
    assert sum(entry.bytes for entry in store.entries()) == 2 * 8192 + 8192  # of 5000, 5000 and 4400 bytes
    CacheStore(tmp_path, 64 * MIB, fail).put(KEYS[1], tensors(1))
    assert young.exists() and not old.exists()


def test_prune(store: CacheStore, tmp_path: Path) -> None:
    for number in range(10):
        store.put(KEYS[number], tensors(number))
    each = store.entries()[0].bytes
    assert store.prune(4 * each) == 6 and len(files(tmp_path / "samples")) == 4
    assert store.prune(0) == 4 and not files(tmp_path / "samples")
    assert CacheStore(tmp_path / "nothing", MIB, fail).prune(0) == 0 and not (tmp_path / "nothing").exists()


def test_a_full_disk_is_said_once(tmp_path: Path) -> None:
    said: list[str] = []
    with small_disk(tmp_path / "disk", 4) as disk:
        store = CacheStore(disk / "samples", 64 * MIB, said.append)
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
    store = CacheStore(tmp_path / "file" / "samples", MIB, said.append)
    for _ in range(2):
        store.put(KEYS[0], tensors(0))
        assert store.get(KEYS[0]) is None
    assert len(said) == 1 and "the run goes on" in said[0]


# Both tiers


@pytest.fixture
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "shm"
    root.mkdir()
    monkeypatch.setattr(cache, "SHARED_MEMORY", root)
    return root


def test_a_disk_hit_is_in_memory_from_then_on(memory: Path, tmp_path: Path) -> None:
    directory = str(tmp_path / "cache")
    on_disk = Cache(CacheConfig(directory=directory), fail)
    on_disk.put(KEYS[0], tensors(0))
    on_disk.close()
    both = Cache(CacheConfig(directory=directory, memory_gib=0.1), fail)
    assert same(both.get(KEYS[0]), tensors(0))
    files(tmp_path / "cache" / "samples")[0].unlink()
    assert same(both.get(KEYS[0]), tensors(0)) and both.get(KEYS[1]) is None
    both.put(KEYS[2], tensors(2))
    assert len(files(tmp_path / "cache" / "samples")) == 1
    both.close()
    assert list(memory.iterdir()) == []


def test_memory_alone_lasts_while_somebody_holds_it(memory: Path) -> None:
    config = CacheConfig(memory_gib=0.1)
    first, second = Cache(config, fail), Cache(config, fail)
    other = Cache(CacheConfig(memory_gib=0.1, directory=str(memory.parent / "elsewhere")), fail)
    first.put(KEYS[0], tensors(0))
    first.close()
    assert same(second.get(KEYS[0]), tensors(0)) and other.get(KEYS[0]) is None
    second.close()
    assert len(list(memory.iterdir())) == 1
    other.close()
    assert list(memory.iterdir()) == []
    assert Cache(config, fail).get(KEYS[0]) is None


def test_what_the_killed_left_in_memory_goes_when_the_next_process_comes(memory: Path) -> None:
    left = SharedDirectory("a")
    (left.path / "00").mkdir()
    left._file.close()  # as the kernel does for a killed process
    (memory / f"taid-ray-gone-{os.getuid()}-1").mkdir()
    foreign = memory / f"taid-ray-cache-{os.getuid() + 1}-1"
    foreign.mkdir()
    held = SharedDirectory("b")
    assert set(memory.iterdir()) == {held.path, foreign}


def test_joining_and_leaving_at_the_same_time(memory: Path) -> None:
    """Whoever holds the directory can use it, whatever others do."""
    problems: list[Any] = []

    def come_and_go() -> None:
        try:
            for _ in range(60):
                shared = SharedDirectory("x")
                (shared.path / str(threading.get_ident())).write_text("mine")
                assert (shared.path / str(threading.get_ident())).read_text() == "mine"
                shared.leave()
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=come_and_go) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert problems == [] and list(memory.iterdir()) == []


def test_all_who_see_a_directory_are_of_one_scope(tmp_path: Path) -> None:
    """Also those that come first, all at once; else they would compute the same without knowing of each other."""
    for number in range(20):
        barrier = threading.Barrier(4)

        def scope(directory: str, barrier: threading.Barrier = barrier) -> str:
            barrier.wait()
            return Cache(CacheConfig(directory=directory), fail).scope

        with ThreadPoolExecutor(4) as threads:
            found = set(threads.map(scope, [str(tmp_path / str(number))] * 4))
        assert len(found) == 1 and len(found.pop()) == 32
    assert len({Cache(CacheConfig(directory=str(tmp_path / str(i))), fail).scope for i in range(20)}) == 20
    (tmp_path / "0" / "id").write_text("")  # by one who was killed in the middle
    (again,) = {Cache(CacheConfig(directory=str(tmp_path / "0")), fail).scope for _ in range(2)}
    assert len(again) == 32
    assert len({Cache(CacheConfig(), fail).scope for _ in range(2)}) == 1


def test_memory_is_a_third_of_what_the_node_has_at_most(memory: Path) -> None:
    said: list[str] = []
    Cache(CacheConfig(memory_gib=0.001), fail).close()
    held = Cache(CacheConfig(memory_gib=1e6), said.append)
    assert held._memory is not None and held._memory._limit == shutil.disk_usage(memory).total // 3
    assert len(said) == 1 and "cache.memory_gib: 1e+06 is more than a third" in said[0]
    held.close()


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
    assert not (tmp_path / "new").exists()


def test_no_shared_memory_is_said_and_the_disk_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "SHARED_MEMORY", tmp_path / "nowhere" / "shm")
    said: list[str] = []
    # mkdir fails for lack of a parent, as it would for lack of room or rights
    tiers = Cache(CacheConfig(directory=str(tmp_path / "cache"), memory_gib=1.0), said.append)
    tiers.put(KEYS[0], tensors(0))
    assert same(tiers.get(KEYS[0]), tensors(0)) and len(said) == 1 and "no memory" in said[0]
    tiers.close()
