"""Cutting a batch into its samples and putting samples together to a batch.

A sample is one document or piece of one. It attends to nothing but itself, so its teacher outputs are the same in any batch.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from taid_ray.data.batch import NO_LABEL, Batch, Ints, Row, collate
from taid_ray.data.packing import best_fit
from taid_ray.media.refs import ImageRef

FORMAT = "taid-ray sample 1"
"""Part of every key. Change it whenever other code makes the teacher's outputs different."""


@dataclass(frozen=True)
class KeyedSample:
    """One sample of a batch, up to its last loss position, because a causal model does not see what follows."""

    key: str
    """SHA-256 of the teacher and of everything its outputs depend on."""
    row: Row
    num_positions: int
    """Number of its loss positions. In the batch they follow those of the sample before it, without a gap."""

    @property
    def tokens(self) -> Ints:
        """Its token ids, up to and including its last label."""
        return np.append(self.row.input_ids, self.row.targets[-1])

    @property
    def loss_positions(self) -> Ints:
        """Its loss positions, counted from its first token; position i predicts tokens[i + 1]."""
        return np.flatnonzero(self.row.targets != NO_LABEL)


def samples_of(batch: Batch, fingerprint: str, with_labels: bool) -> list[KeyedSample]:
    """The samples of a batch that have loss positions, in the order of these.

    A sample begins where a row begins, and where position_ids start again. fingerprint: identifies the teacher with all its
    settings. with_labels: the teacher's outputs depend on the labels, too.
    """
    assert batch.inputs.keys() == {"input_ids", "position_ids"}, "a key must cover all inputs"
    ids, positions = (batch.inputs[name].numpy() for name in ("input_ids", "position_ids"))
    begins = np.ones(ids.shape, dtype=bool)
    begins[:, 1:] = positions[:, 1:] != positions[:, :-1] + 1
    starts = np.flatnonzero(begins)
    images = _images_from_first(batch)
    loss_positions, labels = batch.loss_positions.numpy(), batch.labels.numpy()
    edges = np.searchsorted(loss_positions, [*starts, ids.size])
    ids, positions = ids.reshape(-1), positions.reshape(-1)
    samples = []
    for start, first, last in zip(starts, edges[:-1], edges[1:], strict=True):
        if first == last:
            continue
        part = slice(int(start), int(loss_positions[last - 1]) + 1)
        where, wanted = loss_positions[first:last] - start, labels[first:last]
        seen = _images_in(images, part)
        labels_seen = wanted if with_labels else wanted[:0]
        key = _key(fingerprint, ids[part], positions[part], where, labels_seen, images=seen)
        targets = np.full(part.stop - start, NO_LABEL)
        targets[where] = wanted
        row = Row(ids[part], positions[part], targets, images=seen)
        samples.append(KeyedSample(key, row, int(last - first)))
    return samples


def samples_of_row(row: Row, fingerprint: str) -> list[tuple[KeyedSample, int]]:
    """The samples of a row that have loss positions, keyed for payload topk, each with the number of its document."""
    starts = np.flatnonzero(row.position_ids == 0)
    counts = np.add.reduceat((row.targets != NO_LABEL).astype(np.int64), starts)
    documents = [document for document, count in zip(row.documents, counts, strict=True) if count]
    return list(zip(samples_of(collate([row]), fingerprint, with_labels=True), documents, strict=True))


def topk_key(fingerprint: str, tokens: Ints, loss_positions: Ints) -> str:
    """The key that `samples_of` gives, with labels, to a sample of these tokens; position i predicts tokens[i + 1]."""
    ids = tokens[: loss_positions[-1] + 1]
    return _key(fingerprint, ids, np.arange(len(ids)), loss_positions, tokens[loss_positions + 1])


def batch_of_samples(samples: Sequence[KeyedSample], length: int, pack: bool) -> tuple[Batch, list[KeyedSample]]:
    """Makes a batch of these samples, in rows of at most `length` positions.

    pack: several samples may share a row. Returns the batch, and the samples in the order of their loss positions in it.
    """
    bins = [[number] for number in range(len(samples))]
    if pack:
        bins = best_fit([len(sample.row.input_ids) for sample in samples], length)
    rows = [_joined([samples[number].row for number in chosen]) for chosen in bins]
    return collate(rows), [samples[number] for chosen in bins for number in chosen]


def _joined(rows: Sequence[Row]) -> Row:
    starts = np.cumsum([0, *(len(row.input_ids) for row in rows)])
    return Row(
        np.concatenate([row.input_ids for row in rows]),
        np.concatenate([row.position_ids for row in rows]),
        np.concatenate([row.targets for row in rows]),
        images=tuple(
            _moved(image, int(start)) for start, row in zip(starts, rows, strict=False) for image in row.images
        ),
    )


def _images_from_first(batch: Batch) -> list[ImageRef]:
    """All images of a batch, in order; their `start` counts from the first position of the first row."""
    length = batch.inputs["input_ids"].shape[1]
    return [_moved(image, number * length) for number, images in enumerate(batch.images) for image in images]


def _images_in(images: Sequence[ImageRef], part: slice) -> tuple[ImageRef, ...]:
    """Those images that lie in a part of the positions; their `start` counts from its first position."""
    touching = [image for image in images if image.start < part.stop and image.start + image.tokens > part.start]
    # A loss position may be an image's last token, but no earlier one.
    assert all(part.start <= image.start and image.start + image.tokens <= part.stop for image in touching)
    return tuple(_moved(image, -part.start) for image in touching)


def _moved(image: ImageRef, by: int) -> ImageRef:
    return replace(image, start=image.start + by)


def _key(fingerprint: str, *arrays: np.ndarray, images: Sequence[ImageRef] = ()) -> str:
    result = hashlib.sha256(f"{FORMAT} {fingerprint} {[len(array) for array in arrays]}".encode())
    for array in arrays:
        result.update(np.ascontiguousarray(array, dtype=np.int64).data)
    for image in images:  # where they come from does not count
        result.update(f" {image.digest} {image.start} {image.tokens} {image.width} {image.height}".encode())
    return result.hexdigest()


def split(tensors: dict[str, torch.Tensor], samples: Sequence[KeyedSample]) -> dict[str, dict[str, torch.Tensor]]:
    """Splits the teacher's answer, tensors [N, ...], to a batch of just these samples, in this order; the parts by their keys."""
    sizes = [sample.num_positions for sample in samples]
    parts = {name: tensor.split(sizes) for name, tensor in tensors.items()}
    return {sample.key: {name: parts[name][i] for name in parts} for i, sample in enumerate(samples)}


def join(samples: Sequence[KeyedSample], parts: dict[str, dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Joins parts to the answer, tensors [N, ...], to a batch of these samples, in this order."""
    names = parts[samples[0].key]
    return {name: torch.cat([parts[sample.key][name] for sample in samples]) for name in names}
