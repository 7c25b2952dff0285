"""One micro-batch on its way through teacher and student.

Shape letters used in this package: B rows, T positions, N loss positions, V vocabulary, H hidden size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from taid_ray.media.refs import ImageRef

NO_LABEL = -100
PAD_ID = 0

Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Row:
    """One row of a global batch, at most `sequence_length` long. The three arrays, of int64, have equal length.

    Lists are made into arrays. Rows are equal if all they hold is equal.
    """

    input_ids: Ints
    position_ids: Ints
    """Position inside its own document: restarts at 0 where the next document of a packed row begins."""
    targets: Ints
    """targets[i] is the token that position i predicts, or NO_LABEL where i is not a loss position."""
    documents: tuple[int, ...] = ()
    """Numbers, from 1, of the documents in the dataset that its samples come from, in order."""
    source: int = 0
    """Number, from 0, of the source of training data that it is of; see `DataConfig.sources`."""
    images: tuple[ImageRef, ...] = ()
    """Its images, in the order of their tokens in `input_ids`."""

    def __post_init__(self) -> None:
        for name in ("input_ids", "position_ids", "targets"):
            object.__setattr__(self, name, np.asarray(getattr(self, name), dtype=np.int64))

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Row)
            and (self.documents, self.source, self.images) == (other.documents, other.source, other.images)
            and np.array_equal(self.input_ids, other.input_ids)
            and np.array_equal(self.position_ids, other.position_ids)
            and np.array_equal(self.targets, other.targets)
        )

    @property
    def num_samples(self) -> int:
        """Number of samples: positions at which a document, or a piece of one, begins."""
        return int(np.count_nonzero(self.position_ids == 0))

    @property
    def num_loss_tokens(self) -> int:
        """Number of loss positions."""
        return int(np.count_nonzero(self.targets != NO_LABEL))


@dataclass(frozen=True)
class Batch:
    """Model inputs plus the loss positions, and references to the images, of which each model makes inputs of its own."""

    inputs: dict[str, Tensor]
    """Keyword arguments of the model; input_ids and position_ids are [B, T] int64."""
    loss_positions: Tensor
    """[N] int64, ascending indices into the flattened [B * T] positions whose next token carries loss."""
    labels: Tensor
    """[N] int64, the token each loss position predicts."""
    sources: Tensor
    """[N] int64, the number of the source that each loss position is of."""
    images: tuple[tuple[ImageRef, ...], ...] = ()
    """The images of each row, B tuples; empty if no row has one."""

    @property
    def num_loss_tokens(self) -> int:
        """Number of loss positions, N."""
        return self.loss_positions.numel()


def collate(rows: Sequence[Row]) -> Batch:
    """Stacks rows into a batch, padded on the right to the longest.

    Padding (with id 0, which every vocabulary has) continues the position ids, so a causal model needs no attention mask:
    real tokens never see what follows.
    No rows at all give one padding token and N = 0, so that a rank without work still joins the collectives.
    """
    rows = rows or [Row(np.array([PAD_ID]), np.array([0]), np.array([NO_LABEL]))]
    shape = (len(rows), max(len(row.input_ids) for row in rows))
    sources = np.repeat([row.source for row in rows], [row.num_loss_tokens for row in rows])
    input_ids, targets = np.full(shape, PAD_ID, dtype=np.int64), np.full(shape, NO_LABEL, dtype=np.int64)
    position_ids = np.empty(shape, dtype=np.int64)
    for number, row in enumerate(rows):
        length, following = len(row.input_ids), row.position_ids[-1] + 1
        input_ids[number, :length], targets[number, :length] = row.input_ids, row.targets
        position_ids[number, :length] = row.position_ids
        position_ids[number, length:] = np.arange(following, following + shape[1] - length)
    flat_targets = targets.reshape(-1)
    loss_positions = np.flatnonzero(flat_targets != NO_LABEL)
    return Batch(
        inputs={"input_ids": torch.from_numpy(input_ids), "position_ids": torch.from_numpy(position_ids)},
        loss_positions=torch.from_numpy(loss_positions),
        labels=torch.from_numpy(flat_targets[loss_positions]),
        sources=torch.from_numpy(sources.astype(np.int64)),
        images=tuple(row.images for row in rows) if any(row.images for row in rows) else (),
    )
