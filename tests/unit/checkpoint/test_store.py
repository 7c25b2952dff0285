"""Checkpoints as files: what was not written to its end or is damaged is passed over, and a full disk stops nothing at once."""

import json
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from taid_ray.checkpoint import save as saving
from taid_ray.checkpoint.restore import Checkpoint, restore
from taid_ray.checkpoint.save import MOST_FAILURES, CheckpointWriter
from taid_ray.checkpoint.store import (
    STATE_FILE,
    CheckpointStore,
    TornCheckpointError,
    TrainingState,
    checkpoint_name,
    last_file,
    share,
    tensor_file,
)
from taid_ray.config.schema import build_config
from taid_ray.config.training import CheckpointConfig
from taid_ray.data.cursor import BlockCursor
from taid_ray.distributed.world import World
from taid_ray.errors import CheckpointError, ConfigError
from taid_ray.scheduler.aggregate import StepResult
from taid_ray.scheduler.schedule import ScheduleState
from tests.support.disk import fill, small_disk

SHAPES = {"body/weight": (40, 30), "body/exp_avg": (40, 30), "norm/weight": (30,), "head/weight": (50, 40)}
OLD, NEW = 4, 8
FILES = [STATE_FILE, last_file(0), last_file(1), tensor_file(0, 0), tensor_file(1, 0)]
DAMAGES: dict[str, Callable[[bytes], bytes | None]] = {
    "missing": lambda content: None,
    "empty": lambda content: b"",
    "halved": lambda content: content[: len(content) // 2],
    "one byte short": lambda content: content[:-1],
    "one byte more": lambda content: content + b"}",
    "flipped": lambda content: flipped(content, len(content) // 2, 0),
    "zeros": lambda content: bytes(len(content)),
}


class Alone(World):
    """One of several ranks in a process of its own thoughts: the others never add anything."""

    def sum(self, values: Sequence[float]) -> list[float]:
        return list(values)


def flipped(content: bytes, position: int, bit: int) -> bytes:
    return content[:position] + bytes([content[position] ^ (1 << bit)]) + content[position + 1 :]


def writer_config(**changes: Any) -> Any:
    """The part of a configuration that a CheckpointWriter reads."""
    return SimpleNamespace(checkpoint=CheckpointConfig(**changes), peer_timeout_s=10)


def state_of(step: int) -> TrainingState:
    return TrainingState(
        StepResult(step, ScheduleState(0.4 + step / 100)), BlockCursor(samples=step), {"tokens": step * 10}
    )


def test_only_a_run_with_images_keeps_their_numbers() -> None:
    """So that the state of other runs is what it was before there were images."""
    plain, shown = (replace(state_of(3).result, images=images, image_bytes=9 * images) for images in (0, 2))
    texts = [replace(state_of(3), result=result).to_json() for result in (plain, shown)]
    assert [b"image" in text for text in texts] == [False, True]
    assert [TrainingState.from_json(text).result for text in texts] == [plain, shown]


def tensors_of(step: int, shapes: dict[str, tuple[int, ...]] = SHAPES) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}


def write(root: Path | str, steps: Iterable[int], ranks: int = 2) -> CheckpointStore:
    """Checkpoints as that many ranks save them, one after another."""
    store = CheckpointStore(str(root))
    notes: list[str] = []
    owners = share([(key, tensor.numel()) for key, tensor in tensors_of(0).items()], ranks)
    savers = [
        CheckpointWriter(store, writer_config(keep=9), Alone(rank, ranks), 1, None, notes.append)
        for rank in range(ranks)
    ]
    for step in steps:
        for rank in reversed(range(ranks)):  # rank 0 waits for the others' parts
            own = [(key, tensor if owners[key] == rank else None) for key, tensor in tensors_of(step).items()]
            savers[rank].save(step, state_of(step), own, None)
            savers[rank].close()
    assert len(notes) == len(list(steps)), notes  # each saved, and nothing else to say
    return store


def read(store: CheckpointStore) -> tuple[Checkpoint | None, list[str]]:
    notes: list[str] = []
    return restore(store, World(), notes.append), notes


def assert_is(found: Checkpoint | None, step: int) -> None:
    """Every bit of the checkpoint of that step."""
    assert found is not None and found.name == checkpoint_name(step, 1)
    assert TrainingState(found.result, found.cursor, found.totals) == state_of(step)
    for key, tensor in tensors_of(step).items():
        assert torch.equal(found.tensor(key, tensor.shape), tensor), key


@pytest.fixture
def two(tmp_path: Path) -> tuple[CheckpointStore, Path]:
    """A store with the checkpoints of OLD and NEW, by two ranks; the directory of NEW."""
    return write(tmp_path, [OLD, NEW]), tmp_path / checkpoint_name(NEW, 1)


def test_what_is_read_is_what_was_saved(two: tuple[CheckpointStore, Path]) -> None:
    store, newest = two
    assert sorted(path.name for path in newest.iterdir()) == sorted(FILES)
    found, notes = read(store)
    assert_is(found, NEW)
    assert notes == []


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_file_costs_one_checkpoint(file: str, damage: str, two: tuple[CheckpointStore, Path]) -> None:
    store, newest = two
    content = DAMAGES[damage]((newest / file).read_bytes())
    if content is None:
        (newest / file).unlink()
    else:
        (newest / file).write_bytes(content)
    found, notes = read(store)
    assert_is(found, OLD)
    (note,) = notes
    assert f"step {NEW}" in note and "passed over" in note
    unfinished = file in (last_file(0), last_file(1)) and damage != "flipped"
    assert ("not written to its end" if unfinished else "damaged") in note or damage == "flipped"


@pytest.mark.parametrize("file", [STATE_FILE, last_file(0), last_file(1)])
def test_no_flipped_bit_gets_through(file: str, two: tuple[CheckpointStore, Path]) -> None:
    """In the files that the others are known by: every byte of them."""
    store, newest = two
    whole = (newest / file).read_bytes()
    draw = random.Random(file)
    for position in range(len(whole)):
        (newest / file).write_bytes(flipped(whole, position, draw.randrange(8)))
        found, notes = read(store)
        assert_is(found, OLD)
        assert len(notes) == 1, (position, notes)


@pytest.mark.parametrize("file", [tensor_file(0, 0), tensor_file(1, 0)])
def test_no_flipped_bit_of_a_tensor_gets_through(file: str, two: tuple[CheckpointStore, Path]) -> None:
    store, newest = two
    whole = (newest / file).read_bytes()
    draw = random.Random(file)
    for _ in range(100):
        (newest / file).write_bytes(flipped(whole, draw.randrange(len(whole)), draw.randrange(8)))
        found, _ = read(store)
        assert_is(found, OLD)


def test_a_rank_that_goes_missing_in_the_index_is_noticed(tmp_path: Path) -> None:
    """One flipped bit makes 1 of 3, and the other ranks' tensors would be nobody's."""
    store = write(tmp_path, [OLD, NEW], ranks=3)
    path = tmp_path / checkpoint_name(NEW, 1) / last_file(0)
    path.write_text(path.read_text().replace('"world_size": 3', '"world_size": 1'))
    found, notes = read(store)
    assert_is(found, OLD)
    assert len(notes) == 1


def test_a_tensor_under_another_name_is_noticed(two: tuple[CheckpointStore, Path]) -> None:
    """The names of the index and those inside of the file must be the same, also where another file has that name."""
    store, newest = two
    path = newest / last_file(0)
    names = json.loads(path.read_text())["files"][tensor_file(0, 0)]["tensors"]
    other = next(key for key in SHAPES if key not in names)
    path.write_text(path.read_text().replace(json.dumps(names[0]), json.dumps(other)))
    found, _ = read(store)
    assert_is(found, OLD)


def test_all_damaged_ends_the_run_and_all_torn_begins_it(two: tuple[CheckpointStore, Path]) -> None:
    store, newest = two
    oldest = newest.with_name(checkpoint_name(OLD, 1))
    for directory in (newest, oldest):
        path = directory / tensor_file(1, 0)
        path.write_bytes(flipped(path.read_bytes(), 500, 3))
    notes: list[str] = []
    with pytest.raises(CheckpointError, match="none of the 2 checkpoints") as error:
        restore(store, World(), notes.append)
    assert len(notes) == 2 and all("damaged" in note for note in notes)
    assert store.location in str(error.value) and "remove them all" in str(error.value)
    (newest / last_file(1)).unlink()
    with pytest.raises(CheckpointError, match="can be used"):  # one torn, one damaged: there was something to lose
        read(store)
    (oldest / last_file(1)).unlink()
    found, notes = read(store)
    assert found is None and len(notes) == 2


def test_another_student_s_checkpoint_is_refused(two: tuple[CheckpointStore, Path]) -> None:
    found, _ = read(two[0])
    assert found is not None
    with pytest.raises(CheckpointError, match="no tensor tail/weight"):
        found.tensor("tail/weight", torch.Size([3]))
    with pytest.raises(CheckpointError, match="another shape of norm/weight"):
        found.tensor("norm/weight", torch.Size([31]))


def test_files_of_others_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "step-8-mine").mkdir()
    (tmp_path / "notes.txt").write_text("keep")
    found, notes = read(write(tmp_path, [OLD]))
    assert_is(found, OLD)
    assert notes == [] and (tmp_path / "step-8-mine").is_dir() and (tmp_path / "notes.txt").read_text() == "keep"


