"""Rows from token sequences: cutting of long documents, and best-fit packing of samples into rows."""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from taid_ray.data.batch import NO_LABEL, Row
from taid_ray.media.refs import ImageRef


@dataclass(frozen=True)
class Sample:
    """One document, one piece of a long document, or one conversation, which attends only to itself. Not empty."""

    input_ids: list[int]
    loss_mask: list[bool]
    """loss_mask[i], i >= 1: token i is to be predicted (by position i - 1). loss_mask[0] has no effect."""
    document: int = 0
    """Number of its document in the dataset, from 1, as errors about the data count rows."""
    images: tuple[ImageRef, ...] = ()
    """Its images, in the order of their tokens; `start` counts from the sample's first token."""

    @property
    def num_loss_tokens(self) -> int:
        """Number of loss positions."""
        return sum(self.loss_mask[1:])


def cut(tokens: Sequence[int], sequence_length: int, document: int = 0) -> list[Sample]:
    """Cuts a document into disjoint pieces of at most `sequence_length` tokens, with loss on all but the first token of each.

    A piece of one token predicts nothing and is left out.
    """
    pieces = [list(tokens[i : i + sequence_length]) for i in range(0, len(tokens), sequence_length)]
    return [Sample(piece, [False] + [True] * (len(piece) - 1), document) for piece in pieces if len(piece) > 1]


def to_rows(samples: Sequence[Sample], sequence_length: int, pack: bool) -> list[Row]:
    """Makes rows of at most `sequence_length` tokens that hold every sample exactly once.

    With `pack`, samples are placed by best-fit decreasing: the number of rows depends on the lengths only, not on the
    order of the samples. Without, every sample is a row of its own, in order. Deterministic.

    Raises ValueError for a sample longer than `sequence_length`.
    """
    longest = max((len(sample.input_ids) for sample in samples), default=0)
    if longest > sequence_length:
        raise ValueError(f"a sample has {longest} tokens, rows hold {sequence_length}; cut or drop it first")
    if not pack:
        return [_row([sample]) for sample in samples]
    return [_row([samples[i] for i in row]) for row in best_fit([len(s.input_ids) for s in samples], sequence_length)]


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Packs items into bins; returns the items' indices in each bin. Longest first, each where it leaves the least room.

    Bins are kept by the room left in them, so that one placement is a bisection over at most `capacity` values.
    """
    bins: list[list[int]] = []
    by_room: dict[int, list[int]] = {}
    rooms: list[int] = []  # the keys of by_room, ascending
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[item]
        at = bisect_left(rooms, length)
        if at == len(rooms):
            chosen, left = len(bins), capacity - length
            bins.append([])
        else:
            left = rooms[at] - length
            chosen = by_room[rooms[at]].pop()
            if not by_room[rooms[at]]:
                del by_room[rooms.pop(at)]
        bins[chosen].append(item)
        if left not in by_room:
            by_room[left] = []
            insort(rooms, left)
        by_room[left].append(chosen)
    return bins


def _row(samples: Sequence[Sample]) -> Row:
    lengths = [len(sample.input_ids) for sample in samples]
    ids = np.array([token for sample in samples for token in sample.input_ids], dtype=np.int64)
    mask = np.array([carries for sample in samples for carries in sample.loss_mask], dtype=bool)
    starts = np.cumsum([0, *lengths[:-1]])
    mask[starts] = False  # the last position of a sample would predict into the next document
    targets = np.where(np.roll(mask, -1), np.roll(ids, -1), NO_LABEL)
    positions = np.arange(len(ids)) - np.repeat(starts, lengths)
    images = [
        replace(image, start=image.start + int(start))
        for start, sample in zip(starts, samples, strict=True)
        for image in sample.images
    ]
    return Row(ids, positions, targets, tuple(sample.document for sample in samples), images=tuple(images))
