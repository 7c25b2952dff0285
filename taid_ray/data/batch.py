"""One micro-batch on its way through teacher and student.

Shape letters used in this package: B rows, T positions, N loss positions, V vocabulary, H hidden size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

NO_LABEL = -100
PAD_ID = 0


@dataclass(frozen=True)
class Row:
    """One row of a global batch, at most `sequence_length` long. The three lists have equal length."""

    input_ids: list[int]
    position_ids: list[int]
    """Position inside its own document: restarts at 0 where the next document of a packed row begins."""
    targets: list[int]
    """targets[i] is the token that position i predicts, or NO_LABEL where i is not a loss position."""
    documents: tuple[int, ...] = ()
    """Numbers, from 1, of the documents in the dataset that its samples come from, in order."""

    @property
    def num_loss_tokens(self) -> int:
        """Number of loss positions."""
        return sum(target != NO_LABEL for target in self.targets)


@dataclass(frozen=True)
class Batch:
    """Model inputs plus the loss positions. A mapping of inputs, so that other modalities can join input_ids."""

    inputs: dict[str, Tensor]
    """Keyword arguments of the model; input_ids and position_ids are [B, T] int64."""
    loss_positions: Tensor
    """[N] int64, ascending indices into the flattened [B * T] positions whose next token carries loss."""
    labels: Tensor
    """[N] int64, the token each loss position predicts."""

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
    rows = rows or [Row([PAD_ID], [0], [NO_LABEL])]
    length = max(len(row.input_ids) for row in rows)

    input_ids, position_ids, targets = [], [], []
    for row in rows:
        missing = length - len(row.input_ids)
        next_position = row.position_ids[-1] + 1
        input_ids.append(row.input_ids + [PAD_ID] * missing)
        position_ids.append([*row.position_ids, *range(next_position, next_position + missing)])
        targets.append(row.targets + [NO_LABEL] * missing)
    flat_targets = torch.tensor(targets).flatten()
    loss_positions = (flat_targets != NO_LABEL).nonzero().flatten()
    return Batch(
        inputs={"input_ids": torch.tensor(input_ids), "position_ids": torch.tensor(position_ids)},
        loss_positions=loss_positions,
        labels=flat_targets[loss_positions],
    )
