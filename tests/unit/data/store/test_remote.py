"""A store in remote storage: two nodes, of which each has a directory of its own, and one storage between them."""

import multiprocessing
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from pyarrow.fs import FSSpecHandler, PyFileSystem

from taid_ray import storage
from taid_ray.data.store import prepare, remote
from taid_ray.data.store.index import Index, write_index
from taid_ray.data.store.prepare import Encoding, prepare_span
from taid_ray.data.store.reader import StoredRows
from taid_ray.data.store.remote import RemoteStore, open_store
from taid_ray.data.store.sealed import making
from taid_ray.data.store.shard import ShardFacts
from taid_ray.data.store.spans import Span
from taid_ray.errors import ConfigError, DataError, RunError

URI = "memory://bucket/of data/key"
OnNode = Callable[[str], Path]


@pytest.fixture
def memory() -> Iterator[dict[str, Any]]:
    """What is in the storage, by path."""
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]
    yield MemoryFileSystem.store
    MemoryFileSystem.store.clear()


@pytest.fixture
def on_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> OnNode:
    """Moves this process to a node; returns the directory of the node's copies."""

    def move(name: str) -> Path:
        (tmp_path / name).mkdir(exist_ok=True)
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / name))
        return open_store(URI).directory

    return move


@pytest.fixture
def prepare_there(stories: list[Span], encoding: Encoding, memory: dict[str, Any]) -> Callable[[], list[ShardFacts]]:
    def run() -> list[ShardFacts]:
        found = [prepare_span(span, encoding, URI, print) for span in stories]
        return [facts for facts in found if facts is not None]

    return run


def stored(memory: dict[str, Any]) -> dict[str, bytes]:
    return {path.rsplit("/", 1)[1]: file.getvalue() for path, file in memory.items()}


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def damage(memory: dict[str, Any], name: str) -> None:
    [file] = [file for path, file in memory.items() if path.endswith(name)]
    file.seek(len(file.getvalue()) // 2)
    file.write(b"damage")


def no_encoding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "_ShardMaker", lambda *_: pytest.fail("encoded"))


def test_the_bytes_are_those_of_a_directory(
    prepared: Any, prepare_there: Any, store: Path, memory: dict[str, Any], on_node: OnNode
) -> None:
    path = write_index(store, prepared(), print)
    rows = StoredRows([Index(path)]).read(np.arange(40))
    here = on_node("a")
    location = write_index(URI, prepare_there(), print)
    assert stored(memory) == files(store) == files(here) and str(location).startswith(URI)
    there = on_node("b")
    assert StoredRows([Index(location)]).read(np.arange(3)) == rows[:3]
    assert 0 < len([*there.glob("*.arrow")]) < len([*here.glob("*.arrow")])  # only what is read is copied
    assert StoredRows([Index(location)]).read(np.arange(40)) == rows


