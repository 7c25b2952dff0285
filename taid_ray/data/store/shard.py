"""One shard: the packed rows of one span of the data, as an Arrow file that any other program can read, too.

Columns, with a row of training data in each row: `input_ids`; `loss_mask`, true where a position predicts the next token;
`starts`, the positions at which samples begin; `documents`, the number of each sample's document in the span, from 0;
`media`, room for references to images or sound, null today. Blocks of rows are record batches. Of each block the shard's
facts say where in the file its buffers are, so that a row is read by four reads of just its bytes, without opening Arrow.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from taid_ray.data.batch import NO_LABEL, Ints, Row

SCHEMA = pa.schema(
    [
        pa.field("input_ids", pa.list_(pa.uint32()), nullable=False),
        pa.field("loss_mask", pa.list_(pa.bool_()), nullable=False),
        pa.field("starts", pa.list_(pa.int32()), nullable=False),
        pa.field("documents", pa.list_(pa.int32()), nullable=False),
        pa.field("media", pa.list_(pa.string())),
    ]
)


@dataclass(frozen=True)
class Block:
    """Place of one record batch's values in the file, as byte offsets of its buffers."""

    rows: int
    ids_at: int
    mask_at: int
    """The mask has one bit per token, the lowest of a byte first."""
    starts_at: int
    documents_at: int


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

    @property
    def rows(self) -> int:
        """Number of rows."""
        return sum(block.rows for block in self.blocks)

    def to_dict(self) -> dict[str, Any]:
        """Returns the facts as JSON can hold them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, said: dict[str, Any]) -> "ShardFacts":
        """Reads what `to_dict` gave; other keys are passed over."""
        blocks = [Block(**block) for block in said["blocks"]]
        return cls(**{name: said[name] for name in cls.__dataclass_fields__ if name != "blocks"}, blocks=blocks)


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
    return pa.record_batch([*lists, pa.nulls(len(rows), SCHEMA.field("media").type)], schema=SCHEMA)


def locate_blocks(path: Path) -> list[Block]:
    """Finds the buffers of every record batch in an Arrow file of SCHEMA."""
    found = []
    with pa.memory_map(str(path)) as source:
        content = source.read_buffer()
        for batch in _batches(content):
            values = [batch.column(number).values.buffers()[1] for number in range(4)]
            found.append(Block(batch.num_rows, *(buffer.address - content.address for buffer in values)))
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
