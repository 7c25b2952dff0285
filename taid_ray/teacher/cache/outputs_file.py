"""Reading a file of teacher outputs, which any tool may have written: every row is checked before it is used."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from taid_ray.config.schema import DistillConfig
from taid_ray.data.batch import Ints
from taid_ray.data.reading.kinds import digest_of
from taid_ray.teacher.cache.offline import TeacherRecord, record_of
from taid_ray.teacher.cache.outputs import FORM, METADATA, SampleOutputs
from taid_ray.teacher.cache.outputs_rows import COLUMNS, OutputRows, fault

BATCH_ROWS = 64
"""Rows that are read and checked at a time."""
BUFFER_BYTES = 2**20
"""Bytes of a column that are read ahead. Without it pyarrow would read whole row groups, which other tools may make large."""


class OutputsFile:
    """A parquet file of teacher outputs, see `outputs`, for a run with `k` ids per position and `vocabulary` shared ids."""

    def __init__(self, path: str, k: int, vocabulary: int):
        """Opens the file and checks columns and metadata. Raises DataError."""
        self.path, self._k, self._vocabulary = path, k, vocabulary
        self.labels_outside = 0
        """Loss positions read so far for whose label the file has no probability."""
        try:
            self._file = pq.ParquetFile(path, buffer_size=BUFFER_BYTES, pre_buffer=False)
        except FileNotFoundError:
            raise fault(
                self.path, "there is no such file on this machine; name the parquet file of the outputs"
            ) from None
        except (OSError, pa.ArrowException) as error:
            raise fault(self.path, f"it cannot be read as parquet ({error}); write it anew") from None
        self._names = [name for name in COLUMNS if self._has_column(name)]
        self.teacher = self._check_metadata(self._file.schema_arrow.metadata or {})
        """The teacher as `taid-ray cache export` knew it; None for the file of another tool."""

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 that stands for the teacher: of the file's content and of what it is read as. Reads all of it, once."""
        return hashlib.sha256(
            f"outputs {FORM} {self._k} {self._vocabulary} {digest_of(Path(self.path))}".encode()
        ).hexdigest()

    @property
    def num_rows(self) -> int:
        """Number of samples in the file."""
        return int(self._file.metadata.num_rows)

    def samples(self) -> Iterator[SampleOutputs]:
        """Yields the samples that have loss positions, in order. Raises DataError, with column and row, for what is wrong."""
        for rows in self._read(self._names):
            yield from rows.samples(self._k, self._vocabulary)
            self.labels_outside += rows.labels_outside

    def tokens(self) -> Iterator[tuple[Ints, Ints]]:
        """Yields of every sample its token ids and its loss positions. Raises DataError as `samples`."""
        for rows in self._read([name for name in self._names if name in ("input_ids", "loss_positions")]):
            tokens = rows.lists("input_ids", np.dtype(np.int64))
            yield from zip(tokens.split(), rows.loss_positions(tokens).split(), strict=True)

    def _read(self, names: list[str]) -> Iterator[OutputRows]:
        first = 1
        try:
            for batch in self._file.iter_batches(BATCH_ROWS, columns=names):
                yield OutputRows(self.path, first, batch)
                first += batch.num_rows
        except (OSError, pa.ArrowException) as error:
            raise fault(self.path, f"it is damaged behind row {first - 1} ({error}); write it anew") from None

    def _has_column(self, name: str) -> bool:
        depth, content, needed = COLUMNS[name]
        schema = self._file.schema_arrow
        if name not in schema.names:
            if needed:
                raise fault(
                    self.path, f"it has no column {name} (found {', '.join(schema.names) or 'none'}); see docs/cache.md"
                )
            return False
        found = leaf = schema.field(name).type
        for _ in range(depth):
            leaf = getattr(leaf, "value_type", None)
        right = leaf is not None and (pa.types.is_integer if content == "integers" else pa.types.is_floating)(leaf)
        if not right:
            wanted = "lists of " * depth + content
            raise fault(self.path, f"column {name} holds {found}, where {wanted} are needed; see docs/cache.md")
        return True

    def _check_metadata(self, metadata: Mapping[bytes, bytes]) -> TeacherRecord | None:
        key = METADATA.decode()
        try:
            about = dict(json.loads(metadata.get(METADATA, b"{}")))
            teacher = record_of(about["teacher"]) if "teacher" in about else None
        except (ValueError, TypeError, LookupError) as error:
            raise fault(
                self.path, f"its metadata {key} cannot be read ({error!r}); write it anew, or leave it out"
            ) from None
        for name, here, remedy in (
            ("form", FORM, "read it with the version of taid-ray that wrote it"),
            ("topk", self._k, f"set teacher.topk={about.get('topk')}"),
            ("vocabulary", self._vocabulary, "make the file with a student that shares as many ids with the teacher"),
        ):
            if about.get(name, here) != here:
                raise fault(
                    self.path, f"its metadata {key} says {name} {about[name]!r}, but here it is {here}; {remedy}"
                )
        return teacher


def outputs_file(config: DistillConfig, num_shared: int) -> OutputsFile:
    """Opens the file of a run with teacher.mode: file. Raises DataError. num_shared: ids that teacher and student share."""
    return OutputsFile(str(config.given_teacher.outputs), config.given_teacher.topk, num_shared)
