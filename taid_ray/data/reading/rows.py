"""Reading one data file row by row, whatever its kind."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from taid_ray.data.reading.arrow_rows import arrow_columns, parquet_columns, read_arrow, read_parquet
from taid_ray.data.reading.csv_rows import csv_columns, read_csv, read_tsv, tsv_columns
from taid_ray.data.reading.json_rows import json_columns, read_json
from taid_ray.data.reading.kinds import DataFile, Kind
from taid_ray.data.reading.text_rows import read_text, text_columns

Row: TypeAlias = dict[str, Any]
Reader: TypeAlias = Callable[[Path, Sequence[str], int], Iterator[Row | None]]

READERS: dict[Kind, Reader] = {
    "json": read_json,
    "parquet": read_parquet,
    "csv": read_csv,
    "text": read_text,
    "tsv": read_tsv,
    "arrow": read_arrow,
}
COLUMNS: dict[Kind, Callable[[Path], list[str]]] = {
    "json": json_columns,
    "parquet": parquet_columns,
    "csv": csv_columns,
    "text": text_columns,
    "tsv": tsv_columns,
    "arrow": arrow_columns,
}


def read_rows(file: DataFile, names: Sequence[str], skip: int = 0) -> Iterator[Row | None]:
    """Yields the rows of a file in order; None in place of each of the first `skip`, which are passed over unparsed.

    A row has those of the columns `names` that it has in the file, and perhaps others. Raises OSError, ValueError or an
    error of pyarrow, naming the line where there are lines, for a file that is damaged or not of its kind.
    """
    return READERS[file.kind](file.path, names, skip)


def columns_found(file: DataFile) -> list[str]:
    """Lists the names of a file's columns, of JSON those of its first rows. Raises as `read_rows` does."""
    return COLUMNS[file.kind](file.path)
