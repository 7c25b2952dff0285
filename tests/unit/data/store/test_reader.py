"""Reading: a global batch is the same however many ranks share it and whatever was read before, and costs no memory."""

import os
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

from taid_ray.data.batch import NO_LABEL, Row
from taid_ray.data.store import reader
from taid_ray.data.store.index import Index, write_index
from taid_ray.data.store.order import GlobalOrder, MixedOrder
from taid_ray.data.store.prepare import Encoding
from taid_ray.data.store.reader import BatchReader, RankRows, StoredRows
from taid_ray.data.store.sealed import write_sealed
from taid_ray.data.store.shard import SCHEMA, ShardFacts, locate_blocks, to_record_batch
from taid_ray.errors import DataError
from tests.support.store import story

BATCH = 6
quickly = settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def index(prepared: Callable[[], list[ShardFacts]], store: Path) -> Index:
    return Index(write_index(store, prepared(), print))


def fresh(store: Path, index: Index, seed: int = 3, size: int = BATCH) -> BatchReader:
    return BatchReader(StoredRows(store, index), index, GlobalOrder(index.rows, seed), size)


def whole(parts: list[RankRows]) -> list[Row]:
    return [row for part in parts for row in part.rows]


def test_every_row_is_read_as_it_was_stored(store: Path, index: Index, encoding: Encoding) -> None:
    rows = StoredRows(store, index).read(np.arange(index.rows))
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


def test_the_index_knows_every_row(store: Path, index: Index) -> None:
    rows = StoredRows(store, index).read(np.arange(index.rows))
    assert index.column("tokens").tolist() == [len(row.input_ids) for row in rows]
    assert index.column("loss_tokens").tolist() == [row.num_loss_tokens for row in rows]
    assert index.column("samples").tolist() == [row.num_samples for row in rows]
    assert index.totals() == {
        "documents": 97,
        "dropped": 0,
        "truncated": 0,
        "tokens": sum(len(row.input_ids) for row in rows),
        "loss_tokens": sum(row.num_loss_tokens for row in rows),
    }
    assert index.highest_id == max(int(row.input_ids.max()) for row in rows)


@pytest.mark.parametrize("world_size", [1, 2, 3, 7, 512])
@pytest.mark.parametrize("step", [0, 1, 40])
def test_a_batch_is_the_same_for_any_number_of_ranks(step: int, world_size: int, store: Path, index: Index) -> None:
    alone = fresh(store, index).read(step, 0, 1)
    shared = fresh(store, index)
    parts = [shared.read(step, rank, world_size) for rank in range(world_size)]
    assert whole(parts) == alone.rows and len(alone.rows) == BATCH
    assert {part.num_loss_tokens for part in parts} == {sum(row.num_loss_tokens for row in alone.rows)}
    assert {part.num_samples for part in parts} == {sum(row.num_samples for row in alone.rows)}
    assert max(len(part.rows) for part in parts) - min(len(part.rows) for part in parts) <= 1


@quickly
@given(st.integers(0, 10**6), st.integers(1, 9), st.integers(0, 9), st.data())
def test_a_batch_depends_on_seed_and_number_alone(
    store: Path, index: Index, step: int, world_size: int, seed: int, data: st.DataObject
) -> None:
    """So a run resumed at any step reads on as if it had never stopped, and reads nothing before that."""
    rank = data.draw(st.integers(0, world_size - 1))
    used = fresh(store, index, seed)
    for earlier in range(max(0, step - 3), step):
        used.read(earlier, rank, world_size)
    assert used.read(step, rank, world_size) == fresh(store, index, seed).read(step, rank, world_size)


