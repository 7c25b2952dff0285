"""Preparing one span: encode its documents, pack them into rows, and write these as a shard, unless that is there already.

Whoever makes a shard holds a lock that ends with its process. So several tasks, and several runs, share the work on one
store, and a killed one is in nobody's way.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import xxhash
from transformers import PreTrainedTokenizerBase

from taid_ray.config.data import DataSource
from taid_ray.data import chat
from taid_ray.data.batch import Row
from taid_ray.data.columns import Column, columns_of, lacking
from taid_ray.data.encoding import Columns, Encoder, said_of_bad
from taid_ray.data.images import BLOCK_DOCUMENTS_WITH_IMAGES, EncoderMedia, ImageTokens
from taid_ray.data.packing import Sample, to_rows
from taid_ray.data.reading.complaints import explained, no_column
from taid_ray.data.reading.rows import columns_found
from taid_ray.data.store.outside import changed_outside, outside_name, write_outside
from taid_ray.data.store.pack import Pack, pack_name
from taid_ray.data.store.remote import Location, Store, open_store
from taid_ray.data.store.sealed import making, read_sealed, write_sealed
from taid_ray.data.store.shard import MEDIA_TOTALS, SCHEMA, ShardFacts, locate_blocks, to_record_batch
from taid_ray.data.store.spans import Span, documents_before, hash_content, read_documents
from taid_ray.errors import DataError
from taid_ray.storage import LASTING_ERRORS, persistently

FORMAT = "taid-ray shard 1"
"""Part of every key. Change it whenever other code makes other rows of the same documents."""
BLOCK_DOCUMENTS = 256
"""Documents that are tokenised together."""
WINDOW_TOKENS = 1 << 21
"""Samples are packed together, and written as one record batch, whenever they have so many tokens or more."""
NOT_ENCODED = {
    "train", "valid", "subset", "split", "valid_split", "valid_documents", "streaming", "block_documents",
    "order", "store", "chat_template", "date", "label", "key", "valid_key", "images_directory", "image_processor",
    "sees_at_least",
}  # fmt: skip
"""Keys of a source that say which documents are read, not what becomes of them, and those that `Encoding` resolves."""
OF_IMAGES = {"images_column", "bad_images", "max_image_pixels"}
"""Keys that are part of the encoding only in a run with images, so that text keeps the shards that it has always had."""


@dataclass(frozen=True)
class Encoding:
    """All that rows depend on beside the documents. Can be pickled."""

    config: DataSource
    tokenizer: PreTrainedTokenizerBase
    tokens: ImageTokens | None = None
    """For a run with images, and only then: what tokens they become."""

    @cached_property
    def key(self) -> str:
        """Identifies the encoding, in 16 hexadecimal digits."""
        images = self.tokens is not None
        settings = self.config.model_dump(mode="json", exclude=NOT_ENCODED if images else NOT_ENCODED | OF_IMAGES)
        parts = [FORMAT, settings, *self._templates(), _identity(self.tokenizer)]
        if self.tokens is not None:
            parts.append(self.tokens.identity())
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    def _templates(self) -> list[Any]:
        """The chat template or templates that render documents, and the day if they may write it."""
        config = self.config
        if config.format == "text":
            return []
        own = config.chat_template is None
        found = self.tokenizer.chat_template if own else chat.chat_template(config.chat_template, self.tokenizer)
        return [found, config.date or date.today().isoformat()] if "strftime_now" in str(found) else [found]

    @property
    def columns(self) -> list[Column]:
        """The columns that are read."""
        return columns_of(self.config)

    @property
    def column_names(self) -> list[str]:
        """All acceptable names of the columns."""
        return [name for column in self.columns for name in column.names]


def prepare_span(
    span: Span, encoding: Encoding, location: Location, notify: Callable[[str], None]
) -> ShardFacts | None:
    """Returns the facts of the span's shard, and makes it first if it is not there whole; None if another process makes it now.

    location: the store of this encoding, a directory that exists or a URI (`remote`). notify: is told of a damaged shard, which
    is made anew. Raises DataError for documents that cannot be read or encoded, RunError if the shard cannot be written.
    """
    source = f"{encoding.config.key}: {span.file.path}"
    with explained(source, f"cannot be read as {span.file.kind}. Repair or convert the file"):
        version = _version(span, source)
        content = hash_content(span)
    digest = xxhash.xxh3_128(f"{content} {span.skip} {encoding.key}".encode()).hexdigest()
    store = open_store(location)
    said = _find(store, digest, notify)
    if said is not None and (said.get("media") or {}).get("outside"):
        changed = changed_outside(store.fetch(outside_name(digest)), encoding.config.images_directory)
        if changed is not None:  # another shard, because others may be reading this one
            digest = xxhash.xxh3_128(f"{digest} {changed}".encode()).hexdigest()
            said = _find(store, digest, notify)
    if said is not None:
        return ShardFacts.from_dict(said)
    path = store.directory / f"{digest}.arrow"
    with making(path, wait=False) as granted:
        if not granted:
            return None
        said = read_sealed(path, lambda _: None)
        if said is None or any(
            read_sealed(store.directory / name, lambda _: None) is None for name in _besides(digest, said)
        ):
            shard = _ShardMaker(span, encoding, source, version, Pack(store.directory, digest))
            with closing(shard.pack):
                said = write_sealed(
                    path, SCHEMA, shard.record_batches(), lambda whole: shard.facts(digest, content, whole)
                )
        for name in _besides(digest, said):
            store.publish(name)  # before the shard, which says that they are there
        store.publish(path.name)
        return ShardFacts.from_dict(said)


def _find(store: Store, digest: str, notify: Callable[[str], None]) -> dict[str, Any] | None:
    """Returns the facts of a shard that is stored whole, with the files that go with it, else None."""
    said = store.find(f"{digest}.arrow", notify)
    return said if said and all(store.find(name, notify) for name in _besides(digest, said)) else None


def _besides(digest: str, said: dict[str, Any]) -> list[str]:
    """Lists the files that go with a shard."""
    media = said.get("media") or {}
    return [pack_name(digest)] * bool(media.get("packed")) + [outside_name(digest)] * bool(media.get("outside"))


def check_columns(spans: Sequence[Span], shards: Sequence[ShardFacts], encoding: Encoding) -> None:
    """Raises DataError if none of the documents of a file has a column that the format needs. shards: those of the spans.

    Of the prompt's columns a file needs one only, if the others are in other files.
    """
    anywhere = {name for shard in shards for name in shard.columns}
    nowhere = [column for column in encoding.columns if column.required and column.name not in anywhere]
    for file, pairs in groupby(zip(spans, shards, strict=True), key=lambda pair: pair[0].file):
        found: set[str] = set()
        documents = 0
        for span, shard in pairs:
            found.update(shard.columns)
            documents += shard.documents - span.skip
        missing = lacking(encoding.columns, found) or nowhere
        if documents and missing:
            raise no_column(
                f"{encoding.config.key}: {file.path}", missing[0], columns_found(file), encoding.config.format
            )


class _ShardMaker:
    """Makes the blocks of one shard, and counts what is in them."""

    def __init__(self, span: Span, encoding: Encoding, source: str, version: tuple[int, int], pack: Pack) -> None:
        """version: that of the file when its hash was taken. pack: takes the images that the documents hold as bytes."""
        self._span, self._encoding, self._source, self._version = span, encoding, source, version
        self.pack = pack
        media = None if encoding.tokens is None else EncoderMedia(encoding.tokens, pack.keep)
        self._block_documents = BLOCK_DOCUMENTS if media is None else BLOCK_DOCUMENTS_WITH_IMAGES
        self._encoder = Encoder(encoding.config, encoding.tokenizer, source, media)
        self._images = _ImageTotals()
        self._columns = encoding.columns
        self._found: set[str] = set()
        self._documents = self._tokens = self._loss_tokens = 0
        self._highest_id = -1

    def record_batches(self) -> Iterator[pa.RecordBatch]:
        """Yields the blocks: rows of the samples of about WINDOW_TOKENS tokens, in order of the documents."""
        samples: list[Sample] = []
        tokens = 0
        for columns, first in self._blocks():
            encoded = self._encoded(columns, first)
            samples.extend(encoded)
            tokens += sum(len(sample.input_ids) for sample in encoded)
            if tokens >= WINDOW_TOKENS:
                yield self._packed(samples)
                samples, tokens = [], 0
        if samples:
            yield self._packed(samples)

    def facts(self, digest: str, content: str, path: Path) -> dict[str, Any]:
        """Says what is in the shard when all blocks were taken. Raises DataError if the file was changed meanwhile."""
        if _version(self._span, self._source) != self._version:
            raise DataError(f"{self._source} was changed while it was read. Start again when it is complete.")
        found = [column.name for column in self._columns if column.name in self._found]
        counts = self._encoder.counts.to_dict()
        numbers = (self._tokens, self._loss_tokens, self._highest_id, self._documents)
        media = self._seal_images(path.parent, digest) if self._encoder.counts.has_images else None
        return ShardFacts(digest, content, *numbers, counts, found, locate_blocks(path), media).to_dict()

    def _seal_images(self, directory: Path, digest: str) -> dict[str, Any]:
        """Writes the files that go with the shard, and returns `ShardFacts.media`."""
        packed, outside = self.pack.seal(), self._encoder.images_outside
        if outside:
            write_outside(directory / outside_name(digest), outside)
        # Rows of the span: to number them in the file would mean to read all of it before the span.
        bad = f"in {self._span}, {said_of_bad(self._encoder.bad)}" if self._encoder.bad else ""
        return self._images.facts() | {"packed": packed, "outside": bool(outside), "bad": bad}

    def _blocks(self) -> Iterator[tuple[Columns, int]]:
        """Yields the documents that are not skipped, in blocks, with the first one's number in the span, from 1."""
        with explained(self._source, f"cannot be read as {self._span.file.kind}. Repair or convert the file"):
            rows = read_documents(self._span, self._encoding.column_names)
            while block := list(islice(rows, self._block_documents)):
                kept = [row for row in block if row is not None]
                first = self._documents + len(block) - len(kept) + 1
                self._documents += len(block)
                if kept:
                    yield {column.name: self._values(kept, column) for column in self._columns}, first

    def _values(self, rows: Sequence[dict[str, Any]], column: Column) -> list[Any]:
        """Lists each document's first value under one of the column's names; None without any."""
        if column.name not in self._found and any(not row.keys().isdisjoint(column.names) for row in rows):
            self._found.add(column.name)
        return [next((row[name] for name in column.names if row.get(name) is not None), None) for row in rows]

    def _encoded(self, columns: Columns, first: int) -> list[Sample]:
        try:
            return self._encoder.encode(columns, first)
        except DataError:
            file = self._span.file
            if missing := lacking(self._columns, self._found):
                has = columns_found(file)
                if set(missing[0].names).isdisjoint(has):  # which says more than the first row without it
                    raise no_column(self._source, missing[0], has, self._encoding.config.format) from None
            before = documents_before(self._span, self._encoding.column_names)
            if before:  # say it again, with the document's number in the file
                self._encoder.encode(columns, first + before)
            raise

    def _packed(self, samples: list[Sample]) -> pa.RecordBatch:
        config = self._encoding.config
        rows = to_rows(samples, config.sequence_length, config.pack)
        self._tokens += sum(len(row.input_ids) for row in rows)
        self._loss_tokens += sum(row.num_loss_tokens for row in rows)
        self._highest_id = max(self._highest_id, *(int(row.input_ids.max()) for row in rows))
        self._images.add(rows, self._encoder.image_bytes)
        return to_record_batch([_from_zero(row) for row in rows])


