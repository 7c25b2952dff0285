"""The growing end of metrics.jsonl and validation.jsonl, read line by line while rank 0 writes them."""

import io
import os
from json import loads
from pathlib import Path
from typing import Any, NamedTuple

from taid_ray.run.layout import METRICS_FILE, VALIDATION_FILE

MOST_LINES = 500
"""Lines that are read and passed on at a time."""
TRAIN, VALIDATION = "train", "validation"
"""Sections of figures: those of metrics.jsonl, and those of validation.jsonl."""


class Figures(NamedTuple):
    """A line of one of the two files."""

    section: str
    line: dict[str, Any]


class MetricsTail:
    """The lines that were added to a run's files since the last `commit`."""

    def __init__(self, run_dir: Path):
        self._metrics = _GrowingFile(run_dir / METRICS_FILE)
        self._validations = _GrowingFile(run_dir / VALIDATION_FILE)
        self.step = self._validated = -1
        """The last step whose line was committed."""
        self._next = (0, 0, -1, -1)

    def begin(self, after: int) -> None:
        """Starts with the lines that follow step `after`, and that step's validation; -1: with everything.

        A step's line is passed on up to a whole validation before its validation is there, so that may be missing yet.
        """
        self._metrics.offset = self._validations.offset = 0
        self.step, self._validated = after, after - 1

    def skip_steps(self) -> None:
        """Starts after the lines that metrics.jsonl has now, for as long as no new file takes its place."""
        self._metrics.reopened()
        self._metrics.skip()

    def restarted(self) -> bool:
        """Opens the files that are new. True if the workers began again from a checkpoint, with a file that goes back to it."""
        self._validations.reopened()
        return self._metrics.reopened()

    def peek(self) -> list[Figures]:
        """The next lines, in the order of their steps; the same again until `commit`."""
        steps, end = self._metrics.read(MOST_LINES)
        validations, validations_end = self._validations.read()
        # Rank 0 leaves a validation before the line of the following step, so after reading this line it is there.
        if len(steps) == MOST_LINES and any(line["step"] > steps[-1]["step"] for line in validations):
            validations = [line for line in validations if line["step"] <= steps[-1]["step"]]
            validations_end = self._validations.offset  # the others are read again
        new = [Figures(TRAIN, line) for line in steps if line["step"] > self.step]
        new += [Figures(VALIDATION, line) for line in validations if line["step"] > self._validated]
        step = max([self.step, *(line["step"] for line in steps)])
        self._next = (end, validations_end, step, max([self._validated, *(line["step"] for line in validations)]))
        return sorted(new, key=lambda figures: figures.line["step"])

    def commit(self) -> bool:
        """Marks the last lines as passed on. Returns whether there may be more of them."""
        more = self._next[0] > self._metrics.offset
        self._metrics.offset, self._validations.offset, self.step, self._validated = self._next
        return more

    def close(self) -> None:
        """Closes the files."""
        self._metrics.close()
        self._validations.close()


class _GrowingFile:
    """Whole lines of a file that grows, and that a new one may replace."""

    def __init__(self, path: Path):
        self._path = path
        self._file: io.BufferedReader | None = None
        self._inode = -1
        self.offset = 0
        """The place where the next line begins."""

    def reopened(self) -> bool:
        """Opens the file if it is new. Returns whether it has taken the place of another one."""
        try:
            inode = self._path.stat().st_ino
        except FileNotFoundError:
            return False
        if inode == self._inode:
            return False
        again = self._file is not None
        self.close()
        self._file, self.offset = self._path.open("rb"), 0
        self._inode = os.fstat(self._file.fileno()).st_ino
        return again

    def skip(self) -> None:
        """Moves to the end of the file."""
        if self._file is not None:
            self.offset = self._file.seek(0, os.SEEK_END)

    def read(self, most: int | None = None) -> tuple[list[dict[str, Any]], int]:
        """The next lines, at most so many, and the place where they end. A line that is being written is left."""
        lines: list[dict[str, Any]] = []
        end = self.offset
        if self._file is not None:
            self._file.seek(end)
            while len(lines) != most and (line := self._file.readline()).endswith(b"\n"):
                lines.append(loads(line))
                end += len(line)
        return lines, end

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()
            self._file = None
