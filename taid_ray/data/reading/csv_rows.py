"""Rows of CSV and TSV files by Python's csv module: every cell is the text that stands there, also `NA`, `007` and `True`."""

import csv
import io
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from taid_ray.data.reading.kinds import not_utf8, open_bytes


def read_delimited(path: Path, names: Sequence[str], skip: int, delimiter: str) -> Iterator[dict[str, Any] | None]:
    """Yields the records after the first one, which holds the names of the columns. See `rows.read_rows`.

    Blank lines are passed over. Raises ValueError, naming the line on which the record ends, for a record with another
    number of fields than the first one, for damaged quotes, and if a column of `names` is there twice.
    """
    with _records(path, delimiter) as records:
        header: list[str] = next((record for record in records if record), [])
        width = len(header)
        places = {name: _only_place(header, name) for name in names if name in header}
        for record in records:
            blank = len(record) == 1 and (width > 1 or record[0]) and not record[0].strip()
            if not record or blank:
                continue
            if skip:
                skip -= 1
                yield None
                continue
            if len(record) != width:
                raise ValueError(f"line {records.line_num} has {len(record)} fields where the first line names {width}")
            yield {name: record[place] for name, place in places.items()}


def delimited_columns(path: Path, delimiter: str) -> list[str]:
    """Lists the columns that the first record names."""
    with _records(path, delimiter) as records:
        return next((record for record in records if record), [])


read_csv, read_tsv = partial(read_delimited, delimiter=","), partial(read_delimited, delimiter="\t")
csv_columns, tsv_columns = partial(delimited_columns, delimiter=","), partial(delimited_columns, delimiter="\t")


@contextmanager
def _records(path: Path, delimiter: str) -> Iterator[Any]:
    """A csv.reader over the file."""
    csv.field_size_limit(sys.maxsize)  # a document may be longer than the 128 KiB that are allowed otherwise
    with open_bytes(path) as file, io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as lines:
        records = csv.reader(lines, delimiter=delimiter, strict=True)
        try:
            yield records
        except UnicodeDecodeError:
            raise not_utf8(path) from None
        except csv.Error as error:
            raise ValueError(f"line {records.line_num}: {error}") from None


def _only_place(header: list[str], name: str) -> int:
    if header.count(name) > 1:
        raise ValueError(f"the first line names the column {name!r} {header.count(name)} times")
    return header.index(name)