def _from_zero(row: Row) -> Row:
    """The row with its documents counted from 0."""
    documents = tuple(document - 1 for document in row.documents)
    return Row(row.input_ids, row.position_ids, row.targets, documents, images=row.images)


class _ImageTotals:
    """What is known of the images of the rows so far."""

    def __init__(self) -> None:
        self._digest = xxhash.xxh3_128()
        self._images = self._bytes = self._largest_images = self._largest_bytes = 0

    def add(self, rows: Sequence[Row], sizes: Mapping[str, int]) -> None:
        """sizes: bytes of the images, by their digests."""
        for images in (row.images for row in rows if row.images):
            self._digest.update(" ".join(image.digest for image in images).encode())
            size = sum(sizes[image.digest] for image in images)
            self._images += len(images)
            self._bytes += size
            self._largest_images = max(self._largest_images, len(images))
            self._largest_bytes = max(self._largest_bytes, size)

    def facts(self) -> dict[str, Any]:
        """Returns them, named as in `ShardFacts.media`."""
        numbers = (self._images, self._bytes, self._largest_images, self._largest_bytes)
        return dict(zip(MEDIA_TOTALS, numbers, strict=True)) | {"digest": self._digest.hexdigest()}


def _version(span: Span, source: str) -> tuple[int, int]:
    """Returns size and time of the last change of the file. Raises DataError if this node does not see it.

    source: the key that the file was given under, and its path.
    """
    try:
        status = persistently(span.file.path.stat, LASTING_ERRORS)
    except FileNotFoundError:
        raise DataError(
            f"{source} is not found on node {os.uname().nodename}. Give all nodes the same files; those of a "
            f"data set of the hub are where HF_HOME says, which must be a directory that all nodes see."
        ) from None
    return status.st_size, status.st_mtime_ns


def _identity(tokenizer: PreTrainedTokenizerBase) -> list[Any]:
    """All that a tokenizer's output depends on."""
    special = [repr(sorted(tokenizer.special_tokens_map.items())), tokenizer.split_special_tokens]
    if not tokenizer.is_fast:
        return [type(tokenizer).__name__, tokenizer.get_vocab(), *special]
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    return [{name: part for name, part in backend.items() if name not in ("truncation", "padding")}, *special]
