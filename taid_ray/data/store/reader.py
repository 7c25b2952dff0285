"""Reading of stored rows: any rows by their numbers, and of global batch n just the rows of one rank."""

import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from taid_ray.data.batch import NO_LABEL, Ints, Row
from taid_ray.data.batching import share
from taid_ray.data.store.index import Index, Place
from taid_ray.data.store.order import Order
from taid_ray.data.store.pack import pack_name
from taid_ray.data.store.shard import read_image
from taid_ray.errors import DataError
from taid_ray.media.reader import resolved
from taid_ray.media.refs import ImageRef
from taid_ray.storage import persistently

OPEN_FILES = 64
"""Shards that a reader keeps open."""
UINT8, INT32, UINT32 = np.dtype("u1"), np.dtype("<i4"), np.dtype("<u4")


class StoredRows:
    """The rows of one or several sources, numbered one after the other. Not for use by several threads at once.

    Reads by `pread` instead of memory mapping: a disk that fails, or a file that was cut off, gives an error that says so
    where a mapped page would end the process; and no read brings in more than the row.
    """

    def __init__(self, indexes: Sequence[Index], images_directories: Sequence[str | None] = ()) -> None:
        """images_directories: those of the sources, see `PreparedSource`; none for sources without images."""
        self._indexes, self._images_directories = indexes, images_directories
        self._first_rows = np.cumsum([0, *(index.totals.rows for index in indexes)]).tolist()
        self._first_documents = np.cumsum([1, *(index.totals.documents for index in indexes)]).tolist()
        self._files: OrderedDict[Path, int] = OrderedDict()

    def read(self, rows: Ints) -> list[Row]:
        """Reads rows by their numbers. Raises DataError if a shard is missing, cut off, or cannot be read."""
        found: dict[int, Row] = {}
        for number, index, where in self._by_index(rows):
            places = index.places(rows[where] - self._first_rows[number])
            for at, place in zip(where.tolist(), places, strict=True):
                file = index.store.fetch(f"{place.shard}.arrow")
                row = self._row(file, place, self._first_documents[number] + place.first_document, number)
                found[at] = row if place.media_at is None else replace(row, images=self._images(file, place, number))
        return [found[at] for at in range(len(rows))]

    def total(self, column: str, rows: Ints) -> int:
        """Adds up a column of the index, one of `index.ROW_COLUMNS`, over these rows."""
        return sum(
            int(index.column(column)[rows[where] - self._first_rows[number]].sum())
            for number, index, where in self._by_index(rows)
        )

    def close(self) -> None:
        """Closes all files. The next read opens them again."""
        while self._files:
            os.close(self._files.popitem()[1])

    def _by_index(self, rows: Ints) -> Iterator[tuple[int, Index, Ints]]:
        """Yields each index that holds some of the rows, with its number, and at which places of `rows` they are."""
        for number, index in enumerate(self._indexes):
            inside = (rows >= self._first_rows[number]) & (rows < self._first_rows[number + 1])
            if (where := np.flatnonzero(inside)).size:
                yield number, index, where

    def _row(self, file: Path, place: Place, first_document: int, source: int) -> Row:
        tokens, samples = place.tokens, place.samples
        ids = self._values(file, place.ids_at, tokens, UINT32).astype(np.int64)
        bits = self._values(file, place.mask_at, (place.mask_shift + tokens + 7) // 8, UINT8)
        starts = self._values(file, place.starts_at, samples, INT32)
        documents = self._values(file, place.documents_at, samples, INT32)
        mask = np.unpackbits(bits, bitorder="little")[place.mask_shift : place.mask_shift + tokens].view(bool)
        targets = np.full(tokens, NO_LABEL, dtype=np.int64)
        targets[:-1] = np.where(mask[:-1], ids[1:], NO_LABEL)
        begins = np.zeros(tokens, dtype=np.int64)
        begins[starts] = starts
        positions = np.arange(tokens) - np.maximum.accumulate(begins)
        return Row(ids, positions, targets, tuple((documents + first_document).tolist()), source)

    def _images(self, file: Path, place: Place, number: int) -> tuple[ImageRef, ...]:
        """Reads the references of a row of source `number`, with places that are found on this node."""
        assert place.media_at is not None
        rows_at, starts_at, text_at = place.media_at
        first, behind = self._values(file, rows_at + 4 * place.row, 2, INT32).tolist()
        if first == behind:
            return ()
        edges = self._values(file, starts_at + 4 * first, behind - first + 1, INT32).tolist()
        text = self._values(file, text_at + edges[0], edges[-1] - edges[0], UINT8).tobytes()
        refs = [read_image(text[start - edges[0] : stop - edges[0]].decode()) for start, stop in pairwise(edges)]
        store = self._indexes[number].store
        directory = self._images_directories[number] if self._images_directories else None
        found = []
        for ref in refs:
            kind, _, where = ref.place.partition(":")
            if kind == "pack":
                shard, _, part = where.partition("@")
                found.append(replace(ref, place=f"pack:{store.fetch(pack_name(shard))}@{part}"))
            else:
                found.append(replace(ref, place=resolved(ref.place, directory)))
        return tuple(found)

    def _values(self, file: Path, at: int, count: int, dtype: np.dtype[Any]) -> NDArray[Any]:
        """Reads `count` values from byte `at` on, if need be several times."""
        try:
            content = persistently(lambda: self._bytes(file, count * dtype.itemsize, at))
        except OSError as error:
            raise DataError(
                f"the file {file} of encoded data cannot be read ({error}); check the disk or the network that it is on, and "
                f"start the run again"
            ) from None
        if len(content) != count * dtype.itemsize:
            raise _damaged(file)
        return np.frombuffer(content, dtype)

    def _bytes(self, file: Path, count: int, at: int) -> bytes:
        try:
            return os.pread(self._open(file), count, at)
        except FileNotFoundError:
            raise _damaged(file) from None
        except OSError:
            self.close()  # a handle can be stale when the server of a network file system is back
            raise

    def _open(self, file: Path) -> int:
        """Returns the number of the open file, and closes the one that was not used for longest if there are too many."""
        if file in self._files:
            self._files.move_to_end(file)
            return self._files[file]
        self._files[file] = os.open(file, os.O_RDONLY)
        if len(self._files) > OPEN_FILES:
            os.close(self._files.popitem(last=False)[1])
        return self._files[file]


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

    def __init__(self, stored: StoredRows, order: Order, batch_size: int) -> None:
        """batch_size: rows of a global batch."""
        self._stored, self._order, self._batch_size = stored, order, batch_size

    def read(self, step: int, rank: int, world_size: int) -> RankRows:
        """Reads the rank's contiguous share of batch `step`, counted from 0. Raises as `StoredRows.read` does."""
        rows = self._order.rows_at(step * self._batch_size, (step + 1) * self._batch_size)
        own = self._stored.read(rows[share(self._batch_size, rank, world_size)])
        return RankRows(own, self._stored.total("loss_tokens", rows), self._stored.total("samples", rows))


def _damaged(path: Path) -> DataError:
    return DataError(f"the file {path} of encoded data is missing or damaged; start the run again to have it made anew")
