"""Spans: the parts of data files that are encoded one by one, each by one task, into one shard.

Where a span begins and ends is a function of its file alone, never of the number of tasks, so any number of them makes the
same shards; and of a large file of which only a part was changed the other spans keep their shards.
"""

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeAlias

import xxhash

from taid_ray.config.data import DataSource
from taid_ray.data.columns import columns_of
from taid_ray.data.documents import open_documents
from taid_ray.data.reading.arrow_rows import (
    arrow_schema,
    batch_ends,
    parquet_metadata,
    parquet_schema,
    read_batches,
    read_row_groups,
)
from taid_ray.data.reading.complaints import explained
from taid_ray.data.reading.json_rows import is_json_lines, objects_of_line
from taid_ray.data.reading.kinds import COMPRESSIONS, DataFile, not_utf8
from taid_ray.data.reading.retried import BUFFER_BYTES, open_retried, size_of
from taid_ray.data.reading.rows import read_rows

SPAN_BYTES = 16 << 20
"""About as much of a file makes a span: some seconds of work, and a shard of some ten megabytes."""

Rows: TypeAlias = Iterator[dict[str, Any] | None]
"""Documents; None in place of one that is left out."""


@dataclass(frozen=True)
class Span:
    """A part of a data file."""

    file: DataFile
    part: Literal["all", "lines", "row_groups", "batches"]
    """What `start` and `stop` count: nothing, for the whole file; bytes, of which the lines that begin there; row groups; bytes,
    of which the record batches that begin there."""
    start: int = 0
    stop: int = 0
    skip: int = 0
    """Documents at its beginning that are left out, because they are for validation."""

    def __str__(self) -> str:
        return str(self.file.path) + ("" if self.part == "all" else f" ({self.part} {self.start} to {self.stop})")


def spans_of(config: DataSource) -> list[Span]:
    """Divides all files of a source of training data into spans, in order, without the documents that are kept for validation.

    The Arrow files of a data set of the hub are in the cache of the library datasets, so all nodes that read spans must see
    that: HF_HOME must be on storage that they share. Raises DataError if the files cannot be read, or are not the rows of a
    data set of the hub.
    """
    documents = open_documents(config, "train")
    names = [name for column in columns_of(config) for name in column.names]
    with explained(f"{config.key}: {config.train}", "cannot be read. Repair or convert it"):
        spans = [span for file in documents.files for span in cut(file)]
        return without_first(spans, config.valid_documents if config.valid is None else 0, names)


