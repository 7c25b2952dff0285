"""Putting the shards of a data set together, and finding what is wrong with them as a whole."""

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import xxhash

from taid_ray.config.data import DataSource
from taid_ray.data.dataset import nothing_to_learn
from taid_ray.data.documents import open_documents
from taid_ray.data.encoding import Counts
from taid_ray.data.shared_ids import not_shared
from taid_ray.data.store.index import write_index
from taid_ray.data.store.prepare import Encoding, check_columns
from taid_ray.data.store.prepared import PreparedSource
from taid_ray.data.store.remote import Location
from taid_ray.data.store.shard import ShardFacts
from taid_ray.data.store.spans import Span
from taid_ray.errors import DataError


def assemble(
    encoding: Encoding,
    spans: Sequence[Span],
    shards: Sequence[ShardFacts],
    location: Location,
    num_shared: int,
    notify: Callable[[str], None],
) -> PreparedSource:
    """Makes the index of the source whose spans have these shards, and checks the whole.

    location: that of the shards. num_shared: token ids below it are known to both models. notify: is told of a damaged index.
    Raises DataError if a file lacks a column, if there is nothing to train on, or for a token that is not shared; RunError if
    the index cannot be written.
    """
    check_columns(spans, shards, encoding)
    _check_highest_id(encoding, num_shared, spans, shards)
    config = encoding.config
    index, found = write_index(location, shards, notify), _fingerprint(config, spans, shards)
    prepared = PreparedSource(index, found, config.images_directory)
    if config.images_column is not None and not any(shard.media for shard in shards):
        raise DataError(
            f"{config.key}: {config.train} has no image: no row has one in the column {config.images_column!r} or in its "
            f"messages. Set data.images_column to the column of the images, or remove it."
        )
    _check_rows(encoding.config, prepared.counts, spans, shards)
    return prepared


def _check_rows(config: DataSource, counts: Counts, spans: Sequence[Span], shards: Sequence[ShardFacts]) -> None:
    """Raises DataError if no document is left to train on, or none gave a row."""
    if any(shard.blocks for shard in shards):
        return
    kept = sum(span.skip for span in spans)
    if not counts.documents and kept:
        raise DataError(
            f"{config.key}: {config.train} has {kept} documents and the first data.valid_documents = "
            f"{config.valid_documents} are held out for validation, so none is left to train on. Set data.valid, or a "
            f"smaller data.valid_documents."
        )
    raise nothing_to_learn(f"{config.key}: {config.train}", counts)


def _check_highest_id(encoding: Encoding, num_shared: int, spans: Sequence[Span], shards: Sequence[ShardFacts]) -> None:
    """Raises DataError, which names the part of the data, if a token is not known to both models."""
    for span, shard in zip(spans, shards, strict=True):
        if shard.highest_id >= num_shared:
            raise not_shared(str(span), shard.highest_id, num_shared, encoding.tokenizer.get_vocab())


def _fingerprint(config: DataSource, spans: Sequence[Span], shards: Sequence[ShardFacts]) -> dict[str, Any]:
    """Makes what `Documents.fingerprint` returns, from what the tasks have read; digests are of the spans' hashes."""
    outline, found = open_documents(config, "train").outline(), {}
    for file, pairs in groupby(zip(spans, shards, strict=True), key=lambda pair: pair[0].file.name):
        parts = [shard for _, shard in pairs]
        digest = xxhash.xxh3_128_hexdigest(" ".join(part.content for part in parts).encode())
        found[file] = {"digest": digest, "rows": sum(part.documents for part in parts)}
    if "files" not in outline:
        whole = xxhash.xxh3_128_hexdigest(" ".join(part.content for part in shards).encode())
        return outline | {"digest": whole, "rows": sum(part.documents for part in shards)}
    nothing = {"digest": xxhash.xxh3_128_hexdigest(b""), "rows": 0}  # a file without a row group
    return {"files": [file | found.get(file["name"], nothing) for file in outline["files"]]}
