"""The rows of a file of teacher outputs: checked, and made into the tensors of payload topk."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from torch import Tensor

from taid_ray.data.batch import Ints
from taid_ray.errors import DataError
from taid_ray.teacher.cache.outputs import SampleOutputs

MASS_SLACK = 0.05
"""How far the probabilities of a position may add up to something else than 1. A bfloat16 of -11 is off by up to 0.03."""
LOG_SLACK = 1e-5
"""How far rounding may bring the log of a probability above 0."""
LEAST_TAIL = 2.0**-24
"""Smallest mass of a tail that is computed as what the ids leave of 1: what float32 can tell from 0."""
COLUMNS: dict[str, tuple[int, str, bool]] = {
    "input_ids": (1, "integers", True),
    "loss_positions": (1, "integers", False),
    "ids": (2, "integers", True),
    "log_probs": (2, "floats", True),
    "log_tail": (1, "floats", False),
    "label_log_probs": (1, "floats", False),
}
"""Of each column: how deep its lists are nested, what they hold, and whether it is needed."""
Numbers = NDArray[Any]


def fault(path: str, what: str) -> DataError:
    """Makes the error for a file of teacher outputs."""
    return DataError(f"teacher.outputs: {path}: {what}")


@dataclass(frozen=True)
class Lists:
    """The lists of some rows in one array."""

    values: Numbers
    """[P, ...]: those of all rows, one row after the other."""
    sizes: Ints
    """How many of them each row has."""

    @property
    def starts(self) -> Ints:
        """Places in `values` at which the rows begin."""
        starts: Ints = np.cumsum(self.sizes) - self.sizes
        return starts

    @property
    def rows(self) -> Ints:
        """[P]: the row of each of the values."""
        return np.repeat(np.arange(len(self.sizes)), self.sizes)

    def split(self) -> list[Numbers]:
        """Cuts the values into those of each row."""
        return np.split(self.values, np.cumsum(self.sizes)[:-1])


class OutputRows:
    """Some consecutive rows of a file. Methods raise DataError that names column and row."""

    def __init__(self, path: str, first: int, batch: pa.RecordBatch):
        """first: number of the first of the rows in the file, from 1."""
        self._path, self._first, self._batch = path, first, batch
        self.labels_outside = 0
        """Loss positions for whose label there is no probability."""

    def lists(self, name: str, dtype: np.dtype[Any], k: int = 0) -> Lists:
        """Reads a column of plain lists, values [P], or of a list of k for each loss position, values [P, k]."""
        column = self._batch.column(name)
        sizes = self._sizes(name, column, None)
        values = column.flatten()
        rows = Lists(np.empty(0), sizes).rows
        if k:
            inner = self._sizes(name, values, rows)
            wrong = inner[inner != k][:1]
            told = f"a position has {wrong.sum()} of them, but teacher.topk is {k}; all positions must have so many"
            self.refuse(name, rows[inner != k], told)
            values, rows = values.flatten(), np.repeat(rows, k)
        self._sizes_without_null(name, values, rows)
        found = values.to_numpy(zero_copy_only=False).astype(dtype)
        return Lists(found.reshape(-1, k) if k else found, sizes)

    def loss_positions(self, tokens: Lists) -> Lists:
        """Reads, or assumes, the loss positions of the rows."""
        if "loss_positions" not in self._batch.schema.names:
            sizes = np.maximum(tokens.sizes - 1, 0)
            starts = np.cumsum(sizes) - sizes
            return Lists(np.arange(sizes.sum()) - np.repeat(starts, sizes), sizes)
        found = self.lists("loss_positions", np.dtype(np.int64))
        rows, values = found.rows, found.values
        wrong = (values < 0) | (values > tokens.sizes[rows] - 2)
        self.refuse("loss_positions", rows[wrong], "a position is outside 0 to the last token but one of input_ids")
        falls = (values[1:] <= values[:-1]) & (rows[1:] == rows[:-1])
        self.refuse("loss_positions", rows[1:][falls], "they do not ascend")
        return found

    def samples(self, k: int, vocabulary: int) -> Iterator[SampleOutputs]:
        """Yields the samples that have loss positions."""
        tokens = self.lists("input_ids", np.dtype(np.int64))
        self.refuse("input_ids", tokens.rows[tokens.values < 0], "a token id is negative")
        where = self.loss_positions(tokens)
        labels = tokens.values[tokens.starts[where.rows] + where.values + 1]
        tensors = self._tensors(where, labels, k, vocabulary)
        parts = {name: tensor.split(where.sizes.tolist()) for name, tensor in tensors.items()}
        for row, (own, positions) in enumerate(zip(tokens.split(), where.split(), strict=True)):
            if len(positions):
                yield SampleOutputs(own, positions, {name: parts[name][row] for name in parts})

    def _tensors(self, where: Lists, labels: Ints, k: int, vocabulary: int) -> dict[str, Tensor]:
        """Makes the tensors of payload topk for the loss positions of all rows."""
        ids, log_probs = self._likeliest(where, k, vocabulary)
        mass = np.exp(log_probs.astype(np.float64)).sum(-1)
        if (log_tail := self._logs("log_tail", where, empty=True)) is None:
            self._check_mass(where, mass, np.inf)
            log_tail = np.log(np.maximum(1.0 - mass, LEAST_TAIL)).astype(np.float32)
        else:
            self._check_mass(where, mass + np.exp(log_tail.astype(np.float64)), MASS_SLACK)
        if (of_labels := self._logs("label_log_probs", where)) is None:
            of_labels = self._label_logs(ids == labels[:, None], log_probs, log_tail - np.log(vocabulary - k))
        return {
            "log_probs": torch.from_numpy(log_probs).bfloat16(),
            "ids": torch.from_numpy(ids.astype(np.int32)),
            "log_tail": torch.from_numpy(log_tail),
            "label_log_probs": torch.from_numpy(of_labels),
        }

    def _likeliest(self, where: Lists, k: int, vocabulary: int) -> tuple[Numbers, Numbers]:
        """Reads ids and log_probs [P, k], in the order of the ids."""
        found = []
        for name, dtype in (("ids", np.int64), ("log_probs", np.float32)):
            lists = self.lists(name, np.dtype(dtype), k)
            self._same_sizes(name, lists.sizes, where.sizes)
            found.append(lists.values)
        ids, log_probs = found
        rows = where.rows
        outside = ((ids < 0) | (ids >= vocabulary)).any(-1)
        self.refuse(
            "ids", rows[outside], f"an id is outside 0 to {vocabulary - 1}, the ids that teacher and student share"
        )
        self._check_logs("log_probs", log_probs.max(-1, initial=-np.inf), log_probs.min(-1, initial=0), rows)
        order = np.argsort(ids, axis=-1, kind="stable")
        ids, log_probs = np.take_along_axis(ids, order, -1), np.take_along_axis(log_probs, order, -1)
        self.refuse("ids", rows[(ids[:, 1:] == ids[:, :-1]).any(-1)], "an id comes twice at one position")
        return ids, log_probs

    def _logs(self, name: str, where: Lists, empty: bool = False) -> Numbers | None:
        """Reads a column of one log per loss position, [P] float32; None if there is no such column. empty: -inf is fine."""
        if name not in self._batch.schema.names:
            return None
        found = self.lists(name, np.dtype(np.float32))
        self._same_sizes(name, found.sizes, where.sizes)
        lowest = np.where(found.values == -np.inf, 0.0, found.values) if empty else found.values
        self._check_logs(name, found.values, lowest, where.rows)
        return found.values

    def _label_logs(self, at_label: Numbers, log_probs: Numbers, elsewhere: Numbers) -> Numbers:
        """Takes the labels' log-probabilities [P] from those of the ids. elsewhere: where the label is none of these."""
        known = at_label.any(-1)
        self.labels_outside += int((~known).sum())
        inside = np.where(at_label, log_probs, 0.0).sum(-1)
        return np.where(known, inside, elsewhere).astype(np.float32)

    def _check_mass(self, where: Lists, mass: Numbers, below: float) -> None:
        """Checks that the probabilities [P] do not add up to more than 1, nor to less than 1 - below."""
        wrong = np.flatnonzero((mass > 1 + MASS_SLACK) | (mass < 1 - below))
        found = f"{mass[wrong[0]]:.3g}" if len(wrong) else ""
        self.refuse(
            "log_probs",
            where.rows[wrong],
            f"the probabilities of a position{' and its log_tail' if below < 1 else ''} add up to {found} instead of "
            f"{'1' if below < 1 else 'at most 1'}; they must be natural logs of probabilities over all shared ids",
        )

    def _check_logs(self, name: str, highest: Numbers, lowest: Numbers, rows: Ints) -> None:
        """Checks that logs are finite and not above 0, by the highest and the lowest of each position [P]."""
        self.refuse(name, rows[~(np.isfinite(lowest) & (highest < np.inf))], "a log-probability is not finite")
        self.refuse(name, rows[highest > LOG_SLACK], "a log-probability is above 0")

    def _same_sizes(self, name: str, found: Ints, wanted: Ints) -> None:
        wrong = np.flatnonzero(found != wanted)
        told = f"it has {found[wrong[0]]} entries for {wanted[wrong[0]]} loss positions" if len(wrong) else ""
        self.refuse(name, wrong, told)

    def _sizes(self, name: str, lists: pa.Array, rows: Ints | None) -> Ints:
        """Counts what each list holds. rows: to which row each belongs, where that is not its number."""
        self._sizes_without_null(name, lists, np.arange(len(lists)) if rows is None else rows)
        return np.asarray(pc.list_value_length(lists).to_numpy(zero_copy_only=False), dtype=np.int64)

    def _sizes_without_null(self, name: str, array: pa.Array, rows: Ints) -> None:
        if array.null_count:
            self.refuse(name, rows[array.is_null().to_numpy(zero_copy_only=False)], "it is null, or holds null")

    def refuse(self, name: str, wrong: Ints, why: str) -> None:
        """Raises DataError if any rows are wrong, with the first of them."""
        if len(wrong):
            raise fault(self._path, f"row {self._first + int(wrong[0])}, column {name}: {why}")
