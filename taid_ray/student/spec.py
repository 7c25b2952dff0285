"""Messages between the driver and a student worker: the task with its configuration, and the outcome."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from taid_ray.config.schema import DistillConfig
from taid_ray.data.fingerprint import Fingerprint
from taid_ray.data.store.prepared import PreparedData
from taid_ray.media.processor import MediaSettings
from taid_ray.models.vocabulary import Vocabulary


@dataclass(frozen=True)
class DataCheck:
    """What the first block of training documents and the validation documents show of the data."""

    rows: int
    dropped: int
    """Documents of the first block that gave no row (see `data.encoding.Counts`)."""
    truncated: int
    """Documents of the first block that were shortened."""
    valid_rows: int
    description: Sequence[str] = ()
    """Sentences that say how the data were understood."""
    notes: Sequence[str] = ()
    """Sentences that say what of the first block may not be meant."""
    rows_digest: str = ""
    """Hash of the tokens of these rows, and of which of them carry loss."""


@dataclass(frozen=True)
class RunSpec:
    """Facts that every process of the run has to agree on."""

    total_steps: int
    """Number of optimizer steps; 0 until the data are prepared, where `train.epochs` decides it."""
    vocabulary: Vocabulary
    payload_bytes: int
    """Of one answer of the teacher, at most; 0 without one."""
    data: DataCheck
    fingerprint: Fingerprint | None = None
    """Of the data, as the driver has read them."""
    stop_ids: tuple[int, ...] = ()
    """Ids of the tokens that end answers, or documents of `format: text`, in the first block of the training data."""
    media: MediaSettings | None = None
    """How both models' images are processed; None in a run without images."""
    image_bytes: int = 0
    """Of the images of one request to the teacher, at most; 0 until the data are prepared."""


@dataclass(frozen=True)
class WorkerSpec:
    """Everything the driver hands to every student worker of an attempt."""

    config: DistillConfig
    spec: RunSpec
    device: str
    """cpu or cuda."""
    scheduler: Any
    """Handle of the TAID scheduler actor."""
    pool: str
    """Name of the teacher pool's Serve application (unused with a local teacher)."""
    checkpoints: str
    """Where this run's checkpoints are: a directory or a URI."""
    attempt: int = 1
    """Number of the attempt, from 1 over all drivers of the run."""
    data: PreparedData | None = None
    """The encoded training data; None with `data.order: blocks`."""


@dataclass(frozen=True)
class Finished:
    """Outcome of an attempt that made the run's last step."""

    summary: dict[str, Any]
    """The content of summary.json."""


@dataclass(frozen=True)
class Stopped:
    """Outcome of an attempt that somebody stopped; there is a checkpoint of its last step."""

    step: int


Outcome = Finished | Stopped
