"""Interface between a student worker and any teacher, be it in the same process, in a pool or in a cache."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from taid_ray.config.models import Payload
from taid_ray.data.batch import Batch
from taid_ray.errors import ModelError
from taid_ray.losses.projection import LogitTransform
from taid_ray.models.head import Head
from taid_ray.teacher.payload import PayloadFormat, TeacherOutput, check_output


@dataclass(frozen=True)
class TeacherInfo:
    """Identity and shape of a loaded teacher. Equal for all replicas of a pool, `probe_digest` possibly excepted."""

    fingerprint: str
    """SHA-256 of architecture, precision, shared rows, payload, top-k, and sums over all bits of all weights. The same
    whatever teacher.shards is. Before taid-ray covered all shards, that of a split teacher was of shard 0 only: what a
    cache holds under such a fingerprint is missed, and computed again."""
    probe_digest: str
    """SHA-256 of the bits of the answer to a fixed probe; differs between kinds of hardware."""
    head_digest: str
    """SHA-256 of the head's shared rows (and bias)."""
    dtype: str
    """Type of its hidden states and logits, for example bfloat16."""
    hidden_size: int
    num_parameters: int
    vocab_rows: int
    """Rows of the whole head."""
    num_shared: int
    """Rows that are used: the ids shared with the student."""
    payload: Payload
    topk: int
    """Ids per loss position of payload topk."""
    bytes_per_token: int
    """Bytes of an answer per loss position."""
    transform: LogitTransform
    has_bias: bool
    dropped_mass: float
    """Mean probability on ids >= num_shared, on the probe."""
    packing_error: str | None
    """Why packed rows must not be sent to this teacher; None if they may."""

    def require_packing(self) -> None:
        """Raises ModelError if packed rows must not be sent to this teacher."""
        if self.packing_error:
            raise ModelError(f"teacher.model: {self.packing_error}")

    def check_output(self, tensors: Mapping[str, Tensor], num_positions: int) -> None:
        """Raises TeacherError unless these may be this teacher's answer for so many loss positions."""
        check_output(tensors, self._format, num_positions)

    def empty_output(self, device: torch.device) -> TeacherOutput:
        """Returns the answer for no loss positions, on `device`."""
        return self._format.empty(device)

    @property
    def _format(self) -> PayloadFormat:
        return PayloadFormat(self.payload, self.hidden_size, self.num_shared, self.topk, getattr(torch, self.dtype))


class TeacherClient(Protocol):
    """Interface of a teacher to a student worker. Requests are pure: any of them may be computed again."""

    @property
    def tokens(self) -> int:
        """Positions (rows x length) that the teacher was asked to compute so far."""

    def submit(self, batch: Batch) -> Any:
        """Starts a request and returns at once."""

    def collect(self, request: Any) -> TeacherOutput:
        """Waits for the answer. Raises TeacherError if there is none."""

    def payload_error(self, batch: Batch) -> float:
        """Measures what the payload loses on a batch, see TeacherModel.payload_error."""

    def seeing(self, batch: Batch, without: Batch) -> list[float]:
        """Measures how far the images change what the teacher predicts, see TeacherModel.seeing.

        without: the same rows with other images, of the same sizes, in the places of theirs.
        """

    def head(self) -> Head:
        """Returns the head's shared rows. All workers of a run call it, or none does."""

    def info(self) -> TeacherInfo:
        """Returns what identifies the teacher. Raises TeacherError if it cannot be asked."""

    def close(self) -> None:
        """Withdraws what is still under way, and ends the client's threads."""
