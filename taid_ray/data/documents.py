"""Documents: the rows of `data.train` or `data.valid`, in blocks of the columns that a format reads, and what was read."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Protocol

from taid_ray.config.data import DataSource
from taid_ray.data.columns import Column, columns_of, lacking
from taid_ray.data.encoding import Columns
from taid_ray.data.reading.complaints import empty, explained, no_column
from taid_ray.data.reading.files import is_local, select_files
from taid_ray.data.reading.hub import HubDocuments, load_from_hub
from taid_ray.data.reading.kinds import DataFile, digest_of
from taid_ray.data.reading.retried import size_of
from taid_ray.data.reading.rows import Row, columns_found, read_rows
from taid_ray.data.reading.splits import Choice, counted, listed
from taid_ray.errors import DataError

UNREADABLE = "cannot be read. Check its permissions"


class Documents(Protocol):
    """Rows that can be read again and again, in the same order."""

    @property
    def files(self) -> list[DataFile]:
        """The files that hold the rows, in order. Raises DataError for data without files of their own."""

    def count(self) -> int | None:
        """Counts the rows; None for a stream. The first time all of them are read and parsed, so that damage shows."""

    def blocks(self, skip: int, size: int) -> Iterator[tuple[int, Columns]]:
        """Yields the rows after the first `skip`, in blocks of `size` (the last may be shorter) with the first row's number.

        Rows are numbered from 1. Only the columns that the format reads, each under its preferred name; None where a row
        lacks one. Raises DataError for what cannot be read.
        """

    def outline(self) -> dict[str, Any]:
        """Returns what of the fingerprint costs nothing."""

    def fingerprint(self) -> dict[str, Any]:
        """Returns what tells these data from others, see `data/fingerprint.py`. Reads all of them, unless they are a stream."""

    def description(self) -> list[str]:
        """Says in sentences how the data were understood."""


def open_documents(config: DataSource, which: Literal["train", "valid"]) -> Documents:
    """Opens `config.train` or `config.valid`: a local file, a directory, or a data set of the hub.

    Raises DataError, naming the key that it was given under, if it cannot be read, is empty, or if its first file lacks a column
    that the format needs. Damage further on shows when it is read, or in `count`.
    """
    of_valid = which == "valid" and config.valid is not None
    name = config.valid if of_valid and config.valid is not None else config.train
    given = config.valid_key if which == "valid" else config.key
    source, key = f"{given}: {name}", "data.valid_split" if of_valid else "data.split"
    choice = Choice(source, key, config.valid_split if of_valid else config.split, config.subset)
    try:
        local = is_local(name)
    except ValueError as error:
        raise DataError(f"{source}: {error}. Name an existing one.") from None
    if not local:
        return HubDocuments(load_from_hub(name, choice, config.streaming), source, config)
    with explained(source, UNREADABLE):
        files, said = select_files(Path(name).expanduser(), choice)
    return FileDocuments(files, said, choice.source, config)


class FileDocuments:
    """The rows of local files, one file after another."""

    def __init__(self, files: list[DataFile], said: list[str], source: str, config: DataSource):
        """said: sentences on the choice of the files. source: begins every message, the key of the data and their name.

        Raises DataError if there is no row, or if the first file with rows lacks a required column.
        """
        self.files, self._said, self._source, self._config = files, said, source, config
        self._columns = columns_of(config)
        self._names = [name for column in self._columns for name in column.names]
        self._counts: dict[str, int] = {}
        self._taken: dict[str, str] = {}  # names that stand in for columns, with the keys of these
        self._check_first_rows()

    def count(self) -> int | None:
        """Counts the rows; None with `data.streaming`. The first time all of them are read and parsed. Raises DataError."""
        if self._config.streaming:
            return None
        for file in self.files:
            if file.name not in self._counts:
                self._counts[file.name] = sum(1 for _ in self._file_rows(file, 0))
        return sum(self._counts.values())

    def blocks(self, skip: int, size: int) -> Iterator[tuple[int, Columns]]:
        """Yields the rows after the first `skip`; see `Documents`."""
        rows = self._rows(skip)
        while block := list(islice(rows, size)):
            yield skip + 1, {column.name: [_value(row, column) for row in block] for column in self._columns}
            skip += len(block)

    def outline(self) -> dict[str, Any]:
        """Returns `files`: name, kind and bytes of each."""
        with explained(self._source, UNREADABLE):
            sizes = [size_of(file.path) for file in self.files]
        found = zip(self.files, sizes, strict=True)
        return {"files": [{"name": file.name, "kind": file.kind, "bytes": size} for file, size in found]}

    def fingerprint(self) -> dict[str, Any]:
        """Returns the outline; without `data.streaming` each file has its digest (xxh3) and rows, too."""
        found = self.outline()
        if self.count() is not None:
            with explained(self._source, UNREADABLE):
                for file, said in zip(self.files, found["files"], strict=True):
                    said |= {"digest": digest_of(file.path), "rows": self._counts[file.name]}
        return found

    def description(self) -> list[str]:
        """Says in sentences which files are read, what was left out, and what columns are taken for others."""
        kinds = " and ".join(sorted({file.kind for file in self.files}))
        names = listed([file.name for file in self.files])
        rows = f", {counted(sum(self._counts.values()), 'row')}" if len(self._counts) == len(self.files) else ""
        said = [f"{self._source}: {counted(len(self.files), 'file')} of the kind {kinds}{rows} ({names})", *self._said]
        if without := [name for name, rows in self._counts.items() if not rows]:
            said.append(f"{self._source}: without a row: {listed(without)}")
        if self._config.streaming:
            said.append(
                f"{self._source}: a stream; when the run is resumed, names and sizes of files are compared only"
            )
        said += [f"{self._source}: column {name!r} is read as {key}" for name, key in self._taken.items()]
        return said

    def _check_first_rows(self) -> None:
        """Reads on until every required column was there."""
        missing, found = self._required(), False
        for file in self.files:
            rows = self._file_rows(file, 0)
            for row in rows if file.kind == "json" else islice(rows, 1):  # others have the same columns in all rows
                missing, found = self._still_missing(missing, row or {}), True
                if not missing:
                    return
        if not found:
            raise empty(self._source)
        names = [name for file in self.files for name in columns_found(file)]
        raise no_column(self._source, missing[0], list(dict.fromkeys(names)), self._config.format)

    def _required(self) -> list[Column]:
        return [column for column in self._columns if column.required]

    def _still_missing(self, columns: list[Column], row: Row) -> list[Column]:
        """Those of the columns that the row lacks. Of the others, notes the names that it has them under."""
        for column in columns:
            name = next((name for name in column.names if name in row), column.name)
            if name != column.name:
                self._taken[name] = column.key
        return [column for column in columns if row.keys().isdisjoint(column.names)]

    def _rows(self, skip: int) -> Iterator[Row]:
        for file in self.files:
            if self._counts.get(file.name, skip + 1) <= skip:
                skip -= self._counts[file.name]
                continue
            for row in self._file_rows(file, skip):
                if row is None:
                    skip -= 1
                else:
                    yield row

    def _file_rows(self, file: DataFile, skip: int) -> Iterator[Row | None]:
        """Yields the rows of a file, None in place of the first `skip`.

        Raises DataError if none of the rows has a required column, of JSON at the end; of the prompt's columns one is enough.
        """
        source = f"{self._source.partition(': ')[0]}: {file.path}"
        missing, found = self._required(), False
        with explained(source, f"cannot be read as {file.kind}. Repair or convert the file"):
            for row in read_rows(file, self._names, skip):
                if row is not None and missing:
                    missing = self._still_missing(missing, row)
                    if file.kind != "json":  # all rows have the columns of the first one
                        self._check_lacking(file, source, missing)
                        missing = []
                found = True
                yield row
            if found and not skip:
                self._check_lacking(file, source, missing)

    def _check_lacking(self, file: DataFile, source: str, missing: list[Column]) -> None:
        if lost := lacking(self._columns, {column.name for column in self._columns if column not in missing}):
            raise no_column(source, lost[0], columns_found(file), self._config.format)


def _value(row: Row, column: Column) -> Any:
    """The first value that the row has under one of the column's names; None without any."""
    for name in column.names:  # a plain loop, because it runs for every row of every epoch
        if (value := row.get(name)) is not None:
            return value
    return None
