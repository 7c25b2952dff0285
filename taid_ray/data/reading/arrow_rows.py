"""Rows of parquet and Arrow files by pyarrow, of the wanted columns only."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from taid_ray.data.reading.retried import open_retried
from taid_ray.storage import LASTING_ERRORS, persistently

BATCH_ROWS, BATCH_ROWS_OF_BYTES = 1024, 16
"""Rows that are in memory at once; fewer where a column holds bytes, which are images."""
FILE_MARK = b"ARROW1\0\0"
"""Begins an Arrow file with a footer; what follows is as in a stream."""


def read_parquet(path: Path, names: Sequence[str], skip: int) -> Iterator[dict[str, Any] | None]:
    """Yields the rows of a parquet file. See `rows.read_rows`. Whole row groups are passed over unread."""
    import pyarrow.parquet as pq

    with open_retried(path) as source, pq.ParquetFile(source) as file:
        columns = _present(file.schema_arrow.names, names)
        groups = list(range(file.metadata.num_row_groups))
        while groups and skip and file.metadata.row_group(groups[0]).num_rows <= skip:
            for _ in range(file.metadata.row_group(groups.pop(0)).num_rows):
                skip -= 1
                yield None
        for batch in file.iter_batches(_batch_rows(file.schema_arrow, columns), row_groups=groups, columns=columns):
            yield from _rows(batch, columns, skip)
            skip = max(0, skip - batch.num_rows)


def read_row_groups(path: Path, names: Sequence[str], groups: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Yields the rows of some row groups of a parquet file, as `read_parquet` does."""
    import pyarrow.parquet as pq

    with open_retried(path) as source, pq.ParquetFile(source) as file:
        columns = _present(file.schema_arrow.names, names)
        size = _batch_rows(file.schema_arrow, columns)
        for batch in file.iter_batches(size, row_groups=list(groups), columns=columns):
            yield from _full_rows(batch, columns)


def parquet_columns(path: Path) -> list[str]:
    """Lists the columns of a parquet file."""
    return list(parquet_schema(path).names)


def parquet_schema(path: Path) -> Any:
    """Returns the schema of a parquet file."""
    import pyarrow.parquet as pq

    with open_retried(path) as source:
        return pq.read_schema(source)


def parquet_metadata(path: Path) -> Any:
    """Returns what a parquet file says of itself: row groups, their sizes and places."""
    import pyarrow.parquet as pq

    with open_retried(path) as source:
        return pq.read_metadata(source)


def read_arrow(path: Path, names: Sequence[str], skip: int) -> Iterator[dict[str, Any] | None]:
    """Yields the rows of a file of Arrow record batches (a stream, as `datasets` writes, or a file). See `rows.read_rows`."""
    with _batches(path) as (found, batches):
        columns = _present(found, names)
        for batch in batches:
            batch = batch.select(columns)
            batch.validate(full=True)  # a damaged file would be read from wherever its offsets point to in memory
            yield from _rows(batch, columns, skip)
            skip = max(0, skip - batch.num_rows)


def read_batches(path: Path, names: Sequence[str], start: int, stop: int) -> Iterator[dict[str, Any]]:
    """Yields the rows of the record batches that begin at the bytes from `start` to `stop`, as `read_arrow` does."""
    import pyarrow as pa

    with _mapped(path) as source:
        schema = _schema(source)
        columns = _present(schema.names, names)
        source.seek(max(start, source.tell()))
        while source.tell() < stop:
            batch = pa.ipc.read_record_batch(pa.ipc.read_message(source), schema).select(columns)
            batch.validate(full=True)
            yield from _full_rows(batch, columns)


def batch_ends(path: Path) -> list[int]:
    """Lists the byte after each record batch of an Arrow file, without reading more than the headers of the batches.

    Empty if batches cannot be read apart, because they share dictionaries.
    """
    import pyarrow as pa

    ends = []
    with _mapped(path) as source, suppress(EOFError):
        _schema(source)
        while True:
            if pa.ipc.read_message(source).type != "record batch":
                return []
            ends.append(source.tell())
    return ends


def arrow_schema(path: Path) -> Any:
    """Returns the schema of an Arrow file."""
    with _mapped(path) as source:
        return _schema(source)


def count_arrow_rows(path: Path) -> int:
    """Counts the rows of an Arrow file that is not compressed, from the headers of its record batches."""
    with _batches(path) as (_, batches):
        return sum(batch.num_rows for batch in batches)


def arrow_columns(path: Path) -> list[str]:
    """Lists the columns of a file of Arrow record batches."""
    with _batches(path) as (found, _):
        return found


@contextmanager
def _batches(path: Path) -> Iterator[tuple[list[str], Iterator[Any]]]:
    import pyarrow as pa

    with _mapped(path) as source:
        try:
            stream = pa.ipc.open_stream(source)
        except pa.ArrowInvalid:
            file = pa.ipc.open_file(source)
            names, batches = file.schema.names, map(file.get_batch, range(file.num_record_batches))
        else:
            names, batches = stream.schema.names, iter(stream)
        yield names, batches


def _mapped(path: Path) -> Any:
    """Maps an Arrow file into memory, so that only what is asked for is read.

    Opening it is tried again; a page that cannot be read ends the process, which whoever started it starts again.
    """
    import pyarrow as pa

    return persistently(lambda: pa.memory_map(str(path)), LASTING_ERRORS)


def _schema(source: Any) -> Any:
    """Reads the schema at the beginning, after which the record batches come; a file with a footer has them as a stream does."""
    import pyarrow as pa

    source.seek(len(FILE_MARK) if source.read(len(FILE_MARK)) == FILE_MARK else 0)
    return pa.ipc.read_schema(source)


def _present(found: list[str], names: Sequence[str]) -> list[str]:
    """The wanted columns that are there. Raises ValueError if one of them is there twice."""
    for name in names:
        if found.count(name) > 1:
            raise ValueError(f"it has {found.count(name)} columns of the name {name!r}")
    return [name for name in names if name in found]


def _rows(batch: Any, columns: list[str], skip: int) -> Iterator[dict[str, Any] | None]:
    """The rows of a record batch, None in place of the first `skip`."""
    for _ in range(min(skip, batch.num_rows)):
        yield None
    yield from _full_rows(batch.slice(min(skip, batch.num_rows)), columns)


def _full_rows(batch: Any, columns: list[str]) -> Iterator[dict[str, Any]]:
    size = _batch_rows(batch.schema, columns)
    for start in range(0, batch.num_rows, size):
        part = batch.slice(start, size)
        values = [_python(part.column(name)) for name in columns]
        for number in range(part.num_rows):
            yield {name: column[number] for name, column in zip(columns, values, strict=True)}


def _batch_rows(schema: Any, columns: list[str]) -> int:
    """Rows to have in memory at once, by the types of the columns that are read."""
    return BATCH_ROWS_OF_BYTES if any("binary" in str(schema.field(name).type) for name in columns) else BATCH_ROWS


def _python(array: Any) -> list[Any]:
    values = array.to_pylist()
    return [_decoded(value, array.type) for value in values] if "extension<arrow.json>" in str(array.type) else values


def _decoded(value: Any, kind: Any) -> Any:
    """A value with the JSON in it parsed, as which `datasets` stores what has another type in every row."""
    import pyarrow as pa

    if value is None:
        return None
    if str(kind) == "extension<arrow.json>":
        return json.loads(value)
    if pa.types.is_struct(kind):
        return {field.name: _decoded(value[field.name], field.type) for field in kind}
    if hasattr(kind, "value_type") and isinstance(value, list):
        return [_decoded(each, kind.value_type) for each in value]
    return value
