"""Preparing the training data: seconds that a start takes the first time, and bytes that their store has then."""

from dataclasses import dataclass

from taid_ray.config.schema import DistillConfig

ENCODE_TOKENS_PER_S = 1e6
"""Tokens that one CPU encodes per second (assumed; benchmarks/data.py)."""
STORED_TOKENS_PER_S, ORDERED_ROWS_PER_S = 2e7, 2e7
"""Tokens that a worker reads from the store per second, and rows of the global batch whose place and size it looks up."""
TOKEN_BYTES = 4 + 1 / 8
"""An id, and one bit that says whether the position carries loss."""
INDEX_ROW_BYTES = 20


@dataclass(frozen=True)
class DataPreparation:
    """Preparing so many tokens of documents, with `data.order: global`; what is prepared already costs nothing."""

    tokens: float
    cpus: float
    """CPUs that encode: those of the student's workers, which wait meanwhile."""
    seconds: float
    """Of encoding them; the teacher's pool loads its models at the same time."""
    store_bytes: float
    """Bytes of the rows."""
    index_bytes: float
    """Bytes of the index of the rows, if all are full; every node has it in memory."""


def data_preparation(config: DistillConfig, workers: int, tokens: float) -> DataPreparation | None:
    """Computes what preparing `tokens` tokens takes; None with `data.order: blocks`, which prepares nothing."""
    if config.data.order == "blocks":
        return None
    cpus = max(1.0, workers * config.student.cpus_per_worker)
    rows = tokens / config.data.sequence_length
    return DataPreparation(
        tokens, cpus, tokens / (cpus * ENCODE_TOKENS_PER_S), tokens * TOKEN_BYTES, rows * INDEX_ROW_BYTES
    )


def row_s(config: DistillConfig) -> float:
    """Computes the seconds of reading one row, and with `data.order: blocks` of encoding it."""
    speed = ENCODE_TOKENS_PER_S if config.data.order == "blocks" else STORED_TOKENS_PER_S
    return config.data.sequence_length / speed


def step_read_s(config: DistillConfig, one_row_s: float, worker_rows: int, workers: int) -> float:
    """Computes the seconds in which one worker reads a step. one_row_s: as `row_s` computes it.

    It reads its own rows, of whose global batch it only looks up the order and the sizes; with `data.order: blocks` it reads
    all rows of the batch.
    """
    if config.data.order == "blocks":
        return one_row_s * worker_rows * workers
    return one_row_s * worker_rows + worker_rows * workers / ORDERED_ROWS_PER_S
