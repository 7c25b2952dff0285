"""The images of a shard that stay files outside the store: what they were when it was made, and whether they are that still.

SHARD-outside.arrow     a row for each of them: place, hash (empty for one that could not be used), size and time of the file
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import pyarrow as pa
import xxhash

from taid_ray.data.images import SeenImage
from taid_ray.data.store.sealed import write_sealed
from taid_ray.media.headers import BadImage
from taid_ray.media.reader import ImageReader, digest_of, resolved, version_of

SCHEMA = pa.schema(
    [
        pa.field("place", pa.string(), nullable=False),
        pa.field("digest", pa.string(), nullable=False),
        pa.field("bytes", pa.int64(), nullable=False),
        pa.field("changed_ns", pa.int64(), nullable=False),
    ]
)


def outside_name(shard: str) -> str:
    """Returns the name of the list of a shard's images outside."""
    return f"{shard}-outside.arrow"


def write_outside(path: Path, seen: Mapping[str, SeenImage]) -> None:
    """Writes the list. seen: by their places. Raises RunError."""
    rows = [(place, image.digest, *image.version) for place, image in sorted(seen.items())]
    columns = [pa.array(column, field.type) for column, field in zip(zip(*rows, strict=True), SCHEMA, strict=True)]
    write_sealed(path, SCHEMA, [pa.record_batch(columns, schema=SCHEMA)], lambda _: {"images": len(rows)})


def changed_outside(path: Path, directory: str | None) -> str | None:
    """Returns a hash of the images in the list as they are now; None if they are what they were.

    Only files of another size or time than then are read. directory: `data.images_directory`. Raises DataError for what cannot
    be read just now.
    """
    before, now = xxhash.xxh3_128(), xxhash.xxh3_128()
    for then, found in _digests(path, directory):
        before.update(f"{then} ".encode())
        now.update(f"{found} ".encode())
    return None if before.digest() == now.digest() else now.hexdigest()


def _digests(path: Path, directory: str | None) -> Iterator[tuple[str, str]]:
    """Yields the hash of each image then and now."""
    reader = ImageReader()
    with pa.memory_map(str(path)) as source:
        for row in pa.ipc.open_file(source).read_all().to_pylist():
            place = resolved(row["place"], directory)
            if version_of(place) == (row["bytes"], row["changed_ns"]):
                yield row["digest"], row["digest"]
                continue
            try:
                found = digest_of(reader.content(place))
            except BadImage:
                found = ""
            yield row["digest"], found
