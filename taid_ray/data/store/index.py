"""The index of a data set: where each of its rows is, how many tokens it has, and how many of them carry loss.

    index-DATA.arrow    twenty bytes per row; beside it in .json what is known of the data set as a whole
    blocks-DATA.arrow   where the blocks of rows are in the shards

Both are memory-mapped, so that a node holds them once, and as much of them as is used. Row numbers count the rows of all
shards, one shard after another, in the order of the data.
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from taid_ray.data.batch import Ints
from taid_ray.data.store.remote import Location, Store, inside, open_store, parted
from taid_ray.data.store.sealed import making, read_sealed, sealed_facts, write_sealed
from taid_ray.data.store.shard import MEDIA_TOTALS, Block, ShardFacts, row_sizes
from taid_ray.errors import DataError

ROW_COLUMNS = ("first_token", "tokens", "first_sample", "samples", "loss_tokens")
"""Places of a row's first token and sample in its block, and their numbers, and the number of loss positions."""
BLOCK_COLUMNS = ("first_row", "first_document", "ids_at", "mask_at", "starts_at", "documents_at")
ROWS = pa.schema([pa.field(name, pa.uint32(), nullable=False) for name in ROW_COLUMNS])
BLOCKS = pa.schema(
    [
        pa.field("shard", pa.string(), nullable=False),
        *(pa.field(name, pa.int64(), nullable=False) for name in BLOCK_COLUMNS),
    ]
)


MEDIA_COLUMNS = ("media_rows_at", "media_starts_at", "media_text_at")
"""The three places of `Block.media_at`, -1 in a block without images; the columns are there only if one has some."""


class Place(NamedTuple):
    """Where a row is: in which shard, at which bytes of it, and how much."""

    shard: str
    ids_at: int
    mask_at: int
    mask_shift: int
    """Bits of the first byte of the mask that belong to the row before."""
    starts_at: int
    documents_at: int
    tokens: int
    samples: int
    first_document: int
    """Number in the data set, from 0, of the first document of the shard."""
    row: int = 0
    """Number of the row in its block, from 0."""
    media_at: tuple[int, int, int] | None = None
    """`Block.media_at`."""


@dataclass(frozen=True)
class Totals:
    """What is known of a data set as a whole."""

    digest: str
    """Identifies the rows of all shards and their order."""
    rows: int
    documents: int
    """Number of documents, those included that are left out for validation."""
    tokens: int
    loss_tokens: int
    highest_id: int
    """The largest token id; -1 without rows."""
    counts: dict[str, int]
    """What became of the documents, as the encoder counts."""
    media: dict[str, int] | None = None
    """With images: their number and bytes (`images`, `image_bytes`), and the most of a row (`largest_row_images`,
    `largest_row_image_bytes`)."""


class Index:
    """The rows of a data set, as its index describes them."""

    def __init__(self, location: Location) -> None:
        """Opens the index that `write_index` wrote. Raises DataError if it is not there whole."""
        place, name = parted(location)
        self.store = open_store(place)
        """That of the shards."""
        path, blocks_path = (self.store.fetch(file) for file in (name, name.replace("index-", "blocks-")))
        said = sealed_facts(path)
        if said is None or sealed_facts(blocks_path) is None:
            raise DataError(
                f"the index {path} of encoded data is missing or damaged on node {os.uname().nodename}; make sure that all nodes "
                f"see the directory that data.store names, and start the run again to have it made"
            )
        self.totals = Totals(**{name: said[name] for name in Totals.__dataclass_fields__ if name in said})
        rows, blocks = _mapped(path), _mapped(blocks_path)
        self._columns: dict[str, NDArray[np.uint32]] = {name: rows.column(name).to_numpy() for name in ROW_COLUMNS}
        self._shards = blocks.column("shard")
        self._first_row, *self._block_columns = (blocks.column(name).to_numpy() for name in BLOCK_COLUMNS)
        media = [blocks.column(name).to_numpy() for name in MEDIA_COLUMNS if name in blocks.schema.names]
        self._media: NDArray[np.int64] | None = np.stack(media, axis=1) if media else None

    def column(self, name: str) -> NDArray[np.uint32]:
        """Returns one of ROW_COLUMNS for all rows, memory-mapped."""
        return self._columns[name]

    def places(self, rows: Ints) -> list[Place]:
        """Finds rows by their numbers."""
        sizes = (self._columns[name][rows].astype(np.int64) for name in ROW_COLUMNS[:4])
        first_token, tokens, first_sample, samples = sizes
        blocks = np.searchsorted(self._first_row, rows, side="right") - 1
        first_document, ids_at, mask_at, starts_at, documents_at = (column[blocks] for column in self._block_columns)
        shards = [self._shards[block].as_py() for block in blocks.tolist()]
        numbers = (
            ids_at + 4 * first_token,
            mask_at + first_token // 8,
            first_token % 8,
            starts_at + 4 * first_sample,
            documents_at + 4 * first_sample,
            tokens,
            samples,
            first_document,
        )
        found = list(map(Place, shards, *(values.tolist() for values in numbers)))
        if self._media is None:
            return found
        rows_in_blocks, media = (rows - self._first_row[blocks]).tolist(), self._media[blocks].tolist()
        return [
            place._replace(row=row, media_at=None if at[0] < 0 else tuple(at))
            for place, row, at in zip(found, rows_in_blocks, media, strict=True)
        ]


