"""Division of a global batch's rows among ranks and micro-batches."""

from collections.abc import Sequence
from math import ceil

from taid_ray.data.batch import Row


def share(count: int, part: int, parts: int) -> slice:
    """Returns where, among `count` items in `parts` contiguous parts, part number `part` is. Lengths differ by at most one."""
    return slice(count * part // parts, count * (part + 1) // parts)


def split_evenly(rows: Sequence[Row], parts: int) -> list[Sequence[Row]]:
    """Cuts rows into contiguous parts whose lengths differ by at most one; some are empty if there are fewer rows than parts."""
    return [rows[share(len(rows), part, parts)] for part in range(parts)]


def num_micro_batches(batch_size: int, micro_batch_size: int, world_size: int) -> int:
    """The number of micro-batches per step, the same on every rank, so that all join the same collectives."""
    return ceil(ceil(batch_size / world_size) / micro_batch_size)