def test_batches_hold_every_row_once_in_each_epoch(store: Path, index: Index) -> None:
    batches, stream = fresh(store, index), []
    while len(stream) < 3 * index.rows:
        stream += [row.input_ids.tobytes() for row in batches.read(len(stream) // BATCH, 0, 1).rows]
    everything = Counter(row.input_ids.tobytes() for row in StoredRows(store, index).read(np.arange(index.rows)))
    epochs = [stream[epoch * index.rows : (epoch + 1) * index.rows] for epoch in range(3)]
    assert all(Counter(epoch) == everything for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_a_mixture_of_two_data_sets(store: Path, index: Index) -> None:
    """One index after the other: the order numbers the rows of both."""
    shards = index.shards
    one, other = shards[:2], shards[2:]
    both = Index(write_index(store, [*one, *other], print))
    sizes = tuple(sum(facts.rows for facts in part) for part in (one, other))
    order = MixedOrder(sizes, (9, 3), seed=0)
    batch = BatchReader(StoredRows(store, both), both, order, 12).read(5, 0, 1)
    last = sum(facts.documents for facts in one)
    assert Counter(row.documents[0] <= last for row in batch.rows) == {True: 9, False: 3}


def test_few_files_are_open(store: Path, index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "OPEN_FILES", 2)
    before, stored = len(os.listdir("/proc/self/fd")), StoredRows(store, index)
    order = GlobalOrder(index.rows, 0).rows_at(0, 2 * index.rows)
    assert len(index.shards) > 3 and stored.read(order) == StoredRows(store, index).read(order)
    stored.close()
    assert stored.read(order[:1]) == StoredRows(store, index).read(order[:1])
    stored.close()
    assert len(os.listdir("/proc/self/fd")) <= before + 2 * 2  # of the two readers that nobody closed


def test_a_shard_that_is_gone_or_cut_off(store: Path, index: Index) -> None:
    path = store / f"{index.shards[-1].digest}.arrow"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DataError, match=f"{path} of encoded data is missing or damaged; start the run again"):
        StoredRows(store, index).read(np.arange(index.rows))
    path.unlink()
    with pytest.raises(DataError, match=f"{path} of encoded data is missing or damaged"):
        StoredRows(store, index).read(np.arange(index.rows))


def test_an_index_is_written_once_and_anew_if_damaged(store: Path, index: Index) -> None:
    said: list[str] = []
    path = write_index(store, index.shards, said.append)
    content, written = path.read_bytes(), path.stat().st_mtime_ns
    assert write_index(store, index.shards, said.append) == path and path.stat().st_mtime_ns == written and not said
    path.write_bytes(content[:-1])
    with pytest.raises(DataError, match=f"the index {path} of encoded data is missing or damaged"):
        Index(path)
    assert write_index(store, index.shards, said.append) == path and path.read_bytes() == content
    assert said == [f"{path} is damaged"]
    assert Index(write_index(store, index.shards[:-1], print)).digest != index.digest
    assert Index(write_index(store, index.shards[::-1], print)).digest != index.digest
    with pytest.raises(DataError, match="missing or damaged"):
        Index(store / "index-none.arrow")


def many_rows(store: Path, rows: int) -> Index:
    """A data set of very short rows."""
    directory = store / str(rows)
    directory.mkdir()
    row = Row(*map(np.array, ([5, 6], [0, 1], [6, NO_LABEL])), (0,))
    batch = to_record_batch([row] * 1000)
    facts = ShardFacts("few", 0, 0, 6, 1, {"documents": 1}, ["text"], [])

    def said(path: Path) -> dict[str, Any]:
        return replace(facts, blocks=locate_blocks(path)).to_dict()

    shard = ShardFacts.from_dict(write_sealed(directory / "few.arrow", SCHEMA, [batch] * (rows // 1000), said))
    return Index(write_index(directory, [shard], print))


def test_memory_does_not_depend_on_the_size_of_the_data(store: Path) -> None:
    """What Python and numpy allocate to open a data set and to read from it; what is memory-mapped is the system's."""
    peaks = []
    for rows in (2_000, 200_000):
        directory = store / str(many_rows(store, rows) and rows)
        (path,) = directory.glob("index-*.arrow")
        tracemalloc.start()
        index = Index(path)
        batches = fresh(directory, index, size=64)
        for step in range(20):
            batches.read(step, 1, 4)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert path.stat().st_size > 20 * rows
    assert peaks[1] < peaks[0] + 250_000  # the index has four million bytes more
