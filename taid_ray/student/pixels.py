"""The model inputs of the student's batches in a run with images: each micro-batch goes through the vision tower."""

import torch
from torch import Tensor

from taid_ray.data.batch import PAD_ID, Batch
from taid_ray.media.pictures import Pictures, Read
from taid_ray.media.processor import MediaProcessor


class BatchInputs:
    """Makes model inputs of batches, with a blank row for those without an image.

    Without it such a batch would not call the vision tower: under ZeRO 3 its rank would gather other weights than its peers, and
    below that parameters would have no gradient. The row holds a small grey image and no loss position, so that it adds exactly
    zero to every gradient.
    """

    def __init__(self, media: MediaProcessor, read: Read):
        """read: returns the bytes of an image."""
        self.media = media
        self._pictures = Pictures(media, read)
        ids, ref, content = media.blank_row()
        self._blank_ids, self._blank = torch.from_numpy(ids.copy()), media.picture(ref, content)

    def prepare(self, batch: Batch) -> None:
        """Begins to process a batch's images, in a thread. For the batch that `of` is asked for next."""
        self._pictures.prepare(batch.images)

    def of(self, batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
        """The model inputs of a batch, and its loss positions in them, [N], flat. Raises DataError for a broken image."""
        if batch.images:
            return self._pictures.inputs(batch.inputs, batch.images), batch.loss_positions
        rows, length = batch.inputs["input_ids"].shape
        ids, positions = with_row(batch.inputs, self._blank_ids)
        inputs = self.media.inputs(ids, positions, [()] * rows + [[self._blank]])
        row, column = batch.loss_positions // length, batch.loss_positions % length
        return inputs, row * ids.shape[1] + column

    def blank(self) -> dict[str, Tensor]:
        """Inputs of the blank row alone."""
        positions = torch.arange(len(self._blank_ids))
        return self.media.inputs(self._blank_ids[None], positions[None], [[self._blank]])

    def close(self) -> None:
        """Ends the thread."""
        self._pictures.close()


def with_row(inputs: dict[str, Tensor], row: Tensor) -> tuple[Tensor, Tensor]:
    """Appends a row of ids [L] to a batch [B, T]. Returns ids and positions, [B + 1, max(T, L)], padded as `collate` does."""
    ids, positions = inputs["input_ids"], inputs["position_ids"]
    rows, length = ids.shape
    width = max(length, len(row))
    wide = torch.full((rows + 1, width), PAD_ID, dtype=ids.dtype)
    wide[:rows, :length], wide[rows, : len(row)] = ids, row
    following = positions[:, -1:] + torch.arange(1, width - length + 1)
    return wide, torch.cat([torch.cat([positions, following], dim=1), torch.arange(width)[None]])