def test_another_node_encodes_nothing(
    stories: list[Span], encoding: Encoding, prepare_there: Any, on_node: OnNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = on_node("a")
    first = prepare_there()
    location = write_index(URI, first, print)
    no_encoding(monkeypatch)
    there = on_node("b")
    assert prepare_there() == first and write_index(URI, first, print) == location
    assert files(there) == files(here)
    with making(there / f"{first[0].digest}.arrow", wait=False):
        assert prepare_span(stories[0], encoding, URI, print) == first[0]


def test_a_shard_that_another_run_makes_on_this_node(
    stories: list[Span], encoding: Encoding, prepare_there: Any, memory: dict[str, Any], on_node: OnNode
) -> None:
    here = on_node("a")
    first = prepare_there()
    memory.clear()
    path = here / f"{first[0].digest}.arrow"
    path.unlink()
    with making(path, wait=False):
        assert prepare_span(stories[0], encoding, URI, print) is None


def test_storage_that_lost_what_a_node_has(
    prepare_there: Any, memory: dict[str, Any], on_node: OnNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_node("a")
    location = write_index(URI, prepare_there(), print)
    whole = stored(memory)
    memory.clear()
    no_encoding(monkeypatch)
    assert write_index(URI, prepare_there(), print) == location and stored(memory) == whole


def test_damage_in_the_storage(
    stories: list[Span], encoding: Encoding, prepare_there: Any, memory: dict[str, Any], on_node: OnNode
) -> None:
    """The reader that finds it ends; the next start makes the file anew, also on a node that has a good copy."""
    on_node("a")
    location, whole = write_index(URI, prepare_there(), print), stored(memory)
    shard = f"{Index(location).places(np.array([0]))[0].shard}.arrow"
    said: list[str] = []
    for node in ("a", "c"):
        damage(memory, shard)
        there = on_node("b" + node)
        with pytest.raises(DataError, match=f"the file {URI}/{shard} of encoded data is missing or damaged; start"):
            StoredRows([Index(location)]).read(np.arange(3))
        assert not (there / shard).exists()
        on_node(node)
        for span in stories:
            prepare_span(span, encoding, URI, said.append)
        assert stored(memory) == whole
    assert not said
    damage(memory, shard)
    on_node("d")
    for span in stories:
        prepare_span(span, encoding, URI, said.append)
    assert said == [f"{URI}/{shard} is damaged"] and stored(memory) == whole


@pytest.mark.parametrize("harm", ["cut", "gone"])
def test_a_copy_that_is_damaged_is_copied_again(
    harm: str, prepare_there: Any, on_node: OnNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_node("a")
    location = write_index(URI, prepare_there(), print)
    there = on_node("b")
    opened = StoredRows([Index(location)])
    rows = opened.read(np.arange(30))
    opened.close()
    for path in there.glob("*.arrow"):
        content = path.read_bytes()
        path.unlink()  # the index stays memory-mapped
        if harm == "cut":
            path.write_bytes(content[:100])
    assert (opened if harm == "gone" else StoredRows([Index(location)])).read(np.arange(30)) == rows


class EverySecondFails(FSSpecHandler):  # type: ignore[misc]
    """Storage of which every second call fails, or all."""

    calls = 0
    always = False

    def __getattribute__(self, name: str) -> Any:
        kind = type(self)
        if name in ("get_file_info", "open_input_stream", "open_output_stream", "create_dir", "delete_file"):
            kind.calls += 1
            if kind.always or kind.calls % 2:
                raise OSError(5, "Input/output error")
        return super().__getattribute__(name)


def test_storage_that_fails_half_of_the_time(
    prepared: Any,
    prepare_there: Any,
    store: Path,
    memory: dict[str, Any],
    on_node: OnNode,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = StoredRows([Index(write_index(store, prepared(), print))]).read(np.arange(40))
    monkeypatch.setattr(storage, "PAUSE_S", 0.0)
    failing = PyFileSystem(EverySecondFails(MemoryFileSystem()))
    monkeypatch.setattr(remote, "open_storage", lambda location: (failing, "/bucket/key"))
    on_node("a")
    location = write_index(URI, prepare_there(), print)
    assert stored(memory) == files(store)
    on_node("b")
    opened = StoredRows([Index(location)])
    assert opened.read(np.arange(40)) == rows and EverySecondFails.calls > 100
    on_node("c")
    monkeypatch.setattr(EverySecondFails, "always", True)
    with pytest.raises(DataError, match=f"{URI}/index.* of encoded data cannot be copied to .*Input/output error"):
        Index(location)
    with pytest.raises(
        RunError, match=rf"data\.store: {URI}/ cannot be written \(.*Input/output error\); check the net"
    ):
        open_store(URI).create()


def test_stores_that_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"data\.store: nowhere://bucket cannot be used: .*name a directory or a URI"):
        open_store("nowhere://bucket")
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=r"data\.store: .*/file/store cannot be made \(.*set data\.store to another"):
        open_store(tmp_path / "file" / "store").create()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "file"))
    with pytest.raises(RunError, match=r"the directory for copies of memory://b cannot be made .*set TMPDIR"):
        open_store("memory://b")


def test_locations(tmp_path: Path, on_node: OnNode) -> None:
    """Each store has a directory of its own on a node; a directory is used where it is."""
    on_node("a")
    directories = {open_store(uri).directory for uri in (URI, f"{URI}/", f"{URI}2")}
    assert len(directories) == 2 and isinstance(open_store(URI), RemoteStore)
    assert {oct(path.parent.parent.stat().st_mode & 0o777) for path in directories} == {"0o700"}
    assert open_store(str(tmp_path)).directory == open_store(tmp_path).directory == tmp_path


def read_all(location: str, log: Path) -> list[Any]:
    plain = RemoteStore._take

    def taken(self: RemoteStore, path: Path) -> Any:
        with log.open("a") as file:
            file.write(f"{path.name}\n")
        return plain(self, path)

    RemoteStore._take = taken  # type: ignore[method-assign]
    return StoredRows([Index(location)]).read(np.arange(40))


def test_processes_of_a_node_copy_each_file_once(
    stories: list[Span], encoding: Encoding, tmp_path: Path, on_node: OnNode
) -> None:
    uri = f"file://{tmp_path}/bucket"
    on_node("a")
    shards = [facts for span in stories if (facts := prepare_span(span, encoding, uri, print))]
    location, log = str(write_index(uri, shards, print)), tmp_path / "log"
    rows = StoredRows([Index(location)]).read(np.arange(40))
    on_node("b")
    with ProcessPoolExecutor(4, multiprocessing.get_context("fork")) as pool:
        for found in [pool.submit(read_all, location, log) for _ in range(4)]:
            assert found.result() == rows
    copied = log.read_text().split()
    assert len(copied) == len({*copied}) > 4
    assert not [*open_store(uri).directory.glob("copy-of-*")]
