"""Clock for the phases of a training step."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


class PhaseClock:
    """Splits the time of a step into named phases; what an inner phase takes does not count for the outer one.

    On a GPU the marks are events in its stream, so that a phase lasts as long as its kernels, not as their launch, and
    nothing has to wait for the device before `lap`.
    """

    def __init__(self, device: torch.device, clock: Callable[[], float] = time.perf_counter):
        """clock: in seconds; not asked on a GPU."""
        self._clock = clock
        self._cuda = device.type == "cuda"
        self._open: list[str] = []
        self._marks: list[tuple[str | None, Any]] = []
        self._mark()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Counts the time of the block for the phase `name`."""
        self._open.append(name)
        self._mark()
        try:
            yield
        finally:
            self._open.pop()
            self._mark()

    def lap(self) -> dict[str, float]:
        """Seconds in each phase since the last lap, and under "step" in all; waits for a GPU to get this far."""
        self._mark()
        if self._cuda:
            self._marks[-1][1].synchronize()
        seconds = {"step": self._between(self._marks[0][1], self._marks[-1][1])}
        for (name, start), (_, end) in zip(self._marks, self._marks[1:], strict=False):
            if name is not None:
                seconds[name] = seconds.get(name, 0.0) + self._between(start, end)
        del self._marks[:-1]
        return seconds

    def _mark(self) -> None:
        """Begins to count time for the innermost open phase."""
        now: Any
        if self._cuda:
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        else:
            now = self._clock()
        self._marks.append((self._open[-1] if self._open else None, now))

    def _between(self, start: Any, end: Any) -> float:
        return float(start.elapsed_time(end) / 1000 if self._cuda else end - start)