@pytest.mark.parametrize("scheme", ["file://", "memory://"])
def test_storage_by_uri(scheme: str, tmp_path: Path) -> None:
    """What Arrow knows itself, and what fsspec has a package for."""
    location = f"{scheme}{tmp_path}/of runs"
    write(location, [OLD, NEW])
    found, _ = read(CheckpointStore(location))
    assert_is(found, NEW)
    if scheme == "file://":
        assert (tmp_path / "of runs" / checkpoint_name(NEW, 1) / STATE_FILE).exists()
    CheckpointStore(location).delete(checkpoint_name(NEW, 1))
    found, notes = read(CheckpointStore(location))
    assert_is(found, OLD)
    assert notes == []


def config_with(storage: str) -> None:
    build_config(
        {
            "teacher": {"model": "t"},
            "student": {"model": "s"},
            "data": {"train": "d"},
            "train": {"steps": 1},
            "checkpoint": {"storage": storage},
        }
    )


@pytest.mark.parametrize(
    "storage",
    [
        "s3://key:secret@bucket/path",
        "s3://key:se/cret@bucket",
        "abfs://box@account/path?client_secret=secret&tenant_id=1",
    ],
)
def test_credentials_in_the_uri_are_refused(storage: str) -> None:
    with pytest.raises(ConfigError, match=r"checkpoint\.storage.*must not hold credentials") as error:
        config_with(storage)
    assert "secret" not in str(error.value) and "se/cret" not in str(error.value)


