"""Reading of stored rows: any rows by their numbers, and of global batch n just the rows of one rank."""

import os
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from taid_ray.data.batch import NO_LABEL, Ints, Row
from taid_ray.data.batching import share
from taid_ray.data.store.index import Index, Place
from taid_ray.data.store.order import Order
from taid_ray.errors import DataError

OPEN_FILES = 64
"""Shards that a reader keeps open."""


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
        block, number = place.block, self._open(place.digest)

        def values(base: int, first: int, count: int, dtype: DTypeLike = np.int32) -> NDArray[Any]:
            size = np.dtype(dtype).itemsize
            content = os.pread(number, count * size, base + first * size)
            if len(content) != count * size:
                raise _damaged(self._path(place.digest))
            return np.frombuffer(content, dtype)

        ids = values(block.ids_at, first_token, tokens, np.uint32).astype(np.int64)
        bits = values(block.mask_at, first_token // 8, (first_token % 8 + tokens + 7) // 8, np.uint8)
        mask = np.unpackbits(bits, bitorder="little")[first_token % 8 :][:tokens].astype(bool)
        starts = values(block.starts_at, first_sample, samples)
        documents = values(block.documents_at, first_sample, samples)
        positions = np.arange(tokens)
        if samples > 1:
            positions -= np.repeat(starts, np.diff(starts, append=tokens))
        targets = np.where(mask, np.roll(ids, -1), NO_LABEL)
        return Row(ids, positions, targets, tuple((documents + place.first_document).tolist()))

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
