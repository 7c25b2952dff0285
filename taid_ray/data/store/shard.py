"""One shard: the packed rows of one span of the data, as an Arrow file that any other program can read, too.

Columns, with a row of training data in each row: `input_ids`; `loss_mask`, true where a position predicts the next token;
`starts`, the positions at which samples begin; `documents`, the number of each sample's document in the span, from 0;
`media`, the images of the row, each as `DIGEST START TOKENS WIDTH HEIGHT PLACE` (`media.refs.ImageRef`), null in a block without
any. Blocks of rows are record batches. Of each block the shard's
facts say where in the file its buffers are, so that a row is read by four reads of just its bytes, without opening Arrow.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from taid_ray.data.batch import NO_LABEL, Ints, Row
from taid_ray.media.refs import ImageRef

SCHEMA = pa.schema(
    [
        pa.field("input_ids", pa.list_(pa.uint32()), nullable=False),
        pa.field("loss_mask", pa.list_(pa.bool_()), nullable=False),
        pa.field("starts", pa.list_(pa.int32()), nullable=False),
        pa.field("documents", pa.list_(pa.int32()), nullable=False),
        pa.field("media", pa.list_(pa.string())),
    ]
)


MEDIA_TOTALS: dict[str, Callable[[Iterable[int]], int]] = {
    "images": sum,
    "image_bytes": sum,
    "largest_row_images": max,
    "largest_row_image_bytes": max,
}
"""Numbers about images, and how those of parts become that of the whole."""


@dataclass(frozen=True)
class Block:
    """Place of one record batch's values in the file, as byte offsets of its buffers."""

    rows: int
    ids_at: int
    mask_at: int
    """The mask has one bit per token, the lowest of a byte first."""
    starts_at: int
    documents_at: int
    media_at: tuple[int, ...] | None = None
    """Three places: offsets of the rows among the images, and of the images in their text (int32 each, one more than there are),
    and the text; None without images."""


@dataclass(frozen=True)
class ShardFacts:
    """What is known of a shard without reading it."""

    digest: str
    """Name of the shard: a hash of everything that its rows depend on."""
    content: str
    """Hash of the bytes of its span alone."""
    tokens: int
    loss_tokens: int
    highest_id: int
    """The largest token id; -1 without rows."""
    documents: int
    """Number of documents in the span, those included that are left out for validation."""
    counts: dict[str, int]
    """What became of those that are not left out, as the encoder counts."""
    columns: list[str]
    """Columns of the format that at least one of the documents has."""
    blocks: list[Block]
    media: dict[str, Any] | None = None
    """With images: MEDIA_TOTALS, a `digest` of all of them in order, which files go with the shard (`packed`, `outside`), and
    which documents were dropped for an image, and why, the first few (`bad`, a text)."""

    @property
    def rows(self) -> int:
        """Number of rows."""
        return sum(block.rows for block in self.blocks)

    def to_dict(self) -> dict[str, Any]:
        """Returns the facts as JSON can hold them; those about images only if there are some."""
        return _without_none(asdict(self)) | {"blocks": [_without_none(asdict(block)) for block in self.blocks]}

    @classmethod
    def from_dict(cls, said: dict[str, Any]) -> "ShardFacts":
        """Reads what `to_dict` gave; other keys are passed over."""
        blocks = [Block(**block) for block in said["blocks"]]
        names = cls.__dataclass_fields__.keys() - {"blocks", "media"}
        return cls(**{name: said[name] for name in names}, blocks=blocks, media=said.get("media"))


def to_record_batch(rows: Sequence[Row]) -> pa.RecordBatch:
    """Makes a block of rows a record batch of SCHEMA."""
    lengths = [len(row.input_ids) for row in rows]
    starts = [np.flatnonzero(row.position_ids == 0) for row in rows]
    token_edges = pa.array(np.cumsum([0, *lengths]), pa.int32())
    sample_edges = pa.array(np.cumsum([0, *(len(row.documents) for row in rows)]), pa.int32())
    ids = pa.array(np.concatenate([row.input_ids for row in rows]).astype(np.uint32))
    mask = pa.array(np.concatenate([row.targets for row in rows]) != NO_LABEL)
    documents = pa.array([number for row in rows for number in row.documents], pa.int32())
    columns = [(token_edges, ids), (token_edges, mask), (sample_edges, pa.array(np.concatenate(starts), pa.int32()))]
    lists = [pa.ListArray.from_arrays(edges, values) for edges, values in [*columns, (sample_edges, documents)]]
    kind = SCHEMA.field("media").type
    images = [[_written(image) for image in row.images] for row in rows]
    media = pa.array(images, kind) if any(images) else pa.nulls(len(rows), kind)
    return pa.record_batch([*lists, media], schema=SCHEMA)


def read_image(text: str) -> ImageRef:
    """Reads what stands for an image in the column `media`."""
    digest, start, tokens, width, height, place = text.split(" ", 5)
    return ImageRef(digest, int(start), int(tokens), int(width), int(height), place)


def _written(image: ImageRef) -> str:
    return f"{image.digest} {image.start} {image.tokens} {image.width} {image.height} {image.place}"


def _without_none(said: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in said.items() if value is not None}


def locate_blocks(path: Path) -> list[Block]:
    """Finds the buffers of every record batch in an Arrow file of SCHEMA."""
    found = []
    with pa.memory_map(str(path)) as source:
        content = source.read_buffer()
        for batch in _batches(content):
            values = [batch.column(number).values.buffers()[1] for number in range(4)]
            media = batch.column(4)
            if not media.null_count:
                values += [media.buffers()[number] for number in (1, 3, 4)]
            ids, mask, starts, documents, *of_media = (buffer.address - content.address for buffer in values)
            found.append(Block(batch.num_rows, ids, mask, starts, documents, tuple(of_media) or None))
    return found


def row_sizes(path: Path) -> Iterator[tuple[Ints, Ints, Ints]]:
    """Yields for each block the numbers of tokens, samples and loss positions of its rows."""
    with pa.memory_map(str(path)) as source:
        for batch in _batches(source.read_buffer()):
            token_edges = batch.column(0).offsets.to_numpy()
            mask = batch.column(1).values.to_numpy(zero_copy_only=False)
            loss_tokens = np.add.reduceat(mask, token_edges[:-1], dtype=np.int64)  # no row is empty
            yield np.diff(token_edges), np.diff(batch.column(2).offsets.to_numpy()), loss_tokens


def _batches(content: pa.Buffer) -> Iterator[pa.RecordBatch]:
    file = pa.ipc.open_file(content)
    return map(file.get_batch, range(file.num_record_batches))
