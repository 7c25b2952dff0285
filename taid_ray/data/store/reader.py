"""Reading of stored rows: any rows by their numbers, and of global batch n just the rows of one rank."""

import os
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from taid_ray.data.batch import NO_LABEL, Ints, Row
from taid_ray.data.batching import share
from taid_ray.data.store.index import Index, Place
from taid_ray.data.store.order import Order
from taid_ray.errors import DataError

OPEN_FILES = 64
"""Shards that a reader keeps open."""
UINT8, INT32, UINT32 = np.dtype("u1"), np.dtype("<i4"), np.dtype("<u4")


class StoredRows:
    """The rows of a data set, read one by one from its shards. Not for use by several threads at once.

    Reads by `pread` instead of memory mapping: a disk that fails, or a file that was cut off, gives an error that says so
    where a mapped page would end the process; and no read brings in more than the row.
    """

    def __init__(self, directory: Path, index: Index) -> None:
        """directory: that of the shards."""
        self._directory, self._index = directory, index
        self._columns = [index.column(name) for name in ("first_token", "tokens", "first_sample", "samples")]
        self._files: OrderedDict[str, int] = OrderedDict()

    def read(self, rows: Ints) -> list[Row]:
        """Reads rows by their numbers. Raises DataError if a shard is missing or too short, OSError if reading fails."""
        return [self._row(self._index.place(row)) for row in rows.tolist()]

    def close(self) -> None:
        """Closes all files. The next read opens them again."""
        while self._files:
            os.close(self._files.popitem()[1])

    def _row(self, place: Place) -> Row:
        first_token, tokens, first_sample, samples = (int(column[place.row]) for column in self._columns)
        block, shift = place.block, first_token % 8
        ids = self._values(place, block.ids_at + 4 * first_token, tokens, UINT32).astype(np.int64)
        bits = self._values(place, block.mask_at + first_token // 8, (shift + tokens + 7) // 8, UINT8)
        starts = self._values(place, block.starts_at + 4 * first_sample, samples, INT32)
        documents = self._values(place, block.documents_at + 4 * first_sample, samples, INT32)
        mask = np.unpackbits(bits, bitorder="little")[shift : shift + tokens].view(bool)
        targets = np.full(tokens, NO_LABEL, dtype=np.int64)
        targets[:-1] = np.where(mask[:-1], ids[1:], NO_LABEL)
        begins = np.zeros(tokens, dtype=np.int64)
        begins[starts] = starts
        positions = np.arange(tokens) - np.maximum.accumulate(begins)
        return Row(ids, positions, targets, tuple((documents + place.first_document).tolist()))

    def _values(self, place: Place, at: int, count: int, dtype: np.dtype[Any]) -> NDArray[Any]:
        """Reads `count` values from byte `at` of the row's shard."""
        content = os.pread(self._open(place.digest), count * dtype.itemsize, at)
        if len(content) != count * dtype.itemsize:
            raise _damaged(self._path(place.digest))
        return np.frombuffer(content, dtype)

    def _open(self, digest: str) -> int:
        """Returns the shard's open file, and closes the one that was not used for longest if there are too many."""
        if digest in self._files:
            self._files.move_to_end(digest)
            return self._files[digest]
        try:
            self._files[digest] = os.open(self._path(digest), os.O_RDONLY)
        except FileNotFoundError:
            raise _damaged(self._path(digest)) from None
        if len(self._files) > OPEN_FILES:
            os.close(self._files.popitem(last=False)[1])
        return self._files[digest]

    def _path(self, digest: str) -> Path:
        return self._directory / f"{digest}.arrow"


@dataclass(frozen=True)
class RankRows:
    """One rank's part of a global batch."""

    rows: list[Row]
    num_loss_tokens: int
    """Loss positions of the GLOBAL batch, from the index: the one denominator, known everywhere without a collective."""
    num_samples: int
    """Samples of the global batch."""


class BatchReader:
    """Global batches as an order of the rows gives them: batch n is positions n * batch_size and following.

    So it depends on the data, the order and n alone, not on how many ranks share it or which batch was read before.
    """

    def __init__(self, stored: StoredRows, index: Index, order: Order, batch_size: int) -> None:
        """batch_size: rows of a global batch."""
        self._stored, self._order, self._batch_size = stored, order, batch_size
        self._loss_tokens, self._samples = index.column("loss_tokens"), index.column("samples")

    def read(self, step: int, rank: int, world_size: int) -> RankRows:
        """Reads the rank's contiguous share of batch `step`, counted from 0. Raises as `StoredRows.read` does."""
        rows = self._order.rows_at(step * self._batch_size, (step + 1) * self._batch_size)
        own = self._stored.read(rows[share(self._batch_size, rank, world_size)])
        return RankRows(own, int(self._loss_tokens[rows].sum()), int(self._samples[rows].sum()))


def _damaged(path: Path) -> DataError:
    return DataError(f"the file {path} of encoded data is missing or damaged; start the run again to have it made anew")
