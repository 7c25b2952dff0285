"""Which part of a request a teacher computes, and which rows of it together. A function of the request alone."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

PADDING_LIMIT = 256
"""Padding (positions) one forward pass may hold. A pass of fewer positions than this costs a GPU about as much as one
with these many, because it spends its time on reading the weights; so more padding than this is worth a second pass."""


def used_lengths(loss_positions: Tensor, rows: int, length: int) -> Tensor:
    """Counts the positions of each row up to its last loss position, [rows]: a causal model never looks beyond.

    loss_positions: [N], indices into rows * length positions.
    """
    row, column = loss_positions // length, loss_positions % length
    return torch.zeros(rows, dtype=torch.int64).scatter_reduce_(0, row, column + 1, "amax")


def micro_batches(lengths: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Yields groups of row numbers to compute together, longest row first, so that little is spent on padding.

    lengths: of the part of each row that matters; rows of 0 are left out. A group's rows x longest is at most max_tokens
    (unless it is one row), of which at most PADDING_LIMIT positions are padding.
    """
    group: list[int] = []
    padding = 0
    for row in sorted((row for row, length in enumerate(lengths) if length), key=lambda row: -lengths[row]):
        longest = lengths[group[0]] if group else lengths[row]
        padding += longest - lengths[row]
        if group and ((len(group) + 1) * longest > max_tokens or padding > PADDING_LIMIT):
            yield group
            group, padding = [], 0
        group.append(row)
    if group:
        yield group