def write_index(location: Location, shards: Sequence[ShardFacts], notify: Callable[[str], None]) -> Location:
    """Writes the index of the data set made of these shards, in this order, unless it is there whole; returns its location.

    location: the store of the shards, a directory or a URI, which needs every shard on this node then. notify: is told if there
    was a damaged index. Raises RunError if it cannot be written, DataError if a shard is missing.
    """
    digest = hashlib.sha256(" ".join(map(_identity, shards)).encode()).hexdigest()[:32]
    store = open_store(location)
    path, blocks_path = (store.directory / f"{name}-{digest}.arrow" for name in ("index", "blocks"))
    found = [store.find(file.name, notify) is not None for file in (blocks_path, path)]
    if not all(found):
        totals = {name: value for name, value in asdict(_totals(digest, shards)).items() if value is not None}
        blocks = _all_blocks(shards)
        with making(path, wait=True):
            if read_sealed(blocks_path, lambda _: None) is None:
                write_sealed(blocks_path, blocks.schema, [blocks], lambda _: {})
            if read_sealed(path, lambda _: None) is None:
                write_sealed(path, ROWS, _all_rows(store, shards), lambda _: totals)
            for file in (blocks_path, path):
                store.publish(file.name)
    return inside(location, path.name)


def _mapped(path: Path) -> pa.RecordBatch:
    """The one record batch of an Arrow file."""
    return pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)


def _totals(digest: str, shards: Sequence[ShardFacts]) -> Totals:
    names = dict.fromkeys(name for shard in shards for name in shard.counts)
    return Totals(
        digest,
        rows=sum(shard.rows for shard in shards),
        documents=sum(shard.documents for shard in shards),
        tokens=sum(shard.tokens for shard in shards),
        loss_tokens=sum(shard.loss_tokens for shard in shards),
        highest_id=max((shard.highest_id for shard in shards), default=-1),
        counts={name: sum(shard.counts.get(name, 0) for shard in shards) for name in names},
        media=together([shard.media for shard in shards]),
    )


def together(parts: Sequence[dict[str, Any] | None]) -> dict[str, int] | None:
    """Puts what is known of the images of several parts of data together, as in `Totals.media`; None if no part has any."""
    found = [part for part in parts if part is not None]
    return {name: take(part[name] for part in found) for name, take in MEDIA_TOTALS.items()} if found else None


def _identity(shard: ShardFacts) -> str:
    """Identifies the rows of a shard: its name, and its images, which may be replaced where its documents only name them."""
    return shard.digest if shard.media is None else f"{shard.digest}:{shard.media['digest']}"


def _all_blocks(shards: Sequence[ShardFacts]) -> pa.RecordBatch:
    first_documents = np.cumsum([0, *(shard.documents for shard in shards)]).tolist()
    found: list[tuple[str, int, Block]] = [
        (shard.digest, first, block)
        for shard, first in zip(shards, first_documents, strict=False)
        for block in shard.blocks
    ]
    blocks = [block for _, _, block in found]
    columns = [
        np.cumsum([0, *(block.rows for block in blocks)])[:-1],
        [first for _, first, _ in found],
        *([getattr(block, name) for block in blocks] for name in BLOCK_COLUMNS[2:]),
    ]
    schema = BLOCKS
    if any(block.media_at for block in blocks):
        columns += np.array([block.media_at or (-1, -1, -1) for block in blocks]).T.tolist()
        for name in MEDIA_COLUMNS:
            schema = schema.append(pa.field(name, pa.int64(), nullable=False))
    digests = pa.array([digest for digest, _, _ in found], pa.string())
    return pa.record_batch([digests, *(pa.array(column, pa.int64()) for column in columns)], schema=schema)


def _all_rows(store: Store, shards: Sequence[ShardFacts]) -> Iterator[pa.RecordBatch]:
    """The whole index as one record batch, so that each column is one piece of memory."""
    columns = np.empty((len(ROW_COLUMNS), sum(shard.rows for shard in shards)), dtype=np.uint32)
    start = 0
    for shard in shards:
        for tokens, samples, loss_tokens in row_sizes(store.fetch(f"{shard.digest}.arrow")):
            block = columns[:, start : start + len(tokens)]
            block[:] = np.cumsum(tokens) - tokens, tokens, np.cumsum(samples) - samples, samples, loss_tokens
            start += len(tokens)
    yield pa.record_batch([pa.array(column) for column in columns], schema=ROWS)
