"""Reading: a global batch is the same however many ranks share it and whatever was read before, and costs no memory."""

import os
import random
import tracemalloc
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from taid_ray import storage
from taid_ray.data.batch import NO_LABEL, Row
from taid_ray.data.encoding import Counts
from taid_ray.data.store import reader
from taid_ray.data.store.index import Index, Totals, write_index
from taid_ray.data.store.order import GlobalOrder, MixedOrder
from taid_ray.data.store.prepare import Encoding, prepare_span
from taid_ray.data.store.reader import BatchReader, RankRows, StoredRows
from taid_ray.data.store.sealed import write_sealed
from taid_ray.data.store.shard import SCHEMA, ShardFacts, locate_blocks, to_record_batch
from taid_ray.data.store.spans import Span
from taid_ray.errors import DataError
from tests.support.store import story

BATCH = 6
quickly = settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def index(prepared: Callable[[], list[ShardFacts]], store: Path) -> Index:
    return Index(write_index(store, prepared(), print))


def fresh(index: Index, seed: int = 3, size: int = BATCH) -> BatchReader:
    return BatchReader(StoredRows([index]), GlobalOrder(index.totals.rows, seed), size)


def whole(parts: list[RankRows]) -> list[Row]:
    return [row for part in parts for row in part.rows]


def test_every_row_is_read_as_it_was_stored(index: Index, encoding: Encoding) -> None:
    rows = StoredRows([index]).read(np.arange(index.totals.rows))
    learnt: Counter[int] = Counter()
    for row in rows:
        starts = [i for i, position in enumerate(row.position_ids.tolist()) if position == 0] + [len(row.input_ids)]
        assert len(row.documents) == len(starts) - 1 and len(row.input_ids) <= 64
        for document, start, stop in zip(row.documents, starts[:-1], starts[1:], strict=True):
            ids, targets = row.input_ids[start:stop].tolist(), row.targets[start:stop].tolist()
            assert row.position_ids[start:stop].tolist() == list(range(stop - start))
            assert targets == [*ids[1:], NO_LABEL]
            assert encoding.tokenizer.decode(ids, skip_special_tokens=True).strip() in story(document - 1)
            learnt[document] += stop - start
    assert {*learnt} == {*range(1, 98)}


def test_the_index_knows_every_row(index: Index) -> None:
    rows = StoredRows([index]).read(np.arange(index.totals.rows))
    assert index.column("tokens").tolist() == [len(row.input_ids) for row in rows]
    assert index.column("loss_tokens").tolist() == [row.num_loss_tokens for row in rows]
    assert index.column("samples").tolist() == [row.num_samples for row in rows]
    assert index.totals == Totals(
        digest=index.totals.digest,
        rows=len(rows),
        documents=97,
        tokens=sum(len(row.input_ids) for row in rows),
        loss_tokens=sum(row.num_loss_tokens for row in rows),
        highest_id=max(int(row.input_ids.max()) for row in rows),
        counts=Counts(documents=97).to_dict(),
    )


@pytest.mark.parametrize("world_size", [1, 2, 3, 7, 512])
@pytest.mark.parametrize("step", [0, 1, 40])
def test_a_batch_is_the_same_for_any_number_of_ranks(step: int, world_size: int, index: Index) -> None:
    alone = fresh(index).read(step, 0, 1)
    shared = fresh(index)
    parts = [shared.read(step, rank, world_size) for rank in range(world_size)]
    assert whole(parts) == alone.rows and len(alone.rows) == BATCH
    assert {part.num_loss_tokens for part in parts} == {sum(row.num_loss_tokens for row in alone.rows)}
    assert {part.num_samples for part in parts} == {sum(row.num_samples for row in alone.rows)}
    assert max(len(part.rows) for part in parts) - min(len(part.rows) for part in parts) <= 1


