"""The growing end of metrics.jsonl and validation.jsonl, read line by line while rank 0 writes them."""

import os
from contextlib import suppress
from json import loads
from pathlib import Path
from typing import Any

from taid_ray.files import read_lines
from taid_ray.run.layout import METRICS_FILE, VALIDATION_FILE
from taid_ray.tracking.sinks import Point, point

MOST_LINES = 500
"""Number of lines that are read and sent at a time."""


class MetricsTail:
    """Hands out the lines that were added to a run's files since the last `commit`."""

    def __init__(self, run_dir: Path):
        self._metrics, self._validation = run_dir / METRICS_FILE, run_dir / VALIDATION_FILE
        self._inode: int | None = None
        self._offset = 0
        self.step = self._validated = -1
        """Last step that was committed."""
        self._next = (0, -1, -1)

    def begin(self, after: int) -> None:
        """Begins after step `after`, with that step's validation; -1: with everything.

        A step's line is sent up to a whole validation before its validation is there, so that may not have been taken.
        """
        self._offset, self.step, self._validated = 0, after, after - 1

    def restarted(self) -> bool:
        """Looks for a new metrics.jsonl. Returns True if it replaces an earlier one: the workers went back to a checkpoint."""
        try:
            inode = self._metrics.stat().st_ino
        except FileNotFoundError:
            return False
        if inode == self._inode:
            return False
        again = self._inode is not None
        self._inode, self._offset = inode, 0
        return again

    def peek(self) -> list[Point]:
        """The next points, in the order of their steps; the same ones again until `commit`."""
        lines, end = self._new_lines()
        # Rank 0 leaves a validation before the line of the following step, so after reading this line it is there.
        until = lines[-1]["step"] if len(lines) == MOST_LINES else None
        validations = [
            found
            for found in read_lines(self._validation)
            if found["step"] > self._validated and (until is None or found["step"] <= until)
        ]
        points = [point(line, "train") for line in lines if line["step"] > self.step]
        points += [point(found, "validation") for found in validations]
        last = max([self.step, *(line["step"] for line in lines)])
        self._next = (end, last, max([self._validated, *(found["step"] for found in validations)]))
        return sorted(points, key=lambda each: each.step)

    def commit(self) -> bool:
        """Moves on past the last points. Returns True if more lines are waiting."""
        more = self._next[0] > self._offset
        self._offset, self.step, self._validated = self._next
        return more

    def _new_lines(self) -> tuple[list[dict[str, Any]], int]:
        """The next whole lines, MOST_LINES at most, and the offset of their end.

        The file is opened anew each time, so that NFS shows what was written last. None if it was replaced meanwhile.
        """
        lines: list[dict[str, Any]] = []
        end = self._offset
        with suppress(FileNotFoundError), self._metrics.open("rb") as file:
            if os.fstat(file.fileno()).st_ino == self._inode:
                file.seek(end)
                while len(lines) < MOST_LINES and (line := file.readline()).endswith(b"\n"):
                    lines.append(loads(line))
                    end += len(line)
        return lines, end
