"""The training data of one worker: its part of every step, from the store or from documents that it encodes itself."""

from collections.abc import Iterator
from typing import Protocol

from transformers import PreTrainedTokenizerBase

from taid_ray.config.schema import DistillConfig
from taid_ray.data.batch import Row
from taid_ray.data.batching import num_micro_batches
from taid_ray.data.cursor import BlockCursor, Cursor, Position
from taid_ray.data.dataset import START, TrainingData
from taid_ray.data.encoding import Counts
from taid_ray.data.shared_ids import check_ids
from taid_ray.data.store.prepared import PreparedData
from taid_ray.distributed.world import World
from taid_ray.errors import CheckpointError
from taid_ray.student.prefetch import StepBatches, step_batches
from taid_ray.student.spec import WorkerSpec


class StepSource(Protocol):
    """Gives a worker its part of every optimizer step, whatever the order of the data is."""

    @property
    def counts(self) -> Counts:
        """Numbers of documents by what became of them: of all or, where they are read as needed, of those read so far."""

    def steps(self, done: int, start: Cursor | None) -> Iterator[StepBatches]:
        """Yields the steps after step `done`, up to the run's last one.

        start: the cursor after step `done`; None at the beginning. Raises DataError for data that cannot be read,
        CheckpointError if the cursor belongs to another order of the data.
        """


def open_training_data(worker: WorkerSpec, tokenizer: PreTrainedTokenizerBase, world: World) -> StepSource:
    """Opens the data of a run for this rank. Raises DataError."""
    if worker.data is not None:
        return StoredSteps(worker.config, worker.data, worker.spec.total_steps, world)
    return BlockSteps(worker, tokenizer, world)


class StoredSteps:
    """Steps from the store, in the global order. Of a global batch only this rank's rows are read."""

    def __init__(self, config: DistillConfig, data: PreparedData, total_steps: int, world: World) -> None:
        train = config.train
        self._data, self._total_steps, self._world, self._batch_size = data, total_steps, world, train.batch_size
        self._accumulation = num_micro_batches(train.batch_size, train.micro_batch_size, world.size)
        self._reader = data.reader(train.seed, train.batch_size)

    @property
    def counts(self) -> Counts:
        """Numbers of all documents by what became of them."""
        return self._data.counts

    def steps(self, done: int, start: Cursor | None) -> Iterator[StepBatches]:
        """Yields the steps after step `done`; see `StepSource`. Reads nothing of what lies before."""
        place = Position() if start is None else start
        if not isinstance(place, Position) or place.position != done * self._batch_size:
            raise CheckpointError(
                f"the checkpoint of step {done} stands at {place}, which is no place of data.order: global with "
                f"train.batch_size: {self._batch_size}; give these keys their old values to resume the run"
            )
        samples = place.samples
        for step in range(done, self._total_steps):
            found = self._reader.read(step, self._world.rank, self._world.size)
            samples += found.num_samples
            used = (step + 1) * self._batch_size
            cursor = Position(used, (used - 1) // self._data.rows, samples)
            yield StepBatches.of(found.rows, self._accumulation, found.num_loss_tokens, cursor)


class BlockSteps:
    """Steps from the documents themselves, in the order of blocks. Every rank encodes whole global batches."""

    def __init__(self, worker: WorkerSpec, tokenizer: PreTrainedTokenizerBase, world: World) -> None:
        """Raises DataError if the documents cannot be read."""
        train = worker.config.train
        self._worker, self._world = worker, world
        self._accumulation = num_micro_batches(train.batch_size, train.micro_batch_size, world.size)
        (source,) = worker.config.data.sources  # several are mixed in the global order only
        self._data = TrainingData(source, tokenizer, train.seed, train.batch_size)
        self._tokens = tokenizer.get_vocab()

    @property
    def counts(self) -> Counts:
        """Numbers of the documents that this process has read, by what became of them; it reads ahead of the training."""
        return self._data.counts

    def steps(self, done: int, start: Cursor | None) -> Iterator[StepBatches]:
        """Yields the steps after step `done`; see `StepSource`. Each batch is checked to hold shared ids only."""
        cursor = START if start is None else start
        if not isinstance(cursor, BlockCursor):
            raise CheckpointError(
                f"the checkpoint of step {done} was made with data.order: global; give that key its old value to resume the run"
            )
        return step_batches(self._batches(done, cursor), self._world, self._accumulation)

    def _batches(self, done: int, start: BlockCursor) -> Iterator[tuple[list[Row], Cursor]]:
        spec = self._worker.spec
        for _, (rows, cursor) in zip(range(done, spec.total_steps), self._data.batches(start), strict=False):
            check_ids(rows, spec.vocabulary.num_shared, self._tokens)
            yield rows, cursor