@pytest.mark.parametrize(
    "storage",
    ["s3://bucket/a@b", "/data/a@b", "abfss://box@account.dfs.core.windows.net/path", "hdfs://user@node:8020/path"],
)
def test_what_only_looks_like_credentials_is_not(storage: str) -> None:
    config_with(storage)


@pytest.mark.parametrize("location", ["nothing://bucket/path", "http//bucket"])
def test_a_storage_that_does_not_exist_is_refused(location: str) -> None:
    with pytest.raises(ConfigError, match=r"checkpoint\.storage"):
        CheckpointStore(location)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", 2) as path:
        yield path


@pytest.fixture
def saver(disk: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[CheckpointWriter, list[str]]:
    """Saves on the small disk, in several files per checkpoint; with what it says."""
    monkeypatch.setattr(saving, "PART_BYTES", 6000)
    notes: list[str] = []
    store = CheckpointStore(str(disk / "run"))
    return CheckpointWriter(store, writer_config(), World(), 1, None, notes.append), notes


def save(saver: CheckpointWriter, step: int) -> None:
    saver.save(step, state_of(step), tensors_of(step).items(), None)


def test_a_full_disk_costs_one_checkpoint(disk: Path, saver: tuple[CheckpointWriter, list[str]]) -> None:
    """It is said, nothing of it stays to take up room, the last one stays, and the next one is saved once there is room."""
    one, notes = saver
    save(one, OLD)
    one.close()
    ballast = fill(disk)
    with ballast.open("r+b") as file:
        file.truncate(ballast.stat().st_size - 12_288)  # room for state.json and a part, not for all of them
    save(one, NEW)
    with pytest.raises(CheckpointError, match=f"step {NEW} could not be written"):
        one.close()
    assert "No space left" in notes[-1] and f"step {NEW}" in notes[-1] and "training goes on" in notes[-1]
    assert not list(disk.glob(f"run/{checkpoint_name(NEW, 1)}/*"))
    found, _ = read(CheckpointStore(str(disk / "run")))
    assert_is(found, OLD)
    assert f"step {OLD}:" in one.describe_newest()
    ballast.unlink()
    save(one, NEW + 4)
    one.close()
    found, said = read(CheckpointStore(str(disk / "run")))
    assert_is(found, NEW + 4)
    assert said == []  # what was left of the other one is gone


def test_a_disk_that_stays_full_ends_the_run(disk: Path, saver: tuple[CheckpointWriter, list[str]]) -> None:
    one, notes = saver
    fill(disk)
    for step in range(1, MOST_FAILURES + 1):
        save(one, step)
    with pytest.raises(CheckpointError, match=r"3 times in a row, the last one after step 3.*make room in"):
        save(one, MOST_FAILURES + 1)
    assert len(notes) == MOST_FAILURES
    assert one.describe_newest() == "There is no checkpoint yet."


def test_failures_that_do_not_follow_one_another_end_nothing(
    disk: Path, saver: tuple[CheckpointWriter, list[str]]
) -> None:
    one, notes = saver
    for step in range(1, 3 * MOST_FAILURES):
        ballast = fill(disk) if step % 3 else None
        save(one, step)
        one.wait()
        if ballast:
            ballast.unlink()
    assert sum("could not be written" in note for note in notes) == 6
    save(one, 20)
    one.close()
    found, _ = read(CheckpointStore(str(disk / "run")))
    assert_is(found, 20)


def test_waiting_for_a_checkpoint_of_many_ranks_reads_their_files_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0 asks twice a second; in object storage each file that it reads is a request."""
    store, ranks, name, read = CheckpointStore(str(tmp_path)), 40, checkpoint_name(NEW, 1), []
    read_file = CheckpointStore._read
    monkeypatch.setattr(
        CheckpointStore, "_read", lambda self, name, file: read.append(file) or read_file(self, name, file)
    )
    for rank in range(ranks):
        store.finish(name, rank, ranks, {})
        if rank < ranks - 1:
            read.clear()
            with pytest.raises(TornCheckpointError, match=rf"{ranks - rank - 1} of {ranks} ranks have not finished"):
                store.index(name)
            assert read == [last_file(0)]
    read.clear()
    assert store.index(name) == {} and len(read) == ranks
