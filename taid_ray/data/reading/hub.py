"""Data sets of the Hugging Face hub, by the library datasets, which downloads them and converts them to Arrow files."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import xxhash

from taid_ray.config.data import DataConfig
from taid_ray.data.columns import columns_of
from taid_ray.data.encoding import Columns
from taid_ray.data.reading.arrow_rows import count_arrow_rows
from taid_ray.data.reading.complaints import empty, explained, no_column
from taid_ray.data.reading.kinds import SUPPORTED, DataFile
from taid_ray.data.reading.splits import Choice, counted
from taid_ray.errors import DataError

DIGEST_ROWS = 1000
GUESSING = ("csv", "json")
"""Kinds of files whose columns have no types of their own."""


def load_from_hub(name: str, choice: Choice, streaming: bool) -> Any:
    """Returns a datasets.Dataset, or an IterableDataset if `streaming`. Raises DataError."""
    import datasets

    try:
        with (
            explained(
                choice.source,
                f"cannot be loaded from the hub. Check the name, data.subset and {choice.key}, or name a file",
            ),
            _quiet(),
        ):
            return datasets.load_dataset(name, choice.subset, split=choice.split, streaming=streaming)
    except DataError as error:
        if datasets.config.HF_HUB_OFFLINE and isinstance(error.__context__, ConnectionError):
            raise DataError(
                f"{choice.source} cannot be loaded from the hub, which does not answer, and is not in the cache. "
                f"Name a local file or directory ({SUPPORTED})."
            ) from None
        raise


class HubDocuments:
    """The rows of a data set on the hub."""

    def __init__(self, rows: Any, source: str, config: DataConfig):
        """rows: a datasets.Dataset or IterableDataset.

        Raises DataError if it has no rows, or lacks a required column.
        """
        import datasets

        self._rows, self._source, self._columns = rows, source, columns_of(config)
        self._name = source.partition(": ")[2]
        self._is_stream = not isinstance(rows, datasets.Dataset)
        if config.images_column is not None:
            rows = rows.with_format("arrow")  # as it is stored: else every image would be decoded
        with explained(source, "cannot be read. Repair the data"):
            first = next(iter(rows), None)
        if first is None:
            raise empty(source)
        present = rows.column_names or list(first)
        for column in self._columns:
            if column.required and not set(column.names) & set(present):
                raise no_column(source, column, present, config.format)
        if not self._is_stream:
            wanted = {name for column in self._columns for name in column.names}
            self._rows = rows.select_columns([name for name in present if name in wanted])

    @property
    def files(self) -> list[DataFile]:
        """The Arrow files in the cache of the library datasets, on this node.

        Raises DataError if there are none, as of data in memory, or if the rows are not all rows of these files.
        """
        found = [] if self._is_stream or self._rows._indices is not None else self._rows.cache_files
        if not found:
            raise DataError(f"{self._source}: there are no files of it in the cache to encode; set data.order=blocks")
        paths = [Path(each["filename"]).absolute() for each in found]
        with explained(self._source, "cannot be read from the cache of the library datasets. Repair or remove that"):
            rows = sum(map(count_arrow_rows, paths))
        if rows != len(self._rows):
            raise DataError(
                f"{self._source}: it has {counted(len(self._rows), 'row')} of the {rows:,} in its files in the cache, and only "
                f"whole files are encoded. Name whole splits in data.split, or set data.order=blocks."
            )
        return [DataFile(path, path.name, "arrow") for path in paths]

    def count(self) -> int | None:
        """Returns the number of rows; None for a stream."""
        return None if self._is_stream else len(self._rows)

    def blocks(self, skip: int, size: int) -> Iterator[tuple[int, Columns]]:
        """Yields the rows after the first `skip`; see `documents.Documents`."""
        blocks = self._rows.skip(skip).iter(size) if self._is_stream else self._slices(skip, size)
        while True:
            with explained(self._source, f"cannot be read after row {skip}. Repair the data"):
                block = next(blocks, None)
            if block is None:
                return
            if not block:
                raise DataError(f"{self._source}: the rows after row {skip} have no columns. Remove them.")
            count = len(next(iter(block.values())))
            yield skip + 1, {column.name: _values(block, column.names, count) for column in self._columns}
            skip += count

    def outline(self) -> dict[str, Any]:
        """Returns the name (`hub`)."""
        return {"hub": self._name}

    def fingerprint(self) -> dict[str, Any]:
        """Returns the outline, and, unless it is a stream, rows and a digest (xxh3) of the columns that are read.

        The revision would not do: it changes with every word of the data set's page.
        """
        found = self.outline()
        if not self._is_stream:
            digest = xxhash.xxh3_128()
            for _, block in self.blocks(0, DIGEST_ROWS):
                digest.update(json.dumps(block, default=repr).encode())
            found |= {"digest": digest.hexdigest(), "rows": len(self._rows)}
        return found

    def description(self) -> list[str]:
        """Says in sentences what is read."""
        rows = "a stream of rows" if self._is_stream else counted(len(self._rows), "row")
        said = [f"{self._source}: {rows} of a data set of the hub"]
        if (kind := self._rows.info.builder_name) in GUESSING:
            said.append(
                f"{self._source}: the library datasets guesses the types of columns in {kind} files; where texts look like "
                f"numbers or dates, clone the data set and name the directory, which is read as it stands"
            )
        return said

    def _slices(self, skip: int, size: int) -> Iterator[Columns]:
        for start in range(skip, len(self._rows), size):
            block = self._rows[start : start + size]
            yield block if isinstance(block, dict) else block.to_pydict()


def _values(block: Columns, names: Sequence[str], count: int) -> list[Any]:
    """Lists of each row the first value that it has under one of the names; None without any."""
    found = [block[name] for name in names if block.get(name)]
    if len(found) == 1:
        return found[0]
    rows = zip(*found, strict=True) if found else [()] * count
    return [next((value for value in row if value is not None), None) for row in rows]


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences the log of `datasets`, whose errors are reported here; downloads keep their progress bars."""
    import datasets

    verbosity = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)
