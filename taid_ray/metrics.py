"""What a run writes about itself: one JSON line per optimizer step, and the summary."""

import json
import math
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from taid_ray.errors import CheckpointError, ClusterError

CONFIG_FILE, METRICS_FILE, SUMMARY_FILE = "config.yaml", "metrics.jsonl", "summary.json"
VALIDATION_FILE = "validation.jsonl"
TAIL = 65_536  # bytes, far more than a line of metrics


@dataclass(frozen=True)
class StepMetrics:
    """One line of metrics.jsonl. Loss values are nats per loss position, means over the global batch."""

    step: int
    """Counts from 1."""
    epoch: int
    t: float
    """The t used in this step."""
    momentum: float
    loss: float
    """Cross-entropy form of the divergence: kl + entropy_pt."""
    kl: float
    entropy_pt: float
    sft: float
    floor_active: bool
    lr: float
    grad_norm: float
    """Before clipping."""
    tokens: int
    """Loss positions in this step, over all workers."""
    tokens_per_s: float
    step_s: float
    teacher_wait_s: float
    """Longest time any worker stood still for the teacher in this step."""
    data_s: float
    """This and the following times are rank 0's; with `teacher_wait_s` they make up `step_s`, but for bookkeeping. Here:
    reading the next batches and sending them to the teacher."""
    forward_s: float
    """Without the loss."""
    loss_s: float
    """Heads, divergence, and the gradients that are formed with it."""
    backward_s: float
    optimizer_s: float
    """With the reduction of the gradients that is left over."""
    schedule_wait_s: float
    """Waiting for the next t after the optimizer."""
    teacher_compute_s: float
    """Seconds of computation that all teacher replicas spent on this step."""
    payload_bytes: int
    samples_seen: int


class MetricLog:
    """Appends lines to metrics.jsonl, each before the next step starts. Rank 0 keeps one."""

    def __init__(self, path: Path, last_step: int):
        """Keeps the lines up to `last_step`; those that follow will be written again.

        Raises CheckpointError if one of them is not there.
        """
        kept = _lines_until(path, last_step)
        # In a new file: a rank 0 that everybody thinks dead, and that writes once more, then writes to the old one.
        replace_text(path, "".join(kept))
        self._path, self._file = path, path.open("a", encoding="utf-8")

    def write(self, metrics: StepMetrics) -> None:
        """Raises ClusterError if there is no room for it."""
        try:
            self._file.write(json.dumps(asdict(metrics)) + "\n")
            self._file.flush()
        except OSError as error:
            raise ClusterError(
                f"out: {self._path} cannot be written after step {metrics.step}: {error}; make room, and start the run again "
                "to resume it"
            ) from error

    def sync(self) -> None:
        """After a crash of the machine, too, all lines will be there."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def _lines_until(path: Path, last_step: int) -> list[str]:
    lines = path.read_text("utf-8", errors="replace").splitlines(keepends=True) if path.exists() else []
    for step in range(1, last_step + 1):
        try:
            found = json.loads(lines[step - 1])["step"]
        except (IndexError, ValueError, TypeError, KeyError):
            found = None
        if found != step:
            raise CheckpointError(
                f"{path} has no line for step {step}, and the newest checkpoint is of step {last_step}: the file was changed; "
                "bring it back, or begin in another directory with --out"
            )
    return lines[:last_step]


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All lines of a metrics.jsonl or validation.jsonl."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def read_lines(path: Path, last_only: bool = False) -> list[dict[str, Any]]:
    """JSON objects, one per line; nothing if there is no such file.

    What follows the last line break is being written, or was by a process that died. Raises CheckpointError if a line is
    damaged.
    """
    try:
        with path.open("rb") as file:
            if last_only:
                file.seek(max(0, path.stat().st_size - TAIL))
            lines = file.read().split(b"\n")[:-1]
    except FileNotFoundError:
        return []
    try:
        return [json.loads(line) for line in (lines[-1:] if last_only else lines)]
    except ValueError as error:
        raise damaged(path, f"a line of it is not JSON ({error})") from None


def read_json(path: Path) -> Any:
    """None if there is no such file, or no longer: a run that ends before its first step takes its directory away.

    Raises CheckpointError if it is damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise damaged(path, f"it is not JSON ({error})") from None


def damaged(path: Path, found: str) -> CheckpointError:
    return CheckpointError(f"{path} is damaged: {found}; bring it back, or begin in another directory")


def write_lines(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    """One JSON object per line; as `replace_text`."""
    replace_text(path, "".join(json.dumps(line) + "\n" for line in lines))


def write_json(path: Path, content: dict[str, Any] | list[dict[str, Any]]) -> None:
    """As `replace_text`."""
    replace_text(path, json.dumps(content, indent=2) + "\n")


def replace_text(path: Path, text: str) -> None:
    """Writes through a temporary file, so that nobody ever sees half of it, not even after a crash of the machine."""
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def perplexity(cross_entropy: float) -> float:
    """exp(nats per token); infinite rather than an overflow error for an untrained giant."""
    return math.exp(cross_entropy) if cross_entropy < 700 else math.inf
