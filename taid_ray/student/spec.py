"""What the driver hands to every student worker: the configuration, and what preflight found out."""

from dataclasses import dataclass
from typing import Any

from taid_ray.config.schema import DistillConfig
from taid_ray.models.vocabulary import Vocabulary


@dataclass(frozen=True)
class DataCheck:
    """What became of the first block of training documents, and of the validation documents."""

    rows: int
    dropped: int
    """Documents of the first block that gave no row (see `data.encoding.Counts`)."""
    truncated: int
    """Documents of the first block that were shortened."""
    valid_rows: int


@dataclass(frozen=True)
class RunSpec:
    """What every process of the run has to agree on."""

    total_steps: int
    vocabulary: Vocabulary
    payload_bytes: int
    """Of one request to the teacher, at most."""
    data: DataCheck


@dataclass(frozen=True)
class WorkerSpec:
    """What the driver hands to every student worker."""

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
    restarts: int = 0
    """Attempts before this one."""
