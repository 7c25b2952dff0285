"""Does a model see? Its answers on some rows are compared with those it gives when every image in them is grey."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice, pairwise
from statistics import median

import numpy as np

from taid_ray.data.batch import Batch, Row, collate
from taid_ray.data.batching import num_micro_batches, split_evenly
from taid_ray.distributed.world import World
from taid_ray.errors import DataError, TeacherError
from taid_ray.media.grey import greyed
from taid_ray.media.refs import ImageRef
from taid_ray.teacher.protocol import TeacherClient

SEEING_ROWS = 32
"""Rows that are compared, at most."""


def rows_that_show(rows: Sequence[Row]) -> list[Row]:
    """Returns the first SEEING_ROWS documents of the validation rows that have an image and a loss position, a row for each.

    Raises DataError if none has.
    """
    documents = (document for row in rows for document in _unpacked(row))
    shown = [*islice((each for each in documents if each.images and each.num_loss_tokens), SEEING_ROWS)]
    if not shown:
        raise DataError(
            f"none of the {len(rows)} validation rows has an image, so nothing can show whether teacher and student see; raise "
            "data.valid_documents, or name rows with images as data.valid"
        )
    return shown


def _unpacked(row: Row) -> Iterator[Row]:
    """Yields each document of a packed row as a row of its own."""
    starts = np.flatnonzero(row.position_ids == 0).tolist()
    for start, stop in pairwise([*starts, len(row.input_ids)]):
        ids, positions, targets = (values[start:stop] for values in (row.input_ids, row.position_ids, row.targets))
        images = [replace(image, start=image.start - start) for image in row.images if start <= image.start < stop]
        yield Row(ids, positions, targets, source=row.source, images=tuple(images))


def seeing_batches(
    rows: Sequence[Row], size: int, grey: Callable[[ImageRef], bytes], memory: dict[str, bytes]
) -> list[tuple[Batch, Batch]]:
    """Makes batches of up to `size` of the rows that can show it, each beside its twin with grey images.

    grey, memory: see `media.grey.greyed`. Raises DataError as `rows_that_show`.
    """
    shown = rows_that_show(rows)
    return _beside_grey([shown[first : first + size] for first in range(0, len(shown), size)], grey, memory)


def own_seeing_batches(
    rows: Sequence[Row], size: int, world: World, grey: Callable[[ImageRef], bytes], memory: dict[str, bytes]
) -> list[tuple[Batch, Batch]]:
    """Makes a rank's share of the batches by which the student is measured: as many on every rank, of which some may be empty.

    For arguments and errors see `seeing_batches`.
    """
    shown = rows_that_show(rows)
    parts = num_micro_batches(len(shown), size, world.size)
    return _beside_grey(split_evenly(split_evenly(shown, world.size)[world.rank], parts), grey, memory)


def _beside_grey(
    parts: Sequence[Sequence[Row]], grey: Callable[[ImageRef], bytes], memory: dict[str, bytes]
) -> list[tuple[Batch, Batch]]:
    """Makes a batch of each part, beside its twin with grey images."""
    batches = [collate(part) for part in parts]
    return [(batch, replace(batch, images=greyed(batch.images, grey, memory))) for batch in batches]


def teacher_seeing(teacher: TeacherClient, batches: Sequence[tuple[Batch, Batch]], least: float) -> list[float]:
    """Measures how far the images of each row change what the teacher predicts, see TeacherModel.seeing.

    batches: of `seeing_batches`. least: `data.sees_at_least`. Raises TeacherError if the median is smaller.
    """
    found = [value for batch, without in batches for value in teacher.seeing(batch, without)]
    if not median(found) >= least:
        raise TeacherError(
            f"the teacher does not see: its answers with and without the images differ by {median(found):.2g} nats (median of "
            f"{len(found)} rows, largest {max(found):.2g}), less than data.sees_at_least = {least:g}; check that its vision "
            "weights were loaded, and that the images fit the answers in data.valid"
        )
    return found


def seeing_note(who: str, found: Sequence[float], least: float) -> str:
    """Says what was measured, loudly if the median is too small. who: teacher or student. least: `data.sees_at_least`."""
    above = sum(value >= least for value in found) / len(found)
    fewer = "" if len(found) == SEEING_ROWS else f", of {SEEING_ROWS} wanted"
    blind = "" if median(found) >= least else f"warning: the {who} does not see (data.sees_at_least = {least:g}): "
    return (
        f"{blind}with grey images the {who}'s answers differ by {median(found):.2g} nats (median of {len(found)} rows with images"
        f"{fewer}), by {least:g} or more in {above:.0%} of them"
    )
