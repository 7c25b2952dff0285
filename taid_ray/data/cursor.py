"""A place in the order of training rows, as a checkpoint keeps it."""

from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True)
class Position:
    """A place in the global order: everything before row number `position`, counted over all epochs, has been used."""

    position: int = 0
    epoch: int = 0
    """Epoch of the row used last, from 0."""
    samples: int = 0
    """Samples (documents, pieces of them, or conversations) used since the beginning of the run."""


@dataclass(frozen=True)
class BlockCursor:
    """A place in the order of blocks: everything before row `row` of block `block` of `epoch` has been used."""

    epoch: int = 0
    block: int = 0
    row: int = 0
    samples: int = 0
    """Samples used since the beginning of the run, as in `Position`."""


Cursor: TypeAlias = Position | BlockCursor


def read_cursor(state: dict[str, int]) -> Cursor:
    """Reads a place from its fields, as a checkpoint has them. Raises TypeError for anything else."""
    return Position(**state) if "position" in state else BlockCursor(**state)