def cut(file: DataFile) -> list[Span]:
    """Divides a file into spans of about SPAN_BYTES, if it can be divided: plain JSON Lines and text, parquet and Arrow.

    Others (csv, where a line break may be inside a cell; compressed files; one JSON value; Arrow with dictionaries) are one
    span. Raises OSError, ValueError or an error of pyarrow if the file cannot be read.
    """
    path = file.path
    if file.kind == "parquet":
        return _row_group_spans(file)
    size = size_of(path)
    if file.kind == "arrow" and size > SPAN_BYTES:
        return _batch_spans(file) or [Span(file, "all")]
    is_plain = size > SPAN_BYTES and path.suffix.lower() not in COMPRESSIONS
    if is_plain and (file.kind == "text" or (file.kind == "json" and is_json_lines(path))):
        count = -(-size // SPAN_BYTES)
        return [Span(file, "lines", size * n // count, size * (n + 1) // count) for n in range(count)]
    return [Span(file, "all")]


def without_first(spans: Sequence[Span], documents: int, names: Sequence[str]) -> list[Span]:
    """Returns the spans with their first `documents` documents, counted over all of them, left out.

    names: the columns to read, as for `read_documents`, which raises the same errors.
    """
    result = []
    for span in spans:
        skip = sum(1 for _ in islice(read_documents(span, names), documents))
        documents -= skip
        result.append(replace(span, skip=skip))
    return result


def hash_content(span: Span) -> str:
    """Hashes the bytes of the span (XXH3, 128 bits), and how they are read."""
    result = xxhash.xxh3_128(f"{span.file.kind} {span.file.path.suffix.lower()} {span.part}".encode())
    with open_retried(span.file.path) as file:
        begin, end = _byte_range(span, file)
        file.seek(begin)
        while begin < end and (piece := file.read(min(BUFFER_BYTES, end - begin))):
            result.update(piece)
            begin += len(piece)
    if span.part == "row_groups":
        result.update(str(parquet_schema(span.file.path)).encode())
    if span.part == "batches":
        result.update(str(arrow_schema(span.file.path)).encode())
    return result.hexdigest()


def read_documents(span: Span, names: Sequence[str]) -> Rows:
    """Yields the documents of the span as `reading.rows.read_rows` does those of a file; None in place of the skipped ones."""
    if span.part == "all":
        yield from read_rows(span.file, names, span.skip)
        return
    if span.part == "row_groups":
        rows = read_row_groups(span.file.path, names, range(span.start, span.stop))
    elif span.part == "batches":
        rows = read_batches(span.file.path, names, span.start, span.stop)
    elif span.file.kind == "text":
        rows = _text_documents(span)
    else:
        rows = _json_documents(span)
    for number, row in enumerate(rows):
        yield None if number < span.skip else row


def documents_before(span: Span, names: Sequence[str]) -> int:
    """Counts the documents of the file before the span. names: as for `read_documents`."""
    if not span.start:
        return 0
    return sum(1 for _ in read_documents(replace(span, start=0, stop=span.start, skip=0), names))


def _json_documents(span: Span) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(io.BytesIO(_lines(span)), 1):
        if line.isspace():
            continue
        try:
            objects = objects_of_line(number, line)
        except ValueError:
            before = _lines(replace(span, start=0, stop=span.start)) if span.start else b""
            objects = objects_of_line(before.count(b"\n") + number, line)  # raises again, with the line's true number
        yield from objects


def _text_documents(span: Span) -> Iterator[dict[str, Any]]:
    try:
        text = _lines(span).decode()
    except UnicodeDecodeError:
        raise not_utf8(span.file.path) from None
    for line in io.StringIO(text, newline=None):
        if line.strip():
            yield {"text": line.rstrip("\n")}


def _lines(span: Span) -> bytes:
    """The lines that begin in the span, without the mark that some programs put before UTF-8 text."""
    with open_retried(span.file.path) as file:
        begin, end = _byte_range(span, file)
        file.seek(begin)
        content = file.read(end - begin)
    return content.removeprefix(b"\xef\xbb\xbf") if begin == 0 else content


def _byte_range(span: Span, file: BinaryIO) -> tuple[int, int]:
    """Returns the first byte of the span in the file, and the one behind its last."""
    if span.part == "all":
        return 0, size_of(span.file.path)
    if span.part == "row_groups":
        return _row_group_bytes(span.file.path, span.start, span.stop)
    if span.part == "batches":
        return span.start, span.stop
    return _next_line(file, span.start), _next_line(file, span.stop)


def _next_line(file: BinaryIO, at: int) -> int:
    """The place of the first line that begins at `at` or later."""
    if at == 0:
        return 0
    file.seek(at - 1)
    file.readline()
    return file.tell()


def _row_group_spans(file: DataFile) -> list[Span]:
    metadata = parquet_metadata(file.path)
    spans, start, size = [], 0, 0
    for group in range(metadata.num_row_groups):
        size += metadata.row_group(group).total_byte_size
        if size >= SPAN_BYTES or group == metadata.num_row_groups - 1:
            spans.append(Span(file, "row_groups", start, group + 1))
            start, size = group + 1, 0
    return spans


def _batch_spans(file: DataFile) -> list[Span]:
    spans, start = [], 0
    ends = batch_ends(file.path)
    for end in ends:
        if end - start >= SPAN_BYTES or end == ends[-1]:
            spans.append(Span(file, "batches", start, end))
            start = end
    return spans


def _row_group_bytes(path: Path, start: int, stop: int) -> tuple[int, int]:
    metadata = parquet_metadata(path)
    begins, ends = [], []
    for group in range(start, stop):
        for column in map(metadata.row_group(group).column, range(metadata.num_columns)):
            begins.append(min(at for at in (column.dictionary_page_offset, column.data_page_offset) if at))
            ends.append(begins[-1] + column.total_compressed_size)
    return min(begins, default=0), max(ends, default=0)
