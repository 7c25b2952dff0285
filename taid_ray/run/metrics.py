"""RUN/metrics.jsonl: one line of figures per optimizer step."""

import json
import math
import os
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from taid_ray.errors import RunError
from taid_ray.files import replace_text

PHASES = ("data", "teacher_wait", "forward", "loss", "backward", "optimizer", "schedule_wait")
"""What the time of a step is made of, but for bookkeeping: `StepMetrics` has each with `_s` at its end."""


@dataclass(frozen=True)
class StepMetrics:
    """One line of metrics.jsonl. Loss values are nats per loss position, means over the global batch."""

    step: int
    """Number of the step, from 1."""
    epoch: int
    t: float
    """Value of t used in this step."""
    momentum: float
    loss: float
    """Cross-entropy form of the divergence: kl + entropy_pt."""
    kl: float
    entropy_pt: float
    sft: float
    floor_active: bool
    lr: float
    grad_norm: float
    """Norm of the gradient before clipping."""
    tokens: int
    """Number of loss positions in this step, over all workers."""
    tokens_per_s: float
    step_s: float
    teacher_wait_s: float
    """Longest time any worker waited for the teacher in this step."""
    data_s: float
    """Reading the next batches and sending them to the teacher. This and the following times are rank 0's."""
    forward_s: float
    """Forward pass without the loss."""
    loss_s: float
    """Heads, divergence, and the gradients that are formed with it."""
    backward_s: float
    optimizer_s: float
    """Optimizer, with the rest of the reduction of the gradients."""
    schedule_wait_s: float
    """Waiting for the next t after the optimizer."""
    teacher_compute_s: float
    """Seconds of computation that all teacher replicas spent on this step."""
    payload_bytes: int
    samples_seen: int


class MetricLog:
    """Appends lines to metrics.jsonl, each before the next step starts. Rank 0 keeps one."""

    def __init__(self, path: Path, last_step: int):
        """Keeps the lines up to `last_step`; those after it will be written again.

        Raises RunError if one of those is missing.
        """
        kept = _lines_until(path, last_step)
        # In a new file: a rank 0 that everybody thinks dead, and that writes once more, then writes to the old one.
        replace_text(path, "".join(kept))
        self._path, self._file = path, path.open("a", encoding="utf-8")

    def write(self, metrics: StepMetrics) -> None:
        """Appends a line. Raises RunError if there is no room for it."""
        try:
            self._file.write(json.dumps(asdict(metrics)) + "\n")
            self._file.flush()
        except OSError as error:
            raise RunError(
                f"out: {self._path} cannot be written after step {metrics.step}: {error}; make room, and start the run again "
                "to resume it"
            ) from error

    def sync(self) -> None:
        """Makes sure that all lines are on the disk, also after a crash of the machine."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file. Lines that did not fit are not told again: `write` has."""
        with suppress(OSError):
            self._file.close()


def _lines_until(path: Path, last_step: int) -> list[str]:
    lines = path.read_text("utf-8", errors="replace").splitlines(keepends=True) if path.exists() else []
    for step in range(1, last_step + 1):
        try:
            found = json.loads(lines[step - 1])["step"]
        except (IndexError, ValueError, TypeError, KeyError):
            found = None
        if found != step:
            raise RunError(
                f"{path} has no line for step {step}, and the newest checkpoint is of step {last_step}: the file was changed; "
                "restore it, or start again in another directory with --out"
            )
    return lines[:last_step]


def perplexity(cross_entropy: float) -> float:
    """exp(nats per token); infinite rather than an overflow error for an untrained giant."""
    return math.exp(cross_entropy) if cross_entropy < 700 else math.inf
