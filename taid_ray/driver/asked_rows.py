"""The rows that hold every sample for which a run may ask its teacher, and how much they are in all."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice, takewhile
from typing import Any

import numpy as np

from taid_ray.config.schema import DistillConfig
from taid_ray.data.batch import Row
from taid_ray.data.cursor import Cursor
from taid_ray.data.dataset import TrainingData, validation_rows
from taid_ray.data.images import EncoderMedia
from taid_ray.data.shared_ids import check_ids
from taid_ray.data.store.prepared import PreparedData
from taid_ray.driver.prepare import Preparation, prepare_data
from taid_ray.driver.progress import ProgressView
from taid_ray.driver.signals import StopRequest
from taid_ray.models.pair import run_tokenizer
from taid_ray.student.spec import RunSpec

CHUNK_ROWS = 64
"""Stored rows that are read at a time."""


@dataclass(frozen=True)
class Amount:
    """How much of something there is."""

    rows: int
    loss_tokens: int
    samples: int

    def __add__(self, other: "Amount") -> "Amount":
        return Amount(self.rows + other.rows, self.loss_tokens + other.loss_tokens, self.samples + other.samples)


@dataclass(frozen=True)
class AskedRows:
    """The rows of a run for which its teacher is asked: those of validation, then those of training, each once.

    Iterating yields them, any number of times; with the loss `sft` only those of validation. Raises a TaidRayError for
    documents that cannot be read, and for a row with ids that are not shared.
    """

    config: DistillConfig
    spec: RunSpec
    data: PreparedData | None
    """The training data, which are read from the store; None with `data.order: blocks`, where they are encoded here."""
    stop: StopRequest | None = None
    """Somebody's wish that the driver stops, which ends the iteration with the exception that it asks for."""
    media: EncoderMedia | None = None
    """For a run with images, and only then: see `data.dataset.validation_rows`."""

    def __iter__(self) -> Iterator[Row]:
        for row in chain(self.held_out(), self._training()):
            if self.stop is not None and self.stop.requested:
                raise self.stop.end()
            yield row

    def amount(self) -> Amount:
        """Counts them. Of stored rows the index tells it; others are encoded for it."""
        if self.data is None or not self.config.learns_from_teacher:
            return _amount_of(self)
        totals = self.data.totals
        samples = sum(int(source.opened.column("samples").sum()) for source in self.data.sources)
        return _amount_of(self.held_out()) + Amount(totals.rows, totals.loss_tokens, samples)

    def held_out(self) -> Iterator[Row]:
        """Yields those of validation. Errors as of the iteration."""
        tokenizer = run_tokenizer(self.config)
        for source in self.config.data.validations:
            yield from self._checked(validation_rows(source, tokenizer, media=self.media), tokenizer)

    def _training(self) -> Iterator[Row]:
        if not self.config.learns_from_teacher:
            return
        if self.data is None:
            yield from self._encoded()
            return
        stored, count = self.data.stored_rows(), self.data.totals.rows  # whose ids were checked when they were prepared
        try:
            for first in range(0, count, CHUNK_ROWS):
                yield from stored.read(np.arange(first, min(first + CHUNK_ROWS, count)))
        finally:
            stored.close()

    def _encoded(self) -> Iterator[Row]:
        """One epoch of the training rows in blocks or, of a stream, as many as the run's steps take."""
        config, tokenizer = self.config, run_tokenizer(self.config)
        for source in config.data.sources:
            data = TrainingData(source, tokenizer, config.train.seed, batch_size=1)
            training: Iterator[tuple[list[Row], Cursor]]
            if source.streaming:
                training = islice(data.batches(), self.spec.total_steps * config.train.batch_size)
            else:
                training = takewhile(lambda batch: batch[1].epoch == 0, data.batches())
            for rows, _ in training:
                yield from self._checked(rows, tokenizer)

    def _checked(self, rows: list[Row], tokenizer: Any) -> list[Row]:
        check_ids(rows, self.spec.vocabulary.num_shared, tokenizer.get_vocab())
        return rows


def _amount_of(rows: "AskedRows | Iterator[Row]") -> Amount:
    return sum((Amount(1, row.num_loss_tokens, row.num_samples) for row in rows), start=Amount(0, 0, 0))


def needs_preparing(config: DistillConfig) -> bool:
    """Tells whether the training rows for which a teacher is asked come from the store."""
    return config.data.order == "global" and config.learns_from_teacher


def prepared_rows(
    config: DistillConfig, spec: RunSpec, view: ProgressView, media: EncoderMedia | None = None
) -> AskedRows:
    """Prepares the training data on the connected cluster, where they come from the store. Raises what `prepare_data` raises.

    media: see AskedRows.
    """
    data = None
    if needs_preparing(config):
        work = Preparation(view.say, view.wait_for, None)
        data = prepare_data(config, spec.vocabulary.num_shared, work)
    return AskedRows(config, spec, data, media=media)
