"""The one global order of training rows, which every worker derives for itself, and the validation rows.

Documents are read in fixed blocks in the dataset's order; a block's samples are shuffled, packed into rows, and the
rows shuffled again, by nothing but (seed, epoch, block). So global batch n is the same for any number of workers, after
any restart, streamed or not.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TypeVar

from transformers import PreTrainedTokenizerBase

from taid_ray.config.data import DataSource
from taid_ray.data.batch import Row
from taid_ray.data.cursor import BlockCursor
from taid_ray.data.documents import Documents, open_documents
from taid_ray.data.encoding import Columns, Counts, Encoder
from taid_ray.data.images import BLOCK_DOCUMENTS_WITH_IMAGES, EncoderMedia
from taid_ray.data.packing import Sample, to_rows
from taid_ray.errors import DataError
from taid_ray.media.reader import resolved
from taid_ray.media.refs import ImageRef

T = TypeVar("T")


START = BlockCursor()


class TrainingData:
    """Training rows as global batches, in an order that depends on the data, `config` and `seed` only."""

    def __init__(
        self,
        config: DataSource,
        tokenizer: PreTrainedTokenizerBase,
        seed: int,
        batch_size: int,
        media: EncoderMedia | None = None,
    ) -> None:
        """Opens `config.train`.

        media: in a run with images, and only then. Raises DataError if it cannot be read, or if validation takes all of it.
        """
        self._source = f"{config.key}: {config.train}"
        self._config, self._tokenizer, self._seed, self._batch_size = config, tokenizer, seed, batch_size
        self.documents = open_documents(config, "train")
        self._num_validation = config.valid_documents if config.valid is None else 0
        self._media = media
        self._encoder = Encoder(config, tokenizer, self._source, media)
        if next(self._blocks(0), None) is None:
            found = self.num_documents or f"at most {self._num_validation}"
            raise DataError(
                f"{self._source} has {found} documents and the first data.valid_documents = {self._num_validation} are held "
                f"out for validation, so none is left to train on. Set data.valid, or a smaller data.valid_documents."
            )

    @property
    def num_documents(self) -> int | None:
        """Number of documents in the training data, those for validation included; None for a stream.

        Reads all of them, the first time. Raises DataError for what cannot be read.
        """
        return self.documents.count()

    def description(self) -> list[str]:
        """Says in sentences how the data were understood, and what is kept for validation."""
        said = self.documents.description()
        if self._num_validation:
            kept = "document is" if self._num_validation == 1 else f"{self._num_validation} documents are"
            said.append(f"{self._source}: the first {kept} kept for validation")
        return said + self._encoder.description()

    def notes(self) -> list[str]:
        """Says in sentences what of the documents read so far may not be meant."""
        return self._encoder.notes()

    def stop_ids(self) -> list[int]:
        """Lists the ids of the tokens that end answers, or documents of `format: text`, of those read so far."""
        return self._encoder.stop_ids()

    @property
    def counts(self) -> Counts:
        """Counts of the documents that this process has read since it started (it reads ahead of the training)."""
        return self._encoder.counts

    def batches(self, start: BlockCursor = START) -> Iterator[tuple[list[Row], BlockCursor]]:
        """Yields global batches of `batch_size` rows for ever, each with the cursor after it.

        From a cursor that was yielded, exactly the batches that followed it. Raises DataError for a bad row, and if the
        data hold nothing to learn from.
        """
        batch: list[Row] = []
        for row, cursor in self._rows(start):
            batch.append(row)
            if len(batch) == self._batch_size:
                yield batch, cursor
                batch = []

    def first_block(self) -> list[Row]:
        """Reads the rows of the first block of epoch 0. Raises DataError for a bad row."""
        return self._block_rows(self._encoder, 0, 0, *next(self._blocks(0)))

    def samples(self) -> Iterator[Sample]:
        """Yields the samples of one pass in the order of the data, before they are shuffled and packed.

        Raises DataError for a bad row, and if there are none.
        """
        found = False
        for first_row, columns in self._blocks(0):
            for sample in self._encoder.encode(columns, first_row):
                found = True
                yield sample
        if not found:
            raise nothing_to_learn(self._source, self.counts)

    def rows_per_epoch(self) -> int:
        """Counts the rows in one pass over the data, the same in every epoch. Reads and encodes all of it."""
        encoder = Encoder(self._config, self._tokenizer, self._source, self._media)
        blocks = enumerate(self._blocks(0))
        return sum(len(self._block_rows(encoder, 0, block, *documents)) for block, documents in blocks)

    def _rows(self, start: BlockCursor) -> Iterator[tuple[Row, BlockCursor]]:
        epoch, first, skip, samples = start.epoch, start.block, start.row, start.samples
        while True:
            found = 0
            for block, documents in enumerate(self._blocks(first), first):
                rows = self._block_rows(self._encoder, epoch, block, *documents)
                found += len(rows)
                for number, row in enumerate(rows[skip:], skip + 1):
                    samples += row.num_samples
                    yield row, BlockCursor(epoch, block, number, samples)
                skip = 0
            if first == 0 and not found:
                raise nothing_to_learn(self._source, self.counts)
            epoch, first, skip = epoch + 1, 0, 0

    def _blocks(self, first: int) -> Iterator[tuple[int, Columns]]:
        size = self._config.block_documents
        if self._media is not None:  # then rows are only looked at here, and a block holds all its images
            size = min(size, BLOCK_DOCUMENTS_WITH_IMAGES)
        return self.documents.blocks(self._num_validation + first * size, size)

    def _block_rows(self, encoder: Encoder, epoch: int, block: int, first_row: int, columns: Columns) -> list[Row]:
        samples = self._shuffled(encoder.encode(columns, first_row), epoch, block, "samples")
        rows = to_rows(samples, self._config.sequence_length, self._config.pack)
        return self._shuffled(rows, epoch, block, "rows")

    def _shuffled(self, items: list[T], epoch: int, block: int, what: str) -> list[T]:
        # Seeding with text uses all of it (SHA-512), whatever PYTHONHASHSEED is.
        random.Random(f"{self._seed}/{epoch}/{block}/{what}").shuffle(items)
        return items


def open_validation(config: DataSource) -> Documents:
    """Opens the documents that validation begins with: `data.valid` or, without it, `data.train`. Raises DataError."""
    return open_documents(config, "train" if config.valid is None else "valid")


def validation_rows(
    config: DataSource,
    tokenizer: PreTrainedTokenizerBase,
    documents: Documents | None = None,
    media: EncoderMedia | None = None,
) -> list[Row]:
    """Reads the rows of the first `valid_documents` documents of `data.valid` or, without it, of `data.train`; never shuffled.

    documents: those of `open_validation`, where they are open already. media: in a run with images, and only then; its `keep`
    takes those that the documents hold as bytes. Raises DataError if they cannot be read or hold nothing to predict.
    """
    source = f"{config.key}: {config.train}" if config.valid is None else f"{config.valid_key}: {config.valid}"
    encoder = Encoder(config, tokenizer, source, media)
    documents = documents or open_validation(config)
    first_row, columns = next(documents.blocks(0, config.valid_documents))
    samples = encoder.encode(columns, first_row)
    if not samples:
        raise nothing_to_learn(source, encoder.counts)
    rows = to_rows(samples, config.sequence_length, config.pack)
    return (
        rows
        if media is None
        else [replace(row, images=with_places(row.images, config.images_directory)) for row in rows]
    )


def with_places(images: Sequence[ImageRef], directory: str | None) -> tuple[ImageRef, ...]:
    """Gives images the places at which a reader finds them. directory: `data.images_directory`."""
    return tuple(replace(image, place=resolved(image.place, directory)) for image in images)


def nothing_to_learn(source: str, counts: Counts) -> DataError:
    """Makes the error for documents of which none gave a sample. source: the key of the data and their name."""
    images = f", {counts.bad_images} of them for an image that cannot be used" if counts.bad_images else ""
    return DataError(
        f"{source} has no loss position: none of {counts.documents} documents gave a sample ({counts.dropped} were "
        f"dropped as empty, too long, or with their response cut off{images}). Check data.sequence_length and data.overlong."
    )
