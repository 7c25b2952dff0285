"""Display of a run while it works: a live bar on a terminal, plain lines elsewhere.

It is never silent for more than a few seconds: with no news it repeats what is being waited for.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from taid_ray.run.log import DRIVER, STUDENT, Records

SILENCE_S = 4.0
FIGURES_S = 3.0  # below SILENCE_S, so that while steps go on their figures are shown and not what is being waited for
TICK_S = 0.5
LOGGED_S = 60.0
"""The log has the figures of a step this often; metrics.jsonl has them all."""


class _Bar(Progress):
    above: Callable[[], RenderableType] | None = None

    def get_renderables(self) -> Iterable[RenderableType]:
        if self.above is not None:
            yield self.above()
        yield from super().get_renderables()


class ProgressView:
    """Thread-safe. `say` leaves a line behind, `step` moves the bar; a daemon thread fills silences."""

    def __init__(
        self,
        console: Console | None = None,
        above: Callable[[], RenderableType] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        """above: what stands above the bar, asked for several times a second. clock: in seconds."""
        self.console, self._above, self._clock = console or Console(), above, clock
        self.records = Records()
        """Lines that were said, for `run.log.run_logging`."""
        self.made = 0
        """The last step that was shown."""
        self._started = self._clock()
        self._last_line = self._last_figures = self._last_logged = self._started
        self._activity, self._activity_since = "starting", self._started
        self._step_s: float | None = None
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._bar: _Bar | None = None
        self._task: Any = None

    def __enter__(self) -> "ProgressView":
        if self.console.is_terminal:
            self._bar = _Bar(
                SpinnerColumn(),
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=24),
                TimeElapsedColumn(),
                TextColumn("{task.fields[figures]}", markup=False),
                console=self.console,
                transient=True,
            )
            self._bar.above = self._above
            self._bar.start()
            self._task = self._bar.add_task(self._activity, total=None, figures="")
        else:
            threading.Thread(target=self._fill_silence, name="taid-progress", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed.set()
        if self._bar is not None:
            self._bar.stop()

    def say(self, message: str, role: str = DRIVER, level: int = logging.INFO) -> None:
        """Prints a line, and shows it as the current activity. role: who says it."""
        with self._lock:
            self.records.add(message, role, self.made, level)
            self._activity, self._activity_since = message, self._clock()
            self._print(message)
            if self._bar is not None:
                self._bar.update(self._task, description=message, figures="")

    def wait_for(self, activity: str) -> None:
        """Shows something as the current activity, without a line of its own unless it takes long."""
        with self._lock:
            self._activity = activity
            if self._bar is not None:
                self._bar.update(self._task, description=activity)

    def step(self, metrics: dict[str, Any], total_steps: int) -> None:
        """Shows the newest line of metrics; where there is no bar, at most once every few seconds."""
        self._step_s = metrics["step_s"] if self._step_s is None else 0.9 * self._step_s + 0.1 * metrics["step_s"]
        left = f"{(total_steps - metrics['step']) * self._step_s:.0f} s left"
        numbers = "  ".join(f"{name} {metrics[name]:.3f}" for name in ("t", "loss", "kl") if name in metrics)
        figures = f"step {metrics['step']}/{total_steps}  {numbers}  {left}"
        with self._lock:
            self.made = metrics["step"]
            if self._clock() - self._last_logged >= LOGGED_S or self.made == total_steps:
                self._last_logged = self._clock()
                self.records.add(figures, STUDENT, self.made, logging.INFO)
            following = min(metrics["step"] + 1, total_steps)
            self._activity, self._activity_since = f"step {following} of {total_steps}", self._clock()
            if self._bar is not None:
                # One more than the steps, for validating and saving: rich freezes a bar that is full.
                self._bar.update(
                    self._task,
                    description="training",
                    total=total_steps + 1,
                    completed=metrics["step"],
                    figures=figures,
                )
            elif self._clock() - self._last_figures >= FIGURES_S or metrics["step"] == total_steps:
                self._last_figures = self._clock()
                self._print(figures)

    def _print(self, message: str) -> None:
        self._last_line = self._clock()
        self.console.print(
            f"[{self._last_line - self._started:6.1f}s] {message}", markup=False, highlight=False, soft_wrap=True
        )

    def look(self) -> None:
        """Repeats what is being waited for if nothing was printed for a while. Called every TICK_S where there is no bar."""
        with self._lock:
            if self._clock() - self._last_line >= SILENCE_S:
                waited = self._clock() - self._activity_since
                self._print(f"... still at: {self._activity} ({waited:.0f} s)")

    def _fill_silence(self) -> None:
        while not self._closed.wait(TICK_S):
            self.look()
