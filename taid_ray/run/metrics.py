"""Files that a run writes about itself while it works: a JSON line per optimizer step, and one per validation."""

import json
import math
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from taid_ray.errors import RunError
from taid_ray.files import write_lines

PHASES = ("data", "teacher_wait", "forward", "loss", "backward", "optimizer", "schedule_wait")
"""What the time of a step is made of, but for bookkeeping: `StepMetrics` has each with `_s` at its end."""


OF_TEACHER = (
    "t", "momentum", "kl", "entropy_pt", "floor_active", "teacher_wait_s", "teacher_compute_s", "payload_bytes",
    "temperature", "image_bytes",
)  # fmt: skip
"""Fields of StepMetrics that mean something only where the loss compares with a teacher, so that lines of `sft` lack them."""


@dataclass(frozen=True)
class StepMetrics:
    """Figures of a step. Loss values are nats per loss position, means over the global batch."""

    step: int
    """Number of the step, from 1."""
    epoch: int
    t: float
    """Value of t used in this step."""
    momentum: float
    loss: float
    """Cross-entropy form of the divergence: kl + entropy_pt. With `sft` the cross-entropy on the labels."""
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
    sources: dict[str, dict[str, float]] | None = None
    """Figures of each source of training data, by its name, if there are several: `loss`, `kl`, `sft` and `tokens`; without
    the sources that had no loss position in the step."""

    temperature: float = 1.0
    """Temperature of the loss in this step."""
    images: int | None = None
    """Number of images in the rows of this step; None in a run without images, as `image_bytes`."""
    image_bytes: int | None = None
    """Bytes of images that were put into the object store for the teacher; equal ones of a request count once, and those of
    answers that the cache had do not count."""

    def line(self, learns_from_teacher: bool = True) -> dict[str, Any]:
        """Returns the line's content, without OF_TEACHER where the loss asks no teacher."""
        left_out = () if learns_from_teacher else OF_TEACHER
        found = {key: value for key, value in asdict(self).items() if key not in left_out and value is not None}
        sources = found.pop("sources", None)
        if sources is None:
            return found
        kept = {
            name: {key: value for key, value in part.items() if key not in left_out} for name, part in sources.items()
        }
        return found | {"sources": kept}


class LineLog:
    """A file of JSON lines in RUN that grows while the run works. `metrics_log` and `validation_log` open one."""

    def __init__(self, path: Path):
        self._path, self._file = path, path.open("a", encoding="utf-8")

    def write(self, line: Mapping[str, Any]) -> None:
        """Appends a line, which has the key `step`. Raises RunError if there is no room for it."""
        try:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        except OSError as error:
            raise RunError(
                f"out: {self._path} cannot be written after step {line['step']}: {error}; make room, and start the run again "
                "to resume it"
            ) from error

    def sync(self) -> None:
        """Makes sure that all lines survive a crash of the machine."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file. Lines that did not fit are not told again: `write` has."""
        with suppress(OSError):
            self._file.close()


def validation_log(path: Path, kept: Iterable[dict[str, Any]]) -> LineLog:
    """A log of validations that begins anew with the lines `kept`."""
    write_lines(path, kept)
    return LineLog(path)


def metrics_log(path: Path, last_step: int) -> LineLog:
    """A log of steps that goes on after `last_step`; lines of later steps are dropped, and will be written again.

    The kept lines, one per step from 1 on, go into a new file: a rank 0 that everybody thinks dead, and that writes once
    more, then writes to the old one. Only the last of them is parsed. Raises RunError if that is not the line of `last_step`.
    """
    try:
        last = _copy_first_lines(path, last_step)
    except OSError as error:
        raise RunError(
            f"out: {path} cannot be written ({error}); make room there, and give the same command again"
        ) from error
    if last_step and not _is_step(last, last_step):
        raise RunError(
            f"{path} lacks a line of step {last_step} or before, and the newest checkpoint is of step {last_step}: the file was "
            "changed; restore it, or start again in another directory with --out"
        )
    path.with_suffix(".tmp").replace(path)
    return LineLog(path)


def _copy_first_lines(path: Path, count: int) -> bytes:
    """Copies the first lines of `path` into a file beside it with the suffix .tmp. Returns the last of them."""
    last = b""
    with path.with_suffix(".tmp").open("wb") as new:
        if count and path.exists():
            with path.open("rb") as old:
                for last in islice(old, count):
                    new.write(last)
        new.flush()
        os.fsync(new.fileno())
    return last


def _is_step(line: bytes, step: int) -> bool:
    try:
        return line.endswith(b"\n") and json.loads(line)["step"] == step
    except (ValueError, TypeError, KeyError):
        return False


def perplexity(cross_entropy: float) -> float:
    """exp(nats per token); infinite rather than an overflow error for an untrained giant."""
    return math.exp(cross_entropy) if cross_entropy < 700 else math.inf
