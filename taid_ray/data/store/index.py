"""The index of a data set: where each of its rows is, how many tokens it has, and how many of them carry loss.

It is one Arrow file of twenty bytes per row, memory-mapped by every reader of a node, and a header with the shards in the
order of the data. Row numbers count the rows of all shards, one shard after another.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from taid_ray.data.store.sealed import read_sealed, write_sealed
from taid_ray.data.store.shard import Block, ShardFacts, row_sizes
from taid_ray.errors import DataError
from taid_ray.files import read_json

COLUMNS = ("first_token", "tokens", "first_sample", "samples", "loss_tokens")
"""Per row: places of its first token and sample in the block, their numbers, and the number of loss positions; uint32."""
SCHEMA = pa.schema([pa.field(name, pa.uint32(), nullable=False) for name in COLUMNS])


@dataclass(frozen=True)
class Place:
    """Where a row is."""

    digest: str
    """Of the shard."""
    first_document: int
    """Number, from 1, of the first document of the shard's span in the data set."""
    block: Block
    row: int
    """Of the data set."""


class Index:
    """A data set's rows, as an index file describes them."""

    def __init__(self, path: Path) -> None:
        """Opens an index by memory mapping. Raises DataError if it is not there whole."""
        said = read_json(path.with_suffix(".json"))
        if said is None or not path.is_file() or path.stat().st_size != said["size"]:
            raise DataError(
                f"the index {path} of encoded data is missing or damaged; start the run again to have it made"
            )
        self._columns = pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)
        self.digest: str = said["digest"]
        """Identifies the rows of all shards and their order."""
        self.shards = [ShardFacts.from_dict(shard) for shard in said["shards"]]
        first_documents = np.cumsum([1, *(shard.documents for shard in self.shards)]).tolist()
        self._blocks = [
            (shard.digest, first, block)
            for shard, first in zip(self.shards, first_documents, strict=False)
            for block in shard.blocks
        ]
        self._first_rows = np.cumsum([0, *(block.rows for _, _, block in self._blocks)]).tolist()

    @property
    def rows(self) -> int:
        """Number of rows."""
        return int(self._first_rows[-1])

    def column(self, name: str) -> NDArray[np.uint32]:
        """Returns one of COLUMNS for all rows, memory-mapped."""
        values: NDArray[np.uint32] = self._columns.column(name).to_numpy()
        return values

    def place(self, row: int) -> Place:
        """Finds the shard and the block of a row."""
        digest, first_document, block = self._blocks[bisect_right(self._first_rows, row) - 1]
        return Place(digest, first_document, block, row)

    def totals(self) -> dict[str, int]:
        """Adds up, over all shards, tokens, loss_tokens, and every count of documents."""
        counts = [shard.counts | {"tokens": shard.tokens, "loss_tokens": shard.loss_tokens} for shard in self.shards]
        return {name: sum(each[name] for each in counts) for name in counts[0]} if counts else {}

    @property
    def highest_id(self) -> int:
        """The largest token id of all rows; -1 without rows."""
        return max((shard.highest_id for shard in self.shards), default=-1)


def write_index(directory: Path, shards: Sequence[ShardFacts], notify: Callable[[str], None]) -> Path:
    """Writes the index of the data set made of these shards, in this order, unless it is there whole; returns its path.

    directory: that of the shards. notify: is told if there was a damaged one. Raises RunError if it cannot be written.
    """
    digest = hashlib.sha256(" ".join(shard.digest for shard in shards).encode()).hexdigest()[:32]
    path = directory / f"index-{digest}.arrow"
    if read_sealed(path, notify) is None:

        def facts(_: Path) -> dict[str, Any]:
            return {"digest": digest, "shards": [shard.to_dict() for shard in shards]}

        write_sealed(path, SCHEMA, _all_rows(directory, shards), facts)
    return path


def _all_rows(directory: Path, shards: Sequence[ShardFacts]) -> Iterator[pa.RecordBatch]:
    """The whole index as one record batch, so that each column is one piece of memory."""
    columns = np.empty((len(COLUMNS), sum(shard.rows for shard in shards)), dtype=np.uint32)
    start = 0
    for shard in shards:
        for tokens, samples, loss_tokens in row_sizes(directory / f"{shard.digest}.arrow"):
            block = columns[:, start : start + len(tokens)]
            block[:] = np.cumsum(tokens) - tokens, tokens, np.cumsum(samples) - samples, samples, loss_tokens
            start += len(tokens)
    yield pa.record_batch([pa.array(column) for column in columns], schema=SCHEMA)
