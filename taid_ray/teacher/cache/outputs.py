"""Teacher outputs as a data set: the form of a parquet file with one row per sample, and writing one.

A row holds, for a sample with N loss positions and k ids for each of them (docs/cache.md says more):

    input_ids        list of integers             token ids, from the first to the last one that is predicted, or further
    ids              N lists of k integers        the likeliest next tokens, in any order
    log_probs        N lists of k floats          their natural log-probabilities
    loss_positions   list of N integers           ascending; position i predicts token i + 1. Default: all but the last token
    log_tail         list of N floats             log of the probability of all other ids. Default: what is left of 1
    label_log_probs  list of N floats             log-probability of token i + 1, for validation. Default: see `outputs_rows`
    document, split  integer, text                number, from 1, of the document in data.train or data.valid. May be missing

The metadata of the schema may hold, under METADATA, JSON with `form` (FORM), `topk` (k), `vocabulary` (number of ids that teacher
and student share) and `teacher` (a TeacherRecord). `outputs_file` reads and checks all of this.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from taid_ray.data.batch import Ints
from taid_ray.errors import RunError
from taid_ray.teacher.cache.offline import TeacherRecord

FORM = 1
METADATA = b"taid_ray_outputs"
GROUP_BYTES = 32 * 2**20
"""Bytes in a row group before compression, more or less: what the writer holds in memory."""


@dataclass(frozen=True)
class SampleOutputs:
    """A sample and the teacher's outputs for its N loss positions."""

    tokens: Ints
    """Token ids from the first to the last one that is predicted, perhaps further."""
    loss_positions: Ints
    """[N], ascending; position i predicts tokens[i + 1]."""
    tensors: dict[str, Tensor]
    """The tensors of payload topk, see `teacher.payload`."""
    document: int = 0
    """Number of the sample's document; 0 where it is not known."""
    split: str = ""
    """Where its document is: train or valid; empty where that is not known."""


def outputs_schema(k: int) -> pa.Schema:
    """Makes the schema of a file with k ids per position, without metadata."""
    per_position = pa.list_(pa.float32())
    return pa.schema(
        {
            "input_ids": pa.list_(pa.uint32()),
            "loss_positions": pa.list_(pa.int32()),
            "ids": pa.list_(pa.list_(pa.int32(), k)),
            "log_probs": pa.list_(pa.list_(pa.float32(), k)),
            "log_tail": per_position,
            "label_log_probs": per_position,
            "document": pa.int64(),
            "split": pa.string(),
        }
    )


class OutputsWriter:
    """Writes a file of teacher outputs sample by sample, under a temporary name until `finish`."""

    def __init__(self, path: Path, record: TeacherRecord):
        """record: of the teacher, with payload topk. Raises RunError if nothing can be written beside `path`."""
        self._path, self._temporary = path, path.with_name(f".{path.name}.tmp")
        self._k = record.info.topk
        about = {"form": FORM, "topk": self._k, "vocabulary": record.info.num_shared, "teacher": asdict(record)}
        self._schema = outputs_schema(self._k).with_metadata({METADATA: json.dumps(about).encode()})
        self._group: list[SampleOutputs] = []
        self._waiting = 0
        try:
            self._writer = pq.ParquetWriter(self._temporary, self._schema, compression="zstd")
        except OSError as error:
            raise self._unwritable(error) from error

    def write(self, sample: SampleOutputs) -> None:
        """Adds a sample. Raises RunError if the disk does not take it."""
        self._group.append(sample)
        self._waiting += 8 * (len(sample.tokens) + len(sample.loss_positions) * self._k)
        if self._waiting >= GROUP_BYTES:
            self._flush()

    def finish(self) -> int:
        """Writes the rest, and gives the file its name. Returns its size in bytes. Raises RunError as `write`."""
        if self._group:
            self._flush()
        try:
            self._writer.close()
            with self._temporary.open("rb") as file:
                os.fsync(file.fileno())
            self._temporary.replace(self._path)
            return self._path.stat().st_size
        except OSError as error:
            raise self._unwritable(error) from error

    def discard(self) -> None:
        """Removes what was written, unless it was finished."""
        self._temporary.unlink(missing_ok=True)

    def _flush(self) -> None:
        table = pa.table([_column(field, self._group) for field in self._schema], schema=self._schema)
        self._group, self._waiting = [], 0
        try:
            self._writer.write_table(table)
        except OSError as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> RunError:
        return RunError(f"{self._path} cannot be written ({error}); make room there, and give the same command again")


def _column(field: pa.Field, samples: Sequence[SampleOutputs]) -> pa.Array:
    """Makes one column of a row group."""
    if field.name in ("document", "split"):
        return pa.array([getattr(sample, field.name) for sample in samples], field.type)
    parts = [_values(field.name, sample) for sample in samples]
    flat, inner = np.concatenate(parts), field.type.value_type
    if flat.ndim == 2:
        values = pa.FixedSizeListArray.from_arrays(pa.array(flat.reshape(-1), inner.value_type), type=inner)
    else:
        values = pa.array(flat, inner)
    return pa.ListArray.from_arrays(np.cumsum([0, *map(len, parts)], dtype=np.int32), values, type=field.type)


def _values(name: str, sample: SampleOutputs) -> Any:
    """One sample's values of a column: one array, [N, k] for ids and log_probs."""
    if name in ("input_ids", "loss_positions"):
        return sample.tokens if name == "input_ids" else sample.loss_positions
    tensor = sample.tensors[name]
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
