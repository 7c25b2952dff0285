"""The samples of a batch: what attends only to itself, so that its teacher outputs are the same in any other batch."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from taid_ray.data.batch import NO_LABEL, Batch, Row, collate
from taid_ray.data.packing import best_fit

FORMAT = "taid-ray sample 1"
"""Part of every key. To be changed with anything that makes the teacher's outputs other ones."""


@dataclass(frozen=True)
class KeyedSample:
    """One sample of a batch, up to its last loss position: what follows does not matter to a causal model."""

    key: str
    """SHA-256 of the teacher and of everything its outputs depend on."""
    row: Row
    num_positions: int
    """Its loss positions. In the batch they follow those of the sample before it, without a gap."""


def samples_of(batch: Batch, fingerprint: str, with_labels: bool) -> list[KeyedSample]:
    """The samples of a batch that have loss positions, in order.

    A sample begins where a row does, and where position_ids do not go on counting. fingerprint: of the teacher, with all
    its settings. with_labels: whether its outputs depend on the labels, too.
    """
    assert batch.inputs.keys() == {"input_ids", "position_ids"}, "a key must cover all inputs"
    ids, positions = (batch.inputs[name].numpy() for name in ("input_ids", "position_ids"))
    begins = np.ones(ids.shape, dtype=bool)
    begins[:, 1:] = positions[:, 1:] != positions[:, :-1] + 1
    starts = np.flatnonzero(begins)
    loss_positions, labels = batch.loss_positions.numpy(), batch.labels.numpy()
    edges = np.searchsorted(loss_positions, [*starts, ids.size])
    ids, positions = ids.reshape(-1), positions.reshape(-1)
    found = []
    for start, first, last in zip(starts, edges[:-1], edges[1:], strict=True):
        if first == last:
            continue
        part = slice(start, loss_positions[last - 1] + 1)
        where, wanted = loss_positions[first:last] - start, labels[first:last]
        key = _key(fingerprint, ids[part], positions[part], where, wanted if with_labels else wanted[:0])
        targets = np.full(part.stop - start, NO_LABEL)
        targets[where] = wanted
        row = Row(ids[part].tolist(), positions[part].tolist(), targets.tolist())
        found.append(KeyedSample(key, row, int(last - first)))
    return found


def batch_of_samples(samples: Sequence[KeyedSample], length: int, pack: bool) -> tuple[Batch, list[KeyedSample]]:
    """The samples as a batch of rows of at most `length` positions, and in the order of their loss positions in it.

    pack: whether several may share a row.
    """
    bins = [[number] for number in range(len(samples))]
    if pack:
        bins = best_fit([len(sample.row.input_ids) for sample in samples], length)
    rows = [_joined([samples[number].row for number in chosen]) for chosen in bins]
    return collate(rows), [samples[number] for chosen in bins for number in chosen]


def _joined(rows: Sequence[Row]) -> Row:
    return Row(
        [token for row in rows for token in row.input_ids],
        [position for row in rows for position in row.position_ids],
        [target for row in rows for target in row.targets],
    )


def _key(fingerprint: str, *arrays: np.ndarray) -> str:
    result = hashlib.sha256(f"{FORMAT} {fingerprint} {[len(array) for array in arrays]}".encode())
    for array in arrays:
        result.update(np.ascontiguousarray(array, dtype=np.int64).data)
    return result.hexdigest()


def split(tensors: dict[str, torch.Tensor], samples: Sequence[KeyedSample]) -> dict[str, dict[str, torch.Tensor]]:
    """By key, each sample's part of the teacher's answer [N, ...] to a batch of just these samples, in this order."""
    sizes = [sample.num_positions for sample in samples]
    parts = {name: tensor.split(sizes) for name, tensor in tensors.items()}
    return {sample.key: {name: parts[name][i] for name in parts} for i, sample in enumerate(samples)}


def join(samples: Sequence[KeyedSample], found: dict[str, dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The answer [N, ...] to a batch of these samples, in this order, from their parts."""
    names = found[samples[0].key]
    return {name: torch.cat([found[sample.key][name] for sample in samples]) for name in names}