@quickly
@given(st.integers(0, 10**6), st.integers(1, 9), st.integers(0, 9), st.data())
def test_a_batch_depends_on_seed_and_number_alone(
    index: Index, step: int, world_size: int, seed: int, data: st.DataObject
) -> None:
    """So a run resumed at any step reads on as if it had never stopped, and reads nothing before that."""
    rank = data.draw(st.integers(0, world_size - 1))
    used = fresh(index, seed)
    for earlier in range(max(0, step - 3), step):
        used.read(earlier, rank, world_size)
    assert used.read(step, rank, world_size) == fresh(index, seed).read(step, rank, world_size)


def test_batches_hold_every_row_once_in_each_epoch(index: Index) -> None:
    batches, stream = fresh(index), []
    while len(stream) < 3 * index.totals.rows:
        stream += [row.input_ids.tobytes() for row in batches.read(len(stream) // BATCH, 0, 1).rows]
    everything = Counter(row.input_ids.tobytes() for row in StoredRows([index]).read(np.arange(index.totals.rows)))
    epochs = [stream[epoch * index.totals.rows : (epoch + 1) * index.totals.rows] for epoch in range(3)]
    assert all(Counter(epoch) == everything for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_a_mixture_of_two_stores(index: Index, encoding: Encoding, stories: list[Span], tmp_path: Path) -> None:
    """Each with an encoding of its own: the second one's rows are shorter, and its documents follow those of the first."""
    shorter = replace(encoding, config=encoding.config.model_copy(update={"sequence_length": 32}))
    (tmp_path / "second").mkdir()
    shards = [prepare_span(span, shorter, tmp_path / "second", print) for span in stories]
    second = Index(write_index(tmp_path / "second", [facts for facts in shards if facts], print))
    stored, sizes = StoredRows([index, second]), (index.totals.rows, second.totals.rows)
    order = MixedOrder(sizes, (9, 3), seed=0)
    batch = BatchReader(stored, order, 12).read(5, 0, 1)
    assert Counter(row.documents[0] <= 97 for row in batch.rows) == {True: 9, False: 3}
    rows = stored.read(np.arange(sum(sizes)))
    assert rows[: sizes[0]] == StoredRows([index]).read(np.arange(sizes[0]))
    assert [row.source for row in rows] == [0] * sizes[0] + [1] * sizes[1]
    alone = [replace(row, source=1) for row in StoredRows([second]).read(np.arange(sizes[1]))]
    assert [replace(row, documents=()) for row in rows[sizes[0] :]] == [replace(row, documents=()) for row in alone]
    assert [row.documents[0] - 97 for row in rows[sizes[0] :]] == [row.documents[0] for row in alone]
    assert stored.read(np.array([sizes[0] + 1, 1, 0])) == [rows[sizes[0] + 1], rows[1], rows[0]]
    assert batch.num_loss_tokens == sum(row.num_loss_tokens for row in batch.rows)


def test_few_files_are_open(index: Index, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "OPEN_FILES", 2)
    order = GlobalOrder(index.totals.rows, 0).rows_at(0, 2 * index.totals.rows)
    stored = StoredRows([index])
    rows = stored.read(order)
    assert len([*store.glob("*.arrow")]) > 5 and open_shards(store) == 2
    stored.close()
    assert open_shards(store) == 0
    assert stored.read(order) == rows
    stored.close()


def open_shards(store: Path) -> int:
    """Number of files of shards in `store` that this process has open; the index stays mapped."""
    names = [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    shards = [Path(name) for name in names if not Path(name).name.startswith(("index-", "blocks-"))]
    return sum(path.parent == store and path.suffix == ".arrow" for path in shards)


def test_a_shard_that_is_gone_or_cut_off(index: Index, store: Path) -> None:
    path = store / f"{index.places(np.array([index.totals.rows - 1]))[0].shard}.arrow"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DataError, match=f"{path} of encoded data is missing or damaged; start the run again"):
        StoredRows([index]).read(np.arange(index.totals.rows))
    path.unlink()
    with pytest.raises(DataError, match=f"{path} of encoded data is missing or damaged"):
        StoredRows([index]).read(np.arange(index.totals.rows))


def test_a_disk_that_fails_half_of_the_reads(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    everything, draw = np.arange(index.totals.rows), random.Random(0)
    rows, plain = StoredRows([index]).read(everything), os.pread

    def failing(*arguments: int) -> bytes:
        if draw.random() < 0.5:
            raise OSError(5, "Input/output error")
        return plain(*arguments)

    monkeypatch.setattr(storage, "PAUSE_S", 0.0)
    monkeypatch.setattr(reader.os, "pread", failing)
    before = len(os.listdir("/proc/self/fd"))
    stored = StoredRows([index])
    assert stored.read(everything) == rows
    stored.close()
    assert len(os.listdir("/proc/self/fd")) == before
    draw.random = lambda: 0.0  # type: ignore[method-assign]
    with pytest.raises(DataError, match=r"cannot be read \(\[Errno 5\] Input/output error\); check the disk"):
        stored.read(everything)


@pytest.mark.parametrize("which", ["index", "blocks"])
def test_an_index_is_written_once_and_anew_if_damaged(
    which: str, store: Path, prepared: Callable[[], list[ShardFacts]]
) -> None:
    shards, said = prepared(), list[str]()
    path = write_index(store, shards, said.append)
    rows = StoredRows([Index(path)]).read(np.arange(5))
    damaged = path.with_name(path.name.replace("index", which))
    content, written = damaged.read_bytes(), path.stat().st_mtime_ns
    assert write_index(store, shards, said.append) == path and path.stat().st_mtime_ns == written and not said
    for damage in (damaged.unlink, lambda: damaged.write_bytes(content[:90])):
        damage()
        with pytest.raises(DataError, match=f"the index {path} of encoded data is missing or damaged"):
            Index(path)
    assert write_index(store, shards, said.append) == path and damaged.read_bytes() == content
    assert said == [f"{damaged} is damaged"]
    assert StoredRows([Index(path)]).read(np.arange(5)) == rows


def test_an_index_is_that_of_its_shards_in_their_order(store: Path, prepared: Callable[[], list[ShardFacts]]) -> None:
    shards = prepared()
    paths = {write_index(store, chosen, print) for chosen in (shards, shards[:-1], shards[::-1], shards * 2)}
    assert len(paths) == 4 and len({Index(path).totals.digest for path in paths}) == 4
    with pytest.raises(DataError, match="missing or damaged"):
        Index(store / "index-none.arrow")


def many_rows(directory: Path, rows: int) -> Path:
    """The index of a data set of very short rows."""
    directory.mkdir()
    row = Row(*map(np.array, ([5, 6], [0, 1], [6, NO_LABEL])), (0,))
    facts = ShardFacts("few", "content", 0, 0, 6, 1, {"documents": 1}, ["text"], [])

    def said(path: Path) -> dict[str, Any]:
        return replace(facts, blocks=locate_blocks(path)).to_dict()

    blocks = [to_record_batch([row] * 50)] * 200
    shard = ShardFacts.from_dict(write_sealed(directory / "few.arrow", SCHEMA, blocks, said))
    return write_index(directory, [shard] * (rows // 10_000), print)


def test_memory_does_not_depend_on_the_size_of_the_data(store: Path) -> None:
    """What Python and numpy allocate to open a data set and to read from it; what is memory-mapped is the system's."""
    peaks = []
    for rows in (10_000, 200_000):
        path = many_rows(store / str(rows), rows)
        tracemalloc.start()
        batches = fresh(Index(path), size=64)
        for step in range(20):
            batches.read(step, 1, 4)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert path.stat().st_size > 20 * rows
    assert peaks[1] < peaks[0] + 20_000, peaks  # rows and blocks have 4,100,000 bytes more
